"""A run knows what its training images looked like, which files they were, and what the network made of its validation images."""
import numpy as np
import pandas as pd
import pytest

pytest.importorskip("keras")
from cxr_course.core import CourseError, rng, sha256
from cxr_course.data.building import build_store
from cxr_course.data.resize import to_png
from cxr_course.frame import make_frame
from cxr_course.models.cnn import build_cnn
from cxr_course.training.reference import (
    image_stats, learned_from, load_reference, ood_reasons, ood_survey, reference_stats, write_reference,
)

SHAPE = (24, 20)


def noise(folder, name, **truth):
    "A small image of noise as a PNG file."
    x = .3 + .4 * rng(name).random((40, 36))
    return dict(path=to_png(x, folder / f"{name}.png", window=None), height=40, width=36, **truth)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    splits = ["train"] * 12 + ["val"] * 6 + ["test"] * 4 + [None] * 2
    rows = [noise(folder, f"{i}", patient=f"p{i // 2}", split=s, Effusion=i % 2, Mass=i % 3 == 0) for i,
            s in enumerate(splits)]
    return build_store(make_frame(rows, findings=["Effusion", "Mass"]), SHAPE, folder / "store")


@pytest.fixture(scope="module")
def model():
    return build_cnn("smallnet", (*SHAPE, 1), 2)


@pytest.fixture
def written(store, model, tmp_path):
    seen = write_reference(tmp_path, model, store, dict(labels=["Effusion", "Mass"]))
    return tmp_path, seen


def test_the_list_of_images_holds_files_and_parts(written, store):
    folder, seen = written
    listed = pd.read_csv(folder / "images.csv", dtype=str)
    assert list(listed) == ["path", "patient", "group", "split", "sha256"] and len(listed) == 22
    assert listed["split"].value_counts().to_dict() == {"train": 12, "val": 6, "test": 4}
    assert listed["sha256"].tolist() == [sha256(p) for p in listed["path"]]
    assert listed["group"].str.startswith("patient:p").all() and seen["images"] == 12


def test_learned_from_is_known_by_content_not_by_name(written, store, tmp_path_factory):
    folder, _ = written
    elsewhere = tmp_path_factory.mktemp("copies")
    copies = store.frame.assign(split=None, path=[str(elsewhere / f"copy{i}.png") for i in range(len(store))])
    for old, new in zip(store.frame["path"], copies["path"]):
        with open(old, "rb") as source, open(new, "wb") as target:
            target.write(source.read())
    known = learned_from(folder, build_store(copies, SHAPE, elsewhere / "store"))
    assert known.tolist() == store.frame["split"].isin(["train", "val"]).tolist()


def test_the_reference_is_that_of_the_validation_images(written, store, model):
    folder, _ = written
    kept = load_reference(folder)
    assert set(kept.paths) == set(store.frame.query("split == 'val'")["path"])
    z = np.asarray(model(store.array("val"), training=False))
    # findings: each a probability of its own
    assert np.allclose(kept.probabilities, 1 / (1 + np.exp(-z)), atol=1e-6)
    assert set(kept.keys) == {f"patient:p{i}" for i in (6, 7, 8)}


def test_training_and_validation_may_be_two_stores(store, model, tmp_path):
    teaches = store.using(store.frame[store.frame["split"] == "train"].reset_index(drop=True))
    judges = store.using(store.frame[store.frame["split"] != "train"].reset_index(drop=True))
    seen = write_reference(tmp_path, model, teaches, val=judges)
    assert seen == reference_stats(store)
    assert pd.read_csv(tmp_path / "images.csv")["split"].value_counts().to_dict() == {
        "train": 12, "val": 6, "test": 4,
    }


def test_unusual_images_are_named_with_the_measurement(store):
    seen = reference_stats(store)
    x = store.array("test")[..., 0]
    reasons = lambda x, aspect: ood_reasons(image_stats(x, [aspect] * len(x), seen["typical"]), seen)
    assert all("brightness" in words for words in reasons(x * 0 + 1, 0.9)) and all(
        "aspect" in words for words in reasons(x, 2.7)
    )
    assert ood_survey(store, seen, "test") == reasons(x, 36 / 40)


def test_damage_and_absence_are_said(written, store, model, tmp_path_factory):
    folder, _ = written
    file, empty = folder / "reference.npz", tmp_path_factory.mktemp("empty")
    whole = file.read_bytes()
    for damaged in (b"", b"nothing", whole[:200], whole[:-40]):
        file.write_bytes(damaged)
        with pytest.raises(CourseError, match="cannot be read"):
            load_reference(folder)
    for ask in (lambda: load_reference(empty), lambda: learned_from(empty, store)):
        with pytest.raises(CourseError, match="train it again"):
            ask()
    with pytest.raises(CourseError, match="other classes"):
        write_reference(empty, model, store, dict(labels=["Mass", "Effusion"]))
    with pytest.raises(CourseError, match="no training images"):
        reference_stats(store.using(store.frame.assign(split="test")))
