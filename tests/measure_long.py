"""Measure on the phantom what takes a lesson too long, and write it where the lesson reads it.

    python tests/measure_long.py [system_a] [chain_a] [killed_worker] [--folder runs/long]

Only nbs/results/NAME.json is written, with the date and the command that gives it. `system_a` and `chain_a`
take a quarter of an hour each on two cores and go on where they were stopped; `killed_worker` takes minutes
and needs Ray.
"""
from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np

from cxr_course.core import atomic
from cxr_course.data.building import build_store
from cxr_course.data.loading import load_dataset
from cxr_course.data.splits import balanced_split, hold_out

RESULTS = Path(__file__).resolve().parent.parent / "nbs" / "results"


def write(name: str, **found) -> None:
    "The result with its date and command."
    with atomic(RESULTS / f"{name}.json") as part:
        part.write_text(json.dumps(dict(date=date.today().isoformat()) | found, indent=1) + "\n")
    print(RESULTS / f"{name}.json")


def system_a(folder: Path) -> None:
    "The eight models of system A, small, three seeds each: what each change gains."
    from cxr_course.training.experiments import run_experiments
    from cxr_course.training.results import paired_differences
    from cxr_course.training.systems import OUR_WAY
    from cxr_course.training.systems import system_a as chain
    images = hold_out(load_dataset("sample", classes=3), fraction=0.2, seed=0)
    eight = chain(images=60, more=120, scale=0.5, epochs=8)[:8]
    experiments = [replace(e, options=e.options | OUR_WAY) for e in eight]
    run_experiments(experiments, images, folder / "system_a", seeds=range(3))
    gains = paired_differences(folder / "system_a")
    write("system_a",
          command="python tests/measure_long.py system_a",
          data="phantom, three classes; 60 training images a class (A7: 120), images of half system A's "
               "height and width, 8 epochs, 3 seeds",
          rows=json.loads(gains.round(4).to_json(orient="records")))


def chain_a(folder: Path) -> None:
    "System A's eight models as published and one our way, small: training, validation and test figures."
    from cxr_course.training.experiments import run_experiments
    from cxr_course.training.reported import beside_reported, split_metrics
    from cxr_course.training.results import paired_differences
    from cxr_course.training.run import load_run
    from cxr_course.training.systems import system_a as chain
    sizes, seeds = dict(scale=0.37, epochs=40, images=60, more=120), range(1)
    images = balanced_split(load_dataset("sample", classes=3), n_train=sizes["more"], n_val=40)
    experiments, place = chain(**sizes), folder / "chain_a"
    run_experiments(experiments, images, place, seeds=seeds)
    reached = [dict(experiment=e.name, change=e.change, seed=seed, split=split, metric=metric,
                    value=round(found.value, 4))
               for e in experiments for seed in seeds
               for split, metrics in split_metrics(load_run(place / e.name / f"seed-{seed}"), 2).items()
               for metric, found in metrics.items()]
    as_rows = lambda frame: json.loads(frame.round(4).to_json(orient="records"))
    write("chain_a",
          command="python tests/measure_long.py chain_a",
          data=f"phantom, three classes; {sizes['images']} training images a class (A7: {sizes['more']}), "
               f"{sizes['scale']} of system A's height and width, {sizes['epochs']} epochs, "
               f"seeds: {len(seeds)}",
          seeds=len(seeds), settings=sizes, beside=as_rows(beside_reported("system_a", place)),
          differences=as_rows(paired_differences(place)), rows=reached)


def killed_worker(folder: Path) -> None:
    "Two workers of which one is killed after the first epoch, against one process left in peace."
    from cxr_course.models.cnn import CNNSpec, build_cnn
    from cxr_course.scale.engine import distributed_train
    from cxr_course.training.fit import fit
    from cxr_course.training.run import load_run
    place, side, settings = Path(tempfile.mkdtemp(dir=folder)), 64, dict(epochs=2, batch=32, seed=1)
    frame = hold_out(load_dataset("sample"), 0.25).sample(frac=1, random_state=0)
    frame = frame[frame.groupby("split", observed=True).cumcount() < 256]
    store = build_store(frame, (side, side), place / "store")
    network = CNNSpec((8, 16, 32), (16,), l2=0.001)
    one = fit(build_cnn(network, (side, side, 1), seed=1), store, run=place / "one", **settings)

    def job(strategy, resume):
        killed = place / "killed"

        def kill_after_first_epoch():
            while not (place / ".team.partial" / "state.npz").exists(): time.sleep(0.01)
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)

        if strategy.cluster_resolver.task_id == 1 and not killed.exists():
            threading.Thread(target=kill_after_first_epoch, daemon=True).start()
        opened = build_store(frame, (side, side), place / "store")
        fit(build_cnn(network, (side, side, 1), seed=1), opened, run=place / "team", strategy=strategy,
            resume=resume, **settings)

    said = []
    distributed_train(job, place / "team", workers=2, say=said.append)
    team = load_run(place / "team")
    assert (place / "killed").exists()
    weights = zip(one.model.get_weights(), team.model.get_weights())
    write("killed_worker",
          command="python tests/measure_long.py killed_worker",
          data=f"phantom, {len(store.rows('train'))} training images of {side} x {side}, batches of 32, "
               "2 epochs",
          workers=2,
          rows=[{"epoch": int(e), "one process": round(float(a), 6), "two, one killed": round(float(b), 6)}
                for e, a, b in zip(one.history["epoch"], one.history["loss"], team.history["loss"])],
          largest_difference_of_weights=max(float(np.abs(a - b).max()) for a, b in weights),
          same_files=contents(one.folder) == contents(team.folder),
          said=[line for line in said if "lost" in line])


def contents(folder: Path) -> set[str]:
    "Files of a run folder; a log's own number left out, for each sitting writes one."
    return {str(p.relative_to(folder)).split("tfevents")[0] for p in folder.rglob("*") if p.is_file()}


STUDIES = {study.__name__: study for study in (system_a, chain_a, killed_worker)}


def main() -> None:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"{' or '.join(STUDIES)}; default: all")
    parser.add_argument("--folder", type=Path, default=Path("runs/long"), help="where the run folders go")
    asked = parser.parse_args()
    if unknown := sorted(set(asked.studies) - STUDIES.keys()):
        sys.exit(f"no study is called {unknown[0]}; choose from {', '.join(STUDIES)}")
    folder = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in asked.studies or STUDIES:
        STUDIES[name](folder)


if __name__ == "__main__":
    main()
