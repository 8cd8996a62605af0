"""Maps: cases worked out by hand, equalities between methods, batches, zeros, scores, controls, files."""
import numpy as np
import pandas as pd
import pytest

keras = pytest.importorskip("keras")
import tensorflow as tf

from cxr_course import cnn, data, gradcam, images
from cxr_course.core import CourseError, rng

GAP = cnn.Spec((8, 12), (), head="gap", padding="same", norm=True, last_pool=False)


@pytest.fixture(scope="module")
def films(): return rng("test.gradcam").random((5, 33, 47), dtype=np.float32)


@pytest.fixture(scope="module")
def model(): return cnn.build(GAP, (33, 47, 1), 3, seed=1)


@pytest.fixture(scope="module")
def dense(): return cnn.build(cnn.Spec((6, 8), (10,)), (33, 47, 1), 1, seed=2)


def raw(method, model, films, target, **options): return np.asarray(gradcam.METHODS[method](model, films[..., None], target, **options))


def handmade():
    "A film is its own only map; the head is mean and one weight: everything can be worked out on paper."
    look = keras.Sequential([keras.Input((2, 2, 1)), keras.layers.Conv2D(2, 1, use_bias=False)], name="features")
    decide = keras.Sequential([keras.Input((2, 2, 2)), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(1)], name="head")
    model = keras.Sequential([keras.Input((2, 2, 1)), look, decide])
    model.set_weights([np.array([1., -2.]).reshape(1, 1, 1, 2), np.array([[3.], [1.]]), np.array([.5])])
    return model


def test_by_hand():
    model, film = handmade(), np.array([[[0., 1.], [2., 4.]]], np.float32)
    a = np.stack([film, -2 * film], -1)                                    # the two maps
    assert np.allclose(raw("cam", model, film, gradcam.logit()), 3 * a[..., 0] + a[..., 1])                     # = film
    assert np.allclose(raw("gradcam", model, film, gradcam.logit()), film / 4) and np.allclose(raw("hirescam", model, film, gradcam.logit()), film / 4)
    mean = a.mean((1, 2))[0]
    assert np.allclose(raw("ablation", model, film, gradcam.logit()), 3 * mean[0] * a[..., 0] + mean[1] * a[..., 1])
    assert np.allclose(raw("alone", model, film, gradcam.logit()), raw("ablation", model, film, gradcam.logit()))
    assert np.allclose(raw("slope", model, film, gradcam.logit()), 1 / 4)
    assert np.allclose(raw("integrated", model, film, gradcam.logit(), steps=3), film / 4)
    assert np.allclose(raw("occlusion", model, film, gradcam.logit(), patch=1), (film - film.mean()) / 4)
    assert np.allclose(gradcam.maps(model, film, gradcam.logit(), "cam"), film / 4)


def test_gradcam_plus_by_hand():
    model, film = handmade(), np.array([[[0., 1.], [2., 4.]]], np.float32)
    g, total = np.array([3., 1.]) / 4, np.array([7., -14.])
    share = g ** 2 / (2 * g ** 2 + total * g ** 3)
    w = 4 * share * g
    assert np.allclose(raw("gradcam++", model, film, gradcam.logit()), w[0] * film + w[1] * -2 * film, rtol=1e-5)


@pytest.mark.parametrize("target", [gradcam.logit(2), gradcam.versus(1), gradcam.opposite(gradcam.logit(0)), gradcam.answer])
def test_where_the_head_is_a_mean_three_methods_are_one(model, films, target):
    cam = raw("cam", model, films, target)
    cells = np.prod(cam.shape[1:])
    for other in ("gradcam", "hirescam"): assert np.allclose(raw(other, model, films, target) * cells, cam, rtol=1e-3, atol=1e-5 * abs(cam).max())
    if target is not gradcam.answer: assert np.allclose(raw("ablation", model, films, target), raw("alone", model, films, target), atol=1e-5)


def test_hirescam_adds_up_for_one_dense_layer(films):
    linear = cnn.build(cnn.Spec((6, 8), ()), (33, 47, 1), 1, seed=3)
    hires, z = raw("hirescam", linear, films, gradcam.logit()), np.asarray(linear(films[..., None]))[:, 0]
    assert np.allclose(hires.sum((1, 2)) + float(cnn.head(linear).layers[-1].bias[0]), z, rtol=1e-4)


def test_integrated_gradients_are_complete(dense, films):
    total = raw("integrated", dense, films, gradcam.logit(), steps=200).sum((1, 2))
    z = lambda x: np.asarray(dense(x[..., None]))[:, 0]
    assert np.allclose(total, z(films) - z(films * 0), atol=.02 * abs(z(films) - z(films * 0)).max())


@pytest.mark.parametrize("method", gradcam.METHODS)
def test_a_batch_is_one_by_one_at_the_films_size(model, films, method):
    options = dict(patch=16) if method == "occlusion" else dict(steps=4) if method == "integrated" else {}
    together = gradcam.maps(model, films, gradcam.versus(1), method, batch=4, **options)
    single = np.concatenate([gradcam.maps(model, f, gradcam.versus(1), method, **options) for f in films])
    assert together.shape == films.shape and together.dtype == np.float32 and np.allclose(together, single, atol=1e-4)
    assert together.min() >= 0 and np.isin(together.max((1, 2)).round(6), (0, 1)).all()


def test_any_head_has_maps(dense, films):
    for method in set(gradcam.METHODS) - {"cam"}:
        options = dict(patch=16) if method == "occlusion" else dict(steps=2) if method == "integrated" else {}
        assert gradcam.maps(dense, films, method=method, **options).shape == films.shape
    with pytest.raises(CourseError, match="mean and one dense"): gradcam.maps(dense, films, method="cam")


def test_for_and_against_are_opposites(dense, films):
    one = raw("gradcam", dense, films, gradcam.logit())
    assert np.allclose(raw("gradcam", dense, films, gradcam.opposite(gradcam.logit())), -one)
    both = gradcam.maps(dense, films, gradcam.logit()) * gradcam.maps(dense, films, gradcam.opposite(gradcam.logit()))
    assert both.mean() < .05                                              # bilinear enlargement lets them touch, no more


def test_an_empty_map_stays_empty_and_says_so():
    model = handmade()
    film = np.array([[[0., 1.], [2., 4.]]], np.float32)
    heat = gradcam.maps(model, film, gradcam.opposite(gradcam.logit()))
    assert (heat == 0).all() and gradcam.silent(heat).all() and np.isfinite(heat).all()
    assert gradcam.pointing(heat, film > 1)[0] == 0 and gradcam.energy(heat, film > 1)[0] == 0
    assert any("nothing speaks" in t.get_text() for ax in gradcam.show(film / 4, heat).axes for t in ax.texts)
    assert np.allclose(gradcam.overlay(film[0] / 4, heat[0]), film[0, ..., None] / 4)


def test_targets_by_name():
    z = tf.constant([[1., 2., 4.]])
    assert float(gradcam.named("c", "abc", 3)(z)[0]) == 4 and float(gradcam.named("c", "abc", 3, against="a")(z)[0]) == 3
    one = tf.constant([[2.]])
    assert float(gradcam.named("sick", ["well", "sick"], 1)(one)[0]) == 2 and float(gradcam.named("well", ["well", "sick"], 1)(one)[0]) == -2
    assert np.isclose(gradcam.probability(2)(z)[0], np.exp(4) / np.exp([1, 2, 4]).sum()) and np.isclose(gradcam.probability(2, True)(z)[0], 1 / (1 + np.exp(-4)))
    assert float(gradcam.answer(z)[0]) == 4 and float(gradcam.answer(-one)[0]) == 2
    with pytest.raises(CourseError, match="knows well, sick"): gradcam.named("ill", ["well", "sick"], 1)


@pytest.mark.parametrize("wrong, says", [(np.zeros((2, 20, 20)), "takes images of"), (np.full((33, 47), np.nan), "no numbers")])
def test_films_that_do_not_fit(model, wrong, says):
    with pytest.raises(CourseError, match=says): gradcam.maps(model, wrong, gradcam.logit(0))


def test_a_target_that_is_none(model, films):
    with pytest.raises(CourseError, match="one number a film"): gradcam.maps(model, films, lambda z: z)
    with pytest.raises(CourseError, match="no method"): gradcam.maps(model, films, method="cam-grad")


def test_a_target_given_by_its_name(model, films):
    "A run and a bundle know their names; a bare network is told them."
    from types import SimpleNamespace
    run = SimpleNamespace(card=dict(labels=["a", "b", "c"]), model=model)
    expected = gradcam.maps(model, films, gradcam.logit(1))
    assert np.array_equal(gradcam.maps(model, films, "b", labels=["a", "b", "c"]), expected) and np.array_equal(gradcam.maps(run, films, "b"), expected)
    assert np.array_equal(gradcam.sanity(run, films[:1], "b", {"cam": "cam"}), gradcam.sanity(model, films[:1], gradcam.logit(1), {"cam": "cam"}))
    for call, words in ((lambda: gradcam.maps(model, films, "b"), "say labels="), (lambda: gradcam.maps(run, films, "d"), "knows a, b, c"),
                        (lambda: gradcam.maps(model, films, "b", labels=["a", "b"]), "3 outputs for 2 names"), (lambda: gradcam.maps(model, films, 1), "a name or a function")):
        with pytest.raises(CourseError, match=words): call()


def test_cam_refuses_what_comes_after_the_dense_layer(films):
    x = keras.Input((33, 47, 1))
    a = keras.layers.Conv2D(4, 3)(x)
    squashed = keras.layers.Dense(1, activation="tanh")(keras.layers.GlobalAveragePooling2D()(a))
    model = keras.Sequential([keras.Input((33, 47, 1)), keras.Model(x, a, name="features"), keras.Model(a, squashed, name="head")])
    with pytest.raises(CourseError, match="mean and one dense"): gradcam.maps(model, films, method="cam")


def test_bytes_are_films_too(model, films):
    grey = (films * 255).astype(np.uint8)
    assert np.array_equal(gradcam.maps(model, grey, gradcam.logit(0)), gradcam.maps(model, grey / np.float32(255), gradcam.logit(0)))


def test_scores_on_maps_made_by_hand():
    heat, mask = np.zeros((4, 10, 10), np.float32), np.zeros((4, 10, 10), bool)
    mask[:, 2:4, 2:4] = True
    heat[0, 2, 2], heat[1, 2, 5], heat[2] = 1, 1, 1                        # hit, two columns off, flat; the last is empty
    assert np.allclose(gradcam.pointing(heat, mask), [1, 0, .04, 0]) and np.allclose(gradcam.pointing(heat, mask, 2), [1, 1, .24, 0])
    assert np.allclose(gradcam.energy(heat, mask), [1, 0, .04, 0])
    scores = gradcam.score({"x": heat}, mask, list("aabc"), times=200)
    assert np.isclose(scores.loc["x", "pointing"], .26) and scores.loc["x", "silent"] == .25 and scores.loc["x", "pointing_low"] <= .26 <= scores.loc["x", "pointing_high"]


def test_controls_know_nothing(films):
    c = gradcam.controls(films)
    assert all(m.shape == films.shape and m.max() <= 1 + 1e-6 and m.min() >= 0 for m in c.values())
    assert np.array_equal(c["random"], gradcam.controls(films)["random"]) and not np.array_equal(c["random"][0], c["random"][1])
    assert np.unravel_index(c["centre"][0].argmax(), (33, 47)) == (16, 23)
    half = np.zeros((400, 32, 32), bool); half[:, :, :8] = True
    assert abs(gradcam.pointing(gradcam.controls(np.zeros((400, 32, 32)) + np.eye(32))["random"], half).mean() - .25) < .07


def test_boxes_follow_the_film_through_crop_and_shrinking():
    frame = pd.DataFrame(dict(path=["d/one.png", "d/two.png"], height=[100, 100], width=[200, 200]))
    boxes = pd.DataFrame([("one.png", "Mass", 100., 50., 50., 25.), ("one.png", "Nodule", 0., 0., 9., 9.)], columns=["name", "finding", "x", "y", "width", "height"])
    masks = gradcam.box_masks(frame, boxes, "Mass", (50, 50))              # the middle square of the film, halved
    assert masks[0, 25:37, 25:50].all() and masks[0].sum() in range(300, 340) and not masks[1].any()
    again = gradcam.box_masks(frame.iloc[:1].assign(height=50, width=100), boxes, "Mass", (50, 50), drawn_on=(100, 200))
    assert np.array_equal(again, masks[:1])


def test_guided_backpropagation_by_hand():
    look = keras.Sequential([keras.Input((1, 1, 1)), keras.layers.Conv2D(2, 1, use_bias=False, activation="relu")], name="features")
    decide = keras.Sequential([keras.Input((1, 1, 2)), keras.layers.Flatten(), keras.layers.ReLU(), keras.layers.Dense(1, use_bias=False)], name="head")
    model = keras.Sequential([keras.Input((1, 1, 1)), look, decide])
    model.set_weights([np.array([2., 3.]).reshape(1, 1, 1, 2), np.array([[5.], [-7.]])])
    x = np.ones((1, 1, 1, 1), np.float32)
    assert float(gradcam.slope(model, x, gradcam.logit())[0, 0, 0]) == 2 * 5 - 3 * 7
    assert float(gradcam.guided(model, x, gradcam.logit())[0, 0, 0]) == 2 * 5                     # the negative branch is cut off


def test_the_cascade_forgets_from_the_top_and_leaves_the_model_alone(model, films):
    before = [w.copy() for w in model.get_weights()]
    names, changed = [], []
    for name, twin in gradcam.cascade(model):
        names.append(name)
        changed.append(sum(not np.array_equal(a, b) for a, b in zip(before, twin.get_weights())))
    assert names[0] == "logits" and names[-1] == "conv1" and changed == sorted(changed) and changed[-1] > changed[0] > 0
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights()))
    assert all(np.array_equal(np.sort(a.ravel()), np.sort(b.ravel())) for a, b in zip(before, twin.get_weights()))


def test_agreement():
    a = rng("agreement").random((3, 8, 8))
    assert np.allclose(gradcam.agreement(a, a ** 3), 1) and np.allclose(gradcam.agreement(a, -a), -1) and (gradcam.agreement(a, a * 0) == 0).all()


def test_curves_begin_and_end_where_they_must(dense, films):
    heat = gradcam.maps(dense, films, gradcam.logit())
    deletion, insertion = gradcam.curves(dense, films, heat, gradcam.probability(), steps=4)
    p = np.asarray(gradcam.probability()(dense(films[..., None])))
    assert deletion.shape == insertion.shape == (5, 5) and np.allclose(deletion[:, 0], p) and np.allclose(insertion[:, -1], p, atol=1e-6)
    assert np.allclose(deletion[:, -1], insertion[:, 0], atol=1e-6)


def test_the_same_maps_as_tf_keras_vis(model, films):
    pytest.importorskip("tf_keras_vis", reason="tf-keras-vis is not installed: pip install --no-deps tf-keras-vis deprecated imageio wrapt")
    import bench_gradcam
    theirs = bench_gradcam.peer(model, gradcam.logit(1))(films[..., None])
    ours = np.maximum(raw("gradcam", model, films, gradcam.logit(1)), 0)
    assert theirs.shape == ours.shape and np.allclose(theirs, ours, atol=1e-5 * ours.max())


def test_backbones_of_chapter_14(films):
    transfer = pytest.importorskip("cxr_course.transfer")
    model = transfer.build("mobilenetv2", (64, 64, 1), 2)
    x = np.stack([images.resize(f, (64, 64)) for f in films[:2]])
    for method in ("gradcam", "gradcam++", "hirescam"):
        assert gradcam.maps(model, x, gradcam.versus(1), method).shape == (2, 64, 64)


def test_files(dense, films, tmp_path):
    for i in range(2): images.to_png(images.resize(films[i], (99, 160)), tmp_path / f"f{i}.png")
    paths = sorted(tmp_path.glob("*.png"))
    found = list(gradcam.explain_files(dense, ["NORMAL", "PNEUMONIA"], paths, "PNEUMONIA"))
    assert len(found) == 2 and found[0]["heat"].shape == found[0]["film"].shape == (99, 141)
    out = gradcam.save_overlay(found[0], tmp_path / "out" / "a.png")
    assert out.read_bytes()[:4] == b'\x89PNG' and images.shape_of(out)[1] > 300
    listed = gradcam.save_overlays(found + found[:1], tmp_path / "all")
    assert listed["overlay"].nunique() == 3 and len(list((tmp_path / "all").iterdir())) == 4 and not listed["empty"].all()
    with pytest.raises(CourseError, match="do not fit into one file"): gradcam.save_overlays(found, tmp_path / "two.png")
    with pytest.raises(CourseError, match="never overwritten"): gradcam.save_overlay(found[0], out)
    with pytest.raises(CourseError, match="it knows NORMAL, PNEUMONIA"): next(gradcam.explain_files(dense, ["NORMAL", "PNEUMONIA"], paths, "Mass"))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(CourseError, match="bad.png"): list(gradcam.explain_files(dense, ["NORMAL", "PNEUMONIA"], [tmp_path / "bad.png"]))


def test_boxes_of_real_films(real_data):
    boxes = data.boxes(real_data / "nih")
    assert len(boxes) == 984 and boxes["name"].nunique() == 880
    films = pd.DataFrame(dict(path=boxes["name"].unique(), height=64, width=64))
    masks = gradcam.box_masks(films, boxes, "Cardiomegaly", (64, 64), drawn_on=(1024, 1024))
    rows = boxes[boxes["finding"] == "Cardiomegaly"]
    area = (rows["width"] * rows["height"]).sum() / 1024 ** 2
    assert abs(masks.mean((1, 2)).sum() - area) < .05 * area and masks.any((1, 2)).sum() == rows["name"].nunique()
