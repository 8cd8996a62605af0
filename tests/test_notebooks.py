"""Every notebook, in every folder, runs from top to bottom in a kernel of its own."""

import os

import pytest
from conftest import ROOT

from tools.course import course
from tools.notebooks import files, notebooks, write_notebook
from tools.run import execute

# notebooks without a headline figure, and all of library/
WITHOUT = ("index", "five_systems", "glossary", "how_this_is_built")


@pytest.mark.parametrize("notebook", notebooks(ROOT), ids=lambda notebook: notebook.name)
def test_notebook_runs(notebook, record_property):
    _, outcome = execute(notebook.path, "tiny")
    outcome.name = notebook.name
    record_property("notebook", outcome.line())
    assert not outcome.failure, outcome.failure
    assert outcome.headline or notebook.stem in WITHOUT or notebook.name.startswith("library/"), (
        "its last code cell must call core.headline"
    )


def test_no_notebook_is_forgotten():
    everything = {p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    assert everything == set(files(ROOT)) == {n.path for n in notebooks(ROOT)}


def test_a_failing_cell_is_named(tmp_path):
    path = write_notebook(
        tmp_path / "00_toy.ipynb", ["# Toy\n> One fault", "images = 12", "images / 0", "print('never')"]
    )
    notebook, outcome = execute(path, "tiny")
    assert outcome.failure == "cell 3, `images / 0`: ZeroDivisionError: division by zero"
    assert not notebook.cells[3].outputs


def test_a_dead_kernel_is_a_failure(tmp_path):
    path = write_notebook(tmp_path / "00_toy.ipynb", ["# Toy\n> It dies", "import os\nos._exit(1)"])
    assert "cell 2" in execute(path, "tiny")[1].failure


def test_an_endless_cell_is_a_failure(tmp_path):
    path = write_notebook(tmp_path / "00_toy.ipynb", ["# Toy\n> It hangs", "import time\ntime.sleep(600)"])
    outcome = execute(path, "tiny", timeout=1)[1]
    assert "cell 2" in outcome.failure and "Timeout" in outcome.failure


def test_notebooks_share_nothing(tmp_path):
    write_notebook(
        tmp_path / "nbs/00_a.ipynb", ["# A\n> It defines", "import os\nleft = os.environ['LEFT'] = 'here'"]
    )
    write_notebook(
        tmp_path / "nbs/lessons/01_b.ipynb",
        ["# B\n> It looks", "import os\nassert 'LEFT' not in os.environ and 'left' not in globals()"],
    )
    assert course(tmp_path, size="tiny") == 0


def test_the_run_size_reaches_the_notebook(tmp_path):
    path = write_notebook(
        tmp_path / "00_toy.ipynb",
        ["# Toy\n> Its size", "from cxr_course.core import headline, run_size\nheadline('size', run_size())"],
    )
    assert execute(path, "full")[1].headline == "size full"


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process has no groups")
@pytest.mark.xdist_group("some")
def test_a_group_stays_with_one_worker(request):
    "pytest-xdist tells groups by a suffix of the name; with pytest 9.2 it is lost, and with it every group."
    assert request.node.nodeid.endswith("@some")
