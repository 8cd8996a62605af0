"""The phantom where a lesson would not show it: every finding, every layout, killed half-way."""
import numpy as np
import pandas as pd
import pytest

from cxr_course.core import CourseError
from cxr_course.data.loading import load_dataset
from cxr_course.phantom import files as files_module
from cxr_course.phantom.anatomy import chest_anatomy
from cxr_course.phantom.files import write_dataset
from cxr_course.phantom.findings import FINDINGS
from cxr_course.phantom.world import POPULATIONS, draw_image, population

ADULT = dict(image=0, patient="p00003", age=44., sex="M", seed=5, source="A", view="PA", height=160,
             width=160)


def nih_row(finding, severity):
    return dict(ADULT, severity=severity, **{f: float(f == finding) for f in FINDINGS})


@pytest.mark.parametrize("finding", FINDINGS)
def test_the_truth_is_where_the_film_changed(finding):
    film, truth = draw_image(nih_row(finding, .9), masks=True)
    healthy, none = draw_image(nih_row("", 0.), masks=True)
    assert set(truth) == {"lungs", "heart", finding} and set(none) == {"lungs", "heart"}
    area = truth[finding]
    assert .0005 < area.mean() < .5
    # these move the anatomy itself
    if finding in ("Cardiomegaly", "Emphysema", "Atelectasis", "Fibrosis"): return
    change = np.abs(film - healthy)
    assert change[area].mean() > 3 * change[~area].mean()


@pytest.mark.parametrize("label", ["BACTERIA", "VIRUS", "COVID-19"])
def test_pneumonia_lies_in_the_lung_and_grows_with_severity(label):
    fluid = []
    for severity in (.2, .6, 1.):
        film, truth = draw_image(dict(ADULT, label=label, severity=severity), masks=True)
        healthy = draw_image(dict(ADULT, label="NORMAL", severity=0.))
        fluid.append(np.abs(film - healthy).sum())
        if truth[label].any():
            assert (truth[label] & (truth["lungs"] | truth["heart"])).sum() > .6 * truth[label].sum()
    assert fluid[0] < fluid[1] < fluid[2]


def test_patients_keep_their_anatomy_and_films_differ():
    one, two = (draw_image(dict(ADULT, image=n, label="NORMAL", severity=0.)) for n in (0, 1))
    assert (one != two).any()
    chest, again, other = (chest_anatomy((5, p), 44., "M") for p in ("p00003", "p00003", "p00004"))
    assert chest == again != other
    assert (chest.trees[1][0] == again.trees[1][0]).all() and (chest.trees[1][0] != other.trees[1][0]).any()


@pytest.mark.parametrize(
    "layout,kind",
    [
        ("mendeley", "pneumonia"),
        ("kaggle", "pneumonia"),
        ("nih", "nih"),
        ("covid", "covid"),
        ("dicom", "pneumonia"),
    ],
)
def test_what_is_written_is_read_back(tmp_path, layout, kind):
    plan = population(12, seed=3, kind=kind, pixels=64)
    frame = load_dataset(write_dataset(plan, tmp_path / layout, layout))
    assert len(frame) == len(plan)
    if layout in ("mendeley", "nih"): assert frame["patient"].nunique() == plan["patient"].nunique()
    if layout == "nih": assert frame[list(FINDINGS)].sum().tolist() == plan[list(FINDINGS)].sum().tolist()
    if layout in ("mendeley", "kaggle"):
        assert set(frame["label"]) <= {"NORMAL", "BACTERIA", "VIRUS", "PNEUMONIA"}


@pytest.mark.parametrize("kind", ["covid", "pneumonia"])
@pytest.mark.parametrize("patients", [25, 36, 60])
def test_no_class_is_missing_from_a_split_of_a_small_population(kind, patients):
    "By chance alone, several of these would have no patient of a class to judge."
    for seed in range(6):
        plan = population(patients, seed=seed, kind=kind)
        people = plan.drop_duplicates("patient").groupby(["label", "split"], observed=False).size().unstack()
        assert (people > 0).all(axis=None) and people.shape == (3, 3), (seed, people)
        assert plan.groupby("patient")["split"].nunique().max() == 1


def test_only_classes_that_are_missing_are_moved_and_only_into_splits_that_were_asked_for():
    plan = population(25, seed=2, split=(.8, 0., .2))
    assert set(plan["split"]) == {"train", "test"}
    few = population(4, seed=0, kind="covid").drop_duplicates("patient").set_index("label")["split"]
    assert set(few["Normal"]) == {"train", "val", "test"} and few["Non-COVID"] == "train"      # three and one
    large, drawn = (population(n, seed=0, kind="covid").drop_duplicates("patient") for n in (100, 60))
    both = drawn.merge(large, on="patient")
    assert (both["split_x"] != both["split_y"]).sum() == 1                 # a COVID-19 for the test, of sixty


def test_boxes_enclose_the_truth(tmp_path):
    plan = population(10, seed=4, kind="nih", images=(1, 1), pixels=96)
    folder = write_dataset(plan, tmp_path / "nih", "nih")
    boxes, truth = pd.read_csv(folder / "BBox_List_2017.csv"), pd.read_csv(folder / "truth.csv")
    assert len(boxes) > 3
    for b in boxes.itertuples(index=False):
        row = truth[truth["path"] == f"images/{b[0]}"].iloc[0]
        mask = draw_image(row, masks=True)[1][b[1]]
        rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert (b[2], b[3]) == (cols[0], rows[0]) and (b[4], b[5]) == (np.ptp(cols) + 1, np.ptp(rows) + 1)


def test_killed_half_way_leaves_nothing(tmp_path, monkeypatch):
    drawn = []

    def stop(row, path, layout):
        drawn.append(path)
        if len(drawn) == 3: raise KeyboardInterrupt
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return []
    monkeypatch.setattr(files_module, "_write_one", stop)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(population(5, pixels=64), tmp_path / "world", workers=1)
    assert len(drawn) == 3 and list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(files_module, "_write_one", full)
    with pytest.raises(CourseError, match="No space left on device"):
        write_dataset(population(5, pixels=64), tmp_path / "world", workers=1)
    assert list(tmp_path.iterdir()) == []


def test_ties_are_as_strong_as_asked():
    for strength in (0., .5, 1.):
        w = population(400, seed=2, tie={"marker": strength}, images=(1, 1))
        told = w["marker"].eq("AP")[w["label"] != "NORMAL"].mean()
        assert abs(told - strength) < .08


@pytest.mark.parametrize(
    "kind,layout", [("nih", "kaggle"), ("pneumonia", "nih"), ("covid", "mendeley"), ("pneumonia", "covid")]
)
def test_a_layout_that_does_not_fit_is_refused(tmp_path, kind, layout):
    with pytest.raises(CourseError, match="does not fit"):
        write_dataset(population(3, kind=kind, pixels=48), tmp_path / "x", layout)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", POPULATIONS)
def test_every_kind_can_be_written_as_dicom(tmp_path, kind):
    pydicom = pytest.importorskip("pydicom")
    plan = population(2, kind=kind, pixels=48)
    files = sorted(write_dataset(plan, tmp_path / "x", "dicom").rglob("*.dcm"))
    assert len(files) == len(plan) and {pydicom.dcmread(f).PatientID for f in files} == set(plan["patient"])
