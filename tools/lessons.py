"""`python -m tools.lessons`: what the lessons measure against their budget, and what each still lacks of the
shape of a lesson. The numbers are those of the best courses of this kind, with some room."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from .notebooks import Notebook, cells, command, directives, notebooks

WIDEST = 100
OPENING = ("Before you start", "You will build", "You will be able to", "minutes to read")
SECTIONS = ("Summary", "Questions", "Exercises", "Further reading")
# words of our own, and the field's words for them
WORDS = {
    r"(?<!chest )films?": "image",
    "learns? by heart": "overfit, memorise",
    "borrowed eyes": "pretrained weights",
    "step size": "learning rate",
    "the dice": "random seed, sampling variability",
    "chapters?": "lesson",
}


def budget(notebook: Notebook) -> dict:
    """Cells, lines of code, markdown a code cell, share exported, private cells, widest lesson line."""
    code, texts, exported, lines, private, widest = 0, 0, 0, 0, 0, 0
    for cell in cells(notebook.path):
        if cell["cell_type"] != "code":
            texts += 1
            continue
        told = directives(cell["source"])
        here = [line for line in cell["source"].splitlines() if line.strip() and not line.startswith("#|")]
        code, lines, private = code + 1, lines + len(here), private + ("exporti" in told)
        if {"export", "exporti"} & told.keys():
            exported += len(here)
        else:
            widest = max([widest, *map(len, here)])
    return dict(
        lesson=notebook.name,
        cells=code + texts,
        lines=lines,
        texts=texts / max(code, 1),
        exported=exported / max(lines, 1),
        private=private,
        widest=widest,
    )


LIMITS = (
    ("cells", lambda row: row["cells"] > 60, "{cells} cells (at most 60)"),
    ("lines", lambda row: row["lines"] > 250, "{lines} lines of code (at most 250)"),
    ("texts", lambda row: row["texts"] < 0.8, "{texts:.2f} markdown cells a code cell (at least .8)"),
    ("exported", lambda row: row["exported"] > 0.4, "{exported:.0%} of its code is exported (at most 40 %)"),
    ("private", lambda row: row["private"] > 0, "{private} private cells (#| exporti)"),
    ("widest", lambda row: row["widest"] > WIDEST, f"a line {{widest}} wide (at most {WIDEST})"),
)


def over(row: dict) -> list[str]:
    """In what a lesson is over its budget, in words."""
    return [name for name, broken, _ in LIMITS if broken(row)]


def teaching(notebook: Notebook, root: Path) -> Iterator[str]:
    """A lesson keeps its budget and has the shape and the words of a lesson; figures of every notebook say
    what they show."""
    yield from _faults(notebook) if notebook.lesson else _figures(notebook)


def _faults(notebook: Notebook) -> Iterator[str]:
    at, row, found = f"nbs/{notebook.name}.ipynb", budget(notebook), cells(notebook.path)
    for _, broken, said in LIMITS:
        if broken(row):
            yield f"{at}: {said.format(**row)}; move what does not fit into a library notebook"
    texts = [(i, cell["source"]) for i, cell in enumerate(found, 1) if cell["cell_type"] == "markdown"]
    code = [(i, cell) for i, cell in enumerate(found, 1) if cell["cell_type"] == "code"]
    yield from (f"{at}{fault}" for fault in _shape([text for _, text in texts]))
    for i, text in texts:
        yield from (f"{at}, cell {i}: {fault}" for fault in _words(text))
    for i, cell in code:
        yield from (f"{at}, cell {i}: {fault}" for fault in _code(cell))
    yield from _figures(notebook)


def _shape(texts: list[str]) -> Iterator[str]:
    opening = texts[1] if len(texts) > 1 else ""
    for wanted in OPENING:
        if wanted not in opening:
            yield f": its second text cell does not say *{wanted}*"
    everything = "\n".join(texts)
    for section in SECTIONS:
        if not re.search(rf"^## {section}", everything, re.M):
            yield f": it has no section ## {section}"
    if "<details>" not in everything.partition("\n## Questions")[2]:
        yield ": its questions have no folded answers (<details><summary>Answer</summary> ... </details>)"
    if "glossary.ipynb#" not in everything:
        yield ": none of its words is linked to the glossary where it is explained first"


def _words(text: str) -> Iterator[str]:
    plain = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", text)
    unlinked = re.sub(r"\[[^\]]*\]\([^)]*\)", " ", text)
    if named := re.search(r"\b[Ss]ystem [A-E]\b", unlinked):
        to = f"../five_systems.ipynb#system-{named[0][-1].lower()}"
        yield f"{named[0]} without a link; write [{named[0]}]({to})"
    if named := re.search(r"\b[Ll]essons? \d+", unlinked):
        yield f"{named[0]} is named by its number alone; link its title"
    for own, field in WORDS.items():
        if named := re.search(rf"\b{own}\b", plain):
            yield f"*{named[0]}* is a word of our own; the field says: {field}"


def _code(cell: dict) -> Iterator[str]:
    told = directives(cell["source"])
    if "hide" in told:
        yield "a hidden cell; show it, or fold it with #| code-fold: true"
    if re.search(r"\b(by_)?run_size\(", cell["source"]) and told.get("code-fold") != "true":
        yield "the run size is asked in the open; put it into the folded cell of sizes"


def _figures(notebook: Notebook) -> Iterator[str]:
    for i, cell in enumerate(cells(notebook.path), 1):
        told = directives(cell["source"])
        kinds = {kind for output in cell.get("outputs", []) for kind in output.get("data", {})}
        if "hide" in told or not any(kind.startswith("image/") for kind in kinds):
            continue
        for name in ("fig-cap", "fig-alt"):
            if len(told.get(name, "")) < 12:
                yield f"nbs/{notebook.name}.ipynb, cell {i}: a figure without #| {name}; say what it shows"


def main(words: list[str]) -> int:
    """Print the report and, of lessons that are named, what they lack; with --strict, 1 if anything."""
    names = [word for word in words if not word.startswith("-")]
    wanted = [n for n in notebooks() if n.lesson and (not names or any(name in n.name for name in names))]
    print(f"{'lesson':<32} cells  lines  text/code  exported  private  widest  faults")
    found = 0
    for notebook in wanted:
        faults, row = list(_faults(notebook)), budget(notebook)
        numbers = "{cells:>5} {lines:>6} {texts:>10.2f} {exported:>9.0%} {private:>8} {widest:>7}"
        line = f"{notebook.name:<32} {numbers.format(**row)} {len(faults):>7}"
        print(line, *(faults if names else ()), sep="\n    ")
        found += len(faults)
    return int("--strict" in words and found > 0)


if __name__ == "__main__":
    command(main)
