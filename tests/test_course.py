"""`make course` as its users meet it: pages that need no network, and nothing lost when something goes
wrong."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from tools import outputs
from tools.course import course
from tools.notebooks import Fault, choose, notebooks, write_notebook
from tools.pages import FETCH, formula, markdown, page_of
from tools.readme import readme, stale_index, write_readme


@pytest.fixture
def three(tmp_path):
    "Three notebooks, one of them in a sub-folder; the second fails."
    write_notebook(
        tmp_path / "nbs/00_a.ipynb",
        [
            "# A\n> First",
            "## Why $x^2$?\n\nSee [B](lessons/01_b.ipynb#how).",
            "#| hide\nsecret = 1",
            "#| export\ndef f(): return 1",
            "print('headline: a 1')",
        ],
    )
    write_notebook(
        tmp_path / "nbs/lessons/01_b.ipynb",
        ["# B\n> Second", "Back to [A](../00_a.ipynb)".replace("Back", "## Back\n\nback"), "1 / 0"],
    )
    write_notebook(
        tmp_path / "nbs/lessons/02_c.ipynb",
        ["# C\n> Third", "import sys\nprint('noise', file=sys.stderr)\nprint('headline: <b>c 3')"],
    )
    return tmp_path


def test_goes_on_after_a_failure_and_says_so(three, capsys):
    assert course(three, size="tiny") == 1
    said = capsys.readouterr().out
    assert (
        "FAILED lessons/01_b, cell 3, `1 / 0`: ZeroDivisionError" in said
        and "1 of 3 notebooks failed" in said
    )
    assert re.search(r"Headline figures\n +00_a +a 1\n", said)
    left = {p.relative_to(three / "_course").as_posix() for p in (three / "_course").rglob("*.*")}
    assert left == {"00_a.html", "lessons/01_b.html", "lessons/02_c.html", "index.html", "runs.json"}


def test_pages(three):
    course(three, size="tiny")
    pages = {p.stem: p.read_text() for p in (three / "_course").rglob("*.html")}
    assert not any(FETCH.search(page) for page in pages.values())
    a, b = pages["00_a"], pages["01_b"]
    assert (
        "<math" in a and 'href="lessons/01_b.html#how"' in a and 'class="next" href="lessons/01_b.html"' in a
    )
    assert (
        'href="../00_a.html"' in b
        and 'class="previous" href="../00_a.html"' in b
        and 'href="../index.html"' in b
    )
    assert 'class="next" href="../lessons/02_c.html"' in b
    assert "secret" not in a and "#|" not in re.sub(r"<style>.*?</style>", "", a, flags=re.S)
    assert "ZeroDivisionError" in b and "<pre>noise" not in pages["02_c"] and "&lt;b&gt;" in pages["02_c"]
    assert (
        "a <b>1</b>" in pages["index"]
        and "ZeroDivisionError" in pages["index"]
        and 'href="lessons/02_c.html"' in pages["index"]
    )


def test_a_rerun_of_one_notebook_keeps_the_others(three):
    course(three, size="tiny")
    write_notebook(three / "nbs/lessons/01_b.ipynb", ["# B\n> Second", "print('headline: b 2')"])
    assert course(three, ["01"], size="tiny") == 0
    opening = (three / "_course/index.html").read_text()
    assert "a <b>1</b>" in opening and "b <b>2</b>" in opening and "ZeroDivisionError" not in opening


def test_two_at_a_time_make_the_same_pages(three, capsys):
    course(three, size="tiny", out=three / "one")
    course(three, size="tiny", out=three / "two", jobs=2)
    assert "2 at a time" in capsys.readouterr().out
    one, two = (
        {p.relative_to(three / name): p for p in (three / name).rglob("*.html")} for name in ("one", "two")
    )
    assert set(one) == set(two) and len(one) == 4
    for name in one:
        if name.name != "index.html":
            assert one[name].read_text() == two[name].read_text()
    ran = [[o["name"] for o in json.loads((three / n / "runs.json").read_text())] for n in ("one", "two")]
    assert ran[0] == ran[1] == ["00_a", "lessons/01_b", "lessons/02_c"]


def begun(three, jobs=1):
    "`make course` over three notebooks, the first done and the second, which would take a minute, under way."
    tells = f"Path('{three}/pid').write_text(str(os.getpid()))"
    waits = f"from pathlib import Path\nimport os, time\n{tells}\ntime.sleep(60)"
    write_notebook(three / "nbs/lessons/01_b.ipynb", ["# B\n> It waits", waits])
    program = "import sys; from tools.course import course; "
    program += f"sys.exit(course({str(three)!r}, size='tiny', jobs={jobs}))"
    # a suite started in the background ignores Ctrl-C, and so would its children
    run = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until = time.monotonic() + 120
    while not ((three / "pid").exists() and (three / "pid").read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    return run


def assert_first_is_whole(three):
    left = {
        p.relative_to(three / "_course").as_posix()
        for p in (three / "_course").rglob("*.*")
        if not p.name.startswith(".")
    }
    assert left == {"00_a.html", "index.html", "runs.json"}
    assert [o["name"] for o in json.loads((three / "_course/runs.json").read_text())] == ["00_a"]
    assert (three / "_course/00_a.html").read_text().rstrip().endswith("</html>")


def test_killed_halfway_leaves_whole_pages(three):
    run = begun(three)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    assert_first_is_whole(three)


def test_ctrl_c_stops_at_once_and_says_where(three):
    run = begun(three)
    os.killpg(run.pid, signal.SIGINT)
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 130 and "stopped in lessons/01_b" in said and "02_c" not in said.splitlines()[-1]
    assert_first_is_whole(three)
    with pytest.raises(ProcessLookupError):
        os.kill(int((three / "pid").read_text()), 0)


def test_ctrl_c_stops_all_that_run_at_a_time(three):
    write_notebook(three / "nbs/lessons/02_c.ipynb", ["# C\n> It waits", "import time\ntime.sleep(60)"])
    run = begun(three, jobs=2)
    while not (three / "_course/index.html").exists():
        assert run.poll() is None
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 130 and "stopped in lessons/01_b, lessons/02_c" in said
    assert_first_is_whole(three)


def test_outputs_are_stored_and_cleaned(three, monkeypatch):
    (three / "settings.ini").write_text(
        "[DEFAULT]\nlib_name = toy\nlib_path = cxr_course\nnbs_path = nbs\nuser = u\nrepo = toy\n"
        "author = a\nauthor_email = a@b.c\ndescription = d\nversion = 0\nmin_python = 3.11\n"
    )
    monkeypatch.chdir(three)  # a relative path, as `make outputs` is typed
    assert outputs.store_all(".", ["02"], size="tiny") == 0
    stored = json.loads((three / "nbs/lessons/02_c.ipynb").read_text())
    assert (
        "c 3" in "".join(stored["cells"][1]["outputs"][0]["text"]) and len(stored["cells"][1]["outputs"]) == 1
    )
    assert "language_info" not in stored["metadata"] and stored["cells"][1]["execution_count"] is None
    before = (three / "nbs/lessons/01_b.ipynb").read_bytes()
    assert outputs.store_all(".", ["01"], size="tiny") == 1
    assert (three / "nbs/lessons/01_b.ipynb").read_bytes() == before


def test_only(three):
    found = notebooks(three)
    names = lambda *words: [n.name for n in choose(found, words)]
    assert names() == ["00_a", "lessons/01_b", "lessons/02_c"]
    assert names("01") == names("b") == names("nbs/lessons/01_b.ipynb") == ["lessons/01_b"]
    assert names("lessons") == ["lessons/01_b", "lessons/02_c"] and names("02", "a") == [
        "00_a",
        "lessons/02_c",
    ]
    with pytest.raises(Fault, match="no notebook is called 99"):
        choose(found, ["99"])


@pytest.mark.parametrize("tool", ["course", "outputs", "check"])
def test_an_unknown_name_is_refused_without_a_traceback(tool):
    done = subprocess.run(
        [sys.executable, "-m", f"tools.{tool}", "zzz"], cwd=ROOT, capture_output=True, text=True
    )
    assert (
        done.returncode == 1 and "no notebook is called zzz" in done.stderr and "Traceback" not in done.stderr
    )


def test_a_formula_that_cannot_be_set_is_named():
    with pytest.raises(Fault, match="not known"):
        markdown(r"$\nonsense$")


@pytest.mark.parametrize(
    "tex",
    [
        r"\frac{a}{b}",
        r"\mathrm{d}x",
        r"\begin{aligned} a &= b \\ c &= d \end{aligned}",
        r"\hat{y} \in [0, 1]",
        r"\sum_{i=1}^{n} x_i",
        r"\lfloor x \rfloor",
    ],
)
def test_formulas(tex):
    made = formula(tex, "block")
    assert made.startswith("<math") and "\\" not in made and "<mi>&</mi>" not in made


@pytest.mark.parametrize(
    "link, leads_to",
    [
        ("a.ipynb", "a.html"),
        ("../library/x/cam.ipynb#why", "../library/x/cam.html#why"),
        ("./b.ipynb", "b.html"),
        ("../index.ipynb", "../about.html"),
        ("https://a.org/b.ipynb", "https://a.org/b.ipynb"),
        ("#here", "#here"),
    ],
)
def test_links_between_pages(link, leads_to):
    assert page_of(link) == leads_to


def test_the_readme_leads_to_the_notebooks(tmp_path):
    write_notebook(
        tmp_path / "nbs/index.ipynb",
        [
            "# T\n> t",
            "## L\n\n[a](lessons/00_a.ipynb), [b](https://b.org), [c](#l), [d](../LICENSE), ![e](i/e.png)",
        ],
    )
    text = readme(tmp_path)
    assert all(
        part in text
        for part in ("(nbs/lessons/00_a.ipynb)", "(https://b.org)", "(#l)", "(LICENSE)", "(nbs/i/e.png)")
    )


def test_the_table_of_lessons_follows_their_openings(tmp_path):
    opening = "## Now\n\n*About 40 minutes to read, half a minute to run at the default size.*"
    write_notebook(tmp_path / "nbs/lessons/07_a.ipynb", ["# Maps: what they show\n> t", opening])
    write_notebook(tmp_path / "nbs/lessons/08_b.ipynb", ["# Loss\n> t", "## Now\n\nNothing said."])
    first = "| 07 | [old](lessons/07_a.ipynb) | see | 1 | 1 |"
    second = "| 08 | [Loss](lessons/08_b.ipynb) | fit | 9 | 9 |"
    write_notebook(tmp_path / "nbs/index.ipynb", ["# T\n> t", f"## L\n\n{first}\n{second}"])
    assert write_readme(tmp_path) == 0 and stale_index(tmp_path) is None
    text = (tmp_path / "README.md").read_text()
    assert "| 07 | [Maps](nbs/lessons/07_a.ipynb) | see | 40 | ½ |" in text
    assert "| 08 | [Loss](nbs/lessons/08_b.ipynb) | fit | ? | ? |" in text


def test_make_says_what_python_it_needs(root, tmp_path):
    for name in ("Makefile", "settings.ini", "setup.py"):
        (tmp_path / name).write_bytes((root / name).read_bytes())
    done = subprocess.run(
        ["make", "course", "PYTHON=/no/such/python"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode and "needs Python 3.11" in done.stderr and "PYTHON=" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_make_alone_teaches(root):
    done = subprocess.run(["make"], cwd=root, capture_output=True, text=True)
    assert (
        done.returncode == 0
        and "make course" in done.stdout
        and "make test" in done.stdout
        and "make check" in done.stdout
    )


def test_the_change_log_names_what_is_there():
    "Every new name in the table of old and new names is defined in the module that the table says."
    table = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `[^|]+\| `([\w.]+)` \|$", table, re.M)
    assert len(rows) > 300
    for module, _, name in (row.rpartition(".") for row in rows):
        tree = ast.parse((ROOT / "cxr_course" / f"{module.replace('.', '/')}.py").read_text())
        made = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        made |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        assert name in made, f"{module}.{name}"
