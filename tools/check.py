"""`make check ONLY=07`: everything about one lesson or library notebook, in under a minute: export, clean,
its links and texts, the style of its module, its cells at size tiny and its tests."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from .gates import tool
from .lessons import teaching
from .modules import LONGEST
from .notebooks import FORGOTTEN, ROOT, Fault, Notebook, choose, command, notebooks
from .outputs import clean
from .run import clock, execute
from .texts import TEXTS


def own_tests(notebook: Notebook, root: Path) -> list[Path]:
    """The test files of a notebook.

    By its module (for 'explain.cam' test_explain_cam, else test_cam, else test_explain), else by its topic.
    """
    wing, _, name = (notebook.module or notebook.topic).rpartition(".")
    for stem in filter(None, (f"{wing}_{name}" if wing else "", name, wing, notebook.topic)):
        if found := sorted((root / "tests").rglob(f"test_{stem}.py")):
            return found
    return []


def module_of(notebook: Notebook, root: Path) -> Path | None:
    """The file that a notebook exports, if it exports any."""
    path = root / "cxr_course" / f"{(notebook.module or '-').replace('.', '/')}.py"
    return path if path.exists() else None


def export(notebook: Notebook, root: Path) -> list[str]:
    """Export all notebooks, which takes seconds, and clean this one."""
    if (done := tool("nbdev_export", root)).returncode:
        return [done.stderr.strip().splitlines()[-1]]
    clean(notebook.path)
    return []


def texts(notebook: Notebook, root: Path) -> list[str]:
    """Links, results and texts of this notebook, and its place in the sidebar."""
    lost = (
        ["_quarto.yml: the sidebar does not name it; add it to its part"]
        if notebook.part == FORGOTTEN
        else []
    )
    return [*lost, *(fault for gate in (*TEXTS, teaching) for fault in gate(notebook, root))]


def style(notebook: Notebook, root: Path) -> list[str]:
    """Ruff on the notebook, its module and its tests; the length of the module."""
    module = module_of(notebook, root)
    here = [notebook.path, *filter(None, [module]), *own_tests(notebook, root)]
    done = tool("ruff", root, "check", "--no-cache", "--quiet", "--output-format", "concise", *map(str, here))
    faults = (done.stdout or done.stderr).splitlines() if done.returncode else []
    if module and (n := len(module.read_text(encoding="utf-8").splitlines())) > LONGEST:
        faults.append(f"{module.relative_to(root)}: {n} lines (at most {LONGEST})")
    return faults


def cells_run(notebook: Notebook, root: Path) -> list[str]:
    """Its cells at size tiny, in a kernel of its own."""
    outcome = execute(notebook.path, "tiny")[1]
    if outcome.failure:
        return [outcome.failure]
    return ["its last code cell must call core.headline"] if notebook.lesson and not outcome.headline else []


class Tests:
    """The tests of a notebook, running beside its cells."""

    def __init__(self, notebook: Notebook, root: Path):
        self.files = own_tests(notebook, root)
        words = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *self.files]
        self.run = (
            subprocess.Popen(words, cwd=root, stdout=subprocess.PIPE, text=True) if self.files else None
        )

    def faults(self, notebook: Notebook, root: Path) -> list[str]:
        """What failed."""
        if not self.run:
            return []
        said = self.run.communicate()[0].splitlines()
        return (
            [line for line in said if line.startswith(("FAILED", "ERROR"))] or said[-3:]
            if self.run.returncode
            else []
        )


def check(notebook: Notebook, root: Path) -> int:
    """Every step on one notebook; how many faults there are."""
    started, count = time.perf_counter(), 0
    print(notebook.path.relative_to(root), flush=True)

    def step(name: str, do: Callable[[Notebook, Path], list[str]]) -> int:
        begun, faults = time.perf_counter(), do(notebook, root)
        verdict = f"{len(faults)} faults" if faults else "ok"
        print(
            f"  {name:<16} {clock(time.perf_counter() - begun):>8}  {verdict}",
            *faults[:10],
            sep="\n      ",
            flush=True,
        )
        return len(faults)

    count += step("export, clean", export)
    tests = Tests(notebook, root)
    count += step("links, results", texts) + step("style", style) + step("cells at tiny", cells_run)
    count += step(f"tests ({', '.join(p.name for p in tests.files) or 'none of its own'})", tests.faults)
    print(f"  together {clock(time.perf_counter() - started)}")
    return count


def main(words: Iterable[str]) -> int:
    """Check the notebooks that the words name."""
    if not words:
        raise Fault("which notebook? For instance: make check ONLY=07, or ONLY=cam")
    return int(sum(check(notebook, ROOT) for notebook in choose(notebooks(ROOT), words)) > 0)


if __name__ == "__main__":
    command(main)
