"""How long do heat maps take? Grad-CAM of 64 images at 224 px, in one batch and one by one, with tf-keras-vis
beside it on the same model.

Run it with `python tests/bench_gradcam.py`; `make bench` collects the last line. tf-keras-vis is no
requirement of the course: without it (`pip install --no-deps tf-keras-vis deprecated imageio wrapt`) its
times are left out and the reason is said.
"""
from __future__ import annotations

import json
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# TensorFlow as it comes; the tests switch this off to be repeatable to the last digit
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"

import keras
import numpy as np

from cxr_course.core import rng
from cxr_course.explain.cam import grad_cam
from cxr_course.explain.maps import explain
from cxr_course.explain.targets import class_logit
from cxr_course.models.cnn import build_cnn, classifier_head, feature_extractor


def one_piece(model):
    "The same layers and weights without the two halves: tf-keras-vis looks for a layer in one flat model."
    layers = [layer for part in (feature_extractor(model), classifier_head(model)) for layer in part.layers]
    flat = keras.Sequential([keras.Input(model.input_shape[1:]),
                             *(type(layer).from_config(layer.get_config()) for layer in layers)])
    flat.set_weights(model.get_weights())
    return flat


def peer(model, target):
    "Grad-CAM by tf-keras-vis as a function of images (n, h, w, 1), before scaling; or the reason why not."
    try: from tf_keras_vis.gradcam import Gradcam
    except ImportError as e: return f"not installed ({e.name})"
    last = feature_extractor(model).layers[-1].name
    look = Gradcam(one_piece(model), clone=False)
    return lambda x: np.asarray(look(target, x, penultimate_layer=last, seek_penultimate_conv_layer=False,
                                     expand_cam=False, normalize_cam=False))


def seconds(work) -> float:
    "The quickest of three."
    def once():
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    return min(once() for _ in range(3))


def bench(model, count: int = 64, side: int = 224) -> dict:
    "Seconds of each way, their ratios, and the largest difference between the maps, relative to the largest."
    films, target = rng(0, "bench.gradcam").random((count, side, side), dtype=np.float32), class_logit(0)
    ours = lambda n: np.concatenate([explain(model, films[i : i + n], target, batch=n)
                                     for i in range(0, count, n)])
    # warm
    for n in (count, 1): explain(model, films[:n], target, batch=n)
    batch, single = seconds(lambda: ours(count)), seconds(lambda: ours(1))
    together, apart = ours(count), ours(1)
    out = dict(name=f"Grad-CAM, {count} images at {side} px, "
               f"{model.name} ({model.count_params():,} parameters)", one_batch=round(batch, 2),
               one_by_one=round(single, 2), ratio=round(single / batch, 2),
               largest_difference=float(np.abs(together - apart).max()))
    theirs = peer(model, target)
    if isinstance(theirs, str): return out | dict(peer=f"tf-keras-vis: {theirs}")
    x = films[..., None]
    for n in (count, 1): theirs(x[:n])
    peer_batch, peer_single = seconds(lambda: theirs(x)), seconds(
        lambda: [theirs(x[i : i + 1]) for i in range(count)]
    )
    raw, its = np.maximum(np.asarray(grad_cam(model, x, target)), 0), theirs(x)
    return out | dict(peer="tf-keras-vis", peer_one_batch=round(peer_batch, 2),
                      peer_one_by_one=round(peer_single, 2), ratio_to_peer=round(peer_batch / batch, 2),
                      ratio_to_peer_one_by_one=round(peer_single / batch, 2),
                      peer_difference=float(np.abs(raw - its).max() / np.abs(raw).max()))


if __name__ == "__main__":
    result = bench(build_cnn("separable", (224, 224, 1), 14, seed=1))
    assert result["largest_difference"] < 1e-3 and result.get("peer_difference", 0) < 1e-4
    print(json.dumps(result))
