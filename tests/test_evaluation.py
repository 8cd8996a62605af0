"""Curves, intervals, metrics and reports against independent sources: scikit-learn, SciPy, hand-worked cases,
published examples, and simulated studies."""
from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, bootstrap, norm
from sklearn import metrics

from cxr_course.core import CourseError, rng
from cxr_course.evaluation.breakdown import (
    age_bands, classification_report, metrics_by_size, error_breakdown, evaluate, subgroups,
)
from cxr_course.evaluation.mined_labels import judge_mined_labels
from cxr_course.evaluation.metrics import (
    auc_by_task, compare_models, confusion_matrix, predict_labels, binary_metrics, macro_auc,
    operating_points,
)
from cxr_course.evaluation.plots import plot_roc
from cxr_course.evaluation.predictions import (
    validate_predictions, predictions_frame, binary_tasks, read_predictions,
)
from cxr_course.evaluation.report import evaluation_report
from cxr_course.frame import make_frame
from cxr_course.stats.bootstrap import (
    bootstrap_ci, ratio_ci, bootstrap_counts, bootstrap_auc, bootstrap_average_precision,
)
from cxr_course.stats.curves import auc, average_precision, precision_recall_curve, roc_curve
from cxr_course.stats.intervals import (
    auc_ci, delong_test, delong_variance, jackknife_auc, proportion_ci, wilson_ci,
)


def films(n=200, kind="binary", patients=80, seed=0, split="test"):
    "Simulated predictions: films of one patient resemble each other."
    g = rng(seed, "test.films", kind)
    who = g.integers(0, patients, n)
    own = g.normal(size=patients)[who] * .7
    rows = dict(path=[f"f{i}.png" for i in range(n)], patient=[f"p{w}" for w in who], split=split,
                source=np.where(who % 3 == 0, "B", "A"), view="PA", height=g.integers(600, 1400, n),
                width=g.integers(800, 1800, n), age=g.integers(0, 90, n).astype(float),
                sex=np.where(who % 2, "F", "M"))
    if kind == "binary":
        y = g.random(n) < .6
        p = 1 / (1 + np.exp(-(2.2 * y - 1.1 + own + g.normal(size=n))))
        return make_frame(pd.DataFrame({**rows, "label": np.where(y, "PNEUMONIA", "NORMAL"),
                                        "p_NORMAL": 1 - p, "p_PNEUMONIA": p}), labels=["NORMAL", "PNEUMONIA"])
    if kind == "three":
        names, y = ["NORMAL", "BACTERIA", "VIRUS"], g.integers(0, 3, n)
        z = np.eye(3)[y] * 2 + g.normal(size=(n, 3)) + own[:, None] * [1, 0, -.5]
        p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
        return make_frame(pd.DataFrame({**rows, "label": np.array(names)[y],
                                        **{f"p_{c}": p[:, i] for i, c in enumerate(names)}}), labels=names)
    truth = {f: (g.random(n) < q).astype(float) for f, q in (("Effusion", .3), ("Mass", .1), ("Hernia", 0))}
    for y in truth.values(): y[g.random(n) < .05] = np.nan
    return make_frame(
        pd.DataFrame(
            {
                **rows,
                **truth,
                **{
                    f"p_{f}": 1 / (1 + np.exp(-(np.nan_to_num(y) + own + g.normal(size=n))))
                    for f, y in truth.items()
                },
            }
        ),
        findings=list(truth),
    )


@pytest.mark.parametrize("decimals", [12, 1])            # without ties and with many
@pytest.mark.parametrize("prevalence", [.5, .03])
def test_scikit_learn_agrees(decimals, prevalence):
    g = rng(1, "sklearn")
    y = (g.random(3000) < prevalence).astype(float)
    s = np.round(g.normal(size=3000) + y, decimals)
    assert abs(auc(y, s) - metrics.roc_auc_score(y, s)) < 1e-12
    assert abs(average_precision(y, s) - metrics.average_precision_score(y, s)) < 1e-12
    for ours, theirs in zip(roc_curve(y, s), metrics.roc_curve(y, s, drop_intermediate=False)):
        assert np.array_equal(ours, theirs) or np.abs(ours[1:] - theirs[1:]).max() < 1e-12
    precision, recall, cut = precision_recall_curve(y, s)
    p, r, t = metrics.precision_recall_curve(y, s)
    assert (
        np.abs(precision - p[:-1][::-1]).max() < 1e-12
        and np.abs(recall - r[:-1][::-1]).max() < 1e-12
        and np.array_equal(cut, t[::-1])
    )
    e = binary_metrics(y, s, .5)
    tn, fp, fn, tp = metrics.confusion_matrix(y, s >= .5).ravel()
    assert (e["tn"], e["fp"], e["fn"], e["tp"]) == (tn, fp, fn, tp) and abs(
        e["precision"] - metrics.precision_score(y, s >= 0.5)
    ) < 1e-12


@pytest.mark.parametrize("decimals", [12, 1])
def test_every_resampled_figure_is_the_weighted_figure(decimals):
    g = rng(2, "weights")
    keys, y = g.integers(0, 50, 400), (g.random(400) < .3).astype(float)
    s = np.round(g.normal(size=400) + y, decimals)
    codes, counts = bootstrap_counts(keys, 70, seed=3)
    area, precision = bootstrap_auc(y, s, codes, counts), bootstrap_average_precision(y, s, codes, counts)
    for j in range(70):
        assert abs(area[j] - metrics.roc_auc_score(y, s, sample_weight=counts[codes, j])) < 1e-12
        assert (
            abs(precision[j] - metrics.average_precision_score(y, s, sample_weight=counts[codes, j])) < 1e-12
        )
    left = jackknife_auc(y, s, codes, len(counts))
    for k in range(50): assert abs(left[k] - metrics.roc_auc_score(y[codes != k], s[codes != k])) < 1e-12


def test_same_seed_same_interval_and_order_of_rows_does_not_matter_much():
    p = films()
    assert evaluate(p).equals(evaluate(p)) and not evaluate(p).equals(evaluate(p, seed=1))


def test_delong_on_the_ratings_of_hanley_and_mcneil():
    ratings = np.repeat([1, 2, 3, 4, 5] * 2, [33, 6, 6, 11, 2, 3, 2, 2, 11, 33])
    est = auc_ci(np.repeat([0, 1], [58, 51]), ratings, np.arange(109), "delong")
    assert (round(est.value, 4), round(est.low, 4), round(est.high, 4)) == (.8932, .833, .9534)


def test_delong_by_its_definition_for_two_models():
    g = rng(4, "delong")
    y = np.repeat([1., 0.], [17, 23])
    scores = np.round(g.normal(size=(2, 40)) + y, 1)
    pairs = [(a[:17, None] > a[17:]) + .5 * (a[:17, None] == a[17:]) for a in scores]
    down, across = np.array([q.mean(axis=1) for q in pairs]), np.array([q.mean(axis=0) for q in pairs])
    area, cov = delong_variance(y, scores)
    assert np.allclose(area, [q.mean() for q in pairs],
                       atol=1e-14) and np.allclose(cov, np.cov(down) / 17 + np.cov(across) / 23, atol=1e-14)
    gap, p = delong_test(y, *scores)
    z = (area[0] - area[1]) / np.sqrt(cov[0, 0] + cov[1, 1] - 2 * cov[0, 1])
    assert abs(p - 2 * norm.sf(abs(z))) < 1e-12 and abs(gap.value - (area[0] - area[1])) < 1e-15


def test_a_film_copied_within_its_patient_adds_no_certainty():
    y, s, k = np.tile(rng(5, "y").random(60) < 0.5,
                      3) * 1.0, np.tile(rng(5, "s").normal(size=60), 3), np.tile(np.arange(60), 3)
    once, thrice = delong_variance(y[:60], s[:60])[1][0, 0], delong_variance(y, s, k)[1][0, 0]
    assert abs(thrice / once - 1) < 1e-9 and delong_variance(y, s)[1][0, 0] < .4 * once
    a, b = proportion_ci(y[:60] == 1, k[:60]), proportion_ci(y == 1, k)
    assert np.allclose(a[:3], b[:3])


WILSON = [(574.08, 624, .896, .939), (0, 10, 0, .278), (10, 10, .722, 1)]


@pytest.mark.parametrize("hits, n, low, high", WILSON)
def test_wilson(hits, n, low, high):
    est = wilson_ci(hits, n)
    assert abs(est.low - low) < 6e-4 and abs(est.high - high) < 6e-4


def test_wilson_solves_its_own_equation():
    z, est = norm.ppf(.975), wilson_ci(37, 61)
    for edge in (est.low, est.high):
        assert abs(abs(37 / 61 - edge) / np.sqrt(edge * (1 - edge) / 61) - z) < 1e-9


def clustered(g, patients, most=4, shift=1.3, alike=.6):
    size = g.integers(1, most + 1, patients)
    k = np.repeat(np.arange(patients), size)
    y = (g.random(patients) < .5)[k].astype(float)
    return (
        y,
        shift * y + np.sqrt(alike) * g.normal(size=patients)[k] + np.sqrt(1 - alike) * g.normal(size=len(k)),
        k,
    )


@pytest.mark.parametrize("method", ["percentile", "bca", "delong"])
def test_intervals_hold_the_truth_as_often_as_they_say(method):
    g, truth, held = rng(6, "coverage"), norm.cdf(1.3 / np.sqrt(2)), []
    for i in range(800):
        y, s, k = clustered(g, 150)
        est = auc_ci(y, s, k, method, times=400, seed=i)
        held.append(est.low <= truth <= est.high)
    assert .93 <= np.mean(held) <= .97, np.mean(held)


def test_intervals_of_a_difference_hold_the_truth():
    g, held = rng(7, "difference"), []
    for _ in range(1500):
        y, s, k = clustered(g, 120)
        t = s + g.normal(size=len(s))
        est, _ = delong_test(y, s, t, k)
        held.append(est.low <= norm.cdf(1.3 / np.sqrt(2)) - norm.cdf(1.3 / 2) <= est.high)
    assert .93 <= np.mean(held) <= .97, np.mean(held)


@pytest.mark.parametrize("truth", [.6, .9])
def test_shares_by_patient_hold_the_truth(truth):
    g, held, naive = rng(8, "share"), [], []
    for _ in range(2000):
        k = np.repeat(np.arange(100), g.integers(1, 5, 100))
        # patients differ in how easy they are
        own = g.beta(truth * 3, (1 - truth) * 3, 100)
        hit = g.random(len(k)) < own[k]
        for keys, out in ((k, held), (None, naive)):
            est = proportion_ci(hit, keys)
            out.append(est.low <= truth <= est.high)
    assert .93 <= np.mean(held) <= .97 and np.mean(naive) < .91, (np.mean(held), np.mean(naive))


def test_taking_films_for_independent_is_caught_by_the_same_test():
    g, truth, held = rng(6, "coverage"), norm.cdf(1.3 / np.sqrt(2)), []
    for _ in range(400):
        y, s, k = clustered(g, 150)
        est = auc_ci(y, s, np.arange(len(k)), "delong")
        held.append(est.low <= truth <= est.high)
    assert np.mean(held) < .92


@pytest.mark.parametrize("kind", ["binary", "three", "many"])
def test_a_report_of_each_kind_is_saved_whole(kind, tmp_path):
    p = films(kind=kind)
    r = evaluation_report(p, threshold=None if kind == "three" else .4, times=200)
    folder = r.save(tmp_path / "report")
    page, data = (folder / "report.html").read_text(), json.loads((folder / "report.json").read_text())
    assert sorted(f.name for f in folder.iterdir()) == ["report.html", "report.json", "report.png"]
    assert (
        page.count("<h1>") == 1
        and "<script" not in page
        and "http" not in page.replace("http-equiv", "")
        and "src=\"data:image/png;base64," in page
    )
    assert (
        (folder / "report.png").read_bytes()[:4] == b"\x89PNG"
        and data["images"] == 200
        and len(data["values"]) == len(r.values)
    )
    assert "<img" in r._repr_html_() and repr(r)
    with pytest.raises(CourseError, match="never overwritten"): r.save(folder)
    r.save(folder, overwrite=True)
    (folder / "mine.txt").write_text("keep me")
    with pytest.raises(CourseError, match="more than an old report"): r.save(folder, overwrite=True)


def test_every_estimate_lies_within_its_interval():
    for kind in ("binary", "three", "many"):
        v = evaluate(films(kind=kind), threshold=None if kind == "three" else 0.5,
                     times=300).dropna(subset=["low"])
        assert (
            (v["low"] <= v["value"] + 1e-12).all()
            and (v["value"] <= v["high"] + 1e-12).all()
            and v["low"].ge(0).all()
            and v["high"].le(1).all()
        )


def test_patients_missing_raise_unless_the_caller_says_so():
    p = make_frame(films().assign(patient=None, group=None))
    for call in (
        evaluate, evaluation_report, auc_by_task, subgroups, classification_report, error_breakdown,
        metrics_by_size, plot_roc,
    ):
        with pytest.raises(CourseError, match="have no patient"): call(p)
    assert (
        "NOT purely by patient: 200 single images"
        in evaluation_report(make_frame(p, unknown="image"), threshold=0.5, times=50).notes[-1]
    )
    p["study"] = [f"s{i // 4}" for i in range(200)]
    assert "50 examinations" in evaluation_report(make_frame(p, unknown="image"), threshold=0.5,
                                                  times=50).notes[-1]


def test_faults_in_the_frame():
    p = films()
    with pytest.raises(CourseError, match="sum to one"):
        validate_predictions(p.assign(p_NORMAL=p["p_NORMAL"] + .01))
    with pytest.raises(CourseError, match="1 of 200 images have no usable"):
        validate_predictions(p.assign(p_NORMAL=[np.nan, *p["p_NORMAL"][1:]]))
    with pytest.raises(CourseError, match="every class"): validate_predictions(p.drop(columns="p_NORMAL"))
    with pytest.raises(CourseError, match="known truth"):
        validate_predictions(p.assign(label=pd.Categorical([None] * 200, ["NORMAL", "PNEUMONIA"])))
    with pytest.raises(CourseError, match="between two classes"):
        evaluation_report(films(kind="three"), threshold=.5)
    with pytest.raises(CourseError, match="have no threshold"):
        predict_labels(films(kind="many"), {"Mass": .5})
    with pytest.raises(CourseError, match="common confusion matrix"): confusion_matrix(films(kind="many"))


def test_absent_classes_unknown_labels_and_ties_are_counted_and_said():
    many = auc_by_task(films(kind="many"))
    assert (
        np.isnan(many.loc["Hernia", "value"])
        and many.loc["Hernia", "note"] == "no image shows it"
        and many.loc["macro", "note"] == "mean of 2 of 3"
    )
    assert abs(many.loc["macro", "value"] - many.loc[["Effusion", "Mass"], "value"].mean()) < 1e-12
    p = films()
    p.loc[:9, "label"] = None
    p["p_PNEUMONIA"] = p["p_PNEUMONIA"].round(1)
    p["p_NORMAL"] = 1 - p["p_PNEUMONIA"]
    notes = " ".join(evaluation_report(p, times=50).notes)
    assert (
        "10 of 200 images have no label" in notes
        and "Tied scores" in notes
        and "not chosen for this model" in notes
    )
    known = p["label"].notna()
    assert (
        abs(
            auc(*binary_tasks(p)["PNEUMONIA"])
            - metrics.roc_auc_score(p["label"][known] == "PNEUMONIA", p["p_PNEUMONIA"][known])
        )
        < 1e-12
    )
    assert confusion_matrix(p, .5).to_numpy().sum() == 190
    sick = films()
    only = evaluation_report(sick[sick["label"] == "PNEUMONIA"], threshold=.5, times=50)
    assert "every image shows it" in " ".join(only.notes) and only.html()


def test_perfect_separation_is_not_called_certain():
    p = films(40).assign(p_PNEUMONIA=lambda d: np.where(d["label"] == "PNEUMONIA", 0.9, 0.1),
                         p_NORMAL=lambda d: 1 - d["p_PNEUMONIA"])
    row = auc_by_task(p).iloc[0]
    assert (
        row["value"] == 1
        and np.isnan(row["low"])
        and "cannot say" in row["note"]
        and evaluation_report(p, threshold=0.5, times=50).html()
    )


def test_three_classes_agree_with_scikit_learn():
    p = films(kind="three")
    said = predict_labels(p)
    names = list(p["label"].cat.categories)
    assert (
        confusion_matrix(p).to_numpy()
        == metrics.confusion_matrix(p["label"].astype(str), said.astype(str), labels=names)
    ).all()
    theirs = metrics.classification_report(p["label"].astype(str), said.astype(str), output_dict=True)
    for c, row in classification_report(p).iterrows():
        for ours, key in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
            assert abs(row[ours].value - theirs[c][key]) < 1e-12
    m = error_breakdown(p)
    sick = (p["label"] != "NORMAL").to_numpy()
    assert (
        m.loc["missed", "images"] == ((said == "NORMAL").to_numpy() & sick).sum()
        and m.loc["wrong kind", "images"] + m.loc["missed", "images"]
        == (sick & (said != p["label"]).to_numpy()).sum()
    )
    assert abs(m.loc["right, sick or healthy",
                     "share"].value - ((said != "NORMAL").to_numpy() == sick).mean()) < 1e-12
    macro = metrics.roc_auc_score(p["label"].cat.codes, p[[f"p_{c}" for c in names]], multi_class="ovr")
    assert abs(auc_by_task(p).loc["macro", "value"] - macro) < 1e-12


def test_small_groups_are_not_spoken_of():
    p = films()
    p.loc[p.index[:5], "source"] = "C"
    g = subgroups(p, threshold=.5, times=100)
    small = g[g["group"] == "C"]
    assert (
        len(small) == 1 and np.isnan(small["value"].iloc[0]) and "too few patients" in small["note"].iloc[0]
    )
    # the view does not vary, so it is passed over
    assert set(g["by"]) == {"age", "sex", "source", "size"}
    assert g.loc[g["by"] == "size", ["group", "images"]].drop_duplicates()["images"].sum() == 200


def test_mined_labels_by_hand():
    "Six images of three patients, in another order in the second frame; one image is in one frame only."
    said = dict(a=(1, 0), b=(0, 1), c=(0, 0), d=(1, 1), e=(0, 0), f=(0, 0))
    seen = dict(f=1., e=0., d=1., c=0., b=1., a=0., g=1.)
    who = dict(a="1", b="1", c="2", d="2", e="3", f="3", g="4")
    mined = make_frame([dict(path=f"here/{n}.png", patient=who[n], Nodule=float(x), Mass=float(y))
                        for n, (x, y) in said.items()], findings=["Nodule", "Mass"])
    read = make_frame([dict(path=f"{n}.png", patient=who[n], Lump=x) for n, x in seen.items()],
                      findings=["Lump"])
    found = judge_mined_labels(mined, read, {"Lump": ("Nodule", "Mass")}).loc["Lump"]
    # called: a, b, d; there: b, d, f
    assert (found["images"], found["patients"], found["mined"], found["radiologists"]) == (6, 3, .5, .5)
    values = [round(found[c].value, 4) for c in ("sensitivity", "specificity", "PPV", "kappa")]
    assert values == [.6667, .6667, .6667, .3333]
    read.loc[read["path"] == "b.png", "Lump"] = np.nan                # nobody answered: not counted as a no
    found = judge_mined_labels(mined, read, {"Lump": ("Nodule", "Mass")}).loc["Lump"]
    assert found["images"] == 5 and round(found["sensitivity"].value, 4) == .5


def test_intervals_of_mined_labels_are_by_patient():
    "The same images ten times over, of the same patients, teach nothing new."
    draw = np.random.default_rng(3)
    rows = [dict(path=f"{i}-{{}}.png", patient=str(i), x=float(draw.random() < .5)) for i in range(60)]
    once, often = ([dict(r, path=r["path"].format(n)) for r in rows for n in range(k)] for k in (1, 10))
    wide, same = (judge_mined_labels(make_frame([dict(r, x=r["x"] * (int(r["patient"]) % 3 > 0)) for r in f],
                                                findings=["x"]), make_frame(f, findings=["x"]),
                                     {"x": ["x"]}).loc["x", "sensitivity"] for f in (once, often))
    assert np.allclose(wide[:3], same[:3]) and wide.high - wide.low > .2


def test_mined_labels_that_cannot_be_compared_are_refused():
    frame = make_frame([dict(path=f"{i}.png", patient="1", Nodule=1.) for i in range(3)], findings=["Nodule"])
    with pytest.raises(CourseError, match="no finding 'Mass'"):
        judge_mined_labels(frame, frame, {"Nodule": ["Nodule", "Mass"]})
    with pytest.raises(CourseError, match="same name"):
        judge_mined_labels(pd.concat([frame, frame], ignore_index=True), frame, {"Nodule": ["Nodule"]})
    with pytest.raises(CourseError, match="no image is in both"):
        judge_mined_labels(frame, frame.assign(path="x" + frame["path"]), {"Nodule": ["Nodule"]})


def test_real_mined_labels_are_those_that_were_written_down(real_data, root):
    "Counted here without the library, from the table that holds both answers."
    table = next((real_data / "nih").rglob("google2019*"), None)
    if table is None: pytest.skip("no table of images that were read again")
    both = pd.read_csv(table)
    kept = json.loads((root / "nbs" / "results" / "mined_labels.json").read_text(encoding="utf-8"))["rows"]
    for row in kept:
        said = both["Finding Labels"].str.contains("|".join(row["mined_as"]))
        seen = both[row["finding"]] == "YES"
        assert row["images"] == len(both) and row["patients"] == both["Patient ID"].nunique()
        for measure, part, whole in (("sensitivity", said, seen), ("specificity", ~said, ~seen),
                                     ("PPV", seen, said)):
            value, low, high = row[measure]
            assert abs(value - (part & whole).sum() / whole.sum()) < 6e-4 and low < value < high


def test_quarters_of_size_that_round_to_the_same_pixels_are_one():
    "The report of a few images died here: '91 to 91 px' stood there twice."
    sides = [90., 91., 91., 91.2, 91.3, 95.]
    bands = age_bands(pd.DataFrame(dict(height=sides, width=sides)), "size")
    assert bands.notna().all() and bands.cat.categories.is_unique
    assert bands.value_counts().to_dict() == {"90 to 91 px": 3, "91 to 95 px": 3}
    alike = pd.DataFrame(dict(height=[90., 90.2], width=[90., 90.2]))
    assert age_bands(alike, "size").isna().all()


def test_subgroups_without_size_or_age_are_quiet():
    p = films().assign(age=np.nan)
    p["height"] = p["width"] = pd.array([pd.NA] * 200, dtype="Int64")
    assert (
        set(subgroups(p, threshold=0.5, times=50)["by"]) == {"sex", "source"}
        and evaluation_report(p, threshold=0.5, times=50).png()
    )


def imports_without(names, heavy):
    "Whether modules of the package load in a fresh process without others."
    code = f"import sys; {'; '.join('import cxr_course.' + name for name in names)}"
    code += f"; print(set({heavy!r}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip() == "set()"


def test_no_tensorflow_and_no_matplotlib_at_import():
    names = ("evaluation.thresholds", "evaluation.calibration", "evaluation.agreement")
    assert imports_without(names, ("tensorflow", "keras", "matplotlib"))


def skewed(n, decimals):
    "Numbers whose variance has a skewed sampling distribution; rounded, their resampled medians tie."
    return np.round(rng(20, "bca").exponential(size=n) ** 1.5, decimals)


@pytest.mark.parametrize("statistic, decimals", [(np.var, 12), (np.median, 1), (np.mean, 12)])
@pytest.mark.parametrize("level", [.95, .8])
def test_bca_is_that_of_scipy(statistic, decimals, level):
    "Same resamples and jackknife, same interval; without the acceleration or the ties it moves by 3 to 40 %."
    x = skewed(60, decimals)
    theirs = bootstrap((x,), statistic, method="BCa", n_resamples=1999, confidence_level=level,
                       rng=np.random.default_rng(1))
    left = np.array([statistic(np.delete(x, i)) for i in range(len(x))])
    ours = bootstrap_ci(float(statistic(x)), theirs.bootstrap_distribution, left, level)
    assert (
        abs(ours.low - theirs.confidence_interval.low) < 1e-9
        and abs(ours.high - theirs.confidence_interval.high) < 1e-9
    )
    plain = bootstrap_ci(float(statistic(x)), theirs.bootstrap_distribution, None, level)
    assert abs(plain.low - ours.low) + abs(plain.high - ours.high) > .03 * (ours.high - ours.low)


@pytest.mark.parametrize("decimals", [12, 1])
def test_the_bca_interval_of_an_auc_is_that_of_scipy(decimals):
    g = rng(21, "bca.auc")
    y = (np.arange(80) < 14).astype(float)
    s = np.round(g.exponential(size=80) + 1.2 * y, decimals)
    theirs = bootstrap((np.arange(80),), lambda i: auc(y[i], s[i]), method="BCa", n_resamples=999,
                       vectorized=False, rng=np.random.default_rng(2))
    ours = bootstrap_ci(auc(y, s), theirs.bootstrap_distribution, jackknife_auc(y, s, np.arange(80), 80))
    assert (
        abs(ours.low - theirs.confidence_interval.low) < 1e-9
        and abs(ours.high - theirs.confidence_interval.high) < 1e-9
    )


def test_fewer_than_twenty_usable_studies_give_no_interval():
    usable = np.linspace(.6, .9, 20)
    gone = np.full(980, np.nan)
    assert (
        np.isnan(bootstrap_ci(0.8, np.r_[usable[:19], gone]).low)
        and "too few" in bootstrap_ci(0.8, np.r_[usable[:19], gone]).note
    )
    kept = bootstrap_ci(.8, np.r_[usable, gone])
    assert .6 <= kept.low < kept.high <= .9 and "980 of 1000" in kept.note
    assert np.isnan(bootstrap_ci(float("nan"), usable).value)


@pytest.mark.parametrize("hits, low, high", [(20, .566, 1), (0, 0, .434)])
def test_all_or_none_are_counted_by_patient(hits, low, high):
    "Twenty images of five patients are worth five: Wilson for 5 of 5, not for 20 of 20 (from .839)."
    hit = np.arange(20) < hits
    est = proportion_ci(hit, np.repeat(list("abcde"), 4))
    assert (round(est.low, 3), round(est.high, 3)) == (low, high)
    theirs = binomtest(5 * hits // 20, 5).proportion_ci(method="wilson")
    assert abs(est.low - theirs.low) < 1e-12 and abs(est.high - theirs.high) < 1e-12
    # nearly all of them one patient's: worth less still
    unequal = proportion_ci(hit, np.repeat(list("abcde"), [16, 1, 1, 1, 1]))
    assert unequal.high - unequal.low > est.high - est.low
    single = binomtest(hits, 20).proportion_ci(method="wilson")
    for keys in (None, np.arange(20)):
        assert np.allclose(proportion_ci(hit, keys)[1:3], [single.low, single.high], atol=1e-12)


def test_a_share_needs_a_patient_for_every_image():
    with pytest.raises(CourseError, match="one patient an image"): proportion_ci(np.ones(20), range(19))
    assert np.isnan(proportion_ci([]).value) and proportion_ci([]).note == "nothing to count"


@pytest.mark.parametrize("call, words", [
    (lambda y, s: auc(y, s[1:]), "one value an image"),
    (lambda y, s: auc(s, y), "truth, then score"),
    (lambda y, s: delong_test(y, s, s[1:]), "on the same images"),
    (lambda y, s: delong_test(y, s, s, range(3)), "one value an image"),
    (lambda y, s: delong_test(s, y, s), "truth, then score"),
    (lambda y, s: delong_test(films(), y, s), "compare_models"),
    (lambda y, s: auc_ci(y, s, range(3)), "one value an image"),
    (lambda y, s: operating_points(y, s, [.5], range(3)), "one value an image"),
    (lambda y, s: ratio_ci(y, s, range(3)), "one value an image"),
])
def test_arrays_that_do_not_belong_together_are_refused_in_words(call, words):
    y, s = np.array([1., 0, 1, 0, 1]), np.array([.9, .8, .7, .2, .1])
    with pytest.raises(CourseError, match=words): call(y, s)


def test_models_of_one_class_are_not_compared():
    gap, p = delong_test(np.ones(5), np.arange(5.), np.arange(5.))
    assert np.isnan(gap.value) and gap.note == "every image shows it" and np.isnan(p)


@pytest.mark.parametrize("kind", ["binary", "three", "many"])
def test_frames_are_compared_image_by_image(kind):
    one, g = films(kind=kind), rng(22, "compare")
    columns = [c for c in one if c.startswith("p_")]
    p = one[columns].to_numpy() ** .5 * g.uniform(.5, 1, (200, len(columns)))
    other = one.assign(**dict(zip(columns, (p if kind == "many" else p / p.sum(axis=1, keepdims=True)).T)))
    found = compare_models(one, other.sample(frac=1, random_state=1))
    for name, (y, s) in binary_tasks(one).items():
        gap, chance = delong_test(y, s, other[f"p_{name}"].to_numpy(), one["patient"])
        assert np.allclose(found.loc[name, ["value", "low", "high", "p"]].astype(float), [*gap[:3], chance],
                           atol=1e-12, equal_nan=True)
    with pytest.raises(CourseError, match="1 images are only in the first, 0"):
        compare_models(one, other.iloc[1:])
    with pytest.raises(CourseError, match="by their column `path`"):
        compare_models(one, other.drop(columns="path"))
    with pytest.raises(CourseError, match="by their column `path`"):
        compare_models(one, other.assign(path="x"))


def test_frames_of_other_questions_or_other_truths_are_not_compared():
    with pytest.raises(CourseError, match="same question"): compare_models(films(), films(kind="three"))
    turned = films().assign(
        label=lambda d: d["label"]
        .cat.rename_categories({"NORMAL": "PNEUMONIA", "PNEUMONIA": "NORMAL"})
        .cat.reorder_categories(["NORMAL", "PNEUMONIA"])
    )
    with pytest.raises(CourseError, match="agree on the truth of PNEUMONIA"): compare_models(films(), turned)


def test_one_mean_auc_for_every_kind():
    for kind in ("binary", "three", "many"):
        p = films(kind=kind)
        assert abs(macro_auc(p) - auc_by_task(p, times=50)["value"].iloc[-1]) < 1e-12
    sick = films()[lambda d: d["label"] == "PNEUMONIA"]
    assert np.isnan(macro_auc(sick))


def test_predictions_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression
    g = rng(23, "sklearn.predictions")
    x, who = g.normal(size=(300, 4)), g.integers(0, 90, 300)
    for k, names in ((2, ["NORMAL", "PNEUMONIA"]), (3, ["NORMAL", "BACTERIA", "VIRUS"])):
        y = (x[:, 0] + g.normal(size=300) > 0).astype(int) + (k == 3) * (x[:, 1] > 0)
        p = LogisticRegression().fit(x, y).predict_proba(x)
        made = predictions_frame(y, p, names=names, patients=who)
        theirs = metrics.roc_auc_score(y,
                                       p[:, 1]) if k == 2 else metrics.roc_auc_score(y, p, multi_class="ovr")
        assert (
            abs(macro_auc(made) - theirs) < 1e-12
            and abs(
                evaluate(made, times=50).set_index(["of", "metric"]).loc[("all", "accuracy"), "value"]
                - (p.argmax(axis=1) == y).mean()
            )
            < 0.01
        )
        assert evaluation_report(made, threshold=.5 if k == 2 else None, times=50).html()
        for truth in (
            np.array(names)[y], list(np.array(names)[y]), pd.Series(y),
            pd.Series(np.array(names)[y]).astype("category"), y[:, None], y.astype(float),
        ):
            assert predictions_frame(truth, p, names=names, patients=who).equals(made)
    one = predictions_frame(y > 1, p[:, 2], names=["other", "VIRUS"], patients=who)
    assert np.allclose(one["p_other"], 1 - p[:, 2]) and one["label"].value_counts()["VIRUS"] == (y > 1).sum()


class Tensor:
    "What a tensor of another library shows of itself: numbers only after `detach` and `cpu`."
    def __init__(self, values, steps=("detach", "cpu")):
        self.values, self.steps = np.asarray(values, "float32"), steps
    def detach(self): return Tensor(self.values, self.steps[1:])
    def cpu(self): return Tensor(self.values, self.steps[1:])
    def __array__(self, dtype=None, copy=None):
        if self.steps: raise TypeError("still on the device")
        return self.values


def test_predictions_of_another_library_and_findings_with_gaps():
    g = rng(24, "tensor")
    truth = np.where(g.random((200, 3)) < .1, np.nan, g.random((200, 3)) < .3)
    p = g.random((200, 3)).astype("float32")
    made = predictions_frame(Tensor(truth), Tensor(p), names=["Effusion", "Mass", "Hernia"],
                             patients=range(200), about={"age": [40.0] * 200, "smoker": [1] * 200})
    # a column about the patient is no finding
    assert list(binary_tasks(made)) == ["Effusion", "Mass", "Hernia"] and made["smoker"].sum() == 200
    known = ~np.isnan(truth[:, 0])
    assert (
        abs(auc(*binary_tasks(made)["Effusion"]) - metrics.roc_auc_score(truth[known, 0], p[known, 0])) < 1e-6
    )
    alone = predictions_frame(truth[:, 0], p[:, 0], names=["Effusion"], patients=range(200))
    assert evaluation_report(alone, threshold=0.5,
                             times=50).html() and list(binary_tasks(alone)) == ["Effusion"]
    assert (
        evaluate(alone, times=50)["of"].unique().tolist() == ["Effusion"]
        and evaluation_report(alone, times=50).sentences
    )


@pytest.mark.parametrize("change, words", [
    (dict(truth=[0, 1, 2]), "none of the classes"),
    (dict(truth=["N", "P", "Q"]), "none of the classes"),
    (dict(truth=[0, 1]), "truth 2, probabilities 3"),
    (dict(truth=[None] * 3), "known truth"),
    (dict(probabilities=[.1, .2, 1.2]), "no usable probability"),
    (dict(probabilities=[.1, .2, np.nan]), "no usable probability"),
    (dict(probabilities=[[.5, .6]] * 3), "sum to one"),
    (dict(probabilities=[[.5, .3, .2]] * 3), "2 names need 2 columns"),
    (dict(names=["N", "P", "Q"]), "3 names need 3 columns"),
    (dict(patients=["a", "b"]), "patients 2"),
    (dict(paths=["a"]), "paths 1"),
    (dict(about={"age": [1]}), "about 1"),
    (dict(truth=np.eye(3)[:, :2] + .5), "must be 1, 0 or missing"),
    (dict(truth=np.eye(3)), "2 findings need 2 columns"),
])
def test_predictions_that_cannot_be_are_refused_in_words(change, words):
    given = dict(truth=[0, 1, 0], probabilities=[.1, .9, .4], names=["N", "P"]) | change
    if np.ndim(given["truth"]) == 2: given["probabilities"] = [[.5, .5]] * 3
    with pytest.raises(CourseError, match=words):
        predictions_frame(given.pop("truth"), given.pop("probabilities"), **given)


ALL_BUT = ["path", "split", "view", "source", "height", "width"]


@pytest.mark.parametrize("lacking", [["path"], ["patient", "group"], ["split"], ["height", "width"], ALL_BUT])
def test_frames_that_lack_columns_are_told_so_or_do_without(lacking):
    p = films().drop(columns=lacking)
    if "patient" in lacking:
        for call in (
            evaluate, evaluation_report, auc_by_task, subgroups, classification_report, error_breakdown,
            plot_roc,
        ):
            with pytest.raises(CourseError, match="no column `patient`"): call(p)
        return
    assert evaluation_report(p, threshold=.5, times=50).html()
    with pytest.raises(CourseError, match="no usable probability"):
        validate_predictions(p.assign(p_NORMAL=2.))


def test_a_file_from_any_program(tmp_path):
    p = films()
    for sep in (",", ";", "\t"):
        p[["path", "patient", "label", "age", "p_NORMAL",
           "p_PNEUMONIA"]].to_csv(tmp_path / "ours.csv", index=False, sep=sep)
        read = read_predictions(tmp_path / "ours.csv")
        assert (
            auc_by_task(read, times=50).equals(auc_by_task(p, times=50))
            and read["age"].tolist() == p["age"].tolist()
        )
    theirs = pd.DataFrame(dict(pid=[f"{i:03}" for i in range(200)],
                               dx=(p["label"] == "PNEUMONIA").astype(int), score=p["p_PNEUMONIA"]))
    theirs.to_csv(tmp_path / "theirs.csv", index=False)
    words = dict(names=["NORMAL", "PNEUMONIA"], columns={"pid": "patient", "dx": "label",
                                                         "score": "p_PNEUMONIA"})
    read = read_predictions(tmp_path / "theirs.csv", **words)
    assert read["patient"].iloc[7] == "007" and abs(macro_auc(read) - macro_auc(p)) < 1e-12
    many = films(kind="many")
    many[["path", "patient", "Effusion", "Mass", "p_Effusion",
          "p_Mass"]].to_csv(tmp_path / "many.csv", index=False)
    read = read_predictions(tmp_path / "many.csv")
    assert list(binary_tasks(read)) == ["Effusion",
                                     "Mass"] and read["Mass"].isna().sum() == many["Mass"].isna().sum()
    for name, change, match in (
        ("theirs.csv", dict(columns=None), "probability for every name"),
        ("theirs.csv", dict(columns={"score": "p_PNEUMONIA"}), "does not give the truth"),
        ("none.csv", {}, "cannot be read"),
    ):
        with pytest.raises(CourseError, match=match): read_predictions(tmp_path / name, **words | change)
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "image.csv").write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff\xfe")
    for name in ("empty.csv", "image.csv"):
        with pytest.raises(CourseError): read_predictions(tmp_path / name)


def test_statistics_know_nothing_of_evaluation_and_evaluation_nothing_of_networks():
    above = ("cxr_course.evaluation", "cxr_course.evaluation.predictions", "cxr_course.evaluation.metrics")
    assert imports_without(("stats.intervals", "stats.bootstrap", "stats.curves"), above)
    judging = ("thresholds", "calibration", "report", "rare_findings")
    names = [*(f"evaluation.{name}" for name in judging), "models.finding_weights"]
    assert imports_without(names, ("tensorflow", "keras", "matplotlib", "sklearn"))
