"""What all tests share: where the repository is, no network, one cache for the phantom's images, the real
images if they are at hand."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OFFLINE = ROOT / "tests" / "offline"
sys.path.insert(0, str(ROOT))  # for `tools`, which is never installed
sys.path.insert(0, str(OFFLINE))  # no test reaches another machine ...
sys.modules.pop("sitecustomize", None)
import sitecustomize  # noqa: E402, F401

# ... and neither do the kernels and programs that it starts
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(OFFLINE), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ["CXR_COURSE_SIZE"] = "tiny"

# `make test` runs two workers. Each keeps to its share of the cores,
# so that two TensorFlows do not fight over all of them.
worker = os.environ.get("PYTEST_XDIST_WORKER")
if hasattr(os, "sched_setaffinity"):
    cores, workers = sorted(os.sched_getaffinity(0)), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    share = (cores[int(worker[2:]) % len(cores) :: workers] or cores) if worker else cores


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "A file stays with one worker, since its tests share what they made; notebooks go where there is room."
    for item in items:
        notebook = item.path.name == "test_notebooks.py"
        if notebook and "scale" in item.name:            # they start Ray: never two of them at once
            item.add_marker(pytest.mark.xdist_group("scaling"))
        elif not notebook and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    "A test keeps to its worker's share of the cores; what starts several processes itself may use all."
    if hasattr(os, "sched_setaffinity"):
        groups = {mark.args[0] for mark in item.iter_markers("xdist_group")}
        os.sched_setaffinity(0, cores if "scaling" in groups else share)


def pytest_terminal_summary(terminalreporter):
    "What each notebook took and found."
    reports = terminalreporter.getreports("")
    notes = sorted(note for report in reports for name, note in report.user_properties if name == "notebook")
    if notes:
        terminalreporter.section("notebooks at size tiny")
    for note in notes:
        terminalreporter.write_line(note)


@pytest.fixture(scope="session")
def root():
    "The repository."
    return ROOT


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    "One cache for the session: the tiny world is made once, and nothing old can make a test pass."
    folder = tmp_path_factory.mktemp("cache")
    os.environ["CXR_COURSE_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def real_data():
    "The folder of real images: CXR_COURSE_REAL_DATA, or `../shared/data` beside the repository."
    folder = Path(os.environ.get("CXR_COURSE_REAL_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}; set CXR_COURSE_REAL_DATA to a folder that has them")
    return folder
