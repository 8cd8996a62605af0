"""Notebooks as files: what each says about itself, in which order they are read, and which are meant by
ONLY."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FORGOTTEN = "Not in the sidebar"  # the part of notebooks that _quarto.yml does not name


class Fault(Exception):
    """Something that whoever typed the command can put right; printed without a traceback."""


@dataclass(frozen=True)
class Notebook:
    """What a notebook says about itself."""

    path: Path  # the file
    name: str  # its path below nbs/, without .ipynb: 'lessons/07_cnn'
    title: str  # its first heading
    subtitle: str  # the `>` line below the title
    module: str | None  # what `#| default_exp` names, with dots: 'models.cnn'
    part: str = ""  # section of the sidebar

    @property
    def stem(self) -> str:
        return self.path.stem

    @property
    def topic(self) -> str:
        return re.sub(r"^\d+_", "", self.stem)

    @property
    def lesson(self) -> bool:
        return self.name.startswith("lessons/")

    @property
    def page(self) -> str:
        return "about.html" if self.name == "index" else f"{self.name}.html"


def write(path: Path, text: str) -> None:
    """Write under another name first, so that a kill leaves the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def cells(path: str | Path) -> list[dict]:
    """The cells of a notebook, each with its source as one text."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError) as e:
        remedy = "open it in Jupyter, or restore it with git"
        raise Fault(f"{path}: this notebook cannot be read ({type(e).__name__}); {remedy}") from e
    return [cell | {"source": "".join(cell["source"])} for cell in found]


def directives(source: str) -> dict[str, str]:
    """The instructions to nbdev and Quarto, `#| name value`, that a code cell begins with."""
    found = re.findall(r"^#\|\s*([\w-]+):?[ \t]*(.*)$", source, re.M)
    return {name: value.strip() for name, value in found}


def describe(path: Path, folder: Path, part: str = "") -> Notebook:
    """Read a notebook's own description of itself."""
    title = module = None
    for cell in cells(path):
        if cell["cell_type"] == "code":
            module = module or directives(cell["source"]).get("default_exp")
        elif cell["cell_type"] == "markdown" and title is None:
            title = re.match(r"#[ \t]+(.+?)[ \t]*(?:\n+>[ \t]*(.+))?$", cell["source"], re.M)
    if not title:
        raise Fault(
            f"{path}: no title; begin its first markdown cell with `# Title` and a line `> what it is about`"
        )
    name = path.relative_to(folder).with_suffix("").as_posix()
    return Notebook(path, name, title[1].strip(), (title[2] or "").strip(), module, part)


def files(root: str | Path = ROOT) -> list[Path]:
    """Every notebook below nbs/, in all its folders; names that begin with . or _ are none."""
    folder = Path(root) / "nbs"
    found = sorted(
        p for p in folder.rglob("*.ipynb") if not any(s[0] in "._" for s in p.relative_to(folder).parts)
    )
    if not found:
        raise Fault(f"{folder}: no notebooks here; run this from the top of the repository")
    return found


def sidebar(root: str | Path = ROOT) -> list[tuple[str, str]]:
    """Section and notebook, in the order of the site's sidebar."""
    import yaml

    path = Path(root) / "_quarto.yml"
    if not path.exists():
        return []
    listed = yaml.safe_load(path.read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    return list(_entries(listed, ""))


def _entries(listed: list, part: str) -> Iterator[tuple[str, str]]:
    for entry in listed:
        if isinstance(entry, str):
            yield part, entry
        elif "contents" in entry:
            yield from _entries(entry["contents"], entry.get("section", part))
        else:
            yield part, entry["href"]


def notebooks(root: str | Path = ROOT) -> list[Notebook]:
    """All notebooks in the order of reading; those that the sidebar forgot come last."""
    folder, known = Path(root) / "nbs", set(files(root))
    listed = [(part, folder / name) for part, name in sidebar(root)]
    listed += [(FORGOTTEN, path) for path in sorted(known - {path for _, path in listed})]
    return [describe(path, folder, part) for part, path in listed if path in known]


def matches(notebook: Notebook, word: str) -> int:
    """How well a word names a notebook: 3 by name, number or module; 2 by a beginning; 1 by a part; 0 not."""
    word = word.removesuffix(".ipynb").removeprefix("nbs/")
    exact = {
        notebook.name,
        notebook.stem,
        notebook.topic,
        notebook.module,
        (notebook.module or "").split(".")[-1],
    }
    if word in exact or (word.isdigit() and notebook.stem.startswith(f"{word}_")):
        return 3
    return (
        2 if notebook.stem.startswith(word) or notebook.topic.startswith(word) else int(word in notebook.name)
    )


def choose(found: Iterable[Notebook], only: Iterable[str] = ()) -> list[Notebook]:
    """The notebooks that the words of ONLY name, or all; a word that names nothing is refused."""
    found, wanted = list(found), set()
    for word in only:
        scores = {n.name: matches(n, word) for n in found}
        best = max(scores.values(), default=0)
        if not best:
            raise Fault(f"no notebook is called {word}; choose from {', '.join(n.name for n in found)}")
        wanted |= {name for name, score in scores.items() if score == best}
    return [n for n in found if n.name in wanted] if wanted else found


def write_notebook(path: str | Path, texts: Iterable[str]) -> Path:
    """A notebook from the texts of its cells; a text that begins with a heading becomes a markdown cell."""

    def cell(i: int, text: str) -> dict:
        code = dict(cell_type="code", execution_count=None, outputs=[])
        kind = dict(cell_type="markdown") if re.match(r"#+ ", text) else code
        return kind | dict(id=f"cell{i}", metadata={}, source=text.splitlines(keepends=True))

    kernel = dict(display_name="python3", language="python", name="python3")
    made = dict(cells=[cell(i, text) for i, text in enumerate(texts)], metadata=dict(kernelspec=kernel))
    write(
        Path(path),
        json.dumps(made | dict(nbformat=4, nbformat_minor=5), indent=1, sort_keys=True, ensure_ascii=False)
        + "\n",
    )
    return Path(path)


def command(main: Callable[[list[str]], int]) -> None:
    """Run a tool from the terminal: faults in a line each, never a traceback."""
    try:
        sys.exit(main(sys.argv[1:]))
    except Fault as e:
        sys.exit(f"{e}")
