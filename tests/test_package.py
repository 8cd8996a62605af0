"""The wheel, in a fresh environment, with the repository out of sight and the network blocked."""
import os
import shutil
import subprocess
import sys
import venv

import pytest

# Python reads this file at start-up in the fresh environment: whoever reaches for another machine is told so.
BLOCK = '''
import socket
def refuse(*address, **_): raise OSError(f"the network is blocked in this test, and something reached for {address[-1]}")
class Local(socket.socket):
    def connect(self, address): return super().connect(address) if self.family == getattr(socket, "AF_UNIX", None) else refuse(address)
    def connect_ex(self, address): return self.connect(address) or 0
socket.socket, socket.create_connection, socket.getaddrinfo = Local, refuse, refuse
'''

# The helpers as somebody uses them who never opens a notebook. Chapters that are not there yet are left out.
HELPERS = '''
import importlib.util, pkgutil, sys
import cxr_course
assert not {"numpy", "pandas", "tensorflow", "keras"} & set(sys.modules), "importing the package loads something heavy"

from cxr_course.core import CourseError, frame, patients, rng
films = frame([dict(path="a.png", patient="p1", label="NORMAL"), dict(path="b.png", label="PNEUMONIA")])
assert rng(0, "x").integers(100) == rng(0, "x").integers(100)
try: patients(films)
except CourseError as e: assert "1 of 2" in str(e)
else: raise SystemExit("a missing patient went unnoticed")

here = {m.name for m in pkgutil.iter_modules(cxr_course.__path__)}
for name in sorted(here - {"_modidx"}): importlib.import_module(f"cxr_course.{name}")
if {"phantom", "data", "splits", "images", "evaluation"} <= here:
    from cxr_course import data, evaluation, images, splits
    table = data.load("sample")
    again = splits.split(table)
    train, test = (set(again.loc[again["split"] == s, "patient"]) for s in ("train", "test"))
    assert train and test and not train & test
    film = images.read(table["path"].iloc[0])
    assert film.dtype == "float32" and 0 <= film.min() < film.max() <= 1
    assert evaluation.auc([0, 0, 1, 1], [.1, .4, .35, .8]) == .75
print("helpers work:", cxr_course.__file__)
'''


@pytest.fixture(scope="session")
def wheel(root, tmp_path_factory):
    "The wheel, built from a copy so that the repository stays as it is."
    folder = tmp_path_factory.mktemp("source")
    for name in ("cxr_course", "nbs"): shutil.copytree(root / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("settings.ini", "setup.py", "README.md", "LICENSE"):
        if (root / name).exists(): shutil.copy2(root / name, folder / name)
    done = subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((folder / "dist").glob("*.whl"))


@pytest.fixture(scope="session")
def fresh(wheel, tmp_path_factory):
    "A fresh environment with the wheel and what it requires; a function that runs a program there, far from the repository."
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check", wheel], check=True)
    site = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True).stdout.strip()
    with open(os.path.join(site, "sitecustomize.py"), "w") as f: f.write(BLOCK)
    (folder / "elsewhere").mkdir()
    surroundings = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "CXR_"))}
    surroundings |= dict(HOME=str(folder), PATH=f"{folder / 'env' / 'bin'}:/usr/bin:/bin", CXR_COURSE_CACHE=str(folder / "cache"), CXR_COURSE_SIZE="tiny", TF_CPP_MIN_LOG_LEVEL="3")
    return lambda *command: subprocess.run(command, cwd=folder / "elsewhere", env=surroundings, capture_output=True, text=True)


def test_the_wheel_holds_the_library_and_nothing_else(wheel, root):
    import zipfile
    names = zipfile.ZipFile(wheel).namelist()
    modules = {f"cxr_course/{p.name}" for p in (root / "cxr_course").glob("*.py")}
    assert modules <= set(names)
    assert all(n.startswith(("cxr_course/", "cxr_course-")) for n in names), names


def test_the_helpers_work_there(fresh, root):
    done = fresh("python", "-c", HELPERS)
    assert done.returncode == 0, done.stderr
    assert "helpers work" in done.stdout and str(root) not in done.stdout


def test_the_command_line_works_there(fresh, root):
    if not (root / "cxr_course" / "cli.py").exists(): pytest.skip("chapter 24, the command line, is not written yet")
    done = fresh("cxr-course", "--help")
    assert done.returncode == 0 and "train" in done.stdout, done.stderr


def test_a_module_that_is_missing_is_noticed(fresh):
    done = fresh("python", "-c", "import nbdev")
    assert done.returncode and "No module named 'nbdev'" in done.stderr


@pytest.mark.parametrize("reach", ["import urllib.request; urllib.request.urlopen('http://example.org')", "import socket; socket.create_connection(('192.0.2.1', 80))",
                                   "import socket; socket.socket().connect(('192.0.2.1', 80))", "import pooch; pooch.retrieve('https://example.org/a.zip', None, path='.')"])
def test_a_reach_for_the_network_is_noticed(fresh, reach):
    done = fresh("python", "-c", reach)
    assert done.returncode and "the network is blocked in this test" in done.stderr


def test_the_repository_is_out_of_sight(fresh, root):
    done = fresh("python", "-c", "import cxr_course, sys; print(cxr_course.__file__, *sys.path)")
    assert str(root) not in done.stdout
