"""A network from elsewhere gives the same probabilities behind the contract, or is refused in words."""
import numpy as np
import pytest

keras = pytest.importorskip("keras")
from cxr_course.core import CourseError, rng
from cxr_course.data.building import build_store
from cxr_course.data.loading import load_dataset
from cxr_course.data.pipeline import Normalizer
from cxr_course.data.splits import hold_out
from cxr_course.deploy.wrap import wrap
from cxr_course.evaluation.breakdown import evaluate
from cxr_course.explain.maps import explain
from cxr_course.explain.panels import explanation_panel
from cxr_course.explain.sanity import cascading_randomization
from cxr_course.explain.targets import class_logit
from cxr_course.frame import Task
from cxr_course.models.cnn import build_cnn, feature_extractor, probabilities
from cxr_course.models.weights import check_weight_file, load_any_model, load_model
from cxr_course.training.scores import predict_split

L = keras.layers


def images(n=3, shape=(32, 32), seed=0):
    return rng("wrap", seed).random((n, *shape)).astype("float32")


def body(x, name="last_maps"):
    x = L.MaxPooling2D()(L.Conv2D(4, 3, activation="relu")(x))
    return L.MaxPooling2D()(L.Conv2D(6, 3, activation="relu", name=name)(x))


def functional(units, activation, channels=3, **dense):
    x = keras.Input((32, 32, channels))
    return keras.Model(x, L.Dense(units, activation=activation, **dense)(L.Flatten()(body(x))))


def sequential(units, activation):
    return keras.Sequential([keras.Input((32, 32, 1)), L.Conv2D(4, 3, activation="relu"),
                             L.Conv2D(4, 3, name="last_maps"), L.BatchNormalization(name="norm"),
                             L.ReLU(name="relu"), L.GlobalAveragePooling2D(), L.Dropout(0.3),
                             L.Dense(units, activation=activation)])


def apart(units, activation):
    "The activation is a layer of its own, and another layer follows it."
    x = keras.Input((32, 32, 1))
    z = L.Dense(units)(L.GlobalAveragePooling2D()(body(x)))
    return keras.Model(x, L.Reshape((units,))(L.Dropout(.1)(L.Activation(activation)(z))))


def operation(units, activation):
    x = keras.Input((32, 32, 1))
    return keras.Model(x, getattr(keras.ops, activation)(L.Dense(units)(L.Flatten()(body(x)))))


def nested(units, activation):
    x, inner = keras.Input((32, 32, 3)), keras.Input((None, None, 3))
    backbone = keras.Model(inner, body(inner), name="backbone")
    head = keras.Sequential([keras.Input((6, 6, 6)), L.GlobalAveragePooling2D(),
                             L.Dense(units, activation=activation)])
    return keras.Sequential([keras.Input((32, 32, 3)),
                             keras.Model(x, head(backbone(L.Rescaling(2.0)(x), training=False)))])


MODELS = (functional, sequential, apart, operation, nested)


def agrees(original, wrapped, x, seen=None):
    "Probabilities of both on the same images; `seen` is what the original was used to."
    y = np.asarray(original(np.repeat(x[..., None], original.input_shape[-1], -1) if seen is None else seen,
                            training=False))
    findings = y.shape[1] > 1 and not np.allclose(y.sum(1), 1)
    p = probabilities(wrapped(x[..., None], training=False), findings)
    return np.abs((p[:, 1:] if y.shape[1] == 1 else p) - y).max()


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("units, activation",
                         [(1, "sigmoid"), (2, "softmax"), (3, "softmax"), (4, "sigmoid")])
def test_the_probabilities_are_those_of_the_original(make, units, activation, tmp_path):
    original, x = make(units, activation), images()
    before = original.get_weights()
    wrapped = wrap(original)
    assert wrapped.input_shape == (None, 32, 32, 1) and wrapped.output_shape == (None, units)
    assert agrees(original, wrapped, x) < 1e-6 and np.ptp(np.asarray(wrapped(x[..., None]))) > 1e-4
    wrapped.save(tmp_path / "m.keras")
    assert np.allclose(load_model(tmp_path / "m.keras")(x[..., None]), wrapped(x[..., None]), atol=1e-6)
    assert all((a == b).all() for a, b in zip(before, original.get_weights()))
    heat = explain(wrapped, x)
    assert heat.shape == x.shape and 0 <= heat.min() <= heat.max() <= 1


@pytest.mark.parametrize("how, family", [("imagenet-caffe", "vgg16"), ("imagenet-torch", "densenet"),
                                         ("tf", "mobilenet_v2"), ("255", None), ("unit", None)])
def test_preprocessing_is_that_of_the_family(how, family):
    original, x = functional(3, "softmax"), images()
    colour = np.repeat(x[..., None], 3, -1)
    seen = (
        colour
        if how == "unit"
        else (
            colour * 255
            if family is None
            else getattr(keras.applications, family).preprocess_input(colour * 255)
        )
    )
    assert agrees(original, wrap(original, preprocessing=how), x, seen) < 1e-6


def test_preprocessing_as_a_layer():
    original, x = functional(1, "sigmoid", channels=1), images()
    layer = Normalizer("fixed", .4, .2).layer()
    assert agrees(original, wrap(original, preprocessing=layer), x, (x[..., None] - .4) / .2) < 1e-6
    for odd, words in (
        (lambda v: v / 2, "plain function"), ("zscore", "not a choice"), ("imagenet-caffe", "three channels"),
    ):
        with pytest.raises(CourseError, match=words):
            wrap(original, preprocessing=odd)


def test_the_layer_to_explain(capsys):
    for make, expected in ((functional, "last_maps"), (sequential, "relu"), (nested, "last_maps")):
        wrapped = wrap(make(2, "softmax"))
        assert (
            feature_extractor(wrapped).layers[-1].name == expected
            and f"'{expected}'" in capsys.readouterr().out
        )
    wrapped = wrap(sequential(1, "sigmoid"), layer="last_maps")
    assert (
        feature_extractor(wrapped).layers[-1].name == "last_maps"
        and agrees(sequential(1, "sigmoid"), wrapped, images()) >= 0
    )
    with pytest.raises(CourseError, match="no layer 'nowhere'") as error:
        wrap(sequential(1, "sigmoid"), layer="nowhere")
    assert "last_maps" in str(error.value)


def test_heat_maps_are_those_of_a_network_built_here():
    "A network of ours, flattened into one model with a sigmoid and wrapped again, is explained alike."
    ours, x = build_cnn("separable", (32, 32, 1)), images()
    flat = keras.Model(ours.inputs[0], L.Activation("sigmoid")(ours.outputs[0]))
    name = feature_extractor(ours).layers[-1].name
    wrapped = wrap(flat, layer=name)
    for method in ("gradcam", "gradcam++", "hirescam", "occlusion"):
        assert np.allclose(explain(ours, x, method=method), explain(wrapped, x, method=method),
                           atol=1e-5), method


def test_cam_takes_a_wrapped_mean_head():
    wrapped = wrap(sequential(2, "softmax"))
    a, b = (explain(wrapped, images(), class_logit(1), m) for m in ("cam", "gradcam"))
    assert np.allclose(a, b, atol=1e-4)      # of maps between 0 and 1; float32 leaves 1.5e-5 for some weights
    assert [name for name, _ in cascading_randomization(wrapped)][0] == "logits"


def test_a_skip_connection_is_cut_where_the_paths_meet():
    x = keras.Input((32, 32, 1))
    a = L.Conv2D(4, 3, padding="same", name="before")(x)
    b = L.Conv2D(4, 3, padding="same", name="beside")(a)
    model = keras.Model(
        x, L.Dense(1, activation="sigmoid")(L.GlobalAveragePooling2D()(L.Add(name="meet")([a, b])))
    )
    assert (
        feature_extractor(wrap(model)).layers[-1].name == "meet"
        and agrees(model, wrap(model), images()) < 1e-6
    )
    with pytest.raises(CourseError, match="cannot be cut here"):
        wrap(model, layer="beside")
    assert agrees(model, wrap(model, layer="before"), images()) < 1e-6


def test_two_layers_of_one_name():
    inner = keras.Sequential([keras.Input((32, 32, 1)), L.Conv2D(4, 3, name="conv")])
    model = keras.Sequential([keras.Input((32, 32, 1)), inner, L.Conv2D(4, 3, name="conv"), L.Flatten(),
                              L.Dense(1, activation="sigmoid", name="logits")])
    assert agrees(model, wrap(model), images()) < 1e-6


def test_logits_said_and_seen():
    plain = functional(2, None)
    assert np.allclose(wrap(plain, logits=True)(images()[..., None]), wrap(plain)(images()[..., None]))
    for odd in ("tanh", lambda v: v):
        with pytest.raises(CourseError, match="does not say whether it gives logits"):
            wrap(functional(1, odd))
    assert wrap(functional(1, "tanh"), logits=True).output_shape == (None, 1)
    with pytest.raises(CourseError, match="no probabilities"):
        wrap(functional(2, None, kernel_initializer="ones"), logits=False)
    with pytest.raises(CourseError, match="always gives 1"):
        wrap(functional(1, "softmax"))


@pytest.mark.parametrize("units, activation", [(1, "sigmoid"), (3, "softmax"), (3, "sigmoid")])
def test_probabilities_said_become_logits(units, activation, tmp_path):
    x = keras.Input((32, 32, 1))
    heads = [L.Dense(units, activation=activation)(L.Flatten()(body(x, f"maps{i}"))) for i in range(2)]
    joined = L.Conv2D(4, 3, padding="same")(x)
    both = L.Average()([L.Dense(units, activation=activation)(L.Flatten()(joined)),
                        L.Dense(units, activation=activation)(L.GlobalAveragePooling2D()(joined))])
    for model in (keras.Model(x, L.Average()(heads)), keras.Model(x, both)):
        with pytest.raises(CourseError, match="logits=False"):
            wrap(model)
    wrapped = wrap(keras.Model(x, both), logits=False)
    assert agrees(keras.Model(x, both), wrapped, images()) < 1e-6
    wrapped.save(tmp_path / "m.keras")
    assert np.allclose(load_model(tmp_path / "m.keras")(images()[..., None]), wrapped(images()[..., None]),
                       atol=1e-6)
    with pytest.raises(CourseError, match="cannot be cut here"):
        wrap(keras.Model(x, L.Average()(heads)), logits=False, layer="maps0")


def test_sizes_and_channels():
    any_size = keras.Sequential([keras.Input((None, None, 3)), L.Conv2D(4, 3), L.GlobalAveragePooling2D(),
                                 L.Dense(1, activation="sigmoid")])
    with pytest.raises(CourseError, match="any size"):
        wrap(any_size)
    assert wrap(any_size, shape=(40, 36)).input_shape == (None, 40, 36, 1)
    unbuilt = keras.Sequential([L.Conv2D(4, 3), L.Flatten(), L.Dense(1, activation="sigmoid")])
    with pytest.raises(CourseError, match="never seen an image"):
        wrap(unbuilt)
    assert wrap(unbuilt, shape=(20, 16), channels=3).input_shape == (None, 20, 16, 1)
    for options, words in (
        (dict(shape=(64, 64)), "not 64 x 64"), (dict(channels=1), "not 1"),
        (dict(labels=["a", "b", "c"]), "1 outputs for 3 labels"),
    ):
        with pytest.raises(CourseError, match=words):
            wrap(functional(1, "sigmoid"), **options)


class Own(keras.layers.Layer):
    def call(self, x): return x * 2


class Class(keras.Model):
    def __init__(self):
        super().__init__()
        self.d = L.Dense(1)

    def call(self, x): return self.d(x)


def test_what_cannot_be_wrapped_is_said():
    x, y = keras.Input((32, 32, 1)), keras.Input((32, 32, 1))
    flat = lambda t, **k: L.Dense(2, **k)(L.Flatten()(t))
    conv = L.Conv2D(4, 3)
    odd = {
        "2 inputs": keras.Model([x, y], flat(L.Add()([x, y]))),
        "2 outputs": keras.Model(x, [flat(x), flat(x)]),
        "no images": keras.Sequential([keras.Input((5,)), L.Dense(1)]),
        "no row of numbers": keras.Sequential([keras.Input((8, 8, 1)), conv]),
        "code of its own": keras.Model(x, flat(conv(Own()(x)))),
        "'lambda' (Lambda)": keras.Model(x, flat(conv(L.Lambda(lambda v: v, name="lambda")(x)))),
        "class of its own": Class(),
        "no Keras model": "x" and np.zeros(3),
        "no layer of the model gives feature maps": keras.Model(x, flat(x)),
        "code that does not travel": keras.Model(x, flat(L.Conv2D(4, 3, activation=lambda v: v)(x))),
        "7 channels": keras.Sequential([keras.Input((8, 8, 7)), L.Conv2D(2, 3), L.Flatten(), L.Dense(1)]),
    }
    for words, model in odd.items():
        with pytest.raises(CourseError) as error:
            wrap(model)
        assert words in str(error.value) and "What to do" in str(error.value), words


@pytest.mark.parametrize("name", ["m.keras", "m.h5"])
def test_a_whole_model_from_a_file(name, tmp_path):
    original = nested(3, "softmax")
    original.save(tmp_path / name)
    assert agrees(original, wrap(tmp_path / name), images()) < 1e-6
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:len(whole) // 2])
    with pytest.raises(CourseError, match="damaged or cut off"):
        wrap(tmp_path / name)
    stranger = keras.Sequential([keras.Input((8, 8, 1)), L.Lambda(lambda v: v), L.Flatten(), L.Dense(1)])
    stranger.save(tmp_path / f"stranger-{name}")
    with pytest.raises(CourseError, match="Python code"):
        wrap(tmp_path / f"stranger-{name}")


@pytest.mark.parametrize("name", ["w.weights.h5", "w.h5", "w.keras"])
def test_architecture_and_weights(name, tmp_path):
    trained, fresh = functional(3, "softmax"), functional(3, "softmax")
    (trained.save_weights if name == "w.weights.h5" else trained.save)(tmp_path / name)
    assert agrees(trained, wrap(fresh, weights=tmp_path / name), images()) < 1e-6
    with pytest.raises(CourseError, match="another architecture"):
        wrap(functional(4, "softmax"), weights=tmp_path / name)


def test_files_that_are_no_weights(tmp_path):
    model = functional(1, "sigmoid")
    model.save_weights(tmp_path / "good.weights.h5")
    good = (tmp_path / "good.weights.h5").read_bytes()
    bad = {"web page": b"<!DOCTYPE html><title>Sign in</title>",
           "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "empty": b"",
           "neither HDF5": b"\x80\x02}q\x00.", "cut off": good[: len(good) // 2],
           "damaged": b"PK\x03\x04 nothing"}
    for words, content in bad.items():
        (tmp_path / "bad.weights.h5").write_bytes(content)
        for call in (lambda f: wrap(model, weights=f), load_any_model):
            with pytest.raises(CourseError, match=words):
                call(tmp_path / "bad.weights.h5")
    with pytest.raises(CourseError, match="no such file"):
        wrap(model, weights=tmp_path / "nowhere.h5")
    with pytest.raises(CourseError, match="no architecture"):
        wrap(tmp_path / "good.weights.h5")
    assert check_weight_file(tmp_path / "good.weights.h5") == tmp_path / "good.weights.h5"


def test_system_b_loads_evaluates_and_explains_fourteen_findings(tmp_path):
    "DenseNet121 with its mean and its fourteen sigmoids, weights from an .h5 file."
    def densenet():
        base = keras.applications.DenseNet121(weights=None, include_top=False, input_shape=(64, 64, 3),
                                              pooling="avg")
        return keras.Model(base.input, L.Dense(14, activation="sigmoid")(base.output))
    frame = hold_out(load_dataset("sample-nih", unknown="image"), .3)
    names = list(Task.of(frame).names)
    elsewhere, here = densenet(), densenet()
    assert len(names) == 14 and elsewhere.count_params() == 7_051_854
    elsewhere.save(tmp_path / "pretrained.h5")
    model = wrap(here, weights=tmp_path / "pretrained.h5", preprocessing="imagenet-torch", labels=names)
    store = build_store(frame, (64, 64))
    # all of them: at size tiny the test images alone show too few findings
    p = predict_split(model, store)
    seen = keras.applications.densenet.preprocess_input(np.repeat(store.array(), 3, -1) * 255)
    assert np.abs(p[[f"p_{c}"
                     for c in names]].to_numpy() - np.asarray(elsewhere(seen, training=False))).max() < 1e-5
    assert evaluate(p, .5).query("metric == 'AUC'")["value"].notna().sum() >= 4
    films = store.array()[:2, ..., 0]
    sheet = explanation_panel(model, films, p, k=4)
    assert len(sheet.axes) == 2 * 5 + 1 and sum("AUC" in ax.get_title() for ax in sheet.axes) == 8
