"""Losses for rare findings: the expected values, the gradient by formula, unknown labels, Keras's own class
weights, probabilities that hold."""
import json

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from scipy.special import expit, log_softmax, softmax

from cxr_course.core import CourseError, rng
from cxr_course.data.building import build_store
from cxr_course.data.loading import load_dataset
from cxr_course.data.splits import hold_out, official_split
from cxr_course.evaluation.metrics import compare_models, binary_metrics, macro_auc
from cxr_course.evaluation.predictions import predictions_frame, binary_tasks
from cxr_course.evaluation.rare_findings import judge_findings, plot_finding_rocs
from cxr_course.evaluation.thresholds import choose_threshold
from cxr_course.frame import make_frame, regroup
from cxr_course.models.cnn import CNNSpec, build_cnn
from cxr_course.models.finding_weights import (
    class_weights, loss_contributions, balanced_sample, class_frequencies, weighted_loss,
    positive_negative_weights,
)
from cxr_course.models.losses import (
    SigmoidLoss, SoftmaxLoss, cross_entropy, undo_weighting, loss_for, initial_bias,
)
from cxr_course.models.weights import load_model
from cxr_course.phantom.findings import FINDINGS
from cxr_course.phantom.world import population
from cxr_course.stats.curves import auc
from cxr_course.training.fit import fit
from cxr_course.training.run import load_run


def gradient(loss, y, z):
    z = tf.Variable(np.asarray(z, "float32"))
    with tf.GradientTape() as tape: value = loss(y, z)
    return float(value), tape.gradient(value, z).numpy()


def formula(y, z, w_p, w_n, gamma):
    "Loss and gradient from the definition, with the gradient by differences in double precision."
    def value(z):
        q = np.where(y == 1, expit(z), expit(-z))
        return (
            np.nansum(
                np.where(np.isnan(y), np.nan, np.where(y == 1, w_p, w_n) * (1 - q) ** gamma * -np.log(q))
            )
            / (~np.isnan(y)).sum()
        )
    slope, step = np.zeros_like(z), 1e-6
    for i in np.ndindex(z.shape):
        up, down = z.copy(), z.copy()
        up[i] += step
        down[i] -= step
        slope[i] = (value(up) - value(down)) / (2 * step)
    return value(z), slope


def films(n=40, k=3, seed=0):
    draw = rng("test", seed)
    return np.where(draw.random((n, k)) < .15, np.nan, draw.random((n, k)) < .3), draw.normal(0, 2, (n, k))


def test_expected_figures_of_system_b():
    y = np.array([[1, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 1], [1, 0, 1]])
    p, n = class_frequencies(y)
    assert np.allclose(p, [.8, .4, .8]) and np.allclose(n, [.2, .6, .2])
    y = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 0], [1, 0, 1]])
    w_p, w_n = positive_negative_weights(class_frequencies(y)[0], even=False)
    assert w_p.tolist() == [.25, .25, .5] and w_n.tolist() == [.75, .75, .5]
    for p in (.7, .3): assert round(weighted_loss(y, np.full((4, 3), p), w_p, w_n, eps=1), 4) == -.4956
    sides = loss_contributions(y, w_p, w_n)
    assert np.allclose(sides["with it"], sides["without it"])
    assert np.allclose(loss_contributions(y, *positive_negative_weights(class_frequencies(y)[0])), .5)


def test_frequencies_and_weights_at_the_edges():
    assert np.allclose(class_frequencies([1, np.nan, 0, 0])[0], 1 / 3)
    assert np.isnan(class_frequencies([[np.nan], [np.nan]])[0]).all()
    w_p, w_n = positive_negative_weights([0., 1., np.nan, .5, .002])
    assert w_p.tolist()[:4] == [1, 1, 1, 1] and np.isclose(w_p[4], 250) and np.isfinite([w_p, w_n]).all()


@pytest.mark.parametrize("gamma", [0., .5, 1., 2., 5.])
def test_gradient_against_the_definition(gamma):
    y, z = films()
    w_p, w_n = np.array([3., 1., .2]), np.array([.5, 1., 2.])
    (value, slope), (expected, by_difference) = gradient(SigmoidLoss(w_p, w_n, gamma), y,
                                                         z), formula(y, z, w_p, w_n, gamma)
    assert np.isclose(value, expected, rtol=1e-5) and np.allclose(slope, by_difference, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("gamma", [0., 2.])
@pytest.mark.parametrize("logit", [1000., -1000., 1e4, 0.])
def test_extreme_logits_and_unknown_labels(gamma, logit):
    y = np.array([[1, 0, np.nan], [np.nan, 1, 0]])
    value, slope = gradient(SigmoidLoss(2., .5, gamma), y, np.full((2, 3), logit))
    assert (
        np.isfinite(value)
        and np.isfinite(slope).all()
        and (slope[np.isnan(y)] == 0).all()
        and (slope[~np.isnan(y)] != 0).any()
    )
    nothing, flat = gradient(SigmoidLoss(2., .5, gamma), np.full((2, 3), np.nan), np.full((2, 3), logit))
    assert nothing == 0 and (flat == 0).all()
    value, slope = gradient(SoftmaxLoss([1, 2, 3], gamma), np.array([0, 2]),
                            np.array([[logit, 0, -logit]] * 2))
    assert np.isfinite(value) and np.isfinite(slope).all()


def test_unknown_labels_change_nothing():
    y, z = films(k=2)
    y[:, 1] = np.nan
    alone = gradient(SigmoidLoss(3., 1., 2.), y[:, :1], z[:, :1])
    both = gradient(SigmoidLoss(3., 1., 2.), y, z)
    assert np.isclose(alone[0], both[0]) and np.allclose(alone[1], both[1][:, :1])
    some = np.array([0, np.nan, 1])
    assert np.isclose(gradient(SoftmaxLoss([1, 2]), some, z[:3])[0],
                      gradient(SoftmaxLoss([1, 2]), some[[0, 2]], z[[0, 2]])[0])
    assert (gradient(SoftmaxLoss([1, 2]), some, z[:3])[1][1] == 0).all()


def test_without_weights_it_is_the_usual_loss():
    y, z = films()
    assert np.isclose(gradient(SigmoidLoss(), y, z)[0], float(cross_entropy(y, z)), rtol=1e-5)
    classes = np.arange(40) % 3
    assert np.isclose(gradient(SoftmaxLoss([1, 1, 1]), classes, z)[0], float(cross_entropy(classes, z)),
                      rtol=1e-5)
    assert np.isclose(gradient(SigmoidLoss(), classes % 2, z[:, :1])[0],
                      float(cross_entropy(classes % 2, z[:, :1])), rtol=1e-5)
    binary = (classes == 0)[:, None].astype("float32")
    ours, theirs = SigmoidLoss(0.25, 0.75, 2.0), keras.losses.BinaryFocalCrossentropy(
        apply_class_balancing=True, alpha=0.25, gamma=2.0, from_logits=True
    )
    assert np.isclose(float(ours(binary, z[:, :1])), float(theirs(binary, z[:, :1].astype("float32"))),
                      rtol=1e-4)


def test_softmax_focal_against_the_definition():
    z, y, w = films()[1], np.arange(40) % 3, np.array([1., 2., 4.])
    q = softmax(z, axis=1)[np.arange(40), y]
    assert np.isclose(gradient(SoftmaxLoss(w, 2.0), y, z)[0], (w[y] * (1 - q) ** 2 * -np.log(q)).mean(),
                      rtol=1e-5)
    assert np.isclose(gradient(SoftmaxLoss(w), y, z)[0],
                      (w[y] * -log_softmax(z, axis=1)[np.arange(40), y]).mean(), rtol=1e-5)


SOME = [SigmoidLoss([1, 2, 3], .5, 2., name="mine"), SoftmaxLoss([1, 2, 3], 1.),
        SigmoidLoss([1, 2, 3], .5, true_odds=True), SoftmaxLoss([1, 2, 3], true_odds=True)]


@pytest.mark.parametrize("loss", SOME)
def test_there_and_back(loss, tmp_path):
    y, z = (films()[0] if isinstance(loss, SigmoidLoss) else np.arange(40) % 3), films()[1]
    text = json.dumps(keras.saving.serialize_keras_object(loss))
    again = keras.saving.deserialize_keras_object(json.loads(text))
    assert type(again) is type(loss) and again.name == loss.name and float(again(y, z)) == float(loss(y, z))
    model = build_cnn(CNNSpec((4,), (4,)), (16, 16, 1), 3)
    model.compile("adam", loss)
    model.save(tmp_path / "m.keras")
    # opened without the loss
    assert load_model(tmp_path / "m.keras").count_params() == model.count_params()
    assert type(keras.saving.load_model(tmp_path / "m.keras").loss) is type(loss)


@pytest.mark.parametrize("k", [2, 3])
def test_equal_to_the_class_weights_of_keras(k):
    y = np.repeat(np.arange(k), [50, 20, 10][:k])
    w = class_weights(y)
    assert np.isclose(sum(w[c] for c in y), len(y)) and np.isclose(w[0] * 50, w[1] * 20)
    def trained(loss, **settings):
        net = keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(
                    1 if k == 2 else k, kernel_initializer=keras.initializers.GlorotUniform(seed=1)
                ),
            ]
        )
        net.compile(keras.optimizers.SGD(.5), loss)
        net.fit(rng("x").normal(size=(len(y), 4)).astype("float32"), y[:, None], batch_size=len(y), epochs=3,
                verbose=0, **settings)
        return net.get_weights()
    usual = (
        keras.losses.BinaryCrossentropy(from_logits=True)
        if k == 2
        else keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    for theirs, ours in zip(
        trained(usual, class_weight=w), trained((SigmoidLoss if k == 2 else SoftmaxLoss).from_labels(y))
    ):
        assert np.allclose(theirs, ours, atol=1e-5)


def test_honest_undoes_weights_and_focus():
    q = np.linspace(.01, .99, 99)
    p = make_frame(pd.DataFrame(dict(path="x", label=["A", "B"] * 49 + ["A"]))).assign(p_A=1 - q, p_B=q)
    new = undo_weighting(p, SigmoidLoss(10., 2.))["p_B"].to_numpy()
    assert np.allclose(np.log(new / (1 - new)), np.log(q / (1 - q)) + np.log(2 / 10))
    assert undo_weighting(p, None) is p and np.allclose(undo_weighting(p, SigmoidLoss(3., 3.))["p_B"], q)
    focal = undo_weighting(p, SigmoidLoss(.25, .75, 2.))["p_B"].to_numpy()
    assert (np.diff(focal) > 0).all() and np.isfinite(focal).all()
    # what is said makes the expected loss smallest at the truth
    for eta, said in zip(focal[::10], q[::10]):
        risk = lambda s, eta=eta: (eta * .25 * (1 - s) ** 2 * -np.log(s)
                                   + (1 - eta) * .75 * s ** 2 * -np.log(1 - s))
        assert risk(said) <= min(risk(said - 1e-3), risk(said + 1e-3))


def test_true_odds_is_weighting_and_correcting_in_one():
    y, z = films()
    a, b = SigmoidLoss([3., 1., 9.], .5), SigmoidLoss([3., 1., 9.], .5, true_odds=True)
    for one, other in zip(gradient(b, y, z), gradient(a, y, z + np.log([6., 2., 18.]))):
        assert np.allclose(one, other, atol=1e-6)
    classes, c, d = np.arange(40) % 3, SoftmaxLoss([1, 2, 4]), SoftmaxLoss([1, 2, 4], true_odds=True)
    for one, other in zip(gradient(d, classes, z), gradient(c, classes, z + np.log([1, 2, 4]))):
        assert np.allclose(one, other, atol=1e-6)
    frame = make_frame(pd.DataFrame(dict(path=[str(i) for i in range(100)], split="train",
                                         F=np.r_[np.ones(5), np.zeros(95)])), findings=["F"])
    start = initial_bias(build_cnn(CNNSpec((2,), ()), (16, 16, 1), 1), frame, loss_for(frame, true_odds=True))
    assert np.isclose(start.layers[-1].layers[-1].bias.numpy()[0], np.log(5 / 95), atol=1e-5)
    for wrong in (dict(gamma=2.), dict(negative=0.)):
        with pytest.raises(CourseError, match="by a shift"):
            SigmoidLoss(1., **{"negative": .5, **wrong}, true_odds=True)


def test_validation_is_judged_by_one_measure():
    y, z = films()
    plain, classes = float(cross_entropy(y, z)), np.arange(40) % 3
    assert np.isclose(float(SigmoidLoss([3.0, 1.0, 9.0], 0.5).judge(y, z + np.log([6.0, 2.0, 18.0]))), plain,
                      rtol=1e-4)
    assert np.isclose(float(SigmoidLoss([3., 1., 9.], .5, true_odds=True).judge(y, z)), plain, rtol=1e-4)
    assert np.isclose(float(SoftmaxLoss([1, 2, 4]).judge(classes, z + np.log([1, 2, 4]))),
                      float(cross_entropy(classes, z)), rtol=1e-4)
    for loss in (SigmoidLoss(250., .5), SigmoidLoss(.25, .75, 2.)):
        for logit in (1000., -1000., 0.):
            assert np.isfinite(float(loss.judge(y, np.full((40, 3), logit, "float32"))))


def test_refusals():
    with pytest.raises(CourseError, match="0 or more"): SigmoidLoss(-1.)
    with pytest.raises(CourseError, match="gamma"): SigmoidLoss(1., gamma=-1)
    with pytest.raises(CourseError, match="finite"): SoftmaxLoss([1, np.inf])
    with pytest.raises(CourseError, match="3 logits for 2 weights"):
        SigmoidLoss([1, 2])(np.zeros((4, 3)), np.zeros((4, 3)))
    with pytest.raises(CourseError, match="one label an image"): SigmoidLoss()(np.zeros(4), np.zeros((4, 2)))
    with pytest.raises(CourseError, match="3 logits for 2 classes"):
        SoftmaxLoss([1, 2])(np.zeros(4), np.zeros((4, 3)))
    with pytest.raises(CourseError, match="no training image"): class_weights([0, 2])


@pytest.fixture(scope="module")
def store():
    frame = hold_out(load_dataset("sample-nih"), .3)
    frame.loc[frame.index[::5], "Effusion"] = np.nan
    return build_store(frame, (24, 24))


@pytest.mark.parametrize("kind", ["weighted", "focal"])
def test_an_epoch_with_unknown_labels(store, kind, tmp_path):
    loss = loss_for(store, kind)
    model = initial_bias(build_cnn(CNNSpec((4, 8), (8,)), (24, 24, 1), 14), store, loss)
    run = fit(model, store, run=tmp_path / "run", epochs=1, loss=loss)
    assert np.isfinite(run.history[["loss", "val_loss"]]).all(axis=None)
    said = json.loads(run.card["training"]["loss"])
    assert said["class_name"] == "SigmoidLoss" and len(said["config"]["positive"]) == 14
    assert load_run(tmp_path / "run").model.count_params() == model.count_params()
    with pytest.raises(CourseError, match="smoothing"):
        fit(model, store, run=tmp_path / "other", epochs=1, loss=loss, smoothing=.1)


@pytest.mark.parametrize("classes", [2, 3])
def test_an_epoch_on_classes_drawn_evenly(classes, tmp_path):
    frame = hold_out(load_dataset("sample", classes=classes), .3)
    store = build_store(frame, (24, 24))
    drawn = store.using(balanced_sample(store.frame, images=60))
    assert (
        drawn.frame[drawn.frame["split"] == "train"]["label"].value_counts().tolist()
        == [60 // classes] * classes
    )
    loss = loss_for(store)
    model = initial_bias(build_cnn(CNNSpec((4,), (4,)), (24, 24, 1), 1 if classes == 2 else 3), store, loss)
    run = fit(model, drawn, run=tmp_path / "run", epochs=1, loss=loss)
    assert run.card["data"]["splits"]["train"]["images"] == 60 and np.isfinite(run.history["val_loss"]).all()


def test_start_bias_is_the_best_constant():
    y = np.r_[np.ones(5), np.zeros(95)]
    frame = make_frame(pd.DataFrame(dict(path=[str(i) for i in range(100)], split="train", F=y, G=np.nan,
                                         H=0.0)), findings=["F", "G", "H"])
    model = build_cnn(CNNSpec((2,), ()), (16, 16, 1), 3)
    bias = initial_bias(model, frame).layers[-1].layers[-1].bias.numpy()
    assert np.allclose(bias[:2], [np.log(5 / 95), 0], atol=1e-5) and np.isfinite(bias).all() and bias[2] < -4
    assert np.allclose(initial_bias(model, frame, loss_for(frame)).layers[-1].layers[-1].bias.numpy()[0], 0,
                       atol=1e-5)
    three = make_frame(pd.DataFrame(dict(path=[str(i) for i in range(10)], split="train",
                                         label=list("AAAAAABBBC"))))
    start = initial_bias(model, three).layers[-1].layers[-1].bias.numpy()
    assert np.allclose(softmax(start), [.6, .3, .1], atol=1e-6)
    assert np.allclose(np.ptp(initial_bias(model, three, loss_for(three)).layers[-1].layers[-1].bias.numpy()),
                       0, atol=1e-5)


def test_even_rows_findings_and_unknown_patients():
    frame = make_frame(pd.DataFrame(dict(path=[str(i) for i in range(50)],
                                         patient=[f"p{i // 5}" for i in range(50)], split="train",
                                         F=[1.0] + [0.0] * 49, G=[0.0] * 40 + [1.0] * 10)),
                       findings=["F", "G"])
    drawn = balanced_sample(frame, images=30, seed=3)
    assert (drawn["F"] == 1).sum() == 10 == (drawn["G"] == 1).sum() and drawn.equals(
        balanced_sample(frame, images=30, seed=3)
    )
    assert drawn.loc[drawn["G"] == 1, "patient"].value_counts().tolist() == [5, 5]
    nobody = regroup(frame.assign(patient=None))
    with pytest.raises(CourseError, match="no patient"): balanced_sample(nobody)
    assert len(balanced_sample(regroup(nobody, "image"))) == 50


def test_too_rare_to_judge():
    draw = rng("rare")
    n = 400
    frame = make_frame(pd.DataFrame(dict(path=[str(i) for i in range(n)],
                                         patient=[f"p{i // 2}" for i in range(n)],
                                         rare=[1.0] * 12 + [0.0] * (n - 12),
                                         some=[1.0, 1.0, 0, 0] * 25 + [0.0] * 300,
                                         many=[1.0, 1.0, 0, 0] * 100)), findings=["rare", "some", "many"])
    p = frame.assign(p_rare=draw.random(n), p_some=draw.random(n), p_many=draw.random(n))
    found = judge_findings(p, times=50)
    assert (
        found.loc["rare", "patients"] == 6
        and found.loc["rare", "positives"] == 12
        and np.isnan(found.loc["rare", "value"])
        and "6 patients" in found.loc["rare", "note"]
    )
    assert found.loc["some",
                     "note"] == "preliminary" and found.loc["many",
                                                            "note"] == "" and found.index[-1] == "rare"
    assert len(plot_finding_rocs(p, found, times=20).axes) == 5


def test_the_real_lists_share_patients(real_data):
    frame = load_dataset(real_data / "nih").assign(split=None)
    with pytest.raises(CourseError, match="share 15 patients"):
        official_split(frame, real_data / "nih" / "lists.json")


def test_more_patients_let_more_findings_be_judged():
    "Two hundred images of few patients judge hardly anything; 450 people with one each, eight findings."
    few, more = (population(n, seed=16, kind="nih", images=per) for n, per in ((75, (1, 4)), (450, (1, 1))))
    found = []
    for world in (few, more):
        truth = world[list(FINDINGS)].to_numpy(float)
        p = predictions_frame(truth, rng("judged").random(truth.shape), names=FINDINGS,
                              patients=world["patient"])
        found.append(judge_findings(p, times=50)["value"].notna().sum())
    assert found[1] > 8 > found[0], found


def ward(prevalence, n=12_000, seed=0):
    "Children described by five numbers, of which two know something about the disease; half of them teach."
    g = rng("ward", prevalence, seed)
    y = (g.random(n) < prevalence).astype(float)
    x = g.normal(size=(n, 5))
    x[:, :2] += np.c_[1.2 * y, .8 * y]
    return x, y, np.arange(n) < n // 2


def fitted(x, y, loss):
    "The best linear head for a loss, by its own gradient."
    from scipy.optimize import minimize
    def target(v):
        z = x @ v[:-1] + v[-1]
        sign, w = np.where(y == 1, 1., -1.), np.where(y == 1, loss.positive[0], loss.negative[0]) / len(y)
        slope = -sign * w * expit(-sign * z)
        return (w * np.logaddexp(0, -sign * z)).sum(), np.r_[x.T @ slope, slope.sum()]
    return minimize(target, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B",
                    options=dict(maxiter=500)).x


@pytest.mark.parametrize("seed", [0, 1])
def test_weights_change_probabilities_and_not_the_ranking(seed):
    "Balanced weights say far too much, `undo_weighting` takes it back; a moved threshold does the same."
    x, y, taught = ward(.01, seed=seed)
    balanced, found = SigmoidLoss.from_labels(y[taught]), {}
    for name, loss in {"plain": SigmoidLoss(), "weighted": balanced}.items():
        v = fitted(x[taught], y[taught], loss)
        p = expit(x[~taught] @ v[:-1] + v[-1])
        found[name] = predictions_frame(y[~taught], p, names=["NORMAL", "PNEUMONIA"],
                                        patients=range((~taught).sum()), split="val")
    corrected = undo_weighting(found["weighted"], balanced)
    said = {k: f["p_PNEUMONIA"].mean() / y[~taught].mean() for k,
            f in {**found, "corrected": corrected}.items()}
    assert said["weighted"] > 5 and .5 < said["plain"] < 1.5 and .5 < said["corrected"] < 1.5, said
    gain = compare_models(found["weighted"], found["plain"])
    assert (
        abs(gain["value"].item()) < 0.02 and abs(macro_auc(corrected) - macro_auc(found["weighted"])) < 1e-12
    )
    (truth, p), = binary_tasks(found["plain"]).values()
    moved = choose_threshold(found["plain"])
    assert binary_metrics(truth, p, .5)["recall"] < .3 < .5 < binary_metrics(truth, p, moved)["recall"]


def test_a_rarer_disease_is_harder_to_learn():
    "Same healthy children, fewer ill ones: the AUC on one and the same test falls."
    x, y, taught = ward(.2)
    areas = []
    for ill in (2, 1000):
        each = []
        for seed in range(8):
            rows = np.r_[np.flatnonzero(taught & (y == 0)),
                         rng("few", seed).choice(np.flatnonzero(taught & (y == 1)), ill, replace=False)]
            v = fitted(x[rows], y[rows], SigmoidLoss())
            each.append(auc(y[~taught], x[~taught] @ v[:-1] + v[-1]))
        areas.append(np.mean(each))
    assert areas[0] < areas[1] - .02, areas
