"""Reading data sets: folders and tables of every sort, planted archives, a broken download, real images."""
import http.server
import io
import os
import shutil
import tarfile
import threading
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_course.core import CourseError
from cxr_course.data import layouts
from cxr_course.data.checks import check_dataset
from cxr_course.data.archives import unpack
from cxr_course.data.counts import compare_counts
from cxr_course.data.download import fetch, unpack_beside
from cxr_course.data.duplicates import near_duplicates, perceptual_hash, thumbnail
from cxr_course.data.layouts import detect_layout, parse_file_name
from cxr_course.data.loading import read_boxes, load_dataset, read_relabelled
from cxr_course.data.registry import CHESTMNIST, DatasetFacts, REGISTRY, registry
from cxr_course.frame import Task, make_frame
from cxr_course.phantom.files import write_dataset
from cxr_course.phantom.findings import FINDINGS
from cxr_course.phantom.world import population


@pytest.fixture(scope="session")
def kaggle(tmp_path_factory):
    return write_dataset(population(patients=24, seed=9, pixels=64),
                         tmp_path_factory.mktemp("kaggle") / "chest_xray", "kaggle")


@pytest.fixture(scope="session")
def film(kaggle): return sorted((kaggle / "train" / "NORMAL").iterdir())[0]


def folders(root, film, *names):
    for n in names:
        (root / n).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(film, root / n)
    return root


# ---------------------------------------------------------------- names

@pytest.mark.parametrize(
    "name, split, patient, study, cause",
    [
        ("NORMAL-28501-0001.jpeg", None, "28501", None, None),
        ("BACTERIA-28501-0002.jpeg", "test", "28501", None, None),
        ("chest_xray/train/PNEUMONIA/VIRUS-28501-0003.jpeg", None, "28501", None, "virus"),
        ("person1946_bacteria_4874.jpeg", "val", "train-1946", None, "bacteria"),
        ("person1_virus_6.jpeg", "test", "test-1", None, "virus"),
        ("person1949_virus_2431_1.jpeg", "train", "train-1949", None, "virus"),
        ("person1_virus_6.jpeg", None, None, None, "virus"),
        ("IM-0115-0001.jpeg", "train", None, "train-IM-0115", None),
        ("IM-0003-0001-0002.jpeg", "test", None, "test-IM-0003", None),
        ("NORMAL2-IM-1427-0001.jpeg", "val", None, "train-IM-1427", None),
        ("00008270_015.png", None, "00008270", None, None),
        ("COVID-101.png", "train", None, None, None),
        ("010.png", None, None, None, None),
        ("Normal-10009.png", None, None, None, None),
        ("person_virus_.jpeg", "train", None, None, None),
        ("8270_015.png", None, None, None, None),
        ("", None, None, None, None),
        ("C:\\films\\00008270_015.png", None, "00008270", None, None),
    ],
)
def test_names(name, split, patient, study, cause):
    said = parse_file_name(name, split)
    if name.startswith("BACTERIA"): cause = "bacteria"
    assert (said["patient"], said["study"], said["cause"]) == (patient, study, cause)


# ---------------------------------------------------------------- layouts

def test_zip_with_ghosts_and_a_second_copy(kaggle, tmp_path):
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as z:
        for p in sorted(kaggle.rglob("*.jpeg")):
            inside = p.relative_to(kaggle)
            z.write(p, Path("chest_xray") / inside)
            z.write(p, Path("chest_xray/chest_xray") / inside)
            z.writestr(str(Path("__MACOSX/chest_xray") / inside.with_name("._" + inside.name)), b"\0\5\x16\7")
        z.writestr("chest_xray/.DS_Store", b"x")
    assert detect_layout(tmp_path / "archive.zip") == "kaggle"
    assert (
        len(load_dataset(tmp_path / "archive.zip"))
        == len(load_dataset(kaggle))
        == len(list(kaggle.rglob("*.jpeg")))
    )


def test_tar_gz_is_loaded_too(kaggle, tmp_path):
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as t: t.add(kaggle, "chest_xray")
    assert len(load_dataset(tmp_path / "set.tar.gz")) == len(load_dataset(kaggle))


def test_classes(kaggle):
    two, three = load_dataset(kaggle, classes=2), load_dataset(kaggle, classes=3)
    assert list(Task.of(two).names) == ["NORMAL", "PNEUMONIA"] and list(Task.of(three).names) == [
        "NORMAL", "BACTERIA", "VIRUS",
    ]
    assert ((two["label"] == "PNEUMONIA") == (three["label"] != "NORMAL")).all()
    assert ((three["label"] == "VIRUS") == (three["cause"] == "virus")).all()
    with pytest.raises(CourseError, match="classes=4"): load_dataset(kaggle, classes=4)


def test_without_truth_normals_have_a_study_and_no_patient(kaggle, tmp_path):
    plain = shutil.copytree(kaggle, tmp_path / "x", ignore=shutil.ignore_patterns("truth.csv"))
    f = load_dataset(plain)
    normal = f["label"] == "NORMAL"
    assert (
        f.loc[normal, "patient"].isna().all()
        and f.loc[normal, "study"].str.contains("IM-").all()
        and f.loc[~normal, "patient"].notna().all()
    )
    assert not set(f.loc[(f["split"] == "test") & ~normal,
                         "patient"]) & set(f.loc[(f["split"] != "test") & ~normal, "patient"])


@pytest.mark.parametrize(
    "kind, layout", [("pneumonia", "mendeley"), ("covid", "covid"), ("nih", "nih"), ("pneumonia", "dicom")]
)
def test_the_phantom_is_read_back(tmp_path, kind, layout):
    if layout == "dicom": pytest.importorskip("pydicom")
    w = population(patients=10, seed=3, kind=kind, pixels=48)
    f = load_dataset(write_dataset(w, tmp_path / "x", layout))
    truth = pd.read_csv(tmp_path / "x" / "truth.csv", dtype={"patient": str}).assign(
        path=lambda d: [str(tmp_path / "x" / p) for p in d["path"]]
    )
    both = f.merge(truth, on="path", suffixes=("", "_truth"), validate="one_to_one")
    assert len(both) == len(f) == len(w) and layouts.detect_layout(tmp_path / "x") == layout
    assert (
        (both["patient"] == both["patient_truth"]).all()
        and (both["view"] == both["view_truth"]).all()
        and (both["height"] == both["height_truth"]).all()
        and (both["width"] == both["width_truth"]).all()
    )
    if kind == "nih":
        assert (both[list(FINDINGS)].to_numpy() == both[[f"{c}_truth" for c in FINDINGS]].to_numpy()).all()
    else: assert (both["label"].astype(str) == both["label_truth"]).all()


def test_covid_masks_and_two_classes(tmp_path):
    f = load_dataset(write_dataset(population(patients=14, seed=3, kind="covid", pixels=48), tmp_path / "x",
                                   "covid"), classes=2)
    assert list(Task.of(f).names) == ["Normal", "COVID-19"] and f["meta_lungs"].map(os.path.exists).all()


def test_nih_in_the_form_of_the_assignment(tmp_path, film):
    (tmp_path / "images").mkdir()
    rows = []
    for i, n in enumerate(("00000001_000.png", "00000001_001.png", "00008270_015.png")):
        Image.open(film).save(tmp_path / "images" / n)
        rows.append({"Image": n, **{c: int(j == i) for j, c in enumerate(FINDINGS)}, "PatientId": int(n[:8])})
    pd.DataFrame(rows).to_csv(tmp_path / "train-small.csv", index=False)
    f = load_dataset(tmp_path)
    assert detect_layout(tmp_path) == detect_layout(tmp_path / "train-small.csv") == "nih"
    assert (
        f["patient"].tolist() == ["00000001", "00000001", "00008270"]
        and list(Task.of(f).names) == list(FINDINGS)
        and f[list(FINDINGS)].to_numpy().trace() == 3
    )
    pd.DataFrame(rows).drop(columns="Hernia").to_csv(tmp_path / "train-small.csv", index=False)
    with pytest.raises(CourseError, match="no column 'Hernia'(.|\n)*train-small.csv"): load_dataset(tmp_path)


def test_nih_official_lists_and_ages(tmp_path, film):
    names = ["00000001_000.png", "00000002_000.png"]
    for n in names: Image.open(film).save(tmp_path / n)
    pd.DataFrame({"Image Index": names, "Finding Labels": ["Hernia|Effusion", "No Finding"],
                  "Patient ID": [1, 2], "Patient Age": ["058Y", "412Y"], "Patient Gender": ["M", "F"],
                  "View Position": ["PA", "AP"]}).to_csv(tmp_path / "Data_Entry_2017.csv", index=False)
    (tmp_path / "train_val_list.txt").write_text(names[0])
    (tmp_path / "test_list.txt").write_text(names[1] + "\n")
    f = load_dataset(tmp_path)
    assert f["split"].tolist() == ["train", "test"] and f["age"].iloc[0] == 58 and pd.isna(f["age"].iloc[1])
    assert (
        f.loc[0, list(FINDINGS)].astype(float).sum() == 2
        and f.loc[1, list(FINDINGS)].astype(float).sum() == 0
    )
    for n in names: os.remove(tmp_path / n)
    with pytest.raises(CourseError, match="none of the images"): load_dataset(tmp_path)


def test_class_folders_with_and_without_splits(tmp_path, film):
    f = load_dataset(folders(tmp_path / "a", film, "healthy/1.jpeg", "sick/2.jpeg", "sick/deep/3.jpeg",
                     "sick/notes.txt", "sick/._4.jpeg"))
    assert list(Task.of(f).names) == ["healthy", "sick"] and len(f) == 3 and f["split"].isna().all()
    f = load_dataset(folders(tmp_path / "b", film, "Training/Tuberculosis/1.jpeg", "Training/Normal/2.jpeg",
                     "Testing/Normal/3.jpeg", "Testing/Tuberculosis/4.jpeg"))
    assert list(Task.of(f).names) == ["Normal", "Tuberculosis"] and set(f["split"]) == {"train", "test"}


def test_a_csv_of_ones_own(tmp_path, film):
    folders(tmp_path, film, "films/1.jpeg", "films/2.jpeg")
    pd.DataFrame({"path": ["films/1.jpeg", str(tmp_path / "films/2.jpeg")], "Effusion": [1, None],
                  "Mass": [0, 1], "patient": ["007", "008"]}).to_csv(tmp_path / "t.csv", index=False)
    f = load_dataset(tmp_path / "t.csv")
    assert (
        list(Task.of(f).names) == ["Effusion", "Mass"]
        and f["patient"].tolist() == ["007", "008"]
        and f["height"].notna().all()
    )
    assert detect_layout(tmp_path) == "csv" and len(load_dataset(tmp_path)) == 2
    pd.DataFrame({"path": ["films/1.jpeg"], "Effusion": [2]}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(CourseError, match="1, 0 or missing"): load_dataset(tmp_path / "t.csv")


def test_findings_are_said_and_everything_else_is_information(tmp_path, film):
    folders(tmp_path, film, "1.jpeg", "2.jpeg", "3.jpeg")
    rows = pd.DataFrame({"path": ["1.jpeg", "2.jpeg", "3.jpeg"], "patient": ["a", "b", "b"],
                         "Effusion": [1, 0, None], "smoker": [0, 1, 1], "pacemaker": [1, 0, 0],
                         "weight": [70, 81.5, None]})
    rows.to_csv(tmp_path / "t.csv", index=False)
    f = load_dataset(tmp_path / "t.csv", findings=["Effusion"])
    assert Task.of(f).names == ("Effusion",
                                ) and f["weight"].iloc[1] == 81.5 and f["smoker"].tolist() == [0, 1, 1]
    # the one column that bears a name of NIH's
    assert Task.of(load_dataset(tmp_path / "t.csv")).names == ("Effusion",)
    assert Task.of(load_dataset(tmp_path / "t.csv", findings=["Effusion",
                                                      "pacemaker"])).names == ("Effusion", "pacemaker")
    with pytest.raises(CourseError, match="1, 0 or missing, not(.|\\n)*leave it out of `findings`"):
        load_dataset(tmp_path / "t.csv", findings=["weight"])
    with pytest.raises(CourseError, match="no column 'Mass'"):
        load_dataset(tmp_path / "t.csv", findings=["Mass"])
    rows.drop(columns="Effusion").to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(CourseError, match="told which columns are findings"): load_dataset(tmp_path / "t.csv")
    problems = check_dataset(f, pixels=False).table["problem"].tolist()
    assert not any("smoker" in p or "pacemaker" in p for p in problems)


def test_whether_images_of_nobody_count_singly_is_decided_at_loading(tmp_path, film):
    root = folders(tmp_path / "a", film, "healthy/1.jpeg", "sick/2.jpeg")
    assert load_dataset(root)["group"].isna().all()
    assert load_dataset(root, unknown="image")["group"].str.startswith("image:").all()


def test_damaged_tags_of_a_person_are_a_bad_file(tmp_path):
    pytest.importorskip("pydicom")
    heap = write_dataset(population(patients=2, seed=1, pixels=48), tmp_path / "x", "dicom")
    file = sorted(heap.rglob("*.dcm"))[0]
    raw = file.read_bytes()
    # the age, whose type becomes nonsense
    at = raw.index(b"\x10\x00\x10\x10AS")
    file.write_bytes(raw[:at + 4] + b"A\xff" + raw[at + 6:])
    with pytest.warns(UserWarning, match="1 of .* are no images"): f = load_dataset(heap)
    assert f["height"].isna().sum() == 1


def test_numbers_as_labels_and_other_names_of_splits(tmp_path, film):
    folders(tmp_path, film, "1.jpeg", "2.jpeg")
    (tmp_path / "t.csv").write_text("path,label,split\n1.jpeg,1,valid\n2.jpeg,0,Training\n")
    f = load_dataset(tmp_path / "t.csv")
    assert list(Task.of(f).names) == ["0", "1"] and f["split"].tolist() == ["val", "train"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "cannot be read"),
        ("path,label\n", "no images"),
        ("path,label\n,NORMAL\n", "names no file"),
        ("file,label\na.png,NORMAL\n", "no column 'path'(.|\n)*columns="),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, words):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(CourseError, match=words): load_dataset(tmp_path / "t.csv")


def test_a_csv_that_is_a_picture(tmp_path, film):
    shutil.copy(film, tmp_path / "t.csv")
    with pytest.raises(CourseError, match="t.csv"): load_dataset(tmp_path / "t.csv")


def test_a_heap_of_dicom(tmp_path):
    pytest.importorskip("pydicom")
    heap = write_dataset(population(patients=4, seed=1, pixels=48), tmp_path / "x", "dicom")
    os.remove(heap / "truth.csv")
    assert detect_layout(heap) == "dicom"
    with pytest.raises(CourseError, match="DICOM files without labels(.|\n)*CSV"): load_dataset(heap)
    files = sorted(heap.rglob("*.dcm"))
    pd.DataFrame(
        {
            "path": [p.relative_to(heap) for p in files],
            "label": ["well", "ill"] * (len(files) // 2) + ["well"] * (len(files) % 2),
        }
    ).to_csv(heap / "labels.csv", index=False)
    f = load_dataset(heap)
    assert (
        f["patient"].str.startswith("p0").all()
        and f["view"].isin(["PA", "AP"]).all()
        and f["age"].notna().all()
        and f["sex"].isin(["M", "F"]).all()
    )


def test_dicom_in_class_folders(tmp_path):
    pytest.importorskip("pydicom")
    heap = write_dataset(population(patients=4, seed=1, pixels=48), tmp_path / "x", "dicom")
    for i, p in enumerate(sorted(heap.rglob("*.dcm"))):
        (tmp_path / "y" / ("normal", "pneumonia")[i % 2]).mkdir(parents=True, exist_ok=True)
        # no ending, as archives export them
        shutil.copy(p, tmp_path / "y" / ("normal", "pneumonia")[i % 2] / f"IM{i:04d}")
    f = load_dataset(tmp_path / "y")
    assert list(Task.of(f).names) == ["normal", "pneumonia"] and f["patient"].notna().all()


def npz(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def test_npz(tmp_path):
    x, g = np.zeros((6, 28, 28), np.uint8), np.random.default_rng(0)
    f = load_dataset(npz(tmp_path / "a.npz", train_images=x, train_labels=np.array([[0], [1]] * 3),
                         test_images=x[:2], test_labels=np.array([[1], [0]])))
    assert (
        len(f) == 8
        and f["patient"].isna().all()
        and (f["height"] == 28).all()
        and f["path"].iloc[-1].endswith("a.npz::test_images::1")
    )
    f = load_dataset(npz(tmp_path / "b.npz", val_images=x, val_labels=g.integers(0, 2, (6, 14))))
    assert list(Task.of(f).names) == list(CHESTMNIST) and set(f["split"]) == {"val"}
    for arrays, words in (
        (dict(a=x), "no arrays named"),
        (dict(train_images=x, train_labels=np.full((6, 1), 3)), "unknown label 3"),
        (dict(train_images=x, train_labels=np.zeros((6, 5), int)), "5 columns"),
    ):
        with pytest.raises(CourseError, match=words + r"(.|\n)*c.npz"):
            load_dataset(npz(tmp_path / "c.npz", **arrays))
    (tmp_path / "d.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:300])
    with pytest.raises(CourseError, match="d.npz"): load_dataset(tmp_path / "d.npz")


def test_nothing_there_and_nothing_known(tmp_path, film):
    with pytest.raises(CourseError, match="no such folder(.|\n)*'sample'"): load_dataset(tmp_path / "nowhere")
    with pytest.raises(CourseError, match="no layout(.|\n)*nothing"): load_dataset(tmp_path)
    with pytest.raises(CourseError, match="give the folder"): load_dataset(film)
    with pytest.raises(CourseError, match="no images"):
        load_dataset((tmp_path / "train" / "NORMAL").mkdir(parents=True) or tmp_path)
    with pytest.raises(CourseError, match="one class"):
        load_dataset(folders(tmp_path / "one", film, "normal/1.jpeg"))


def test_unknown_class_folder(tmp_path, film):
    folders(tmp_path, film, "Train/Normal/images/1.png", "Train/COVID-19/images/1.png",
            "Train/Covid/images/1.png")
    with pytest.raises(CourseError, match="unknown class folder 'Covid'"): load_dataset(tmp_path)


def test_bad_files_are_reported_kept_and_left_out_on_request(kaggle, tmp_path):
    ill = Path(shutil.copytree(kaggle, tmp_path / "x"))
    (ill / "train" / "NORMAL" / "IM-0901-0001.jpeg").write_text("a note")
    (ill / "train" / "NORMAL" / "IM-0902-0001.jpeg").write_bytes(b"")
    whole = len(load_dataset(kaggle))
    with pytest.warns(UserWarning, match="2 of .* are no images"): f = load_dataset(ill)
    assert len(f) == whole + 2 and f["height"].isna().sum() == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_dataset(ill, skip_bad=True)) == whole
    for p in (tmp_path / "x").rglob("*.jpeg"): p.write_text("all is lost")
    with pytest.raises(CourseError, match="not an image"): load_dataset(ill)


# ---------------------------------------------------------------- check

def test_check_is_silent_on_a_healthy_set(kaggle):
    r = check_dataset(load_dataset(kaggle))
    assert (
        r.table.empty
        and r.bad.empty
        and r.pairs.empty
        and "no problem" in repr(r)
        and "no problem" in r._repr_html_()
    )
    with pytest.raises(CourseError, match="no pair"): r.figure()


def test_check_counts_against_the_registry(kaggle):
    said = check_dataset(load_dataset(kaggle), against="kaggle", pixels=False).table["problem"]
    assert said.str.contains("train NORMAL: 1,341 published, ").any()
    with pytest.raises(CourseError, match="unknown data set"):
        check_dataset(load_dataset(kaggle), against="keggle")


def test_check_sees_patients_on_both_sides_and_splits_of_one_class(kaggle):
    f = load_dataset(kaggle)
    leak = pd.concat([f, f[f["split"] == "test"].head(1).assign(split="train", path="elsewhere.png")],
                     ignore_index=True)
    assert "patients in more than one split" in set(check_dataset(leak, pixels=False).table["problem"])
    sick = f[(f["split"] != "test") | (f["label"] != "NORMAL")]
    assert "only one class in test (PNEUMONIA)" in set(check_dataset(sick, pixels=False).table["problem"])
    assert "the test split is empty" in set(check_dataset(f[f["split"] != "test"],
                                                          pixels=False).table["problem"])


def test_all_files_bad(tmp_path):
    f = make_frame([dict(path=str(tmp_path / f"{i}.png"), label=c, split="train") for i,
                    c in enumerate("ab")])
    r = check_dataset(f)
    assert (
        len(r.bad) == 2
        and r.pairs.empty
        and r.readable.empty
        and r.bad["error"].str.contains("No such file").all()
    )


def test_many_equal_films_stay_linear(tmp_path, film):
    for i in range(300): shutil.copy(film, tmp_path / f"{i}.jpeg")
    r = check_dataset(make_frame([dict(path=str(tmp_path / f"{i}.jpeg"), label="ab"[i % 2], split="train")
                          for i in range(300)]))
    assert len(r.pairs) == 299 and (r.pairs["a"] == 0).all()


def test_blank_films_are_not_called_the_same(tmp_path):
    for i in range(4): Image.new("L", (64, 64), 10 * i).save(tmp_path / f"{i}.png")
    assert check_dataset(make_frame([dict(path=str(tmp_path / f"{i}.png"), label="ab"[i % 2], split="train")
                             for i in range(4)])).pairs.empty


def test_beside_finds_films_of_another_set(kaggle, tmp_path):
    f = load_dataset(kaggle)
    own = []
    for i, p in enumerate(f["path"].head(5)):
        Image.open(p).resize((60, 60)).save(tmp_path / f"{i}.png")
        own.append(dict(path=str(tmp_path / f"{i}.png"), label="ab"[i % 2], split="train"))
    r = check_dataset(make_frame(own), beside=f)
    across = r.pairs[r.pairs["meta_set_a"] != r.pairs["meta_set_b"]]
    assert across[
        "path_a"
    ].nunique() >= 4 and "pairs: one image in this set and in the one beside it" in set(r.table["problem"])
    assert not r.table["problem"].str.contains("two splits|two labels").any()


def test_same_picture_as_png_dicom_and_sixteen_bits(tmp_path):
    pytest.importorskip("pydicom")
    from cxr_course.phantom.world import draw_image
    w = population(patients=2, seed=1, pixels=96)
    write_dataset(w, tmp_path / "d", "dicom")
    x = draw_image(w.iloc[0])
    Image.fromarray((x * 255).astype(np.uint8)).save(tmp_path / "a.png")
    Image.fromarray((x * 65535).astype(np.uint16)).save(tmp_path / "b.png")
    t = np.stack([thumbnail(p) for p in (tmp_path / "a.png", tmp_path / "b.png",
                                         sorted((tmp_path / "d").rglob("*.dcm"))[0])])
    assert len(near_duplicates(perceptual_hash(t), t)) == 3


def test_all_pairs_of_a_block_boundary():
    t = np.random.default_rng(0).integers(0, 256, (7000, 32, 32), dtype=np.uint8)
    t[6999] = t[3]
    p = near_duplicates(perceptual_hash(t), t)
    assert p[["a", "b"]].to_numpy().tolist() == [[3, 6999]]


# ---------------------------------------------------------------- archives

def evil_zip(path, name, content=b"x", mode=0):
    with zipfile.ZipFile(path, "w") as z:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        z.writestr(info, content)
    return path


@pytest.mark.parametrize(
    "name", ["../x.txt", "a/../../x.txt", "/etc/x.txt", "C:/x.txt", "..\\x.txt", "a/..\\..\\x.txt"]
)
def test_nothing_is_written_outside(tmp_path, name):
    with pytest.raises(CourseError, match="outside(.|\n)*evil.zip"):
        unpack(evil_zip(tmp_path / "evil.zip", name), tmp_path / "into")
    with tarfile.open(tmp_path / "evil.tar", "w") as t: t.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(CourseError, match="outside(.|\n)*evil.tar"):
        unpack(tmp_path / "evil.tar", tmp_path / "into")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.tar", "evil.zip"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "evil.tar", "w") as t:
        info = tarfile.TarInfo("x")
        info.type, info.linkname = kind, "../x"
        t.addfile(info)
    with pytest.raises(CourseError, match="link or device"): unpack(tmp_path / "evil.tar", tmp_path / "into")
    with pytest.raises(CourseError, match="link or device"):
        unpack(evil_zip(tmp_path / "evil.zip", "x", b"/etc/passwd", 0o120777), tmp_path / "into")
    assert not (tmp_path / "into").exists()


def test_bombs_and_damage(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a", bytes(30_000_000))
    with pytest.raises(CourseError, match="30 MB"): unpack(tmp_path / "bomb.zip", tmp_path / "into")
    with tarfile.open(tmp_path / "bomb.tar.gz", "w:gz") as t:
        info = tarfile.TarInfo("a")
        info.size = 30_000_000
        t.addfile(info, io.BytesIO(bytes(30_000_000)))
    with pytest.raises(CourseError, match="30 MB"): unpack(tmp_path / "bomb.tar.gz", tmp_path / "into")
    assert unpack(tmp_path / "bomb.zip", tmp_path / "trusted", ratio=1e9).is_dir()
    with pytest.raises(CourseError, match="1 MB|0 MB|would unpack"):
        unpack(tmp_path / "bomb.zip", tmp_path / "into", limit=1e6, ratio=1e9)
    raw = bytearray((tmp_path / "bomb.zip").read_bytes())
    raw[len(raw) // 2] ^= 255
    (tmp_path / "hurt.zip").write_bytes(raw)
    (tmp_path / "cut.tar.gz").write_bytes((tmp_path / "bomb.tar.gz").read_bytes()[:9000])
    for name in ("hurt.zip", "cut.tar.gz"):
        with pytest.raises(CourseError, match=name): unpack(tmp_path / name, tmp_path / "into", ratio=1e9)
    (tmp_path / "text.zip").write_text("no archive")
    with pytest.raises(CourseError, match="text.zip"): unpack(tmp_path / "text.zip", tmp_path / "into")
    with pytest.raises(CourseError, match="no.zip"): unpack(tmp_path / "no.zip", tmp_path / "into")
    assert not (tmp_path / "into").exists() and not [p for p in tmp_path.iterdir() if "part" in p.name]


def test_unpack_never_overwrites(tmp_path):
    z = evil_zip(tmp_path / "a.zip", "harmless.txt")
    unpack(z, tmp_path / "into")
    with pytest.raises(CourseError, match="never overwritten"): unpack(z, tmp_path / "into")


# ---------------------------------------------------------------- fetch

class Server(http.server.BaseHTTPRequestHandler):
    "Serves one file, in pieces on request, and can break off half-way."
    content, breaks, full, asked = b"", False, False, []

    def do_GET(self):
        if Server.full and self.headers.get("Range"):                     # nothing is missing
            self.send_response(416)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        Server.asked.append(start)
        body = Server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if Server.breaks else body)

    def log_message(self, *a): pass


@pytest.fixture
def server():
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    Server.content, Server.breaks, Server.asked = bytes(range(256)) * 20000, False, []
    yield f"http://127.0.0.1:{s.server_port}/set.npz?download=1"
    s.shutdown()


def facts(url, hash): return DatasetFacts("x", "A set", "npz", ("a", "b"), url=url, hash=hash)


def test_fetch_goes_on_where_it_stopped(server, tmp_path):
    import hashlib
    good = facts(server, "md5:" + hashlib.md5(Server.content).hexdigest())
    Server.breaks = True
    with pytest.raises(CourseError, match="connection broke(.|\n)*md5:"): fetch(good, tmp_path)
    assert not (tmp_path / "set.npz").exists()
    Server.breaks = False
    got = fetch(good, tmp_path)
    assert (
        got == tmp_path / "set.npz"
        and got.read_bytes() == Server.content
        and Server.asked == [0, len(Server.content) // 2]
    )
    fetch(good, tmp_path)
    # a verified copy is not fetched again
    assert len(Server.asked) == 2 and sorted(p.name for p in tmp_path.iterdir()) == ["set.npz"]


def test_a_wrong_hash_never_gets_the_name(server, tmp_path):
    with pytest.raises(CourseError, match="does not match(.|\n)*must be sha256:0000"):
        fetch(facts(server, "sha256:" + "0" * 64), tmp_path)
    assert not list(tmp_path.glob("*.npz")) and not list(tmp_path.glob(".*"))


def test_sets_that_need_a_hand(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("kaggle", "mendeley", "nih", "covid"):
        with pytest.raises(CourseError,
                           match=f"(cannot|could not) be fetched(.|\n)*{REGISTRY[name].url}") as told:
            fetch(name, tmp_path / name)
        for said, door in ((str(told.value), f"fetch({name!r}"), (told.value.typed, f"data fetch {name} ")):
            assert all(f"\n    {i}. " in said for i in (1, 2, 3)) and "    4." not in said
            assert said.count(f"{door}") == 1 and REGISTRY[name].by_hand in said
        assert not (tmp_path / name).exists()                             # nothing half-written
    with pytest.raises(CourseError, match="could not be fetched(.|\n)*md5:28209"):
        fetch("pneumoniamnist", tmp_path / "p")
    assert not (tmp_path / "p").exists()
    (tmp_path / "nih").mkdir(exist_ok=True)
    (tmp_path / "nih" / "Data_Entry_2017.csv").write_text("here already")
    assert fetch("nih", tmp_path / "nih") == tmp_path / "nih"


def test_kaggles_client_is_used_where_it_is(tmp_path, monkeypatch, kaggle):
    with zipfile.ZipFile(tmp_path / "source.zip", "w") as z:
        for p in sorted(kaggle.rglob("*.jpeg")): z.write(p, Path("chest_xray") / p.relative_to(kaggle))
    tool = tmp_path / "bin" / "kaggle"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\ncp {tmp_path}/source.zip $6/chest-xray-pneumonia.zip\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    assert len(load_dataset(fetch("kaggle", tmp_path / "set"))) == len(list(kaggle.rglob("*.jpeg")))
    tool.write_text("#!/bin/sh\necho '401 - Unauthorized' >&2\nexit 1\n")
    with pytest.raises(CourseError, match="401"): fetch("kaggle", tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bin", "set", "source.zip"]


def client(tmp_path, monkeypatch, script):
    "A program named kaggle that does this."
    tool = tmp_path / "bin" / "kaggle"
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")


@pytest.mark.parametrize("said, told", [
    ("401 Client Error: Unauthorized", "does not know who you are(.|\n)*Settings, API(.|\n)*access_token"),
    ("Authentication required to call the Kaggle API.", "does not know who you are"),
    ("403 - Forbidden", "open https://www.kaggle.com/datasets/[a-z]+/covidqu and accept its rules"),
    ("Temporary failure in name resolution", "goes on where it stopped(.|\n)*in three lines"),
])
def test_what_kaggle_refuses_is_told_in_words(tmp_path, monkeypatch, said, told):
    client(tmp_path, monkeypatch, f"echo '{said}' >&2; exit 1")
    with pytest.raises(CourseError, match=told): fetch("covid", tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_without_its_client_kaggle_is_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CourseError, match="not installed(.|\n)*cxr-course\\[kaggle\\](.|\n)*access_token"):
        fetch("covid", tmp_path / "set")


def test_kaggles_client_finds_its_part_again(tmp_path, monkeypatch, cache):
    "It goes on with its own file, if that is still where it left it; a damaged one is not kept."
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as z:
        for c in ("Normal", "Non-COVID", "COVID-19"):
            for part, name in (("Lung", c), ("Infection", "x")):
                folder = f"{part} Segmentation Data"
                z.writestr(f"{folder}/{folder}/Train/{c}/images/{name}_1.png", b"an image")
    client(tmp_path, monkeypatch, 'echo half > "$6/covidqu.zip"; exit 1')
    with pytest.raises(CourseError, match="goes on where it stopped"): fetch("covid", tmp_path / "set")
    assert (cache / "downloads" / "covid" / "covidqu.zip").read_text() == "half\n"
    client(tmp_path, monkeypatch, 'grep -q half "$6/covidqu.zip" || exit 1; echo "as it was"')
    with pytest.raises(CourseError, match="damaged"): fetch("covid", tmp_path / "set")
    assert not (cache / "downloads" / "covid").exists() and not (tmp_path / "set").exists()
    client(tmp_path, monkeypatch, f'cp {tmp_path}/whole.zip "$6/covidqu.zip"')
    frame = load_dataset(fetch("covid", tmp_path / "set"), sizes=False, unknown="image")
    assert sorted(frame["label"]) == ["COVID-19", "Non-COVID", "Normal"]   # the lungs, not the infections
    assert not (cache / "downloads" / "covid").exists()


def test_mendeley_says_where_its_file_lies_and_what_it_is(tmp_path, kaggle):
    import hashlib
    import json
    from dataclasses import replace
    with zipfile.ZipFile(tmp_path / "ChestXRay2017.zip", "w") as z:
        z.writestr("chest_xray/train/NORMAL/NORMAL-1003233-0001.jpeg", b"an image")
        z.writestr("chest_xray/train/PNEUMONIA/VIRUS-1003233-0002.jpeg", b"another")
    whole = tmp_path / "ChestXRay2017.zip"
    def listed(name, digest):
        (tmp_path / "list.json").write_text(json.dumps([dict(filename=name, content_details=dict(
            download_url=whole.as_uri(), sha256_hash=digest))]))
        return replace(REGISTRY["mendeley"], files=((tmp_path / "list.json").as_uri(), "ChestXRay2017.zip"))
    with pytest.raises(CourseError, match="could not be fetched(.|\n)*1. open https://data.mendeley"):
        fetch(listed("ChestXRay2017.zip", "0" * 64), tmp_path / "set")
    with pytest.raises(CourseError, match="could not be fetched"):
        fetch(listed("another.zip", "0" * 64), tmp_path / "set")
    assert not (tmp_path / "set").exists()
    good = listed("ChestXRay2017.zip", hashlib.sha256(whole.read_bytes()).hexdigest())
    frame = load_dataset(fetch(good, tmp_path / "set"), sizes=False)
    assert sorted(frame["label"]) == ["NORMAL", "VIRUS"] and frame["patient"].nunique() == 1


def test_archives_that_came_by_hand_are_unpacked_each_as_a_whole(tmp_path):
    heap = tmp_path / "nih"
    heap.mkdir()
    for i in (1, 2):
        with tarfile.open(heap / f"images_00{i}.tar.gz", "w:gz") as t:
            film = tarfile.TarInfo(f"images/0000000{i}_000.png")
            film.size = 8
            t.addfile(film, io.BytesIO(b"an image"))
    cut = heap / "images_003.tar.gz"
    cut.write_bytes((heap / "images_002.tar.gz").read_bytes()[:-20])
    (heap / "Data_Entry_2017_v2020.csv").write_text(
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position\n"
        "00000001_000.png,Mass,0,1,50,M,PA\n00000002_000.png,No Finding,0,2,50,F,AP\n")
    with pytest.raises(CourseError, match="(damaged|cannot be opened)(.|\n)*images_003"): fetch("nih", heap)
    assert not (heap / "images_003").exists()
    cut.unlink()
    frame = load_dataset(fetch("nih", heap), sizes=False)
    assert len(frame) == 2 and frame["Mass"].tolist() == [1, 0]
    assert not unpack_beside(heap)                                        # and nothing is unpacked twice


def test_a_download_that_was_stopped_at_its_very_end_is_finished(server, tmp_path, monkeypatch):
    import hashlib
    good = facts(server, "md5:" + hashlib.md5(Server.content).hexdigest())
    Server.breaks = True
    with pytest.raises(CourseError): fetch(good, tmp_path)
    part = next(tmp_path.glob(".*.part"))
    part.write_bytes(Server.content)
    Server.breaks, Server.full = False, True
    assert fetch(good, tmp_path).read_bytes() == Server.content
    Server.full = False


def test_published_counts_beside_what_is_here():
    def images(**by_split):
        return make_frame([dict(path=f"{s}{c}{i}.png", split=s, label=c) for s, said in by_split.items()
                           for c, n in said.items() for i in range(n)], unknown="image")
    found = lambda frame, name: compare_counts(frame, name).set_index(["split", "class"])["found"].to_dict()
    whole = {s: c for s, c in REGISTRY["mendeley"].counts.items()}
    same = compare_counts(images(**whole), "mendeley")
    assert (same["published"] == same["found"]).all() and len(same) == 7
    two = {s: {"NORMAL": c["NORMAL"], "PNEUMONIA": c["BACTERIA"] + c["VIRUS"]} for s, c in whole.items()}
    same = compare_counts(images(**two), "mendeley")
    assert (same["published"] == same["found"]).all() and set(same["class"]) == {"NORMAL", "PNEUMONIA", "all"}
    one_less = images(**whole).iloc[1:]
    less = compare_counts(one_less, "mendeley").query("published != found")
    assert less[["split", "class", "published", "found"]].to_numpy().tolist() == [
        ["train", "NORMAL", 1349, 1348], ["all", "all", 5856, 5855]]
    few = images(train={"Normal": 2, "COVID-19": 3, "Non-COVID": 1}, test={"Normal": 4})
    assert found(few, "covid") == {("train", "all"): 6, ("val", "all"): 0, ("test", "all"): 4,
                                   ("all", "Normal"): 6, ("all", "Non-COVID"): 1, ("all", "COVID-19"): 3,
                                   ("all", "all"): 10}
    two = few[few["label"] != "Non-COVID"].drop(columns="group").astype({"label": str})
    two = make_frame(two, labels=["Normal", "COVID-19"], unknown="image")
    assert found(two, "covid") == {("all", "Normal"): 6, ("all", "COVID-19"): 3}    # what speaks of those two
    with pytest.raises(CourseError, match="unknown data set"): compare_counts(few, "cuvid")


def test_the_registry_adds_up():
    for d in REGISTRY.values():
        if d.counts:
            assert sum(sum(c.values()) if isinstance(c, dict) else c
                       for c in d.counts.values()) == d.films, d.name
        assert d.layout in ("kaggle", "mendeley", "nih", "covid", "npz") and d.licence and d.citation
    assert len(registry()) == len(REGISTRY)


# ---------------------------------------------------------------- real films

def test_real_kaggle(real_data):
    f = load_dataset(real_data / "kaggle" / "chest_xray")
    assert f["split"].value_counts().to_dict() == {"train": 4615, "test": 601, "val": 16} and len(f) == 5232
    normal = f["label"] == "NORMAL"
    assert normal.sum() == f["patient"].isna().sum() == f["study"].notna().sum() == 1349
    assert f["patient"].nunique() == 1642 and f.groupby("patient")["cause"].nunique().gt(1).sum() == 808
    # one folder higher
    assert load_dataset(real_data / "kaggle")["path"].tolist() == f["path"].tolist()
    start = time.perf_counter()
    assert compare_counts(f, "kaggle").set_index(["split", "class"])["found"][("val", "NORMAL")] == 8
    r = check_dataset(f, against="kaggle")
    assert time.perf_counter() - start < 60
    assert r.bad.empty and len(r.pairs) == r.pairs["equal"].sum() == 26
    assert not r.table["problem"].str.contains("two splits|two labels").any()


def test_real_nih(real_data):
    start = time.perf_counter()
    full = load_dataset(real_data / "nih" / "labels" / "Data_Entry_2017_v2020.csv.gz")
    check_dataset(full, pixels=False, against="nih")
    assert time.perf_counter() - start < 15
    assert (
        len(full) == 112120
        and full["patient"].nunique() == 30805
        and int(full["Hernia"].sum()) == 227
        and int((full[list(FINDINGS)].sum(axis=1) == 0).sum()) == 60361
    )
    f = load_dataset(real_data / "nih")
    assert (
        f["split"].value_counts().to_dict() == {"train": 600, "val": 200}
        and (f[["height", "width"]] == 64).all(axis=None)
        and f["patient"].notna().all()
    )
    b = read_boxes(real_data / "nih" / "labels" / "BBox_List_2017.csv.gz")
    assert (len(b), b["name"].nunique(),
            b["finding"].nunique()) == (984, 880, 8) and set(b["finding"]) <= set(FINDINGS)


def test_real_films_read_again(real_data):
    r = read_relabelled(real_data / "nih")
    assert len(r) == r["path"].nunique() and list(Task.of(r).names) == [
        "Fracture", "Pneumothorax", "Airspace opacity", "Nodule or mass",
    ]
    assert detect_layout(real_data / "nih" / "labels" / "google2019_nih-chest-xray-labels.csv.gz") == "csv"


def test_real_covid_and_the_children_in_it(real_data):
    f = load_dataset(real_data / "covid_qu_ex_layout")
    assert f["label"].value_counts().to_dict() == {"Normal": 450, "COVID-19": 450,
                                                   "Non-COVID": 90} and f["patient"].isna().all()
    strange = make_frame(
        [
            dict(path=str(p), label="Normal", split="train")
            for p in sorted((real_data / "covid_qu_ex_layout" / "confound_paediatric_normals").iterdir())
        ]
    )
    pairs = check_dataset(strange, beside=load_dataset(real_data / "kaggle" / "chest_xray")).pairs
    assert pairs.loc[pairs["meta_set_a"] != pairs["meta_set_b"], "path_a"].nunique() == len(strange) == 78


def test_real_pneumoniamnist(real_data):
    f = load_dataset(real_data / "pneumoniamnist_standin.npz")
    assert f["split"].value_counts().to_dict() == {"train": 4108, "val": 524,
                                                   "test": 600} and f["patient"].isna().all()
    assert f[f["split"] == "val"]["label"].value_counts().to_dict() == {"PNEUMONIA": 389, "NORMAL": 135}
