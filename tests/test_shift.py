"""Elsewhere: images covered exactly, sources left out wholly, and a monitor that keeps its promise."""
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("keras")
from sklearn import metrics

from cxr_course.core import CourseError, rng
from cxr_course.data.building import build_store
from cxr_course.data.loading import load_dataset
from cxr_course.data.splits import hold_out, leakage
from cxr_course.frame import Task, groups
from cxr_course.models.cnn import CNNSpec, build_cnn
from cxr_course.phantom.world import draw_image, population
from cxr_course.shift.interventions import (
    IntervenedStore, balance_sources, border_cropped, intervene, leave_source_out, lung_masks,
    source_probe,
)
from cxr_course.shift.monitor import compare_images, load_arrivals, monitor
from cxr_course.shift.trials import intervention_effects, metrics_per_split, shortcut_trial
from cxr_course.stats.two_samples import ks_test, mmd_test
from cxr_course.training.fit import fit
from cxr_course.training.reference import Embedding, load_reference, write_reference
from cxr_course.training.run import load_run
from cxr_course.training.scores import predict_split

SPEC = CNNSpec((8, 8), (), padding="same", stride=2, last_pool=False, head="gap")


@pytest.fixture(scope="module")
def films(): return load_dataset("sample-covid", classes=2)


@pytest.fixture(scope="module")
def store(films): return build_store(hold_out(films, .3), (32, 32))


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    made = fit(build_cnn(SPEC, (32, 32, 1)), store, run=tmp_path_factory.mktemp("shift") / "run", epochs=1,
               optimizer="adam")
    if not (made.folder / "reference.npz").exists():
        write_reference(made.folder, made.model, store, made.card)
    return made


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    "The same run, which has learned from none of these films: most tests look at all of them."
    copy = tmp_path_factory.mktemp("forgetful") / "run"
    shutil.copytree(trained.folder, copy)
    pd.read_csv(copy / "images.csv").head(0).to_csv(copy / "images.csv", index=False)
    return load_run(copy)


def cloud(patients, films=1, shift=0., seed=0, own=1.):
    "Points (n, 5) of patients, each with films near each other, and the patients' names."
    g = rng("cloud", patients, films, seed)
    middle = np.repeat(g.normal(size=(patients, 5)) * own, films, axis=0)
    return middle + g.normal(size=middle.shape) * (1 - 0.9 * (own > 1)) + shift, np.repeat(
        [f"{seed}-{i}" for i in range(patients)], films
    )


def test_masks_cover_exactly(store):
    masks = lung_masks(store).take() > 127
    assert (
        not intervene(store, "lungs only").take()[~masks].any()
        and not intervene(store, "lungs blacked out").take()[masks].any()
    )
    assert (intervene(store, "lungs only").take()[masks] == store.take()[masks]).all()


def test_masks_follow_their_films_under_another_frame(store):
    through = intervene(store, "lungs only")
    turned = store.frame.iloc[::-3].reset_index(drop=True)
    assert (through.using(turned).take() == through.take()[::-3]).all()
    assert (
        through.using(turned).array("train")
        == through.using(turned).array()[through.using(turned).rows("train")]
    ).all()


def test_views_without_masks(store):
    border, centre = intervene(store, "border only").take(), intervene(store, "centre blacked out").take()
    assert (
        not border[:, 8:-8, 8:-8].any()
        and (border[:, :4] == store.take()[:, :4]).all()
        and not centre[:, 12:-12, 12:-12].any()
    )
    for view in ("marker erased", "cropped"): assert intervene(store, view).take().shape == store.take().shape
    assert (intervene(store, "marker erased").take() <= store.take()).all()


def test_the_crop_has_no_room_for_letters():
    plan = population(3, kind="covid", images=(1, 1), pixels=96, hospitals=("A",))
    taken = lambda letter: np.stack([(draw_image(r, (96, 96)) * 255).astype(np.uint8)
                                     for r in plan.assign(marker=letter).to_dict("records")])
    assert (taken("R") != taken("AP")).any() and (
        border_cropped(taken("R")) == border_cropped(taken("AP"))
    ).all()


def test_no_masks_is_said():
    plain = build_store(load_dataset("sample").head(4), (32, 32))
    with pytest.raises(CourseError, match="no lung mask"): intervene(plain, "lungs only")
    with pytest.raises(CourseError, match="no view"): intervene(plain, "upside down")


def test_fresh_figures_are_those_of_scikit_learn():
    g = rng("fresh")
    p = pd.DataFrame(dict(path=[f"{i}" for i in range(60)],
                          label=pd.Categorical(g.choice(["no", "yes"], 60), ["no", "yes"]),
                          p_yes=g.random(60))).assign(p_no=lambda t: 1 - t["p_yes"])
    sets = {"a": p[:20].reset_index(drop=True), "b": p[20:].reset_index(drop=True)}
    for name, row in metrics_per_split(sets, .4).set_index("set").iterrows():
        y, s = (sets[name]["label"] == "yes").to_numpy(), sets[name]["p_yes"].to_numpy()
        tn, fp, fn, tp = metrics.confusion_matrix(y, s >= .4).ravel()
        assert (row.tp, row.fp, row.tn, row.fn) == (tp, fp, tn, fn) and row.accuracy == pytest.approx(
            metrics.accuracy_score(y, s >= 0.4)
        )
        assert (
            row.precision == pytest.approx(metrics.precision_score(y, s >= 0.4))
            and row.recall == pytest.approx(metrics.recall_score(y, s >= 0.4))
            and row.auc == pytest.approx(metrics.roc_auc_score(y, s))
        )


def test_the_source_left_out_teaches_nothing(films):
    who = sorted(films["patient"].unique())
    home = films["patient"].map({p: "ABC"[i % 3] for i, p in enumerate(who)})
    # one patient changes hospitals
    frame = films.assign(split=None, source=home.where((films["patient"] != who[0]) | (films.index % 2 == 0),
                                                       "B"))
    for source in "ABC":
        cut = leave_source_out(frame, source)
        taught, test = cut[cut["split"] != "test"], cut[cut["split"] == "test"]
        assert (
            set(test["source"]) == {source}
            and source not in set(taught["source"])
            and not leakage(taught, test)
            and len(test) == (frame["source"] == source).sum()
        )
        assert set(taught["split"]) == {"train",
                                        "val"} and not leakage(taught[taught["split"] == "train"],
                                                               taught[taught["split"] == "val"])
    known = films.assign(source=home,
                         split=films["patient"].map({p: ("test", "train", "train", "val", "train")[i // 3 % 5]
                                                     for i, p in enumerate(who)}))
    assert len(known.query("split == 'test' and source == 'B'"))
    cut = leave_source_out(known, "B")
    assert set(cut.loc[cut["split"] == "test", "path"]) == set(
        known.query("split == 'test' and source == 'B'")["path"]
    ) and not set(cut["path"]) & set(known.query("split == 'test' and source != 'B'")["path"])


def test_one_source_is_refused(films):
    alone = films[films["source"] == "A"]
    for call in (lambda: leave_source_out(alone, "A"), lambda: source_probe(alone)):
        with pytest.raises(CourseError, match="only one source"): call()
    with pytest.raises(CourseError, match="no source"): leave_source_out(films, "Z")
    assert Task.of(source_probe(films)).names == ("A", "B", "C")


def test_balanced_draws_training_only(films):
    frame = films.assign(letter=np.where(np.arange(len(films)) % 4, "R", "AP"))
    even = balance_sources(frame, "letter")
    cells = pd.crosstab(*(even.loc[even["split"] == "train", c] for c in ("letter", "label")))
    assert (
        cells.to_numpy().min() == cells.to_numpy().max()
        and (even["split"] != "train").sum() == (frame["split"] != "train").sum()
    )
    with pytest.raises(CourseError, match="cannot invent"):
        balance_sources(frame[(frame["letter"] == "R") | (frame["label"] != "Normal")], "letter")


@pytest.mark.parametrize("test", [mmd_test, ks_test])
def test_level_and_power(test):
    find = lambda i, by: (lambda a, b: test(a[0], b[0] + by, a[1], b[1],
                                            99).p)(cloud(20, 2, seed=2 * i), cloud(15, 2, seed=2 * i + 1))
    quiet, loud = np.array([find(i, 0) for i in range(100)]), np.array([find(i, 1.5) for i in range(20)])
    assert (quiet <= .05).mean() <= .12 and .35 < quiet.mean() < .65 and (loud <= .05).mean() >= .9
    assert test(*(cloud(20)[0],) * 2, *(cloud(20)[1],) * 2, 99).p == 1


def test_patients_are_shuffled_and_films_are_not():
    pairs = [(cloud(8, 10, seed=2 * i, own=3.), cloud(8, 10, seed=2 * i + 1, own=3.)) for i in range(40)]
    by_patient = [mmd_test(a[0], b[0], a[1], b[1], 99).p for a, b in pairs]
    by_film = [mmd_test(a[0], b[0], np.arange(80), np.arange(80), 99).p for a, b in pairs]
    assert np.mean(np.array(by_patient) <= .05) <= .15 and np.mean(np.array(by_film) <= .05) >= .8


def test_every_patient_counts_once():
    (x, who), (y, there) = cloud(10), cloud(10, seed=1)
    once = mmd_test(x, y, who, there, 19)
    assert ks_test(np.r_[x, x[:1], x[:1]], y, [*who, who[0], who[0]], there,
                   19).value == pytest.approx(ks_test(x, y, who, there, 19).value, abs=0.02)
    assert once == (once.value, once.p, once.shuffled) and len(once.shuffled) == 19
    with pytest.raises(CourseError, match="too few patients"): mmd_test(x[:3], y, who[:3], there)


def test_four_patients_against_seven_are_enough():
    (x, who), (y, there) = cloud(4), cloud(7, seed=1, shift=9.)
    old, new = (Embedding(f, np.c_[f[:, :1] * 0 + c, 1 - f[:, :1] * 0 - c], k, k) for f, k,
                c in ((x, who, 0.2), (y, there, 0.9)))
    assert compare_images(old, new).shift


def test_monitor_end_to_end(run, store, films, tmp_path):
    known = load_reference(run.folder)
    assert set(known.paths) == set(store.frame.query("split == 'val'")["path"])
    folder = Path(films["path"].iloc[0]).parents[3]
    verdict = monitor(run, folder, times=99)
    assert (
        len(verdict.new.paths) == len(load_dataset(folder))
        and not any("lung masks" in p for p in verdict.new.paths)
        and 0 < verdict.p <= 1
    )
    assert (
        verdict.table is not None
        and "shift was found" in repr(verdict)
        and "<table" in verdict._repr_html_()
        and (verdict.unlike["distance"].diff().dropna() <= 0).all()
    )
    page = verdict.save(tmp_path / "verdict")
    assert json.loads((page / "verdict.json").read_text())["shift"] == verdict.shift and "http" not in (
        page / "index.html"
    ).read_text().replace("http://www.w3.org", "")
    with pytest.raises(CourseError, match="never overwritten"): verdict.save(page)


def test_films_without_patients_are_compared_film_by_film(run, store):
    "Found on real images: a bare folder, each image for itself, against averages of patients: a false alarm."
    films = store.frame.assign(split="test")
    verdict = monitor(run, store.using(films.assign(patient=None).drop(columns="study", errors="ignore")),
                      times=49)
    assert len(set(verdict.old.keys)) == len(verdict.old.paths) and len(set(verdict.new.keys)) == len(films)
    named = monitor(run, store.using(films), times=49)
    assert (
        len(set(named.old.keys))
        == store.frame.query("split == 'val'")["patient"].nunique()
        < len(named.old.paths)
        and len(set(named.new.keys)) == films["patient"].nunique()
    )


def test_an_inverted_film_is_a_shift_and_a_repeated_verdict_is_the_same(run, store):
    negative = IntervenedStore(store, lambda films, masks: 255 - films)
    loud = monitor(run, negative, times=199)
    assert loud.shift and loud.apart.value > .9 and loud.p == monitor(run, negative, times=199).p


def test_films_that_taught_are_left_out(trained, store, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained.folder, copy)
    listed = pd.read_csv(copy / "images.csv", dtype=str)
    assert set(listed["split"]) == {"train", "val", "test"}
    listed.assign(split=listed["split"].where(listed["split"] == "train",
                                              "test")).to_csv(copy / "images.csv", index=False)
    assert set(monitor(copy, store, times=19).new.paths) == set(store.frame.query("split != 'train'")["path"])
    with pytest.raises(CourseError, match="learned from every one"):
        monitor(trained, store.using(store.frame.query("split == 'train'").reset_index(drop=True)), times=19)


def test_folders(tmp_path, films):
    with pytest.raises(CourseError, match="no image here"): load_arrivals(tmp_path, ["a", "b"])
    with pytest.raises(CourseError, match="no such folder"): load_arrivals(tmp_path / "nowhere", ["a", "b"])
    (tmp_path / "lung masks").mkdir()
    shutil.copy(films["meta_lungs"].iloc[0], tmp_path / "lung masks" / "mask.png")
    for p in films["path"].head(3): (tmp_path / Path(p).name).write_bytes(Path(p).read_bytes())
    heap = load_arrivals(tmp_path, ["a", "b"])
    assert len(heap) == 3 and heap["label"].isna().all() and Task.of(heap).names == ("a", "b")
    asked = load_arrivals(tmp_path, ["Mass", "Nodule"], findings=True)
    assert asked[["Mass",
                  "Nodule"]].isna().all(axis=None) and Task.of(asked).findings and groups(asked).notna().all()


def test_a_damaged_set_is_no_heap_of_pictures(tmp_path, films):
    "A crash must not pass for 'no shift': only what carries no labels is read as a heap."
    for p in films["path"].head(3): shutil.copy(p, tmp_path / Path(p).name)
    (tmp_path / "labels.csv").write_text("file,dx\nnowhere.png,a\n")
    with pytest.raises(CourseError) as error: load_arrivals(tmp_path, ["a", "b"])
    assert "no layout" not in str(error.value) and "no image here" not in str(error.value)


def test_a_store_through_a_view_is_a_store_like_any_other(store):
    "Made by the store's own constructor: whatever a store keeps, the altered one keeps too."
    through = intervene(store, "border only")
    assert (
        set(vars(store)) - {"_guarded"} <= set(vars(through))
        and through.shape == store.shape
        and len(through) == len(store)
    )
    assert (through.hashes() == store.hashes()).all()
    twice = IntervenedStore(through, lambda films, masks: 255 - films)
    assert (twice.take() == 255 - through.take()).all() and (
        twice.using(store.frame.tail(3)).take() == twice.take()[-3:]
    ).all()


def test_the_monitor_of_a_model_of_findings(tmp_path):
    "New images of unknown truth are read as findings, each with a probability, as the reference was."
    store = build_store(hold_out(load_dataset("sample-nih", unknown="image"), .3), (32, 32))
    made = fit(build_cnn(SPEC, (32, 32, 1), 14), store, run=tmp_path / "run", epochs=1, optimizer="adam")
    if not (made.folder / "reference.npz").exists():
        write_reference(made.folder, made.model, store, made.card)
    # so that all of them are new
    pd.read_csv(made.folder / "images.csv").head(0).to_csv(made.folder / "images.csv", index=False)
    (tmp_path / "heap").mkdir()
    for p in store.frame["path"]: shutil.copy(p, tmp_path / "heap" / Path(p).name)
    verdict = monitor(made, tmp_path / "heap", times=49)
    p = predict_split(made.model,
                      store).assign(name=lambda t: t["path"].map(lambda f: Path(f).name)).set_index("name")
    expected = p.loc[[Path(f).name for f in verdict.new.paths],
                     [f"p_{c}" for c in made.card["labels"]]].to_numpy()
    assert (
        len(expected) == len(store)
        and np.allclose(verdict.new.probabilities, expected, atol=1e-4)
        and verdict.labels == tuple(made.card["labels"])
    )


def test_a_run_without_a_reference(trained, store, tmp_path):
    copy = tmp_path / "moved"
    shutil.copytree(trained.folder, copy)
    (copy / "reference.npz").write_bytes(b"nothing")
    with pytest.raises(CourseError, match="cannot be read"): monitor(copy, store, times=19)
    (copy / "reference.npz").unlink()
    with pytest.raises(CourseError, match="kept no reference"): monitor(copy, store, times=19)
    (copy / "images.csv").unlink()
    with pytest.raises(CourseError, match="does not say what it has learned from"):
        monitor(copy, store, times=19)


def test_trial_and_bars(store, tmp_path):
    t = pd.concat(
        [
            shortcut_trial(
                arm,
                store,
                {"here": store.using(store.frame.query("split == 'val'").reset_index(drop=True))},
                tmp_path,
                (0,),
                SPEC,
                epochs=1,
                optimizer="adam",
            )
            for arm in ("one", "two")
        ]
    )
    rows = intervention_effects(t, times=50).set_index("arm")
    assert np.isnan(rows.loc["one", "gain"]) and rows.loc["two", "gain"] == pytest.approx(
        rows.loc["two", "value"] - rows.loc["one", "value"]
    )
    assert rows.loc["two", "value"] == pytest.approx(
        metrics.roc_auc_score(*(t.query("arm == 'two'")[c] for c in ("truth", "score")))
    )
