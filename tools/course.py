"""`make course`: run the notebooks, each in a kernel of its own, and write each as a page, with an opening
page of headline figures."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from .notebooks import ROOT, Fault, Notebook, choose, command, notebooks, write
from .pages import contents, page
from .run import SIZES, Outcome, clock, execute


def course(
    root: str | Path = ROOT, only: Iterable[str] = (), *, size: str = "sample", out: str | Path | None = None
) -> int:
    """Run and write what ONLY names, or all; 0, 1 if a notebook failed, 130 if you stopped it."""
    root = Path(root).resolve()
    out, reading = Path(out or root / "_course"), notebooks(root)
    todo, outcomes, now = choose(reading, only), _recall(out, reading), []
    print(f"{len(todo)} notebooks at size {size}; pages go to {out.name}/", flush=True)
    try:
        for notebook in todo:
            if sys.stdout.isatty():
                print(f"{notebook.name} ...", end="\r", flush=True)
            outcomes[notebook.name] = _one(notebook, reading, size, out)
            now.append(outcomes[notebook.name])
            write(out / "runs.json", json.dumps([asdict(o) for o in outcomes.values()], indent=1))
            write(out / "index.html", contents(reading, outcomes))
            print(now[-1].line(), flush=True)
    except KeyboardInterrupt:
        print(
            f"\nstopped in {notebook.name}; what was finished before is in {out.name}/, "
            f"and `make course ONLY={notebook.name}` goes on here"
        )
        return 130
    return _close(now, out.relative_to(root) if out.is_relative_to(root) else out)


def _one(notebook: Notebook, reading: list[Notebook], size: str, out: Path) -> Outcome:
    made, outcome = execute(notebook.path, size)
    outcome.name, at = notebook.name, reading.index(notebook)
    before, after = reading[at - 1] if at else None, reading[at + 1] if at + 1 < len(reading) else None
    write(out / notebook.page, page(made, notebook, before, after))
    return outcome


def _recall(out: Path, reading: list[Notebook]) -> dict[str, Outcome]:
    try:
        kept = json.loads((out / "runs.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a first run
        return {}
    pages = {n.name: out / n.page for n in reading}
    return {o["name"]: Outcome(**o) for o in kept if o["name"] in pages and pages[o["name"]].exists()}


def _close(outcomes: list[Outcome], out: Path) -> int:
    failed = [o for o in outcomes if o.failure]
    peak, spent = max(o.memory for o in outcomes) / 2**20, sum(o.seconds for o in outcomes)
    print("\nHeadline figures")
    for outcome in outcomes:
        if outcome.headline and not outcome.failure:
            print(f"  {outcome.name:<32} {outcome.headline}")
    print(f"\ntogether {clock(spent)}, at most {peak:.0f} MB")
    for outcome in failed:
        print(f"\nFAILED {outcome.name}, {outcome.failure}")
    where = out / "index.html"
    print(
        f"\n{len(failed)} of {len(outcomes)} notebooks failed; the others are in {where}"
        if failed
        else f"\nopen {where}"
    )
    return int(bool(failed))


def main(words: list[str]) -> int:
    """`python -m tools.course [NAME ...]`; the size stands in CXR_COURSE_SIZE."""
    size = os.environ.get("CXR_COURSE_SIZE") or "sample"
    if size not in SIZES:
        raise Fault(f"CXR_COURSE_SIZE={size}: no such size; choose from {', '.join(SIZES)}")
    return course(only=words, size=size)


if __name__ == "__main__":
    command(main)
