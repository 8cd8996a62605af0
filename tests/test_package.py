"""Wheel and source distribution: installed in an environment that holds what they declare and nothing else,
with the repository out of sight and the network blocked. The environment is put together from what set-up
has installed, so that none of it needs the network; where a machine checks every change (CI=true), pip
installs everything anew as well."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

EXTRAS = (
    "dicom",
    "tune",
    "scale",
    "kaggle",
)  # what a module may import inside a function, though `pip install cxr-course` does not bring it
NOT_BY_NAME = {"pylibjpeg", "pylibjpeg-openjpeg"}  # plugins: pydicom finds them by itself
STARTED = {"kaggle": 'shutil.which("kaggle")'}  # programs: never imported, and started by this line

# The helpers as somebody uses them who never opens a notebook.
HELPERS = """
import pkgutil, sys
import cxr_course
assert not {"numpy", "pandas", "tensorflow", "keras"} & set(sys.modules), "the import loads something heavy"

import importlib
for m in pkgutil.walk_packages(cxr_course.__path__, "cxr_course."):
    if not m.name.endswith("_modidx"): importlib.import_module(m.name)

from cxr_course.core import CourseError, rng
from cxr_course.data.loading import load_dataset
from cxr_course.data.read import read_image
from cxr_course.data.splits import hold_out
from cxr_course.frame import groups, make_frame
from cxr_course.page import page
from cxr_course.stats.curves import auc

images = make_frame([dict(path="a.png", patient="p1", label="NORMAL"), dict(path="b.png", label="PNEUMONIA")])
assert rng(0, "x").integers(100) == rng(0, "x").integers(100)
try: groups(images)
except CourseError as e: assert "1 of 2" in str(e)
else: raise SystemExit("a missing patient went unnoticed")

table = load_dataset("sample")
again = hold_out(table, fraction=.2, seed=0)
train, test = (set(again.loc[again["split"] == s, "patient"]) for s in ("train", "test"))
assert train and test and not train & test
image = read_image(table["path"].iloc[0])
assert image.dtype == "float32" and 0 <= image.min() < image.max() <= 1
assert auc([0, 0, 1, 1], [.1, .4, .35, .8]) == .75
assert "<h1>Report</h1>" in page("Report", [])
print("helpers work:", cxr_course.__file__)
"""


@pytest.fixture(scope="session")
def built(root, tmp_path_factory):
    "Folder with source distribution, made from a copy of the repository, and wheel, made from that."
    folder = tmp_path_factory.mktemp("source")
    shutil.copytree(
        root,
        folder / "copy",
        symlinks=True,
        ignore=shutil.ignore_patterns(".*", "__pycache__", "_*.html", "_course", "runs", "*.egg-info"),
    )
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "copy"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


@pytest.fixture(scope="session")
def wheel(built):
    return next(built.glob("*.whl"))


def required(words: list[str]) -> set[str]:
    "The names of everything that these requirements bring, as pip resolves them, of what is installed here."
    todo, names = [Requirement(word) for word in words], set()
    while todo:
        wanted = todo.pop()
        for extra in ("", *wanted.extras):
            if (wanted.name, extra) in names or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
                continue
            names.add((wanted.name, extra))
            for line in distribution(wanted.name).requires or ():
                inner = Requirement(line)
                if inner.marker is None or inner.marker.evaluate({"extra": extra}):
                    inner.marker = None
                    todo.append(inner)
    return {name for name, _ in names}


def settings(key: str) -> list[str]:
    "A line of settings.ini."
    text = (ROOT / "settings.ini").read_text()
    return re.search(rf"^{key} = (.+)$", text, re.M)[1].split()


def link(names: set[str], site: Path) -> None:
    "Put the named distributions into an environment, without copying 3 GB."
    for name in names:
        here = distribution(name)
        for top in {file.parts[0] for file in here.files or () if file.parts[0] not in ("..", "__pycache__")}:
            source = Path(here.locate_file(top))
            if source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)


@pytest.fixture(scope="session")
def fresh(wheel, tmp_path_factory):
    "A function that runs a program in an environment of the wheel and what it requires, far from here."
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder / "env")
    python = folder / "env" / "bin" / "python"
    site = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
        ).stdout.strip()
    )
    link(required(settings("requirements")), site)
    shutil.copy(ROOT / "tests" / "offline" / "sitecustomize.py", site)
    quiet = ["--quiet", "--no-index", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", *quiet, wheel], check=True)
    return runner(folder)


def runner(folder: Path):
    "Run a program in the environment of this folder."
    (folder / "elsewhere").mkdir()
    surroundings = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "CXR_"))
    }
    surroundings |= dict(
        HOME=str(folder),
        PATH=f"{folder / 'env' / 'bin'}:/usr/bin:/bin",
        CXR_COURSE_CACHE=str(folder / "cache"),
        CXR_COURSE_SIZE="tiny",
        TF_CPP_MIN_LOG_LEVEL="3",
        MPLBACKEND="agg",
    )
    return lambda *command: subprocess.run(
        command, cwd=folder / "elsewhere", env=surroundings, capture_output=True, text=True
    )


def test_the_wheel_holds_the_library_and_nothing_else(wheel, root):
    names = set(zipfile.ZipFile(wheel).namelist())
    here = {
        p.relative_to(root).as_posix()
        for p in (root / "cxr_course").rglob("*")
        if p.suffix in (".py", ".typed", ".j2")
    }
    assert here <= names and "cxr_course/py.typed" in names
    assert all(n.startswith(("cxr_course/", "cxr_course-")) for n in names), names
    assert not {"cxr_course/build.py", "cxr_course/gates.py"} & names


def test_the_source_distribution_holds_what_it_is_built_from(built):
    "The wheel was built from it; and no notebook, test or tool rides along."
    names = {n.split("/", 1)[-1] for n in tarfile.open(next(built.glob("*.tar.gz"))).getnames()}
    assert {"settings.ini", "setup.py", "README.md", "LICENSE", "CHANGELOG.md", "cxr_course/core.py"} <= names
    assert not any(n.startswith(("nbs/", "tests/", "tools/")) for n in names)


def test_the_helpers_work_there(fresh, root):
    done = fresh("python", "-c", HELPERS)
    assert done.returncode == 0, done.stderr
    assert "helpers work" in done.stdout and str(root) not in done.stdout


def test_the_example_of_the_readme_runs_there_as_a_script(fresh, root):
    example = re.search(r"```python\n(.+?)```", (root / "README.md").read_text(), re.S)[1]
    done = fresh("python", "-c", example)
    assert done.returncode == 0 and "patients" in done.stdout, done.stderr


def test_the_command_line_works_there(fresh):
    done = fresh("cxr-course", "--help")
    assert done.returncode == 0 and "train" in done.stdout, done.stderr


def test_what_is_not_declared_is_not_there(fresh):
    done = fresh("python", "-c", "import nbdev")
    assert done.returncode and "No module named 'nbdev'" in done.stderr


REACHES = [
    "import urllib.request; urllib.request.urlopen('http://example.org')",
    "import socket; socket.create_connection(('192.0.2.1', 80))",
    "import socket; socket.socket().connect(('192.0.2.1', 80))",
    "import pooch; pooch.retrieve('https://example.org/a.zip', None, path='.')",
]


@pytest.mark.parametrize("reach", REACHES)
def test_a_reach_for_the_network_is_noticed(fresh, reach):
    done = fresh("python", "-c", reach)
    assert done.returncode and "the network is blocked in this test" in done.stderr


def test_all_tests_and_what_they_start_run_without_the_network():
    for words in ([], [sys.executable, "-c"]):
        if words:
            assert (
                "network is blocked"
                in subprocess.run([*words, REACHES[1]], capture_output=True, text=True).stderr
            )
        else:
            with pytest.raises(OSError, match="network is blocked"):
                exec(REACHES[1])


def test_the_repository_is_out_of_sight(fresh, root):
    done = fresh("python", "-c", "import cxr_course, sys; print(cxr_course.__file__, *sys.path)")
    assert done.returncode == 0 and str(root) not in done.stdout


def imported(path: Path) -> set[tuple[str, bool]]:
    "Top-level names that a module imports, and whether it does so as soon as it is imported itself."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))
        for n in ast.walk(f)
    }
    found = set()
    for n in ast.walk(tree):
        if isinstance(n, ast.Import):
            found |= {(a.name.split(".")[0], id(n) not in late) for a in n.names}
        elif isinstance(n, ast.ImportFrom) and not n.level:
            found.add((n.module.split(".")[0], id(n) not in late))
    return {
        (name, now)
        for name, now in found
        if name not in sys.stdlib_module_names and name not in ("cxr_course", "IPython")
    }


def undeclared(package: Path, base: set[str], more: set[str]) -> tuple[list[str], set[str]]:
    "Imports that no requirement brings, each with its module; and the distributions that are imported."
    homes, faults, used = packages_distributions(), [], set()
    for path in sorted(package.rglob("*.py")):
        for name, now in sorted(imported(path)):
            known = {d.lower().replace("_", "-") for d in homes.get(name, [name])} | {name.replace("_", "-")}
            used |= known
            if not known & (base if now else base | more):
                faults.append(
                    f"{path.relative_to(package.parent)} imports {name}"
                    + ("" if now else " inside a function")
                )
    return faults, used


def names_in(words: list[str]) -> set[str]:
    return {Requirement(word).name.lower().replace("_", "-") for word in words}


def test_every_import_is_declared_and_every_requirement_imported(root):
    base = names_in(settings("requirements"))
    more = {name for extra in EXTRAS for name in names_in(settings(f"{extra}_requirements"))}
    faults, used = undeclared(root / "cxr_course", base, more)
    assert not faults, faults
    source = "".join(path.read_text(encoding="utf-8") for path in (root / "cxr_course").rglob("*.py"))
    started = {name for name, line in STARTED.items() if line in source}
    idle = (base | more) - used - NOT_BY_NAME - started
    assert not idle, f"required and never imported: {sorted(idle)}"


def test_an_import_that_is_not_declared_is_noticed(tmp_path):
    (tmp_path / "cxr_course/models").mkdir(parents=True)
    (tmp_path / "cxr_course/models/a.py").write_text(
        "import numpy\nimport yaml\nimport pydicom\ndef f():\n    import nibabel, ray.train, nbdev"
    )
    faults, used = undeclared(tmp_path / "cxr_course", {"numpy", "seaborn"}, {"nibabel", "pydicom", "ray"})
    assert [f.split("imports ")[1] for f in faults] == [
        "nbdev inside a function",
        "pydicom",
        "yaml",
    ] and "seaborn" not in used


def test_the_readme_names_every_extra(root):
    text = (root / "README.md").read_text()
    found = set(re.findall(r"^(\w+)_requirements =", (root / "settings.ini").read_text(), re.M))
    assert found == {*EXTRAS, "lab", "docs", "dev"} and all(f"`{extra}`" in text for extra in found)


def test_what_is_installed_is_what_is_declared():
    "Set-up installs [dev]; `make test` adds Ray, so that the tests that need it are not skipped in silence."
    keys = ["requirements", *(f"{name}_requirements" for name in ("dicom", "tune", "lab", "docs", "dev"))]
    if any((ROOT / ".venv").glob(".scale-*")):
        keys.append("scale_requirements")
    for key in keys:
        for word in settings(key):
            wanted = Requirement(word)
            try:
                assert wanted.specifier.contains(distribution(wanted.name).version), word
            except PackageNotFoundError:
                pytest.fail(f"{wanted.name} of {key} is not installed; remove .venv and set up again")


@pytest.mark.skipif(
    os.environ.get("CI") != "true", reason="pip fetches 600 MB; only where every change is checked (CI=true)"
)
def test_pip_installs_it(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    install = [
        tmp_path / "env" / "bin" / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-compile",
        "--disable-pip-version-check",
        wheel,
    ]
    subprocess.run(
        install,
        check=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"CXR_COURSE_ONLINE": "1"},
    )
    done = runner(tmp_path)("python", "-c", HELPERS)
    assert done.returncode == 0 and "helpers work" in done.stdout, done.stderr
