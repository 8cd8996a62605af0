"""Thresholds, calibration, net benefit and agreement against scikit-learn, dcurves, hand-worked cases and
simulated studies."""
from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from sklearn import metrics
from sklearn.calibration import calibration_curve as sk_calibration_curve
from sklearn.linear_model import LogisticRegression

from cxr_course.core import CourseError, rng
from cxr_course.evaluation.agreement import cohen_kappa, fleiss_kappa
from cxr_course.evaluation.calibration import (
    brier_score, calibrate, calibration_error, plot_calibration, calibration_curve,
)
from cxr_course.evaluation.checklist import reporting_checklist, add_checklist
from cxr_course.evaluation.predictions import validate_predictions, predictions_frame
from cxr_course.evaluation.report import evaluation_report
from cxr_course.evaluation.thresholds import (
    choose_threshold, net_benefit, predictive_values, adjust_prevalence,
)
from cxr_course.frame import make_frame
from cxr_course.stats.curves import auc


def two(n=400, split="val", seed=0, slope=1., shift=0., patients=200, rate=.5):
    "Predictions whose logits are wrong by a known slope and shift."
    g = rng(seed, "test.decisions", split)
    true = expit(logit(rate) + 1.5 * g.normal(size=n))
    y, p = g.random(n) < true, expit(slope * logit(true) + shift)
    return make_frame(pd.DataFrame(dict(path=[f"{split}{i}.png" for i in range(n)],
                                        patient=[f"p{i}" for i in g.integers(0, patients, n)], split=split,
                                        label=np.where(y, "PNEUMONIA", "NORMAL"), p_NORMAL=1 - p,
                                        p_PNEUMONIA=p)), labels=["NORMAL", "PNEUMONIA"])


def three(n=500, split="val", seed=0):
    g = rng(seed, "test.three", split)
    q = g.dirichlet([1, 1, 1], n)
    z = 2 * np.log(q)
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    return make_frame(pd.DataFrame(dict(path=[f"{i}.png" for i in range(n)],
                                        patient=[f"p{i}" for i in range(n)], split=split,
                                        label=[("N", "B", "V")[g.choice(3, p=r)] for r in q], p_N=p[:, 0],
                                        p_B=p[:, 1], p_V=p[:, 2])), labels=["N", "B", "V"])


def many(n=400, split="val", seed=0):
    g = rng(seed, "test.many", split)
    truth = {f: (g.random(n) < q).astype(float) for f, q in (("Effusion", .4), ("Mass", .2))}
    return make_frame(pd.DataFrame(dict(path=[f"{i}.png" for i in range(n)],
                                        patient=[f"p{i}" for i in range(n)], split=split, **truth,
                                        **{f"p_{f}": expit(2 * (1.5 * y - 1 + g.normal(size=n))) for f,
                                           y in truth.items()})), findings=list(truth))


def binary(p): return (p["label"] == "PNEUMONIA").to_numpy(float), p["p_PNEUMONIA"].to_numpy()


@pytest.mark.parametrize("call", [choose_threshold, calibrate])
@pytest.mark.parametrize("split", ["test", "train"])
def test_nothing_is_fitted_on_films_it_is_judged_by(call, split):
    with pytest.raises(CourseError, match=f"split '{split}'"): call(two(split=split))
    mixed = pd.concat([two(), two(20, split=split)], ignore_index=True)
    with pytest.raises(CourseError, match="20 of 420"): call(mixed)


def test_thresholds_do_what_they_say_on_the_films_they_were_chosen_on():
    p = two()
    y, s = binary(p)
    sens, spec = lambda t: (s[y == 1] >= t).mean(), lambda t: (s[y == 0] < t).mean()
    every = np.unique(np.r_[s, 0, 2])
    assert abs(sum(f(choose_threshold(p))
                   for f in (sens, spec)) - max(sens(t) + spec(t) for t in every)) < 1e-12
    for value in (.5, .9, .99, 1.):
        t = choose_threshold(p, "sensitivity", value)
        assert sens(t) >= value and max([spec(u) for u in every if sens(u) >= value]) == spec(t)
        t = choose_threshold(p, "specificity", value)
        assert spec(t) >= value and max([sens(u) for u in every if spec(u) >= value]) == sens(t)
    for cost in (.1, 1, 7):
        regret = lambda t, cost=cost: cost * (s[y == 1] < t).sum() + (s[y == 0] >= t).sum()
        assert regret(choose_threshold(p, "cost", cost)) == min(map(regret, every))


def test_thresholds_for_findings_and_faults():
    cuts = choose_threshold(many(), "sensitivity", .8)
    assert set(cuts) == {"Effusion",
                         "Mass"} and evaluation_report(many(split="test"), threshold=cuts,
                                                       times=50).values["metric"].eq("sensitivity").sum() == 2
    with pytest.raises(CourseError, match="between two classes"): choose_threshold(three())
    with pytest.raises(CourseError, match="unknown rule"): choose_threshold(two(), "best")
    with pytest.raises(CourseError, match="needs a value"): choose_threshold(two(), "sensitivity", 95)
    with pytest.raises(CourseError, match="0 without"):
        choose_threshold(two()[lambda d: d["label"] == "PNEUMONIA"])


def test_predictive_values_by_counting():
    g = rng(3, "counting")
    ill = g.random(200_000) < .1
    yes = np.where(ill, g.random(200_000) < .8, g.random(200_000) < .3)
    ppv, npv = predictive_values(.8, .7, .1)
    assert abs(ppv - ill[yes].mean()) < .005 and abs(npv - (~ill)[~yes].mean()) < .005


def test_prior_shift_mends_calibration_after_a_real_shift_and_keeps_the_order():
    p = two(20_000, split="test", patients=20_000)
    y, s = binary(p)
    g = rng(4, "thin")
    rare = p[(y == 0) | (g.random(len(y)) < .1)]
    y2, s2 = binary(rare)
    new = adjust_prevalence(rare, old=y.mean(), new=y2.mean())["p_PNEUMONIA"].to_numpy()
    keys = rare["patient"].to_numpy()
    assert (
        calibration_error(y2, new, keys, times=20).value
        < 0.01
        < 0.1
        < calibration_error(y2, s2, keys, times=20).value
        and abs(auc(y2, new) - auc(y2, s2)) < 1e-12
    )
    flat = adjust_prevalence(three(), old=dict(N=1 / 3, B=1 / 3, V=1 / 3),
                             new=dict(N=1 / 3, B=1 / 3, V=1 / 3))
    assert np.allclose(flat[["p_N", "p_B", "p_V"]], three()[["p_N", "p_B", "p_V"]])
    with pytest.raises(CourseError, match="a share above 0"): adjust_prevalence(p, old=0., new=.1)


def test_brier_agrees_and_ece_by_a_plain_loop():
    p = two()
    y, s = binary(p)
    keys = p["patient"].to_numpy()
    assert abs(brier_score(y, s, keys).value - metrics.brier_score_loss(y, s)) < 1e-12
    order = np.argsort(s)
    plain = sum(abs(s[i].sum() - y[i].sum()) for i in np.array_split(order, 10)) / len(y)
    assert abs(calibration_error(y, s, keys).value - plain) < 1e-12
    r = calibration_curve(y, s, keys)
    assert (
        r["images"].tolist() == [40] * 10
        and abs((r["images"] * r["value"]).sum() - y.sum()) < 1e-9
        and (r["low"] < r["high"]).all()
    )


def test_brier_interval_holds_the_truth():
    held = []
    for seed in range(600):
        p = two(300, seed=seed, patients=10 ** 9)
        held.append(brier_score(*binary(p), p["patient"].to_numpy(), times=300, seed=seed)[1:3])
    y, s = binary(two(400_000, seed=99, patients=10 ** 9))
    # the probabilities are right by construction
    truth, held = np.mean(s * (1 - s)), np.array(held)
    assert .92 <= np.mean((held[:, 0] <= truth) & (truth <= held[:, 1])) <= .97


def test_platt_agrees_with_scikit_learn_and_finds_what_was_put_in():
    p = two(20_000, slope=2.5, shift=.7)
    y, s = binary(p)
    a, b = calibrate(p, "platt").parts["all"]
    theirs = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000).fit(logit(s)[:, None], y)
    assert abs(a - theirs.coef_[0, 0]) < 1e-4 and abs(b - theirs.intercept_[0]) < 1e-4
    assert abs(a - 1 / 2.5) < .02 and abs(b + .7 / 2.5) < .05
    assert abs(calibrate(two(20_000, slope=2.5)).parts["all"][0] - 1 / 2.5) < .02


@pytest.mark.parametrize("method", ["temperature", "platt"])
def test_calibration_helps_on_new_films_and_leaves_every_auc_alone(method):
    fitted, new = calibrate(two(2000, slope=3.), method), two(2000, split="test", slope=3.)
    mended = fitted.apply(new)
    assert abs(auc(*binary(mended)) - auc(*binary(new))) < 1e-12 and metrics.log_loss(
        *binary(mended)
    ) < metrics.log_loss(*binary(new))
    assert np.allclose(mended[["p_NORMAL", "p_PNEUMONIA"]].sum(axis=1),
                       1) and validate_predictions(mended) is mended
    fitted, new = calibrate(many(), method), many(split="test")
    mended = fitted.apply(new)
    for f in ("Effusion", "Mass"):
        assert abs(auc(mended[f], mended[f"p_{f}"]) - auc(new[f], new[f"p_{f}"])) < 1e-12


def test_three_classes_have_one_temperature_and_keep_their_winners():
    p, columns = three(5000), ["p_N", "p_B", "p_V"]
    fitted = calibrate(p)
    assert abs(fitted.parts["all"][0] - .5) < .03
    assert (fitted.apply(p)[columns].to_numpy().argmax(axis=1) == p[columns].to_numpy().argmax(axis=1)).all()
    with pytest.raises(CourseError, match="one yes-or-no question"): calibrate(p, "platt")


def test_calibration_survives_certainty_and_refuses_nonsense():
    p = two().assign(p_PNEUMONIA=lambda d: np.where(d["label"] == "PNEUMONIA", 1.0, 0.0),
                     p_NORMAL=lambda d: 1 - d["p_PNEUMONIA"])
    assert np.isfinite(calibrate(p).apply(p)["p_PNEUMONIA"]).all()
    swapped = two().rename(columns={"p_NORMAL": "p_PNEUMONIA", "p_PNEUMONIA": "p_NORMAL"})
    with pytest.raises(CourseError, match="less of it"): calibrate(swapped, "platt")
    with pytest.raises(CourseError, match="both kinds"): calibrate(two()[lambda d: d["label"] == "NORMAL"])


def test_net_benefit_by_its_definition():
    p = two(split="test")
    y, s = binary(p)
    curve = net_benefit(p)
    for t in (.1, .5, .9):
        by_hand = ((s >= t) & (y == 1)).mean() - ((s >= t) & (y == 0)).mean() * t / (1 - t)
        assert (
            abs(curve.loc[t, "model"] - by_hand) < 1e-12
            and abs(curve.loc[t, "all"] - (y.mean() - (1 - y.mean()) * t / (1 - t))) < 1e-12
        )
    assert (
        (curve["low"] <= curve["model"] + 1e-9).all()
        and (curve["model"] <= curve["high"] + 1e-9).all()
        and (curve["none"] == 0).all()
    )


@pytest.mark.parametrize("weights", [None, "linear", "quadratic"])
def test_cohen_kappa_agrees_with_scikit_learn(weights):
    g = rng(5, "kappa")
    a = g.integers(0, 4, 300)
    b = np.where(g.random(300) < .6, a, g.integers(0, 4, 300))
    est = cohen_kappa(a, b, np.arange(300), weights)
    assert (
        abs(est.value - metrics.cohen_kappa_score(a, b, weights=weights)) < 1e-12
        and est.low < est.value < est.high
    )


def test_kappa_interval_holds_the_truth():
    held, g = [], rng(6, "kappa.coverage")
    for i in range(1000):
        a = g.random(150) < .5
        b = np.where(g.random(150) < .8, a, ~a)                          # agreement .8, chance .5: kappa .6
        est = cohen_kappa(a, b, np.arange(150), times=300, seed=i)
        held.append(est.low <= .6 <= est.high)
    assert .93 <= np.mean(held) <= .97, np.mean(held)


def test_fleiss_kappa_on_the_reprinted_example_and_by_its_definition():
    votes = np.array([[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
                      [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]])
    said = pd.DataFrame([np.repeat(range(5), v) for v in votes])
    agree, chance = ((votes ** 2).sum() - 10 * 14) / (10 * 14 * 13), ((votes.sum(axis=0) / 140) ** 2).sum()
    est = fleiss_kappa(said, range(10))
    assert abs(est.value - (agree - chance) / (1 - chance)) < 1e-12 and round(est.value, 3) == .210
    with pytest.raises(CourseError, match="said nothing"): fleiss_kappa(said.assign(late=None), range(10))


def test_readers_who_always_say_the_same_have_no_kappa():
    assert "one and the same" in cohen_kappa([1] * 30, [1] * 30, range(30)).note
    assert "one and the same" in fleiss_kappa(pd.DataFrame(np.ones((30, 3))), range(30)).note


@pytest.mark.parametrize("kind", [two, three, many])
def test_the_check_list_shows_what_is_open(kind, tmp_path):
    result = evaluation_report(kind(split="test"), threshold=None if kind is three else .5, times=100)
    items = reporting_checklist(result)
    ai = items[items["list"] == "TRIPOD+AI"]
    assert (
        ai["item"].astype(int).tolist() == list(range(1, 28))
        and items["key"].is_unique
        and set(items["state"]) == {"filled", "partly", "open"}
    )
    # nobody but a person can know
    assert set(items.loc[items["key"].isin(["ethics", "public", "reference"]), "state"]) == {"open"}
    once = add_checklist(result, {"ethics": "Not needed <here>."}).save(tmp_path / "a") / "report.html"
    twice = add_checklist(result, {"ethics": "Not needed <here>."}).save(tmp_path / "b") / "report.html"
    page = once.read_text()
    assert (
        page == twice.read_text()
        and "&lt;here&gt;" in page
        and page.count("open: nobody has answered this") == (items["state"] == "open").sum() - 1
    )
    with pytest.raises(CourseError, match="no item"): reporting_checklist(result, {"colour": "blue"})


@pytest.mark.parametrize("slope", [1., 1.3, 2.])
def test_the_interval_of_the_calibration_error_holds_the_truth(slope):
    "With the plain percentile interval this test finds 0, 16 and 93 % at 400 films."
    from scipy.special import expit as e
    def study(g, n):
        true = e(1.5 * g.normal(size=n))
        return (g.random(n) < true).astype(float), e(slope * logit(true)), np.arange(n)
    y, p, k = study(rng(9, "ece"), 400_000)
    group = np.argsort(np.argsort(p)) * 10 // len(p)
    truth, held = np.abs(np.bincount(group, p - y)).sum() / len(y), []
    for i in range(300):
        est = calibration_error(*study(rng(10, "ece", i), 400), times=200, seed=i)
        held.append(est.low <= truth <= est.high)
    assert np.mean(held) >= .92, np.mean(held)


def small(labels, p, split="val"):
    return predictions_frame(labels, p, names=["N", "P"], patients=range(len(p)), split=split)


CUTS = [("youden", None, .45), ("sensitivity", .5, .8), ("sensitivity", 1., .45), ("specificity", 1., .8),
        ("specificity", .6, .45), ("cost", .1, .8), ("cost", 5, .45)]


@pytest.mark.parametrize("rule, value, cut", CUTS)
def test_a_threshold_lies_half_way_to_the_next_lower_score(rule, value, cut):
    "By hand: sick .9 and .6, healthy .7, .3 and .2. Calls end at .9 or at .6; the next scores are .7 and .3."
    assert abs(choose_threshold(small(list("PNPNN"), [.9, .7, .6, .3, .2]), rule, value) - cut) < 1e-12


def test_a_threshold_that_calls_all_or_none():
    # below the lowest score: half-way to 0
    assert abs(choose_threshold(small(list("PPN"), [.9, .6, .6]), "sensitivity", 1.) - .3) < 1e-12
    # above the highest
    assert choose_threshold(small(list("NPP"), [.9, .5, .4]), "specificity", 1.) > .9


def test_choosing_needs_to_know_what_images_were_for():
    for call in (choose_threshold, calibrate):
        with pytest.raises(CourseError, match="no column `split`"): call(two().drop(columns="split"))


# dcurves 1.1.7 (Python 3.11): dcurves.dca(data=DataFrame(dict(y=y, p=p)), outcome="y", modelnames=["p"],
# thresholds=[.05, .1, .2, .35, .5, .7])
DCURVES = dict(
    y="000110100011100000001101100000011101010110000010000010110000",
    p=[
        0.171, 0.333, 0.204, 0.652, 0.335, 0.186, 0.575, 0.5, 0.561, 0.098, 0.427, 0.759, 0.184, 0.204, 0.269,
        0.588, 0.448, 0.227, 0.22, 0.24, 0.883, 0.518, 0.231, 0.701, 0.594, 0.25, 0.118, 0.287, 0.207, 0.566,
        0.439, 0.617, 0.763, 0.54, 0.538, 0.621, 0.422, 0.312, 0.365, 0.234, 0.177, 0.231, 0.142, 0.324,
        0.793, 0.15, 0.469, 0.333, 0.4, 0.254, 0.249, 0.451, 0.735, 0.126, 0.604, 0.631, 0.124, 0.345, 0.147,
        0.518,
    ],
    thresholds=[0.05, 0.1, 0.2, 0.35, 0.5, 0.7],
    model=[0.315789473684, 0.27962962963, 0.191666666667, 0.15, 0.116666666667, 0.044444444444],
    all=[0.315789473684, 0.277777777778, 0.1875, 0.0, -0.3, -1.166666666667],
)


def test_net_benefit_is_that_of_dcurves():
    curve = net_benefit(small([int(c) for c in DCURVES["y"]], DCURVES["p"], "test"), DCURVES["thresholds"],
                        times=50)
    for name in ("model", "all"): assert np.allclose(curve[name], DCURVES[name], atol=1e-11)
    assert (curve["none"] == 0).all()


def test_net_benefit_and_reliability_ask_one_question():
    for call in (net_benefit, lambda p: plot_calibration({"it": p})):
        for p in (three(split="test"), many(split="test")):
            with pytest.raises(CourseError, match="one yes-or-no question"): call(p)


def test_reliability_is_that_of_scikit_learn():
    p = two()
    y, s = binary(p)
    so, said = sk_calibration_curve(y, s, n_bins=10, strategy="quantile")
    r = calibration_curve(y, s, p["patient"])
    assert np.allclose(r["value"], so, atol=1e-12) and np.allclose(r["said"], said, atol=1e-12)


def test_platt_of_perfect_predictions_is_finite():
    p = two().assign(p_PNEUMONIA=lambda d: np.where(d["label"] == "PNEUMONIA", 0.8, 0.2),
                     p_NORMAL=lambda d: 1 - d["p_PNEUMONIA"])
    assert np.isfinite(calibrate(p, "platt").apply(p)["p_PNEUMONIA"]).all()


def test_readers_of_other_images_are_not_compared():
    with pytest.raises(CourseError, match="same images"): cohen_kappa([1, 0], [1, 0, 1], range(2))
    with pytest.raises(CourseError, match="same images"): cohen_kappa([1, 0], [1, 0], range(3))
