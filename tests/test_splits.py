"""What chapter 05 promises and does not show: other machines, odd frames, real lists, real speed."""
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cxr_course.core import CourseError
from cxr_course.data.duplicates import find_duplicates
from cxr_course.data.splits import (
    balanced_split, hold_out, leakage, official_split, patient_kfold, refuse_leakage, split_by_patient,
)
from cxr_course.frame import make_frame, regroup

REAL = Path(os.environ.get("CXR_COURSE_REAL_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
real = pytest.mark.skipif(not (REAL / "nih").exists(),
                          reason=f"the real data are not at {REAL} (set CXR_COURSE_REAL_DATA)")


def world(n=200, seed=0, root="set"):
    g = np.random.default_rng(seed)
    return make_frame([dict(path=f"{root}/{k}/{p}-{i}.png", patient=f"{p}", label=k) for p in range(n)
                       for k in [g.choice(["NORMAL", "BACTERIA", "VIRUS"], p=[0.5, 0.3, 0.2])]
                       for i in range(g.integers(1, 6))], ["NORMAL", "BACTERIA", "VIRUS"])


def nameless(f):
    "The same images, of nobody, each by itself."
    return regroup(f.assign(patient=None), "image")


CODE = "import pandas as pd, sys; from cxr_course import core, splits; f = core.frame(pd.read_csv(sys.argv[1], dtype={'patient': str})); print(''.join(s[1] for s in splits.split(f, seed=3).sort_values('path')['split']))"


def test_same_split_in_other_processes_and_row_orders(tmp_path):
    f, said = world(), set()
    for i, hashseed in enumerate(("0", "1", "random")):
        f.sample(frac=1, random_state=i)[["path", "patient", "label"]].to_csv(tmp_path / "f.csv", index=False)
        said.add(subprocess.run([sys.executable, "-c", CODE, str(tmp_path / "f.csv")],
                                env={**os.environ, "PYTHONHASHSEED": hashseed}, capture_output=True,
                                text=True, check=True).stdout)
    assert len(said) == 1


@pytest.mark.parametrize("cut", [split_by_patient, lambda f: patient_kfold(f, 3)[1], lambda f: balanced_split(f, 20, 10),
                                 lambda f: hold_out(f.assign(split=np.where(f["path"].str.contains("-0.png"), "test", "train")))])
def test_the_folder_does_not_matter_even_without_patients(cut):
    a, b = (cut(nameless(world(root=r))) for r in ("set", "/mnt/other disk/copy/of/set"))
    assert a["split"].tolist() == b["split"].tolist()


def test_windows_paths_split_like_others():
    f = nameless(world())
    elsewhere = nameless(f.assign(path="C:\\data\\" + f["path"].str.replace("/", "\\")))
    assert split_by_patient(f)["split"].tolist() == split_by_patient(elsewhere)["split"].tolist()


def test_seeds_differ_and_rows_stay():
    f = world()
    a, b = split_by_patient(f), split_by_patient(f, seed=1)
    assert (a["split"] != b["split"]).mean() > .2 and a.drop(columns="split").equals(f.drop(columns="split"))


def test_any_index_is_kept():
    f = world().set_index(pd.Index(np.zeros(len(world()), int)))
    assert (
        split_by_patient(f).index.equals(f.index)
        and (split_by_patient(f)["split"].to_numpy() == split_by_patient(world())["split"].to_numpy()).all()
    )
    assert hold_out(split_by_patient(f))["split"].notna().all()


def test_large_patients_do_not_drift():
    g = np.random.default_rng(0)
    sizes = g.geometric(.25, 3000)
    f = make_frame(pd.DataFrame({"path": [f"{i}.png" for i in range(sizes.sum())],
                                 "patient": np.repeat(np.arange(3000), sizes).astype(str),
                                 "Effusion": (g.random(sizes.sum()) < 0.1) * 1.0}), findings=["Effusion"])
    means = []
    for seed in range(5):
        s = split_by_patient(f,
                             seed=seed).groupby("patient").agg(s=("split", "first"),
                                                               n=("path", "size")).groupby("s")["n"].mean()
        means.append(s / s.mean())
    assert abs(pd.concat(means, axis=1).mean(axis=1) - 1).max() < .05


def test_patients_with_several_labels_stay_whole():
    f = make_frame([dict(path=f"{p}-{i}.png", patient=str(p), label="BACTERIA" if i % 2 else "VIRUS")
                    for p in range(100) for i in range(4)])
    refuse_leakage(split_by_patient(f)), refuse_leakage(balanced_split(f, 100, 20))
    assert abs(pd.crosstab(split_by_patient(f)["label"], split_by_patient(f)["split"],
                           normalize="index") - pd.Series(dict(train=0.7, val=0.1,
                                                               test=0.2))).max(axis=None) < 0.03


def test_unknown_findings_count_for_nobody():
    f = make_frame([dict(path=f"{p}.png", patient=str(p), Effusion=[1, 0, None][p % 3], Mass=None)
                    for p in range(90)], findings=["Effusion", "Mass"])
    assert (
        abs(
            split_by_patient(f).groupby("split")["Effusion"].sum() - pd.Series(dict(train=21, val=3, test=6))
        ).max()
        <= 1
    )


@pytest.mark.parametrize("fractions, text", [({"train": .5, "test": .4}, "add up to 1"), ({"train": 1.2, "test": -.2}, "above 0"), ({"train": .5, "exam": .5}, "unknown split"), ({"train": np.nan, "test": .5}, "add up")])
def test_bad_fractions(fractions, text):
    with pytest.raises(CourseError, match=text): split_by_patient(world(), fractions)


def test_too_few_patients():
    with pytest.raises(CourseError, match="no patient is left"): split_by_patient(world(2))
    with pytest.raises(CourseError, match="cannot be made of"): patient_kfold(world(3), 5)


def test_missing_patients_raise_unless_told():
    f = world()
    f.loc[3, "patient"] = None
    f = regroup(f)
    for call in (
        split_by_patient,
        patient_kfold,
        refuse_leakage,
        lambda f: leakage(f, f),
        lambda f: balanced_split(f, 5, 2),
        lambda f: hold_out(f.assign(split="train")),
        lambda f: official_split(f, {"train": [Path(p).name for p in f["path"]]}),
    ):
        with pytest.raises(CourseError, match="1 of .* have no patient"):
            call(f.assign(split="train") if call is refuse_leakage else f)
    refuse_leakage(split_by_patient(regroup(f, "image")))


def test_films_of_one_study_stay_together():
    f = make_frame([dict(path=f"{s}-{i}.png", study=f"IM-{s}", label=("A", "B")[s % 2]) for s in range(30)
                    for i in range(3)], unknown="image")
    assert split_by_patient(f).groupby("study")["split"].nunique().max() == 1


def test_hold_out_pools_a_validation_that_shares_patients():
    f = world().assign(split="train")
    f.loc[f["path"].str.endswith("-1.png"), "split"] = "val"
    f.loc[f["patient"].astype(int) < 30, "split"] = "test"
    with pytest.raises(CourseError, match="share"): refuse_leakage(f)
    out = hold_out(f, .25)
    assert ((out["split"] == "test") == (f["split"] == "test")).all()
    with pytest.raises(CourseError, match="not between"): hold_out(f, 1.5)
    with pytest.raises(CourseError, match="no split yet"): hold_out(world())


def test_balanced_counts_and_diversity():
    f = world(300)
    b = balanced_split(f, 100, 30)
    assert (pd.crosstab(b["label"], b["split"]) == [100, 30]).all(axis=None) and b["path"].is_unique
    n = b[(b["label"] == "NORMAL") & (b["split"] == "train")]["patient"].nunique()
    assert n == 100            # enough patients for one film each
    with pytest.raises(CourseError, match=r"VIRUS \d+ \(of \d+ outside the test\)"):
        balanced_split(f, 500, 10)
    with pytest.raises(CourseError, match="by class"):
        balanced_split(make_frame(f.drop(columns="label").assign(Mass=1.), findings=["Mass"]), 1, 1)


def test_official_lists(tmp_path):
    f = world(20)
    names = [Path(p).name for p in f["path"]]
    half = [n for n in names if int(n.split("-")[0]) < 10]
    rest = sorted(set(names) - set(half))
    (tmp_path / "a.txt").write_text("\r\n".join(half) + "\r\n\r\n")
    (tmp_path / "l.json").write_text(pd.Series({"train": half, "valid": rest}).to_json())
    assert official_split(f, {"train_val": tmp_path / "a.txt",
                              "test": rest})["split"].isin(["train", "test"]).all()
    assert official_split(f, tmp_path / "l.json")["split"].isin(["train", "val"]).all()
    with pytest.raises(CourseError, match="share"):
        official_split(f, {"train": names[::2], "test": names[1::2]})
    with pytest.raises(CourseError, match="cannot be read"):
        official_split(f, {"train": tmp_path / "none.txt"})
    with pytest.raises(CourseError, match="unknown split"): official_split(f, {"exam": names})


def test_twins_read_only_files_of_equal_size(tmp_path, monkeypatch):
    for name, text in dict(a="same", b="same", c="samf", d="longer").items():
        (tmp_path / name).write_text(text)
    one, other = (pd.DataFrame({"path": [str(tmp_path / n) for n in names]}) for names in ("ad", "bc"))
    from cxr_course.core import sha256
    from cxr_course.data import duplicates as duplicates_module
    read = []
    monkeypatch.setattr(duplicates_module, "sha256", lambda p, real=sha256: read.append(Path(p).name)
                        or real(p))
    assert [(Path(a).name, Path(b).name) for a, b,
            _ in find_duplicates(one, other).itertuples(index=False)] == [("a", "b")] and "d" not in read


def test_twins_by_sight(tmp_path):
    from PIL import Image
    g = np.random.default_rng(0)
    smooth = [
        np.asarray(
            Image.fromarray(g.integers(0, 256, (9, 8), dtype=np.uint8)).resize(
                (160, 180), Image.Resampling.BICUBIC
            )
        )
        for _ in range(6)
    ]
    for i, x in enumerate(smooth): Image.fromarray(x).save(tmp_path / f"{i}.png")
    Image.fromarray(smooth[1]).resize((120, 135)).save(tmp_path / "again.jpg", quality=80)
    one, other = (pd.DataFrame({"path": [str(tmp_path / n) for n in names]})
                  for names in (["0.png", "1.png", "2.png"], ["3.png", "4.png", "again.jpg", "5.png",
                                                              "0.png"]))
    found = find_duplicates(one, other, near=True)
    assert sorted((Path(a).name, Path(b).name) for a, b in zip(found["one"], found["other"])) == [
        ("0.png", "0.png"), ("1.png", "again.jpg"),
    ]
    assert len(find_duplicates(one, other)) == 1


@real
def test_official_nih_size_in_two_seconds():
    from cxr_course.data.loading import load_dataset
    from cxr_course.phantom.findings import FINDINGS
    f = load_dataset(next((REAL / "nih" / "labels").glob("Data_Entry*")), sizes=False)
    assert len(f) == 112_120
    started = time.process_time()
    cut = split_by_patient(f)
    assert time.process_time() - started < 2
    refuse_leakage(cut)
    share = cut.groupby("split")[list(FINDINGS)].sum() / f[list(FINDINGS)].sum()
    assert abs(share.T - [.2, .7, .1]).max(axis=None) < .01
    some = f[f["patient"].astype(int) < 3000]
    names, early = some["path"].map(lambda p: Path(p).name), some["patient"].astype(int) < 2000
    lists = {"train": names[early], "test": names[~early]}
    assert official_split(some, lists)["split"].value_counts().sum() == len(some)


@real
def test_real_kaggle_validation():
    from cxr_course.data.loading import load_dataset
    with pytest.raises(CourseError, match="have no patient"):
        hold_out(load_dataset(REAL / "kaggle" / "chest_xray", sizes=False))
    f = load_dataset(REAL / "kaggle" / "chest_xray", sizes=False, unknown="image")
    out = hold_out(f)
    share = (out["split"] == "val").sum() / (out["split"] != "test").sum()
    assert abs(share - .2) < .005 and (out["split"] == "test").sum() == (f["split"] == "test").sum()
    shares = out[out["split"] != "test"].groupby("split")["label"].apply(lambda s: (s == "PNEUMONIA").mean())
    assert abs(shares["train"] - shares["val"]) < .01


# ---------------------------------------------------------------- mutants that lived

def test_hold_out_refuses_a_test_that_shares_patients_with_the_rest():
    f = world().assign(split="train")
    # patients with two images stand on both sides
    f.loc[f["path"].str.endswith("-1.png"), "split"] = "test"
    with pytest.raises(CourseError, match="share .* patients"): hold_out(f)


def test_the_rarest_class_is_dealt_first():
    "Six rare patients, each of whom brings many images of the common class as well: dealt late, they would all be somewhere already."
    rows = [dict(path=f"c{p}-{i}.png", patient=f"c{p}", label="common") for p in range(60)
            for i in range(1 + p % 5)]
    rows += [dict(path=f"r{p}-{i}.png", patient=f"r{p}", label="rare" if i == 0 else "common")
             for p in range(10) for i in range(6)]
    for seed in range(20):
        rare = split_by_patient(make_frame(rows), {"train": 0.5, "test": 0.5},
                                seed).query("label == 'rare'")["split"].value_counts()
        assert rare.to_dict() == {"train": 5, "test": 5}, seed


def test_patients_with_many_images_do_not_drift_into_the_large_pile():
    "Half of what a usual patient brings, and not half of what this one brings, is added before piles are compared."
    g, shares = np.random.default_rng(1), []
    for seed in range(40):
        sizes = np.where(g.random(120) < .1, 12, 1)
        f = make_frame([dict(path=f"{p}-{i}.png", patient=str(p), label=("A", "B")[p % 2]) for p,
                        n in enumerate(sizes) for i in range(n)])
        large = f[f.groupby("patient")["path"].transform("size") == 12]
        shares.append((split_by_patient(f, {"train": 0.8, "test": 0.2},
                                        seed).loc[large.index, "split"] == "test").mean())
    assert abs(np.mean(shares) - .2) < .04


@pytest.mark.parametrize("n", [9, 15, 21, 34])
def test_single_images_are_dealt_by_websters_rule(n):
    shares, seats = dict(train=.7, val=.1, test=.2), dict(train=0, val=0, test=0)
    for _ in range(n):
        behind = min(shares, key=lambda s: (seats[s] + .5) / shares[s])
        seats[behind] += 1
    f = make_frame([dict(path=f"{p}.png", patient=str(p), label="only") for p in range(n)])
    assert split_by_patient(f)["split"].value_counts().to_dict() == seats


def test_columns_beside_the_findings_do_not_steer_the_split():
    g, n = np.random.default_rng(0), 300
    rows = pd.DataFrame({"path": [f"{i}.png" for i in range(n)], "patient": [str(i) for i in range(n)],
                         "Effusion": (g.random(n) < 0.2) * 1.0})
    told = rows.assign(smoker=(g.random(n) < 0.3) * 1.0, pacemaker=(g.random(n) < 0.1) * 1.0,
                       weight=g.integers(40, 120, n))
    assert (
        split_by_patient(make_frame(rows, findings=["Effusion"]))["split"].tolist()
        == split_by_patient(make_frame(told, findings=["Effusion"]))["split"].tolist()
    )


def test_misuse_of_the_guard_is_told():
    f = split_by_patient(world(40))
    train, test = f[f["split"] == "train"], f[f["split"] == "test"]
    refuse_leakage(train=train, test=test)
    refuse_leakage(train=["a", "b"], test=["c"])
    assert leakage(["a", "b"], ["b"]) and not leakage([1, 2], [3])
    with pytest.raises(CourseError, match="2 frames(.|\n)*refuse_leakage\\(train=one, test=other\\)"):
        refuse_leakage(train, test)
    with pytest.raises(CourseError, match="0 frames"): refuse_leakage()
    with pytest.raises(CourseError, match="no column `split`"): refuse_leakage(train.drop(columns="split"))
    with pytest.raises(CourseError, match="is no frame"): refuse_leakage(f, unknown="picture")
