"""`python -m tools.gates [NAME ...]`: what keeps the repository true. Layers are import-linter's work and
style is ruff's; what stands here is what no tool does. A gate is a function of the repository that returns
faults, a line each."""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .lessons import teaching
from .modules import light, modules, small, unique
from .notebooks import ROOT, Fault, command, directives, cells, files, notebooks, sidebar
from .readme import readme, stale_index
from .texts import TEXTS, dead_links


def tool(name: str, folder: str | Path, *words: str) -> subprocess.CompletedProcess:
    """Run a program of the development environment."""
    program = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if not program:
        raise Fault(f"{name} is not installed; pip install -e '.[dev]'")
    return subprocess.run([program, *words], cwd=folder, capture_output=True, text=True)


@contextmanager
def copied(root: str | Path) -> Iterator[Path]:
    """A copy of what the course is made from, to try things on, gone afterwards."""
    keep = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("nbs", "cxr_course", "settings.ini", "setup.py", "README.md", "_quarto.yml"):
            source, to = Path(root) / name, Path(folder) / name
            if source.is_dir():
                shutil.copytree(source, to, symlinks=True, ignore=keep)
            elif source.exists():
                shutil.copy2(source, to)
        yield Path(folder)


def layers(root: str | Path) -> list[str]:
    """Modules import only from lower layers (import-linter, by .importlinter)."""
    done = tool("lint-imports", root, "--no-cache", "--config", ".importlinter")
    found = [line.strip(" -") for line in done.stdout.splitlines() if line.startswith(("- ", "cxr_course"))]
    return (
        [f"{line}; move what both need to the lower layer" for line in found or [done.stdout + done.stderr]]
        if done.returncode
        else []
    )


def style(root: str | Path) -> list[str]:
    """Library, tests, tools and notebooks keep the style (ruff, by ruff.toml)."""
    here = [name for name in ("cxr_course", "tests", "tools", "nbs") if (Path(root) / name).exists()]
    done = tool("ruff", root, "check", "--no-cache", "--quiet", "--output-format", "concise", *here)
    return (done.stdout or done.stderr).splitlines() if done.returncode else []


def exported(root: str | Path) -> list[str]:
    """Exporting and cleaning the notebooks changes nothing."""
    faults = []
    with copied(root) as other:
        for path in modules(other):
            path.unlink()
        for name in ("nbdev_export", "nbdev_clean"):
            if (done := tool(name, other)).returncode:
                return [f"{name} failed: {done.stderr.strip().splitlines()[-1]}"]
        for kind, remedy in (
            ("cxr_course/**/*.py", "change the notebook and run nbdev_export"),
            ("nbs/**/*.ipynb", "run nbdev_clean"),
        ):
            names = {
                p.relative_to(top).as_posix()
                for top in (Path(root), other)
                for p in top.glob(kind)
                if ".ipynb_ch" not in str(p)
            }
            for name in sorted(names):
                pair = Path(root) / name, other / name
                if not pair[1].exists():
                    faults.append(f"{name}: no notebook exports it; delete it, or write its notebook")
                elif not pair[0].exists() or not filecmp.cmp(*pair, shallow=False):
                    faults.append(f"{name}: not what nbdev makes of the notebooks; {remedy}")
    return faults


def readme_fresh(root: str | Path) -> list[str]:
    """README.md is what nbs/index.ipynb says, with the lessons' own minutes; its links lead somewhere."""
    if stale_index(root) is not None:
        return ["nbs/index.ipynb: its table is not what the lessons' openings say; run `make readme`"]
    path = Path(root) / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text != readme(root):
        return ["README.md: not what nbs/index.ipynb says; run `make readme`"]
    return list(dead_links(path, text, Path(root)))


PROCESS = """
import os
from pathlib import Path
from nbdev.processors import FilterDefaults
from nbdev.serve_drv import main
top = Path.cwd()
hidden = lambda path: any(part[0] in "._" for part in path.relative_to(top).parts)
for path in sorted(p for p in (top / "nbs").rglob("*.ipynb") if not hidden(p)):
    os.chdir(top)
    to = top / "_proc" / path.relative_to(top / "nbs")
    to.parent.mkdir(parents=True, exist_ok=True)
    try: main((path, to, FilterDefaults))
    except Exception as e: print(f"{path.relative_to(top)}, {' '.join(str(e).split())[:120]} ({e.__cause__})")
"""  # what nbdev_docs does before it calls Quarto, but going on after a fault
LATER = r"show_doc\(|: def "
UNDEFINED = "move the cell that defines this name above the cell whose function mentions it"
MIXED = "it runs cells that import something by themselves, so give imports a cell of their own"


def processed(root: str | Path) -> list[str]:
    """nbdev turns every notebook into one that Quarto can render."""
    with copied(root) as other:
        surroundings = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(other)}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROCESS],
            cwd=other,
            capture_output=True,
            text=True,
            env=surroundings,
        )
        if done.returncode:
            raise Fault(f"nbdev cannot process notebooks: {done.stderr.strip().splitlines()[-1]}")
        faults = [
            f"{line}: nbdev cannot process it; {UNDEFINED if re.search(LATER, line) else MIXED}"
            for line in done.stdout.splitlines()
            if ".ipynb, " in line
        ]
        for made in sorted((other / "_proc").rglob("*.ipynb")):
            shown = {
                name
                for cell in cells(made)
                if cell["cell_type"] == "code"
                for name in directives(cell["source"])
            }
            if left := sorted(shown & {"default_exp", "export", "exporti", "hide"}):
                at = made.relative_to(other / "_proc")
                faults.append(
                    f"nbs/{at}: the page would show #| {left[0]}; write the directive at the top of its cell"
                )
    return faults


def listed(root: str | Path) -> list[str]:
    """The sidebar and the folders name the same notebooks."""
    names, folder = [name for _, name in sidebar(root)], Path(root) / "nbs"
    here = {p.relative_to(folder).as_posix() for p in files(root)}
    faults = [
        f"_quarto.yml: the sidebar does not name {name}; add it to its part"
        for name in sorted(here - set(names))
    ]
    faults += [
        f"_quarto.yml: the sidebar names {name}, which is not in nbs; take it out"
        for name in sorted(set(names) - here)
    ]
    twice = sorted({name for name in names if names.count(name) > 1})
    return faults + [f"_quarto.yml: the sidebar names {name} twice; take one out" for name in twice]


def _of_texts(check: Callable) -> Callable[[str | Path], list[str]]:
    def gate(root: str | Path) -> list[str]:
        return [fault for notebook in notebooks(root) for fault in check(notebook, Path(root))]

    gate.__name__, gate.__doc__ = check.__name__, check.__doc__
    return gate


GATES: dict[str, Callable[[str | Path], list[str]]] = {
    gate.__name__: gate
    for gate in (
        layers,
        style,
        exported,
        readme_fresh,
        processed,
        listed,
        small,
        unique,
        light,
        *map(_of_texts, (*TEXTS, teaching)),
    )
}


def main(words: list[str]) -> int:
    """Print what the named gates, or all, have found; 1 if anything."""
    if unknown := sorted(set(words) - GATES.keys()):
        raise Fault(f"no gate is called {unknown[0]}; choose from {', '.join(GATES)}")
    found = 0
    for name in words or GATES:
        faults = GATES[name](ROOT)
        found += len(faults)
        print(f"{name:<18} {len(faults) or 'nothing':>8}  {GATES[name].__doc__}", *faults[:20], sep="\n    ")
    return int(found > 0)


if __name__ == "__main__":
    command(main)
