"""Run a notebook in a fresh kernel of its own, and tell what it took and found."""

from __future__ import annotations

import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

SIZES = ("tiny", "sample", "full")
QUIET = {
    "CXR_COURSE_QUIET": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}


@dataclass
class Outcome:
    """What running a notebook came to."""

    name: str  # of the notebook, as in nbs/
    size: str  # tiny, sample or full
    seconds: float  # wall-clock time
    memory: int  # bytes at the peak, the kernel and its children together
    headline: str = ""  # the figure worth remembering
    failure: str = ""  # which cell failed and why; empty if none did

    @property
    def cost(self) -> str:
        return f"{clock(self.seconds)}, {self.memory / 2**20:.0f} MB"

    @property
    def found(self) -> str:
        return f"FAILED: {self.failure.splitlines()[0][:160]}" if self.failure else self.headline

    def line(self) -> str:
        """One line for the terminal."""
        return f"{self.name:<32} {clock(self.seconds):>12} {self.memory / 2**20:>6.0f} MB  {self.found}"


def clock(seconds: float) -> str:
    """Seconds in words."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


class Watch:
    """Watch the memory of a process and its children while a block runs; `peak` is in bytes."""

    def __init__(self, pid: Callable[[], int | None]):
        self.pid, self.peak, self._done = pid, 0, threading.Event()

    def look(self) -> None:
        """Add up what the family of the process holds now."""
        import psutil

        try:
            family = (
                [(top := psutil.Process(self.pid())), *top.children(recursive=True)] if self.pid() else []
            )
        except psutil.NoSuchProcess:
            return
        used = 0
        for process in family:
            try:
                used += process.memory_info().rss
            except psutil.NoSuchProcess:  # it ended between two looks
                pass
        self.peak = max(self.peak, used)

    def _run(self) -> None:
        while not self._done.wait(0.1):
            self.look()

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()


def execute(path: str | Path, size: str, timeout: int = 3600, stop: threading.Event | None = None):
    """The notebook after a run in a kernel of its own, and the Outcome.

    A cell may take `timeout` seconds. When `stop` is set, the kernel is killed and KeyboardInterrupt raised.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellControlSignal, DeadKernelError

    from .kernels import Manager

    path, begun = Path(path).resolve(), []
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        kernel_manager_class=Manager,
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--IPKernelApp.log_level=40"],
        on_cell_start=lambda cell, cell_index: begun.append(cell_index),
    )
    started, failure = time.perf_counter(), ""
    with (
        tempfile.TemporaryDirectory() as scratch,
        tempfile.TemporaryFile("w+") as noise,
        Watch(lambda: client.km and client.km.provisioner and client.km.provisioner.pid) as watch,
    ):
        surroundings = os.environ | QUIET | {"CXR_COURSE_SIZE": size, "IPYTHONDIR": scratch}
        try:
            _run(client, stop, env=surroundings, stderr=noise)
        except (CellControlSignal, DeadKernelError) as e:
            failure = _failure(notebook, begun[-1] if begun else 0, e)
    return notebook, Outcome(
        path.stem, size, time.perf_counter() - started, watch.peak, _headline(notebook), failure
    )


def _run(client, stop: threading.Event | None, **how) -> None:
    with ThreadPoolExecutor(
        1
    ) as pool:  # the kernel's event loop lives in a thread, so that Ctrl-C reaches us
        running = pool.submit(client.execute, **how)
        try:
            while not wait([running], timeout=0.1).done:
                if stop is not None and stop.is_set():
                    raise KeyboardInterrupt
            running.result()
        except KeyboardInterrupt:
            while not running.done():
                if client.km and client.km.provisioner and client.km.provisioner.process:
                    client.km.provisioner.process.kill()  # nothing happens if it is gone
                time.sleep(0.1)
            raise


def _failure(notebook, at: int, error: Exception) -> str:
    lines = notebook.cells[at].source.splitlines()
    first = next((line for line in lines if line.strip() and not line.startswith("#|")), "")
    if hasattr(error, "ename"):
        return f"cell {at + 1}, `{first.strip()}`: {error.ename}: {error.evalue}"
    return f"cell {at + 1}, `{first.strip()}`: {type(error).__name__}: {str(error).strip().splitlines()[0]}"


def _headline(notebook) -> str:
    outputs = [o for c in notebook.cells for o in c.get("outputs", ()) if o["output_type"] == "stream"]
    return (re.findall(r"^headline: (.+)$", "".join(o["text"] for o in outputs), re.M) or [""])[-1]
