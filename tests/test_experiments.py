"""Lists of experiments: continued after a kill, refused when mixed, honest about missing parents."""
import json
from dataclasses import replace

import pytest

pytest.importorskip("keras")
from cxr_course.core import CourseError
from cxr_course.data.loading import load_dataset
from cxr_course.data.splits import hold_out
from cxr_course.training import fit as fit_module
from cxr_course.training.experiments import Experiment, changed, run_experiments
from cxr_course.training.results import collect_runs, paired_differences

START = Experiment("start", model="cnn", shape=(32, 32), options=dict(epochs=1))
CHAIN = [START, changed(START, "smooth", "label smoothing", options=dict(smoothing=.1))]


@pytest.fixture(scope="module")
def images(): return hold_out(load_dataset("sample", classes=3), fraction=.3, seed=0)


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory):
    place = tmp_path_factory.mktemp("experiments")
    done, fit = [], fit_module.fit

    def killed(*args, **kwargs):
        if len(done) == 1: raise MemoryError("killed")
        done.append(kwargs["run"])
        return fit(*args, **kwargs)
    fit_module.fit = killed
    try:
        with pytest.raises(MemoryError): run_experiments(CHAIN, images, place, seeds=[0])
    finally: fit_module.fit = fit
    assert len(list(place.glob("*/seed-*/card.json"))) == 1
    return run_experiments(CHAIN, images, place, seeds=[0])


def test_a_killed_list_goes_on(folder, images):
    runs = collect_runs(folder)
    assert runs["experiment"].tolist() == ["start", "smooth"] and runs["change"].tolist() == [
        "the start", "label smoothing",
    ]
    assert paired_differences(folder)["parent"].tolist() == ["start"]


def test_other_films_and_changed_experiments_are_refused(folder, images):
    with pytest.raises(CourseError, match="other images"): run_experiments(CHAIN, images.iloc[:-1], folder)
    with pytest.raises(CourseError, match="has changed since"):
        run_experiments([replace(START, model="a1")], images, folder)
    assert set(json.loads((folder / "experiments.json").read_text())["experiments"]) == {"start", "smooth"}


def test_no_experiments_there(tmp_path):
    with pytest.raises(CourseError, match="no experiments"): collect_runs(tmp_path)


def test_no_common_seed(folder, images):
    other = changed(CHAIN[1], "other", "smoother still", options=dict(smoothing=.2))
    run_experiments([other], images, folder, seeds=[1])
    with pytest.raises(CourseError, match="no seed in common"): paired_differences(folder)
