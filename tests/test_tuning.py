"""Search: system E's space with its winner inside, keras-tuner's tuners, a budget, failures, and kills."""
import json
import sys
import textwrap
import time

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_course.core import CourseError, rng
from cxr_course.data.building import build_store
from cxr_course.frame import Task, make_frame, regroup
from cxr_course.models.cnn import CNNSpec, layer_table
from cxr_course.models.inspect import describe
from cxr_course.training.search_space import SYSTEM_E, Space, declare, hypermodel, spec_of
from cxr_course.training.trials import best_trial, caution, retrain, trial_predictions, trials
from cxr_course.training.tuning import METHODS, _stores, search
from cxr_course.training.tuning_plots import (
    hyperparameters, hyperparameter_importance, plot_importance, plot_parallel,
)

keras = pytest.importorskip("keras")
kt = pytest.importorskip("keras_tuner")

TINY = Space(filters=((2, 4), (2, 4)), kernels=(3,), dense=(4, 8), step=2, dropout=(0., .2))


def same(a, b):
    pd.testing.assert_frame_equal(a.drop(columns="seconds"), b.drop(columns="seconds"))


class Hill(kt.HyperModel):
    "A network that is not trained: its AUC is a hill over three hyperparameters."
    def build(self, hp):
        hp.Int("filters", 32, 256, step=16)
        hp.Choice("kernel", [3, 5])
        hp.Float("lr", 1e-4, 1e-2, sampling="log")
        return keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])

    def before(self, hp):
        "What goes wrong, if anything."

    def fit(self, hp, model, epochs, initial_epoch=0, callbacks=(), **options):
        self.before(hp)
        auc = .9 - .1 * abs(np.log10(hp.get("lr")) + 3) - .3 * .6 ** epochs + hp.get("filters") / 1e5
        for callback in callbacks:
            callback.set_model(model)
            callback.on_epoch_end(epochs - 1, dict(val_auc=auc))
        return dict(val_auc=auc, epochs=epochs - initial_epoch)


def hill(before):
    "A Hill with something that happens before each training."
    network = Hill()
    network.before = before
    return network


def climb(method, folder, network=None, **options):
    return search(method, None, folder, network=network or Hill(), **options)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    "Sixty images of thirty patients; the sick ones have a bright corner."
    folder, draw, rows = tmp_path_factory.mktemp("images"), rng("tuning films"), []
    for i in range(60):
        sick, split = i % 4 < 2, ("train", "train", "train", "val", "test")[i // 2 % 5]
        image = draw.uniform(0, .6, (16, 16))
        if sick:
            image[4:10, 4:10] += .2
        Image.fromarray((image * 255).astype("uint8")).save(folder / f"{i}.png")
        label = "ILL" if sick else "WELL"
        rows.append(dict(path=str(folder / f"{i}.png"), patient=f"p{i // 2}", split=split, label=label))
    return build_store(make_frame(rows, labels=["WELL", "ILL"]), (16, 16), folder=folder / "store")


def test_the_space_is_system_e_s_and_every_value_can_be_reached():
    hp = kt.HyperParameters()
    declare(hp)
    reach = {h.name: sorted({h.random_sample(i) for i in range(600)}) for h in hp.space}
    layers = [f"{what}{i}" for i in (1, 2, 3) for what in ("filters", "kernel")]
    assert list(reach) == [*layers, "dense", "dropout", "lr"]
    assert reach["filters1"] == reach["dense"] == list(range(32, 129, 16))
    assert reach["filters2"] == reach["filters3"] == list(range(32, 257, 16))
    assert all(reach[f"kernel{i}"] == [3, 5] for i in (1, 2, 3)) and reach["dropout"] == [0., .2, .3]
    lr = np.log10(reach["lr"])
    # evenly by its logarithm
    assert -4 <= lr[0] < -3.9 and -2.1 < lr[-1] <= -2 and abs(np.median(lr) + 3) < .1


def test_system_e_s_winner_lies_inside_and_values_become_the_network_that_they_say():
    values = dict(filters1=32, kernel1=3, filters2=48, kernel2=5, filters3=64, kernel3=5, dense=80,
                  dropout=0.2, lr=0.005)
    hp = kt.HyperParameters()
    hp.values = dict(values)
    model = hypermodel(SYSTEM_E, (48, 48, 1), seed=3).build(hp)
    spec = CNNSpec((32, 48, 64), (80,), kernel=(3, 5, 5), dropout=.2)
    assert spec_of(values) == spec_of(pd.Series(values)) == describe(model) == spec
    assert np.isclose(float(model.optimizer.learning_rate), .005)
    assert model.count_params() == layer_table(spec, (48, 48, 1))["parameters"].sum()


@pytest.mark.parametrize("tuner", (kt.RandomSearch, kt.Hyperband, kt.BayesianOptimization))
def test_keras_tuner_s_own_tuners_take_the_hypermodel_with_an_objective_of_keras(store, tmp_path, tuner):
    own = dict(max_epochs=2) if tuner is kt.Hyperband else dict(max_trials=1)
    searching = tuner(hypermodel(TINY, (16, 16, 1)), objective="val_accuracy", seed=1, directory=tmp_path,
                      project_name="plain", **own)
    searching.search(store.array("train"), store.labels("train"), epochs=1, verbose=0,
                     validation_data=(store.array("val"), store.labels("val")))
    best = searching.oracle.get_best_trials()[0]
    assert 0 <= best.score <= 1 and best.metrics.exists("val_auc")
    again = hypermodel(TINY, (16, 16, 1), Task(("a", "b", "c"), "classes")).build(best.hyperparameters)
    assert again.output_shape == (None, 3) and again.metrics_names


@pytest.mark.parametrize("kind", ("two classes", "three classes", "findings"))
def test_the_validation_auc_counts_pairs_for_every_kind_of_task(store, tmp_path, kind):
    frame = store.frame.copy()
    third = frame["path"].str.contains(r"[37]\.png")
    if kind == "three classes":
        label = frame["label"].astype(object).where(~third, "ODD")
        frame = make_frame(frame.assign(label=label), labels=["WELL", "ILL", "ODD"])
    if kind == "findings":
        ill = (frame["label"] == "ILL").astype(float).where(~third)
        frame = make_frame(frame.drop(columns="label").assign(ill=ill, odd=third.astype(float), age=40),
                           findings=["ill", "odd"])
    other = store.using(frame)
    found = search("random", other, tmp_path / "s", trials=1, epochs=2, space=TINY, batch=8)
    images, _, p = trial_predictions(tmp_path / "s")
    task = Task.of(images)
    assert task.names == Task.of(other.frame).names and p.shape == (1, 12, len(task.names))
    truth = task.indicators(images).to_numpy()
    pairs = []
    for i in [1] if kind == "two classes" else range(len(task.names)):
        sick, well = p[0][truth[:, i] == 1, i], p[0][truth[:, i] == 0, i]
        wins = (sick[:, None] > well) + .5 * (sick[:, None] == well)
        pairs += [wins.mean()] if wins.size else []
    assert found["score"][0] == pytest.approx(np.mean(pairs))


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from test_tuning import Hill, climb, hill
    calls = iter(range(99))
    def kill(hp):
        if next(calls) == 4: os.kill(os.getpid(), signal.SIGKILL)
    climb({method!r}, {folder!r}, hill(kill), trials=5, epochs=3)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("method", METHODS)
def test_a_search_that_was_killed_goes_on_as_if_nothing_had_been(tmp_path, root, method):
    script = KILLED.format(tests=str(root / "tests"), folder=str(tmp_path / "killed"), method=method)
    from tools.forked import python  # the child imports this file, and has no `tools`
    done = python("-c", textwrap.dedent(script), cwd=root)
    assert done.returncode == -9, done.stderr
    before = trials(tmp_path / "killed")
    assert before["status"].tolist() == ["done"] * 4 + ["killed"]
    resumed = climb(method, tmp_path / "killed", trials=5, epochs=3, resume=True)
    same(resumed.head(4), before.head(4))
    assert (resumed["status"] == "done").all()
    assert resumed.loc[4, ["filters", "kernel",
                           "lr"]].tolist() == before.loc[4, ["filters", "kernel", "lr"]].tolist()
    # whose surface is climbed in steps that hang on the last digits
    if method != "bayesian":
        same(resumed, climb(method, tmp_path / "whole", trials=5, epochs=3))


@pytest.mark.parametrize("file", ("oracle.json", "tuner0.json", "trial_0/trial.json"))
def test_a_half_written_file_of_keras_tuner_is_named(tmp_path, file):
    climb("random", tmp_path / "s", trials=2)
    text = (tmp_path / "s" / file).read_text()
    (tmp_path / "s" / file).write_text(text[:len(text) // 2])
    with pytest.raises(CourseError, match=f"cannot be read(?s:.*){file.split('/')[-1]}(?s:.*)new search"):
        climb("random", tmp_path / "s", trials=4, resume=True)


def test_a_trial_that_was_written_before_the_state_is_drawn_again(tmp_path):
    climb("random", tmp_path / "s", trials=3)
    state = json.loads((tmp_path / "s" / "trial_2" / "trial.json").read_text())
    lost = dict(state, trial_id="3", status="RUNNING", score=None, metrics=dict(metrics={}))
    (tmp_path / "s" / "trial_3").mkdir()
    (tmp_path / "s" / "trial_3" / "trial.json").write_text(json.dumps(lost))
    assert trials(tmp_path / "s")["status"].tolist()[-1] == "killed"
    same(climb("random", tmp_path / "s", trials=5, resume=True),
         climb("random", tmp_path / "whole", trials=5))


@pytest.mark.parametrize("method", METHODS)
def test_a_failing_trial_is_recorded_and_passed_over_and_the_search_ends(tmp_path, method):
    import tensorflow as tf
    def trouble(hp):
        if hp.get("kernel") == 5:
            raise tf.errors.ResourceExhaustedError(None, None,
                                                   "OOM when allocating tensor with shape[32,64,90,90]")
        if hp.get("filters") > 200:
            raise kt.errors.FailedTrialError("the loss is no longer a number in epoch 2")
    found = climb(method, tmp_path / "s", hill(trouble), trials=8, epochs=3, seed=1)
    big, wild = found["kernel"] == 5, (found["kernel"] == 3) & (found["filters"] > 200)
    assert (found.loc[big, "reason"] == "out of memory").all()
    assert found.loc[wild, "reason"].str.startswith("the loss is no longer").all()
    assert (found["status"] == np.where(big | wild, "failed", "done")).all() and big.any()
    assert method == "hyperband" or len(found) == 8
    assert best_trial(found)["status"] == "done"


@pytest.mark.parametrize("method", METHODS)
def test_when_all_trials_fail_the_search_ends_with_the_reason_and_soon(tmp_path, method):
    def trouble(hp):
        raise OSError("no such disk")
    began = time.monotonic()
    with pytest.raises(CourseError, match="none of 5 trials.*\n.*no such disk"):
        climb(method, tmp_path / "s", hill(trouble), trials=20)
    assert time.monotonic() - began < 60
    with pytest.raises(CourseError, match="no trial was finished"):
        best_trial(trials(tmp_path / "s"))


def test_failures_after_a_success_do_not_make_a_search_endless(tmp_path):
    calls = iter(range(999))
    def trouble(hp):
        if next(calls) > 2:
            raise OSError("no such disk")
    found = climb("hyperband", tmp_path / "s", hill(trouble), trials=3, epochs=3)
    assert (found["status"] == "done").sum() == 3 and len(found) <= 12


def test_a_trial_in_which_the_process_dies_twice_is_not_tried_again(tmp_path):
    class Killed(BaseException):
        pass
    def trouble(hp):
        raise Killed
    for again in (False, True):
        with pytest.raises(Killed):
            climb("random", tmp_path / "s", hill(trouble), trials=1, resume=again)
    with pytest.raises(CourseError, match="process died in this trial twice"):
        climb("random", tmp_path / "s", hill(trouble), trials=1, resume=True)


def test_no_trial_starts_after_the_minutes_are_over(tmp_path):
    now, started = [0.], []
    def slow(hp):
        started.append(now[0])
        now[0] += 100
    options = dict(trials=30, clock=lambda: now[0])
    climb("random", tmp_path / "s", hill(slow), minutes=10, **options)
    assert started == [100. * i for i in range(6)]
    # a night between the sittings does not count
    now[0] = 50_000.
    climb("random", tmp_path / "s", hill(slow), minutes=10, resume=True, **options)
    assert len(started) == 6
    climb("random", tmp_path / "s", hill(slow), minutes=12, resume=True, **options)
    assert len(started) == 8


def test_the_budget_of_trials_can_grow(tmp_path):
    climb("random", tmp_path / "s", trials=3)
    same(climb("random", tmp_path / "s", trials=6, resume=True),
         climb("random", tmp_path / "whole", trials=6))


def test_hyperband_spends_the_epochs_of_the_others_and_continues_the_better_third(tmp_path):
    found = climb("hyperband", tmp_path / "s", trials=4, epochs=9)
    assert 36 <= found["epochs"].sum() < 45 and len(found) > 8
    later = found[found["of"].notna()]
    first = found[found["trial"] < later["trial"].min()]
    assert set(later["of"].head(3)) == set(first["score"].nlargest(3).index)


def test_folds_keep_patients_together_and_test_images_out(store, tmp_path):
    apart = set(store.frame.query("split == 'test'")["path"])
    folds = _stores(store, 3, 0)
    for s in (*_stores(store, None, 0), *folds):
        assert set(s.frame["split"]) == {"train", "val"} and not set(s.frame["path"]) & apart
        assert s.frame.groupby("patient")["split"].nunique().max() == 1
    judged = pd.concat([s.frame[s.frame["split"] == "val"] for s in folds])
    assert sorted(judged["path"]) == sorted(store.frame.query("split != 'test'")["path"])
    patient = ["p0", *store.frame["patient"][1:-1], "p0"]
    split = ["train", *store.frame["split"][1:-1], "val"]
    crossing = regroup(store.frame.assign(patient=patient, split=split))
    with pytest.raises(CourseError, match="share"):
        _stores(store.using(crossing), None, 0)
    with pytest.raises(CourseError, match="another fold's patients"):
        search("hyperband", store, tmp_path / "s", folds=3)


def test_a_real_search_leaves_what_was_said_of_each_image_and_the_winner_can_be_trained(store, tmp_path):
    options = dict(trials=2, epochs=2, executions=2, space=TINY, batch=8)
    found = search("random", store, tmp_path / "s", **options)
    assert (found["runs"] == 2).all() and found["spread"].notna().all() and (found["epochs"] <= 4).all()
    images, ids, p = trial_predictions(tmp_path / "s")
    assert ids == [0, 1] and p.shape == (2, 12,
                                         2) and np.allclose(p.sum(axis=2),
                                                            1) and set(images["split"]) == {"val"}
    events = list((tmp_path / "s" / "logs").rglob("events*"))
    assert {file.relative_to(tmp_path / "s" / "logs").parts[0] for file in events} == {"0", "1"}
    assert "looks better than it is" in caution(tmp_path / "s")
    same(found, search("random", store, tmp_path / "again", **options))                          # seeds
    run = retrain(tmp_path / "s", store, tmp_path / "best", epochs=1)
    assert describe(run.model).conv == spec_of(best_trial(found)).conv and "test" in run.card["metrics"]
    with pytest.raises(CourseError, match="differs in images"):
        search("random", store.using(store.frame.iloc[2:]), tmp_path / "s", resume=True, **options)


def test_a_real_hyperband_goes_on_with_the_weights_of_the_trial_it_continues(store, tmp_path):
    found = search("hyperband", store, tmp_path / "s", trials=2, epochs=3, space=TINY, batch=8)
    later = found[found["of"].notna()].iloc[0]
    assert later["asked"] == 3 and later["epochs"] == 2 and (found["status"] == "done").all()
    assert (tmp_path / "s" / f"trial_{later['of']:04d}" / "checkpoint.weights.h5").exists()


def test_images_too_small_for_some_networks_fail_those_trials_only(store, tmp_path):
    space = Space(filters=((2, 4),) * 2, kernels=(3, 9), dense=(4, 8), step=2, dropout=(0.,))
    found = search("random", store, tmp_path / "s", trials=5, epochs=1, space=space, batch=8, seed=2)
    small = found["kernel2"] == 9
    assert small.any() and found.loc[small, "reason"].str.contains("too small").all()
    assert (found.loc[~small, "status"] == "done").all()


def test_importance_finds_the_hyperparameter_that_matters(tmp_path):
    found = climb("random", tmp_path / "s", trials=80)
    shares = hyperparameter_importance(found, draws=8).set_index("parameter")
    assert shares["share"].idxmax() == "lr" and shares.loc["lr", "low"] > shares.loc["a die", "high"]
    assert hyperparameters(found) == ["filters", "kernel", "lr"]
    assert len(plot_parallel(found).axes[0].lines) == 80 + 4
    assert len(plot_importance(shares.reset_index()).axes[0].patches) == 4


def test_bad_input_is_told_in_words(tmp_path, monkeypatch):
    with pytest.raises(CourseError, match="nothing to resume"):
        climb("random", tmp_path / "none", resume=True)
    for budget in (dict(trials=0), dict(epochs=0), dict(minutes=0)):
        with pytest.raises(CourseError, match="budget is empty"):
            climb("random", tmp_path / "none", **budget)
    with pytest.raises(CourseError, match="nothing to train on"):
        search("random", None, tmp_path / "none")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(CourseError, match="something else"):
        climb("random", tmp_path / "mine")
    with pytest.raises(CourseError, match="no search"):
        trials(tmp_path / "mine")
    monkeypatch.setitem(sys.modules, "keras_tuner", None)
    with pytest.raises(CourseError, match=r"cxr-course\[tune\]"):
        climb("random", tmp_path / "none")
    assert not (tmp_path / "none").exists()
