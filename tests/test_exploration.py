"""Data exploration: odd frames, other formats, broken writes, real sets."""
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import binomtest

from cxr_course.core import CourseError, rng
from cxr_course.data import shortcuts as shortcuts_module
from cxr_course.data import exploration_page as exploration_page_module
from cxr_course.data.exploration import (
    cooccurrence, count_images, image_features, prevalence, finding_shares, target_of,
)
from cxr_course.data.exploration_page import write_overview
from cxr_course.data.exploration_plots import (
    plot_cooccurrence, plot_counts, plot_patients, plot_prevalence, plot_shares, plot_shortcuts,
)
from cxr_course.data.image_plots import plot_average, plot_brightness, plot_sizes, show_classes
from cxr_course.data.loading import load_dataset
from cxr_course.data.shortcuts import find_shortcuts, widened_interval
from cxr_course.frame import make_frame, regroup


def people(n=120, seed=0, **columns):
    "A frame without files: n patients, one to four images each; columns: f(generator, labels, patients)."
    g = rng("people", seed)
    who = np.repeat(np.arange(n), g.integers(1, 5, n))
    label = np.where(g.random(n) < .5, "ill", "healthy")[who]
    return make_frame(pd.DataFrame(dict(path=[f"{i}.png" for i in range(len(who))],
                                        patient=[f"p{w}" for w in who], split="train", label=label,
                                        **{k: f(g, label, who) for k, f in columns.items()})),
                      ["healthy", "ill"])


@pytest.fixture
def drawn(tmp_path):
    "Eighty small noisy pictures; the ill ones have a white spot in the top left corner."
    rows = []
    for i in range(80):
        x = rng("drawn", i).integers(60, 190, (40, 48)).astype(np.uint8)
        if i % 2: x[1:6, 1:6] = 255
        Image.fromarray(x).save(tmp_path / f"{i}.png")
        rows.append(dict(path=str(tmp_path / f"{i}.png"), patient=f"p{i}",
                         split=("train", "test")[i % 4 == 0], label=("ok", "ill")[i % 2], height=40,
                         width=48))
    return make_frame(rows, ["ok", "ill"])


def single(y, copies=1):
    "A frame of findings: y by patient, each patient's image so many times."
    return make_frame([dict(path=f"{i}-{k}.png", patient=str(i), A=float(v)) for i, v in enumerate(y)
                       for k in range(copies)], findings=["A"])


@pytest.mark.parametrize("k, n", [(0, 40), (1, 7), (20, 40), (40, 40), (3, 300)])
def test_prevalence_is_wilson_when_every_patient_has_one_film(k, n):
    want = binomtest(k, n).proportion_ci(method="wilson")
    got = prevalence(single([1] * k + [0] * (n - k))).iloc[0]
    assert got["share"] == k / n and np.allclose(got[["low", "high"]].astype(float), (want.low, want.high),
                                                 atol=0.03 if n < 10 else 0.01)


def test_a_film_copied_ten_times_teaches_nothing_new():
    y = np.arange(60) < 12
    once, often = (prevalence(single(y, copies))[["share", "low", "high"]].to_numpy(float)
                   for copies in (1, 10))
    assert np.allclose(once, often, atol=.005)
    unknown = make_frame(single(y).assign(B=None), findings=["A", "B"])
    assert prevalence(unknown).loc[1, ["share", "low", "high"]].isna().all()


def test_nobody_has_it_and_patients_count_once():
    "Forty images of ten patients, none positive: the interval must be that of ten, not of forty."
    few, many = (prevalence(single(np.zeros(10), copies)).loc[0, "high"] for copies in (4, 1))
    assert few == pytest.approx(many, abs=.03) and few > .25


def test_the_interval_is_widened_by_nadeau_and_bengio():
    again = np.r_[np.linspace(.5, .8, 301), np.nan]
    low, high = widened_interval(.65, again)
    # (1/5 + 1/4) / (1/5) = 1.5 squared
    assert (low, high) == pytest.approx((.65 - 1.5 * .1425, .65 + 1.5 * .1425))
    assert widened_interval(.9, again + .25) == pytest.approx((.9 - 1.5 * .1425, 1))
    factor = np.sqrt((1 / 10 + 1 / 9) * 10)
    assert widened_interval(.65, again, folds=10)[0] == pytest.approx(.65 - factor * .1425)


def test_the_interval_of_a_shortcut_is_the_widened_one(monkeypatch):
    f = people(60, age=lambda g, y, w: g.uniform(1, 6, w.max() + 1)[w])
    wide = find_shortcuts(f).iloc[0]
    monkeypatch.setattr(shortcuts_module, "widened_interval", lambda value, again,
                        **k: np.percentile(again, [2.5, 97.5]))
    plain = find_shortcuts(f).iloc[0]
    assert (wide[["low", "high"]] - wide["auc"]).to_numpy(float) == pytest.approx(
        1.5 * (plain[["low", "high"]] - plain["auc"]).to_numpy(float)
    )


def test_counts_with_unknown_labels_splits_and_patients():
    f = people(10)
    f.loc[0, ["label", "split", "patient"]] = None
    f = regroup(f, "image")
    n = count_images(f)
    assert n.loc["no split", ["healthy", "ill", "images", "patients", "nobody"]].tolist() == [0, 0, 1, 0, 1]
    assert n.loc["all", "images"] == len(f) and n.loc["all", ["healthy", "ill"]].sum() == len(f) - 1
    assert prevalence(f)["images"].tolist() == [len(f) - 1] * 2


def test_findings_keep_their_unknowns():
    f = make_frame([dict(path=f"{i}.png", patient=str(i), A=a, B=b) for i,
                    (a, b) in enumerate([(1, 1), (1, np.nan), (0, 1), (np.nan, 0), (0, 0)])],
                   findings=["A", "B"])
    assert cooccurrence(f).to_numpy().tolist() == [[2, 1], [1, 2]]
    assert prevalence(f)[["images", "positive"]].to_numpy().tolist() == [[4, 2], [4, 2]]
    assert target_of(f)[0].tolist()[:3] == [1, 1,
                                            1] and np.isnan(target_of(f)[0][3]) and target_of(f)[0][4] == 0
    assert finding_shares(f.assign(view=["PA", "PA", "AP", "AP", None]),
                  "view")["value"].tolist() == ["PA", "AP", "missing"]


def test_unknown_words_are_refused():
    with pytest.raises(CourseError, match="unknown class or finding 'TB'"):
        find_shortcuts(people(20), target="TB")
    with pytest.raises(CourseError, match="no column 'ward'"): finding_shares(people(20), "ward")
    with pytest.raises(CourseError, match="nothing to try"): find_shortcuts(people(40))
    with pytest.raises(CourseError, match="no image of this frame has a size"): plot_sizes(people(20))
    with pytest.raises(CourseError, match="have no patient"):
        find_shortcuts(regroup(people(40).assign(patient=None, age=3.)))


def test_finds_a_tied_source_and_a_tied_age_and_nothing_else():
    f = people(150, source=lambda g, y, w: np.where((y == "ill") ^ (g.random(len(y)) < 0.1), "X", "Y"),
               age=lambda g, y, w: (g.uniform(2, 5, w.max() + 1)[w] + 3 * (y == "ill")).round(1),
               view=lambda g, y, w: g.choice(["AP", "PA"], len(y)), height=lambda g, y,
               w: g.integers(200, 300, len(y)), width=lambda g, y, w: g.integers(200, 300, len(y)))
    t = find_shortcuts(f).set_index("shortcut")
    assert t["suspicious"].to_dict() == {"age": True, "source": True, "view": False, "size": False,
                                         "aspect": False}
    assert t.loc["source",
                 "verdict"].startswith("Suspicious") and t.loc["view", "verdict"].startswith("Quiet")
    assert .85 < t.loc["source", "auc"] < .95


def test_rarely_cries_wolf():
    noise = dict(age=lambda g, y, w: g.uniform(1, 6, w.max() + 1)[w], height=lambda g, y,
                 w: g.integers(200, 300, w.max() + 1)[w], width=lambda g, y,
                 w: g.integers(200, 300, w.max() + 1)[w], sex=lambda g, y,
                 w: g.choice(["F", "M"], w.max() + 1)[w])
    t = pd.concat([find_shortcuts(people(80, seed=i, **noise)) for i in range(12)])
    assert t["suspicious"].mean() <= .05 and ((t["low"] <= .5) & (t["high"] >= .5)).mean() > .85


def test_unknown_age_is_a_witness_too():
    f = people(100, age=lambda g, y, w: np.where(y == "ill", g.uniform(20, 60, len(y)), np.nan))
    assert find_shortcuts(f).set_index("shortcut").loc["age", "auc"] > .99


def test_the_same_answer_twice_and_with_any_number_of_threads(drawn):
    a, b = image_features(drawn, workers=1), image_features(drawn, workers=4)
    assert all(np.array_equal(getattr(a, k), getattr(b, k))
               for k in ("mean", "grain", "hist", "corners", "border", "small"))
    pd.testing.assert_frame_equal(find_shortcuts(drawn, a), find_shortcuts(drawn, b))
    assert find_shortcuts(drawn, a).set_index("shortcut").loc["corners", "suspicious"]


def test_glances_follow_the_frame(drawn):
    g, some = image_features(drawn), drawn.sample(30, random_state=1)
    assert list(g.of(some).path) == some["path"].tolist()
    assert len(g.of(pd.concat([some, some]))) == 60
    assert g.corners[1, 0].max() > g.corners[0, 0].max() == g.corners[0].max() or g.corners[1, 0].max() > 220


@pytest.mark.parametrize("how", ["8 bit", "16 bit", "colour", "alpha", "palette", "one pixel", "dicom"])
def test_reads_what_chapter_02_opens(tmp_path, how):
    x = np.linspace(0, 255, 40 * 30).reshape(40, 30).astype(np.uint8)
    im, path = Image.fromarray(x), tmp_path / "a.png"
    if how == "dicom":
        pydicom = pytest.importorskip("pydicom")
        from cxr_course.phantom.files import write_dataset
        from cxr_course.phantom.world import population
        path = sorted(write_dataset(population(2, images=(2, 2), pixels=64), tmp_path / "d",
                                    "dicom").rglob("*.dcm"))[1]
        assert pydicom.dcmread(path).PhotometricInterpretation == "MONOCHROME1"
        seen = image_features(pd.DataFrame({"path": [str(path)]}))
        assert seen.small[0][24, 24] > seen.small[0][24, 12]                       # spine brighter than lung
        return
    {"16 bit": lambda: Image.fromarray(x.astype(np.uint16) * 257), "colour": lambda: im.convert("RGB"),
     "alpha": lambda: im.convert("RGBA"), "palette": lambda: im.convert("P"),
     "one pixel": lambda: im.resize((1, 1))}.get(how, lambda: im)().save(path)
    assert image_features(pd.DataFrame({"path": [str(path)]})).mean[0] == pytest.approx(.5, abs=.02)


def test_a_damaged_film_is_named_or_skipped(drawn, tmp_path):
    Path(drawn["path"][3]).write_bytes(Path(drawn["path"][3]).read_bytes()[:60])
    with pytest.raises(CourseError, match="3.png"): image_features(drawn)
    g = image_features(drawn, skip_bad=True)
    assert np.isnan(g.mean[3]) and find_shortcuts(drawn, g)["images"].eq(79).all()
    with pytest.raises(CourseError, match="3.png"): write_overview(drawn, tmp_path / "page")
    assert not [p for p in tmp_path.iterdir() if "page" in p.name]


def test_every_plot_is_a_figure_and_none_is_left_open(drawn):
    import matplotlib.pyplot as plt
    g, before = image_features(drawn), len(plt.get_fignums())
    both = make_frame(drawn.drop(columns="label").assign(Edema=(drawn["label"] == "ill").astype(float),
                                                         Mass=0.0), findings=["Edema", "Mass"])
    found = find_shortcuts(drawn, g)
    figures = [plot_counts(drawn), plot_counts(both), plot_patients(drawn), plot_prevalence(prevalence(both)),
               plot_cooccurrence(both), plot_sizes(drawn), plot_sizes(both, by=["split"]),
               plot_brightness(both, g), plot_shares(drawn.assign(view=["AP", "PA"] * 40)),
               plot_shortcuts(found), plot_shortcuts({"a": found, "b": found})]
    assert all(isinstance(f, Figure) for f in figures) and len(plt.get_fignums()) == before
    assert all(ax.get_xlabel() or ax.get_ylabel() or ax.get_title(loc="left") for f in figures
               for ax in f.axes)
    assert plot_average(drawn, g)._repr_jpeg_() and show_classes(drawn, each=2)._repr_jpeg_()


def test_the_page_needs_nothing_but_itself(drawn, tmp_path):
    page = write_overview(drawn.assign(view=["AP", "PA"] * 40), tmp_path / "page", title="Eighty <b> images")
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"""(?:src|href)=["'](?!data:)""",
                      text) == [] and "color-scheme: light dark" in text and "Eighty &lt;b&gt; images" in text
    assert "prefers-color-scheme: dark" in text
    assert (
        'class="alarm"' in text
        and "corner patches" in text
        and text.count("<figure>") == text.count("<h2") >= 8
    )
    assert pd.read_csv(page.parent / "shortcuts.csv").set_index("shortcut").loc["corners", "suspicious"]
    with pytest.raises(CourseError, match="never overwritten"): write_overview(drawn, tmp_path / "page")


def test_the_page_says_when_nobody_is_known(drawn, tmp_path):
    text = write_overview(make_frame(drawn.assign(patient=None, group=None)),
                    tmp_path / "page").read_text(encoding="utf-8")
    assert "or else the image, counts as one" in text and "80 images without one" in text
    few = write_overview(drawn.head(6), tmp_path / "few").read_text(encoding="utf-8")
    assert "No search for shortcuts: too few patients" in few


def test_a_killed_page_leaves_nothing(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(exploration_page_module, "plot_average",
                        lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): write_overview(drawn, tmp_path / "page")
    assert not [p for p in tmp_path.iterdir() if "page" in p.name]


def test_only_an_impossible_search_leaves_a_page_without_shortcuts(drawn, tmp_path, monkeypatch):
    "Any other error, a CourseError too, is told and not hidden in a footnote of the page."
    with pytest.raises(CourseError, match="unknown class or finding 'TB'"):
        write_overview(drawn, tmp_path / "a", pixels=False, target="TB")
    def wrong(*a): raise CourseError("a mistake of ours")
    monkeypatch.setattr(exploration_page_module, "find_shortcuts", wrong)
    with pytest.raises(CourseError, match="a mistake of ours"):
        write_overview(drawn, tmp_path / "b", pixels=False)
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".png"]


def test_columns_beside_the_findings_are_no_findings():
    rows = [dict(path=f"{i}.png", patient=str(i), Effusion=i % 2, smoker=i % 3 == 0, pacemaker=0,
                 weight=50 + i) for i in range(40)]
    f = make_frame(rows, findings=["Effusion"])
    assert list(prevalence(f)["finding"]) == ["Effusion"] and list(cooccurrence(f)) == ["Effusion"]
    assert count_images(f).columns.tolist() == ["Effusion", "images", "patients",
                                          "nobody"] and finding_shares(f, "weight")["images"].sum() == 40


def test_importing_is_light():
    done = subprocess.run([sys.executable, "-c",
                           "import sys, cxr_course.data.exploration; print({m.split('.')[0] for m "
                           "in sys.modules} & {'tensorflow', 'sklearn', 'matplotlib', 'joblib'})"],
                          capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_real_size_shortcut(real_data):
    f = load_dataset(real_data / "kaggle_full_size" / "chest_xray", unknown="image")
    t = find_shortcuts(f, image_features(f)).set_index("shortcut")
    assert (
        t.loc["size", "suspicious"]
        and t.loc["size", "auc"] > 0.85
        and abs((f["height"] / f["width"]).mean() - 0.72) < 0.02
    )


def test_real_children_among_adults(real_data):
    root = real_data / "covid_qu_ex_layout"
    adults = load_dataset(root, classes=2)
    adults = adults.loc[adults["label"] == "Normal", "path"].tolist()
    f = make_frame(
        [
            dict(path=str(p), label="child")
            for p in sorted((root / "confound_paediatric_normals").glob("*.png"))
        ]
        + [dict(path=p, label="other") for p in adults],
        ["other", "child"],
        unknown="image",
    )
    t = find_shortcuts(f, image_features(f)).set_index("shortcut")
    assert t.loc[["grain", "border", "corners"], "suspicious"].all() and t.loc["border", "auc"] > .95


def test_the_whole_label_table_in_seconds(real_data):
    f = load_dataset(real_data / "nih" / "labels" / "Data_Entry_2017_v2020.csv.gz")
    start = time.perf_counter()
    p, n = prevalence(f).set_index("finding"), cooccurrence(f)
    assert (
        time.perf_counter() - start < 10
        and len(f) == 112120
        and p.loc["Pneumonia", "positive"] == n.loc["Pneumonia", "Pneumonia"] == 1431
    )
    assert find_shortcuts(f,
                     target="Edema").set_index("shortcut").loc["view",
                                                               "auc"] == pytest.approx(0.744, abs=0.02)
