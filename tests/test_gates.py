"""Each gate lets this course pass, and stops a small one with a fault planted in it."""
import shutil

import pytest
from conftest import ROOT

from cxr_course import build, gates

END = ["## Summary\n\nShort.", "## Questions\n\n1. Why?", "## Exercises\n\nOne.", "## Further reading\n\nNone."]
SETTINGS = dict(repo="toy", lib_name="toy", lib_path="cxr_course", nbs_path="nbs", user="toy", author="toy", author_email="toy@example.org", description="toy", version="0", title="toy", branch="main",
                license="apache2", min_python="3.11", custom_sidebar=True, custom_quarto_yml=True, jupyter_hooks=False, update_pyproject=False, doc_path="_site", doc_host="https://example.org", doc_baseurl="/toy", git_url="https://example.org/toy")


@pytest.fixture(scope="module")
def in_order(tmp_path_factory):
    "A small course without a fault."
    folder = tmp_path_factory.mktemp("small")
    (folder / "settings.ini").write_text("[DEFAULT]\n" + "\n".join(f"{k} = {v}" for k, v in SETTINGS.items()))
    (folder / "_quarto.yml").write_text("website: {sidebar: {contents: [index.ipynb, {section: All, contents: [00_count.ipynb, 12_halve.ipynb]}]}}")
    build.write_notebook(folder / "nbs/index.ipynb", ["# Toy\n> Two chapters", "## Begin\n\nStart with [counting](00_count.ipynb)."])
    build.write_notebook(folder / "nbs/00_count.ipynb", ["#| default_exp count", "# Counting\n> A toy", "#| export\nfrom __future__ import annotations\nimport math",
                                                         "#| export\ndef films(n): # a number\n    'How many.'\n    return math.floor(n)", "assert films(2.5) == 2", *END])
    build.write_notebook(folder / "nbs/12_halve.ipynb", ["#| default_exp halve", "# Halving\n> A toy", "#| export\nfrom cxr_course.count import films",
                                                         "#| export\ndef half(n): # a number\n    'Half as many.'\n    return films(n) / 2", "assert half(4) == 2", *END])
    (folder / "nbs/_quarto.yml").symlink_to("../_quarto.yml")
    gates.tool("nbdev_export", folder)
    gates.tool("nbdev_clean", folder)
    (folder / "README.md").write_text(build.readme(folder))
    return folder


@pytest.mark.parametrize("gate", gates.GATES)
def test_this_course_passes(gate):
    faults = gates.GATES[gate](ROOT)
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize("gate", gates.GATES)
def test_the_small_course_passes(gate, in_order):
    assert gates.GATES[gate](in_order) == []


COUNT, HALVE = "nbs/00_count.ipynb", "nbs/12_halve.ipynb"
PLANTED = [  # gate, file, what is there, what is put in its place, what the gate must say
    ("downward", "cxr_course/count.py", "import math", "import math, cxr_course.halve", "count (00) imports from halve (12)"),
    ("downward", "cxr_course/count.py", "return math", "from .halve import half; return math", "cxr_course/count.py, line"),
    ("downward", "cxr_course/count.py", "return math", "import importlib; importlib.import_module('cxr_course.halve'); return math", "imports from halve"),
    ("downward", "cxr_course/halve.py", "import films", "import *", "a star import"),
    ("light", "cxr_course/count.py", "import math", "import math, keras", "importing it loads keras"),
    ("light", "cxr_course/count.py", "import math", "import math, elsewhere", "importing it loads keras"),
    ("light", "cxr_course/count.py", "return math", "import tensorflow; return math", "do without it"),
    ("light", "cxr_course/__init__.py", "", "import numpy\n", "importing it loads numpy"),
    ("exported", "cxr_course/count.py", "How many", "How much", "count.py: not what its notebook exports"),
    ("exported", COUNT, "How many", "How much", "count.py: not what its notebook exports"),
    ("clean", COUNT, '"execution_count": null', '"execution_count": 3', "00_count.ipynb"),
    ("readme_fresh", "README.md", "Two chapters", "Three chapters", "make readme"),
    ("readme_fresh", "nbs/index.ipynb", "Two chapters", "Three chapters", "make readme"),
    ("processed", HALVE, '"assert half(4) == 2"', '"assert half(4) == 2\\n", "#| hide"', "the page would show #| hide"),
    ("processed", HALVE, '"assert half(4) == 2"', '"import math\\n", "math.sqrt(nine)"', "give imports a cell of their own"),
    ("listed", "_quarto.yml", ", 12_halve.ipynb", "", "does not name 12_halve.ipynb"),
    ("listed", "_quarto.yml", "00_count.ipynb", "00_count.ipynb, 03_none.ipynb", "names 03_none.ipynb"),
    ("known_options", "_quarto.yml", "sidebar: {", "sidebar: {serach: true, ", "website.sidebar.serach"),
    ("known_options", "_quarto.yml", "website:", "formt: {html: default}\nwebsite:", "formt"),
    ("links", "nbs/index.ipynb", "00_count.ipynb", "00_count.ipynb#no-such-place", "no such heading"),
    ("links", "nbs/index.ipynb", "00_count.ipynb", "00_counting.ipynb", "no such file"),
    ("links", "README.md", "nbs/00_count.ipynb", "nbs/00_counting.ipynb", "README.md: links to"),
    ("offline", COUNT, "Short.", "$\\\\nonsense$", "not known"),
    ("offline", COUNT, "Short.", "![](https://example.org/a.png)", "fetched from the network"),
    ("offline", COUNT, "Short.", "![](images/none.png)", "a picture is missing"),
    ("run_before_saving", COUNT, "assert films(2.5) == 2", "films(2.5) == 2", "its result is not stored"),
    ("run_before_saving", COUNT, '"outputs": []', '"outputs": [{"output_type": "error", "ename": "E", "evalue": "", "traceback": []}]', "an error is stored"),
    ("layout", COUNT, "> A toy", "> A toy\\n\\nMore.", "first markdown cell"),
    ("layout", COUNT, "## Questions", "## Riddles", "must end with the sections"),
    ("layout", COUNT, "Short.", "/" + "home/anna/film.png", "a folder of one machine"),
    ("layout", COUNT, "Short.", "x" * 600_001, "KB with its results"),
    ("code_style", COUNT, "import math", "from math import *", "a star import"),
    ("code_style", HALVE, "from cxr_course.count", "from .count", "a relative import"),
    ("code_style", COUNT, "import math", "import math\\nx = 1", "imports and work"),
    ("processed", COUNT, '"def films(n): # a number', '"def films(n: Later): # a number', "above the cell whose function mentions it"),
    ("code_style", COUNT, "assert films(2.5) == 2", "assert True", "never shown at work"),
    ("code_style", COUNT, "assert films(2.5) == 2", "assert films(2.5) == 2" + "\\n1" * 41, "split it"),
    ("code_style", COUNT, "    return math", "    n += 1\\n" * 36 + "    return math", "deserves a name of its own"),
]


@pytest.mark.parametrize("gate, path, old, new, said", PLANTED, ids=lambda v: None)
def test_a_planted_fault_is_named(gate, path, old, new, said, in_order, tmp_path):
    folder = shutil.copytree(in_order, tmp_path / "small", symlinks=True)
    (folder / "keras.py").write_text("")   # a stand-in, so that nothing heavy is loaded
    (folder / "elsewhere.py").write_text("import keras")
    text = (folder / path).read_text()
    assert old in text
    (folder / path).write_text(text.replace(old, new, 1))
    faults = gates.GATES[gate](folder)
    assert any(said in fault for fault in faults), faults
    assert all(path.split("/")[-1] in fault or gate in ("readme_fresh", "exported") for fault in faults)


def test_every_gate_has_a_planted_fault():
    assert {gate for gate, *_ in PLANTED} == set(gates.GATES)
