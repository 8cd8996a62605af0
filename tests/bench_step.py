"""What a step through the engine of `fit` costs beside bare `Model.fit`: alternating, the median ratio.

    python tests/bench_step.py [rounds]

Both train the same network on the same batches, by the same optimizer and loss, an epoch a turn. The engine
also measures loss, accuracy and AUC of the training images; bare Keras is timed twice, without any metric and
with its own accuracy and AUC.
Validation and writing, which a bare fit does not do, are left out.
"""
import json
import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ["CXR_COURSE_QUIET"] = "1"

import keras
import numpy as np
import tensorflow as tf

from cxr_course.frame import Task
from cxr_course.models.cnn import build_cnn
from cxr_course.training.learner import learner, run_epochs

SIDE, BATCH, STEPS = 64, 32, 20


def batches(seed):
    "Twenty batches from memory, so that reading costs nothing."
    return tf.data.Dataset.from_tensor_slices((IMAGES, TRUTH)).batch(BATCH).prefetch(2)


def bare(metrics):
    net = build_cnn("smallnet", (SIDE, SIDE, 1), seed=0)
    net.compile(keras.optimizers.Adam(1e-3), keras.losses.BinaryCrossentropy(from_logits=True),
                metrics=metrics)
    return lambda: net.fit(batches(0), verbose=0, shuffle=False)


def ours():
    net = build_cnn("smallnet", (SIDE, SIDE, 1), seed=0)
    taught, history = learner(net, Task(("no", "yes"), "classes"), lr=1e-3), []
    def epoch():
        history.clear()
        run_epochs(taught, batches, lambda: dict(val_loss=0.0), history, epochs=1, lr=1e-3,
                   schedule="constant")
    return epoch


def seconds(call):
    "Seconds on the clock, and seconds of the processor, which other programs on the machine disturb less."
    began = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - began[0], time.process_time() - began[1]


if __name__ == "__main__":
    draw = np.random.default_rng(0)
    IMAGES = draw.random((BATCH * STEPS, SIDE, SIDE, 1), dtype="float32")
    TRUTH = draw.integers(0, 2, BATCH * STEPS).astype("int32")
    calls = dict(plain=bare([]), plain_again=bare([]), ours=ours(),
                 metrics=bare([keras.metrics.BinaryAccuracy(threshold=0.0),
                               keras.metrics.AUC(from_logits=True)]))
    for call in calls.values():
        call()                                                        # compile
    found = {name: [] for name in calls}
    for turn in range(int(sys.argv[1]) if len(sys.argv) > 1 else 15):
        for name in list(calls)[::1 if turn % 2 else -1]:
            found[name].append(seconds(calls[name]))
    found = {name: np.array(turns) for name, turns in found.items()}
    for kind, of in enumerate(("clock", "processor")):
        def ratio(one, other, kind=kind):
            return round(float(np.median(found[one][:, kind] / found[other][:, kind])), 4)
        print(json.dumps(dict(of=of, step_ms=round(1000 * float(np.median(found["plain"][:, kind])) / STEPS,
                                                   2), ours_to_bare=ratio("ours", "plain"),
                              ours_to_bare_with_metrics=ratio("ours", "metrics"),
                              bare_to_bare=ratio("plain_again", "plain"), rounds=len(found["ours"]))))
