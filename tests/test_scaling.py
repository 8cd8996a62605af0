"""Beyond one machine: two workers compute what one computes, a killed one loses nothing, a search goes on.

The engine (Ray) belongs to the extra `scale`; without it the tests that need it are skipped.
"""
import os
import signal
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from measure_long import contents
from PIL import Image

from cxr_course.core import CourseError, rng
from cxr_course.data.building import build_store
from cxr_course.frame import make_frame
from cxr_course.scale import engine as engine_module
from cxr_course.scale.engine import (
    _in_words, _refuse_unequal, _would_recur, distributed_train, import_ray, launch, ray_session, stamp,
)
from cxr_course.scale.search import distributed_search
from cxr_course.scale.work import amdahl, distributed_decode

HAVE_RAY = find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAVE_RAY, reason='Ray is not installed: pip install "cxr-course[scale]"')
pytestmark = pytest.mark.xdist_group("scaling")                       # one engine for all of them


def world(folder, n=40, side=24):
    "Noisy images of n / 2 patients; the sick ones have a bright corner."
    folder.mkdir(exist_ok=True)
    rows, draw = [], rng("scaling")
    for i in range(n):
        sick, split = i % 4 < 2, ("train", "train", "train", "val", "test")[i // 2 % 5]
        image = draw.uniform(0, .6, (side, side))
        if sick: image[4:12, 4:12] += .2
        file = folder / f"{i}.png"
        if not file.exists(): Image.fromarray((image * 255).astype("uint8")).save(file)
        rows.append(dict(path=str(file), patient=f"0{i // 2}", split=split, label="ILL" if sick else "WELL"))
    return make_frame(rows, labels=["WELL", "ILL"])


@pytest.fixture(scope="module")
def ray():
    with ray_session(workers=2) as found:
        # the workers cannot import this file
        found.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        yield found


# ---- training

SCRIPT = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_scaling import fit
    fit(Path({folder!r}), "one")
"""


def fit(folder, name, **options):
    from cxr_course.models.cnn import CNNSpec, build_cnn
    from cxr_course.training import fit as fit_module
    store = build_store(world(folder / "png"), (24, 24), folder=folder / "store")
    model = build_cnn(CNNSpec((4, 8), (8,), l2=.001), (24, 24, 1), seed=3)
    rates = [.5] * 4 + [1.] * 4
    usual = dict(epochs=2, batch=7, lr=1e-2, seed=3, optimizer="adamw", rates=rates)
    return fit_module.fit(model, store, run=folder / name, **(usual | options))


def team_job(folder):
    "Is refused, is killed once in the middle, finishes, and says at last what is wrong."
    def job(strategy, resume):
        import threading
        import time
        me, fate = strategy.cluster_resolver.task_id, folder / "fate"
        with open(folder / f"attempts-{me}", "a") as f: f.write(f"{resume} ")
        print(f"here is {me}")
        if not resume:
            try: fit(folder, "never", strategy=strategy, lr=.1 + me)
            except CourseError as e: (folder / f"refused-{me}").write_text(str(e))

        def lightning():
            while not (folder / ".team.partial" / "state.npz").exists(): time.sleep(.002)
            fate.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if me == 1 and not fate.exists(): threading.Thread(target=lightning, daemon=True).start()
        run = fit(folder, "team", strategy=strategy, resume=resume)
        (folder / f"left-{me}").write_text(repr(run is None))
        # the first is still writing the run folder
        while not (folder / "left-0").exists(): time.sleep(.1)
        if me == 1: raise CourseError("the printer is on fire", "room 7", "call somebody")
    return job


@pytest.fixture(scope="module")
def runs(ray, tmp_path_factory):
    "One process, and a team of two of which one is killed."
    folder = tmp_path_factory.mktemp("team")
    program = textwrap.dedent(SCRIPT.format(tests=os.path.dirname(__file__), folder=str(folder)))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = []
    with pytest.raises(CourseError) as error:
        distributed_train(team_job(folder), folder / "team", say=said.append)
    return SimpleNamespace(folder=folder, said=said, error=error.value)


def same(folder, a, b):
    from cxr_course.training.run import load_run
    one, other = load_run(folder / a), load_run(folder / b)
    assert list(one.history["epoch"]) == list(other.history["epoch"]) == [1, 2]
    assert np.allclose(one.history[["loss", "val_loss"]], other.history[["loss", "val_loss"]], atol=1e-4)
    assert np.allclose(one.predictions["p_ILL"], other.predictions["p_ILL"], atol=1e-3)
    return max(np.abs(x - y).max() for x, y in zip(one.model.get_weights(), other.model.get_weights())) < 1e-3


@needs_ray
def test_two_workers_of_which_one_is_killed_give_the_run_of_one(runs):
    assert (runs.folder / "fate").exists() and same(runs.folder, "one", "team")
    assert [(runs.folder / f"attempts-{me}").read_text() for me in (0, 1)] == ["False True ", "False True "]


@needs_ray
def test_the_death_is_told_and_the_first_worker_is_heard(runs):
    assert any("was lost; the others were stopped" in line for line in runs.said), runs.said
    assert runs.said.count("here is 0") == 2 and "here is 1" not in runs.said


@needs_ray
def test_only_the_first_worker_writes_and_the_folder_is_like_any_other(runs):
    assert (runs.folder / "left-0").read_text() == "False" and (runs.folder / "left-1").read_text() == "True"
    assert contents(runs.folder / "team") == contents(runs.folder / "one") and not list(
        runs.folder.glob(".team*")
    )


@needs_ray
def test_an_error_of_a_worker_arrives_in_words_and_is_not_tried_again(runs):
    assert (runs.error.what, runs.error.where,
            runs.error.remedy) == ("the printer is on fire", "room 7", "call somebody")
    # the first, and the one after the death
    assert len((runs.folder / "attempts-1").read_text().split()) == 2


@needs_ray
def test_unequal_settings_are_refused_by_all(runs):
    for me in (0, 1): assert "they differ in lr" in (runs.folder / f"refused-{me}").read_text()


def test_a_machine_with_other_code_is_refused():
    with pytest.raises(CourseError, match="has another code, keras"):
        _refuse_unequal(stamp() | {"code": "old", "keras": "2"})
    _refuse_unequal(stamp())


@needs_ray
def test_what_the_user_hears_of_a_failure(tmp_path):
    from ray.exceptions import ActorDiedError
    mistake, bug = CourseError("no such folder"), ZeroDivisionError()
    assert _in_words(SimpleNamespace(worker_failures={0: ActorDiedError(), 1: mistake}), tmp_path) is mistake
    assert _in_words(SimpleNamespace(controller_failure=mistake), tmp_path) is mistake
    assert "killed again and again" in str(_in_words(SimpleNamespace(worker_failures={0: ActorDiedError()}),
                                                     tmp_path))
    assert _in_words(SimpleNamespace(worker_failures={0: bug}), tmp_path) is bug and _would_recur(bug)
    assert not _would_recur(ActorDiedError())


def test_what_the_launcher_refuses_and_passes_on(tmp_path, monkeypatch):
    with pytest.raises(CourseError, match="--out"): launch(["train"], program=print)
    with pytest.raises(CourseError, match="shares nothing"): launch(["train", "--out", "x"], 1, program=print)
    (tmp_path / ".x.partial").mkdir()
    (tmp_path / ".x.partial" / "state.npz").touch()
    with pytest.raises(CourseError, match="unfinished"):
        launch(["train", "--out", str(tmp_path / "x")], program=print)
    told, words = [], []
    monkeypatch.setattr(engine_module, "distributed_train", lambda job, run, *a,
                        **k: (told.append((run, k["resume"])), job(None, True)))
    launch(["train", f"--out={tmp_path / 'x'}", "--resume"], program=words.extend)
    assert told == [(str(tmp_path / "x"), True)] and words == ["train", f"--out={tmp_path / 'x'}", "--resume"]


# ---- the engine

@needs_ray
def test_nothing_listens_beyond_loopback(ray):
    import psutil
    ray.get(ray.remote(peak_mb).remote())
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    heard = {c.laddr.ip.replace("::ffff:", "") for p in family for c in p.net_connections("inet")
             if c.status == "LISTEN"}
    assert heard and heard <= {"127.0.0.1", "::1"}


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(CourseError, match=r"cxr-course\[scale\]"): import_ray()


@needs_ray
def test_a_cluster_that_is_not_there():
    code = "from cxr_course.scale.engine import ray_session\nwith ray_session(address='127.0.0.1:1'): pass"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "no Ray cluster answers" in done.stderr and "auto" in done.stderr


# ---- decoding

@needs_ray
def test_two_workers_make_the_store_of_one_byte_for_byte(ray, tmp_path):
    frame = world(tmp_path / "png")
    (tmp_path / "png" / "7.png").write_bytes(b"no image")
    usual = build_store(frame, (16, 20), folder=tmp_path / "usual", skip_bad=True)
    with pytest.raises(CourseError, match="1 of 40 .* cannot be read"):
        distributed_decode(frame, (16, 20), tmp_path / "shared")
    shuffled = frame.sample(frac=1, random_state=0)
    store = distributed_decode(shuffled, (16, 20), tmp_path / "shared", skip_bad=True)
    for file in usual.folder.iterdir(): assert file.read_bytes() == (store.folder / file.name).read_bytes()
    assert sorted(p.name for p in store.folder.iterdir()) == sorted(p.name for p in usual.folder.iterdir())


def peak_mb():
    "The most memory that this process ever held."
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024 if status.exists() else None


@needs_ray
def test_decoding_keeps_memory_flat(ray, tmp_path):
    frame = world(tmp_path / "png", n=320, side=64)
    task, peaks = ray.remote(peak_mb), []
    for part in (frame.head(40), frame):
        distributed_decode(part, (96, 96), tmp_path / str(len(part)))
        peaks.append(max(ray.get([task.remote() for _ in range(20)]), default=None) if peak_mb() else None)
    if peaks[0] is None: pytest.skip("this system does not say how much memory a process held")
    assert peaks[1] / peaks[0] < 1.15


# ---- the search

TRIALS = [dict(lr=float(v)) for v in (1, 2, 3, 4)]


def objective(folder):
    def score(values):
        if values["lr"] == 2: raise MemoryError("no room")
        if values["lr"] == 3: return float("nan")
        if values["lr"] == 4 and not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with open(folder / "done", "a") as f: f.write(f"{values['lr']:g} ")
        return values["lr"]
    return score


@needs_ray
def test_failing_and_dying_trials_do_not_stop_a_search(ray, tmp_path):
    found = distributed_search(objective(tmp_path), TRIALS, tmp_path / "search")
    assert found["status"].tolist() == ["done", "failed", "failed", "done"] and (tmp_path / "died").exists()
    assert found["reason"].tolist()[:3] == ["", "MemoryError: no room", "the score is no number"]
    assert found["score"].dropna().tolist() == [1, 4] and found["lr"].tolist() == [1, 2, 3, 4]
    again = distributed_search(objective(tmp_path), TRIALS, tmp_path / "search")
    # nothing twice
    assert again.equals(found) and sorted((tmp_path / "done").read_text().split()) == ["1", "4"]
    with pytest.raises(CourseError, match="other trials"):
        distributed_search(objective(tmp_path), TRIALS[:2], tmp_path / "search")


@needs_ray
def test_a_search_in_which_everything_fails_ends_in_words(ray, tmp_path):
    def hopeless(values): raise ValueError("never")
    with pytest.raises(CourseError, match="all 2 trials failed.*\n.*ValueError: never"):
        distributed_search(hopeless, TRIALS[:2], tmp_path / "none")
    with pytest.raises(CourseError, match="without trials"):
        distributed_search(hopeless, [], tmp_path / "empty")


# ---- arithmetic and documents

def test_amdahl():
    assert amdahl(0, 4) == 4 and amdahl(.5, 10**9) == pytest.approx(2)


CLUSTERS = Path(__file__).parent.parent / "nbs" / "clusters"


def test_the_cluster_files_can_be_read():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    cloud = yaml.safe_load((CLUSTERS / "cloud.yaml").read_text())
    assert (
        cloud["head_node_type"] in cloud["available_node_types"]
        and cloud["provider"]["use_internal_ips"] is True
    )
    done = subprocess.run(["bash", "-n", str(CLUSTERS / "slurm.sh")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH" in (CLUSTERS / "slurm.sh").read_text()


@needs_ray
def test_ray_knows_what_the_cloud_file_says():
    json = pytest.importorskip("json")
    schema = Path(find_spec("ray").submodule_search_locations[0]) / "autoscaler" / "ray-schema.json"
    jsonschema, yaml = pytest.importorskip("jsonschema"), pytest.importorskip("yaml")
    if not schema.exists(): pytest.skip("this Ray brings no schema")
    jsonschema.validate(yaml.safe_load((CLUSTERS / "cloud.yaml").read_text()), json.loads(schema.read_text()))
