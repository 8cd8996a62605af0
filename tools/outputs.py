"""`make outputs`: run notebooks at size sample and store their results in them, cleaned. The stored results
are what the site shows."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from .notebooks import ROOT, choose, command, notebooks, write
from .run import Outcome, execute


def lighter(png: str, colours: int = 128) -> str:
    """A plot (PNG in base64) with a palette, if that is smaller."""
    from PIL import Image

    small = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
    palette = image.quantize(colours, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    palette.save(small, "png", optimize=True)
    return min(png, base64.b64encode(small.getvalue()).decode(), key=len)


def store(path: str | Path, size: str = "sample") -> Outcome:
    """Run a notebook and save its results in it, cleaned; leave it alone if a cell fails."""
    import nbformat

    path = Path(path).resolve()  # nbdev_clean passes over a relative path without a word
    notebook, outcome = execute(path, size)
    if outcome.failure:
        return outcome
    for cell in notebook.cells:
        if cell.cell_type == "code":
            _tidy(cell)
    write(path, nbformat.writes(notebook) + "\n")
    clean(path)
    return outcome


def _tidy(cell) -> None:
    cell.outputs, cell.execution_count = [o for o in cell.outputs if o.get("name") != "stderr"], None
    for output in cell.outputs:
        if "execution_count" in output:
            output["execution_count"] = None
        if "image/png" in output.get("data", {}):
            output["data"]["image/png"] = lighter(output["data"]["image/png"])


def clean(path: Path) -> None:
    """Take the traces of a session out of a notebook."""
    if not path.is_file():
        raise FileNotFoundError(path)
    program = Path(sys.executable).with_name("nbdev_clean")
    done = subprocess.run(
        [program, "--fname", path.resolve()], cwd=path.parent, capture_output=True, text=True
    )
    if done.returncode or "Failed" in done.stderr:
        raise RuntimeError(f"{path} could not be cleaned\n{done.stderr}")


def store_all(root: str | Path = ROOT, only: Iterable[str] = (), size: str = "sample") -> int:
    """Run the notebooks that ONLY names and save their results; 0, or 1 if one failed."""
    failed = False
    for notebook in choose(notebooks(root), only):
        outcome = store(notebook.path, size)
        outcome.name = notebook.name
        print(outcome.line(), flush=True)
        failed |= bool(outcome.failure)
    return int(failed)


if __name__ == "__main__":
    command(lambda words: store_all(only=words))
