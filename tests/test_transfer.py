"""Borrowed networks: the right pixels, the right weights or a reason, and nothing that changes while it is frozen."""
import numpy as np
import pytest

import keras
from PIL import Image

from cxr_course import cnn, core, pipelines, training, transfer
from cxr_course.core import CourseError

FAMILY = {"densenet121": "densenet", "efficientnetb0": "efficientnet", "mobilenetv2": "mobilenet_v2"}
LIGHT = ("vgg16", "mobilenetv2", "compact")                 # quick to build


def films(n=4, side=32): return core.rng("borrowed", n).uniform(size=(n, side, side, 1)).astype("float32")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    "Forty noisy pictures of twenty patients; the sick ones have a bright corner."
    folder, rows, draw = tmp_path_factory.mktemp("films"), [], core.rng("test films")
    for i in range(40):
        sick, split = i % 4 < 2, ("train", "train", "train", "val", "test")[i // 2 % 5]
        picture = draw.uniform(0, .6, (32, 32))
        if sick: picture[4:14, 4:14] += .3
        Image.fromarray((picture * 255).astype("uint8")).save(folder / f"{i}.png")
        rows.append(dict(path=str(folder / f"{i}.png"), patient=f"0{i // 2}", split=split, label="ILL" if sick else "WELL"))
    return pipelines.build(core.frame(rows, labels=["WELL", "ILL"]), (32, 32), folder=folder / "store")


@pytest.fixture(scope="module")
def borrowed(tmp_path_factory):
    "A compact network that stands for one trained elsewhere."
    folder = tmp_path_factory.mktemp("weights")
    model = transfer.build("compact", (32, 32, 1), outputs=3, seed=7)
    model.save(folder / "eyes.keras")
    return model, folder / "eyes.keras"


def test_counts_of_systems_b_and_c():
    maps = cnn.features(transfer.build("vgg16", (224, 224, 1), head="mean")).output_shape[1:]
    assert maps == (7, 7, 512) and transfer.head_params("flatten", maps) == 107_157_601
    model = transfer.freeze(transfer.build("vgg16", (32, 32, 1), head="flatten"))
    count = lambda weights: sum(int(np.prod(w.shape)) for w in weights)
    assert count(model.non_trainable_variables) - 2 == 14_714_688                      # the two are dropout's dice
    assert count(model.trainable_variables) == transfer.head_params("flatten", (1, 1, 512))
    assert [layer.name for layer in cnn.head(model).layers] == ["flatten", "dense1", "dense2", "drop", "logits"] and cnn.head(model).get_layer("drop").rate == .2
    assert transfer.build("densenet121", (32, 32, 1), outputs=14).count_params() == 7_051_854


@pytest.mark.parametrize("name", LIGHT)
def test_contract_and_seed(name, tmp_path):
    x, model = films(), transfer.build(name, (32, 32, 1), outputs=2, seed=3)
    out = np.asarray(model(x))
    assert np.array_equal(cnn.head(model)(cnn.features(model)(x)), out) and out.shape == (4, 2)
    assert np.array_equal(transfer.build(name, (32, 32, 1), outputs=2, seed=3)(x), out) and not np.array_equal(transfer.build(name, (32, 32, 1), outputs=2, seed=4)(x), out)
    model.save(tmp_path / "model.keras")
    assert np.array_equal(training.load_model(tmp_path / "model.keras")(x), out)
    assert len(cnn.activations(model, x[0])) > 5


@pytest.mark.parametrize("name", [n for n, b in transfer.BACKBONES.items() if b.application])
def test_pixels_as_the_family_wants_them(name):
    x = films()
    wanted = getattr(keras.applications, FAMILY.get(name, name)).preprocess_input(np.repeat(x, 3, -1) * 255)
    assert np.allclose(transfer.rescaled(x, transfer.BACKBONES[name].scaling), wanted, atol=1e-4)


def test_efficientnet_divides_by_deviations():
    "Its ImageNet file keeps deviations where variances belong; Keras mends that with a layer of its own, which a network built without weights has not."
    look = cnn.features(transfer.build("efficientnetb0", (32, 32, 1)))
    layer = next(layer for layer in look.layers if isinstance(layer, keras.layers.Normalization))
    mean, std = np.array([.485, .456, .406]), np.array([.229, .224, .225])
    layer.adapt_mean.assign(mean.reshape(layer.adapt_mean.shape)); layer.adapt_variance.assign(std.reshape(layer.adapt_variance.shape))
    transfer._settle(look)
    transfer._settle(look)                                                             # twice is as once
    x = films()
    assert np.allclose(keras.Model(look.inputs, layer.output)([x]), (np.repeat(x, 3, -1) - mean) / std, atol=1e-3)


def test_every_kind_of_file(tmp_path):
    x, model = films(), transfer.build("mobilenetv2", (32, 32, 1), seed=1)
    look = cnn.features(model)
    model.save(tmp_path / "whole.keras")
    model.save_weights(tmp_path / "whole.weights.h5")
    look.save_weights(tmp_path / "part.weights.h5")
    look.save(tmp_path / "old.h5")
    top = keras.applications.MobileNetV2(weights=None, classes=3)                      # a whole network of Keras, of another size, with a top
    for mine, theirs in zip([w for layer in look.layers for w in layer.weights], top.weights): theirs.assign(mine)
    top.save(tmp_path / "top.h5")
    keras.Sequential([keras.Input((32, 32, 3)), keras.Model(look.get_layer("Conv1").input, look.output), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(1)]).save(tmp_path / "nested.h5")
    other = transfer.build("mobilenetv2", (32, 32, 1), weights=tmp_path / "old.h5", seed=2)
    assert other.spec.weights == "file" and other.spec.sha256 == core.sha256(tmp_path / "old.h5") and np.allclose(cnn.features(other)(x), look(x), atol=1e-6)
    for file in ("whole.keras", "whole.weights.h5", "part.weights.h5", "top.h5", "nested.h5"):
        for w in cnn.features(other).weights: w.assign(w + 1)
        transfer.load_weights(cnn.features(other), tmp_path / file)
        assert np.allclose(cnn.features(other)(x), look(x), atol=1e-6), file


def test_wrong_files_are_refused_with_the_reason(tmp_path, borrowed):
    other = transfer.build("mobilenetv2", (32, 32, 1))
    other.save_weights(tmp_path / "good.weights.h5")
    cnn.features(other).save(tmp_path / "other.h5")
    (tmp_path / "page.h5").write_text("\n <!DOCTYPE html><title>Sign in</title>")
    (tmp_path / "pointer.h5").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")
    (tmp_path / "half.weights.h5").write_bytes((tmp_path / "good.weights.h5").read_bytes()[:200_000])
    (tmp_path / "half.keras").write_bytes(borrowed[1].read_bytes()[:20_000])
    (tmp_path / "empty.h5").touch()
    (tmp_path / "text.h5").write_text("no weights here")
    keras.Sequential([keras.Input((32, 32, 1)), keras.layers.Lambda(lambda x: x + 1)]).save(tmp_path / "code.keras")
    reasons = {"page.h5": "web page", "pointer.h5": "Git LFS", "half.weights.h5": "cut off", "half.keras": "damaged", "empty.h5": "empty", "text.h5": "neither HDF5",
               "code.keras": "Python code", "good.weights.h5": "another architecture", "other.h5": "another architecture"}
    for name, reason in reasons.items():
        with pytest.raises(CourseError, match=reason): transfer.build("compact", (32, 32, 1), weights=tmp_path / name)
        with pytest.raises(CourseError, match=reason): transfer.build("compact", (32, 32, 1), weights=tmp_path / name, fallback="none")      # a wrong file never falls back
    with pytest.raises(CourseError, match="another architecture: layer 1"): transfer.build("vgg16", (32, 32, 1), weights=borrowed[1])


def test_without_a_network_only_on_request(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("CXR_COURSE_CACHE", str(tmp_path / "cache"))
    def cut(*args, **options): raise Exception("URL fetch failure: no route")       # as Keras says it
    monkeypatch.setattr(keras.utils, "get_file", cut)
    with pytest.raises(transfer.Unavailable, match="cannot be fetched"): transfer.build("vgg16", (32, 32, 1), weights="imagenet")
    with pytest.raises(transfer.Unavailable, match="no such file"): transfer.build("compact", (32, 32, 1), weights=tmp_path / "absent.h5")
    model = transfer.build("compact", (32, 32, 1), weights=tmp_path / "absent.h5", fallback="none")
    assert model.spec.weights == "none" and "absent.h5" in model.spec.note and "took none" in capsys.readouterr().out
    assert transfer.imagenet_file("vgg16", download=False) is None
    def wrong(*args, **options): raise ValueError("hash")
    monkeypatch.setattr(keras.utils, "get_file", wrong)
    with pytest.raises(CourseError, match="another fingerprint"): transfer.build("vgg16", (32, 32, 1), weights="imagenet", fallback="none")


def test_frozen_means_frozen(borrowed):
    model = transfer.freeze(transfer.build("compact", (32, 32, 1), weights=borrowed[1]))
    before = [w.numpy() for w in cnn.features(model).weights]
    for i in range(3): model(films(8) + i, training=True)
    assert all(np.array_equal(a, w) for a, w in zip(before, cnn.features(model).weights))
    transfer.thaw(model)
    for i in range(3): model(films(8) + i, training=True)
    assert all(np.array_equal(a, w) for a, w in zip(before, cnn.features(model).weights))           # batch normalisation stays
    assert len(transfer.shares(model)) == len(model.trainable_variables)
    assert len(cnn.features(transfer.thaw(model, last=1)).trainable_variables) == 2


def test_maps_are_kept_by_content_and_survive_a_kill(store, borrowed, tmp_path, monkeypatch):
    monkeypatch.setenv("CXR_COURSE_CACHE", str(tmp_path))
    model = transfer.build("compact", (32, 32, 1), weights=borrowed[1])
    maps = transfer.extract(model, store, shard=16)
    files = sorted((tmp_path / "maps").glob("*/*.npy"))
    assert len(files) == 3 and maps.shape == (40, 128)
    stamp = files[0].stat().st_mtime_ns
    files[2].unlink()                                                                  # as a kill after two shards leaves it
    assert np.array_equal(transfer.extract(model, store, shard=16), maps) and files[0].stat().st_mtime_ns == stamp
    assert transfer.extract(model, store, pool=False).shape[1:] == cnn.features(model).output_shape[1:]
    other = transfer.build("compact", (32, 32, 1), seed=5)
    assert not np.array_equal(transfer.extract(other, store), maps)


def test_two_stages_and_resuming(store, borrowed, tmp_path):
    options = dict(weights=borrowed[1], epochs=2, batch=8, seed=2, deterministic=True)
    whole = transfer.train("compact", store, tmp_path / "whole", **options)
    assert [s["stage"] for s in whole.card["about"]["stages"]] == ["head on frozen maps", "fine-tuning"]
    assert whole.card["model"]["spec"]["sha256"] == core.sha256(borrowed[1]) and set(whole.card["training"]["rates"]) == {"0.1", "1"}
    def plug(row):
        if row["epoch"] == 1: raise InterruptedError
    with pytest.raises(InterruptedError): transfer.train("compact", store, tmp_path / "cut", each=plug, **options)
    again = transfer.train("compact", store, tmp_path / "cut", resume=True, **options)
    assert again.history["val_loss"].equals(whole.history["val_loss"]) and again.card["about"] == whole.card["about"]
    scratch = transfer.train("compact", store, tmp_path / "scratch", weights="none", epochs=1)
    assert scratch.card["about"]["stages"] == [dict(stage="everything from scratch")] and scratch.card["training"]["rates"] is None


def test_few_films_of_whole_patients(store):
    part = transfer.few(store.frame, 12, seed=1)
    assert (part["split"] != "test").sum() == 12 and (part["split"] == "test").sum() == (store.frame["split"] == "test").sum()
    assert set(part["split"]) == {"train", "val", "test"}
    with pytest.raises(CourseError, match="not 100 images"): transfer.few(store.frame, 100)
