"""Several devices by Keras's own fit, several processes by the synchronous step: the same training as one."""
import json
import os
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest

SCRIPT = """
    import json, os, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import tensorflow as tf
    way, folder = sys.argv[1], Path(sys.argv[2])
    cpus = tf.config.list_physical_devices("CPU")
    device = tf.config.LogicalDeviceConfiguration()
    tf.config.set_logical_device_configuration(cpus[0], [device] * (2 if way == "mirrored" else 1))
    strategy = dict(one=lambda: None, mirrored=lambda: tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]),
                    workers=tf.distribute.MultiWorkerMirroredStrategy)[way]()
    import keras
    from test_training import world
    from cxr_course.core import CourseError
    from cxr_course.data.building import build_store
    from cxr_course.models.cnn import CNNSpec, build_cnn
    from cxr_course.training.fit import fit
    from cxr_course.training.synchronous import process_place
    store = build_store(world(folder / "png"), (24, 24), folder=folder / "store")
    me = process_place(strategy)[0]
    options = dict(epochs=3, batch=8, lr=1e-2, optimizer="adamw", seed=3, strategy=strategy)
    def go(name, outputs=2, **more):
        net = build_cnn(CNNSpec((4, 8), (8,), l2=.01), (24, 24, 1), outputs, seed=5)
        return fit(net, store, run=folder / name, **options | more)
    if way == "workers":
        try: go("never", lr=.1 + me)
        except CourseError as e: (folder / f"refused-{{me}}").write_text(str(e))
    rates = [.5] * 4 + [1.] * 4
    run = go(way, rates=rates)
    assert (run is None) == (me > 0)
"""


def start(way, folder, **environment):
    code = textwrap.dedent(SCRIPT.format(tests=os.path.dirname(__file__)))
    plain = {k: v for k, v in os.environ.items() if k != "TF_CONFIG"}
    return subprocess.Popen([sys.executable, "-c", code, way, str(folder)],
                            env={**plain, "TF_CPP_MIN_LOG_LEVEL": "3", "CXR_COURSE_QUIET": "1",
                                 **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    out, _ = process.communicate(timeout=500)
    assert process.returncode == 0, out[-3000:]


def ports(n):
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    try: return [s.getsockname()[1] for s in taken]
    finally: [s.close() for s in taken]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    finish(start("one", folder))
    finish(start("mirrored", folder))
    hosts = [f"127.0.0.1:{p}" for p in ports(2)]
    team = [start("workers", folder, TF_CONFIG=json.dumps(dict(cluster=dict(worker=hosts),
                                                               task=dict(type="worker", index=i))))
            for i in (0, 1)]
    for process in team: finish(process)
    return folder


@pytest.mark.parametrize("way", ["mirrored", "workers"])
def test_the_same_training_as_on_one_device(runs, way):
    alone, together = (pd.read_csv(runs / name / "history.csv").drop(columns="seconds")
                       for name in ("one", way))
    assert np.allclose(alone, together, atol=2e-3) and len(together) == 3
    a, b = (pd.read_csv(runs / name / "predictions.csv")["p_ILL"] for name in ("one", way))
    assert np.allclose(a, b, atol=2e-3)


def test_only_the_first_process_leaves_a_run(runs):
    assert sorted(p.name for p in runs.iterdir()
                  if (p / "card.json").exists()) == ["mirrored", "one", "workers"]
    assert not list(runs.glob(".workers.partial"))


def test_unequal_settings_are_refused_by_all(runs):
    for me in (0, 1): assert "they differ in lr" in (runs / f"refused-{me}").read_text()
