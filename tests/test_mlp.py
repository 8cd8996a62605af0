"""Dense networks: the published counts, the contract, and what saturation does."""
from dataclasses import replace

import keras
import numpy as np
import pytest

from cxr_course.core import CourseError, rng
from cxr_course.frame import make_frame
from cxr_course.models.inspect import describe
from cxr_course.models.mlp import (
    MLPSpec, MLP_SPECS, build_mlp, dense_params, dense_table, find_spec, hidden_activations,
    layer_gradients, read_spec,
)

array = keras.ops.convert_to_numpy
PUBLISHED = [("mlp_d1", (256, 256, 1), 1, 67_110_913), ("mlp_d2", (256, 256, 1), 1, 67_372_545),
             ("mlp", (180, 180, 1), 2, 4_147_586)]


def films(n=8, shape=(12, 10, 1)): return rng("mlp tests").random((n, *shape), dtype="float32")


@pytest.mark.parametrize("name, shape, outputs, count", PUBLISHED)
def test_published_counts_by_formula(name, shape, outputs, count):
    units = (*MLP_SPECS[name].dense, outputs)
    assert dense_table(units, int(np.prod(shape)))["parameters"].sum() == count


def test_published_counts_by_keras():
    name, shape, outputs, count = PUBLISHED[2]
    assert build_mlp(name, shape, outputs).count_params() == count


@pytest.mark.parametrize("units, inputs, count", [(1, 1, 2), (10, 784, 7850), (1024, 65_536, 67_109_888)])
def test_a_layer(units, inputs, count): assert dense_params(units, inputs) == count


@pytest.mark.parametrize("name", MLP_SPECS)
@pytest.mark.parametrize("outputs", [1, 3])
def test_every_named_network_keeps_the_contract(name, outputs):
    model, x = build_mlp(name, (12, 10, 1), outputs, seed=1), films()
    parts = {layer.name: layer for layer in model.layers}
    assert list(parts) == ["features", "head"] and model.name == name and read_spec(model) == MLP_SPECS[name]
    assert np.array_equal(array(parts["head"](parts["features"](x))),
                          array(model(x))) and model(x).shape == (8, outputs)
    assert parts["features"].output_shape == (None, 12, 10, 1)
    table = dense_table((*MLP_SPECS[name].dense, outputs), 120)
    assert model.count_params() == table["parameters"].sum() and table["layer"].iloc[-1] == "logits"


def test_logits_are_what_a_pencil_computes():
    model, x = build_mlp(MLPSpec((5,), "sigmoid", rescale=(4., -2.)), (12, 10, 1), 2), films()
    w1, b1, w2, b2 = model.get_weights()
    inside = 1 / (1 + np.exp(-((4 * x.reshape(8, -1) - 2) @ w1 + b1)))
    assert np.allclose(array(model(x)), inside @ w2 + b2, atol=1e-5)
    answers = hidden_activations(model, x)
    assert list(answers) == ["dense1", "logits"] and np.allclose(answers["dense1"], inside, atol=1e-5)


def test_same_seed_same_weights_whatever_came_before():
    one = build_mlp("mlp", (12, 10, 1), seed=4).get_weights()
    build_mlp("mlp_cured", (12, 10, 1), seed=9)
    assert all(np.array_equal(a, b) for a, b in zip(one, build_mlp("mlp", (12, 10, 1), seed=4).get_weights()))
    assert not np.array_equal(one[0], build_mlp("mlp", (12, 10, 1), seed=5).get_weights()[0])


def test_a_saved_network_is_the_same_network(tmp_path):
    spec = MLPSpec((7, 3), "sigmoid", rescale=(4., -2.), dropout=.2)
    model = build_mlp(spec, (12, 10, 1))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert np.array_equal(array(again(films())), array(model(films())))
    assert read_spec(again) == spec and not hasattr(model, "spec")
    assert [layer.name
            for layer in model.get_layer("head").layers] == ["flatten", "dense1", "drop1", "dense2", "drop2",
                                                             "logits"]


def test_gradients_are_keras_own_and_die_with_saturation():
    x, y = films(16, (40, 40, 1)), np.arange(16) % 2
    dead = MLPSpec((32,), "sigmoid", rescale=(255., 0.))
    alive = replace(dead, rescale=(1., 0.))
    pulls = {s: layer_gradients(build_mlp(s, (40, 40, 1)), x, y).set_index("layer") for s in (dead, alive)}
    assert pulls[dead].loc["dense1", "none"] > .3 > pulls[alive].loc["dense1", "none"] == 0
    model, step = build_mlp(alive, (40, 40, 1)), 1e-2
    loss = lambda: np.mean(np.logaddexp(0, z := array(model(x))[:, 0].astype(float)) - y * z)
    weights = model.get_weights()
    before = loss()
    # the last bias: its gradient is the mean error
    weights[3] = weights[3] + step
    error = np.mean(1 / (1 + np.exp(-array(model(x))[:, 0])) - y)
    model.set_weights(weights)
    assert np.isclose((loss() - before) / step, error, atol=2e-3)


def test_unknown_names_are_refused():
    with pytest.raises(CourseError, match="choose one of mlp, mlp_d1"): build_mlp("smallnet")
    assert find_spec(MLPSpec((3,)))[0] == "custom" and find_spec("mlp")[1] == MLPSpec((128,))
    assert read_spec(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])) is None


def test_the_course_trains_one(tmp_path):
    "What chapter 12 asks of a model."
    from PIL import Image

    from cxr_course.data.building import build_store
    from cxr_course.training.fit import fit
    rows = []
    for i in range(24):
        Image.fromarray((films(1, (12, 10))[0] * 100 + 100 * (i % 2)).astype(np.uint8)).save(
            tmp_path / f"{i}.png"
        )
        rows.append(dict(path=str(tmp_path / f"{i}.png"), patient=f"p{i}",
                         split=("train", "train", "val")[i // 2 % 3], label=("NORMAL", "PNEUMONIA")[i % 2]))
    store = build_store(make_frame(rows, ["NORMAL", "PNEUMONIA"]), (12, 10), tmp_path / "store")
    run = fit(build_mlp("mlp", (12, 10, 1)), store, run=tmp_path / "run", epochs=2)
    assert run.card["model"]["name"] == "mlp" and describe(run.model) == MLP_SPECS["mlp"]
