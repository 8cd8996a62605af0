"Chapter 07 against independent sources: scikit-learn, hand-worked cases, published examples, and simulated studies whose truth is known."
from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from sklearn import metrics

from cxr_course import evaluation as ev
from cxr_course.core import CourseError, frame, rng


def films(n=200, kind="binary", patients=80, seed=0, split="test"):
    "Simulated predictions: films of one patient resemble each other."
    g = rng(seed, "test.films", kind)
    who = g.integers(0, patients, n)
    own = g.normal(size=patients)[who] * .7
    rows = dict(path=[f"f{i}.png" for i in range(n)], patient=[f"p{w}" for w in who], split=split, source=np.where(who % 3 == 0, "B", "A"), view="PA",
                height=g.integers(600, 1400, n), width=g.integers(800, 1800, n), age=g.integers(0, 90, n).astype(float), sex=np.where(who % 2, "F", "M"))
    if kind == "binary":
        y = g.random(n) < .6
        p = 1 / (1 + np.exp(-(2.2 * y - 1.1 + own + g.normal(size=n))))
        return frame(pd.DataFrame({**rows, "label": np.where(y, "PNEUMONIA", "NORMAL"), "p_NORMAL": 1 - p, "p_PNEUMONIA": p}), labels=["NORMAL", "PNEUMONIA"])
    if kind == "three":
        names, y = ["NORMAL", "BACTERIA", "VIRUS"], g.integers(0, 3, n)
        z = np.eye(3)[y] * 2 + g.normal(size=(n, 3)) + own[:, None] * [1, 0, -.5]
        p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
        return frame(pd.DataFrame({**rows, "label": np.array(names)[y], **{f"p_{c}": p[:, i] for i, c in enumerate(names)}}), labels=names)
    truth = {f: (g.random(n) < q).astype(float) for f, q in (("Effusion", .3), ("Mass", .1), ("Hernia", 0))}
    for y in truth.values(): y[g.random(n) < .05] = np.nan
    return frame(pd.DataFrame({**rows, **truth, **{f"p_{f}": 1 / (1 + np.exp(-(np.nan_to_num(y) + own + g.normal(size=n)))) for f, y in truth.items()}}))


@pytest.mark.parametrize("decimals", [12, 1])            # without ties and with many
@pytest.mark.parametrize("prevalence", [.5, .03])
def test_scikit_learn_agrees(decimals, prevalence):
    g = rng(1, "sklearn")
    y = (g.random(3000) < prevalence).astype(float)
    s = np.round(g.normal(size=3000) + y, decimals)
    assert abs(ev.auc(y, s) - metrics.roc_auc_score(y, s)) < 1e-12
    assert abs(ev.average_precision(y, s) - metrics.average_precision_score(y, s)) < 1e-12
    for ours, theirs in zip(ev.roc(y, s), metrics.roc_curve(y, s, drop_intermediate=False)): assert np.array_equal(ours, theirs) or np.abs(ours[1:] - theirs[1:]).max() < 1e-12
    precision, recall, cut = ev.precision_recall(y, s)
    p, r, t = metrics.precision_recall_curve(y, s)
    assert np.abs(precision - p[:-1][::-1]).max() < 1e-12 and np.abs(recall - r[:-1][::-1]).max() < 1e-12 and np.array_equal(cut, t[::-1])
    e = ev.eight(y, s, .5)
    tn, fp, fn, tp = metrics.confusion_matrix(y, s >= .5).ravel()
    assert (e["tn"], e["fp"], e["fn"], e["tp"]) == (tn, fp, fn, tp) and abs(e["precision"] - metrics.precision_score(y, s >= .5)) < 1e-12


@pytest.mark.parametrize("decimals", [12, 1])
def test_every_resampled_figure_is_the_weighted_figure(decimals):
    g = rng(2, "weights")
    keys, y = g.integers(0, 50, 400), (g.random(400) < .3).astype(float)
    s = np.round(g.normal(size=400) + y, decimals)
    codes, counts = ev.resample(keys, 70, seed=3)
    area, precision = ev.resampled_auc(y, s, codes, counts), ev.resampled_precision(y, s, codes, counts)
    for j in range(70):
        assert abs(area[j] - metrics.roc_auc_score(y, s, sample_weight=counts[codes, j])) < 1e-12
        assert abs(precision[j] - metrics.average_precision_score(y, s, sample_weight=counts[codes, j])) < 1e-12
    left = ev.left_out_auc(y, s, codes, len(counts))
    for k in range(50): assert abs(left[k] - metrics.roc_auc_score(y[codes != k], s[codes != k])) < 1e-12


def test_same_seed_same_interval_and_order_of_rows_does_not_matter_much():
    p = films()
    assert ev.evaluate(p).equals(ev.evaluate(p)) and not ev.evaluate(p).equals(ev.evaluate(p, seed=1))


def test_delong_on_the_ratings_of_hanley_and_mcneil():
    ratings = np.repeat([1, 2, 3, 4, 5] * 2, [33, 6, 6, 11, 2, 3, 2, 2, 11, 33])
    est = ev.auc_interval(np.repeat([0, 1], [58, 51]), ratings, np.arange(109), "delong")
    assert (round(est.value, 4), round(est.low, 4), round(est.high, 4)) == (.8932, .833, .9534)


def test_delong_by_its_definition_for_two_models():
    g = rng(4, "delong")
    y = np.repeat([1., 0.], [17, 23])
    scores = np.round(g.normal(size=(2, 40)) + y, 1)
    pairs = [(a[:17, None] > a[17:]) + .5 * (a[:17, None] == a[17:]) for a in scores]
    down, across = np.array([q.mean(axis=1) for q in pairs]), np.array([q.mean(axis=0) for q in pairs])
    area, cov = ev.delong(y, scores)
    assert np.allclose(area, [q.mean() for q in pairs], atol=1e-14) and np.allclose(cov, np.cov(down) / 17 + np.cov(across) / 23, atol=1e-14)
    gap, p = ev.compare(y, *scores)
    z = (area[0] - area[1]) / np.sqrt(cov[0, 0] + cov[1, 1] - 2 * cov[0, 1])
    assert abs(p - 2 * norm.sf(abs(z))) < 1e-12 and abs(gap.value - (area[0] - area[1])) < 1e-15


def test_a_film_copied_within_its_patient_adds_no_certainty():
    y, s, k = np.tile(rng(5, "y").random(60) < .5, 3) * 1., np.tile(rng(5, "s").normal(size=60), 3), np.tile(np.arange(60), 3)
    once, thrice = ev.delong(y[:60], s[:60])[1][0, 0], ev.delong(y, s, k)[1][0, 0]
    assert abs(thrice / once - 1) < 1e-9 and ev.delong(y, s)[1][0, 0] < .4 * once
    a, b = ev.share(y[:60] == 1, k[:60]), ev.share(y == 1, k)
    assert np.allclose(a[:3], b[:3])


@pytest.mark.parametrize("hits, n, low, high", [(574.08, 624, .896, .939), (0, 10, 0, .278), (10, 10, .722, 1)])
def test_wilson(hits, n, low, high):
    est = ev.wilson(hits, n)
    assert abs(est.low - low) < 6e-4 and abs(est.high - high) < 6e-4


def test_wilson_solves_its_own_equation():
    z, est = norm.ppf(.975), ev.wilson(37, 61)
    for edge in (est.low, est.high): assert abs(abs(37 / 61 - edge) / np.sqrt(edge * (1 - edge) / 61) - z) < 1e-9


def clustered(g, patients, most=4, shift=1.3, alike=.6):
    size = g.integers(1, most + 1, patients)
    k = np.repeat(np.arange(patients), size)
    y = (g.random(patients) < .5)[k].astype(float)
    return y, shift * y + np.sqrt(alike) * g.normal(size=patients)[k] + np.sqrt(1 - alike) * g.normal(size=len(k)), k


@pytest.mark.parametrize("method", ["percentile", "bca", "delong"])
def test_intervals_hold_the_truth_as_often_as_they_say(method):
    g, truth, held = rng(6, "coverage"), norm.cdf(1.3 / np.sqrt(2)), []
    for i in range(800):
        y, s, k = clustered(g, 150)
        est = ev.auc_interval(y, s, k, method, times=400, seed=i)
        held.append(est.low <= truth <= est.high)
    assert .93 <= np.mean(held) <= .97, np.mean(held)


def test_intervals_of_a_difference_hold_the_truth():
    g, held = rng(7, "difference"), []
    for _ in range(1500):
        y, s, k = clustered(g, 120)
        t = s + g.normal(size=len(s))
        est, _ = ev.compare(y, s, t, k)
        held.append(est.low <= norm.cdf(1.3 / np.sqrt(2)) - norm.cdf(1.3 / 2) <= est.high)
    assert .93 <= np.mean(held) <= .97, np.mean(held)


@pytest.mark.parametrize("truth", [.6, .9])
def test_shares_by_patient_hold_the_truth(truth):
    g, held, naive = rng(8, "share"), [], []
    for _ in range(2000):
        k = np.repeat(np.arange(100), g.integers(1, 5, 100))
        own = g.beta(truth * 3, (1 - truth) * 3, 100)                    # patients differ in how easy they are
        hit = g.random(len(k)) < own[k]
        for keys, out in ((k, held), (None, naive)):
            est = ev.share(hit, keys)
            out.append(est.low <= truth <= est.high)
    assert .93 <= np.mean(held) <= .97 and np.mean(naive) < .91, (np.mean(held), np.mean(naive))


def test_taking_films_for_independent_is_caught_by_the_same_test():
    g, truth, held = rng(6, "coverage"), norm.cdf(1.3 / np.sqrt(2)), []
    for _ in range(400):
        y, s, k = clustered(g, 150)
        est = ev.auc_interval(y, s, np.arange(len(k)), "delong")
        held.append(est.low <= truth <= est.high)
    assert np.mean(held) < .92


@pytest.mark.parametrize("kind", ["binary", "three", "many"])
def test_a_report_of_each_kind_is_saved_whole(kind, tmp_path):
    p = films(kind=kind)
    r = ev.report(p, threshold=None if kind == "three" else .4, times=200)
    folder = r.save(tmp_path / "report")
    page, data = (folder / "report.html").read_text(), json.loads((folder / "report.json").read_text())
    assert sorted(f.name for f in folder.iterdir()) == ["report.html", "report.json", "report.png"]
    assert page.count("<h1>") == 1 and "<script" not in page and "http" not in page.replace("http-equiv", "") and "src='data:image/png;base64," in page
    assert (folder / "report.png").read_bytes()[:4] == b"\x89PNG" and data["films"] == 200 and len(data["values"]) == len(r.values)
    assert "<img" in r._repr_html_() and repr(r)
    with pytest.raises(CourseError, match="never overwritten"): r.save(folder)
    r.save(folder, overwrite=True)
    (folder / "mine.txt").write_text("keep me")
    with pytest.raises(CourseError, match="more than an old report"): r.save(folder, overwrite=True)


def test_every_estimate_lies_within_its_interval():
    for kind in ("binary", "three", "many"):
        v = ev.evaluate(films(kind=kind), threshold=None if kind == "three" else .5, times=300).dropna(subset=["low"])
        assert (v["low"] <= v["value"] + 1e-12).all() and (v["value"] <= v["high"] + 1e-12).all() and v["low"].ge(0).all() and v["high"].le(1).all()


def test_patients_missing_raise_unless_the_caller_says_so():
    p = films().assign(patient=None)
    for call in (ev.evaluate, ev.report, ev.aucs, ev.subgroups, ev.by_class, ev.errors):
        with pytest.raises(CourseError, match="have no patient"): call(p)
    assert "NOT purely by patient: 200 single films" in ev.report(p, threshold=.5, unknown="picture", times=50).notes[-1]
    p["study"] = [f"s{i // 4}" for i in range(200)]
    assert "50 examinations" in ev.report(p, threshold=.5, unknown="picture", times=50).notes[-1]


def test_faults_in_the_frame():
    p = films()
    with pytest.raises(CourseError, match="sum to one"): ev.checked(p.assign(p_NORMAL=p["p_NORMAL"] + .01))
    with pytest.raises(CourseError, match="1 of 200 films have no usable"): ev.checked(p.assign(p_NORMAL=[np.nan, *p["p_NORMAL"][1:]]))
    with pytest.raises(CourseError, match="every class"): ev.checked(p.drop(columns="p_NORMAL"))
    with pytest.raises(CourseError, match="known truth"): ev.checked(p.assign(label=pd.Categorical([None] * 200, ["NORMAL", "PNEUMONIA"])))
    with pytest.raises(CourseError, match="between two classes"): ev.report(films(kind="three"), threshold=.5)
    with pytest.raises(CourseError, match="have no threshold"): ev.decide(films(kind="many"), {"Mass": .5})
    with pytest.raises(CourseError, match="common confusion matrix"): ev.confusion(films(kind="many"))


def test_absent_classes_unknown_labels_and_ties_are_counted_and_said():
    many = ev.aucs(films(kind="many"))
    assert np.isnan(many.loc["Hernia", "value"]) and many.loc["Hernia", "note"] == "no film shows it" and many.loc["macro", "note"] == "mean of 2 of 3"
    assert abs(many.loc["macro", "value"] - many.loc[["Effusion", "Mass"], "value"].mean()) < 1e-12
    p = films()
    p.loc[:9, "label"] = None
    p["p_PNEUMONIA"] = p["p_PNEUMONIA"].round(1)
    p["p_NORMAL"] = 1 - p["p_PNEUMONIA"]
    notes = " ".join(ev.report(p, times=50).notes)
    assert "10 of 200 films have no label" in notes and "Tied scores" in notes and "not chosen for this model" in notes
    known = p["label"].notna()
    assert abs(ev.auc(*ev.questions(p)["PNEUMONIA"]) - metrics.roc_auc_score(p["label"][known] == "PNEUMONIA", p["p_PNEUMONIA"][known])) < 1e-12
    assert ev.confusion(p, .5).to_numpy().sum() == 190
    sick = films()
    only = ev.report(sick[sick["label"] == "PNEUMONIA"], threshold=.5, times=50)
    assert "every film shows it" in " ".join(only.notes) and only.html()


def test_perfect_separation_is_not_called_certain():
    p = films(40).assign(p_PNEUMONIA=lambda d: np.where(d["label"] == "PNEUMONIA", .9, .1), p_NORMAL=lambda d: 1 - d["p_PNEUMONIA"])
    row = ev.aucs(p).iloc[0]
    assert row["value"] == 1 and np.isnan(row["low"]) and "cannot say" in row["note"] and ev.report(p, threshold=.5, times=50).html()


def test_three_classes_agree_with_scikit_learn():
    p = films(kind="three")
    said = ev.decide(p)
    names = list(p["label"].cat.categories)
    assert (ev.confusion(p).to_numpy() == metrics.confusion_matrix(p["label"].astype(str), said.astype(str), labels=names)).all()
    theirs = metrics.classification_report(p["label"].astype(str), said.astype(str), output_dict=True)
    for c, row in ev.by_class(p).iterrows():
        for ours, key in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")): assert abs(row[ours].value - theirs[c][key]) < 1e-12
    m = ev.errors(p)
    sick = (p["label"] != "NORMAL").to_numpy()
    assert m.loc["missed", "films"] == ((said == "NORMAL").to_numpy() & sick).sum() and m.loc["wrong kind", "films"] + m.loc["missed", "films"] == (sick & (said != p["label"]).to_numpy()).sum()
    assert abs(m.loc["right, sick or healthy", "share"].value - ((said != "NORMAL").to_numpy() == sick).mean()) < 1e-12
    macro = metrics.roc_auc_score(p["label"].cat.codes, p[[f"p_{c}" for c in names]], multi_class="ovr")
    assert abs(ev.aucs(p).loc["macro", "value"] - macro) < 1e-12


def test_small_groups_are_not_spoken_of():
    p = films()
    p.loc[p.index[:5], "source"] = "C"
    g = ev.subgroups(p, threshold=.5, times=100)
    small = g[g["group"] == "C"]
    assert len(small) == 1 and np.isnan(small["value"].iloc[0]) and "too few patients" in small["note"].iloc[0]
    assert set(g["by"]) == {"age", "sex", "source", "size"}            # the view does not vary, so it is passed over
    assert g.loc[g["by"] == "size", ["group", "films"]].drop_duplicates()["films"].sum() == 200


def test_subgroups_without_size_or_age_are_quiet():
    p = films().assign(age=np.nan)
    p["height"] = p["width"] = pd.array([pd.NA] * 200, dtype="Int64")
    assert set(ev.subgroups(p, threshold=.5, times=50)["by"]) == {"sex", "source"} and ev.report(p, threshold=.5, times=50).png()


def test_no_tensorflow_and_no_matplotlib_at_import():
    code = "import sys, cxr_course.decisions; assert not {'tensorflow', 'keras', 'matplotlib'} & set(sys.modules), 'too heavy'"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
