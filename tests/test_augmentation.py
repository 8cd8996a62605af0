"""Augmentation where a lesson would not show it: odd values, findings frames, a broken image among many."""
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_course.core import CourseError
from cxr_course.frame import Task, make_frame
from cxr_course.training.augmentation import Augmentation, affine_matrix, metrics_over_seeds
from cxr_course.training.copies import write_copies

import keras


def films(folder, n=4, findings=False):
    rows = []
    for i in range(n):
        path = folder / f"{i}.png"
        Image.fromarray((np.random.default_rng(i).random((20 + i, 24)) * 255).astype(np.uint8)).save(path)
        truth = dict(Effusion=float(i % 2),
                     Mass=np.nan) if findings else dict(label="NORMAL" if i % 2 else "SICK")
        rows.append(dict(path=str(path), patient=f"p{i}", split="test" if i == n - 1 else "train", **truth))
    return make_frame(rows, labels=None if findings else ["NORMAL", "SICK"], findings=["Effusion", "Mass"]
                      if findings else None)


CHANGES = [dict(turn=30.), dict(zoom=1.4), dict(right=.2, down=-.1), dict(mirror=-1., turn=10.)]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_undo_each_other(change):
    shape, none = (33, 47), dict(turn=0., right=0., down=0., zoom=1.)
    there = np.vstack(
        [
            np.reshape(keras.ops.convert_to_numpy(affine_matrix(shape, **(none | change)))[..., :6], (2, 3)),
            [0, 0, 1],
        ]
    )
    y, x = 10., 31.
    back = np.linalg.solve(there, there @ [x, y, 1])
    assert np.allclose(back, [x, y, 1], atol=1e-3)
    size = 1 / change.get("zoom", 1.) ** 2
    assert np.isclose(abs(np.linalg.det(there[:2, :2])), size, rtol=1e-4)


def test_a_batch_of_any_size_keeps_shape_and_range():
    for n in (1, 5):
        x = np.random.default_rng(0).random((n, 16, 20, 1)).astype("float32")
        y = keras.ops.convert_to_numpy(Augmentation(turn=20, shift=0.2, zoom=0.3, contrast=2.0,
                                                    brightness=0.9, mirror=True)(x, training=True))
        assert y.shape == x.shape and y.min() >= 0 and y.max() <= 1 and np.isfinite(y).all()


@pytest.mark.parametrize("findings", [False, True])
def test_copies_are_of_training_films_alone_and_repeat_exactly(tmp_path, findings):
    frame = films(tmp_path, findings=findings)
    one, two = (write_copies(frame, tmp_path / name, copies=2, seed=3) for name in ("one", "two"))
    assert (one["split"] == "train").sum() == 9 and (one["split"] == "test").sum() == 1
    copies = one[one["meta_copy_of"].notna()]
    assert copies["patient"].tolist() == [p for p in frame["patient"][:3] for _ in range(2)]
    assert all((tmp_path / "one" / p.name).read_bytes() == p.read_bytes()
               for p in (tmp_path / "two").glob("*.png"))
    assert Task.of(one) == Task.of(frame)
    assert len(pd.read_csv(tmp_path / "one" / "copies.csv")) == 6


def test_a_broken_film_is_named_and_leaves_nothing(tmp_path):
    frame = films(tmp_path)
    (tmp_path / "1.png").write_bytes(b"not a picture")
    with pytest.raises(CourseError, match="1.png"): write_copies(frame, tmp_path / "copies")
    assert not [p for p in tmp_path.iterdir() if "copies" in p.name]


def test_over_seeds_agrees_with_scipy():
    from scipy import stats
    v = [.91, .93, .90, .96]
    expected = stats.t.interval(.95, 3, loc=np.mean(v), scale=stats.sem(v))
    assert np.allclose(metrics_over_seeds(v)[1:], expected)
