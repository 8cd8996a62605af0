"""The classical bar: patients stay together, nothing is learnt from test films, and the figure is remembered."""
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_course.core import CourseError, rng
from cxr_course.data.building import build_store
from cxr_course.data.loading import load_dataset
from cxr_course.data.splits import hold_out
from cxr_course.evaluation.predictions import binary_tasks
from cxr_course.evaluation.report import evaluation_report
from cxr_course.frame import make_frame, regroup
from cxr_course.models import baseline as baseline_module
from cxr_course.models.baseline import Baseline, ClassicalModel, classical_baseline, fit_classical
from cxr_course.models.classical import (
    classical_pipeline, flatten_images, grid_search, patient_folds, pixel_weights, principal_components,
    reconstruct,
)
from cxr_course.stats.curves import auc


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    "Ninety patients with two noisy pictures each; the sick have a bright corner."
    folder, draw, rows = tmp_path_factory.mktemp("films"), rng("classical tests"), []
    for i in range(180):
        sick, split = i // 2 % 2 == 1, ("train", "train", "val", "test", "train")[i // 4 % 5]
        film = draw.integers(60, 160, (24, 20))
        film[:8, :8] += 60 * sick
        Image.fromarray(film.astype(np.uint8)).save(folder / f"{i}.png")
        rows.append(dict(path=str(folder / f"{i}.png"), patient=f"p{i // 2}", split=split,
                         label=("NORMAL", "PNEUMONIA")[sick]))
    return build_store(make_frame(rows, ["NORMAL", "PNEUMONIA"]), (24, 20))


def wards(films=8, patients=30):
    "Patients who can be told apart, and a diagnosis drawn by lot for each: there is nothing to learn."
    draw = rng("wards")
    who = np.repeat(np.arange(patients), films)
    x = (draw.normal(size=(patients, 50))[who] + .3 * draw.normal(size=(len(who), 50))).astype("float32")
    sick = draw.permutation(np.arange(patients) % 2)[who]
    return x, make_frame([dict(path=f"{i}", patient=f"p{p}", label=("A", "B")[s]) for i,
                          (p, s) in enumerate(zip(who, sick))], ["A", "B"])


@pytest.mark.parametrize("shape, side, pixels", [((3, 24, 20), 64, 480), ((3, 128, 96), 64, 64 * 48), ((3, 96, 128, 1), 32, 24 * 32), ((2, 300, 3), 30, 30)])
def test_rows(shape, side, pixels):
    films = np.full(shape, 128, np.uint8)
    assert flatten_images(films, side).shape == (shape[0], pixels)
    assert np.allclose(flatten_images(films, side), 128 / 255, atol=1e-3)
    assert np.allclose(flatten_images(films / np.float32(255), side), flatten_images(films, side), atol=1e-3)


def test_all_components_rebuild_the_film():
    x = rng("x").random((12, 30), dtype="float32")
    pca = principal_components(x, 50)
    assert pca.n_components_ == 11 and np.allclose(reconstruct(pca, x, 11), x, atol=1e-3)
    assert np.allclose(reconstruct(pca, x, 0), pca.mean_, atol=1e-5)


def test_folds_keep_patients_and_classes():
    _, frame = wards()
    cuts = patient_folds(frame, 4)
    assert sorted(np.concatenate([judge for _, judge in cuts])) == list(range(len(frame)))
    for learn, judge in cuts:
        assert not set(frame["patient"].iloc[learn]) & set(frame["patient"].iloc[judge])
        assert frame["label"].iloc[judge].nunique() == 2
    assert all((a == b).all() for one, other in zip(cuts, patient_folds(frame, 4)) for a,
               b in zip(one, other))


def test_folds_refuse_unknown_patients_and_use_the_study():
    _, frame = wards()
    with pytest.raises(CourseError, match="have no patient"):
        patient_folds(regroup(frame.assign(patient=None)))
    known = regroup(frame.assign(study=frame["patient"], patient=None), "image")
    for learn, judge in patient_folds(known, 3):
        assert not set(known["study"].iloc[learn]) & set(known["study"].iloc[judge])


@pytest.mark.parametrize("k, sick", [(2, 1), (40, 15)])
def test_folds_refuse_too_few_patients(k, sick):
    _, frame = wards()
    few = frame[
        (frame["label"] == "A")
        | frame["patient"].isin(frame.loc[frame["label"] == "B", "patient"].unique()[:sick])
    ]
    with pytest.raises(CourseError, match="patients of each class"): patient_folds(few, k)


def test_nothing_to_learn_is_found_to_be_nothing():
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    x, frame = wards()
    y = frame["label"].cat.codes
    by_film = cross_val_score(classical_pipeline(k=20), x, y, scoring="roc_auc",
                              cv=StratifiedKFold(4, shuffle=True, random_state=0)).mean()
    assert by_film > .95 and grid_search(x, frame).best_score_ < .75


@pytest.mark.parametrize("kind", ["svm", "logistic"])
def test_the_machine_learns_and_its_probabilities_add_up(store, kind):
    reader = fit_classical(store, kind)
    read = reader.predict(store, "test")
    y, p = binary_tasks(read)["PNEUMONIA"]
    assert auc(y, p) > .95 and 0 < reader.threshold < 1 and len(read) == len(store.rows("test"))
    evaluation_report(read, reader.threshold)
    everything = reader.predict(store)
    assert np.allclose(everything.loc[everything["split"] == "test", "p_PNEUMONIA"], p)


def test_test_films_have_no_say(store):
    other = store.using(
        store.frame.assign(label=store.frame["label"].where(store.frame["split"] != "test", "NORMAL"))
    )
    one, two = fit_classical(store), fit_classical(other)
    assert one.threshold == two.threshold and one.calibration.parts == two.calibration.parts
    assert (one.predict(store, "test")["p_PNEUMONIA"] == two.predict(store, "test")["p_PNEUMONIA"]).all()


def test_few_films_bring_few_components(store):
    train = store.frame[store.frame["split"] == "train"].groupby("label", observed=True).head(8)
    found = grid_search(flatten_images(store.using(train).images), train, n_folds=2)
    assert found.best_params_["keep__kw_args"]["k"] <= 7


def test_weights_are_the_gradient(store):
    rows = store.rows("train")
    x = flatten_images(store.take(rows))
    line = grid_search(x, store.frame.iloc[rows], "logistic", n_folds=2).best_estimator_
    step = rng("step").normal(size=(1, x.shape[1])).astype("float32")
    assert np.isclose((line.decision_function(x[:1] + step) - line.decision_function(x[:1]))[0],
                      step[0] @ pixel_weights(line), rtol=1e-3, atol=1e-4)


def test_refusals(store):
    frame = store.frame
    with pytest.raises(CourseError, match="unknown kind"): fit_classical(store, "forest")
    with pytest.raises(CourseError, match="both classes"):
        fit_classical(store.using(frame[frame["split"] != "val"]))
    with pytest.raises(CourseError, match="share 1 patient"):
        fit_classical(store.using(frame.assign(split=np.where(np.arange(len(frame)) == 0, "test",
                                                              frame["split"]))))
    three = frame.assign(label=pd.Categorical(frame["label"], ["NORMAL", "BACTERIA", "PNEUMONIA"]))
    with pytest.raises(CourseError, match="one yes-or-no question"): fit_classical(store.using(three))
    with pytest.raises(CourseError, match="one yes-or-no question"):
        fit_classical(store.using(make_frame(frame.drop(columns="label").assign(Effusion=1.0),
                                             findings=["Effusion"])))
    with pytest.raises(CourseError, match="no image in the split"):
        ClassicalModel("svm", None, ["a", "b"], 64).predict(store, "nowhere")


def test_bar_is_remembered_drawn_and_another_for_other_films(store, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt
    monkeypatch.setenv("CXR_COURSE_CACHE", str(tmp_path))
    one = classical_baseline(store)
    fitted = fit_classical
    monkeypatch.setattr(baseline_module, "fit_classical",
                        lambda *a: pytest.fail("the figure was not remembered"))
    assert str(classical_baseline(store).estimate) == str(one.estimate)
    monkeypatch.setattr(baseline_module, "fit_classical", fitted)
    fewer = store.using(store.frame.drop(index=store.rows("test")[:4]))
    assert (
        classical_baseline(fewer).images == one.images - 4
        and len(list((tmp_path / "bars").glob("*.json"))) == 2
    )
    fig, axes = plt.subplots(2)
    one.draw(axes[0])
    one.draw(axes[1], axis="x")
    assert "the bar: PCA + SVM" in axes[0].get_legend_handles_labels()[1][0]
    plt.close(fig)


@pytest.mark.parametrize("text", ["", "[]", '{"what": "x"}'])
def test_a_damaged_bar_is_refused(tmp_path, text):
    (tmp_path / "bar.json").write_text(text)
    with pytest.raises(CourseError): Baseline.read(tmp_path / "bar.json")


def test_a_bar_without_interval_survives_the_file(tmp_path):
    one = Baseline("PCA + SVM", .9, float("nan"), float("nan"), 9, 3)
    one.save(tmp_path / "bar.json")
    assert str(Baseline.read(tmp_path / "bar.json")) == str(one)


def test_medmnist_file(tmp_path):
    draw, arrays = rng("npz"), {}
    for split, n in (("train", 80), ("val", 40), ("test", 40)):
        y = np.arange(n) % 2
        arrays[f"{split}_images"] = (
            draw.integers(60, 120, (n, 28, 28)) + 60 * y[:, None, None] * (np.arange(28) < 9)
        ).astype(np.uint8)
        arrays[f"{split}_labels"] = y[:, None].astype(np.uint8)
    np.savez(tmp_path / "pneumoniamnist.npz", **arrays)
    films = load_dataset(tmp_path / "pneumoniamnist.npz", unknown="image")
    store = build_store(films, (28, 28))
    with pytest.raises(CourseError, match="have no patient"):
        classical_baseline(store.using(regroup(store.frame)))
    assert classical_baseline(store).value > .95


def test_real_pneumoniamnist(real_data):
    file = real_data / "pneumoniamnist_standin.npz"
    if not file.exists(): pytest.skip(f"no {file.name} in {real_data}")
    store = build_store(load_dataset(file, sizes=False, unknown="image"), (28, 28))
    assert classical_baseline(store, "logistic", n_folds=2).value > .97


def test_real_films(real_data):
    folder = real_data / "kaggle" / "chest_xray"
    if not folder.exists(): pytest.skip(f"no kaggle/chest_xray in {real_data}")
    films = hold_out(load_dataset(folder, sizes=False, unknown="image"), .2)
    some = films.groupby(["split", "label"], observed=True).head(120)
    assert classical_baseline(build_store(some, (64, 64)), n_folds=3).value > .9
