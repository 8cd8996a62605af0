"""Gates for the modules of the package: small, unique names, light imports."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

LONGEST = 250  # lines of a module
LIGHT = (
    "core",
    "frame",
    "show",
    "phantom",
    "stats",
    "data",
    "evaluation",
    "teaching",
    "cli",
)  # wings that load no network library
HEAVY = ("tensorflow", "keras", "keras_tuner", "tensorboard", "torch", "jax", "ray")
AT_ONCE = (*HEAVY, "numpy", "pandas", "matplotlib", "scipy", "sklearn")  # not loaded by `import cxr_course`


def modules(root: str | Path) -> list[Path]:
    """Every module that a notebook exports, in all folders of the package."""
    return sorted(p for p in (Path(root) / "cxr_course").rglob("*.py") if not p.name.startswith("_"))


def dotted(path: Path, root: str | Path) -> str:
    """The name under which a module is imported."""
    return ".".join(path.relative_to(root).with_suffix("").parts)


def small(root: str | Path) -> list[str]:
    """No module is longer than 250 lines."""
    long = [(path, len(path.read_text(encoding="utf-8").splitlines())) for path in modules(root)]
    return [
        f"{path.relative_to(root)}: {n} lines; find the part that is a module of its own (at most {LONGEST})"
        for path, n in long
        if n > LONGEST
    ]


def public(path: Path) -> list[str]:
    """The names that a module offers."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def unique(root: str | Path) -> list[str]:
    """No public name stands in two modules; the commands of the terminal are words of the terminal."""
    homes: dict[str, list[str]] = {}
    for path in modules(root):
        for name in public(path) if dotted(path, root).split(".")[1] != "cli" else ():
            homes.setdefault(name, []).append(dotted(path, root))
    return [
        f"{name} is public in {' and '.join(where)}; give one of them a name of its own"
        for name, where in sorted(homes.items())
        if len(where) > 1
    ]


LOADED = """
import importlib, sys
heavy, *names = [word.split(",") if "," in word else word for word in sys.argv[1:]]
for name in names:
    importlib.import_module(name)
    if found := sorted(set(heavy) & {m.split(".")[0] for m in sys.modules}): sys.exit(print(name, *found))
"""


def _loads(root: str | Path, heavy: Iterable[str], names: Iterable[str]) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", LOADED, ",".join(heavy), *names],
        cwd=root,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])},
    )
    if done.returncode:
        return [f"importing fails: {done.stderr.strip().splitlines()[-1]}"]
    name, *found = done.stdout.split() or [""]
    return (
        [f"{name}: importing it loads {', '.join(found)}; import that inside the function that needs it"]
        if found
        else []
    )


def light(root: str | Path) -> list[str]:
    """Nothing heavy is imported where it is not needed."""
    names = [dotted(path, root) for path in modules(root)]
    names = [name for name in names if name.split(".")[1] in LIGHT]
    return _loads(root, AT_ONCE, ["cxr_course"]) + _loads(root, HEAVY, names)
