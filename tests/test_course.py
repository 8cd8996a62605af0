"""`make course` as its users meet it: pages that need no network, and nothing lost when something goes wrong."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from cxr_course import build
from cxr_course.core import CourseError
from cxr_course.gates import FETCH


@pytest.fixture
def three(tmp_path):
    build.write_notebook(tmp_path / "nbs/00_a.ipynb", ["# A\n> First", "## Why $x^2$?\n\nSee [B](01_b.ipynb#how).", "#| hide\nsecret = 1", "#| export\ndef f(): return 1", "print('headline: a 1')"])
    build.write_notebook(tmp_path / "nbs/01_b.ipynb", ["# B\n> Second", "1 / 0"])
    build.write_notebook(tmp_path / "nbs/02_c.ipynb", ["# C\n> Third", "import sys\nprint('noise', file=sys.stderr)\nprint('<b>headline: c 3')"])
    return tmp_path


def test_goes_on_after_a_failure_and_says_so(three, capsys):
    assert build.course(three, run_size="tiny") == 1
    said = capsys.readouterr().out
    assert "FAILED 01_b, cell 2, `1 / 0`: ZeroDivisionError" in said and "1 of 3 chapters failed" in said
    assert {p.name for p in (three / "_course").iterdir()} == {"00_a.html", "01_b.html", "02_c.html", "index.html", "runs.json"}


def test_pages(three):
    build.course(three, run_size="tiny")
    pages = {p.stem: p.read_text() for p in (three / "_course").glob("*.html")}
    assert not any(FETCH.search(page) for page in pages.values())
    a = pages["00_a"]
    assert "<math" in a and 'href="01_b.html#how"' in a and 'href="01_b.html"' in a
    assert "secret" not in a and "#|" not in re.sub(r"<style>.*?</style>", "", a, flags=re.S)
    assert "ZeroDivisionError" in pages["01_b"] and "<pre>noise" not in pages["02_c"] and "&lt;b&gt;" in pages["02_c"]
    assert "a <b>1</b>" in pages["index"] and "ZeroDivisionError" in pages["index"]


def test_a_rerun_of_one_chapter_keeps_the_others(three):
    build.course(three, run_size="tiny")
    build.write_notebook(three / "nbs/01_b.ipynb", ["# B\n> Second", "print('headline: b 2')"])
    assert build.course(three, run_size="tiny", only=["01"]) == 0
    opening = (three / "_course/index.html").read_text()
    assert "a <b>1</b>" in opening and "b <b>2</b>" in opening and "ZeroDivisionError" not in opening


def begun(three):
    "`make course` over three chapters, the first done and the second, which would take a minute, under way."
    build.write_notebook(three / "nbs/01_b.ipynb", ["# B\n> It waits", f"from pathlib import Path\nimport os, time\nPath('{three}/pid').write_text(str(os.getpid()))\ntime.sleep(60)"])
    run = subprocess.Popen([sys.executable, "-c", f"import sys; from cxr_course.build import course; sys.exit(course({str(three)!r}, run_size='tiny'))"], start_new_session=True, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not (three / "pid").exists() and time.monotonic() < until: time.sleep(.1)
    return run


def assert_first_chapter_whole(three):
    left = {p.name for p in (three / "_course").iterdir() if not p.name.startswith(".")}
    assert left == {"00_a.html", "index.html", "runs.json"}
    assert [o["name"] for o in json.loads((three / "_course/runs.json").read_text())] == ["00_a"]
    assert (three / "_course/00_a.html").read_text().rstrip().endswith("</html>")


def test_killed_halfway_leaves_whole_pages(three):
    run = begun(three)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    assert_first_chapter_whole(three)


def test_ctrl_c_stops_at_once_and_says_where(three):
    run = begun(three)
    os.killpg(run.pid, signal.SIGINT)
    said, _ = run.communicate(timeout=30)
    assert run.returncode == 130 and "stopped in 01_b" in said and "02_c" not in said.splitlines()[-1]
    assert_first_chapter_whole(three)
    with pytest.raises(ProcessLookupError): os.kill(int((three / "pid").read_text()), 0)


def test_a_formula_that_cannot_be_set_is_named():
    with pytest.raises(CourseError, match="not known"): build.markdown(r"$\nonsense$")


@pytest.mark.parametrize("tex", [r"\frac{a}{b}", r"\mathrm{d}x", r"\begin{aligned} a &= b \\ c &= d \end{aligned}", r"\hat{y} \in [0, 1]", r"\sum_{i=1}^{n} x_i", r"\lfloor x \rfloor"])
def test_formulas(tex):
    made = build.formula(tex, "block")
    assert made.startswith("<math") and "\\" not in made and "<mi>&</mi>" not in made


def test_the_readme_leads_to_the_notebooks(tmp_path):
    build.write_notebook(tmp_path / "nbs/index.ipynb", ["# T\n> t", "## L\n\n[a](00_a.ipynb), [b](https://b.org), [c](#l), [d](../LICENSE), ![e](images/e.png)"])
    text = build.readme(tmp_path)
    assert all(part in text for part in ("(nbs/00_a.ipynb)", "(https://b.org)", "(#l)", "(LICENSE)", "(nbs/images/e.png)"))


def test_make_says_what_python_it_needs(root, tmp_path):
    for name in ("Makefile", "settings.ini", "setup.py"): (tmp_path / name).write_bytes((root / name).read_bytes())
    done = subprocess.run(["make", "course", "PYTHON=/no/such/python"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and "needs Python 3.11" in done.stderr and "PYTHON=" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_make_alone_teaches(root):
    done = subprocess.run(["make"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and "make course" in done.stdout and "make test" in done.stdout
