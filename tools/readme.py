"""`make readme`: the table of lessons in nbs/index.ipynb from their own openings, and README.md from that
page."""

from __future__ import annotations

import json
import re
from pathlib import Path

from .notebooks import ROOT, cells, command, directives, write
from .pages import NOT_SHOWN

# a row of the table: number, link, what it is for; title and minutes are the lesson's own words
ROW = re.compile(r"^\| (\d\d) \| \[[^]]*\]\((lessons/[^)]+)\) \| (.*) \| [^|]*\|[^|]*\|$", re.M)
MINUTES = re.compile(r"about ([\d.]+) minutes? to read, (.+?)(?: minutes?)? to run", re.I)


def lesson_rows(text: str, root: str | Path) -> str:
    """The text with each row of the table of lessons as the lesson's opening has it; ? where it says none."""

    def row(found: re.Match) -> str:
        number, link, use = found.groups()
        path = Path(root) / "nbs" / link
        if not path.exists():
            return found[0]
        texts = [cell["source"] for cell in cells(path) if cell["cell_type"] == "markdown"]
        title = texts[0].splitlines()[0].lstrip("# ").partition(":")[0]
        said = MINUTES.search(texts[1] if len(texts) > 1 else "")
        read, run = said.groups() if said else ("?", "?")
        return f"| {number} | [{title}]({link}) | {use} | {read} | {run.replace('half a', '½')} |"

    return ROW.sub(row, text)


def readme(root: str | Path = ROOT) -> str:
    """The text of README.md: markdown as it is, code in fences, results as text; links lead into nbs/."""
    made = ["<!-- written by `make readme` from nbs/index.ipynb: change it there -->"]
    for cell in cells(Path(root) / "nbs" / "index.ipynb"):
        if cell["cell_type"] == "markdown":
            inside = re.sub(r"(\]\(|src=\")(?!https?:|#|/|mailto:|\.\./)", r"\1nbs/", cell["source"])
            made.append(inside.replace("](../", "]("))
        elif cell["cell_type"] == "code" and not NOT_SHOWN & directives(cell["source"]).keys():
            made += _code(cell)
    return "\n\n".join(made) + "\n"


def _code(cell: dict) -> list[str]:
    source = re.sub(r"^#\|.*\n?", "", cell["source"], flags=re.M).strip("\n")
    made = [f"```python\n{source}\n```"] if source else []
    for output in cell["outputs"]:
        text = "".join(output.get("text", "") or output.get("data", {}).get("text/plain", ""))
        if (
            text
            and not {"image/png", "image/jpeg"} & output.get("data", {}).keys()
            and output.get("name") != "stderr"
        ):
            made.append("\n".join("    " + line for line in text.rstrip().splitlines()))
    return made


def stale_index(root: str | Path) -> dict | None:
    """The front page with the table of lessons renewed, or None if it is as the lessons have it."""
    index = json.loads((Path(root) / "nbs" / "index.ipynb").read_text(encoding="utf-8"))
    changed = False
    for cell in index["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and (renewed := lesson_rows(source, root)) != source:
            cell["source"], changed = renewed.splitlines(keepends=True), True
    return index if changed else None


def write_readme(root: str | Path = ROOT) -> int:
    """Renew the table of lessons and write README.md anew."""
    if (index := stale_index(root)) is not None:
        text = json.dumps(index, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        write(Path(root) / "nbs" / "index.ipynb", text)
    write(Path(root) / "README.md", readme(root))
    return 0


if __name__ == "__main__":
    command(lambda words: write_readme())
