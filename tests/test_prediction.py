"""A bundle answers what training wrote down, whatever file the film comes in, and says when it should not be believed."""
import json
import shutil

import numpy as np
import pandas as pd
import pytest

from cxr_course.core import CourseError, rng
from cxr_course.data.resize import to_png
from cxr_course.frame import Task, make_frame
from cxr_course.training.card import model_card

SHAPE = (24, 20)


def small_frame(folder, kind):
    "Noise films with a bright or dark middle, as PNG files of several sizes."
    rows = []
    for i in range(48):
        draw, sick = rng(kind, i), i % 3
        x = .3 + .1 * draw.random((40 + i % 5, 36))
        x[10:30, 10:26] += .2 * sick
        path = to_png(x, folder / f"{i:02d}.png", window=None)
        truth = (
            dict(label=["A", "B", "C"][sick])
            if kind == "three"
            else (
                dict(label=["A", "B"][sick > 0])
                if kind == "two"
                else dict(Effusion=sick > 0, Mass=np.nan if i % 7 == 0 else i % 2)
            )
        )
        rows.append(dict(path=path, patient=f"p{i}", split="train" if i < 24 else "val" if i < 36 else "test",
                         height=x.shape[0], width=x.shape[1], **truth))
    return make_frame(rows, findings=["Effusion", "Mass"] if kind == "findings" else None)


@pytest.fixture(scope="module", params=["two", "three", "findings"])
def made(request, tmp_path_factory):
    "A run of each of the three kinds, its store and its bundle."
    from cxr_course.data.building import build_store
    from cxr_course.deploy.bundle import load_bundle
    from cxr_course.models.cnn import build_cnn
    from cxr_course.training.fit import fit
    from cxr_course.training.reference import write_reference
    from cxr_course.training.run import load_run
    folder = tmp_path_factory.mktemp(request.param)
    store = build_store(small_frame(folder, request.param), SHAPE, folder / "store")
    run = fit(build_cnn("smallnet", (*SHAPE, 1), Task.of(store.frame).outputs), store, run=folder / "run",
              epochs=2, batch=8)
    if "seen" not in run.card:
        (run.folder / "card.json").write_text(
            json.dumps(run.card | {"seen": write_reference(run.folder, run.model, store, run.card)})
        )
        run = load_run(run.folder)
    return run, store, load_bundle(folder / "run")


def test_round_trip(made):
    from cxr_course.deploy.predict import predict_files
    run, _, bundle = made
    again = predict_files(bundle, run.predictions["path"], batch=7)
    columns = [f"p_{c}" for c in bundle.classes]
    assert np.abs(again[columns].to_numpy() - run.predictions[columns].to_numpy()).max() < 1e-6
    assert Task.of(again) == Task.of(run.predictions) and again["patient"].isna().all()


def test_answers_follow_the_frozen_threshold(made):
    from cxr_course.deploy.predict import describe_prediction, predict_files
    run, _, bundle = made
    got = predict_files(bundle, run.predictions["path"])
    for row in got.to_dict("records"):
        p = [row[f"p_{c}"] for c in bundle.classes]
        if bundle.findings:
            expected = "; ".join(c for c, one in zip(bundle.classes, p) if bundle.threshold[c] is not None
                                 and one >= bundle.threshold[c]) or "none"
        elif bundle.threshold is None: expected = bundle.classes[int(np.argmax(p))]
        else: expected = bundle.classes[int(p[1] >= bundle.threshold)]
        assert row["meta_answer"] == expected
        words = describe_prediction(row, bundle)
        assert "score" in words and "diagnos" not in words and row["path"].rsplit("/", 1)[-1] in words


def test_card_in_both_forms(made):
    _, _, bundle = made
    text, page = model_card(bundle.card,
                            bundle.folder.name), model_card(bundle.card, bundle.folder.name, "html")
    for words in ("not for diagnosis", "fingerprint", "24 x 20", "AUC", "likeness"):
        assert words in text and words in page
    assert "<script" not in page
    with pytest.raises(CourseError, match="unknown form"): model_card(bundle.card, bundle.folder.name, "pdf")


def test_card_escapes_what_a_stranger_wrote(made):
    from cxr_course.deploy.bundle import Bundle
    run, _, bundle = made
    evil = Bundle(run.folder, None, {**bundle.card, "model": {**bundle.card["model"],
                                                              "name": "<script>alert(1)</script>"}})
    assert "<script" not in model_card(evil.card, evil.folder.name, "html")


def test_strange_pictures_are_told_apart(made):
    from cxr_course.training.reference import image_stats, ood_reasons
    _, store, bundle = made
    films = store.array("test")[..., 0]
    aspect = (store.frame["width"] / store.frame["height"]).to_numpy(float)[store.rows("test")]
    seen = bundle.card["seen"]
    assert not all(ood_reasons(image_stats(films, aspect, seen["typical"]), seen))
    assert all("brightness" in words
               for words in ood_reasons(image_stats(films * 0 + 1, aspect, seen["typical"]), seen))
    assert all("aspect" in words for words in ood_reasons(image_stats(films, aspect * 3, seen["typical"]),
                                                          seen))


def test_bad_files_are_all_named(made, tmp_path):
    from cxr_course.deploy.predict import predict_files
    run, _, bundle = made
    good = run.predictions["path"][0]
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(open(good, "rb").read()[:200])
    bad = ["text.png", "empty.jpg", "cut.png", "not there.png"]
    mixed = [tmp_path / bad[0], good, *(tmp_path / b for b in bad[1:])]
    with pytest.raises(CourseError) as error: predict_files(bundle, mixed)
    assert "4 of 5" in str(error.value) and all(b in str(error.value) for b in bad)
    kept = predict_files(bundle, mixed, skip_bad=True)
    assert list(kept["path"]) == [good] and len(kept.attrs["bad"]) == 4
    with pytest.raises(CourseError, match="1 of 1"):
        predict_files(bundle, tmp_path / "text.png", skip_bad=True)


def test_bundle_without_memory_still_predicts(made, tmp_path):
    from cxr_course.deploy.bundle import Bundle
    from cxr_course.deploy.predict import describe_prediction, predict_files
    run, _, bundle = made
    old = Bundle(run.folder, bundle.model, {k: v for k, v in bundle.card.items() if k != "seen"})
    assert predict_files(old, run.predictions["path"][:2])["meta_unlike"].isna().all()
    assert (
        "not recorded" in model_card(old.card, old.folder.name)
        and "unlike"
        not in describe_prediction(
            predict_files(old, run.predictions["path"][0]).to_dict("records")[0], old
        ).lower()
    )


def test_strangers_are_refused(made, tmp_path):
    import keras

    from cxr_course.deploy.bundle import load_bundle
    run, _, _ = made
    copy = shutil.copytree(run.folder, tmp_path / "run")
    x = keras.Input((*SHAPE, 1))
    keras.Model(x, keras.layers.Lambda(lambda v: v[:, :1, 0])(x)).save(copy / "model.keras")
    with pytest.raises(CourseError, match="Python code"): load_bundle(copy)
    (copy / "model.keras").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(CourseError, match="damaged"): load_bundle(copy)
    (copy / "card.json").write_text("{}")
    with pytest.raises(CourseError): load_bundle(copy)
    with pytest.raises(CourseError): load_bundle(tmp_path / "nowhere")


def test_the_card_knows_the_training_images(made):
    run, store, bundle = made
    card = json.loads((run.folder / "card.json").read_text(encoding="utf8"))
    assert (
        card == bundle.card
        and card["seen"]["images"] == 24
        and set(card["seen"]["limits"]) == {"aspect", "brightness", "contrast", "likeness"}
    )


def test_patterns_and_folders(made, tmp_path):
    from cxr_course.deploy.predict import expand_paths
    run, _, _ = made
    for i, p in enumerate(run.predictions["path"][:3]): shutil.copy(p, tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not looked at")
    assert (
        len(expand_paths(tmp_path))
        == len(expand_paths(tmp_path / "*.png"))
        == len(expand_paths(str(tmp_path / "*.png")))
        == 3
    )
    assert expand_paths([tmp_path / "2.png",
                         tmp_path / "0.png"]) == [str(tmp_path / "2.png"), str(tmp_path / "0.png")]
    with pytest.raises(CourseError, match="no picture"): expand_paths(tmp_path / "*.dcm")


@pytest.mark.parametrize("kind, units, activation, labels", [("two", 1, "sigmoid", ["A", "B"]), ("two", 2, "softmax", ["A", "B"]), ("three", 3, "softmax", ["A", "B", "C"]), ("findings", 2, "sigmoid", ["Effusion", "Mass"])])
def test_a_model_from_elsewhere_becomes_a_bundle(kind, units, activation, labels, tmp_path):
    import keras

    from cxr_course.data.building import build_store
    from cxr_course.deploy.bundle import bundle_of, load_bundle
    from cxr_course.deploy.predict import predict_files
    from cxr_course.deploy.wrap import wrap
    x = keras.Input((*SHAPE, 3))
    maps = keras.layers.Conv2D(4, 3, activation="relu")(x)
    original = keras.Model(x, keras.layers.Dense(units, activation=activation)(keras.layers.Flatten()(maps)))
    store = build_store(small_frame(tmp_path, kind), SHAPE, tmp_path / "store")
    made = bundle_of(wrap(original, preprocessing="tf", labels=labels), labels, tmp_path / "theirs",
                     findings=kind == "findings", seen=store)
    tests = store.frame.query("split == 'test'")["path"]
    got = predict_files(load_bundle(tmp_path / "theirs"), tests)
    expected = np.asarray(original(np.repeat(store.array("test"), 3, -1) * 2 - 1, training=False))
    assert (
        np.abs(got[[f"p_{c}" for c in labels]].to_numpy()[:, -units:] - expected).max() < 1e-5
        and got["meta_unlike"].notna().all()
    )
    assert Task.of(got).names == tuple(labels) and made.threshold == (
        None if kind == "three" else 0.5 if kind == "two" else {"Effusion": 0.5, "Mass": 0.5}
    )
    text = model_card(made.card, made.folder.name)
    for words in ("not for diagnosis", "trained: elsewhere", "not recorded here", "24 x 20", "likeness"):
        assert words in text
    with pytest.raises(CourseError, match="never overwritten"):
        bundle_of(made.model, labels, tmp_path / "theirs", findings=kind == "findings")
    with pytest.raises(CourseError, match="labels"):
        bundle_of(made.model, [*labels, "X"], tmp_path / "other", findings=True)
    with pytest.raises(CourseError, match="with wrap"): bundle_of(original, labels, tmp_path / "other")
    if kind == "three":
        with pytest.raises(CourseError, match="largest probability"):
            bundle_of(made.model, labels, tmp_path / "other", threshold=.4)


def test_half_a_bundle_is_none(tmp_path):
    from cxr_course.deploy.bundle import load_bundle
    for content, words in (
        ("{}", "no finished run"),
        ("[1]", "no finished run"),
        ("{", "cannot be read"),
        (json.dumps(dict(format=2, elsewhere=True)), "no such model"),
    ):
        (tmp_path / "card.json").write_text(content)
        with pytest.raises(CourseError, match=words): load_bundle(tmp_path)
