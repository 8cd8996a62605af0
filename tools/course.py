"""`make course`: run the notebooks, each in a kernel of its own, and write each as a page, with an opening
page of headline figures."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from .notebooks import ROOT, Fault, Notebook, choose, command, notebooks, write
from .pages import contents, page
from .run import SIZES, Outcome, clock, execute


def course(
    root: str | Path = ROOT,
    only: Iterable[str] = (),
    *,
    size: str = "sample",
    out: str | Path | None = None,
    jobs: int = 1,
) -> int:
    """Run and write what ONLY names, or all, so many notebooks at a time.

    Returns 0, 1 if a notebook failed, 130 if you stopped it.
    """
    root, started = Path(root).resolve(), time.perf_counter()
    out, reading = Path(out or root / "_course"), notebooks(root)
    todo, outcomes, now = choose(reading, only), _recall(out, reading), []
    at_once = f", {jobs} at a time" if jobs > 1 else ""
    print(f"{len(todo)} notebooks at size {size}{at_once}; pages go to {out.name}/", flush=True)
    team = Team(jobs)
    try:
        for notebook, made, outcome in team.work(todo, size):
            outcomes[notebook.name] = outcome
            now.append(outcome)
            _write(out, reading, outcomes, notebook, made)
            print(outcome.line(), flush=True)
    except KeyboardInterrupt:
        stopped = [n.name for n in team.busy]
        print(
            f"\nstopped in {', '.join(stopped)}; what was finished before is in {out.name}/, "
            f'and `make course ONLY="{" ".join(stopped)}"` goes on here'
        )
        return 130
    now.sort(key=lambda outcome: [n.name for n in todo].index(outcome.name))
    spent = time.perf_counter() - started
    return _close(now, spent, out.relative_to(root) if out.is_relative_to(root) else out)


class Team:
    """Runs notebooks, several at a time, each with its share of the cores."""

    def __init__(self, jobs: int):
        self.jobs, self.busy, self.stop = jobs, [], threading.Event()
        self.cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.shares = [self.cores[i::jobs] for i in range(jobs)]

    def _one(self, notebook: Notebook, size: str):
        share = self.shares.pop()
        if share and self.jobs > 1:
            os.sched_setaffinity(0, share)  # of this thread, and of the kernel that it starts
        self.busy.append(notebook)
        made, outcome = execute(notebook.path, size, stop=self.stop)
        self.busy.remove(notebook)
        self.shares.append(share)
        outcome.name = notebook.name
        return notebook, made, outcome

    def work(self, todo: list[Notebook], size: str):
        """Each notebook with its results and Outcome, as soon as it has ended."""
        with ThreadPoolExecutor(self.jobs) as pool:
            running = [pool.submit(self._one, notebook, size) for notebook in todo]
            try:
                for done in as_completed(running):
                    yield done.result()
            except BaseException:
                self.stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def jobs_here() -> int:
    """How many notebooks this machine runs at a time: one for each core, and for each 2.5 GB; at most 4."""
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(4, cores, int(psutil.virtual_memory().available / 2.5e9)))


def _write(out: Path, reading: list[Notebook], outcomes: dict[str, Outcome], notebook: Notebook, made):
    at = reading.index(notebook)
    before, after = reading[at - 1] if at else None, reading[at + 1] if at + 1 < len(reading) else None
    write(out / notebook.page, page(made, notebook, before, after))
    known = [asdict(outcomes[n.name]) for n in reading if n.name in outcomes]
    write(out / "runs.json", json.dumps(known, indent=1))
    write(out / "index.html", contents(reading, outcomes))


def _recall(out: Path, reading: list[Notebook]) -> dict[str, Outcome]:
    try:
        kept = json.loads((out / "runs.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a first run
        return {}
    pages = {n.name: out / n.page for n in reading}
    return {o["name"]: Outcome(**o) for o in kept if o["name"] in pages and pages[o["name"]].exists()}


def _close(outcomes: list[Outcome], spent: float, out: Path) -> int:
    failed = [o for o in outcomes if o.failure]
    peak = max(o.memory for o in outcomes) / 2**20
    print("\nHeadline figures")
    for outcome in outcomes:
        if outcome.headline and not outcome.failure:
            print(f"  {outcome.name:<32} {outcome.headline}")
    print(f"\ntogether {clock(spent)}, at most {peak:.0f} MB in one notebook")
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
    return course(only=words, size=size, jobs=jobs_here())


if __name__ == "__main__":
    command(main)
