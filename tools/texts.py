"""Gates for what stands in notebooks: links lead somewhere, nothing is fetched, results are stored, no cell
names one machine."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from .notebooks import Fault, Notebook, cells, directives
from .pages import FETCH, markdown, slug

HEAVIEST = 1_500_000  # bytes of a notebook with its results
FOLDERS = "|".join(("home", "Users", "root", "tmp", "work", "opt", "mnt", "private/var"))
MACHINE = re.compile(rf"(?<![\w.:/<])/(?:{FOLDERS})/\w+|\b[A-Z]:\\Users")
SHOWING = ("print", "headline", "table", "source", "show_images")  # calls that always show something
LINK = re.compile(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)|(?:href|src)=\"([^\"]+)\"")


def _prose(text: str) -> str:  # markdown without its code, in which brackets mean something else
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)


@lru_cache(maxsize=None)
def _anchors(path: Path, changed: float) -> frozenset[str]:
    found = set()
    for cell in cells(path):
        if cell["cell_type"] == "markdown":
            text = re.sub(r"```.*?```", "", cell["source"], flags=re.S)
            found |= {slug(h.replace("`", "")) for h in re.findall(r"^#{1,6}\s+(.+)$", text, re.M)}
            found |= set(re.findall(r"\{#([\w-]+)\}", text)) | set(re.findall(r"\bid=\"([\w-]+)\"", text))
        elif "export" in directives(cell["source"]):
            found |= set(re.findall(r"^(?:def|class) (\w+)", cell["source"], re.M))
        if "label" in (told := directives(cell["source"])):
            found.add(told["label"])
    return frozenset(found)


def anchors(path: str | Path) -> frozenset[str]:
    """The places in a notebook's page that a link can lead to: headings, exported names, labels."""
    return _anchors(Path(path), Path(path).stat().st_mtime)


def dead_links(path: Path, text: str, root: Path) -> Iterator[str]:
    """The links of a text that lead nowhere."""
    at = path.relative_to(root)
    for pair in LINK.findall(_prose(text)):
        url = pair[0] or pair[1]
        if re.match(r"[a-z]+:", url):
            continue
        name, _, anchor = url.partition("#")
        to = (path.parent / name) if name else path
        if not to.exists():
            yield f"{at}: links to {url}, and there is no such file; correct the name"
        elif anchor and to.suffix == ".ipynb" and anchor not in anchors(to.resolve()):
            has = ", ".join(sorted(anchors(to.resolve())))
            yield f"{at}: links to {url}, and {to.name} has no such heading; it has {has}"


def links(notebook: Notebook, root: Path) -> Iterator[str]:
    """Every link inside the course leads somewhere."""
    for cell in cells(notebook.path):
        if cell["cell_type"] == "markdown":
            yield from dead_links(notebook.path, cell["source"], root)


def offline(notebook: Notebook, root: Path) -> Iterator[str]:
    """Text and stored results need nothing from the network."""
    for i, cell in enumerate(cells(notebook.path), 1):
        at = f"{notebook.path.relative_to(root)}, cell {i}"
        try:
            if cell["cell_type"] == "markdown":
                made = markdown(cell["source"], notebook.path.parent)
            else:
                made = "".join(
                    "".join(o.get("data", {}).get("text/html", "")) for o in cell.get("outputs", ())
                )
        except Fault as e:
            yield f"{at}: {e}"
            continue
        if found := FETCH.search(made):
            yield f"{at}: {found[0]}... is fetched from the network; put it into the course or do without"


def speaks(source: str) -> bool:
    """Whether a code cell ends in something that shows."""
    silent = {"hide", "export", "exporti", "default_exp"} & directives(source).keys()
    if silent or source.rstrip().endswith(";"):
        return False
    body = ast.parse(re.sub(r"^([%!].*)$", "pass", source, flags=re.M)).body
    last = body[-1].value if body and isinstance(body[-1], ast.Expr) else None
    if isinstance(last, ast.Call):
        return ast.unparse(last.func).split(".")[-1] in SHOWING
    return last is not None and not (isinstance(last, ast.Constant) and last.value in (None, Ellipsis))


def run_before_saving(notebook: Notebook, root: Path) -> Iterator[str]:
    """Every cell that shows something has its result stored, and none is an error or a warning."""
    at, remedy = notebook.path.relative_to(root), f"run `make outputs ONLY={notebook.name}`"
    code = [(i, cell) for i, cell in enumerate(cells(notebook.path), 1) if cell["cell_type"] == "code"]
    if silent := [i for i, cell in code if speaks(cell["source"]) and not cell["outputs"]]:
        yield f"{at}, cell {silent[0]}: its result is not stored ({len(silent)} such cells); {remedy}"
    if broken := [i for i, cell in code if any(o["output_type"] == "error" for o in cell["outputs"])]:
        yield f"{at}, cell {broken[0]}: an error is stored as its result; mend it and {remedy}"
    if noisy := [i for i, cell in code if any(o.get("name") == "stderr" for o in cell["outputs"])]:
        yield f"{at}, cell {noisy[0]}: a warning or log is stored as its result; {remedy}"


def layout(notebook: Notebook, root: Path) -> Iterator[str]:
    """First cell of title and subtitle alone, results small, no folder of one machine named."""
    at, found = notebook.path.relative_to(root), cells(notebook.path)
    first = next(cell["source"] for cell in found if cell["cell_type"] == "markdown")
    if not re.fullmatch(r"# [^\n]+\n+> [^\n]+\n*", first):
        yield f"{at}: its first markdown cell must hold the title and a line `> ...`, nothing else"
    if (weight := notebook.path.stat().st_size) > HEAVIEST:
        yield f"{at}: {weight // 1000} KB with its results (at most {HEAVIEST // 1000}); show smaller figures"
    for i, cell in enumerate(found, 1):
        data = [o.get("data", {}) | {"text/stream": o.get("text", "")} for o in cell.get("outputs", ())]
        shown = "\n".join("".join(v) for one in data for kind, v in one.items() if kind.startswith("text/"))
        if named := MACHINE.search(cell["source"] + "\n" + shown):
            yield f"{at}, cell {i}: names {named[0]}, a folder of one machine; use one that every reader has"


TEXTS = (links, offline, run_before_saving, layout)
