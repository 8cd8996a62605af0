"""Python with TensorFlow loaded: programs and kernels that start at once.

A notebook, and a command of the terminal, runs in a process of its own, and that process would spend five
seconds on importing TensorFlow, hundreds of times in `make test`. So one process imports it once and runs
nothing, and each new one is a fork of it: the modules loaded, none of them used, nothing of the course among
them. Where forking is not safe (Windows, macOS) a new process is a new Python.

Started as a program, this file is that one process: a line of JSON in, a line out.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from types import ModuleType

FORKS = sys.platform == "linux"


# ---- in the process that is forked, and in its forks


def serve() -> dict | None:
    """Import what most programs of the course import; then fork, or say whether a fork has ended, as asked.

    In a fork it returns what that one is to run, in the server nothing.
    """
    import keras  # noqa: F401, and with it TensorFlow, numpy, pandas, scipy, scikit-learn and matplotlib

    gc.freeze()  # or every fork copies what is loaded, as soon as its garbage is looked for
    for line in sys.stdin:
        order = json.loads(line)
        if "ended" in order:
            pid, status = os.waitpid(order["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif not (answer := os.fork()):
            return order
        print(json.dumps(answer), flush=True)


def become(words: list[str], env: dict[str, str], cwd: str, out: str, err: str, cores: list[int]) -> None:
    """Go on as `python` followed by `words` would (`-c code ...` or `-m module ...`)."""
    import matplotlib
    import numpy

    os.setsid()  # so that a signal reaches its children too
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.sched_setaffinity(0, cores)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env, JPY_PARENT_PID=str(os.getppid()))
    for stream, file in enumerate((os.devnull, out, err)):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), stream)
    # what was settled at import, in another process
    sys.path[:] = [p for p in sys.path if p != os.path.dirname(os.path.abspath(__file__))]
    if "MPLBACKEND" in env or "ipykernel_launcher" in words:
        matplotlib.rcParams["backend"] = env.get("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    numpy.random.seed()
    how, what, *rest = words
    sys.argv = [how, *rest]
    if how == "-m":
        return runpy.run_module(what, run_name="__main__", alter_sys=True)
    main = sys.modules["__main__"] = ModuleType("__main__")
    exec(compile(what, "<string>", "exec"), main.__dict__)


def live(order: dict) -> None:
    """Become what is ordered and end like Python, without taking thousands of modules apart for seconds."""
    code = 0
    try:
        become(**order)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if not isinstance(e.code, int | None):
            print(e.code, file=sys.stderr)
    except Exception:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ---- in the process that starts them


class Server:
    """The process that is forked. It has a session of its own, so that Ctrl-C is for who started it."""

    def __init__(self):
        self.lock = threading.Lock()
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        atexit.register(self.process.kill)

    def ask(self, **order):
        """The answer to an order; None if the server has died."""
        with self.lock:
            try:
                self.process.stdin.write(json.dumps(order) + "\n")
                self.process.stdin.flush()
            except OSError:
                return None
            answer = self.process.stdout.readline()
        return json.loads(answer) if answer else None


_servers: list[Server] = []
_one_at_a_time = threading.Lock()


def server() -> Server:
    """The server of this process, started at the first need and again if it has died."""
    with _one_at_a_time:
        if not _servers or _servers[-1].process.poll() is not None:
            _servers.append(Server())
        return _servers[-1]


class Forked:
    """A forked Python, with the words of `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, words, *, env=None, cwd=None, out=os.devnull, err=os.devnull):
        self.returncode, self.server = None, server()
        self.pid = self.server.ask(
            words=list(words),
            env=dict(os.environ if env is None else env),
            cwd=str(cwd or os.getcwd()),
            out=out,
            err=err,
            cores=sorted(os.sched_getaffinity(0)),
        )
        if self.pid is None:
            raise OSError(f"{__file__} ended before it could start a process; run it to see why")

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.server.ask(ended=self.pid)
            if self.returncode is None and self.server.process.poll() is not None:
                self.kill()  # nobody is left who could say more of it
                self.returncode = -signal.SIGKILL
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        started = time.monotonic()
        while self.poll() is None:
            if timeout is not None and time.monotonic() - started > timeout:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.02)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def python(*words, env=None, cwd=None, timeout=600) -> subprocess.CompletedProcess:
    """Run `python` with these words and wait: its code, its output and its errors as text."""
    if not FORKS:
        return subprocess.run(
            [sys.executable, *words], env=env, cwd=cwd, timeout=timeout, capture_output=True, text=True
        )
    with tempfile.TemporaryDirectory() as scratch:
        files = [os.path.join(scratch, name) for name in ("out", "err")]
        process = Forked(words, env=env, cwd=cwd, out=files[0], err=files[1])
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        said = []
        for file in files:
            with open(file, encoding="utf-8") as f:
                said.append(f.read())
    return subprocess.CompletedProcess(words, code, *said)


if __name__ == "__main__":
    if order := serve():
        live(order)
