"""`python -m tools.lessons`: what the lessons measure against their budget (at most 60 cells and 250 lines
of code, at least .8 markdown cells a code cell, at most 40 % of the code exported, no private cell, lesson
cells at most 100 wide)."""

from __future__ import annotations

from pathlib import Path

from .notebooks import ROOT, Notebook, cells, command, directives, notebooks

WIDEST = 100


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


def over(row: dict) -> list[str]:
    """In what a lesson is over its budget, in words."""
    limits = (
        ("cells", row["cells"] > 60),
        ("lines", row["lines"] > 250),
        ("texts", row["texts"] < 0.8),
        ("exported", row["exported"] > 0.4),
        ("private", row["private"] > 0),
        ("widest", row["widest"] > WIDEST),
    )
    return [name for name, broken in limits if broken]


def report(root: str | Path = ROOT) -> list[dict]:
    """One row a lesson; before the folder nbs/lessons/ is there, every notebook with a number."""
    found = notebooks(root)
    return [budget(n) for n in found if n.lesson] or [budget(n) for n in found if n.stem[:2].isdigit()]


def main(words: list[str]) -> int:
    """Print the report; with --strict, 1 if a lesson (or one of those named) is over its budget."""
    rows, names = report(), [word for word in words if not word.startswith("-")]
    rows = [row for row in rows if not names or any(name in row["lesson"] for name in names)]
    print(f"{'lesson':<32} cells  lines  text/code  exported  private  widest  over its budget in")
    for row in rows:
        numbers = "{cells:>5} {lines:>6} {texts:>10.2f} {exported:>9.0%} {private:>8} {widest:>7}".format(
            **row
        )
        print(f"{row['lesson']:<32} {numbers}  {', '.join(over(row))}")
    return int("--strict" in words and any(map(over, rows)))


if __name__ == "__main__":
    command(main)
