"""Maps: cases worked out by hand, equalities between methods, batches, zeros, scores, controls, files."""
import numpy as np
import pandas as pd
import pytest

keras = pytest.importorskip("keras")
import tensorflow as tf

from cxr_course.core import CourseError, rng
from cxr_course.data import loading
from cxr_course.data.files import image_shape
from cxr_course.data.resize import resize, to_png
from cxr_course.explain.cam import saliency
from cxr_course.explain.maps import CAM_METHODS, explain, is_empty, overlay_map, show_explanations
from cxr_course.explain.panels import explain_files, save_overlay, save_overlays
from cxr_course.explain.sanity import (
    cascading_randomization, guided_backpropagation, rank_agreement, sanity_check,
)
from cxr_course.explain.scores import (
    baseline_maps, box_masks, deletion_insertion, energy_inside, pointing_game, score_maps,
)
from cxr_course.explain.targets import (
    class_logit, class_probability, logit_difference, other_classes, predicted_class, target_for,
)
from cxr_course.models.cnn import CNNSpec, build_cnn, classifier_head

GAP = CNNSpec((8, 12), (), head="gap", padding="same", norm=True, last_pool=False)


@pytest.fixture(scope="module")
def films(): return rng("test.gradcam").random((5, 33, 47), dtype=np.float32)


@pytest.fixture(scope="module")
def model(): return build_cnn(GAP, (33, 47, 1), 3, seed=1)


@pytest.fixture(scope="module")
def dense(): return build_cnn(CNNSpec((6, 8), (10,)), (33, 47, 1), 1, seed=2)


def raw(method, model, films, target, **options):
    return np.asarray(CAM_METHODS[method](model, films[..., None], target, **options))


def handmade():
    "A film is its own only map; the head is mean and one weight: everything can be worked out on paper."
    look = keras.Sequential([keras.Input((2, 2, 1)), keras.layers.Conv2D(2, 1, use_bias=False)],
                            name="features")
    decide = keras.Sequential([keras.Input((2, 2, 2)), keras.layers.GlobalAveragePooling2D(),
                               keras.layers.Dense(1)], name="head")
    model = keras.Sequential([keras.Input((2, 2, 1)), look, decide])
    model.set_weights([np.array([1., -2.]).reshape(1, 1, 1, 2), np.array([[3.], [1.]]), np.array([.5])])
    return model


def test_by_hand():
    model, film = handmade(), np.array([[[0., 1.], [2., 4.]]], np.float32)
    a = np.stack([film, -2 * film], -1)                                    # the two maps
    # = film
    assert np.allclose(raw("cam", model, film, class_logit()), 3 * a[..., 0] + a[..., 1])
    assert np.allclose(raw("gradcam", model, film, class_logit()),
                       film / 4) and np.allclose(raw("hirescam", model, film, class_logit()), film / 4)
    mean = a.mean((1, 2))[0]
    assert np.allclose(raw("ablation", model, film, class_logit()),
                       3 * mean[0] * a[..., 0] + mean[1] * a[..., 1])
    assert np.allclose(raw("alone", model, film, class_logit()), raw("ablation", model, film, class_logit()))
    assert np.allclose(raw("slope", model, film, class_logit()), 1 / 4)
    assert np.allclose(raw("integrated", model, film, class_logit(), steps=3), film / 4)
    assert np.allclose(raw("occlusion", model, film, class_logit(), patch=1), (film - film.mean()) / 4)
    assert np.allclose(explain(model, film, class_logit(), "cam"), film / 4)


def test_gradcam_plus_by_hand():
    model, film = handmade(), np.array([[[0., 1.], [2., 4.]]], np.float32)
    g, total = np.array([3., 1.]) / 4, np.array([7., -14.])
    share = g ** 2 / (2 * g ** 2 + total * g ** 3)
    w = 4 * share * g
    assert np.allclose(raw("gradcam++", model, film, class_logit()), w[0] * film + w[1] * -2 * film,
                       rtol=1e-5)


@pytest.mark.parametrize("target", [class_logit(2), logit_difference(1), other_classes(class_logit(0)), predicted_class])
def test_where_the_head_is_a_mean_three_methods_are_one(model, films, target):
    cam = raw("cam", model, films, target)
    cells = np.prod(cam.shape[1:])
    for other in ("gradcam", "hirescam"):
        assert np.allclose(raw(other, model, films, target) * cells, cam, rtol=1e-3,
                           atol=1e-5 * abs(cam).max())
    if target is not predicted_class:
        assert np.allclose(raw("ablation", model, films, target), raw("alone", model, films, target),
                           atol=1e-5)


def test_hirescam_adds_up_for_one_dense_layer(films):
    linear = build_cnn(CNNSpec((6, 8), ()), (33, 47, 1), 1, seed=3)
    hires, z = raw("hirescam", linear, films, class_logit()), np.asarray(linear(films[..., None]))[:, 0]
    assert np.allclose(hires.sum((1, 2)) + float(classifier_head(linear).layers[-1].bias[0]), z, rtol=1e-4)


def test_integrated_gradients_are_complete(dense, films):
    total = raw("integrated", dense, films, class_logit(), steps=200).sum((1, 2))
    z = lambda x: np.asarray(dense(x[..., None]))[:, 0]
    assert np.allclose(total, z(films) - z(films * 0), atol=.02 * abs(z(films) - z(films * 0)).max())


@pytest.mark.parametrize("method", CAM_METHODS)
def test_a_batch_is_one_by_one_at_the_films_size(model, films, method):
    options = dict(patch=16) if method == "occlusion" else dict(steps=4) if method == "integrated" else {}
    together = explain(model, films, logit_difference(1), method, batch=4, **options)
    single = np.concatenate([explain(model, f, logit_difference(1), method, **options) for f in films])
    assert (
        together.shape == films.shape
        and together.dtype == np.float32
        and np.allclose(together, single, atol=1e-4)
    )
    assert together.min() >= 0 and np.isin(together.max((1, 2)).round(6), (0, 1)).all()


def test_any_head_has_maps(dense, films):
    for method in set(CAM_METHODS) - {"cam"}:
        options = dict(patch=16) if method == "occlusion" else dict(steps=2) if method == "integrated" else {}
        assert explain(dense, films, method=method, **options).shape == films.shape
    with pytest.raises(CourseError, match="mean and one dense"): explain(dense, films, method="cam")


def test_for_and_against_are_opposites(dense, films):
    one = raw("gradcam", dense, films, class_logit())
    assert np.allclose(raw("gradcam", dense, films, other_classes(class_logit())), -one)
    both = explain(dense, films, class_logit()) * explain(dense, films, other_classes(class_logit()))
    # bilinear enlargement lets them touch, no more
    assert both.mean() < .05


def test_an_empty_map_stays_empty_and_says_so():
    model = handmade()
    film = np.array([[[0., 1.], [2., 4.]]], np.float32)
    heat = explain(model, film, other_classes(class_logit()))
    assert (heat == 0).all() and is_empty(heat).all() and np.isfinite(heat).all()
    assert pointing_game(heat, film > 1)[0] == 0 and energy_inside(heat, film > 1)[0] == 0
    assert any("nothing speaks" in t.get_text() for ax in show_explanations(film / 4, heat).axes
               for t in ax.texts)
    assert np.allclose(overlay_map(film[0] / 4, heat[0]), film[0, ..., None] / 4)


def test_targets_by_name():
    z = tf.constant([[1., 2., 4.]])
    assert float(target_for("c", "abc",
                            3)(z)[0]) == 4 and float(target_for("c", "abc", 3, against="a")(z)[0]) == 3
    one = tf.constant([[2.]])
    assert float(target_for("sick", ["well", "sick"],
                            1)(one)[0]) == 2 and float(target_for("well", ["well", "sick"], 1)(one)[0]) == -2
    assert np.isclose(class_probability(2)(z)[0], np.exp(4) / np.exp([1, 2, 4]).sum()) and np.isclose(
        class_probability(2, True)(z)[0], 1 / (1 + np.exp(-4))
    )
    assert float(predicted_class(z)[0]) == 4 and float(predicted_class(-one)[0]) == 2
    with pytest.raises(CourseError, match="knows well, sick"): target_for("ill", ["well", "sick"], 1)


@pytest.mark.parametrize("wrong, says", [(np.zeros((2, 20, 20)), "takes images of"), (np.full((33, 47), np.nan), "no numbers")])
def test_films_that_do_not_fit(model, wrong, says):
    with pytest.raises(CourseError, match=says): explain(model, wrong, class_logit(0))


def test_a_target_that_is_none(model, films):
    with pytest.raises(CourseError, match="one number a film"): explain(model, films, lambda z: z)
    with pytest.raises(CourseError, match="no method"): explain(model, films, method="cam-grad")


def test_a_target_given_by_its_name(model, films):
    "A run and a bundle know their names; a bare network is told them."
    from types import SimpleNamespace
    run = SimpleNamespace(card=dict(labels=["a", "b", "c"]), model=model)
    expected = explain(model, films, class_logit(1))
    assert np.array_equal(explain(model, films, "b", labels=["a", "b", "c"]),
                          expected) and np.array_equal(explain(run, films, "b"), expected)
    assert np.array_equal(sanity_check(run, films[:1], "b", {"cam": "cam"}),
                          sanity_check(model, films[:1], class_logit(1), {"cam": "cam"}))
    for call, words in (
        (lambda: explain(model, films, "b"), "say labels="),
        (lambda: explain(run, films, "d"), "knows a, b, c"),
        (lambda: explain(model, films, "b", labels=["a", "b"]), "3 outputs for 2 names"),
        (lambda: explain(model, films, 1), "a name or a function"),
    ):
        with pytest.raises(CourseError, match=words): call()


def test_cam_refuses_what_comes_after_the_dense_layer(films):
    x = keras.Input((33, 47, 1))
    a = keras.layers.Conv2D(4, 3)(x)
    squashed = keras.layers.Dense(1, activation="tanh")(keras.layers.GlobalAveragePooling2D()(a))
    model = keras.Sequential([keras.Input((33, 47, 1)), keras.Model(x, a, name="features"),
                              keras.Model(a, squashed, name="head")])
    with pytest.raises(CourseError, match="mean and one dense"): explain(model, films, method="cam")


def test_bytes_are_films_too(model, films):
    grey = (films * 255).astype(np.uint8)
    assert np.array_equal(explain(model, grey, class_logit(0)),
                          explain(model, grey / np.float32(255), class_logit(0)))


def test_scores_on_maps_made_by_hand():
    heat, mask = np.zeros((4, 10, 10), np.float32), np.zeros((4, 10, 10), bool)
    mask[:, 2:4, 2:4] = True
    # hit, two columns off, flat; the last is empty
    heat[0, 2, 2], heat[1, 2, 5], heat[2] = 1, 1, 1
    assert np.allclose(pointing_game(heat, mask),
                       [1, 0, 0.04, 0]) and np.allclose(pointing_game(heat, mask, 2), [1, 1, 0.24, 0])
    assert np.allclose(energy_inside(heat, mask), [1, 0, .04, 0])
    scores = score_maps({"x": heat}, mask, list("aabc"), times=200)
    assert (
        np.isclose(scores.loc["x", "pointing"], 0.26)
        and scores.loc["x", "silent"] == 0.25
        and scores.loc["x", "pointing_low"] <= 0.26 <= scores.loc["x", "pointing_high"]
    )


def test_controls_know_nothing(films):
    c = baseline_maps(films)
    assert all(m.shape == films.shape and m.max() <= 1 + 1e-6 and m.min() >= 0 for m in c.values())
    assert np.array_equal(c["random"], baseline_maps(films)["random"]) and not np.array_equal(
        c["random"][0], c["random"][1]
    )
    assert np.unravel_index(c["centre"][0].argmax(), (33, 47)) == (16, 23)
    half = np.zeros((400, 32, 32), bool); half[:, :, :8] = True
    assert abs(pointing_game(baseline_maps(np.zeros((400, 32, 32)) + np.eye(32))["random"],
                             half).mean() - 0.25) < 0.07


def test_boxes_follow_the_film_through_crop_and_shrinking():
    frame = pd.DataFrame(dict(path=["d/one.png", "d/two.png"], height=[100, 100], width=[200, 200]))
    boxes = pd.DataFrame([("one.png", "Mass", 100.0, 50.0, 50.0, 25.0),
                          ("one.png", "Nodule", 0.0, 0.0, 9.0, 9.0)],
                         columns=["name", "finding", "x", "y", "width", "height"])
    masks = box_masks(frame, boxes, "Mass", (50, 50))              # the middle square of the film, halved
    assert masks[0, 25:37, 25:50].all() and masks[0].sum() in range(300, 340) and not masks[1].any()
    again = box_masks(frame.iloc[:1].assign(height=50, width=100), boxes, "Mass", (50, 50),
                      drawn_on=(100, 200))
    assert np.array_equal(again, masks[:1])


def test_guided_backpropagation_by_hand():
    look = keras.Sequential([keras.Input((1, 1, 1)),
                             keras.layers.Conv2D(2, 1, use_bias=False, activation="relu")], name="features")
    decide = keras.Sequential([keras.Input((1, 1, 2)), keras.layers.Flatten(), keras.layers.ReLU(),
                               keras.layers.Dense(1, use_bias=False)], name="head")
    model = keras.Sequential([keras.Input((1, 1, 1)), look, decide])
    model.set_weights([np.array([2., 3.]).reshape(1, 1, 1, 2), np.array([[5.], [-7.]])])
    x = np.ones((1, 1, 1, 1), np.float32)
    assert float(saliency(model, x, class_logit())[0, 0, 0]) == 2 * 5 - 3 * 7
    # the negative branch is cut off
    assert float(guided_backpropagation(model, x, class_logit())[0, 0, 0]) == 2 * 5


def test_the_cascade_forgets_from_the_top_and_leaves_the_model_alone(model, films):
    before = [w.copy() for w in model.get_weights()]
    names, changed = [], []
    for name, twin in cascading_randomization(model):
        names.append(name)
        changed.append(sum(not np.array_equal(a, b) for a, b in zip(before, twin.get_weights())))
    assert (
        names[0] == "logits"
        and names[-1] == "conv1"
        and changed == sorted(changed)
        and changed[-1] > changed[0] > 0
    )
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights()))
    assert all(np.array_equal(np.sort(a.ravel()), np.sort(b.ravel())) for a,
               b in zip(before, twin.get_weights()))


def test_agreement():
    a = rng("agreement").random((3, 8, 8))
    assert np.allclose(rank_agreement(a, a**3),
                       1) and np.allclose(rank_agreement(a, -a), -1) and (rank_agreement(a, a * 0) == 0).all()


def test_curves_begin_and_end_where_they_must(dense, films):
    heat = explain(dense, films, class_logit())
    deletion, insertion = deletion_insertion(dense, films, heat, class_probability(), steps=4)
    p = np.asarray(class_probability()(dense(films[..., None])))
    assert (
        deletion.shape == insertion.shape == (5, 5)
        and np.allclose(deletion[:, 0], p)
        and np.allclose(insertion[:, -1], p, atol=1e-6)
    )
    assert np.allclose(deletion[:, -1], insertion[:, 0], atol=1e-6)


def test_the_same_maps_as_tf_keras_vis(model, films):
    pytest.importorskip("tf_keras_vis", reason="tf-keras-vis is not installed: pip install "
                        "--no-deps tf-keras-vis deprecated imageio wrapt")
    import bench_gradcam
    theirs = bench_gradcam.peer(model, class_logit(1))(films[..., None])
    ours = np.maximum(raw("gradcam", model, films, class_logit(1)), 0)
    assert theirs.shape == ours.shape and np.allclose(theirs, ours, atol=1e-5 * ours.max())


def test_backbones_of_chapter_14(films):
    transfer = pytest.importorskip("cxr_course.transfer")
    model = transfer.build("mobilenetv2", (64, 64, 1), 2)
    x = np.stack([resize(f, (64, 64)) for f in films[:2]])
    for method in ("gradcam", "gradcam++", "hirescam"):
        assert explain(model, x, logit_difference(1), method).shape == (2, 64, 64)


def test_files(dense, films, tmp_path):
    for i in range(2): to_png(resize(films[i], (99, 160)), tmp_path / f"f{i}.png")
    paths = sorted(tmp_path.glob("*.png"))
    found = list(explain_files(dense, ["NORMAL", "PNEUMONIA"], paths, "PNEUMONIA"))
    assert len(found) == 2 and found[0]["heat"].shape == found[0]["film"].shape == (99, 141)
    out = save_overlay(found[0], tmp_path / "out" / "a.png")
    assert out.read_bytes()[:4] == b'\x89PNG' and image_shape(out)[1] > 300
    listed = save_overlays(found + found[:1], tmp_path / "all")
    assert (
        listed["overlay"].nunique() == 3
        and len(list((tmp_path / "all").iterdir())) == 4
        and not listed["empty"].all()
    )
    with pytest.raises(CourseError, match="do not fit into one file"):
        save_overlays(found, tmp_path / "two.png")
    with pytest.raises(CourseError, match="never overwritten"): save_overlay(found[0], out)
    with pytest.raises(CourseError, match="it knows NORMAL, PNEUMONIA"):
        next(explain_files(dense, ["NORMAL", "PNEUMONIA"], paths, "Mass"))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(CourseError, match="bad.png"):
        list(explain_files(dense, ["NORMAL", "PNEUMONIA"], [tmp_path / "bad.png"]))


def test_boxes_of_real_films(real_data):
    boxes = loading.read_boxes(real_data / "nih")
    assert len(boxes) == 984 and boxes["name"].nunique() == 880
    films = pd.DataFrame(dict(path=boxes["name"].unique(), height=64, width=64))
    masks = box_masks(films, boxes, "Cardiomegaly", (64, 64), drawn_on=(1024, 1024))
    rows = boxes[boxes["finding"] == "Cardiomegaly"]
    area = (rows["width"] * rows["height"]).sum() / 1024 ** 2
    assert (
        abs(masks.mean((1, 2)).sum() - area) < 0.05 * area
        and masks.any((1, 2)).sum() == rows["name"].nunique()
    )
