"""`python -m tools.results FOLDER [--only system_c ...] [--seeds 3] [--list]`: the chains of the five systems
and the reference models on the real data sets in a folder, written to nbs/results/SYSTEM-DATA.json for the
pages to read. What is finished is kept under runs/results/; the same command goes on where it was stopped."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

from .notebooks import ROOT, Fault, command, write
from .run import clock

RUNS, RESULTS = ROOT / "runs" / "results", ROOT / "nbs" / "results"


@dataclass(frozen=True)
class Setting:
    """A chain as it is run here."""

    system: str  # 'system_a' to 'system_e', or 'reference'
    layouts: tuple[str, ...]  # data sets it is run on, as `detect_layout` names them
    sizes: dict  # options of the chain: scale, epochs, images ...
    minutes: float  # of one run of one seed on two cores, about; the first guess until something has run
    least: int = 400  # images a set must have


# Everything that is smaller than published stands here. Two processor cores run all of it in about five
# hours: images at half their height and width or less, hundreds of training images a class, not thousands,
# and as many epochs as it takes a network to memorise these or to stop by itself.
SETTINGS = (
    Setting("system_a", ("kaggle", "mendeley"), dict(scale=0.5, epochs=40, images=400, more=800), 3),
    Setting("system_b", ("nih",), dict(scale=0.2, epochs=20), 4),
    Setting("system_c", ("kaggle", "mendeley"), dict(scale=0.43, epochs=12, images=600), 9),
    Setting("system_d", ("covid",), dict(scale=0.5), 2),
    Setting("system_e", ("kaggle", "mendeley"), dict(scale=0.4, epochs=25, images=300), 5),
    Setting("reference", ("kaggle", "mendeley", "covid"), dict(size=96, epochs=20), 4),
    Setting("reference", ("npz",), dict(size=28, epochs=30), 2),
)
SEEDS = 3
DIVIDED = {
    None: "test images as their makers divided them; without such, 15 % by patient",
    "pooled": "pooled and divided anew by patient, 64 % training, 16 % validation, 20 % test",
    "poured": "test images as their makers divided them; 20 % of the others validate, by patient",
}


@dataclass(frozen=True)
class Found:
    """A data set that was recognised."""

    name: str  # of its folder or file
    path: Path
    layout: str  # as `detect_layout` names it


def reference(size: int, epochs: int) -> list:
    """The course's own network, trained plainly and by the strong recipe."""
    from cxr_course.training.experiments import Experiment, changed

    plain = Experiment(
        "separable",
        model="separable",
        shape=(size, size),
        options=dict(epochs=epochs, patience=8, predict_train=True),
    )
    strong = dict(recipe="strong", patience=None)
    return [plain, changed(plain, "separable-strong", "the strong recipe", options=strong)]


def chain(setting: Setting) -> list:
    """The experiments of a setting."""
    from cxr_course.training.systems import find_system

    make = reference if setting.system == "reference" else find_system(setting.system).chain
    return make(**setting.sizes)


def data_sets(folder: Path, depth: int = 2) -> list[Found]:
    """The data sets in a folder, or the folder itself if it is one."""
    from cxr_course.core import CourseError
    from cxr_course.data.layouts import detect_layout, is_hidden, subfolders

    if not folder.exists():
        raise Fault(f"{folder}: no such folder; make results DATA=path/to/your/data")
    wanted = {layout for setting in SETTINGS for layout in setting.layouts}
    try:
        layout = detect_layout(folder)
    except CourseError:
        layout = None
    inside = subfolders(folder) if folder.is_dir() else []
    wrapped = depth == 2 and len(inside) == 1 and inside[0].name.lower() not in ("chest_xray", "images")
    if layout in wanted and not wrapped:
        return [Found(folder.name.removesuffix(".npz"), folder, layout)]
    if folder.is_file() or not depth:
        return []
    below = sorted(p for p in folder.iterdir() if not is_hidden(p) and (p.is_dir() or p.suffix == ".npz"))
    return [found for path in below for found in data_sets(path, depth - 1)]


def data_hash(path: Path) -> str:
    """A fingerprint of a data set: the names and sizes of its files, wherever it lies."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    base = path if path.is_dir() else path.parent
    rows = [f"{p.relative_to(base).as_posix()}\x1f{p.stat().st_size}" for p in files if p.name[0] != "."]
    return hashlib.blake2b("\n".join(rows).encode(), digest_size=8).hexdigest()


def images_of(found: Found, system: str):
    """The frame of a data set as a chain wants it, or the reason why it cannot have it."""
    from cxr_course.data.loading import load_dataset
    from cxr_course.training.systems import SYSTEMS, system_frame

    facts = SYSTEMS.get(system)
    frame = load_dataset(found.path, classes=facts.classes if facts else 2, unknown="image")
    return system_frame(system, frame) if facts else frame


@dataclass(frozen=True)
class Plan:
    """A chain on a data set: what is to be run, and where it goes."""

    setting: Setting
    found: Found
    seeds: int
    runs: Path
    results: Path

    @property
    def name(self) -> str:
        return f"{self.setting.system}-{self.found.name}"

    @property
    def folder(self) -> Path:
        return self.runs / self.name

    def steps(self) -> list[tuple]:
        """Experiments and seeds, seed by seed, so that the table is whole early."""
        return [(e, seed) for seed in range(self.seeds) for e in chain(self.setting)]

    def done(self, e, seed: int) -> bool:
        return (self.folder / e.name / f"seed-{seed}" / "card.json").exists()


def plans(folder: Path, only: Iterable[str], seeds: int, say: Callable, **places: Path) -> list[Plan]:
    """Every chain that fits a data set in the folder."""
    found, made = data_sets(folder), []
    known = dict.fromkeys(setting.system for setting in SETTINGS)
    if odd := [name for name in only if name not in known]:
        raise Fault(f"nothing is called {odd[0]}; choose from {', '.join(known)}")
    names = [one.name for one in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise Fault(f"{folder}: two data sets are called {min(twice)}; rename one of the folders")
    if not found:
        raise Fault(f"{folder}: no data set of a layout that a chain is run on; docs: data.layouts")
    for one in found:
        n = count_images(one)
        for setting in SETTINGS:
            if one.layout not in setting.layouts or only and setting.system not in only:
                continue
            if n < setting.least:
                say(f"{setting.system} on {one.name}: left out, {n} images are fewer than {setting.least}")
            else:
                made.append(Plan(setting, one, seeds, **places))
    return made


def count_images(found: Found) -> int:
    """How many images a data set has."""
    from cxr_course.data.loading import load_dataset

    return len(load_dataset(found.path, sizes=False, unknown="image"))


def work(plan: Plan, name: str, seed: int) -> None:
    """Run one experiment with one seed, in this process."""
    from cxr_course.core import atomic
    from cxr_course.training.experiments import run_experiments

    experiment = {e.name: e for e in chain(plan.setting)}[name]
    frame = images_of(plan.found, plan.setting.system)
    run_experiments([experiment], frame, plan.folder, [seed], say=lambda line: None)
    with atomic(plan.folder / name / f"seed-{seed}" / "made.json") as part:
        part.write_text(json.dumps(dict(commit=commit(), data_hash=data_hash(plan.found.path))))


def in_a_process(plan: Plan, name: str, seed: int) -> None:
    """Run one experiment in a process of its own: its memory is measured alone, Ctrl-C leaves it unharmed."""
    of, found = plan.setting, plan.found
    words = [of.system, json.dumps(of.sizes), found.path, found.name, found.layout, name, seed, plan.runs]
    quiet = dict(CXR_COURSE_QUIET="1", TF_CPP_MIN_LOG_LEVEL="3", PYTHONUNBUFFERED="1")
    started = subprocess.Popen(
        [sys.executable, "-m", "tools.results", "--work", json.dumps([str(word) for word in words])],
        cwd=ROOT,
        env=os.environ | quiet,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the parent, which then ends this one without a last word
    )
    try:
        said = started.communicate()[1]
    except KeyboardInterrupt:
        started.kill()
        started.communicate()
        raise
    if started.returncode:
        lines = [line for line in said.splitlines() if line.strip() and "cudart_stub" not in line]
        raise Fault("\n    ".join([f"{plan.name}: {name}, seed {seed}, failed", *lines[-3:]]))


def worker(words: list[str]) -> int:
    """What a process of its own does."""
    from cxr_course.core import CourseError
    from cxr_course.training.job import start_tensorflow

    system, sizes, path, called, layout, name, seed, runs = words
    setting = Setting(system, (layout,), json.loads(sizes), 0)
    if name not in (known := [e.name for e in chain(setting)]):
        raise Fault(f"no experiment is called {name}; there are {', '.join(known)}")
    start_tensorflow()
    try:
        work(Plan(setting, Found(called, Path(path), layout), 0, Path(runs), RESULTS), name, int(seed))
    except CourseError as e:
        raise Fault(str(e)) from e
    return 0


def commit() -> str:
    """The revision of the repository, with a + where files were changed since."""
    told = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    head = told(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
    changed = told(["git", "status", "--porcelain", "--untracked-files=no", "cxr_course", "tools"]).stdout
    return (head or "unknown") + ("+" if changed.strip() else "")


def rounded(value):
    """Numbers with four digits, and None for what is not there, at every depth."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return None if value != value else round(value, 4)
    return value


def records(frame) -> list[dict]:
    """A table as a list of rows."""
    return rounded(frame.astype(object).where(frame.notna(), None).to_dict("records")) if len(frame) else []


def row(plan: Plan, e, seed: int) -> dict:
    """What one run was and reached."""
    from cxr_course.training.reported import split_metrics
    from cxr_course.training.run import load_run

    folder = plan.folder / e.name / f"seed-{seed}"
    run, made = load_run(folder), folder / "made.json"
    card, training = run.card, run.card["training"]
    spec = card["model"]["spec"] or {}
    weights = {k: spec[k] for k in ("weights", "note") if spec.get(k)}
    return dict(
        experiment=e.name, seed=seed, parent=e.parent, change=e.change, model=card["model"]["name"],
        parameters=card["model"]["parameters"], shape=card["preprocessing"]["shape"], date=card["date"][:10],
        **(json.loads(made.read_text()) if made.exists() else dict(commit=None, data_hash=None)),
        training={k: training[k] for k in ("epochs", "schedule", "keep", "lr", "batch", "patience")},
        epochs=training["epochs_run"], kept_epoch=training["best_epoch"], seconds=training["seconds"],
        peak_mb=training["peak_mb"], threshold=card["threshold"], **weights,
        images=card["data"]["splits"], metrics=rounded(
            {split: {metric: est[:3] for metric, est in found.items()}
             for split, found in split_metrics(run).items()}),
    )


def collected(plan: Plan, known: dict) -> dict:
    """Everything that is finished of a plan, for a page."""
    from cxr_course.core import CourseError
    from cxr_course.data.registry import REGISTRY
    from cxr_course.training.reported import beside_reported
    from cxr_course.training.results import collect_runs, paired_differences, summarise_runs
    from cxr_course.training.systems import SYSTEMS

    steps, facts = plan.steps(), SYSTEMS.get(plan.setting.system)
    ready = [(e, seed) for e, seed in steps if plan.done(e, seed)]
    for e, seed in ready:
        if (e.name, seed) not in known:
            known[e.name, seed] = row(plan, e, seed)
    rows = [known[e.name, seed] for e, seed in ready]
    try:
        differences = records(paired_differences(plan.folder))
    except CourseError:  # a model was run with other seeds than the one it changes
        differences = []
    title = REGISTRY[plan.found.layout].title if plan.found.layout in REGISTRY else "an .npz file"
    only = "" if plan.seeds == SEEDS else f" SEEDS={plan.seeds}"
    return dict(
        date=date.today().isoformat(),
        system=plan.setting.system,
        title=facts.title if facts else "The course's own network",
        data=f"{title}: {plan.found.name}",
        data_hash=data_hash(plan.found.path),
        divided=DIVIDED[facts.cut if facts else None],
        commit=commit(),
        command=f'make results DATA=folder ONLY="{plan.setting.system}"{only}',
        settings=plan.setting.sizes | dict(seeds=plan.seeds),
        finished=[len(ready), len(steps)],
        rows=rows,
        summary=records(summarise_runs(collect_runs(plan.folder))),
        differences=differences,
        beside=records(beside_reported(plan.setting.system, plan.folder)) if facts else [],
    )


def refuse_other_images(plan: Plan) -> None:
    """Raise if the images are not those that this folder was begun with."""
    file, now = plan.folder / "data.json", data_hash(plan.found.path)
    if file.exists() and (then := json.loads(file.read_text())["data_hash"]) != now:
        remedy = f"remove {plan.runs.name}/{plan.name} to begin anew, or bring the old files back"
        raise Fault(f"{plan.name}: the files have changed since it was begun ({then}, now {now}); {remedy}")
    write(file, json.dumps(dict(data_hash=now)))


class Pace:
    """How long the rest will take, by what has been run so far."""

    def __init__(self, made: list[Plan]):
        self.left = {(p.name, e.name, s): p.setting.minutes * 60 for p in made for e, s in p.steps()
                     if not p.done(e, s)}
        self.guessed = self.took = 0.0

    def add(self, key: tuple, seconds: float) -> None:
        """A run has ended."""
        self.guessed += self.left.pop(key)
        self.took += seconds

    @property
    def minutes(self) -> float:
        """Of all that is left."""
        return sum(self.left.values()) / 60 * (self.took / self.guessed if self.guessed else 1)


def run_plan(plan: Plan, run: Callable, pace: Pace, say: Callable[[str], None]) -> None:
    """Run what is not yet run, and rewrite the file of results after each run."""
    import time

    refuse_other_images(plan)
    steps, known, file = plan.steps(), {}, plan.results / f"{plan.name}.json"
    for i, (e, seed) in enumerate(steps, 1):
        if plan.done(e, seed):
            continue
        begun = time.perf_counter()
        run(plan, e.name, seed)
        pace.add((plan.name, e.name, seed), time.perf_counter() - begun)
        found = collected(plan, known)
        write(file, json.dumps(found, indent=1) + "\n")
        auc = next(r for r in found["rows"] if (r["experiment"], r["seed"]) == (e.name, seed))
        say(f"{plan.name}  {i} of {len(steps)}  {e.name}, seed {seed}: test AUC "
            f"{auc['metrics']['test']['AUC'][0]}, {clock(time.perf_counter() - begun)}; about "
            f"{pace.minutes:.0f} min left")
    if not file.exists() or json.loads(file.read_text())["finished"] != [len(steps)] * 2:
        write(file, json.dumps(collected(plan, known), indent=1) + "\n")


def results(made: list[Plan], run: Callable = in_a_process, say: Callable[[str], None] = print) -> int:
    """Run every plan; how many of them failed."""
    pace, failed = Pace(made), 0
    for plan in made:
        try:
            run_plan(plan, run, pace, say)
        except Fault as e:
            failed += 1
            say(str(e))
    return failed


def listed(made: list[Plan]) -> str:
    """What would be run, and about how long it takes."""
    lines = [f"{'chain and data':<40} {'runs':>5} {'done':>5} {'minutes left, about':>20}"]
    for plan in made:
        steps = plan.steps()
        done = sum(plan.done(*step) for step in steps)
        left = (len(steps) - done) * plan.setting.minutes
        lines.append(f"{plan.name:<40} {len(steps):>5} {done:>5} {left:>20.0f}")
    return "\n".join(lines)


def stop(*_) -> None:
    """End as Ctrl-C does."""
    raise KeyboardInterrupt


def main(words: list[str]) -> int:
    """Run the chains that fit the data sets in a folder, or say which would be run."""
    parser = argparse.ArgumentParser(prog="python -m tools.results", description=__doc__)
    parser.add_argument("folder", nargs="?", help="where the data sets lie")
    parser.add_argument("--only", nargs="*", default=[], metavar="SYSTEM", help="these chains only")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"random seeds of each; default {SEEDS}")
    parser.add_argument("--list", action="store_true", help="only say what would be run")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    asked = parser.parse_args(words)
    if asked.work:
        return worker(json.loads(asked.work))
    if not asked.folder:
        raise Fault("which data? For instance: make results DATA=path/to/folder ONLY=\"system_c system_d\"")
    if asked.seeds < 1:
        raise Fault("--seeds: 1 or more")
    made = plans(Path(asked.folder).resolve(), asked.only, asked.seeds, print, runs=RUNS, results=RESULTS)
    print(listed(made), flush=True)
    if asked.list:
        return 0
    signal.signal(signal.SIGTERM, stop)
    try:
        return int(results(made, say=partial(print, flush=True)) > 0)
    except KeyboardInterrupt:
        print("\nstopped; what is finished is kept, and the same command goes on from here")
        return 130


if __name__ == "__main__":
    command(main)
