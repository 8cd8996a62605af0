"""A Python that is forked with TensorFlow loaded runs a program as a new Python would."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tools.forked import FORKS, Forked, python

SAYS = """
import os, sys
print(sys.argv, os.getcwd(), os.environ.get("COLOUR"), __name__)
print("careful", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


def test_words_folder_surroundings_streams_and_code_arrive(tmp_path):
    done = python("-c", SAYS, "7", "b", cwd=tmp_path, env=os.environ | {"COLOUR": "grey"})
    assert done.returncode == 7 and done.stderr == "careful\n"
    assert done.stdout == f"['-c', '7', 'b'] {tmp_path} grey __main__\n"


def test_it_says_and_ends_like_a_new_python():
    for code in ("import sys; sys.exit('no such film')", "1 / 0", "import atexit as a; a.register(print, 3)"):
        new = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        fork = python("-c", code)
        assert (fork.returncode, fork.stdout) == (new.returncode, new.stdout)
        assert fork.stderr.splitlines()[-1:] == new.stderr.splitlines()[-1:]


def test_nothing_is_left_from_one_to_the_next_and_nothing_of_ours_is_loaded():
    python("-c", "import os, keras, cxr_course.core; os.environ['LEFT'] = '1'; keras.left = 1")
    code = "import os, sys, keras; print('LEFT' in os.environ, hasattr(keras, 'left'))"
    code += "; print([m for m in sys.modules if m.startswith(('cxr_course', 'tools', 'ipykernel'))])"
    assert python("-c", code).stdout == "False False\n[]\n"


def test_two_draw_different_numbers():
    code = "import random, numpy; print(random.random(), numpy.random.rand())"
    one, other = (python("-c", code).stdout.split() for _ in range(2))
    assert one[0] != other[0] and one[1] != other[1]


@pytest.mark.skipif(not FORKS, reason="here a new process is a new Python")
def test_a_signal_reaches_it_and_its_children(tmp_path):
    code = "import subprocess, sys; child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True)"
    process = Forked(["-c", code + "; child.wait()"], out=str(tmp_path / "out"))
    while not (tmp_path / "out").exists() or not (tmp_path / "out").read_text():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(timeout=20) == -signal.SIGKILL
    child = int((tmp_path / "out").read_text())
    until = time.monotonic() + 20
    while os.path.exists(f"/proc/{child}") and "zombie" not in open(f"/proc/{child}/status").read():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_who_does_not_end_is_ended():
    with pytest.raises(subprocess.TimeoutExpired):
        python("-c", "import time; time.sleep(60)", timeout=0.2)


@pytest.mark.skipif(not FORKS, reason="here a new process is a new Python")
def test_a_server_that_died_is_told_and_made_again():
    process = Forked(["-c", "import time; time.sleep(60)"])
    process.server.process.kill()
    assert process.wait(timeout=20) == -signal.SIGKILL
    process.kill()
    assert python("-c", "print(7)").stdout == "7\n"
