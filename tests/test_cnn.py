"""Networks: the published counts, the contract, and what must be refused."""
import numpy as np
import pytest

keras = pytest.importorskip("keras")

from cxr_course import cnn
from cxr_course.core import CourseError

array = keras.ops.convert_to_numpy
PUBLISHED = [("smallnet", (224, 224, 3), 1, 11_132_033), ("cnn", (180, 180, 1), 2, 3_300_482), ("a5", (129, 180, 1), 3, 1_175_203)]


@pytest.mark.parametrize("name, shape, outputs, count", PUBLISHED)
def test_published_parameter_counts(name, shape, outputs, count):
    assert cnn.build(name, shape, outputs).count_params() == count == cnn.arithmetic(name, shape, outputs)["parameters"].sum()


def test_smallnet_layer_by_layer():
    table = cnn.arithmetic("smallnet", (224, 224, 3)).query("parameters > 0")
    assert table["parameters"].tolist() == [896, 18_496, 36_928, 11_075_648, 65]
    assert table["size"].iloc[2] == "52 x 52 x 64"


@pytest.mark.parametrize("name", cnn.SPECS)
def test_every_named_model_keeps_the_contract(name):
    model = cnn.build(name, (96, 96, 1), 3, seed=1)
    x = np.random.default_rng(0).uniform(size=(2, 96, 96, 1)).astype("float32")
    assert array(cnn.head(model)(cnn.features(model)(x)) == model(x)).all() and model(x).shape == (2, 3)
    assert model.count_params() == cnn.arithmetic(name, (96, 96, 1), 3)["parameters"].sum()
    assert len(cnn.features(model).output_shape) == 4


@pytest.mark.parametrize("name", ["smallnet", "separable", "a5"])
def test_a_saved_model_is_the_same_model(name, tmp_path):
    model = cnn.build(name, (64, 64, 1), 1, seed=2)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    x = np.random.default_rng(0).uniform(size=(2, 64, 64, 1)).astype("float32")
    assert array(again(x) == model(x)).all() and array(cnn.head(again)(cnn.features(again)(x)) == model(x)).all()


@pytest.mark.parametrize("padding, kernel, stride", [("valid", 3, 1), ("valid", 3, 2), ("valid", 5, 3), ("same", 3, 1), ("same", 5, 1)])
def test_numpy_convolution_equals_keras(padding, kernel, stride):
    x = np.random.default_rng(kernel).normal(size=(15, 12, 3)).astype("float32")
    layer = keras.layers.Conv2D(4, kernel, strides=stride, padding=padding)
    theirs = array(layer(x[None]))[0]
    ours = cnn.conv2d(x, *layer.get_weights(), stride=stride, pad=kernel // 2 if padding == "same" else 0)
    assert ours.shape == theirs.shape and np.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("shape", [(12, 15, 2), (7, 7, 1), (2, 3, 4)])
def test_numpy_pooling_equals_keras(shape):
    x = np.random.default_rng(1).normal(size=shape).astype("float32")
    assert np.array_equal(cnn.max_pool(x), array(keras.layers.MaxPooling2D(2)(x[None]))[0])


def test_same_seed_same_weights_whatever_came_before():
    first = cnn.build("separable", (64, 64, 1), seed=5).get_weights()
    cnn.build("smallnet", (64, 64, 1), seed=9)
    assert all(np.array_equal(a, b) for a, b in zip(first, cnn.build("separable", (64, 64, 1), seed=5).get_weights()))


def test_probabilities():
    assert np.allclose(cnn.probabilities(np.array([[1000.], [-1000.]])), [[0, 1], [1, 0]])
    assert np.allclose(cnn.probabilities(np.zeros((1, 4))), .25)
    assert np.allclose(cnn.probabilities(np.zeros((1, 4)), findings=True), .5)
    assert cnn.probabilities(np.zeros(3)).shape == (3, 2)


def test_refusals():
    with pytest.raises(CourseError, match="smallnet, cnn, wide"): cnn.build("resnet")
    with pytest.raises(CourseError, match="too small"): cnn.build("a1", (28, 28, 1))
    with pytest.raises(CourseError, match="no part"): cnn.head(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]))
