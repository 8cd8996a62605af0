"""Scaling: two real processes compute what one computes, a real kill -9 loses nothing, and every mistake is told within seconds."""
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from cxr_course import core, pipelines, scaling
from cxr_course.core import CourseError
from cxr_course.scaling import launch, meet

MARKS = {"code": "a", "keras": "3"}


def world(folder, n=40, side=24):
    "Noisy pictures of n / 2 patients; the sick ones have a bright corner."
    folder.mkdir(exist_ok=True)
    rows, draw = [], core.rng("scaling")
    for i in range(n):
        sick, split = i % 4 < 2, ("train", "train", "train", "val", "test")[i // 2 % 5]
        picture = draw.uniform(0, .6, (side, side))
        if sick: picture[4:12, 4:12] += .2
        if not (folder / f"{i}.png").exists(): Image.fromarray((picture * 255).astype("uint8")).save(folder / f"{i}.png")
        rows.append(dict(path=str(folder / f"{i}.png"), patient=f"0{i // 2}", split=split, label="ILL" if sick else "WELL"))
    return core.frame(rows, labels=["WELL", "ILL"])


# ---- two processes against one

SCRIPT = """
    import os, signal, sys, threading, time
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from cxr_course import scaling
    alone, folder = "alone" in sys.argv, Path({folder!r})
    strategy = scaling.devices(2) if alone else scaling.strategy_from_environment()
    from test_scaling import world
    from cxr_course import cnn, pipelines, training
    from cxr_course.core import CourseError
    store = pipelines.build(world(folder / "png"), (24, 24), folder=folder / "store")
    def fit(name, **options):
        model = cnn.build(cnn.Spec((4, 8), (8,), l2=.001), (24, 24, 1), seed=3)
        return training.fit(model, store, run=folder / name, **(dict(epochs=3, batch=7, lr=1e-2, seed=3) | options))
    if alone:
        fit("one")
        fit("both", strategy=strategy, accumulate=2)
        fit("half", precision="mixed_float16", accumulate=2, epochs=1)
        sys.exit()
    me = strategy.cluster_resolver.task_id
    try: fit("never", strategy=strategy, lr=.1 + me)
    except CourseError as e: (folder / f"refused-{{me}}").write_text(str(e))
    fate = folder / "fate"
    def lightning():
        while not (folder / ".team.partial" / "state.npz").exists(): time.sleep(.002)
        fate.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if me == 1 and not fate.exists(): threading.Thread(target=lightning, daemon=True).start()
    run = fit("team", strategy=strategy, resume="--resume" in sys.argv)
    (folder / f"left-{{me}}").write_text(repr(run is None))
    scaling.leave(strategy)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "One device, two devices, parts; and a team of two processes of which one is killed."
    folder = tmp_path_factory.mktemp("team")
    program = folder / "program.py"
    program.write_text(textwrap.dedent(SCRIPT.format(tests=os.path.dirname(__file__), folder=str(folder))))
    done = subprocess.run([sys.executable, str(program), "alone"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = []
    assert launch(["train", "--out", str(folder / "team")], 2, program=[sys.executable, str(program)], say=said.append) == 0
    return folder, said


def gap(folder, a, b):
    from cxr_course import training
    one, other = training.load_run(folder / a), training.load_run(folder / b)
    assert np.allclose(one.history[["loss", "val_loss"]], other.history[["loss", "val_loss"]], atol=1e-4) and list(one.history["epoch"]) == list(other.history["epoch"])
    assert np.allclose(one.predictions["p_ILL"], other.predictions["p_ILL"], atol=1e-3)
    return max(np.abs(x - y).max() for x, y in zip(one.model.get_weights(), other.model.get_weights()))


def test_two_processes_of_which_one_is_killed_give_the_run_of_one(runs):
    folder, said = runs
    assert (folder / "fate").exists() and len(said) == 1 and "worker 1 was killed (signal 9)" in said[0] and "starting again" in said[0]
    assert gap(folder, "one", "team") < 1e-3
    assert (folder / "left-0").read_text() == "False" and (folder / "left-1").read_text() == "True"          # only the first has a run, and wrote
    assert not list(folder.glob(".team*"))


def test_unequal_settings_are_refused_by_all(runs):
    for me in (0, 1): assert "they differ in lr" in (runs[0] / f"refused-{me}").read_text()


def test_two_devices_with_two_parts_each_give_the_same_run(runs):
    assert gap(runs[0], "one", "both") < 1e-3


def test_half_the_digits_are_a_matter_of_the_steps_only(runs):
    from cxr_course import training
    run = training.load_run(runs[0] / "half")
    assert {layer.dtype_policy.name for layer in run.model.layers} == {"float32"} and np.isfinite(run.history["loss"]).all()
    assert run.card["training"]["precision"] == "mixed_float16" and run.card["training"]["accumulate"] == 2


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_parts_add_up_even_when_findings_are_unknown_and_films_fewer_than_parts(n):
    from cxr_course import cnn, training
    model = cnn.build(cnn.Spec((4,), (4,), l2=.01), (8, 8, 1), outputs=3, seed=0)
    draw = core.rng("parts", n)
    x = draw.uniform(size=(5, 8, 8, 1)).astype("float32")
    y = np.where(draw.uniform(size=(5, 3)) < .4, np.nan, draw.integers(0, 2, (5, 3))).astype("float32")
    whole, parts = (training._parts(model, lambda v: v, training.cross_entropy, training.tf.constant(x), training.tf.constant(y), [], 0, k, k) for k in (1, n))
    assert np.isclose(whole[0], parts[0], atol=1e-6) and all(np.allclose(a, b, atol=1e-6) for a, b in zip(whole[1], parts[1]))


def test_fit_refuses_odd_parts_and_digits(tmp_path):
    from cxr_course import cnn, training
    model = cnn.build(cnn.Spec((4,), (4,)), (24, 24, 1))
    store = pipelines.build(world(tmp_path / "png"), (24, 24), folder=tmp_path / "store")
    with pytest.raises(CourseError, match="0 parts"): training.fit(model, store, run=tmp_path / "a", accumulate=0)
    with pytest.raises(CourseError, match="not a choice"): training.fit(model, store, run=tmp_path / "a", precision="float8")


# ---- the meeting

def together(hosts, *marks, seconds=3.):
    def one(me):
        try: return meet(hosts, me, marks[me], seconds)
        except CourseError as e: return e
    with ThreadPoolExecutor(len(hosts)) as pool: return list(pool.map(one, range(len(hosts))))


@pytest.fixture
def hosts(): return [f"127.0.0.1:{p}" for p in scaling.free_ports(3)]


def test_equal_machines_meet(hosts):
    found = together(hosts, MARKS, MARKS, MARKS)
    assert [len(lines) for lines in found] == [2, 1, 1]
    for line in sum(found, []): line.close()


def test_unequal_machines_all_hear_who_differs_in_what(hosts):
    for e in together(hosts, MARKS, MARKS, MARKS | {"code": "b"}): assert f"{hosts[2]} has another code" in str(e)


def test_lists_of_machines_must_be_equal(hosts):
    with ThreadPoolExecutor(2) as pool:
        first, other = pool.submit(meet, hosts[:2], 0, MARKS, 3.), pool.submit(meet, [hosts[0], hosts[2]], 1, MARKS, 3.)
        for f in (first, other):
            with pytest.raises(CourseError, match="list of machines"): f.result()


def test_nobody_there(hosts):
    began = time.monotonic()
    with pytest.raises(CourseError, match="cannot be reached within 0.3 s"): meet(hosts, 1, MARKS, .3)
    with pytest.raises(CourseError, match="2 of 3 machines did not come"): meet(hosts, 0, MARKS, .3)
    with pytest.raises(CourseError, match="cannot be reached"): meet(["no-such-host.invalid:7801", hosts[1]], 1, MARKS, .3)
    assert time.monotonic() - began < 20


def test_port_in_use(hosts, monkeypatch):
    with socket.create_server(("127.0.0.1", int(hosts[0][10:]))), pytest.raises(CourseError, match="another program has it"): meet(hosts, 0, MARKS, .3)
    monkeypatch.setenv("CXR_COURSE_TEAM", json.dumps(dict(hosts=hosts, me=1, seconds=.3)))
    with socket.create_server(("127.0.0.1", int(hosts[1][10:]) + 1)), pytest.raises(CourseError, match="cannot be used"): scaling.strategy_from_environment()


def test_strangers_are_shown_the_door(hosts):
    def stranger():
        for _ in range(40):
            try:
                with socket.create_connection(("127.0.0.1", int(hosts[0][10:])), timeout=1) as line:
                    line.sendall(b"GET / HTTP/1.1\r\n\r\n\n")
                    return
            except OSError: time.sleep(.05)
    thread = threading.Thread(target=stranger)
    thread.start()
    found = together(hosts[:2], MARKS, MARKS)
    thread.join()
    assert [len(lines) for lines in found] == [1, 1]
    for line in sum(found, []): line.close()


def test_another_program_at_the_first_ones_port(hosts):
    with socket.create_server(("127.0.0.1", int(hosts[0][10:]))) as server:
        threading.Thread(target=lambda: server.accept()[0].sendall(b"220 mail.example.org\r\n"), daemon=True).start()
        with pytest.raises(CourseError, match="gave no answer"): meet(hosts, 1, MARKS, .3)


@pytest.mark.parametrize("host", ["node", "node:", "node:80", ":7801", "node:99999", "node:x"])
def test_addresses(host):
    with pytest.raises(CourseError, match="not an address"): scaling.commands(["train"], [host])
    with pytest.raises(CourseError, match="no machine 2"): meet(["a:7801", "b:7801"], 2)


def test_the_code_has_a_fingerprint():
    assert scaling.stamp() == scaling.stamp() and set(scaling.stamp()) == {"code", "Python", "tensorflow", "keras", "numpy"}


def test_a_process_without_its_launcher_ends():
    heard = []
    scaling.watch([], parent=-1, lost=heard.append).join(timeout=5)
    assert heard == ["the launcher is gone"]


# ---- the launcher, with programs that do not train

def program(code): return [sys.executable, "-c", "import json, os, signal, sys, time; me = json.loads(os.environ['CXR_COURSE_TEAM'])['me']\n" + code]


def test_an_error_in_words_is_passed_on_and_not_tried_again(tmp_path):
    said, tries = [], tmp_path / "tries"
    code = launch(["train", "--out", str(tmp_path / "a")], program=program(f"open({str(tries)!r}, 'a').write('x')\nif me == 1: sys.exit('no such option')\ntime.sleep(60)"), say=said.append)
    assert code == 1 and said == ["worker 1: no such option"] and tries.read_text().count("x") <= 2


def test_after_so_many_deaths_it_gives_up(tmp_path):
    said = []
    assert launch(["train", "--out", str(tmp_path / "a")], restarts=1, program=program("os.kill(os.getpid(), signal.SIGKILL)"), say=said.append) == scaling.LOST
    assert len(said) == 2 and "signal 9" in said[1] and "kept: 0" in said[1]


def test_a_host_alone_starts_again_when_the_other_is_lost(tmp_path):
    said, first = [], tmp_path / "first"
    code = launch(["train", f"--out={tmp_path / 'a'}"], hosts=["127.0.0.1:21001", "127.0.0.1:21011"], here=1, say=said.append,
                  program=program(f"if not os.path.exists({str(first)!r}): open({str(first)!r}, 'w'); os._exit(75)\nassert me == 1"))
    assert code == 0 and len(said) == 1 and "another machine is gone" in said[0]


def test_what_the_launcher_refuses(tmp_path):
    with pytest.raises(CourseError, match="--out"): launch(["train"])
    with pytest.raises(CourseError, match="no team"): launch(["train", "--out", "x"], 1)
    with pytest.raises(CourseError, match="which of the machines"): launch(["train", "--out", "x"], hosts=["a:7801", "b:7801"])


def test_ctrl_c_is_passed_to_the_first_and_nobody_is_left(tmp_path):
    code = textwrap.dedent(f"""
        import sys
        from cxr_course import scaling
        me = "import json, os, sys, time; me = json.loads(os.environ['CXR_COURSE_TEAM'])['me']; open({str(tmp_path)!r} + '/pid-%d' % me, 'w').write(str(os.getpid()))\\ntry: time.sleep(60)\\nexcept KeyboardInterrupt: sys.exit(0)"
        sys.exit(scaling.launch(["train", "--out", {str(tmp_path / "a")!r}], program=[sys.executable, "-c", me]))""")
    launcher = subprocess.Popen([sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + code])
    for _ in range(200):
        if all((tmp_path / f"pid-{i}").exists() and (tmp_path / f"pid-{i}").read_text() for i in (0, 1)): break
        time.sleep(.05)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=20) == 0
    for i in (0, 1):
        with pytest.raises(ProcessLookupError): os.kill(int((tmp_path / f"pid-{i}").read_text()), 0)


# ---- shards

def test_shards_put_together_are_the_store_byte_for_byte(tmp_path):
    frame = world(tmp_path / "png")
    (tmp_path / "png" / "7.png").write_bytes(b"no picture")
    usual = pipelines.build(frame, (16, 20), folder=tmp_path / "usual", skip_bad=True)
    with pytest.raises(CourseError, match="1 of 40 films cannot be read"): scaling.decode(frame, (16, 20), tmp_path / "shared", n=3)
    made = {p: p.stat().st_mtime_ns for p in tmp_path.glob(".shared.shards-3/*/images.npy")}
    assert len(made) == 3 and not (tmp_path / "shared").exists()
    store = scaling.decode(frame.sample(frac=1, random_state=0), (16, 20), tmp_path / "shared", n=3, skip_bad=True)      # nothing is decoded twice
    for file in ("images.npy", "index.csv", "store.json"): assert (usual.folder / file).read_bytes() == (store.folder / file).read_bytes()
    assert sorted(p.name for p in store.folder.iterdir()) == sorted(p.name for p in usual.folder.iterdir()) and not list(tmp_path.glob(".shared*"))


def test_hosts_do_their_shards_and_one_puts_them_together(tmp_path):
    frame = world(tmp_path / "png", n=12)
    for i in (0, 1): assert scaling.decode(frame, (16, 16), tmp_path / "s", workers=1, only=(i, 2)) is None
    stamps = sorted(p.stat().st_mtime_ns for p in tmp_path.glob(".s.shards-12/*/store.json"))
    assert len(stamps) == 12
    before = scaling._decode_all
    try:
        scaling._decode_all = lambda jobs, workers: before(jobs, workers) if not jobs else pytest.fail("a shard was decoded twice")
        assert len(scaling.decode(frame, (16, 16), tmp_path / "s", workers=3)) == 12 and not list(tmp_path.glob(".s.*"))
    finally: scaling._decode_all = before


def test_films_that_changed_between_shards_and_merging_are_noticed(tmp_path):
    frame = world(tmp_path / "png", n=8)
    scaling.decode(frame, (16, 16), tmp_path / "s", n=2, only=(0, 1))
    os.utime(frame["path"].iloc[0], (1, 1))
    with pytest.raises(CourseError, match="other files"): scaling.decode(frame, (16, 16), tmp_path / "s", n=2)
    with pytest.raises(CourseError, match="count from 0"): scaling.decode(frame, (16, 16), tmp_path / "s", only=(2, 2))
    with pytest.raises(CourseError, match="cannot be cut"): scaling.shards(frame, 9)


def test_decoding_keeps_memory_flat(tmp_path):
    frame = world(tmp_path / "png", n=320, side=64)
    few, all_ = (scaling._decode_all([(f, (96, 96), tmp_path / str(len(f)))], 1)[0]["peak_mb"] for f in (frame.head(40), frame))
    if few is None: pytest.skip("this system does not say how much memory a process held")
    assert all_ / few < 1.15


# ---- the shared search

TRIALS = [dict(lr=float(v)) for v in (1, 2, 3, 4, 5, 6)]


def test_two_workers_share_a_study_and_do_no_trial_twice(tmp_path):
    done = []
    def objective(values):
        done.append(values["lr"])
        time.sleep(.02)
        return values["lr"]
    with ThreadPoolExecutor(2) as pool: a, b = (f.result() for f in [pool.submit(scaling.work, objective, TRIALS, tmp_path / "two", 5., .01) for _ in range(2)])
    one = scaling.work(lambda v: v["lr"], TRIALS, tmp_path / "one")
    assert sorted(done) == [1, 2, 3, 4, 5, 6] and a.equals(b) and a.drop(columns="worker").equals(one.drop(columns="worker"))


def test_a_dead_workers_trial_is_taken_up_and_a_deadly_one_is_given_up(tmp_path):
    for name in ("0001.claim", "0002.claim", "0002.dead-0"): (tmp_path / name).touch()
    for name in ("0001.claim", "0002.claim"): os.utime(tmp_path / name, (1, 1))
    found = scaling.work(lambda v: v["lr"], TRIALS, tmp_path, stale=30.)
    assert found["status"].tolist() == ["done", "done", "failed", "done", "done", "done"] and found.loc[2, "reason"] == "its worker died twice"


def test_failures_are_recorded_and_never_end_in_waiting(tmp_path):
    def objective(values):
        if values["lr"] == 2: raise MemoryError("no room")
        return float("nan") if values["lr"] == 3 else 1.
    found = scaling.work(objective, TRIALS, tmp_path / "some")
    assert found["reason"].tolist()[:3] == ["", "MemoryError: no room", "the score is no number"] and found["score"].notna().sum() == 4
    def hopeless(values): raise ValueError("never")
    with pytest.raises(CourseError, match="all 6 trials failed"): scaling.work(hopeless, TRIALS, tmp_path / "none")
    with pytest.raises(CourseError, match="all 6 trials failed"): scaling.work(hopeless, TRIALS, tmp_path / "none")           # and says so again
    with pytest.raises(CourseError, match="other trials"): scaling.work(hopeless, TRIALS[:3], tmp_path / "none")
    with pytest.raises(CourseError, match="without trials"): scaling.work(hopeless, [], tmp_path / "empty")


# ---- the bill

def test_the_bill_adds_up():
    assert scaling.amdahl(0, 4) == 4 and scaling.amdahl(.5, 10**9) == pytest.approx(2)
    one = scaling.cost(36_000, (100, 100), 1, 10, price=2.)
    assert one["hours"] == pytest.approx(1) and one["euros"] == pytest.approx(2) and one["store_gb"] == pytest.approx(.36) and one["exchange_hours"] == 0
    assert scaling.cost(36_000, (100, 100), 1, 10, price=2., n=2)["exchange_hours"] > 0
    assert scaling.project(3600, (10, 10), 1., 2)["hours"] == pytest.approx(.5)
