"""Stores and streams: concurrency, changed files, odd inputs, the real set."""
import errno
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_course.core import CourseError
from cxr_course.data import building as building_module
from cxr_course.data import splits as splits_module
from cxr_course.data.building import _write, build_store, decode_shard
from cxr_course.data.pipeline import Normalizer, to_dataset
from cxr_course.data.read import read_image, to_unit
from cxr_course.data.resize import crop_resize
from cxr_course.data.splits import refuse_leakage
from cxr_course.data.store import ImageStore
from cxr_course.frame import make_frame

REAL = Path(os.environ.get("CXR_COURSE_REAL_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    monkeypatch.setenv("CXR_COURSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXR_COURSE_QUIET", "1")


@pytest.fixture
def films(tmp_path):
    g, rows = np.random.default_rng(0), []
    (tmp_path / "films").mkdir()
    for i in range(40):
        p = tmp_path / "films" / f"{i:02d}.png"
        Image.fromarray(g.integers(0, 256, (24, 20), dtype=np.uint8)).save(p)
        rows.append(dict(path=str(p), patient=f"p{i // 2}",
                         split=("train", "train", "val", "test")[i // 2 % 4],
                         label=("NORMAL", "PNEUMONIA")[i // 2 % 2]))
    return make_frame(rows)


def contents(folder): return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def test_importing_does_not_bring_tensorflow():
    subprocess.run([sys.executable, "-c",
                    "import cxr_course.data.pipeline, cxr_course.data.building, sys; assert 'tensorflow' "
                    "not in sys.modules and 'keras' not in sys.modules"], check=True)


def test_the_same_films_named_from_elsewhere(films, tmp_path, monkeypatch):
    "Found on real films: a store of absolute names was opened for relative ones, in which it knew no film."
    absolute = build_store(films, (12, 10))
    monkeypatch.chdir(tmp_path)
    relative = build_store(films.assign(path=[os.path.relpath(p) for p in films["path"]]), (12, 10))
    assert (relative.take() == absolute.take()).all() and len(relative) == len(films)


def test_row_order_labels_and_splits_do_not_matter_to_the_store(films):
    a = build_store(films, (12, 10))
    b = build_store(films.sample(frac=1, random_state=0).assign(split="test"), (12, 10))
    assert a.folder == b.folder
    for s in (a, b):
        for i in (0, 17, 39):
            assert (s.take([i])[0] == np.round(crop_resize(read_image(s.frame["path"][i]),
                                                           (12, 10)) * 255)).all()


def test_another_shape_or_a_changed_file_is_another_store(films):
    a = build_store(films, (12, 10))
    assert build_store(films, (10, 12)).folder != a.folder
    Image.fromarray(np.zeros((24, 20), np.uint8)).save(films["path"][0])
    os.utime(films["path"][0], ns=(1, 1))
    b = build_store(films, (12, 10))
    assert b.folder != a.folder and (b.take([0]) == 0).all()
    with pytest.raises(CourseError, match="never overwritten"): build_store(films, (12, 10), a.folder)


def test_the_same_film_twice_and_a_part_of_the_frame(films):
    s = build_store(pd.concat([films, films.iloc[:5]], ignore_index=True), (12, 10))
    assert len(s) == 45 and len(s.pixels) == 40 and (s.take(np.arange(40, 45)) == s.take(np.arange(5))).all()
    assert (s.using(films.iloc[10:20]).images == s.take(np.arange(10, 20))).all()
    with pytest.raises(CourseError, match="not in this store"): s.using(films.assign(path="elsewhere.png"))


def test_threads_do_not_change_a_byte(films, tmp_path):
    assert contents(build_store(films, (12, 10), tmp_path / "one", workers=1).folder) == contents(
        build_store(films, (12, 10), tmp_path / "many", workers=7).folder
    )


CODE = """
import sys, time, pandas as pd
from cxr_course.data import building
from cxr_course.frame import make_frame
building.SHARD, real = 4, building.read_image
def slow(path): time.sleep(.02); return real(path)
building.read_image = slow
rows = pd.read_csv(sys.argv[1], dtype={"patient": str})
building.build_store(make_frame(rows), (12, 10), sys.argv[2], workers=2)
"""


@pytest.mark.parametrize("marks", [0, 1, 6])
def test_killed_and_resumed_equals_one_go(films, tmp_path, monkeypatch, marks):
    films.to_csv(tmp_path / "f.csv", index=False)
    victim = subprocess.Popen([sys.executable, "-c", CODE, str(tmp_path / "f.csv"), str(tmp_path / "store")])
    deadline = time.time() + 60
    while len(list(tmp_path.glob(".store*.part/rows-*.csv"))) < marks or not list(
        tmp_path.glob(".store*.part/images.npy")
    ):
        assert time.time() < deadline and victim.poll() is None
        time.sleep(.005)
    victim.kill()
    victim.wait()
    assert not (tmp_path / "store").exists()
    monkeypatch.setattr(building_module, "SHARD", 4)
    tried = []
    monkeypatch.setattr(building_module, "read_image", lambda p, real=read_image: tried.append(p) or real(p))
    resumed = build_store(films, (12, 10), tmp_path / "store")
    assert len(tried) <= 40 - 4 * marks and not list(tmp_path.glob(".store*"))
    monkeypatch.setattr(building_module, "SHARD", 256)
    assert contents(resumed.folder) == contents(build_store(films, (12, 10), tmp_path / "whole").folder)


def test_killed_between_the_index_and_the_rename(films, tmp_path, monkeypatch):
    real = os.replace
    def stop(a, b):
        if Path(b).name == "store": raise KeyboardInterrupt
        return real(a, b)
    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt): build_store(films, (12, 10), tmp_path / "store")
    monkeypatch.setattr(os, "replace", real)
    monkeypatch.setattr(building_module, "read_image", None)                 # nothing may be decoded again
    assert len(build_store(films, (12, 10), tmp_path / "store")) == 40


def test_full_disk_in_the_middle(films, tmp_path, monkeypatch):
    monkeypatch.setattr(building_module, "SHARD", 8)
    real, times = _write, []
    def full(*a):
        times.append(1)
        if len(times) == 3: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*a)
    monkeypatch.setattr(building_module, "_write", full)
    with pytest.raises(CourseError, match="No space left on device.*store\n.*free some space"):
        build_store(films, (12, 10), tmp_path / "store")
    assert not (tmp_path / "store").exists()
    tried = []
    monkeypatch.setattr(building_module, "read_image", lambda p, real=read_image: tried.append(p) or real(p))
    assert len(build_store(films, (12, 10), tmp_path / "store")) == 40 and len(tried) == 24


def test_a_disk_too_small_is_known_before_the_work(films, tmp_path, monkeypatch):
    monkeypatch.setattr(building_module.shutil, "disk_usage", lambda p: type("U", (), {"free": 100})())
    with pytest.raises(CourseError, match="MB are free"):
        build_store(films, (12, 10), tmp_path / "new" / "store")
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may write anywhere")
def test_read_only_folder(films, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(CourseError, match="could not be written"):
        build_store(films, (12, 10), tmp_path / "locked" / "store")


def test_a_folder_under_a_file(films, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CourseError, match="could not be written"):
        build_store(films, (12, 10), tmp_path / "file" / "store")


def test_all_bad_films_in_one_error(films, tmp_path):
    (tmp_path / "films" / "03.png").write_bytes(Path(films["path"][3]).read_bytes()[:200])
    (tmp_path / "films" / "07.png").write_text("not a film")
    (tmp_path / "films" / "11.png").write_bytes(b"")
    (tmp_path / "films" / "13.png").unlink()
    with pytest.raises(CourseError) as e: build_store(films, (12, 10), tmp_path / "store")
    assert all(n in str(e.value) for n in ("4 of 40", "03.png", "07.png", "11.png", "13.png",
                                           "skip_bad=True")) and not (tmp_path / "store").exists()
    s = build_store(films, (12, 10), tmp_path / "store", skip_bad=True)
    assert len(s) == 36 and [Path(p).name
                             for p in s.skipped["path"]] == ["03.png", "07.png", "11.png", "13.png"]
    assert (s.take([3])[0] == np.round(crop_resize(read_image(films["path"][4]), (12, 10)) * 255)).all()
    with pytest.raises(CourseError, match="4 of 40"): build_store(films, (12, 10), tmp_path / "store")
    assert len(s.using(films.drop([3, 7, 11, 13]))) == 36


def test_two_builders_at_once(films, tmp_path):
    for i in range(20):
        with ThreadPoolExecutor(3) as pool:
            a, b, c = pool.map(lambda _, i=i: build_store(films, (12, 10), tmp_path / f"store{i}"), range(3))
        assert (
            (a.images == b.images).all()
            and (b.images == c.images).all()
            and not list(tmp_path.glob(".store*"))
        )


def test_pictures_inside_an_npz(tmp_path):
    pytest.importorskip("cxr_course.data")
    from cxr_course.data.loading import load_dataset
    g = np.random.default_rng(0)
    x = {f"{s}_images": g.integers(0, 256, (6, 28, 28), dtype=np.uint8) for s in ("train", "val", "test")}
    np.savez_compressed(tmp_path / "toy.npz", **x, **{f"{s}_labels": np.arange(6)[:, None] % 2
                                                      for s in ("train", "val", "test")})
    s = build_store(load_dataset(tmp_path / "toy.npz"), (28, 28))
    assert (s.take(s.rows("val")) == x["val_images"]).all() and s.labels("test").tolist() == [0, 1] * 3


def test_unfinished_store_is_refused(tmp_path):
    (tmp_path / "half").mkdir()
    with pytest.raises(CourseError, match="no finished store"):
        ImageStore(tmp_path / "half", make_frame([dict(path="a", label="x")]))


def test_findings_keep_unknown(films):
    s = build_store(
        make_frame(
            films.drop(columns="label").assign(Effusion=[1.0, 0.0, None, 1.0] * 10, Mass=0.0),
            findings=["Effusion", "Mass"],
        ),
        (12, 10),
    )
    y = s.labels("train")
    assert (
        y.shape == (20, 2)
        and np.isnan(y).sum() == s.frame[s.frame["split"] == "train"]["Effusion"].isna().sum()
        and y.dtype == np.float32
    )
    with pytest.raises(CourseError, match="have no label"):
        build_store(films.assign(label=films["label"].where(films.index > 3)), (12, 10)).labels("train")


@pytest.mark.parametrize("shape", [64, (64,), (0, 10), (-1, 4), (8, 8, 1)])
def test_shapes_that_are_none(films, shape):
    with pytest.raises(CourseError, match="not a shape"): build_store(films, shape)


def test_nothing_to_decode(films):
    with pytest.raises(CourseError, match="no images"): build_store(films.iloc[:0], (8, 8))
    with pytest.raises(CourseError, match="batch of 0"):
        to_dataset(build_store(films, (12, 10)), "train", batch=0)


def test_normalizer_numbers(films):
    s, x = build_store(films, (12, 10)), None
    n, x = Normalizer("train").fit(s), s.array("train")
    assert np.isclose(n.mean, x.mean(dtype=float),
                      atol=1e-6) and np.isclose(n.std, x.std(dtype=float), atol=1e-6)
    assert np.allclose(n(x).mean(), 0, atol=1e-4) and np.allclose(n(x).std(), 1, atol=1e-4)
    f = Normalizer("image")(x)
    assert np.allclose(f.mean((1, 2, 3)), 0,
                       atol=1e-4) and np.allclose(f.std((1, 2, 3)), 1, atol=1e-3) and f.dtype == np.float32
    assert np.isfinite(Normalizer("image")(np.zeros((2, 4, 4, 1), np.float32))).all()
    for split in ("val", "test", None):
        with pytest.raises(CourseError, match="never fitted"): Normalizer("train").fit(s, split)
    with pytest.raises(CourseError, match="learns nothing"): Normalizer("fixed").fit(s)
    with pytest.raises(CourseError, match="unknown normalisation"): Normalizer("magic")


def test_keras_takes_the_stream(films):
    keras = pytest.importorskip("keras")
    s = build_store(films, (12, 10))
    model = keras.Sequential([keras.Input((12, 10, 1)), keras.layers.Flatten(), keras.layers.Dense(1)])
    model.compile("sgd", keras.losses.BinaryCrossentropy(from_logits=True))
    done = model.fit(to_dataset(s, "train", batch=8, shuffle=0),
                     validation_data=to_dataset(s, "val", batch=8), epochs=3, shuffle=False, verbose=0)
    assert len(done.history["val_loss"]) == 3 and np.isfinite(done.history["loss"]).all()
    model.fit(to_dataset(s, "train", batch=8, shuffle=0, repeat=True), steps_per_epoch=5, epochs=2,
              shuffle=False, verbose=0)
    assert model.predict(to_dataset(s, "test", batch=7), verbose=0).shape == (len(s.rows("test")), 1)


def test_bytes_become_numbers_in_one_way(films, tmp_path):
    "Each of the 256 grey levels is the same number in a file, in a store and in a stream, to the last bit."
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "levels.png")
    f = make_frame([dict(path=str(tmp_path / "levels.png"), patient="a", split="train", label="x")])
    s = build_store(f, (16, 16))
    x = read_image(tmp_path / "levels.png")
    assert (x == to_unit(np.arange(256, dtype=np.uint8)).reshape(16, 16)).all() and x.dtype == np.float32
    assert (s.array()[0, ...,
                      0] == x).all() and (next(iter(to_dataset(s, "train")))[0].numpy()[0, ..., 0] == x).all()
    assert (next(iter(to_dataset(s, "train", normalise=lambda x: x)))[0].numpy()[0, ..., 0] == x).all()


def test_another_engine_decodes_the_same_store(films, tmp_path, monkeypatch):
    "Shards decoded elsewhere, in any order, make the same bytes; a finished shard is not asked for again."
    monkeypatch.setattr(building_module, "SHARD", 8)
    asked = []
    def elsewhere(shards, shape):
        asked.extend(shards)
        with ThreadPoolExecutor(3) as pool:
            yield from pool.map(lambda paths: decode_shard(paths, shape, 1), shards)
    here, there = build_store(films, (12, 10),
                              tmp_path / "here"), build_store(films, (12, 10), tmp_path / "there",
                                                              decode=elsewhere)
    assert contents(here.folder) == contents(there.folder) and [len(a) for a in asked] == [8] * 5
    def dies(shards, shape):
        for i, one in enumerate(elsewhere(shards, shape)):
            if i == 3: raise KeyboardInterrupt
            yield one
    with pytest.raises(KeyboardInterrupt): build_store(films, (12, 10), tmp_path / "later", decode=dies)
    asked.clear()
    assert contents(build_store(films, (12, 10), tmp_path / "later",
                                decode=elsewhere).folder) == contents(here.folder) and len(asked) == 2


@pytest.mark.parametrize("mistake", [AttributeError, TypeError, ZeroDivisionError, NameError, AssertionError])
def test_a_mistake_of_ours_is_no_bad_film(films, monkeypatch, mistake):
    def wrong(*a, **k): raise mistake("a typing error")
    monkeypatch.setattr(building_module, "crop_resize", wrong)
    with pytest.raises(mistake, match="typing error"): build_store(films, (12, 10), skip_bad=True)


def test_leakage_is_looked_for_once_a_frame(films, monkeypatch):
    s, asked = build_store(films, (12, 10)), []
    monkeypatch.setattr(splits_module, "refuse_leakage", lambda f: asked.append(len(f)) or refuse_leakage(f))
    for split in ("train", "val", "train", "test"): to_dataset(s, split)
    assert asked == [40]
    leaky = s.using(films.assign(split=["train", "val"] * 20))
    for _ in range(2):
        with pytest.raises(CourseError, match="share 20 patients"): to_dataset(leaky, "train")
    nobody = s.using(make_frame(films.assign(patient=None, group=None)))
    # who is who is unknown, so nobody can be caught on both sides
    assert len(list(to_dataset(nobody, "val"))) == 1


def test_stream_repeats_and_normalises(films):
    s = build_store(films, (12, 10))
    n = Normalizer("image")
    x = np.concatenate([x for x, _ in to_dataset(s, "val", batch=3, normalise=n)])
    assert np.allclose(x, n(s.array("val")), atol=1e-6)
    orders = [[y.numpy().tolist() for _, y in d] for d in [to_dataset(s, "train", shuffle=5),
                                                           to_dataset(s, "train", shuffle=5),
                                                           to_dataset(s, "train", shuffle=6)]]
    assert orders[0] == orders[1] and orders[0] != orders[2]
    assert int(to_dataset(s, "train", batch=8).cardinality()) == 3
    endless = [len(x) for x, _ in to_dataset(s, "train", batch=8, shuffle=0, repeat=True).take(7)]
    assert endless == [8, 8, 4, 8, 8, 4, 8]
    assert sum(len(x) for x, _ in to_dataset(s, None)) == 40


@pytest.mark.skipif(
    not (REAL / "kaggle").exists(), reason=f"the real data are not at {REAL} (set CXR_COURSE_REAL_DATA)"
)
def test_the_real_kaggle_folder_killed_half_way(tmp_path):
    from cxr_course.data.loading import load_dataset
    f = load_dataset(REAL / "kaggle" / "chest_xray", sizes=False)
    f.to_csv(tmp_path / "f.csv", index=False)
    code = ("import sys, pandas as pd; from cxr_course.data.building import build_store; "
            "from cxr_course.frame import make_frame; "
            "rows = pd.read_csv(sys.argv[1], dtype={'patient': str, 'study': str, 'cause': str}); "
            "build_store(make_frame(rows), (64, 64), sys.argv[2])")
    victim = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "f.csv"), str(tmp_path / "store")])
    while len(list(tmp_path.glob(".store*.part/rows-*.csv"))) < 8:
        assert victim.poll() is None
        time.sleep(.01)
    victim.kill()
    victim.wait()
    s = build_store(f, (64, 64), tmp_path / "store")
    assert len(s) == 5232 and contents(s.folder) == contents(
        build_store(f, (64, 64), tmp_path / "whole").folder
    )
