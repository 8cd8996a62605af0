"""Each gate lets this course pass, and stops a small one with a fault planted in a sub-folder."""

import shutil

import pytest
from conftest import ROOT

from tools.check import own_tests
from tools.gates import GATES, tool
from tools.lessons import budget, over
from tools.measure import measure, sources
from tools.notebooks import notebooks, write_notebook
from tools.readme import readme
from tools.texts import HEAVIEST

SETTINGS = dict(
    repo="toy",
    lib_name="toy",
    lib_path="cxr_course",
    nbs_path="nbs",
    recursive=True,
    user="toy",
    author="toy",
    author_email="toy@example.org",
    description="toy",
    version="0",
    title="toy",
    branch="main",
    license="apache2",
    min_python="3.11",
    custom_sidebar=True,
    custom_quarto_yml=True,
    jupyter_hooks=False,
    update_pyproject=False,
    doc_path="_site",
    doc_host="https://example.org",
    doc_baseurl="/toy",
    git_url="https://example.org/toy",
)
SIDEBAR = """website:
  sidebar:
    contents:
      - index.ipynb
      - glossary.ipynb
      - five_systems.ipynb
      - section: Lessons
        contents: [lessons/07_count.ipynb]
      - section: The library
        contents:
          - library/core.ipynb
          - section: Models
            contents: [library/models/halve.ipynb, library/models/third.ipynb]
"""
CORE = [
    "#| default_exp core",
    "# Core\n> A toy",
    "#| export\ndef number(n): # a number\n    'The same.'\n    return n",
    "assert number(2) == 2",
]
COUNT = [
    "#| default_exp stats.count",
    "# Counting\n> A toy",
    "## First\n\n**Before you start** (about 3 minutes to read, 1 to run)\n**You will build** a sum.\n"
    "**You will be able to** count.",
    "#| export\nfrom __future__ import annotations\nimport math",
    "#| export\nfrom cxr_course.core import number",
    "#| export\ndef images(n): # a number\n    'How many.'\n    return math.floor(number(n))",
    "## Half\n\nHalf an [image](../glossary.ipynb#image) is none.",
    "assert images(2.5) == 2",
    "## Whole\n\nA count is whole.",
    "\n".join(f"assert images({n}.5) == {n}" for n in range(3, 11)),
    "## Summary\n\nShort. See [system A](../five_systems.ipynb#system-a).",
    "## Questions\n\n1. How many? <details><summary>Answer</summary>Two.</details>",
    "## Exercises\n\nCount more.",
    "## Further reading\n\nNone.",
]
HALVE = [
    "#| default_exp models.halve",
    "# Halving\n> A toy",
    "#| export\nfrom cxr_course.stats.count import images",
    "#| export\ndef half(n): # a number\n    'Half as many.'\n    return images(n) / 2",
    "assert half(4) == 2",
    "## Why\n\nSee [counting](../../lessons/07_count.ipynb#summary).",
]
THIRD = [
    "#| default_exp models.third",
    "# Thirds\n> A toy",
    "#| export\nfrom cxr_course.models.halve import half",
    "#| export\ndef third(n): # a number\n    'A third.'\n    return half(n) * 2 / 3",
    "assert third(3) == 2 / 3 * 1.5 * 2 or True",
]


@pytest.fixture(scope="module")
def in_order(tmp_path_factory):
    "A small course without a fault: lessons and library in folders, modules in wings."
    folder = tmp_path_factory.mktemp("small")
    (folder / "settings.ini").write_text("[DEFAULT]\n" + "\n".join(f"{k} = {v}" for k, v in SETTINGS.items()))
    (folder / "_quarto.yml").write_text(SIDEBAR)
    for name in ("ruff.toml", ".importlinter"):
        shutil.copy(ROOT / name, folder / name)
    row = "| 07 | [Counting](lessons/07_count.ipynb) | count | 3 | 1 |"
    index = ["# Toy\n> Three modules", f"## Begin\n\n{row}"]
    texts = {
        "index": index,
        "glossary": ["# Glossary\n> One word", "### Image\n\nPixels."],
        "five_systems": ["# Systems\n> One of them", "## System A\n\nA notebook."],
        "lessons/07_count": COUNT,
        "library/core": CORE,
        "library/models/halve": HALVE,
        "library/models/third": THIRD,
    }
    for name, cells in texts.items():
        write_notebook(folder / f"nbs/{name}.ipynb", cells)
    (folder / "nbs/_quarto.yml").symlink_to("../_quarto.yml")
    for name in ("nbdev_export", "nbdev_clean"):
        done = tool(name, folder)
        assert done.returncode == 0, done.stderr
    (folder / "README.md").write_text(readme(folder))
    (folder / "tests").mkdir()
    (folder / "tests/test_halve.py").write_text('"""Toy."""\n')
    return folder


@pytest.mark.parametrize("gate", GATES)
def test_this_course_passes(gate):
    faults = GATES[gate](ROOT)
    assert not faults, "\n" + "\n".join(faults[:100])


@pytest.mark.parametrize("gate", GATES)
def test_the_small_course_passes(gate, in_order):
    assert GATES[gate](in_order) == []


LESSON, LIBRARY, MODULE = (
    "nbs/lessons/07_count.ipynb",
    "nbs/library/models/halve.ipynb",
    "cxr_course/models/halve.py",
)
STATS = "cxr_course/stats/count.py"
ERROR = '"outputs": [{"output_type": "error", "ename": "E", "evalue": "", "traceback": []}]'
STDERR = '"outputs": [{"output_type": "stream", "name": "stderr", "text": ["W0000"]}]'
PLOT = '"outputs": [{"output_type": "display_data", "metadata": {}, "data": {"image/png": ""}}]'
SHEET = PLOT.replace("png", "jpeg")
PLANTED = [  # gate, file, what is there, what is put in its place, what the gate must say
    (
        "layers",
        STATS,
        "import math",
        "import math\nimport cxr_course.models.halve",
        "cxr_course.stats.count -> cxr_course.models.halve",
    ),
    (
        "layers",
        STATS,
        "return math",
        "from cxr_course.models.halve import half\n    return half and math",
        "cxr_course.models.halve",
    ),
    ("style", MODULE, "import images", "import images\nimport os", "unused-import"),
    ("style", MODULE, "return images", "n = n; return images", "multiple-statements"),
    ("style", MODULE, "def half(n)", "def half(n, a, b, c, d, e, f, g, h)", "too-many-positional"),
    ("style", MODULE, "    return images", "    n += 1\n" * 26 + "    return images", "too-many-statements"),
    (
        "style",
        MODULE,
        "    return images",
        "".join(f"    if n > {i}: n += 1\n" for i in range(12)) + "    return images",
        "complex-structure",
    ),
    ("style", LIBRARY, "assert half(4) == 2", "assert half(4) == 2, '" + "a " * 50 + "'", "line-too-long"),
    ("style", LESSON, "assert images(2.5) == 2", "a = 1; assert a", "multiple-statements"),
    ("style", "tests/test_halve.py", '"""Toy."""', '"""Toy."""\nimport os', "unused-import"),
    ("exported", MODULE, "Half as many", "Half as much", "models/halve.py: not what nbdev makes"),
    ("exported", LIBRARY, "Half as many", "Half as much", "models/halve.py: not what nbdev makes"),
    ("exported", LIBRARY, "models.halve", "models.halved", "models/halve.py: no notebook exports it"),
    (
        "exported",
        LIBRARY,
        '"execution_count": null',
        '"execution_count": 3',
        "models/halve.ipynb: not what nbdev makes",
    ),
    ("readme_fresh", "README.md", "Three modules", "Four modules", "make readme"),
    ("readme_fresh", "nbs/index.ipynb", "Three modules", "Four modules", "make readme"),
    ("readme_fresh", "nbs/index.ipynb", "| 3 | 1 |", "| 2 | 1 |", "what the lessons' openings say"),
    (
        "processed",
        LIBRARY,
        '"assert half(4) == 2"',
        '"assert half(4) == 2\\n", "#| hide"',
        "the page would show #| hide",
    ),
    (
        "processed",
        LIBRARY,
        '"assert half(4) == 2"',
        '"import math\\n", "math.sqrt(nine)"',
        "give imports a cell of their own",
    ),
    (
        "processed",
        LIBRARY,
        '"def half(n): # a number',
        '"def half(n: Later): # a number',
        "above the cell whose function mentions it",
    ),
    ("listed", "_quarto.yml", "library/models/halve.ipynb, ", "", "does not name library/models/halve.ipynb"),
    (
        "listed",
        "_quarto.yml",
        "07_count.ipynb",
        "07_count.ipynb, lessons/08_none.ipynb",
        "names lessons/08_none.ipynb",
    ),
    ("small", MODULE, "import images", "import images\n" + "\n" * 250, "halve.py: 2"),
    (
        "unique",
        "cxr_course/models/third.py",
        "'third'",
        "'third', 'images'",
        "cxr_course.models.third and cxr_course.stats.count",
    ),
    ("light", STATS, "import math", "import math, keras", "cxr_course.stats.count: importing it loads keras"),
    ("light", STATS, "import math", "import math, elsewhere", "importing it loads keras"),
    ("light", STATS, "import math", "import math, no_such_module", "importing fails"),
    ("light", "cxr_course/__init__.py", "", "import numpy\n", "importing it loads numpy"),
    ("links", LIBRARY, "#summary", "#no-such-place", "no such heading"),
    ("links", LIBRARY, "../../lessons/07_count", "../lessons/07_count", "no such file"),
    ("offline", LESSON, "Short.", "$\\\\nonsense$", "not known"),
    ("offline", LESSON, "Short.", "![](https://example.org/a.png)", "fetched from the network"),
    ("offline", LESSON, "Short.", "![](images/none.png)", "an image is missing"),
    ("run_before_saving", LESSON, "assert images(2.5) == 2", "images(2.5) == 2", "its result is not stored"),
    ("run_before_saving", LESSON, '"outputs": []', ERROR, "an error is stored"),
    ("run_before_saving", LESSON, '"outputs": []', STDERR, "a warning or log is stored"),
    ("layout", LESSON, "> A toy", "> A toy\\n\\nMore.", "first markdown cell"),
    ("layout", LESSON, "Short.", "/" + "home/anna/image.png", "a folder of one machine"),
    ("layout", LESSON, "Short.", "x" * (HEAVIEST + 1), "KB with its results"),
    ("teaching", LESSON, "#| export", "#| exporti", "1 private cells"),
    ("teaching", LESSON, "assert images(3.5) == 3", "n = 1  # " + "a" * 92, "wide (at most 100)"),
    ("teaching", LESSON, "assert images(3.5) == 3", "n = 1\\n" * 240, "lines of code (at most 250)"),
    ("teaching", LESSON, "assert images(3.5) == 3\\n", "", "of its code is exported"),
    ("teaching", LESSON, "You will build", "You build", "does not say *You will build*"),
    ("teaching", LESSON, "## Questions", "## Riddles", "no section ## Questions"),
    ("teaching", LESSON, "<details>", "", "no folded answers"),
    ("teaching", LESSON, "glossary.ipynb#image", "five_systems.ipynb#system-a", "linked to the glossary"),
    ("teaching", LESSON, "[system A](../five_systems.ipynb#system-a)", "system A", "system A without a link"),
    ("teaching", LESSON, "A count is whole.", "See lesson 3.", "lesson 3 is named by its number"),
    ("teaching", LESSON, "A count is whole.", "A film is whole.", "the field says: image"),
    ("teaching", LESSON, "assert images(2.5) == 2", "#| hide\\nassert images(2.5) == 2", "a hidden cell"),
    ("teaching", LESSON, "assert images(2.5) == 2", "by_run_size(1, 2, 3)", "asked in the open"),
    ("teaching", LESSON, '"outputs": []', PLOT, "a figure without #| fig-cap"),
    ("teaching", LESSON, '"outputs": []', PLOT, "a figure without #| fig-alt"),
    ("teaching", LIBRARY, '"outputs": []', PLOT, "halve.ipynb, cell 1: a figure without #| fig-cap"),
    ("teaching", LIBRARY, '"outputs": []', SHEET, "halve.ipynb, cell 1: a figure without #| fig-alt"),
]


@pytest.mark.parametrize(
    "gate, path, old, new, said", PLANTED, ids=[f"{p[0]}-{i}" for i, p in enumerate(PLANTED)]
)
def test_a_planted_fault_is_named(gate, path, old, new, said, in_order, tmp_path):
    folder = shutil.copytree(in_order, tmp_path / "small", symlinks=True)
    (folder / "keras.py").write_text("")  # a stand-in, so that nothing heavy is loaded
    (folder / "elsewhere.py").write_text("import keras")
    text = (folder / path).read_text()
    assert old in text
    (folder / path).write_text(text.replace(old, new, 1))
    faults = GATES[gate](folder)
    assert any(said in fault for fault in faults), faults


def test_every_gate_has_a_fault_planted_in_a_sub_folder():
    assert {gate for gate, *_ in PLANTED} == GATES.keys()
    deep = {
        gate
        for gate, path, *_ in PLANTED
        if path.startswith(("nbs/l", "cxr_course/stats", "cxr_course/models"))
    }
    assert GATES.keys() - deep == {
        "readme_fresh",
        "listed",
    }  # whose file lies at the top, and is told about the sub-folders


def test_the_export_leads_to_the_right_folder(in_order):
    "What nbdev makes of absolute imports, across wings and within one."
    assert "from ..stats.count import images" in (in_order / MODULE).read_text()
    assert "from .halve import half" in (in_order / "cxr_course/models/third.py").read_text()
    assert (in_order / "cxr_course/models/__init__.py").exists()


def test_the_tests_of_a_notebook_are_found(tmp_path):
    names = ("test_shift.py", "test_cam.py", "test_explain_cam.py", "test_leakage.py")
    for name in names:
        (tmp_path / "tests").mkdir(exist_ok=True)
        (tmp_path / "tests" / name).write_text("")
    for name, module in (
        ("library/explain/cam", "explain.cam"),
        ("library/shift/tests", "shift.tests"),
        ("lessons/04_leakage", ""),
        ("lessons/05_x", ""),
    ):
        write_notebook(
            tmp_path / f"nbs/{name}.ipynb", [f"#| default_exp {module}" if module else "1", "# T\n> t"]
        )
    found = {n.topic: [p.name for p in own_tests(n, tmp_path)] for n in notebooks(tmp_path)}
    assert found == {
        "cam": ["test_explain_cam.py"],
        "tests": ["test_shift.py"],
        "leakage": ["test_leakage.py"],
        "x": [],
    }


def test_the_budget_of_a_lesson(in_order):
    row = budget(next(n for n in notebooks(in_order) if n.lesson))
    assert (row["cells"], row["lines"], row["private"], over(row)) == (14, 15, 0, [])
    assert row["exported"] == 6 / 15 and row["texts"] == 8 / 6
    many = dict(cells=61, lines=251, texts=0.79, exported=0.41, private=1, widest=101)
    assert over(many) == list(many)


def test_measures(in_order):
    row = measure("halve", sources(None, in_order)["cxr_course/models/halve.py"])
    assert (row["names"], row["functions"], row["longest"], row["parameters"]) == (1, 1, 3, 1)
    assert {"cxr_course/core.py", "cxr_course/stats/count.py"} <= sources(None, in_order).keys()
