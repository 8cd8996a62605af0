"""cxr-course from a terminal: each command end to end, and every mistake of a user answered in words."""
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tools.forked import python

START = ("import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
         "from cxr_course.cli.__main__ import app; app(prog_name='cxr-course')")


def environment(**more):
    "As a user's shell has it: chapters and tests may be silent, the program is not."
    return {k: v for k, v in os.environ.items() if k != "CXR_COURSE_QUIET"} | more


def cxr(*words, code=0, cwd=None, new=False, **env):
    """Run the program in a process of its own; return (stdout, stderr).

    It is forked from one that has TensorFlow loaded; `new` starts it as a user does.
    """
    words = ["-c", START, *map(str, words)]
    if new:
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=cwd,
                              env=environment(**env), timeout=600)
    else:
        done = python(*words, cwd=cwd, env=environment(**env))
    assert (
        done.returncode == code
    ), f"exit code {done.returncode}, expected {code}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory, cache):
    "A folder with a small simulated world in the layout of the Kaggle set."
    folder = tmp_path_factory.mktemp("terminal")
    out, _ = cxr("data", "phantom", "films", "--layout", "kaggle", "--patients", 36, "--pixels", 64,
                 cwd=folder)
    assert "simulated patients" in out
    return folder


@pytest.fixture(scope="module")
def trained(place):
    "The same folder after one training; what was printed."
    out, err = cxr("train", "--data", "films", "--out", "runs/first", "--size", 32, "--epochs", 2, cwd=place,
                   new=True)
    return place, out, err


def test_help_teaches():
    out, _ = cxr("--help")
    assert "cxr-course train" in out and "never for diagnosis" in out
    for command in (
        "train", "evaluate", "predict", ("data", "show"), ("data", "check"), ("data", "phantom"),
        ("data", "list"), ("data", "explore"), ("data", "augment"), "experiments", "record", "explain",
        "shift", "tune", "launch", ("data", "decode"), ("data", "fetch"),
    ):
        page, _ = cxr(*([command] if isinstance(command, str) else command), "--help")
        assert "Example" in page and "Usage: cxr-course" in page


def test_nothing_heavy_is_imported_for_help():
    heavy = ("tensorflow", "keras", "pandas", "numpy", "matplotlib", "cxr_course.core")
    code = f"import sys, cxr_course.cli.__main__; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True).stdout.strip() == "[]"


def test_train_help_loads_no_network():
    code = (
        "import sys\nfrom cxr_course.cli.__main__ import app\ntry: app(['train', '--help'], "
        "prog_name='cxr-course')\n"
        "except SystemExit: pass\nprint([m for m in ('tensorflow', 'keras', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "learning rate" in done.stdout.lower()


def test_an_error_has_a_remedy_for_each_door():
    "The terminal says its own remedy where there is one; an error that nobody foresaw is no words."
    from cxr_course.cli.app import error_in_words
    from cxr_course.core import CourseError
    error = CourseError("2 files are no images", "films", "pass skip_bad=True")
    assert "pass skip_bad=True" in error_in_words(error)
    error.typed = "add --skip-bad"
    assert error_in_words(error) == "2 files are no images: films\n  What to do: add --skip-bad"
    assert "disk is full" in error_in_words(OSError(28, "No space left on device"))
    assert error_in_words(OSError(2,
                                  "gone")) is None and error_in_words(ValueError("a fault of ours")) is None


def test_version():
    from cxr_course import __version__
    assert cxr("--version")[0].strip() == f"cxr-course {__version__}"


def test_module_runs_too():
    done = subprocess.run([sys.executable, "-m", "cxr_course.cli", "--version"], capture_output=True,
                          text=True)
    assert done.returncode == 0 and done.stdout.startswith("cxr-course ")


def test_data_commands(place):
    assert "kaggle" in cxr("data", "list")[0]
    out, _ = cxr("data", "show", "films", "--out", "sheet.png", cwd=place)
    assert "NORMAL" in out and (place / "sheet.png").stat().st_size > 1000
    cxr("data", "check", "films", cwd=place)
    _, err = cxr("data", "phantom", "films", cwd=place, code=2)
    assert "never overwritten" in err and "films-2" in err


def test_train_leaves_everything(trained):
    place, out, err = trained
    run = place / "runs" / "first"
    for name in (
        "model.keras", "card.json", "history.csv", "predictions.csv", "images.csv", "reference.npz",
        "report/report.html", "report/report.png", "report/report.json",
    ):
        assert (run / name).is_file(), name
    for words in (
        "epoch   1/2", "val AUC", "sensitivity", "specificity", "95 % interval", "truth, then called",
        "report.html",
    ):
        assert words in out
    assert "oneDNN" not in err and "cuda" not in err.lower()            # TensorFlow's greetings
    images = list(csv.DictReader(open(run / "images.csv", encoding="utf8")))
    assert {i["split"] for i in images} == {"train", "val",
                                            "test"} and all(len(i["sha256"]) == 64 for i in images)
    patients = {s: {i["patient"] for i in images if i["split"] == s} for s in ("train", "val", "test")}
    assert not (patients["train"] & patients["val"] or patients["train"] & patients["test"]
                or patients["val"] & patients["test"])
    assert "seen" in json.loads((run / "card.json").read_text(encoding="utf8"))


def test_evaluate_repeats_the_report(trained):
    place, out, _ = trained
    again, _ = cxr("evaluate", "runs/first", "--out", "report", cwd=place)
    figures = [line for line in out.splitlines() if line.startswith(("AUC", "sensitivity", "specificity"))]
    assert figures and all(line in again for line in figures)
    assert (place / "report" / "report.html").is_file()
    assert "never overwritten" in cxr("evaluate", "runs/first", "--out", "report", cwd=place, code=2)[1]


def test_evaluate_elsewhere_leaves_out_what_was_learned(trained):
    place, *_ = trained
    cxr("data", "phantom", "elsewhere", "--layout", "kaggle", "--patients", 36, "--pixels", 64, "--seed", 3,
        cwd=place)
    known = sorted((place / "films" / "train" / "NORMAL").iterdir())[0]
    shutil.copy(known, place / "elsewhere" / "test" / "NORMAL" / "IM-9999-0001.jpeg")
    out, _ = cxr("evaluate", "runs/first", "--data", "elsewhere", cwd=place)
    assert "has learned from 1 of" in out and list(
        (place / "runs" / "first").glob("report-elsewhere/report.html")
    )
    _, err = cxr("evaluate", "runs/first", "--data", "sample-covid", cwd=place, code=2)
    assert "another question" in err


def test_films_of_another_set_are_found(place):
    shutil.copytree(place / "films" / "train", place / "borrowed")
    out, _ = cxr("data", "check", "borrowed", "--beside", "films", cwd=place, code=1)
    assert "in this set and in the one beside it" in out


def test_explore_writes_a_page_and_never_over_another(place):
    out, _ = cxr("data", "explore", "films", "--out", "about", "--quick", cwd=place)
    page = place / out.strip().split()[-1]
    assert page.exists() and "http://" not in page.read_text().replace("http://www.w3.org", "")
    _, err = cxr("data", "explore", "films", "--out", "about", cwd=place, code=2)
    assert "never overwritten" in err or "exists" in err


def test_augment_then_train_on_the_copies_with_the_strong_recipe(place):
    out, _ = cxr("data", "augment", "films", "--out", "copies", cwd=place)
    with open(place / "copies" / "images.csv") as f: rows = list(csv.DictReader(f))
    copies = [r for r in rows if r["meta_copy_of"]]
    assert copies and {r["split"] for r in copies} == {"train"} and f"{len(copies)} copies" in out
    cxr("train", "--data", "copies/images.csv", "--model", "separable", "--recipe", "strong", "--out",
        "runs/strong", "--size", 32, "--epochs", 1, cwd=place)
    training = json.loads((place / "runs" / "strong" / "card.json").read_text())["training"]
    assert training["optimizer"] == "adamw" and "Augment" in training["augment"]


def test_experiments_and_records(trained):
    place = trained[0]
    words = ("experiments", "--data", "films", "--out", "runs/list", "--only", "A1", "--only", "A2",
             "--seeds", 1, "--epochs", 1, "--scale", ".4")
    out, _ = cxr(*words, cwd=place)
    assert "RMSprop instead of SGD" in out and (place / "runs/list/differences.png").stat().st_size > 5000
    stamp = (place / "runs/list/A1/seed-0/card.json").stat().st_mtime
    cxr(*words, cwd=place)
    assert (place / "runs/list/A1/seed-0/card.json").stat().st_mtime == stamp
    cxr("record", "runs/first", "--data", "phantom", "--command", "train", "--out", "results/first.json",
        cwd=place)
    assert json.loads((place / "results/first.json").read_text())["runs"][0]["auc"]


def test_predict(trained):
    place, *_ = trained
    some = sorted((place / "films" / "test" / "PNEUMONIA").iterdir())[:2]
    (place / "text.png").write_text("no picture")
    out, err = cxr("predict", "runs/first", *some, "text.png", "--csv", "scores.csv", cwd=place, code=2)
    assert (
        out.count("score 0.") == 2
        and "text.png" not in out
        and "text.png" in err
        and "None of them is a diagnosis" in err
    )
    rows = list(csv.DictReader(open(place / "scores.csv", encoding="utf8")))
    kept = {r["path"]: float(r["p_PNEUMONIA"])
            for r in csv.DictReader(open(place / "runs" / "first" / "predictions.csv", encoding="utf8"))}
    for r in rows: assert abs(float(r["p_PNEUMONIA"]) - kept[str(Path(r["path"]).relative_to(place))]) < 1e-6
    cxr("predict", "runs/first", *some, "text.png", "--skip-bad", cwd=place)
    assert "never overwritten" in cxr("predict", "runs/first", some[0], "--csv", "scores.csv", cwd=place,
                                      code=2)[1]


def test_ctrl_c_keeps_the_best_model(place):
    words = ["train", "--data", "films", "--out", "runs/cut", "--size", "32", "--epochs", "900", "--patience",
             "900"]
    running = subprocess.Popen([sys.executable, "-c", START, *words], cwd=place, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=environment())
    lines, sent = [], False
    for line in running.stdout:
        lines.append(line)
        if not sent and line.startswith("epoch   2/"):
            running.send_signal(signal.SIGINT)
            sent = True
    err = running.stderr.read()
    assert running.wait(timeout=120) == 130, err
    assert any("kept so far" in line and "runs" in line for line in lines)
    assert (place / "runs" / "cut" / "model.keras").is_file() and (
        place / "runs" / "cut" / "report" / "report.html"
    ).is_file()
    assert "Traceback" not in err


MISTAKES = [
    (["train", "--data", "fims"], ["no such folder", "fims"]),
    (["train", "--data", "films", "--model", "resnet"], ["no model named 'resnet'", "smallnet"]),
    (["train", "--data", "films", "--size", "12O"], ["not a size", "129x180"]),
    (["train", "--data", "films", "--size", "16"], ["too small"]),
    (["train", "--data", "films", "--out", "films"], ["never overwritten", "films-2"]),
    (["train", "--data", "films", "--epochs", "0"], ["--epochs"]),
    (["train", "--data", "no_test"], ["test set is empty", "--resplit"]),
    (["train", "--data", "one_class"], ["one class", "PNEUMONIA"]),
    (["train", "--data", "empty"], ["empty"]),
    (["train", "--data", "bad"], ["2 of", "text.jpeg", "nothing.jpeg", "--skip-bad"]),
    (["train", "--data", "truncated"], ["1 of", "IM-7777-0001.jpeg", "--skip-bad"]),
    (["train", "--data", "leak", "--classes", "2"], ["test and train share", "--resplit"]),
    (["evaluate", "films"], ["no finished run"]),
    (["train", "--data", "films", "--columns", "dx"], ["not a list of columns", "filename=path"]),
    (["train", "--data", "strangers", "--unknown", "refuse"], ["have no patient", "--unknown image"]),
    (["train", "--data", "films", "--resume"], ["nothing to resume", "--resume"]),
    (["predict", "nowhere", "a.png"], ["no such run"]),
    (["data", "show", "nowhere"], ["no such folder"]),
]


@pytest.fixture(scope="module")
def spoiled(place):
    "Copies of the world, each spoiled in one way."
    def copy(name):
        return shutil.copytree(place / "films", place / name, ignore=shutil.ignore_patterns("truth.csv"))
    no_test = copy("no_test")
    for part in ("val", "test"): shutil.rmtree(no_test / part)
    one = copy("one_class")
    for part in one.glob("*/NORMAL"): shutil.rmtree(part)
    (place / "empty").mkdir()
    bad = copy("bad") / "train" / "NORMAL"
    (bad / "text.jpeg").write_text("a shopping list")
    (bad / "nothing.jpeg").write_bytes(b"")
    cut = copy("truncated") / "train" / "NORMAL"
    whole = sorted(cut.iterdir())[0]
    (cut / "IM-7777-0001.jpeg").write_bytes(whole.read_bytes()[:-300])
    # one patient on two sides, by the names of the Mendeley set
    leak = copy("leak")
    for part in ("train", "test"):
        shutil.copy(sorted((leak / "train" / "PNEUMONIA").iterdir())[len(part) - 4],
                    leak / part / "PNEUMONIA" / f"VIRUS-00001-000{len(part)}.jpeg")
    strangers = copy("strangers")                                      # files whose names tell no patient
    for part in ("train", "test"):
        for i, path in enumerate(sorted((strangers / part / "NORMAL").iterdir())):
            path.rename(path.with_name(f"{part} {i}.jpeg"))
    return place


COMMANDS = ("train", "evaluate", "predict", "data")


@pytest.mark.parametrize("words, told", MISTAKES, ids=lambda v: " ".join(v) if v[0] in COMMANDS else None)
def test_mistakes_are_answerederror_in_words(spoiled, words, told):
    before = {p.name for p in (spoiled / "runs").glob("*")} if (spoiled / "runs").exists() else set()
    _, err = cxr(*words, cwd=spoiled, code=2)
    for t in told: assert t in err, err
    # remedies in the language of the terminal
    for code in ("skip_bad=True", "resume=True", "unknown=", "hold_out", "data.check("):
        assert code not in err
    after = {p.name for p in (spoiled / "runs").glob("*")} if (spoiled / "runs").exists() else set()
    assert after == before                                             # nothing half-made is left


def test_skip_bad_names_what_it_skips(spoiled):
    out, _ = cxr("train", "--data", "bad", "--out", "runs/skipping", "--size", 32, "--epochs", 1,
                 "--skip-bad", cwd=spoiled)
    assert out.count("skipped:") == 2 and "text.jpeg" in out and "nothing.jpeg" in out


def test_small_disk_and_debug(place, monkeypatch):
    "In this process, where the free space can be played."
    from typer.testing import CliRunner

    from cxr_course.cli.__main__ import app
    monkeypatch.chdir(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    told = CliRunner().invoke(app, ["train", "--data", "films", "--out", "runs/none"])
    assert told.exit_code == 2 and "MB are free" in told.output and "CXR_COURSE_CACHE" in told.output
    raw = CliRunner().invoke(app, ["--debug", "train", "--data", "films", "--out", "runs/none"])
    assert raw.exit_code == 1 and type(raw.exception).__name__ == "CourseError"

    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(shutil, "disk_usage", full)
    told = CliRunner().invoke(app, ["train", "--data", "films", "--out", "runs/none"])
    assert told.exit_code == 2 and "disk is full" in told.output


def test_explain_draws_where_a_run_looks(trained):
    place, *_ = trained
    film = sorted((place / "films/test").rglob("*.jpeg"))[0]
    out, err = cxr("explain", "runs/first", film, "--finding", "PNEUMONIA", "--out", "overlay.png", cwd=place)
    assert (
        "PNEUMONIA, score" in out
        and "None of them is a diagnosis" in err
        and (place / "overlay.png").exists()
    )
    out, _ = cxr("explain", "runs/first", "films/test", "--out", "overlays", cwd=place)
    films = list((place / "films/test").rglob("*.jpeg"))
    assert (
        len(out.splitlines()) == len(films) == len(list((place / "overlays").glob("*.png")))
        and (place / "overlays/overlays.csv").exists()
    )


def test_explain_says_what_is_wrong(trained, monkeypatch):
    "In this process, which has TensorFlow already."
    from typer.testing import CliRunner

    from cxr_course.cli.__main__ import app
    place, *_ = trained
    monkeypatch.chdir(place)
    film = sorted((place / "films/test").rglob("*.jpeg"))[0]
    (place / "there.png").write_bytes(b"")
    for words, says in [
        ((film, "--finding", "Mass", "--out", "x.png"), "it knows NORMAL, PNEUMONIA"),
        ((film, "--out", "there.png"), "never overwritten"),
        (("films/test", "--out", "y.png"), "do not fit into one file"),
        (("there.png", "--out", "z.png"), "empty"),
        ((film, "--method", "magic", "--out", "z.png"), "gradcam"),
    ]:
        told = CliRunner().invoke(app, ["explain", "runs/first", *map(str, words)])
        assert (
            told.exit_code == 2
            and says in told.output
            and not any((place / n).exists() for n in ("x.png", "y.png", "z.png"))
        )


def test_the_methods_are_those_of_explain():
    from cxr_course.cli.look import MapChoice
    from cxr_course.explain.maps import CAM_METHODS
    assert [m.value for m in MapChoice] == list(CAM_METHODS)


def test_shift_gives_a_verdict(trained):
    place, *_ = trained
    # the run's own test films
    out, _ = cxr("shift", "runs/first", "--data", "films", cwd=place)
    assert "No shift was found" in out and (place / "runs/first/reference.npz").exists()
    from PIL import Image, ImageOps
    for p in sorted((place / "films/test").rglob("*.jpeg")):
        q = place / "negatives" / p.name
        q.parent.mkdir(exist_ok=True)
        ImageOps.invert(Image.open(p).convert("L")).save(q)
    out, _ = cxr("shift", "runs/first", "--data", "negatives", "--out", "verdict", code=1, cwd=place)
    assert (
        "A shift was found" in out
        and (place / "verdict/index.html").exists()
        and (place / "verdict/verdict.json").exists()
    )
    _, err = cxr("shift", "runs/first", "--data", "negatives", "--out", "verdict", code=2, cwd=place)
    assert "never overwritten" in err
    (place / "nothing").mkdir()
    _, err = cxr("shift", "runs/first", "--data", "nothing", code=2, cwd=place)
    assert "no image here" in err


def test_tune_searches_resumes_and_trains_the_winner_once(place):
    words = ("tune", "--data", "films", "--size", 36, "--space", "small", "--epochs", 1, "--method", "random",
             "--out", "runs/search")
    out, _ = cxr(*words, "--trials", 2, cwd=place)
    assert (
        "the best of 2 trials" in out
        and "looks better than it is" in out
        and "left at most" in out
        and "val AUC" in out
    )
    for file in ("trials.csv", "parallel.png", "best/card.json", "best/report/report.html", "logs"):
        assert (place / "runs/search" / file).exists()
    _, err = cxr(*words, "--trials", 3, cwd=place, code=2)
    assert "--resume" in err
    out, _ = cxr(*words, "--trials", 3, "--resume", cwd=place)
    assert "the best of 3 trials" in out and "share of the variation" in out and "stays as it is" in out
    _, err = cxr(*words, "--trials", 3, "--resume", "--batch", 8, cwd=place, code=2)
    assert "differs in batch" in err


needs_ray = pytest.mark.skipif(not find_spec("ray"), reason='Ray is missing: pip install "cxr-course[scale]"')


@needs_ray
@pytest.mark.xdist_group("scaling")
def test_launch_is_train_by_two(place):
    "Two workers give the run of one; smallnet has neither dropout nor batch normalisation."
    import pandas as pd
    words = ["--data", "films", "--size", 32, "--epochs", 1]
    out, _ = cxr("launch", "--workers", 2, "train", *words, "--out", "runs/pair", cwd=place)
    assert out.count("Everything is in runs/pair") == 1
    cxr("train", *words, "--out", "runs/lone", cwd=place)
    one, two = (pd.read_csv(place / "runs" / name / "history.csv") for name in ("lone", "pair"))
    assert abs(one["loss"] - two["loss"]).max() < 1e-4 and abs(one["val_loss"] - two["val_loss"]).max() < 1e-3
    assert not list((place / "runs").glob(".*pair*"))


def test_launch_refuses_in_words(place):
    _, err = cxr("launch", "evaluate", "runs/first", cwd=place, code=2)
    assert "cannot be launched" in err
    _, err = cxr("launch", "train", "--data", "films", cwd=place, code=2)
    assert "add --out" in err
    _, err = cxr("launch", "train", "--data", "films", "--out", "runs/x", "--epochs", 0, cwd=place, code=2)
    assert "--epochs" in err
    _, err = cxr("launch", "train", "--data", "nowhere", "--out", "runs/x", cwd=place, code=2)
    assert "nowhere" in err and not (place / "runs/x").exists()
    (place / "runs/taken").mkdir(parents=True)
    _, err = cxr("launch", "train", "--data", "films", "--out", "runs/taken", cwd=place, code=2)
    assert "never overwritten" in err
    if not find_spec("ray"):
        _, err = cxr("launch", "train", "--data", "films", "--out", "runs/x", cwd=place, code=2)
        assert "pip install" in err


def stored(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_data_decode(place):
    words = ("data", "decode", "films", "--size", 16)
    out, _ = cxr(*words, "--out", "stores/one", cwd=place)
    assert "images are in" in out and len(stored(place / "stores/one")) > 1
    assert "images are in" in cxr(*words, cwd=place)[0]
    if not find_spec("ray"):
        _, err = cxr(*words, "--workers", 2, "--out", "stores/two", cwd=place, code=2)
        assert "pip install" in err


@needs_ray
@pytest.mark.xdist_group("scaling")
def test_data_decode_by_two(place):
    words = ("data", "decode", "films", "--size", 16)
    cxr(*words, "--out", "stores/alone", cwd=place)
    cxr(*words, "--workers", 2, "--out", "stores/pair", cwd=place)
    assert stored(place / "stores/alone") == stored(place / "stores/pair")


def test_a_backbone_with_a_file_of_weights(place):
    (place / "page.h5").write_text("<!DOCTYPE html><html>Log in</html>")
    words = ["train", "--data", "films", "--backbone", "vgg16", "--size", 32, "--epochs", 1]
    for weights, told in (("page.h5", "web page"), ("none.h5", "no such file")):
        _, err = cxr(*words, "--weights", weights, "--out", "runs/strange", cwd=place, code=2)
        assert told in err and not (place / "runs/strange").exists()
    _, err = cxr("train", "--data", "films", "--weights", "phantom", cwd=place, code=2)
    assert "--backbone" in err


def test_findings_are_chosen_by_name(place):
    cxr("data", "phantom", "many", "--layout", "nih", "--patients", 60, "--pixels", 40, cwd=place)
    out, _ = cxr("train", "--data", "many", "--findings", "Infiltration,Effusion", "--backbone", "compact",
                 "--weights", "none.h5", "--fallback", "none", "--loss", "weighted", "--size", 32, "--epochs",
                 1, "--out", "runs/two findings", cwd=place)
    card = json.loads((place / "runs/two findings/card.json").read_text())
    assert (
        set(card["labels"]) == {"Infiltration", "Effusion"}
        and "asked for none.h5, took none" in card["model"]["spec"]["note"]
        and "SigmoidLoss" in str(card["training"]["loss"])
    )
    assert "Too few patients to judge" in out
    _, err = cxr("train", "--data", "many", "--findings", "Broken arm", cwd=place, code=2)
    assert "Broken arm" in err and "Effusion" in err
    _, err = cxr("train", "--data", "films", "--findings", "all", cwd=place, code=2)
    assert "classes, and no findings" in err


def test_real_kaggle_folder_is_arranged_by_patient(real_data):
    from cxr_course.data.loading import load_dataset
    from cxr_course.data.splits import leakage
    from cxr_course.training.preparing import arrange
    folder = real_data / "kaggle" / "chest_xray"
    if not folder.is_dir(): pytest.skip(f"no Kaggle set at {folder}")
    frame, said = arrange(load_dataset(folder, unknown="image"))
    assert any("only 16 images" in s for s in said) and any("no patient" in s for s in said)
    parts = dict(tuple(frame.groupby("split")))
    assert len(parts["test"]) == 601 and .13 < len(parts["val"]) / (len(frame) - 601) < .17
    assert not leakage(parts["train"], parts["val"])


def test_real_nih_lists_share_patients(real_data):
    from cxr_course.data.loading import load_dataset
    from cxr_course.frame import Task
    from cxr_course.training.preparing import arrange
    folder = real_data / "nih"
    if not folder.is_dir(): pytest.skip(f"no NIH images at {folder}")
    frame, said = arrange(load_dataset(folder, unknown="image"))
    assert len(Task.of(frame).names) == 14 and "15 patients are in both lists" in said[0]
    sides = [set(f["patient"]) for _, f in frame.groupby("split")]
    assert len(sides) == 3 and not any(a & b for i, a in enumerate(sides) for b in sides[:i])
    assert (frame["split"] == "test").sum() == 200


def test_data_fetch_tells_how_by_hand_and_leaves_nothing(place):
    "No test has a network: what a user without one reads."
    out, _ = cxr("data", "fetch", "sample", cwd=place)
    assert "drawn on this machine" in out and "cxr-course train --data sample" in out
    for name in ("nih", "kaggle", "covid", "mendeley", "pneumoniamnist"):
        _, err = cxr("data", "fetch", name, "--folder", "fetched", cwd=place, code=2)
        assert f"3. cxr-course data fetch {name} --folder fetched" in err and not (place / "fetched").exists()
    assert "fingerprint must be md5:28209eda" in err
    _, err = cxr("data", "fetch", "chexpert", cwd=place, code=2)
    assert "unknown data set 'chexpert'" in err and "pneumoniamnist" in err


def test_data_fetch_verifies_what_is_there_by_counts(place):
    out, err = cxr("data", "fetch", "kaggle", "--folder", "films", cwd=place)
    for words in ("is in films", "CC BY 4.0", "Kermany", "next: cxr-course data show films"):
        assert words in out
    assert "verified" not in out and "warning: train NORMAL: 1,341 images published" in err
    _, err = cxr("data", "fetch", "nih", "--folder", "films", cwd=place, code=0)
    assert "warning: all all: 112,120 images published" in err
    wrong = place / "wrong"
    wrong.mkdir()
    (wrong / "notes.txt").write_text("I meant to put it here")
    _, err = cxr("data", "fetch", "nih", "--folder", "wrong", cwd=place, code=2)
    assert "cannot be read as NIH ChestX-ray14" in err and "images_012.tar.gz" in err


def test_check_against_published_counts_has_an_exit_code(place):
    out, _ = cxr("data", "check", "films", "--quick", "--against", "kaggle", cwd=place, code=1)
    assert "published" in out and "1341" in out and "train NORMAL: 1,341 published" in out
    _, err = cxr("data", "check", "films", "--quick", "--against", "sample", cwd=place, code=2)
    assert "nobody published counts" in err


def small_pictures(file):
    "A file laid out as PneumoniaMNIST's, and as small."
    import numpy as np
    arrays = {}
    for split, n in (("train", 40), ("val", 12), ("test", 14)):
        truth = np.arange(n) % 2
        arrays[f"{split}_images"] = (np.random.default_rng(n).integers(0, 120, (n, 28, 28))
                                     + 60 * truth[:, None, None]).astype("uint8")
        arrays[f"{split}_labels"] = truth[:, None]
    np.savez(file, **arrays)


def test_small_images_are_not_enlarged_unless_somebody_says_so(place):
    "PneumoniaMNIST was enlarged to 128 and trained twenty times slower."
    small_pictures(place / "mini.npz")
    shape = lambda run: json.loads((place / "runs" / run / "card.json").read_text())["preprocessing"]["shape"]
    out, _ = cxr("train", "--data", "mini.npz", "--epochs", 1, "--out", "runs/mini", cwd=place)
    assert "decoded at 28 x 28 pixels" in out and shape("mini")[:2] == [28, 28]
    out, _ = cxr("train", "--data", "mini.npz", "--epochs", 1, "--size", 40, "--out", "runs/forty", cwd=place)
    assert "decoded at" not in out and shape("forty")[:2] == [40, 40]
    _, err = cxr("train", "--data", "mini.npz", "--model", "a1", "--out", "runs/deep", cwd=place, code=2)
    assert "28 x 28 are too small" in err and "--size" in err
    out, _ = cxr("data", "decode", "mini.npz", "--out", "mini_store", cwd=place)
    assert "66 images" in out
    told = [json.loads(f.read_text()) for f in (place / "mini_store").rglob("store.json")]
    assert [t["shape"] for t in told] == [[28, 28]]


def test_covid_phantom_of_sixty_patients_trains_two_classes(place):
    "It was refused: the test set had no image with COVID-19."
    cxr("data", "phantom", "lungs", "--layout", "covid", "--patients", 60, "--pixels", 48, cwd=place)
    cxr("train", "--data", "lungs", "--classes", 2, "--epochs", 1, "--size", 32, "--out", "runs/lungs",
        cwd=place)
    card = json.loads((place / "runs" / "lungs" / "card.json").read_text(encoding="utf8"))
    assert card["labels"] == ["Normal", "COVID-19"]


def test_the_small_covid_sample_trains_two_classes(place):
    cxr("train", "--data", "sample-covid", "--classes", 2, "--epochs", 1, "--size", 32, "--out", "runs/covid",
        cwd=place, CXR_COURSE_SIZE="tiny")
    assert (place / "runs" / "covid" / "report" / "report.html").is_file()


def test_a_table_of_ones_own_says_what_is_what(place):
    "Columns and findings are said at the terminal; other columns are information and no targets."
    import pandas as pd

    from cxr_course.data.loading import load_dataset
    films = load_dataset(place / "films")
    rows = films[["path", "patient", "split",
                  "label"]].assign(path=[str(Path(place, p).resolve()) for p in films["path"]], smoker=1,
                                   weight=70)
    rows.set_axis(["filename", "who", "split", "dx", "smoker", "weight"],
                  axis=1).to_csv(place / "own.csv", index=False)
    words = ("--columns", "filename=path,who=patient,dx=label")
    out, _ = cxr("data", "show", "own.csv", *words, cwd=place)
    assert "PNEUMONIA" in out and "smoker" not in out
    rows["Opacity"] = (rows.pop("label") == "PNEUMONIA").astype(float)
    rows.to_csv(place / "findings.csv", index=False)
    out, _ = cxr("data", "show", "findings.csv", "--findings", "Opacity", cwd=place)
    assert "Opacity" in out and "smoker" not in out
    assert len(pd.read_csv(place / "findings.csv")) == len(films)
