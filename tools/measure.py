"""`python -m tools.measure [--rev REVISION]`: how large and how dense the library is, now or at any
revision, module by module."""

from __future__ import annotations

import argparse
import ast
import statistics
import subprocess
from collections import Counter
from pathlib import Path

from .notebooks import ROOT, Fault, command

COLUMNS = (
    ("module", "<34"),
    ("lines", ">6"),
    ("names", ">6"),
    (">100", ">7.1%"),
    (">110", ">7.1%"),
    ("nodes/line", ">11.1f"),
    ("functions", ">10"),
    ("median", ">7.0f"),
    ("p90", ">5.0f"),
    ("longest", ">8"),
    ("parameters", ">11"),
    ("positional", ">11"),
)


def sources(rev: str | None, root: Path = ROOT) -> dict[str, str]:
    """Module name and text, from the folder or from a git revision."""
    if rev is None:
        found = {
            p.relative_to(root).as_posix(): p.read_text(encoding="utf-8")
            for p in (root / "cxr_course").rglob("*.py")
        }
    else:
        names = _git(root, "ls-tree", "-r", "--name-only", rev, "cxr_course").split()
        found = {name: _git(root, "show", f"{rev}:{name}") for name in names if name.endswith(".py")}
    return {name: text for name, text in sorted(found.items()) if not name.split("/")[-1].startswith("_")}


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise Fault(done.stderr.strip())
    return done.stdout


def _code(text: str) -> list[str]:  # lines that hold code
    return [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def measure(name: str, text: str) -> dict:
    """Everything measured about one text; parameters and positional are the most of any function."""
    tree, code = ast.parse(text), _code(text)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    lengths = sorted(len(_code(ast.get_source_segment(text, f))) for f in functions) or [0]
    positional = [len(f.args.posonlyargs) + len(f.args.args) for f in functions] or [0]
    keywords = [len(f.args.kwonlyargs) for f in functions] or [0]
    return {
        "module": name,
        "lines": len(text.splitlines()),
        "names": len(_public(tree)),
        "lengths": lengths,
        ">100": sum(len(line) > 100 for line in code) / max(len(code), 1),
        ">110": sum(len(line) > 110 for line in code) / max(len(code), 1),
        "nodes/line": sum(1 for _ in ast.walk(tree)) / max(len(code), 1),
        "functions": len(functions),
        "median": statistics.median(lengths),
        "p90": lengths[int(0.9 * (len(lengths) - 1))],
        "longest": lengths[-1],
        "parameters": max(map(sum, zip(positional, keywords))),
        "positional": max(positional),
    }


def _public(tree: ast.Module) -> list[str]:
    lists = [
        n.value
        for n in tree.body
        if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"
    ]
    return ast.literal_eval(lists[0]) if lists else []


def main(words: list[str]) -> int:
    """Print the table, its sum, and the public names that stand in more than one module."""
    parser = argparse.ArgumentParser(prog="python -m tools.measure", description=__doc__)
    parser.add_argument("--rev", help="a git revision; default: the files as they are")
    texts = sources(parser.parse_args(words).rev)
    rows = [
        measure(name.removeprefix("cxr_course/").removesuffix(".py"), text) for name, text in texts.items()
    ]
    if not rows:
        raise Fault("no modules there")
    homes = Counter(name for text in texts.values() for name in _public(ast.parse(text)))
    whole = measure(
        f"{len(rows)} modules together", "\n".join(_without_future(text) for text in texts.values())
    )
    whole |= dict(names=sum(row["names"] for row in rows), lines=sum(row["lines"] for row in rows))
    print("".join(format(name, form[0] + form[1:].split(".")[0]) for name, form in COLUMNS))
    for row in [*rows, whole]:
        print("".join(format(row[name], form) for name, form in COLUMNS))
    lines = sorted(row["lines"] for row in rows)
    middle, over = statistics.median(lines), sum(n > 250 for n in lines)
    print(f"\nlines a module: median {middle:.0f}, at most {lines[-1]}; over 250: {over}")
    print(f"public names in more than one module: {sum(n > 1 for n in homes.values())}")
    return 0


def _without_future(text: str) -> str:  # so that texts can stand one behind the other
    return text.replace("from __future__ import annotations", "")


if __name__ == "__main__":
    command(main)
