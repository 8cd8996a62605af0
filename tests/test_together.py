"""Several devices of one machine train as one does, by Keras's own fit. Several processes: test_scaling."""
import os
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest
from measure_long import contents

SCRIPT = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from cxr_course.scale.work import devices
    strategy = devices(2)
    from test_training import world
    from cxr_course.core import CourseError
    from cxr_course.data.building import build_store
    from cxr_course.models.cnn import CNNSpec, build_cnn
    from cxr_course.training.fit import fit
    folder = Path(sys.argv[1])
    store = build_store(world(folder / "png"), (24, 24), folder=folder / "store")
    def go(name, strategy=None, batch=8):
        net = build_cnn(CNNSpec((4, 8), (8,), l2=.01), (24, 24, 1), 2, seed=5)
        fit(net, store, run=folder / name, epochs=3, batch=batch, lr=1e-2, optimizer="adamw", seed=3,
            rates=[.5] * 4 + [1.] * 4, strategy=strategy)
    go("one")
    go("mirrored", strategy)
    try: go("uneven", strategy, batch=7)
    except CourseError as e: (folder / "refused").write_text(str(e))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    code = textwrap.dedent(SCRIPT.format(tests=os.path.dirname(__file__)))
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True,
                          env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CXR_COURSE_QUIET": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_two_devices_give_the_training_of_one(runs):
    alone, together = (pd.read_csv(runs / name / "history.csv").drop(columns="seconds")
                       for name in ("one", "mirrored"))
    assert np.allclose(alone, together, atol=2e-3) and len(together) == 3
    a, b = (pd.read_csv(runs / name / "predictions.csv")["p_ILL"] for name in ("one", "mirrored"))
    assert np.allclose(a, b, atol=2e-3)
    assert contents(runs / "one") == contents(runs / "mirrored")


def test_a_batch_that_two_devices_cannot_share_is_refused(runs):
    said = (runs / "refused").read_text()
    assert "2 devices cannot share a batch of 7" in said and "batch=6" in said
    assert not list(runs.glob("*uneven*"))
