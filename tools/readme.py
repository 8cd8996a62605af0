"""`make readme`: README.md from nbs/index.ipynb."""

from __future__ import annotations

import re
from pathlib import Path

from .notebooks import ROOT, cells, command, directives, write
from .pages import NOT_SHOWN


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


def write_readme(root: str | Path = ROOT) -> int:
    """Write README.md anew."""
    write(Path(root) / "README.md", readme(root))
    return 0


if __name__ == "__main__":
    command(lambda words: write_readme())
