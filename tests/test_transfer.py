"""Pretrained networks: the right pixels, the right weights or a reason, and nothing changes while frozen."""
import numpy as np
import pytest

import keras
from PIL import Image

from cxr_course.core import CourseError, rng, sha256
from cxr_course.data.building import build_store
from cxr_course.frame import make_frame
from cxr_course.models.backbone_facts import BACKBONES, rescale_layer
from cxr_course.models.backbones import head_params
from cxr_course.models.cnn import classifier_head, feature_extractor
from cxr_course.models.inspect import feature_maps
from cxr_course.models.pretrained import WeightsUnavailable, _settle, imagenet_file, load_weights
from cxr_course.models.weights import load_model
from cxr_course.training.backbones import build_backbone
from cxr_course.training.frozen import extract_features, freeze
from cxr_course.training.transfer import layer_learning_rates, subsample_patients, train_backbone, unfreeze

FAMILY = {"densenet121": "densenet", "efficientnetb0": "efficientnet", "mobilenetv2": "mobilenet_v2"}
LIGHT = ("vgg16", "mobilenetv2", "compact")                 # quick to build


def films(n=4, side=32): return rng("borrowed", n).uniform(size=(n, side, side, 1)).astype("float32")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    "Forty noisy pictures of twenty patients; the sick ones have a bright corner."
    folder, rows, draw = tmp_path_factory.mktemp("films"), [], rng("test films")
    for i in range(40):
        sick, split = i % 4 < 2, ("train", "train", "train", "val", "test")[i // 2 % 5]
        picture = draw.uniform(0, .6, (32, 32))
        if sick: picture[4:14, 4:14] += .3
        Image.fromarray((picture * 255).astype("uint8")).save(folder / f"{i}.png")
        rows.append(dict(path=str(folder / f"{i}.png"), patient=f"0{i // 2}", split=split, label="ILL" if sick
                         else "WELL"))
    return build_store(make_frame(rows, labels=["WELL", "ILL"]), (32, 32), folder=folder / "store")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    "A compact network that stands for one trained elsewhere."
    folder = tmp_path_factory.mktemp("weights")
    model = build_backbone("compact", (32, 32, 1), outputs=3, seed=7)
    model.save(folder / "eyes.keras")
    return model, folder / "eyes.keras"


def test_counts_of_systems_b_and_c():
    maps = feature_extractor(build_backbone("vgg16", (224, 224, 1), head="mean")).output_shape[1:]
    assert maps == (7, 7, 512) and head_params("flatten", maps) == 107_157_601
    model = freeze(build_backbone("vgg16", (32, 32, 1), head="flatten"))
    count = lambda weights: sum(int(np.prod(w.shape)) for w in weights)
    # the two are dropout's dice
    assert count(model.non_trainable_variables) - 2 == 14_714_688
    assert count(model.trainable_variables) == head_params("flatten", (1, 1, 512))
    assert [layer.name for layer in classifier_head(model).layers] == [
        "flatten", "dense1", "dense2", "drop", "logits",
    ] and classifier_head(model).get_layer("drop").rate == 0.2
    assert build_backbone("densenet121", (32, 32, 1), outputs=14).count_params() == 7_051_854


@pytest.mark.parametrize("name", LIGHT)
def test_contract_and_seed(name, tmp_path):
    x, model = films(), build_backbone(name, (32, 32, 1), outputs=2, seed=3)
    out = np.asarray(model(x))
    assert np.array_equal(classifier_head(model)(feature_extractor(model)(x)), out) and out.shape == (4, 2)
    assert np.array_equal(build_backbone(name, (32, 32, 1), outputs=2, seed=3)(x),
                          out) and not np.array_equal(build_backbone(name, (32, 32, 1), outputs=2, seed=4)(x),
                                                      out)
    model.save(tmp_path / "model.keras")
    assert np.array_equal(load_model(tmp_path / "model.keras")(x), out)
    assert len(feature_maps(model, x[0])) > 5


@pytest.mark.parametrize("name", [n for n, b in BACKBONES.items() if b.application])
def test_pixels_as_the_family_wants_them(name):
    x = films()
    wanted = getattr(keras.applications, FAMILY.get(name, name)).preprocess_input(np.repeat(x, 3, -1) * 255)
    assert np.allclose(rescale_layer(x, BACKBONES[name].scaling), wanted, atol=1e-4)


def test_efficientnet_divides_by_deviations():
    "Its file keeps deviations where variances belong; Keras mends that with a layer that we do not have."
    look = feature_extractor(build_backbone("efficientnetb0", (32, 32, 1)))
    layer = next(layer for layer in look.layers if isinstance(layer, keras.layers.Normalization))
    mean, std = np.array([.485, .456, .406]), np.array([.229, .224, .225])
    layer.adapt_mean.assign(mean.reshape(layer.adapt_mean.shape))
    layer.adapt_variance.assign(std.reshape(layer.adapt_variance.shape))
    _settle(look)
    _settle(look)                                                             # twice is as once
    x = films()
    assert np.allclose(keras.Model(look.inputs, layer.output)([x]), (np.repeat(x, 3, -1) - mean) / std,
                       atol=1e-3)


def test_every_kind_of_file(tmp_path):
    x, model = films(), build_backbone("mobilenetv2", (32, 32, 1), seed=1)
    look = feature_extractor(model)
    model.save(tmp_path / "whole.keras")
    model.save_weights(tmp_path / "whole.weights.h5")
    look.save_weights(tmp_path / "part.weights.h5")
    look.save(tmp_path / "old.h5")
    # a whole network of Keras, of another size, with a top
    top = keras.applications.MobileNetV2(weights=None, classes=3)
    for mine, theirs in zip([w for layer in look.layers for w in layer.weights], top.weights):
        theirs.assign(mine)
    top.save(tmp_path / "top.h5")
    keras.Sequential([keras.Input((32, 32, 3)), keras.Model(look.get_layer("Conv1").input, look.output),
                      keras.layers.GlobalAveragePooling2D(),
                      keras.layers.Dense(1)]).save(tmp_path / "nested.h5")
    other = build_backbone("mobilenetv2", (32, 32, 1), weights=tmp_path / "old.h5", seed=2)
    assert (
        other.spec.weights == "file"
        and other.spec.sha256 == sha256(tmp_path / "old.h5")
        and np.allclose(feature_extractor(other)(x), look(x), atol=1e-6)
    )
    for file in ("whole.keras", "whole.weights.h5", "part.weights.h5", "top.h5", "nested.h5"):
        for w in feature_extractor(other).weights: w.assign(w + 1)
        load_weights(feature_extractor(other), tmp_path / file)
        assert np.allclose(feature_extractor(other)(x), look(x), atol=1e-6), file


def test_wrong_files_are_refused_with_the_reason(tmp_path, pretrained):
    other = build_backbone("mobilenetv2", (32, 32, 1))
    other.save_weights(tmp_path / "good.weights.h5")
    feature_extractor(other).save(tmp_path / "other.h5")
    (tmp_path / "page.h5").write_text("\n <!DOCTYPE html><title>Sign in</title>")
    (tmp_path / "pointer.h5").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")
    (tmp_path / "half.weights.h5").write_bytes((tmp_path / "good.weights.h5").read_bytes()[:200_000])
    (tmp_path / "half.keras").write_bytes(pretrained[1].read_bytes()[:20_000])
    (tmp_path / "empty.h5").touch()
    (tmp_path / "text.h5").write_text("no weights here")
    keras.Sequential([keras.Input((32, 32, 1)),
                      keras.layers.Lambda(lambda x: x + 1)]).save(tmp_path / "code.keras")
    reasons = {"page.h5": "web page", "pointer.h5": "Git LFS", "half.weights.h5": "cut off",
               "half.keras": "damaged", "empty.h5": "empty", "text.h5": "neither HDF5",
               "code.keras": "Python code", "good.weights.h5": "another architecture",
               "other.h5": "another architecture"}
    for name, reason in reasons.items():
        with pytest.raises(CourseError, match=reason):
            build_backbone("compact", (32, 32, 1), weights=tmp_path / name)
        # a wrong file never falls back
        with pytest.raises(CourseError, match=reason):
            build_backbone("compact", (32, 32, 1), weights=tmp_path / name, fallback="none")
    with pytest.raises(CourseError, match="another architecture: layer 1"):
        build_backbone("vgg16", (32, 32, 1), weights=pretrained[1])


def test_without_a_network_only_on_request(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("CXR_COURSE_CACHE", str(tmp_path / "cache"))
    def cut(*args, **options): raise Exception("URL fetch failure: no route")       # as Keras says it
    monkeypatch.setattr(keras.utils, "get_file", cut)
    with pytest.raises(WeightsUnavailable, match="cannot be fetched"):
        build_backbone("vgg16", (32, 32, 1), weights="imagenet")
    with pytest.raises(WeightsUnavailable, match="no such file"):
        build_backbone("compact", (32, 32, 1), weights=tmp_path / "absent.h5")
    model = build_backbone("compact", (32, 32, 1), weights=tmp_path / "absent.h5", fallback="none")
    assert (
        model.spec.weights == "none"
        and "absent.h5" in model.spec.note
        and "took none" in capsys.readouterr().out
    )
    assert imagenet_file("vgg16", download=False) is None
    def wrong(*args, **options): raise ValueError("hash")
    monkeypatch.setattr(keras.utils, "get_file", wrong)
    with pytest.raises(CourseError, match="another fingerprint"):
        build_backbone("vgg16", (32, 32, 1), weights="imagenet", fallback="none")


def test_frozen_means_frozen(pretrained):
    model = freeze(build_backbone("compact", (32, 32, 1), weights=pretrained[1]))
    before = [w.numpy() for w in feature_extractor(model).weights]
    for i in range(3): model(films(8) + i, training=True)
    assert all(np.array_equal(a, w) for a, w in zip(before, feature_extractor(model).weights))
    unfreeze(model)
    for i in range(3): model(films(8) + i, training=True)
    # batch normalisation stays
    assert all(np.array_equal(a, w) for a, w in zip(before, feature_extractor(model).weights))
    assert len(layer_learning_rates(model)) == len(model.trainable_variables)
    assert len(feature_extractor(unfreeze(model, last=1)).trainable_variables) == 2


def test_maps_are_kept_by_content_and_survive_a_kill(store, pretrained, tmp_path, monkeypatch):
    monkeypatch.setenv("CXR_COURSE_CACHE", str(tmp_path))
    model = build_backbone("compact", (32, 32, 1), weights=pretrained[1])
    maps = extract_features(model, store, shard=16)
    files = sorted((tmp_path / "maps").glob("*/*.npy"))
    assert len(files) == 3 and maps.shape == (40, 128)
    stamp = files[0].stat().st_mtime_ns
    # as a kill after two shards leaves it
    files[2].unlink()
    assert np.array_equal(extract_features(model, store, shard=16),
                          maps) and files[0].stat().st_mtime_ns == stamp
    assert extract_features(model, store, pool=False).shape[1:] == feature_extractor(model).output_shape[1:]
    other = build_backbone("compact", (32, 32, 1), seed=5)
    assert not np.array_equal(extract_features(other, store), maps)


def test_two_stages_and_resuming(store, pretrained, tmp_path):
    options = dict(weights=pretrained[1], epochs=2, batch=8, seed=2, deterministic=True)
    whole = train_backbone("compact", store, tmp_path / "whole", **options)
    assert [s["stage"] for s in whole.card["about"]["stages"]] == ["head on frozen maps", "fine-tuning"]
    assert whole.card["model"]["spec"]["sha256"] == sha256(pretrained[1]) and set(
        whole.card["training"]["rates"]
    ) == {"0.1", "1"}
    def plug(row):
        if row["epoch"] == 1: raise InterruptedError
    with pytest.raises(InterruptedError):
        train_backbone("compact", store, tmp_path / "cut", each=plug, **options)
    again = train_backbone("compact", store, tmp_path / "cut", resume=True, **options)
    assert (
        again.history["val_loss"].equals(whole.history["val_loss"])
        and again.card["about"] == whole.card["about"]
    )
    scratch = train_backbone("compact", store, tmp_path / "scratch", weights="none", epochs=1)
    assert (
        scratch.card["about"]["stages"] == [dict(stage="everything from scratch")]
        and scratch.card["training"]["rates"] is None
    )


def test_few_films_of_whole_patients(store):
    part = subsample_patients(store.frame, 12, seed=1)
    assert (part["split"] != "test").sum() == 12 and (part["split"] == "test").sum() == (
        store.frame["split"] == "test"
    ).sum()
    assert set(part["split"]) == {"train", "val", "test"}
    with pytest.raises(CourseError, match="not 100 images"): subsample_patients(store.frame, 100)
