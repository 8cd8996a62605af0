"""Networks: the published counts, the contract, and what must be refused."""
from dataclasses import replace

import keras
import numpy as np
import pytest

from cxr_course.core import CourseError
from cxr_course.models.cnn import (
    CNNSpec, CNN_SPECS, build_cnn, classifier_head, feature_extractor, layer_table, probabilities,
)
from cxr_course.models.convolution import conv2d, max_pool
from cxr_course.models.inspect import describe, feature_maps, receptive_field
from cxr_course.models.mlp import MLP_SPECS, build_mlp

array = keras.ops.convert_to_numpy
PUBLISHED = [("smallnet", (224, 224, 3), 1, 11_132_033), ("cnn", (180, 180, 1), 2, 3_300_482),
             ("a5", (129, 180, 1), 3, 1_175_203)]


@pytest.mark.parametrize("name, shape, outputs, count", PUBLISHED)
def test_published_parameter_counts(name, shape, outputs, count):
    assert build_cnn(name, shape,
                     outputs).count_params() == count == layer_table(name, shape, outputs)["parameters"].sum()


def test_smallnet_layer_by_layer():
    table = layer_table("smallnet", (224, 224, 3)).query("parameters > 0")
    assert table["parameters"].tolist() == [896, 18_496, 36_928, 11_075_648, 65]
    assert table["size"].iloc[2] == "52 x 52 x 64"


@pytest.mark.parametrize("name", CNN_SPECS)
def test_every_named_model_keeps_the_contract(name):
    model = build_cnn(name, (96, 96, 1), 3, seed=1)
    x = np.random.default_rng(0).uniform(size=(2, 96, 96, 1)).astype("float32")
    assert array(classifier_head(model)(feature_extractor(model)(x)) == model(x)).all() and model(
        x
    ).shape == (2, 3)
    assert model.count_params() == layer_table(name, (96, 96, 1), 3)["parameters"].sum()
    assert len(feature_extractor(model).output_shape) == 4


@pytest.mark.parametrize("name", ["smallnet", "separable", "a5"])
def test_a_saved_model_is_the_same_model(name, tmp_path):
    model = build_cnn(name, (64, 64, 1), 1, seed=2)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    x = np.random.default_rng(0).uniform(size=(2, 64, 64, 1)).astype("float32")
    assert (
        array(again(x) == model(x)).all()
        and array(classifier_head(again)(feature_extractor(again)(x)) == model(x)).all()
    )
    assert describe(again) == CNN_SPECS[name] and not hasattr(model, "spec")


KERNELS = CNNSpec((8, 16, 12), (10, 6), kernel=(3, 5, 5), dropout=.2)
OTHERS = [KERNELS, CNNSpec((8, 16), (), kernel=5, padding="same", stride=2, pool_every=2, head="gap",
                           separable=True, norm=True, l2=0.01, init="he_normal", rescale=None),
          CNNSpec((4,), last_pool=False)]


@pytest.mark.parametrize("spec", OTHERS)
def test_a_description_of_ones_own_is_built_counted_and_read_back(spec, tmp_path):
    model = build_cnn(spec, (64, 48, 1), 3)
    assert model.count_params() == layer_table(spec, (64, 48, 1), 3)["parameters"].sum()
    model.save(tmp_path / "model.keras")
    found = describe(keras.saving.load_model(tmp_path / "model.keras"))
    assert found.kernels == spec.kernels and (found == spec or found == replace(spec, pool_every=2))


def test_a_model_that_was_changed_or_made_elsewhere_has_no_description():
    model = build_cnn("smallnet", (64, 64, 1))
    mlp_model = build_mlp("mlp_d2", (12, 10, 1))
    assert describe(mlp_model) == MLP_SPECS["mlp_d2"]
    feature_extractor(model).get_layer("conv2").strides = (2, 2)
    assert describe(model) is None
    assert describe(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])) is None


def test_a_kernel_for_each_convolution():
    assert [layer.kernel_size for layer in feature_extractor(build_cnn(KERNELS, (64, 64, 1))).layers
            if layer.name.startswith("conv")] == [(3, 3), (5, 5), (5, 5)]
    assert receptive_field(KERNELS) == (1 + 2 + 1 + 4 * 2 + 2 + 4 * 4, 4)
    with pytest.raises(CourseError, match="2 kernels for 3"):
        build_cnn(replace(KERNELS, kernel=(3, 5)), (64, 64, 1))


def test_activations_are_asked_for_as_keras_wants_it(recwarn):
    maps = feature_maps(build_cnn("smallnet", (64, 64, 1)), np.zeros((64, 64)))
    assert list(maps) == ["rescale", "conv1", "pool1", "conv2", "pool2", "conv3"]
    assert not [w for w in recwarn if "structure of `inputs`" in str(w.message)]


WAYS = [("valid", 3, 1), ("valid", 3, 2), ("valid", 5, 3), ("same", 3, 1), ("same", 5, 1)]


@pytest.mark.parametrize("padding, kernel, stride", WAYS)
def test_numpy_convolution_equals_keras(padding, kernel, stride):
    x = np.random.default_rng(kernel).normal(size=(15, 12, 3)).astype("float32")
    layer = keras.layers.Conv2D(4, kernel, strides=stride, padding=padding)
    theirs = array(layer(x[None]))[0]
    ours = conv2d(x, *layer.get_weights(), stride=stride, pad=kernel // 2 if padding == "same" else 0)
    assert ours.shape == theirs.shape and np.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("shape", [(12, 15, 2), (7, 7, 1), (2, 3, 4)])
def test_numpy_pooling_equals_keras(shape):
    x = np.random.default_rng(1).normal(size=shape).astype("float32")
    assert np.array_equal(max_pool(x), array(keras.layers.MaxPooling2D(2)(x[None]))[0])


def test_same_seed_same_weights_whatever_came_before():
    first = build_cnn("separable", (64, 64, 1), seed=5).get_weights()
    build_cnn("smallnet", (64, 64, 1), seed=9)
    assert all(np.array_equal(a, b) for a,
               b in zip(first, build_cnn("separable", (64, 64, 1), seed=5).get_weights()))


def test_probabilities():
    assert np.allclose(probabilities(np.array([[1000.], [-1000.]])), [[0, 1], [1, 0]])
    assert np.allclose(probabilities(np.zeros((1, 4))), .25)
    assert np.allclose(probabilities(np.zeros((1, 4)), findings=True), .5)
    assert probabilities(np.zeros(3)).shape == (3, 2)


def test_refusals():
    with pytest.raises(CourseError, match="smallnet, cnn, wide"): build_cnn("resnet")
    with pytest.raises(CourseError, match="too small"): build_cnn("a1", (28, 28, 1))
    with pytest.raises(CourseError, match="no part"):
        classifier_head(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]))
