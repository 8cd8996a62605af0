"""Training: a killed run continued is the same run, Ctrl-C keeps the best model, nothing odd is loaded."""
import json
import os
import signal
import textwrap
import zipfile

import numpy as np
import pandas as pd
import pytest

import keras
from PIL import Image

from cxr_course.core import CourseError, rng
from cxr_course.data.building import build_store
from cxr_course.data.pipeline import Normalizer, to_dataset
from cxr_course.frame import Task, make_frame, regroup
from cxr_course.models.cnn import CNNSpec, build_cnn, classifier_head, feature_extractor
from cxr_course.models.losses import cross_entropy
from cxr_course.models.weights import load_model
from cxr_course.stats.curves import auc
from cxr_course.training.fit import fit
from cxr_course.training.learner import _seed, run_epochs
from cxr_course.training.run import load_run
from cxr_course.training.schedules import (
    cosine_decay, kept_epoch, learning_rate, reduce_lr_on_plateau, should_stop,
)
from cxr_course.training.scores import EpochScores, PerImageLoss, predict_split, validation

SMALL = CNNSpec((4, 8), (8,), dropout=.3)
COLUMNS = ["epoch", "loss", "accuracy", "auc", "val_loss", "val_accuracy", "val_auc", "lr", "seconds"]
SAME = COLUMNS[:-1]


def world(folder):
    "Forty noisy pictures of twenty patients; the sick ones have a bright corner."
    folder.mkdir(exist_ok=True)
    rows, draw = [], rng("test films")
    for i in range(40):
        sick, split = i % 4 < 2, ("train", "train", "train", "val", "test")[i // 2 % 5]
        picture = draw.uniform(0, .6, (24, 24))
        if sick: picture[4:12, 4:12] += .2
        if not (folder / f"{i}.png").exists():
            Image.fromarray((picture * 255).astype("uint8")).save(folder / f"{i}.png")
        rows.append(dict(path=str(folder / f"{i}.png"), patient=f"0{i // 2}", split=split, label="ILL" if sick
                         else "WELL"))
    return make_frame(rows, labels=["WELL", "ILL"])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    return build_store(world(folder / "png"), (24, 24), folder=folder / "store")


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    return fit(build_cnn(SMALL, (24, 24, 1)), store, run=tmp_path_factory.mktemp("runs") / "first", epochs=2,
               batch=8)


SCRIPT = """
    import os, signal, sys
    # a background job ignores Ctrl-C, and so would its children
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import keras
    from test_training import SMALL, world
    from cxr_course.data.building import build_store
    from cxr_course.models.cnn import build_cnn
    from cxr_course.training.fit import fit
    folder = Path({folder!r})
    store = build_store(world(folder / "png"), (24, 24), folder=folder / "store")
    def each(row):
        if row["epoch"] == {at}: os.kill(os.getpid(), signal.{signal})
    augment = keras.Sequential([keras.layers.RandomTranslation(.1, .1, fill_mode="nearest")])
    resume = "resume" in sys.argv
    print(fit(build_cnn(SMALL, (24, 24, 1)), store, run=folder / sys.argv[1], epochs=4, batch=8, lr=1e-2,
              augment=augment, deterministic=True, resume=resume, each=each if "hurt" in sys.argv else None))
    import tensorflow as tf
    tf.random.uniform((1,))              # whoever goes on in this process must not be asked for a seed
"""


def child(folder, *words, at=2, signal="SIGKILL"):
    code = textwrap.dedent(SCRIPT.format(tests=os.path.dirname(__file__), folder=str(folder), at=at,
                                         signal=signal))
    from tools.forked import python  # the child imports this file, and has no `tools`
    return python("-c", code, *words)


def test_a_run_killed_with_minus_nine_and_resumed_is_the_same_run(tmp_path):
    assert child(tmp_path, "peace").returncode == 0
    assert child(tmp_path, "cut", "hurt").returncode == -signal.SIGKILL
    assert not (tmp_path / "cut").exists() and (tmp_path / ".cut.partial" / "state.npz").exists()
    with pytest.raises(CourseError, match="resume=True"): load_run(tmp_path / "cut")
    done = child(tmp_path, "cut", "resume")
    assert done.returncode == 0, done.stderr
    peace, cut = load_run(tmp_path / "peace"), load_run(tmp_path / "cut")
    assert cut.history[SAME].equals(peace.history[SAME]) and len(cut.history) == 4
    assert cut.predictions["p_ILL"].equals(peace.predictions["p_ILL"])
    assert not list(tmp_path.glob(".*partial")) and not cut.card["interrupted"]


def test_ctrl_c_finishes_the_folder_and_says_where(tmp_path):
    done = child(tmp_path, "stopped", "hurt", signal="SIGINT", at=1)
    assert (
        done.returncode == 0
        and "stopped by Ctrl-C" in done.stdout
        and str(tmp_path / "stopped") in done.stdout
    ), done.stderr
    run = load_run(tmp_path / "stopped")
    assert run.card["interrupted"] and len(run.history) == 1
    assert run.model(np.zeros((1, 24, 24, 1))).shape == (1, 1)


def test_ctrl_c_before_the_first_epoch_is_over_leaves_nothing(store, tmp_path):
    def augment(x, training): raise KeyboardInterrupt
    with pytest.raises((CourseError, KeyboardInterrupt)):
        fit(build_cnn(SMALL, (24, 24, 1)), store, run=tmp_path / "none", epochs=2, augment=augment)
    assert not (tmp_path / "none").exists()


def test_the_run_folder_and_its_card(run, store):
    assert sorted(p.name for p in run.folder.iterdir()) == ["card.json", "history.csv", "images.csv", "logs",
                                                            "model.keras", "predictions.csv", "reference.npz"]
    assert run.card["format"] == 2 and run.card["seen"]["images"] == 24 and list(run.history) == COLUMNS
    assert run.card["labels"] == ["WELL", "ILL"] and run.card["preprocessing"]["shape"] == [24, 24]
    assert run.card["data"]["splits"]["train"] == dict(images=24, patients=12, without_patient=0, WELL=12,
                                                       ILL=12)
    assert run.card["model"]["spec"]["dropout"] == .3 and 0 <= run.threshold <= 1.1
    assert run.predictions["patient"].str.startswith("0").all()                      # text stays text
    assert list(run.predictions["label"].cat.categories) == ["WELL", "ILL"]
    again = predict_split(run.model, store, "test")
    assert np.allclose(again["p_ILL"], run.predictions.query("split == 'test'")["p_ILL"], atol=1e-6)
    text = (run.folder / "card.json").read_text()
    assert "NaN" not in text and json.loads(text) == run.card


def test_what_fit_refuses(run, store, tmp_path):
    small = lambda shape=(24, 24, 1), outputs=1: build_cnn(SMALL, shape, outputs)
    with pytest.raises(CourseError, match="never overwritten"): fit(small(), store, run=run.folder)
    with pytest.raises(CourseError, match="the store holds 24 x 24"):
        fit(small((32, 32, 1)), store, run=tmp_path / "a")
    with pytest.raises(CourseError, match="3 channels"): fit(small((24, 24, 3)), store, run=tmp_path / "a")
    with pytest.raises(CourseError, match="3 outputs"): fit(small(outputs=3), store, run=tmp_path / "a")
    with pytest.raises(CourseError, match="nothing to resume"):
        fit(small(), store, run=tmp_path / "a", resume=True)
    with pytest.raises(CourseError, match="not a choice"):
        fit(small(), store, run=tmp_path / "a", schedule="stairs")
    leaky = store.frame.copy()
    leaky.loc[leaky["split"] == "val",
              ["patient", "group"]] = leaky.loc[leaky["split"] == "train",
                                                ["patient", "group"]].iloc[0].tolist()
    with pytest.raises(CourseError, match="share 1 patient"):
        fit(small(), store.using(leaky), run=tmp_path / "a")
    healthy = store.frame[~((store.frame["split"] == "val") & (store.frame["label"] == "ILL"))]
    with pytest.raises(CourseError, match="every class"):
        fit(small(), store.using(healthy), run=tmp_path / "a")
    nameless = regroup(store.frame.assign(patient=None))
    with pytest.raises(CourseError, match="have no patient"):
        fit(small(), store.using(nameless), run=tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_training_on_one_store_and_validating_on_another(store, tmp_path):
    train = store.using(store.frame[store.frame["split"] == "train"])
    rest = store.using(store.frame[store.frame["split"] != "train"])
    run = fit(build_cnn(SMALL, (24, 24, 1), 2), train, rest, run=tmp_path / "two", epochs=1)
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
    with pytest.raises(CourseError, match=message): load_run(copy)


def test_foreign_and_damaged_models_are_refused(run, tmp_path):
    net = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda x: x + 1)])
    net.save(tmp_path / "lambda.keras")
    with pytest.raises(CourseError, match="Python code"): load_model(tmp_path / "lambda.keras")
    whole = (run.folder / "model.keras").read_bytes()
    for name, data in (
        ("half", whole[: len(whole) // 2]), ("empty", b""), ("text", b"not a model"),
        ("bent", whole[:2000] + b"\0" * 500 + whole[2500:]),
    ):
        (tmp_path / f"{name}.keras").write_bytes(data)
        with pytest.raises(CourseError, match="damaged"): load_model(tmp_path / f"{name}.keras")
    with (
        zipfile.ZipFile(run.folder / "model.keras") as z,
        zipfile.ZipFile(tmp_path / "evil.keras", "w") as out,
    ):
        for item in z.namelist():
            data = z.read(item)
            if item == "config.json":
                data = data.replace(b'"class_name": "Flatten"', b'"class_name": "system"').replace(
                    b'"module": "keras.layers"', b'"module": "os"'
                )
            out.writestr(item, data)
    with pytest.raises(CourseError): load_model(tmp_path / "evil.keras")
    (tmp_path / "model.h5").write_bytes(b"")
    with pytest.raises(CourseError, match="ends in .keras"): load_model(tmp_path / "model.h5")
    with pytest.raises(CourseError, match="no such model"): load_model(tmp_path / "none.keras")


def test_loss_ignores_what_nobody_knows():
    y, z = np.array([[1, np.nan], [0, np.nan]], "float32"), np.array([[2, 50], [-1, -50]], "float32")
    assert np.isclose(float(cross_entropy(y, z)), np.mean([np.log1p(np.exp(-2)), np.log1p(np.exp(-1))]))
    assert float(cross_entropy(np.full((2, 2), np.nan, "float32"), z)) == 0


def test_schedules():
    assert reduce_lr_on_plateau([1, 1, 1, 1], 1e-3) == pytest.approx(3e-4)
    assert reduce_lr_on_plateau([1] * 100, 1e-3) == 1e-6
    assert cosine_decay(0, 10,
                        1e-3) == pytest.approx(1e-3) and cosine_decay(10, 10, 1e-3) == pytest.approx(1e-6)
    assert should_stop([1, 2, 3], 2) and not should_stop([3, 2, 1], 2) and not should_stop([], 1)
    assert not should_stop([1, .99, .98], 3) and should_stop([1, .99, .98, .97], 3, min_delta=.1)
    assert learning_rate("constant", [], .1, 9) == .1 and learning_rate("constant", [1], .1, 9) is None
    assert kept_epoch([2, 1, 3]) == 1 and kept_epoch([2, 1, 3], "last") == 2


# ---- Keras's own parts, passed on

def net(seed=0, spec=SMALL, outputs=1): return build_cnn(spec, (24, 24, 1), outputs, seed)


class Diary(keras.callbacks.Callback):
    "Writes down what it hears."
    def __init__(self):
        super().__init__()
        self.heard = []

    def on_train_begin(self, logs=None): self.heard.append("begin")
    def on_epoch_begin(self, epoch, logs=None): self.heard.append(epoch)
    def on_epoch_end(self, epoch, logs=None): self.heard.append(sorted(logs))
    def on_train_end(self, logs=None): self.heard.append("end")


def test_callbacks_hear_one_training(store, tmp_path):
    diary = Diary()
    run = fit(net(), store, run=tmp_path / "run", epochs=3, batch=8, callbacks=[diary])
    logged = sorted(set(COLUMNS) - {"epoch", "seconds"})
    assert diary.heard == ["begin", 0, logged, 1, logged, 2, logged, "end"] and len(run.history) == 3


def test_callbacks_hear_the_end_when_training_is_cut(store, tmp_path):
    diary = Diary()
    def plug(row): raise InterruptedError
    with pytest.raises(InterruptedError):
        fit(net(), store, run=tmp_path / "run", epochs=3, batch=8, callbacks=[diary], each=plug)
    assert diary.heard.count("begin") == diary.heard.count("end") == 1


def test_kerass_own_callbacks(store, tmp_path):
    pytest.importorskip("tensorboard")
    kinds = keras.callbacks
    saved = tmp_path / "best.keras"
    lower = kinds.ReduceLROnPlateau("val_loss", factor=.5, patience=1, min_delta=10)
    run = fit(net(), store, run=tmp_path / "run", epochs=6, batch=8, lr=1e-2, schedule="constant",
              patience=99, callbacks=[kinds.EarlyStopping("val_loss", patience=3, min_delta=10), lower,
                                      kinds.CSVLogger(tmp_path / "log.csv"),
                                      kinds.ModelCheckpoint(saved, "val_loss", save_best_only=True),
                                      kinds.TensorBoard(tmp_path / "board")])
    # the first epoch is progress, three are not
    assert len(run.history) == 4
    assert np.allclose(run.history["lr"], [1e-2, 1e-2, 5e-3, 2.5e-3])
    log = pd.read_csv(tmp_path / "log.csv")
    assert log["epoch"].tolist() == [0, 1, 2, 3] and np.allclose(log["val_auc"], run.history["val_auc"])
    x = store.array("val")
    # the plain model of the best epoch
    assert np.allclose(load_model(saved)(x), run.model(x), atol=1e-6)
    assert list((tmp_path / "board").rglob("events*"))


def test_a_schedule_has_the_last_word_unless_it_is_constant(store, tmp_path):
    tenth = keras.callbacks.LearningRateScheduler(lambda epoch, lr: .1 / (epoch + 1))
    run = fit(net(), store, run=tmp_path / "a", epochs=2, batch=8, lr=1e-3, schedule="constant",
              callbacks=[tenth])
    assert np.allclose(run.history["lr"], [.1, .05])


def test_fit_is_kerass_fit(store, tmp_path):
    "The same weights as bare Keras, step by step, where both have the same order and nothing random."
    spec = CNNSpec((4, 8), (8,), l2=.01)
    ours, bare = net(3, spec), net(3, spec)
    run = fit(ours, store, run=tmp_path / "run", epochs=2, batch=8, lr=1e-2, optimizer="adamw",
              schedule="constant", keep="last", patience=99)
    bare.compile(keras.optimizers.AdamW(1e-2), keras.losses.BinaryCrossentropy(from_logits=True))
    for epoch in range(2):
        bare.fit(to_dataset(store, "train", batch=8, shuffle=_seed(0, "order", epoch)), verbose=0)
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(ours.get_weights(), bare.get_weights()))
    # without the penalty, as validation is
    assert run.history["loss"].iloc[0] < .9


def test_keep_last_constant_and_training_predictions(store, tmp_path):
    run = fit(net(), store, run=tmp_path / "run", epochs=3, batch=8, lr=0.05, schedule="constant",
              keep="last", patience=99, predict_train=True)
    assert run.card["training"]["best_epoch"] == 3 and (run.history["lr"] == run.history["lr"][0]).all()
    assert run.predictions["split"].value_counts().to_dict() == dict(train=24, val=8, test=8)
    assert run.metric("AUC", "train").value == pytest.approx(auc(*_truth(run.predictions, "train")))
    last = predict_split(run.model, store, "val")
    assert auc(*_truth(last, "val")) == pytest.approx(run.history["val_auc"].iloc[-1])


def _truth(predictions, split):
    part = predictions[predictions["split"] == split]
    return (part["label"] == "ILL").to_numpy(float), part["p_ILL"].to_numpy()


@pytest.mark.parametrize("kind", ["two", "three", "findings"])
def test_the_metric_of_an_epoch_is_the_exact_one(kind):
    from scipy.special import expit, softmax
    draw, k = rng("metric", kind), 1 if kind == "two" else 3
    z = draw.normal(scale=2, size=(300, k)).astype("float32")
    y = draw.integers(0, max(k, 2), 300)
    if kind == "findings":
        y = np.where(draw.uniform(size=(300, 3)) < .3, np.nan, draw.uniform(size=(300, 3)) < expit(z))
    scores = EpochScores(k, kind == "findings", cross_entropy)
    for i in range(0, 300, 64): scores.update_state(y[i:i + 64], z[i:i + 64])
    p = softmax(z, axis=1) if kind == "three" else expit(z)
    each = [(y[:, i] if kind == "findings" else (y == i if kind == "three" else y).astype(float), p[:, i])
            for i in range(k)]
    right = (
        (z.argmax(1) == y).mean()
        if kind == "three"
        else np.mean([np.mean((s > 0.5)[~np.isnan(t)] == t[~np.isnan(t)]) for t, s in each])
    )
    found = scores.values()
    assert found["accuracy"] == pytest.approx(right, abs=1e-6)
    assert found["auc"] == pytest.approx(np.mean([auc(t, s) for t, s in each]), abs=2e-3)
    if kind != "findings": assert found["loss"] == pytest.approx(float(cross_entropy(y, z)), rel=1e-5)


def test_accumulation_adds_up_batches(store, tmp_path):
    "Two batches of 12 and one of 24 are the same step, where no layer looks at the batch as a whole."
    spec, options = CNNSpec((4, 8), (8,)), dict(epochs=2, lr=1e-2, schedule="constant", keep="last")
    whole, parts = net(1, spec), net(1, spec)
    fit(whole, store, run=tmp_path / "whole", batch=24, **options)
    run = fit(parts, store, run=tmp_path / "parts", batch=12, accumulate=2, **options)
    assert run.card["training"]["accumulate"] == 2
    assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(whole.get_weights(), parts.get_weights()))


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_half_the_digits_are_a_matter_of_the_steps_only(store, tmp_path, precision):
    run = fit(net(), store, run=tmp_path / "half", epochs=2, batch=8, precision=precision)
    policies = {layer.dtype_policy.name for part in (feature_extractor, classifier_head)
                for layer in part(run.model).layers}
    assert policies == {"float32"} and np.isfinite(run.history[SAME]).all(axis=None)


def test_layerwise_rates_in_fit(store, tmp_path):
    frozen = net(2)
    before = frozen.get_weights()
    rates = [0.0] * len(feature_extractor(frozen).trainable_variables) + [1.0] * len(
        classifier_head(frozen).trainable_variables
    )
    fit(frozen, store, run=tmp_path / "a", epochs=1, batch=8, optimizer="adamw", rates=rates)
    still = len(feature_extractor(frozen).get_weights())
    after = frozen.get_weights()
    assert all(np.array_equal(a, b) for a, b in zip(before[:still], after[:still])) and not np.array_equal(
        before[-1], after[-1]
    )


def test_optimizer_and_loss_objects_are_copied_and_described(store, tmp_path):
    mine = keras.optimizers.RMSprop(2e-3, rho=.8)
    one, two = (fit(net(), store, run=tmp_path / name, epochs=1, batch=8, optimizer=mine,
                    loss=keras.losses.BinaryFocalCrossentropy(from_logits=True)) for name in "ab")
    assert (
        not mine.built
        and one.history["lr"][0] == np.float32(2e-3)
        and '"rho": 0.8' in one.card["training"]["optimizer"]
    )
    assert "BinaryFocalCrossentropy" in one.card["training"]["loss"] and one.history["loss"].equals(
        two.history["loss"]
    )


def test_what_gives_probabilities_is_refused(store, tmp_path):
    head = keras.Sequential([keras.Input((24, 24, 1)), keras.layers.Flatten(), keras.layers.Dense(1),
                             keras.layers.Activation("sigmoid")], name="head")
    look = keras.Sequential([keras.Input((24, 24, 1)), keras.layers.Rescaling(2.)], name="features")
    model = keras.Sequential([keras.Input((24, 24, 1)), look, head])
    for call in (lambda: predict_split(model, store), lambda: fit(model, store, run=tmp_path / "a")):
        with pytest.raises(CourseError, match=r"ends in a sigmoid(.|\n)*wrap\(model\)"): call()
    image = keras.Input((24, 24, 1))
    answer = keras.layers.Softmax()(keras.layers.Dense(2)(keras.layers.Flatten()(image)))
    with pytest.raises(CourseError, match="ends in a softmax"):
        predict_split(keras.Model(image, answer), store)
    with pytest.raises(CourseError, match="from_logits=True"):
        fit(net(), store, run=tmp_path / "a", loss=keras.losses.BinaryCrossentropy())
    with pytest.raises(CourseError, match="schedule of its own"):
        fit(net(), store, run=tmp_path / "a",
            optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 9)))


def test_a_normaliser_travels_with_the_model(store, tmp_path):
    run = fit(net(), store, run=tmp_path / "run", epochs=1, batch=8, normaliser=Normalizer("train"))
    pixels = store.array("train")
    seen = feature_extractor(run.model).layers[0](pixels)
    assert abs(float(np.mean(seen))) < 1e-3 and abs(float(np.std(seen)) - 1) < 1e-2
    assert run.card["preprocessing"]["normaliser"]["mean"] == pytest.approx(pixels.mean(), abs=1e-4)
    again = predict_split(run.model, store, "test")["p_ILL"]
    assert np.allclose(again, run.predictions.query("split == 'test'")["p_ILL"], atol=1e-6)


# ---- the folder

def test_finish_sees_a_whole_folder_before_it_has_its_name(store, tmp_path):
    seen = []
    def look(part):
        seen.append((part.name, sorted(p.name for p in part.iterdir()
                                       if p.suffix in (".csv", ".json", ".keras", ".npz")),
                     (tmp_path / "run").exists()))
    fit(net(), store, run=tmp_path / "run", epochs=1, batch=8, finish=look)
    assert seen[0][0] == ".run.partial" and not seen[0][2]
    assert {"card.json", "history.csv", "images.csv", "model.keras", "predictions.csv",
            "reference.npz"} <= set(seen[0][1])


def test_a_kill_while_finishing_can_be_resumed(store, tmp_path):
    def kill(part): raise InterruptedError
    with pytest.raises(InterruptedError):
        fit(net(), store, run=tmp_path / "run", epochs=2, batch=8, finish=kill)
    run = fit(net(), store, run=tmp_path / "run", epochs=2, batch=8, resume=True)
    assert len(run.history) == 2 and not list(tmp_path.glob(".*")) and not (run.folder / "state.npz").exists()


def test_two_processes_in_one_run_are_refused(store, tmp_path):
    def second(row):
        for resume in (False, True):
            with pytest.raises(CourseError, match="another process"):
                fit(net(), store, run=tmp_path / "run", epochs=2, batch=8, resume=resume)
    run = fit(net(), store, run=tmp_path / "run", epochs=2, batch=8, each=second)
    assert len(run.history) == 2


def test_images_of_the_run_are_listed(run, store):
    listed = pd.read_csv(run.folder / "images.csv", dtype=str)
    assert list(listed) == ["path", "patient", "group", "split", "sha256"] and listed[
        "split"
    ].value_counts().to_dict() == dict(train=24, val=8, test=8)


def test_format_one_is_refused_in_words(run, tmp_path):
    import shutil
    old = shutil.copytree(run.folder, tmp_path / "old")
    (old / "card.json").write_text(json.dumps(run.card | dict(format=1)))
    with pytest.raises(CourseError, match="format 1(.|\n)*train it again"): load_run(old)


def test_findings_with_gaps(tmp_path, store):
    draw = rng("gaps")
    rows = store.frame.drop(columns="label").assign(
        **{c: np.where(draw.uniform(size=40) < 0.2, np.nan, draw.integers(0, 2, 40)) for c in "AB"}, age=7.0
    )
    several = store.using(make_frame(rows, findings=["A", "B"]))
    run = fit(net(outputs=2), several, run=tmp_path / "run", epochs=2, batch=8)
    assert (
        run.card["labels"] == ["A", "B"]
        and run.card["kind"] == "findings"
        and np.isfinite(run.history[SAME]).all(axis=None)
    )
    assert Task.of(load_run(run.folder).predictions).names == ("A", "B")


def test_the_engine_takes_a_model_of_your_own(store):
    "As the search does: compiled by somebody else, with metrics of its own."
    model = net()
    model.compile("adam", PerImageLoss(cross_entropy),
                  metrics=[keras.metrics.BinaryAccuracy(threshold=0.0, name="right")])
    history = run_epochs(model, lambda seed: to_dataset(store, "train", batch=8, shuffle=seed),
                         validation(model, store), [], epochs=3, lr=1e-2, schedule="constant")
    assert [h["epoch"] for h in history] == [1, 2, 3] and {"right", "loss", "val_auc"} <= set(history[0])
