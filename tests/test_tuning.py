"""Search: the space is system E's, a kill loses nothing, failures are recorded, the budget holds, and no test film is let in."""
import json
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

keras = pytest.importorskip("keras")
kt = pytest.importorskip("keras_tuner")
from PIL import Image

from cxr_course import cnn, core, pipelines, tuning
from cxr_course.core import CourseError

TINY = tuning.Space(filters=((2, 4), (2, 4)), kernels=(3,), dense=(4, 8), step=2)
smooth = lambda values, epochs, run: .9 - .1 * abs(np.log10(values["lr"]) + 3) - .3 * .6 ** np.arange(1, epochs + 1)
same = lambda a, b: pd.testing.assert_frame_equal(a.drop(columns="seconds"), b.drop(columns="seconds"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    "Sixty pictures of thirty patients; the sick ones have a bright corner."
    folder, draw, rows = tmp_path_factory.mktemp("films"), core.rng("tuning films"), []
    for i in range(60):
        sick, split = i % 4 < 2, ("train", "train", "train", "val", "test")[i // 2 % 5]
        picture = draw.uniform(0, .6, (16, 16))
        if sick: picture[4:10, 4:10] += .2
        Image.fromarray((picture * 255).astype("uint8")).save(folder / f"{i}.png")
        rows.append(dict(path=str(folder / f"{i}.png"), patient=f"p{i // 2}", split=split, label="ILL" if sick else "WELL"))
    return pipelines.build(core.frame(rows, labels=["WELL", "ILL"]), (16, 16), folder=folder / "store")


def test_the_space_is_system_e_s_and_every_value_can_be_reached():
    hp = kt.HyperParameters()
    tuning.declare(hp)
    reach = {h.name: sorted({h.random_sample(i) for i in range(600)}) for h in hp.space}
    assert list(reach) == ["filters1", "filters2", "filters3", "kernel", "dense", "lr"]
    assert reach["filters1"] == reach["dense"] == list(range(32, 129, 16)) and reach["kernel"] == [3, 5]
    assert reach["filters2"] == reach["filters3"] == list(range(32, 257, 16))
    lr = np.log10(reach["lr"])
    assert -4 <= lr[0] < -3.9 and -2.1 < lr[-1] <= -2 and abs(np.median(lr) + 3) < .1          # evenly by its logarithm


def test_values_become_the_network_that_they_say():
    values = dict(filters1=32, filters2=48, filters3=64, kernel=5, dense=80, lr=.005)
    hp = kt.HyperParameters()
    hp.values = dict(values)
    model = tuning.hypermodel(tuning.SYSTEM_E, (48, 48, 1), seed=3).build(hp)
    assert model.spec == cnn.Spec((32, 48, 64), (80,), kernel=5) and np.isclose(float(model.optimizer.learning_rate), .005)
    assert model.count_params() == cnn.arithmetic(model.spec, (48, 48, 1))["parameters"].sum()


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from test_tuning import smooth
    from cxr_course import tuning
    calls = iter(range(99))
    def objective(values, epochs, run):
        if next(calls) == 6: os.kill(os.getpid(), signal.SIGKILL)
        return smooth(values, epochs, run)
    tuning.search("hyperband", None, {folder!r}, trials=4, objective=objective)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_search_that_was_killed_goes_on_as_if_nothing_had_been(tmp_path, root):
    script = textwrap.dedent(KILLED.format(tests=str(root / "tests"), folder=str(tmp_path / "killed")))
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert tuning.trials(tmp_path / "killed")["status"].tolist() == ["done"] * 6 + ["killed"]
    resumed = tuning.search("hyperband", None, tmp_path / "killed", trials=4, objective=smooth, resume=True)
    same(resumed, tuning.search("hyperband", None, tmp_path / "whole", trials=4, objective=smooth))


@pytest.mark.parametrize("method", tuning.METHODS)
@pytest.mark.parametrize("moment", ("oracle.json", "trial.json", "record.json"))
def test_a_kill_between_any_two_files_loses_nothing(tmp_path, monkeypatch, method, moment):
    "The process ends just before the n-th file of a kind is written."
    whole = tuning.search(method, None, tmp_path / "whole", trials=5, epochs=3, objective=smooth)
    write, written = tuning._write, []
    class Killed(BaseException): pass
    def dying(file, what):
        written.append(file.name)
        if written.count(moment) == 7: raise Killed
        write(file, what)
    monkeypatch.setattr(tuning, "_write", dying)
    with pytest.raises(Killed): tuning.search(method, None, tmp_path / "cut", trials=5, epochs=3, objective=smooth)
    monkeypatch.setattr(tuning, "_write", write)
    same(tuning.search(method, None, tmp_path / "cut", trials=5, epochs=3, objective=smooth, resume=True), whole)


def _trial(number, **values):
    hp = kt.HyperParameters()
    tuning.declare(hp, TINY)
    hp.values.update(filters1=4, filters2=4, kernel=3, dense=8, lr=.005, **values)
    return SimpleNamespace(trial_id=str(number), hyperparameters=hp, status="COMPLETED", message=None)


def test_a_continued_training_is_the_training_in_one_go(store, tmp_path):
    plan = dict(method="hyperband", epochs=9, executions=1, seed=0, batch=8, patience=9)
    bench = tuning._Bench(tmp_path, tuning._stores(store, None, 0, "raise"), plan, TINY, None, lambda: 0.)
    for trial in (_trial(0, **{"tuner/epochs": 2}), _trial(1, **{"tuner/epochs": 4, "tuner/trial_id": "0"}), _trial(2, **{"tuner/epochs": 4})):
        bench.run(trial)
        bench.close(trial)
    two, four, once = (json.loads((tmp_path / f"trial_{i}" / "record.json").read_text()) for i in range(3))
    assert (two["epochs"], four["epochs"], once["epochs"]) == (2, 2, 4) and four["histories"][0][:2] == two["histories"][0]
    for a, b in zip(four["histories"][0], once["histories"][0]): assert a == pytest.approx(b, rel=1e-4)
    assert not list((tmp_path / "trial_0").glob("weights*")) and list((tmp_path / "trial_1").glob("weights*"))     # what was continued is not kept twice


@pytest.mark.parametrize("method", tuning.METHODS)
def test_a_failing_trial_is_recorded_and_passed_over(tmp_path, method):
    import tensorflow as tf
    def objective(values, epochs, run):
        if values["kernel"] == 5: raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor with shape[32,64,90,90]")
        if values["dense"] > 110: raise CourseError("the loss is no longer a number in epoch 2", None, "smaller steps")
        return smooth(values, epochs, run)
    found = tuning.search(method, None, tmp_path / "s", trials=12, seed=1, objective=objective)
    big, wild = found["kernel"] == 5, (found["kernel"] == 3) & (found["dense"] > 110)
    assert (found.loc[big, "reason"] == "out of memory").all() and found.loc[wild, "reason"].str.startswith("the loss is no longer").all()
    assert (found["status"] == np.where(big | wild, "failed", "done")).all() and big.any()
    if method != "hyperband": assert len(found) == 12
    assert tuning.best(found)["status"] == "done"


def test_when_all_trials_fail_the_search_ends_with_the_reason(tmp_path):
    def objective(values, epochs, run): raise OSError("no such disk")
    for method in tuning.METHODS:
        with pytest.raises(CourseError, match="none of 5 trials.*\n.*no such disk"): tuning.search(method, None, tmp_path / method, trials=20, objective=objective)
        with pytest.raises(CourseError, match="no trial was finished"): tuning.best(tuning.trials(tmp_path / method))


def test_a_trial_in_which_the_process_dies_twice_is_not_tried_again(tmp_path):
    class Killed(BaseException): pass
    def objective(values, epochs, run):
        if values["filters1"] == first: raise Killed
        return smooth(values, epochs, run)
    first = tuning.search("random", None, tmp_path / "look", trials=1, objective=smooth)["filters1"][0]
    for again in (False, True):
        with pytest.raises(Killed): tuning.search("random", None, tmp_path / "s", trials=1, objective=objective, resume=again)
    with pytest.raises(CourseError, match="process died in this trial twice"): tuning.search("random", None, tmp_path / "s", trials=1, objective=objective, resume=True)


@pytest.mark.parametrize("method", tuning.METHODS)
def test_no_trial_starts_after_the_minutes_are_over(tmp_path, method):
    now, started = [0.], []
    def objective(values, epochs, run):
        started.append(now[0])
        now[0] += 100
        return smooth(values, epochs, run)
    options = dict(trials=30, epochs=9, objective=objective, clock=lambda: now[0])
    tuning.search(method, None, tmp_path / "s", minutes=10, **options)
    assert started == [100. * i for i in range(6)]
    now[0] = 50_000.                                                        # a night between the sittings does not count
    tuning.search(method, None, tmp_path / "s", minutes=10, resume=True, **options)
    assert len(started) == 6
    tuning.search(method, None, tmp_path / "s", minutes=12, resume=True, **options)
    assert len(started) == 8


def test_hyperband_spends_the_epochs_of_the_others_and_continues_the_better_third(tmp_path):
    found = tuning.search("hyperband", None, tmp_path / "s", trials=10, epochs=9, objective=smooth)
    assert 90 <= found["epochs"].sum() < 99 and len(found) > 20
    later = found[found["of"].notna()]
    first = found[(found["trial"] < later["trial"].min())]
    assert set(later["of"].head(3)) == set(first["score"].nlargest(3).index)


def test_folds_keep_patients_together_and_test_films_out(store):
    for stores in (tuning._stores(store, None, 0, "raise"), tuning._stores(store, 3, 0, "raise")):
        for s in stores:
            assert set(s.frame["split"]) == {"train", "val"} and not set(s.frame["path"]) & set(store.frame.query("split == 'test'")["path"])
            assert s.frame.groupby("patient")["split"].nunique().max() == 1
    judged = pd.concat([tuning._judged(s) for s in stores])
    assert sorted(judged["path"]) == sorted(store.frame.query("split != 'test'")["path"])
    crossing = store.frame.assign(patient=["p0", *store.frame["patient"][1:-1], "p0"], split=["train", *store.frame["split"][1:-1], "val"])
    with pytest.raises(CourseError, match="share"): tuning._stores(store.using(crossing), None, 0, "raise")


def test_a_real_search_leaves_what_was_said_about_each_film_and_hparams_that_can_be_read(store, tmp_path):
    found = tuning.search("random", store, tmp_path / "s", trials=2, epochs=2, executions=2, space=TINY, batch=8)
    assert (found["runs"] == 2).all() and found["spread"].notna().all() and (found["epochs"] <= 4).all()
    films, ids, p = tuning.judged(tmp_path / "s")
    assert ids == [0, 1] and p.shape == (2, 12, 2) and np.allclose(p.sum(axis=2), 1) and set(films["split"]) == {"val"}
    seen = tuning.logged(tmp_path / "s" / "logs")
    for c in ("filters1", "filters2", "dense", "kernel", "lr", "score"): assert np.allclose(seen[c], found[c].astype(float))
    run = tuning.retrain(tmp_path / "s", store, tmp_path / "best", epochs=1)
    assert run.card["model"]["spec"]["conv"] == list(tuning.spec_of(tuning.best(found)).conv) and "test" in run.card["metrics"]
    with pytest.raises(CourseError, match="another films"): tuning.search("random", store.using(store.frame.iloc[2:]), tmp_path / "s", trials=2, epochs=2, executions=2, space=TINY, batch=8, resume=True)


def test_the_excess_of_the_best_is_the_simulated_one():
    for n in (1, 3, 20, 200):
        simulated = core.rng("noise", n).normal(size=(40_000, n)).max(axis=1)
        assert abs(tuning.expected_best(n) - simulated.mean()) < 4 * simulated.std() / 200
    assert tuning.expected_best(20, .5) == pytest.approx(.5 * tuning.expected_best(20))


def test_importance_finds_the_parameter_that_matters(tmp_path):
    found = tuning.search("random", None, tmp_path / "s", trials=40, objective=smooth)
    shares = tuning.importance(found, draws=8).set_index("parameter")
    assert shares["share"].idxmax() == "lr" and shares.loc["lr", "low"] > shares.loc["a die", "high"]
    stand_in = tuning.StandIn(tmp_path / "s")
    assert stand_in.checked > .6 and np.allclose(stand_in.objective(1)({k: found[k][0] for k in tuning._named(found)}, 3, 0), stand_in.curve({k: found[k][0] for k in tuning._named(found)})[:3])


def test_bad_input_is_told_in_words(tmp_path, monkeypatch):
    go = lambda *a, **k: tuning.search(*a, objective=smooth, **k)
    with pytest.raises(CourseError, match="nothing to resume"): go("random", None, tmp_path / "none", resume=True)
    with pytest.raises(CourseError, match="budget is empty"): go("random", None, tmp_path / "none", trials=0)
    with pytest.raises(CourseError, match="budget is empty"): go("random", None, tmp_path / "none", minutes=0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(CourseError, match="something else"): go("random", None, tmp_path / "mine")
    with pytest.raises(CourseError, match="no search"): tuning.trials(tmp_path / "mine")
    monkeypatch.setitem(sys.modules, "keras_tuner", None)
    with pytest.raises(CourseError, match=r"cxr-course\[tune\]"): go("random", None, tmp_path / "none")
    assert not (tmp_path / "none").exists()
