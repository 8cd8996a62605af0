"""Training: a killed run continued is the same run, Ctrl-C keeps the best model, and nothing foreign is loaded."""
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile

import numpy as np
import pandas as pd
import pytest

keras = pytest.importorskip("keras")
from PIL import Image

from cxr_course import cnn, core, pipelines, training
from cxr_course.core import CourseError

SMALL = cnn.Spec((4, 8), (8,), dropout=.3)
SAME = ["epoch", "loss", "val_loss", "val_auc", "lr"]


def world(folder):
    "Forty noisy pictures of twenty patients; the sick ones have a bright corner."
    folder.mkdir(exist_ok=True)
    rows, draw = [], core.rng("test films")
    for i in range(40):
        sick, split = i % 4 < 2, ("train", "train", "train", "val", "test")[i // 2 % 5]
        picture = draw.uniform(0, .6, (24, 24))
        if sick: picture[4:12, 4:12] += .2
        if not (folder / f"{i}.png").exists(): Image.fromarray((picture * 255).astype("uint8")).save(folder / f"{i}.png")
        rows.append(dict(path=str(folder / f"{i}.png"), patient=f"0{i // 2}", split=split, label="ILL" if sick else "WELL"))
    return core.frame(rows, labels=["WELL", "ILL"])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    return pipelines.build(world(folder / "png"), (24, 24), folder=folder / "store")


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    return training.fit(cnn.build(SMALL, (24, 24, 1)), store, run=tmp_path_factory.mktemp("runs") / "first", epochs=2, batch=8)


SCRIPT = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import keras
    from test_training import SMALL, world
    from cxr_course import cnn, pipelines, training
    folder = Path({folder!r})
    store = pipelines.build(world(folder / "png"), (24, 24), folder=folder / "store")
    def each(row):
        if row["epoch"] == {at}: os.kill(os.getpid(), signal.{signal})
    augment = keras.Sequential([keras.layers.RandomTranslation(.1, .1, fill_mode="nearest")])
    resume = "resume" in sys.argv
    print(training.fit(cnn.build(SMALL, (24, 24, 1)), store, run=folder / sys.argv[1], epochs=4, batch=8, lr=1e-2, augment=augment, deterministic=True, resume=resume,
                       each=each if "hurt" in sys.argv else None))
"""


def child(folder, *words, at=2, signal="SIGKILL"):
    code = textwrap.dedent(SCRIPT.format(tests=os.path.dirname(__file__), folder=str(folder), at=at, signal=signal))
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"})


def test_a_run_killed_with_minus_nine_and_resumed_is_the_same_run(tmp_path):
    assert child(tmp_path, "peace").returncode == 0
    assert child(tmp_path, "cut", "hurt").returncode == -signal.SIGKILL
    assert not (tmp_path / "cut").exists() and (tmp_path / ".cut.partial" / "state.npz").exists()
    with pytest.raises(CourseError, match="resume=True"): training.load_run(tmp_path / "cut")
    done = child(tmp_path, "cut", "resume")
    assert done.returncode == 0, done.stderr
    peace, cut = training.load_run(tmp_path / "peace"), training.load_run(tmp_path / "cut")
    assert cut.history[SAME].equals(peace.history[SAME]) and len(cut.history) == 4
    assert cut.predictions["p_ILL"].equals(peace.predictions["p_ILL"])
    assert not list(tmp_path.glob(".*partial")) and not cut.card["interrupted"]


def test_ctrl_c_finishes_the_folder_and_says_where(tmp_path):
    done = child(tmp_path, "stopped", "hurt", signal="SIGINT", at=1)
    assert done.returncode == 0 and "stopped by Ctrl-C" in done.stdout and str(tmp_path / "stopped") in done.stdout, done.stderr
    run = training.load_run(tmp_path / "stopped")
    assert run.card["interrupted"] and len(run.history) == 1
    assert run.model(np.zeros((1, 24, 24, 1))).shape == (1, 1)


def test_ctrl_c_before_the_first_epoch_is_over_leaves_nothing(store, tmp_path):
    def augment(x, training): raise KeyboardInterrupt
    with pytest.raises((CourseError, KeyboardInterrupt)):
        training.fit(cnn.build(SMALL, (24, 24, 1)), store, run=tmp_path / "none", epochs=2, augment=augment)
    assert not (tmp_path / "none").exists()


def test_the_run_folder_and_its_card(run, store):
    assert sorted(p.name for p in run.folder.iterdir()) == ["card.json", "history.csv", "logs", "model.keras", "predictions.csv"]
    assert run.card["labels"] == ["WELL", "ILL"] and run.card["preprocessing"]["shape"] == [24, 24]
    assert run.card["data"]["splits"]["train"] == dict(films=24, patients=12, without_patient=0, WELL=12, ILL=12)
    assert run.card["model"]["spec"]["dropout"] == .3 and 0 <= run.threshold <= 1.1
    assert run.predictions["patient"].str.startswith("0").all()                      # text stays text
    assert list(run.predictions["label"].cat.categories) == ["WELL", "ILL"]
    again = training.predict(run.model, store, "test")
    assert np.allclose(again["p_ILL"], run.predictions.query("split == 'test'")["p_ILL"], atol=1e-6)
    text = (run.folder / "card.json").read_text()
    assert "NaN" not in text and json.loads(text) == run.card


def test_what_fit_refuses(run, store, tmp_path):
    small = lambda shape=(24, 24, 1), outputs=1: cnn.build(SMALL, shape, outputs)
    with pytest.raises(CourseError, match="never overwritten"): training.fit(small(), store, run=run.folder)
    with pytest.raises(CourseError, match="the store holds 24 x 24"): training.fit(small((32, 32, 1)), store, run=tmp_path / "a")
    with pytest.raises(CourseError, match="3 channels"): training.fit(small((24, 24, 3)), store, run=tmp_path / "a")
    with pytest.raises(CourseError, match="3 outputs"): training.fit(small(outputs=3), store, run=tmp_path / "a")
    with pytest.raises(CourseError, match="nothing to resume"): training.fit(small(), store, run=tmp_path / "a", resume=True)
    with pytest.raises(CourseError, match="not a choice"): training.fit(small(), store, run=tmp_path / "a", schedule="stairs")
    leaky = store.frame.copy()
    leaky.loc[leaky["split"] == "val", "patient"] = leaky.loc[leaky["split"] == "train", "patient"].iloc[0]
    with pytest.raises(CourseError, match="share 1 patient"): training.fit(small(), store.using(leaky), run=tmp_path / "a")
    healthy = store.frame[~((store.frame["split"] == "val") & (store.frame["label"] == "ILL"))]
    with pytest.raises(CourseError, match="every class"): training.fit(small(), store.using(healthy), run=tmp_path / "a")
    nameless = store.frame.assign(patient=None)
    with pytest.raises(CourseError, match="have no patient"): training.fit(small(), store.using(nameless), run=tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_training_on_one_store_and_validating_on_another(store, tmp_path):
    train = store.using(store.frame[store.frame["split"] == "train"])
    rest = store.using(store.frame[store.frame["split"] != "train"])
    run = training.fit(cnn.build(SMALL, (24, 24, 1), 2), train, rest, run=tmp_path / "two", epochs=1, unknown="picture")
    assert run.card["model"]["outputs"] == 2 and set(run.predictions["split"]) == {"val", "test"}


@pytest.mark.parametrize("spoil, message", [
    (lambda f: (f / "card.json").unlink(), "no finished run"),
    (lambda f: (f / "card.json").write_text("{"), "card cannot be read"),
    (lambda f: (f / "card.json").write_text("[1, 2]"), "not that of a run"),
    (lambda f: (f / "history.csv").write_text("a,b\n1,x"), "history cannot be read"),
    (lambda f: (f / "history.csv").write_bytes(b"\xff\xfe\x00"), "history cannot be read"),
    (lambda f: (f / "predictions.csv").write_text("path,split\n"), "lack p_WELL"),
    (lambda f: (f / "predictions.csv").write_text(""), "predictions cannot be read"),
])
def test_damaged_runs_are_named(run, tmp_path, spoil, message):
    import shutil
    copy = shutil.copytree(run.folder, tmp_path / "copy")
    spoil(copy)
    with pytest.raises(CourseError, match=message): training.load_run(copy)


def test_foreign_and_damaged_models_are_refused(run, tmp_path):
    net = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda x: x + 1)])
    net.save(tmp_path / "lambda.keras")
    with pytest.raises(CourseError, match="Python code"): training.load_model(tmp_path / "lambda.keras")
    whole = (run.folder / "model.keras").read_bytes()
    for name, data in (("half", whole[:len(whole) // 2]), ("empty", b""), ("text", b"not a model"), ("bent", whole[:2000] + b"\0" * 500 + whole[2500:])):
        (tmp_path / f"{name}.keras").write_bytes(data)
        with pytest.raises(CourseError, match="damaged"): training.load_model(tmp_path / f"{name}.keras")
    with zipfile.ZipFile(run.folder / "model.keras") as z, zipfile.ZipFile(tmp_path / "evil.keras", "w") as out:
        for item in z.namelist():
            data = z.read(item)
            if item == "config.json": data = data.replace(b'"class_name": "Flatten"', b'"class_name": "system"').replace(b'"module": "keras.layers"', b'"module": "os"')
            out.writestr(item, data)
    with pytest.raises(CourseError): training.load_model(tmp_path / "evil.keras")
    (tmp_path / "model.h5").write_bytes(b"")
    with pytest.raises(CourseError, match="ends in .keras"): training.load_model(tmp_path / "model.h5")
    with pytest.raises(CourseError, match="no such model"): training.load_model(tmp_path / "none.keras")


def test_loss_ignores_what_nobody_knows():
    y, z = np.array([[1, np.nan], [0, np.nan]], "float32"), np.array([[2, 50], [-1, -50]], "float32")
    assert np.isclose(float(training.cross_entropy(y, z)), np.mean([np.log1p(np.exp(-2)), np.log1p(np.exp(-1))]))
    assert float(training.cross_entropy(np.full((2, 2), np.nan, "float32"), z)) == 0


def test_schedules():
    assert training.plateau([1, 1, 1, 1], 1e-3) == pytest.approx(3e-4)
    assert training.plateau([1] * 100, 1e-3) == 1e-6
    assert training.cosine(0, 10, 1e-3) == pytest.approx(1e-3) and training.cosine(10, 10, 1e-3) == pytest.approx(1e-6)
    assert training.enough([1, 2, 3], 2) and not training.enough([3, 2, 1], 2) and not training.enough([], 1)
