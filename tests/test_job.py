"""One door to training: the same run folder and guards from the terminal, from experiments and Python."""
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_course.core import CourseError
from cxr_course.data import building as building_module
from cxr_course.data.building import build_store
from cxr_course.data.loading import load_dataset
from cxr_course.data.splits import hold_out, refuse_leakage
from cxr_course.frame import make_frame
from cxr_course.phantom.files import write_dataset
from cxr_course.phantom.world import population
from cxr_course.training.experiments import Experiment, run_experiments
from cxr_course.training.job import train_job
from cxr_course.training.judging import predict_elsewhere, report_run, report_text
from cxr_course.training.preparing import arrange, choose_findings, prepare
from cxr_course.training.reference import load_reference
from cxr_course.training.run import load_run
from cxr_course.training.run_folder import can_resume

pytest.importorskip("keras")

SETTINGS = dict(shape=(32, 32), epochs=1)
CONTENT = {"model.keras", "card.json", "history.csv", "predictions.csv", "images.csv", "reference.npz",
           "report/report.html", "report/report.png", "report/report.json"}


def quiet(line):
    "Nobody listens."


@pytest.fixture(scope="module")
def world(tmp_path_factory, cache):
    "A small simulated world on disk, in the layout of the Kaggle set."
    folder = tmp_path_factory.mktemp("job") / "films"
    write_dataset(population(36, hospitals=("A", "B", "C"), pixels=64), folder, "kaggle")
    return folder


@pytest.fixture(scope="module")
def images(world):
    return load_dataset(world, unknown="image")


@pytest.fixture(scope="module")
def python(images, tmp_path_factory):
    "The run that everything is compared with."
    return train_job(images, tmp_path_factory.mktemp("runs") / "python", say=quiet, **SETTINGS)


@pytest.fixture(scope="module")
def terminal(world, tmp_path_factory):
    from typer.testing import CliRunner

    from cxr_course.cli.__main__ import app
    out = tmp_path_factory.mktemp("runs") / "terminal"
    done = CliRunner().invoke(app, ["train", "--data", str(world), "--size", "32", "--epochs", "1", "--out",
                                    str(out)])
    assert done.exit_code == 0, done.output
    return load_run(out)


@pytest.fixture(scope="module")
def listed(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "list"
    one = Experiment("one", model="smallnet", shape=(32, 32), options=dict(epochs=1, patience=5))
    run_experiments([one], images, folder, seeds=[0], say=quiet)
    return load_run(folder / "one" / "seed-0")


def content(run):
    "Names of all files of a run; of logs and times only that they are there."
    return {str(p.relative_to(run.folder)) for p in run.folder.rglob("*") if p.is_file()
            and "logs" not in p.parts}


def keys(card):
    "The names in a card, at every depth."
    return {k: keys(v) for k, v in card.items()} if isinstance(card, dict) else None


# one content

def test_the_size_that_nobody_said():
    "Small images stay small, large ones become 128; a finished network knows its own, a backbone its least."
    from types import SimpleNamespace

    from cxr_course.data.resize import default_shape
    from cxr_course.training.job import _own_shape
    frame = lambda h, w: pd.DataFrame(dict(path="x.png", height=h, width=w))
    assert default_shape(frame([28, 28, 28], [28, 28, 28])) == (28, 28)
    assert default_shape(frame([64, 500, 90], [80, 700, 70])) == (70, 70)      # the median of 64, 500, 70
    assert default_shape(frame([1024, 900], [800, 1200])) == (128, 128)
    assert default_shape(frame([28, 28], [28, None])) == (28, 28)                    # a size that nobody read
    told = []
    assert _own_shape(frame([28], [28]), "smallnet", None, told.append) == (28, 28) and "28 x 28" in told[0]
    assert _own_shape(frame([28], [28]), "smallnet", "vgg16", told.append) == (32, 32)
    built = SimpleNamespace(input_shape=(None, 96, 80, 1))
    assert _own_shape(frame([28], [28]), built, None, told.append) == (96, 80)
    told.clear()
    assert _own_shape(frame([500], [400]), "smallnet", None, told.append) == (128, 128) and not told


def test_sizes_that_nobody_read_are_read_from_some_headers(tmp_path):
    from PIL import Image

    from cxr_course.data.resize import default_shape
    paths = []
    for i in range(60):
        Image.new("L", (40, 30)).save(tmp_path / f"{i:02d}.png")
        paths.append(str(tmp_path / f"{i:02d}.png"))
    (tmp_path / "00.png").write_text("no image")
    frame = pd.DataFrame(dict(path=paths, height=None, width=None))
    assert default_shape(frame) == (30, 30)


def test_all_doors_leave_the_same_files(python, terminal, listed):
    assert content(python) == content(terminal) == content(listed) == CONTENT
    for run in (python, terminal, listed):
        assert any((run.folder / "logs").iterdir())
        assert not [p for p in run.folder.parent.iterdir() if p.name.startswith(".")]


def test_all_doors_leave_the_same_card(python, terminal, listed):
    assert keys(python.card) == keys(terminal.card) == keys(listed.card)
    assert {run.card["format"] for run in (python, terminal, listed)} == {2}
    for key in ("labels", "kind", "threshold", "preprocessing", "seen", "metrics"):
        assert python.card[key] == terminal.card[key] == listed.card[key], key
    assert python.card["data"]["hash"] == terminal.card["data"]["hash"]


def test_all_doors_learn_the_same(python, terminal, listed):
    for run in (terminal, listed):
        for ours, theirs in zip(python.model.get_weights(), run.model.get_weights()):
            np.testing.assert_array_equal(ours, theirs)
        pd.testing.assert_frame_equal(python.history.drop(columns="seconds"),
                                      run.history.drop(columns="seconds"))


def test_all_doors_write_down_what_was_learned_from(python, terminal, listed):
    for run in (python, terminal, listed):
        known = pd.read_csv(run.folder / "images.csv", dtype=str)
        assert list(known) == ["path", "patient", "group", "split", "sha256"]
        assert set(known["split"]) == {"train", "val", "test"} and known["sha256"].str.len().eq(64).all()
        of = known.groupby("group")["split"].nunique()
        assert of.eq(1).all()


# the same guards

def test_no_door_judges_what_it_learned_from(python, terminal, listed, images):
    taught = images[images["split"] == "train"].iloc[[0, 1]].assign(split="test")
    fresh = images[images["split"] == "test"]
    mixed = make_frame(pd.concat([fresh, taught], ignore_index=True), unknown="image")
    for run in (python, terminal, listed):
        told = []
        read = predict_elsewhere(run, mixed, say=told.append)
        assert set(read["path"]) == set(fresh["path"]) and "has learned from 2 of" in told[0]
        with pytest.raises(CourseError, match="every one"):
            predict_elsewhere(run, taught.reset_index(drop=True), say=quiet)


def test_a_run_that_cannot_say_what_it_learned_from_judges_nothing(python, images, tmp_path):
    bare = shutil.copytree(python.folder, tmp_path / "bare")
    (bare / "images.csv").unlink()
    with pytest.raises(CourseError, match="learned from"):
        predict_elsewhere(load_run(bare), images, say=quiet)


def test_another_question_is_refused(python):
    with pytest.raises(CourseError, match="another question"):
        predict_elsewhere(python, load_dataset("sample-covid", unknown="image"), say=quiet)


def test_all_doors_keep_a_reference_for_shift(python, terminal, listed):
    kept = [load_reference(run.folder) for run in (python, terminal, listed)]
    for found in kept:
        assert len(found.paths) == (python.predictions["split"] == "val").sum()
        np.testing.assert_allclose(found.features, kept[0].features, rtol=1e-6)


# what is refused, what is mended and said

def test_a_patient_in_train_and_test_is_refused(images, tmp_path):
    both = images.copy()
    both.loc[both.index[both["split"] == "train"][0],
             "patient"] = both.loc[both["split"] == "test", "patient"].iloc[0]
    with pytest.raises(CourseError, match="share 1 patient") as refused:
        train_job(make_frame(both, unknown="image"), tmp_path / "run", say=quiet, **SETTINGS)
    assert "hold_out" in refused.value.remedy and "--resplit" in refused.value.typed
    assert not list(tmp_path.iterdir())


def test_a_patient_in_train_and_val_makes_a_new_val(images):
    cut = hold_out(images, .3)
    cut.loc[cut.index[cut["split"] == "train"][0],
            "patient"] = cut.loc[cut["split"] == "val", "patient"].iloc[0]
    arranged, said = arrange(make_frame(cut, unknown="image"))
    assert any("shared patients" in line for line in said)
    refuse_leakage(arranged)
    assert set(arranged.loc[arranged["split"] == "test",
                            "path"]) == set(images.loc[images["split"] == "test", "path"])


def test_images_without_patient_are_refused_until_it_is_decided(images):
    unknown = images.assign(patient=images["patient"].where(images.index % 5 > 0, None), group=None)
    with pytest.raises(CourseError, match="have no patient") as refused:
        arrange(make_frame(unknown, unknown="refuse"))
    assert "--unknown image" in refused.value.typed
    _, said = arrange(make_frame(unknown, unknown="image"))
    assert "stand for themselves" in said[0]


@pytest.mark.parametrize("spoil, told", [
    (lambda f: f[f["label"] == "NORMAL"], "one class only"),
    (lambda f: f[f["split"] == "train"], "test set is empty"),
    (lambda f: f[f["split"] == "test"], "training set is empty"),
    (lambda f: f[(f["split"] != "test") | (f["label"] == "NORMAL")], "the test set holds one class only"),
], ids=["one class", "no test", "no train", "test of one class"])
def test_what_cannot_be_judged_is_refused(images, tmp_path, spoil, told):
    with pytest.raises(CourseError, match=told):
        train_job(spoil(images).reset_index(drop=True), tmp_path / "run", say=quiet, **SETTINGS)
    assert not list(tmp_path.iterdir())


def with_copy(images, path, split):
    row = images[images["split"] == "test"].iloc[[0]].assign(path=str(path), split=split,
                                                             patient="somebody else")
    return make_frame(pd.concat([images, row], ignore_index=True), unknown="image")


def test_a_copy_of_a_test_image_is_left_out(images, tmp_path):
    first = images.loc[images["split"] == "test", "path"].iloc[0]
    copy = shutil.copy(first, tmp_path / f"other name{Path(first).suffix}")
    told = []
    store = prepare(with_copy(images, copy, "train"), (32, 32), say=told.append)
    assert str(copy) not in set(store.frame["path"]) and first in set(store.frame["path"])
    assert any("byte for byte" in line and line.endswith(": 1") for line in told)


def test_of_copies_the_one_that_judges_more_is_kept(images, tmp_path):
    cut = hold_out(images, .3)
    first = cut.loc[cut["split"] == "val", "path"].iloc[0]
    copy = str(shutil.copy(first, tmp_path / "again.jpeg"))
    row = cut[cut["path"] == first].assign(path=copy, split="train", patient="somebody else")
    store = prepare(make_frame(pd.concat([cut, row], ignore_index=True), unknown="image"), (32, 32),
                    say=quiet)
    assert copy not in set(store.frame["path"]) and first in set(store.frame["path"])


def test_near_copies_are_left_out_when_asked_for(images, tmp_path):
    first = images.loc[images["split"] == "test", "path"].iloc[0]
    again = tmp_path / "saved again.png"
    Image.open(first).convert("L").save(again)
    frame = with_copy(images, again, "train")
    assert str(again) in set(prepare(frame, (64, 64), say=quiet).frame["path"])
    store = prepare(frame, (64, 64), duplicates="near", say=quiet)
    assert str(again) not in set(store.frame["path"]) and len(store) == len(images)
    with pytest.raises(CourseError, match="not a choice"):
        prepare(frame, duplicates="some", say=quiet)


def test_unreadable_files_are_named_or_left_out(images, tmp_path):
    cut = tmp_path / "cut.jpeg"
    cut.write_bytes(Path(images["path"].iloc[0]).read_bytes()[:-300])
    frame = with_copy(images, cut, "train")
    with pytest.raises(CourseError, match="cut.jpeg") as refused:
        prepare(frame, (32, 32), say=quiet)
    assert "skip_bad=True" in refused.value.remedy and "--skip-bad" in refused.value.typed
    told = []
    assert len(prepare(frame, (32, 32), skip_bad=True, say=told.append)) == len(images)
    assert sum("cut.jpeg" in line for line in told) == 1
    text = frame.assign(height=frame["height"].where(frame["path"] != str(cut)))
    with pytest.raises(CourseError, match="are no images"):
        prepare(text, (32, 32), say=quiet)


def test_a_small_disk_is_told_before_decoding(images, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    monkeypatch.setattr(building_module, "build_store", lambda *_, **__: pytest.fail("it decoded"))
    with pytest.raises(CourseError, match="MB are free"):
        prepare(images, (32, 32), say=quiet)


def test_findings_that_do_not_exist_are_refused(images):
    many = load_dataset("sample-nih", unknown="image")
    with pytest.raises(CourseError, match="Broken arm"):
        prepare(many, (32, 32), findings="Broken arm", say=quiet)
    with pytest.raises(CourseError, match="classes, and no findings"):
        prepare(images, (32, 32), findings="Effusion", say=quiet)
    chosen = choose_findings(many, ["Infiltration", "Effusion"])
    assert sorted(chosen.attrs["findings"]) == ["Effusion", "Infiltration"] and "Mass" not in chosen


@pytest.mark.parametrize("options, told", [
    (dict(model="resnet"), "no model named"),
    (dict(backbone="resnet"), "resnet"),
    (dict(recipe="secret"), "no recipe"),
    (dict(loss="heavy"), "no loss"),
    (dict(weights="imagenet"), "belong to a backbone"),
    (dict(backbone="vgg16", weights="none.h5"), "no such file"),
    (dict(shape=(16, 16)), "too small"),
    (dict(resume=True), "nothing to resume"),
], ids=str)
def test_wrong_options_are_refused_before_decoding(images, tmp_path, monkeypatch, options, told):
    monkeypatch.setattr(building_module, "build_store", lambda *_, **__: pytest.fail("it decoded"))
    with pytest.raises(CourseError, match=told):
        train_job(images, tmp_path / "run", say=quiet, **SETTINGS | options)
    assert not list(tmp_path.iterdir())


def test_a_run_is_never_overwritten(images, python):
    before = (python.folder / "card.json").read_text()
    with pytest.raises(CourseError, match="never overwritten"):
        train_job(images, python.folder, say=quiet, **SETTINGS)
    assert (python.folder / "card.json").read_text() == before


def test_a_store_and_a_network_of_ones_own_have_the_same_guards(images, tmp_path):
    from cxr_course.models.cnn import build_cnn
    store = build_store(images, (32, 32))
    run = train_job(store, tmp_path / "own", model=lambda shape, outputs,
                    seed: build_cnn("cnn", shape, outputs, seed), epochs=1, say=quiet)
    assert content(run) == CONTENT and set(run.predictions["split"]) == {"val", "test"}
    leaky = images.copy()
    leaky.loc[leaky.index[leaky["split"] == "train"][0],
              "patient"] = leaky.loc[leaky["split"] == "test", "patient"].iloc[0]
    with pytest.raises(CourseError, match="share 1 patient"):
        train_job(store.using(make_frame(leaky, unknown="image")), tmp_path / "leaky", say=quiet, epochs=1)


# killed anywhere, it is resumed or refused, never half

KILLED = """
import os, signal, sys
from cxr_course.data.loading import load_dataset
from cxr_course.training import judging
from cxr_course.training.job import train_job
if sys.argv[3] == "report":
    judging.report_run = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
train_job(load_dataset(sys.argv[1], unknown="image"), sys.argv[2], shape=(32, 32), epochs=int(sys.argv[4]))
"""


def killed(world, out, where, epochs):
    "Train in a process that is killed in its second epoch, or between the fit and the report."
    words = [sys.executable, "-c", KILLED, str(world), str(out), where, str(epochs)]
    loud = {k: v for k, v in os.environ.items() if k != "CXR_COURSE_QUIET"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=loud)
    for line in process.stdout:
        if where == "fit" and line.startswith("epoch   2/"):
            process.kill()
    err = process.stderr.read()
    assert process.wait(timeout=300) == -signal.SIGKILL, err


def test_killed_in_the_middle_it_goes_on_and_ends_alike(world, images, tmp_path):
    settings = dict(shape=(32, 32), epochs=4, say=quiet)
    whole = train_job(images, tmp_path / "whole", **settings)
    killed(world, tmp_path / "cut", "fit", 4)
    assert not (tmp_path / "cut").exists() and can_resume(tmp_path / "cut")
    with pytest.raises(CourseError, match="no finished run|no such run"):
        load_run(tmp_path / "cut")
    with pytest.raises(CourseError, match="lies here unfinished") as refused:
        train_job(images, tmp_path / "cut", **settings)
    assert "resume=True" in refused.value.remedy and "--resume" in refused.value.typed
    cut = train_job(images, tmp_path / "cut", resume=True, **settings)
    pd.testing.assert_frame_equal(whole.history.drop(columns="seconds"), cut.history.drop(columns="seconds"))
    pd.testing.assert_frame_equal(whole.predictions, cut.predictions)
    for ours, theirs in zip(whole.model.get_weights(), cut.model.get_weights()):
        np.testing.assert_array_equal(ours, theirs)
    assert content(whole) == content(cut) == CONTENT and not can_resume(tmp_path / "cut")


def test_killed_between_fit_and_report_it_has_no_name_yet(world, images, python, tmp_path):
    out = tmp_path / "cut"
    killed(world, out, "report", 1)
    assert not out.exists() and can_resume(out)
    with pytest.raises(CourseError, match="lies here unfinished"):
        train_job(images, out, say=quiet, **SETTINGS)
    run = train_job(images, out, resume=True, say=quiet, **SETTINGS)
    assert content(run) == CONTENT and keys(run.card) == keys(python.card)
    assert [p.name for p in tmp_path.iterdir()] == ["cut"]


# the report

def test_the_report_says_what_was_done(python):
    found = json.loads((python.folder / "report" / "report.json").read_text())
    page = (python.folder / "report" / "report.html").read_text()
    assert found and "How well does python read?" in page and "Model card" in page and "learning rate" in page
    text = report_text(report_run(python))
    assert "95 %" in text and "truth, then called" in text
