"""Every notebook runs from top to bottom in a kernel of its own."""
import pytest
from conftest import ROOT

from cxr_course import build

NOTEBOOKS = sorted((ROOT / "nbs").glob("[!_.]*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, record_property):
    notebook, outcome = build.execute(path, "tiny")
    record_property("chapter", f"{path.stem:16} {outcome.seconds:5.1f} s {outcome.memory / 2**20:5.0f} MB  {outcome.headline or outcome.failure}")
    assert not outcome.failure, outcome.failure
    assert outcome.headline or path.stem == "index", "its last code cell must call core.headline"


def test_a_failing_cell_is_named(tmp_path):
    path = build.write_notebook(tmp_path / "00_toy.ipynb", ["# Toy\n> One fault", "films = 12", "films / 0", "print('never')"])
    notebook, outcome = build.execute(path, "tiny")
    assert outcome.failure == "cell 3, `films / 0`: ZeroDivisionError: division by zero"
    assert not notebook.cells[3].outputs


def test_a_dead_kernel_is_a_failure(tmp_path):
    path = build.write_notebook(tmp_path / "00_toy.ipynb", ["# Toy\n> It dies", "import os\nos._exit(1)"])
    assert "cell 2" in build.execute(path, "tiny")[1].failure


def test_an_endless_cell_is_a_failure(tmp_path):
    path = build.write_notebook(tmp_path / "00_toy.ipynb", ["# Toy\n> It hangs", "import time\ntime.sleep(600)"])
    outcome = build.execute(path, "tiny", timeout=1)[1]
    assert "cell 2" in outcome.failure and "Timeout" in outcome.failure


def test_chapters_share_nothing(tmp_path):
    build.write_notebook(tmp_path / "nbs/00_a.ipynb", ["# A\n> It defines", "import os\nleft = os.environ['LEFT'] = 'here'"])
    build.write_notebook(tmp_path / "nbs/01_b.ipynb", ["# B\n> It looks", "import os\nassert 'LEFT' not in os.environ and 'left' not in globals()"])
    assert build.course(tmp_path, run_size="tiny") == 0


def test_the_run_size_reaches_the_chapter(tmp_path):
    path = build.write_notebook(tmp_path / "00_toy.ipynb", ["# Toy\n> Its size", "from cxr_course.core import headline, size\nheadline('size', size())"])
    assert build.execute(path, "full")[1].headline == "size full"
