"""Chains of the five systems: the published networks, trained as published, on the right images; and the tool
that runs them on real sets: resumable, honest about its images, nothing of this machine in its files."""
import json
import subprocess
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("keras")
from cxr_course.core import CourseError
from cxr_course.data.building import build_store
from cxr_course.data.loading import load_dataset
from cxr_course.data.pipeline import Normalizer
from cxr_course.data.splits import leakage, split_by_patient
from cxr_course.evaluation.predictions import predictions_frame
from cxr_course.models.backbones import head_params
from cxr_course.models.cnn import CNN_SPECS, feature_extractor, layer_table
from cxr_course.models.mlp import MLP_SPECS, dense_table
from cxr_course.phantom.files import write_dataset
from cxr_course.phantom.world import population
from cxr_course.training import frozen as frozen_module
from cxr_course.training.backbones import build_backbone
from cxr_course.training.copies import copied_once
from cxr_course.training.experiments import Experiment, run_experiments
from cxr_course.training.fit import normalised
from cxr_course.training.job import train_job
from cxr_course.training.preparing import arrange
from cxr_course.training.reported import REPORTED, beside_reported, split_metrics
from cxr_course.training.run import load_run
from cxr_course.training.run_folder import can_resume
from cxr_course.training.systems import (
    SYSTEMS, system_a, system_b, system_c, system_d, system_e, system_frame,
)
from tools import results as tool
from tools.notebooks import Fault


def quiet(line):
    "Nobody listens."


@pytest.fixture(scope="module")
def world(tmp_path_factory, cache):
    "A small simulated set in the layout of the Kaggle set, in a folder of sets."
    folder = tmp_path_factory.mktemp("sets") / "small"
    write_dataset(population(48, hospitals=("A", "B"), pixels=48), folder, "kaggle")
    return folder


@pytest.fixture(scope="module")
def images(world): return system_frame("system_e", load_dataset(world, unknown="image"))


# the networks

CHAINS = {e.name: e for chain in (system_a, system_b, system_c, system_d, system_e) for e in chain()}


def parameters(e, channels=1):
    "Of the network of an experiment, by formula."
    outputs = e.options.get("outputs") or {"A": 3, "B": 14}.get(e.name[0], 1)
    if e.model in CNN_SPECS: layers = layer_table(e.model, (*e.shape, channels), outputs)
    else: layers = dense_table((*MLP_SPECS[e.model].dense, outputs), e.shape[0] * e.shape[1])
    return int(layers["parameters"].sum())


def reported(name, metric="parameters", split=""):
    found = REPORTED.query("model == @name and metric == @metric and split == @split")["reported"]
    return found.item()


@pytest.mark.parametrize("name", ["A5", "D1", "D2", "E1", "E2"])
def test_the_networks_are_the_published_ones(name):
    assert parameters(CHAINS[name]) == reported(name)


def test_the_networks_of_system_c_with_one_channel_and_with_three():
    assert parameters(CHAINS["C1"], 3) == reported("C1") == 11_132_033
    assert parameters(CHAINS["C1"]) == 11_132_033 - 32 * 2 * 9
    assert CHAINS["C2"].shape == (224, 224) and CHAINS["C2"].options["frozen"]
    assert head_params("flatten", (7, 7, 512)) + 14_714_688 == reported("C2")


def test_system_b_standardises_before_its_network():
    net = build_backbone("densenet121", (32, 32, 1), outputs=14, scaling="none")
    assert net.count_params() == reported("B1")
    x = np.random.default_rng(0).uniform(size=(2, 32, 32, 1)).astype("float32")
    normaliser = Normalizer("fixed", .4, .2)
    whole = normalised(net, normaliser, None)
    np.testing.assert_allclose(whole(x), net((x - .4) / .2), atol=1e-4)
    with pytest.raises(CourseError, match="own scaling"):
        normalised(build_backbone("vgg16", (32, 32, 1), head="mean"), normaliser, None)


def test_every_reported_figure_has_an_experiment_but_the_search():
    assert set(REPORTED["model"]) - set(CHAINS) == {"E5"}
    assert not REPORTED.duplicated(["model", "metric", "split"]).any()
    assert reported("A3", "recall 3", "test") == .743 and reported("E5", "accuracy", "val") == .958


def test_chains_shrink():
    for name, system in SYSTEMS.items():
        whole, small = system.chain(), system.chain(scale=.5, epochs=2, images=7)
        assert [e.name for e in whole] == [e.name for e in small]
        for one, other in zip(whole, small):
            assert other.options["epochs"] == 2 < one.options["epochs"]
            assert abs(other.shape[0] - one.shape[0] / 2) <= .5
            assert other.images == (800 if other.name == "A7" else 7)
        json.dumps([e.options for e in whole])               # what a list of experiments can remember


# how they are trained

@pytest.fixture(scope="module")
def listed(images, tmp_path_factory):
    "As published, and on copies."
    one = replace(system_d(epochs=3)[0], shape=(32, 32), images=5)
    three = replace(system_e(epochs=1)[2], shape=(32, 32), images=5)
    place = tmp_path_factory.mktemp("runs") / "list"
    return run_experiments([one, three], images, place, seeds=[0], say=quiet)


def test_as_published_means_constant_and_last(listed):
    run = load_run(listed / "D1" / "seed-0")
    t = run.card["training"]
    assert (t["schedule"], t["keep"], t["optimizer"]) == ("constant", "last", "sgd")
    assert run.history["lr"].nunique() == 1 and t["best_epoch"] == t["epochs_run"] == 3
    assert set(run.predictions["split"]) == {"train", "val", "test"}
    found = beside_reported("system_d", listed, times=20).set_index(["model", "split", "metric"])
    ours, theirs = found["ours"].to_dict(), found["reported"].to_dict()
    assert theirs["D1", "test", "accuracy"] == .5 and 0 <= ours["D1", "test", "accuracy"] <= 1
    assert theirs["D2", "test", "AUC"] == .842 and np.isnan(ours["D2", "test", "AUC"])
    options = [CHAINS[name].options for name in ("A5-ours", "B-ours", "D-ours")]
    assert {(o["schedule"], o["keep"], o["patience"]) for o in options} == {("plateau", "best", 8)}


def test_published_epochs_do_not_stop_early():
    for e in (*system_a()[:8], *system_d()[:2]):
        assert e.options["patience"] == e.options["epochs"] and e.options["keep"] == "last"
    assert {e.options["epochs"] for e in system_d()} == {5, 40}


def test_copies_double_training_and_nothing_else(listed):
    plain, doubled = (pd.read_csv(listed / name / "seed-0" / "images.csv") for name in ("D1", "E3"))
    count = doubled["split"].value_counts()
    assert count["train"] == 2 * (plain["split"] == "train").sum() == 20
    for part in ("val", "test"):
        assert set(plain.query("split == @part")["path"]) == set(doubled.query("split == @part")["path"])
    copies = doubled[doubled["path"].str.contains("prepared")]
    assert len(copies) == 10 and set(copies["split"]) == {"train"}
    assert set(copies["group"]) <= set(plain["group"])
    assert load_run(listed / "E3" / "seed-0").model.output_shape == (None, 2)


def test_copies_never_come_to_validate(images, tmp_path):
    few = split_by_patient(images, dict(train=.84, val=.06, test=.1))
    both, _ = arrange(copied_once(few, tmp_path / "copies"))
    assert both[both["meta_copy_of"].notna()]["split"].eq("train").all()
    assert not leakage(both[both["split"] == "train"], both[both["split"] == "val"])


def test_a_frozen_backbone_looks_once_and_stays(images, tmp_path, monkeypatch):
    looks, look = [], frozen_module.extract_features
    monkeypatch.setattr(frozen_module, "extract_features", lambda *a, **k: looks.append(1) or look(*a, **k))
    store = build_store(images, (32, 32))
    run = train_job(store, tmp_path / "run", backbone="compact", frozen=True, epochs=2, say=quiet)
    before = feature_extractor(build_backbone("compact", (32, 32, 1))).get_weights()
    assert len(looks) == 1 and run.card["about"]["stages"][0]["unfrozen"] == "nothing"
    for one, other in zip(before, feature_extractor(run.model).get_weights()):
        np.testing.assert_array_equal(one, other)
    assert run.history["loss"].iloc[-1] != run.history["loss"].iloc[0]
    with pytest.raises(CourseError, match="only a backbone"):
        train_job(store, tmp_path / "no", frozen=True, say=quiet)


def test_figures_by_hand():
    p = predictions_frame(["WELL", "WELL", "ILL", "ILL"], [[.9, .1], [.4, .6], [.3, .7], [.8, .2]],
                          names=["WELL", "ILL"], patients=list("aabc"), split="test")
    run = type("Run", (), dict(predictions=p))
    found = split_metrics(run, times=50)["test"]
    assert {m: round(e.value, 3) for m, e in found.items()} == {
        "accuracy": .5, "precision": .5, "recall": .5, "AUC": .75}
    assert found["accuracy"].low < .5 < found["accuracy"].high


# the right images

def test_a_wrong_set_is_refused_in_words(world, images):
    with pytest.raises(CourseError, match="system_a asks for 3 classes, and these images have 2"):
        system_frame("system_a", images)
    with pytest.raises(CourseError, match="asks for findings"): system_frame("system_b", images)
    with pytest.raises(CourseError, match="no system"): system_frame("system_z", images)


@pytest.mark.parametrize("words, said", [
    (["system_b"], "asks for findings"), (["system_c", "--only", "C9"], "choose from C1, C2"),
    (["system_x"], "system_a")])
def test_the_terminal_refuses_in_words(world, words, said, tmp_path):
    from typer.testing import CliRunner

    from cxr_course.cli.__main__ import app
    more = ["--data", str(world), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["experiments", *words, *more])
    assert done.exit_code and said in done.output + str(done.exception) and not (tmp_path / "out").exists()


def test_a_cause_that_nobody_wrote_down_is_refused_in_words(tmp_path):
    from cxr_course.cli.experiments import _system_images
    write_dataset(population(8, pixels=48), tmp_path / "set", "kaggle")
    next((tmp_path / "set").rglob("PNEUMONIA/*.jpeg")).rename(tmp_path / "set/train/PNEUMONIA/unknown.jpeg")
    with pytest.raises(CourseError, match="system_a asks for 3 classes"):
        _system_images("system_a", str(tmp_path / "set"), None)


def test_systems_divide_by_patient(images, world):
    pooled = system_frame("system_c", load_dataset(world, unknown="image"))
    share = pooled["split"].value_counts(normalize=True)
    assert abs(share["test"] - .2) < .06
    assert not leakage(*(pooled[pooled["split"] == s] for s in ("train", "test")))
    tests = load_dataset(world, unknown="image").query("split == 'test'")["path"]
    assert set(images.query("split == 'test'")["path"]) == set(tests)


# make results

ONE = tool.Setting("system_e", ("kaggle",), dict(scale=32 / 180, epochs=1, images=4), .1, least=10)


@pytest.fixture
def made(world, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "SETTINGS", (ONE,))
    monkeypatch.setattr(tool, "chain", lambda setting: system_e(**setting.sizes)[:2])
    return tool.plans(world.parent, [], 1, quiet, runs=tmp_path / "runs", results=tmp_path / "results")


def test_stopped_and_gone_on(made, world, tmp_path):
    said, file = [], tmp_path / "results" / "system_e-small.json"

    def stopped(plan, name, seed):
        if name != "E1": raise KeyboardInterrupt
        tool.work(plan, name, seed)
    with pytest.raises(KeyboardInterrupt): tool.results(made, stopped, said.append)
    assert json.loads(file.read_text())["finished"] == [1, 2] and "1 of 2" in said[0]
    stamp = (tmp_path / "runs/system_e-small/E1/seed-0/card.json").stat().st_mtime_ns
    assert tool.results(made, tool.work, said.append) == 0
    assert (tmp_path / "runs/system_e-small/E1/seed-0/card.json").stat().st_mtime_ns == stamp
    found, text = json.loads(file.read_text()), file.read_text()
    assert found["finished"] == [2, 2] and [r["experiment"] for r in found["rows"]] == ["E1", "E2"]
    row = found["rows"][0]
    assert {"date", "data_hash", "seed", "seconds", "peak_mb", "epochs"} <= set(row) and row["commit"]
    assert set(row["metrics"]) == {"train", "val", "test"} and len(row["metrics"]["test"]["AUC"]) == 3
    assert ("E1", .766) in {(r["model"], r["reported"]) for r in found["beside"]}
    assert str(world.parent) not in text and str(tmp_path) not in text and "NaN" not in text
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    assert tool.listed(made).split()[-4:] == ["system_e-small", "2", "2", "0"]
    assert tool.results(made, lambda *a: pytest.fail("nothing is left to run"), quiet) == 0


def test_other_files_are_noticed(made, tmp_path):
    tool.refuse_other_images(made[0])
    before = tool.data_hash(made[0].found.path)
    extra = made[0].found.path / "train" / "extra.txt"
    extra.write_text("new")
    try:
        assert tool.data_hash(made[0].found.path) != before
        extra.write_text("newer")
        with pytest.raises(Fault, match="changed since"): tool.refuse_other_images(made[0])
        said = []
        assert tool.results(made, tool.work, said.append) == 1 and "changed since" in said[0]
    finally: extra.unlink()
    assert tool.data_hash(made[0].found.path) == before and not (tmp_path / "results").exists()


def test_a_killed_process_goes_on(made, tmp_path, monkeypatch):
    plan = replace(made[0], setting=replace(ONE, sizes=ONE.sizes | dict(epochs=8)))
    target, wait = plan.folder / "E1" / "seed-0", subprocess.Popen.communicate

    def pressed(process, *args, **kwargs):
        while process.poll() is None and not can_resume(target): time.sleep(.05)
        monkeypatch.setattr(subprocess.Popen, "communicate", wait)
        raise KeyboardInterrupt
    monkeypatch.setattr(subprocess.Popen, "communicate", pressed)
    with pytest.raises(KeyboardInterrupt): tool.in_a_process(plan, "E1", 0)
    assert can_resume(target) and not target.exists()
    tool.work(plan, "E1", 0)
    run = load_run(target)
    assert run.history["epoch"].tolist() == list(range(1, len(run.history) + 1))
    assert not run.card["interrupted"]


def test_which_sets_and_chains(world, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "SETTINGS", (ONE, replace(ONE, system="system_c", least=10_000)))
    places, said = dict(runs=tmp_path, results=tmp_path), []
    assert [p.name for p in tool.plans(world, [], 2, said.append, **places)] == ["system_e-small"]
    assert "fewer than 10000" in said[0]
    with pytest.raises(Fault, match="no data set"): tool.plans(tmp_path, [], 1, quiet, **places)
    with pytest.raises(Fault, match="choose from"): tool.plans(world, ["system_q"], 1, quiet, **places)
    with pytest.raises(Fault, match="no such folder"): tool.plans(world / "nowhere", [], 1, quiet, **places)


def test_a_failed_process_says_why(made):
    with pytest.raises(Fault, match="E9"): tool.in_a_process(made[0], "E9", 0)


def test_an_unknown_preparation_is_refused(images, tmp_path):
    odd = Experiment("odd", model="cnn", shape=(32, 32), prepare="mirror")
    with pytest.raises(CourseError, match="no preparation"):
        run_experiments([odd], images, tmp_path / "x", say=quiet)
