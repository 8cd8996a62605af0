"""Notebooks as pages that fetch nothing: formulas as MathML, figures inside, one Jinja template."""

from __future__ import annotations

import base64
import mimetypes
import re
from collections.abc import Iterable
from functools import cache
from itertools import groupby
from pathlib import Path

from .notebooks import Fault, Notebook, directives
from .run import Outcome, clock

TEMPLATES = Path(__file__).with_name("templates")
FETCH = re.compile(
    r"""<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)\s*=\s*["']?(https?:)?//|@import\s+url\(["']?https?:"""
)
NOT_SHOWN = {"hide", "default_exp"}


def formula(tex: str, display: str = "inline") -> str:
    """A formula (LaTeX without its dollars) in the form that browsers draw by themselves."""
    from latex2mathml.converter import convert

    tex = re.sub(r"\{(?:aligned|split|align\*?)\}", "{align*}", tex.strip())
    try:
        mathml = convert(tex, display=display)
    except Exception as e:
        raise Fault(f"${tex}$: this formula cannot be set; check its brackets and commands") from e
    if unknown := re.search(r"\\\w*", mathml):
        raise Fault(f"${tex}$: a command that is not known, {unknown[0]}; write it with simpler ones")
    return re.sub(r"<mi>&#x000([0-9A-F]{2});</mi>", r'<mi mathvariant="normal">&#x000\1;</mi>', mathml)


def slug(heading: str) -> str:
    """The anchor of a heading, by the rule that Pandoc and Quarto use."""
    kept = re.sub(r"[^\w\s.-]", "", re.sub(r"<[^>]+>|&\w+;", "", heading).lower())
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", kept.strip())) or "section"


def page_of(url: str) -> str:
    """Where a link between notebooks leads among the pages, which lie in the same folders."""
    to = re.match(r"((?:\.{0,2}/|[\w-]+/)*)([\w-]+)\.ipynb", url)
    if not to or re.match(r"[a-z]+:", url):
        return url
    name = "about" if to[2] == "index" else to[2]
    return f"{to[1].removeprefix('./')}{name}.html{url[to.end() :]}"


def inline(url: str, folder: Path) -> str:
    """An image that markdown names, as a data address."""
    if re.match(r"data:|https?:", url):
        return url
    path = folder / url
    if not path.is_file():
        raise Fault(f"{path}: an image is missing; put it there, or take its link out")
    return f"data:{mimetypes.guess_type(path.name)[0]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def markdown(text: str, folder: str | Path = ".") -> str:
    """Markdown as HTML with formulas drawn, images of `folder` inside, and links that lead to pages."""
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Page(IPythonRenderer):
        def inline_math(self, body):
            return formula(body)

        def block_math(self, body):
            return formula(body, "block")

        def latex_environment(self, name, body):
            return formula(f"\\begin{{{name}}}{body}\\end{{{name}}}", "block")

        def heading(self, text, level, **_):
            return f'<h{level} id="{slug(text)}">{text}</h{level}>\n'

        def table(self, text):
            return f'<div class="wide"><table>{text}</table></div>\n'

        def image(self, text, url, title=None):
            return super().image(text, inline(url, Path(folder)), title)

        def link(self, text, url, title=None):
            return super().link(text, page_of(url), title)

    return MarkdownWithMath(renderer=Page(escape=False)).render(text)


def visible(cell: dict, about: Notebook) -> dict | None:
    """What a reader sees of a cell, in the words of the template; None if nothing."""
    if cell["cell_type"] != "code":
        return dict(cell_type="markdown", html=markdown(cell["source"], about.path.parent))
    told = directives(cell["source"])
    if NOT_SHOWN & told.keys() or told.get("include") == "false":
        return None
    shown = told.get("echo") != "false" and "hide_input" not in told
    source = re.sub(r"^#\|.*\n?", "", cell["source"], flags=re.M).strip("\n") if shown else ""
    loud = told.get("output") != "false" and "hide_output" not in told
    outputs = [o for o in cell["outputs"] if o.get("name") != "stderr"] if loud else []
    exported = {"export", "exporti", "exports"} & told.keys() and about.module
    names = re.findall(r"^(?:def|class) ([a-zA-Z]\w*)", cell["source"], re.M) if exported else []
    fold = told.get("code-summary", "Code").strip('"') if told.get("code-fold") == "true" else ""
    seen = dict(
        cell_type="code",
        source=source,
        outputs=outputs,
        names=names,
        module=exported and about.module,
        fold=fold,
        alt=told.get("fig-alt", "Figure made by the code above").strip('"'),
        caption=told.get("fig-cap", "").strip('"'),
    )
    return seen if source or outputs else None


def _split_headline(text: str) -> tuple[str, str]:
    text, _, figure = text.partition("headline: ")
    return text, figure.strip()


def _split_figure(headline: str) -> tuple[str, str]:
    figure = re.search(r"\S+(?: \([^()]+ to [^()]+\))?$", headline)
    return headline[: figure.start()], figure[0]


@cache
def templates():
    """The Jinja environment of the pages."""
    from jinja2 import Environment, FileSystemLoader
    from nbconvert.filters import Highlight2HTML, ansi2html

    made = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    made.filters |= dict(
        markdown=markdown,
        ansi2html=ansi2html,
        highlight=Highlight2HTML(pygments_lexer="python"),
        split_headline=_split_headline,
        split_figure=_split_figure,
    )
    return made


@cache
def style() -> str:
    """The one sheet of all pages, with the colours of code for light and dark."""
    from pygments.formatters import HtmlFormatter

    light, dark = (
        HtmlFormatter(style=s, nobackground=True).get_style_defs(".highlight")
        for s in ("friendly", "github-dark")
    )
    sheet = (TEMPLATES / "course.css").read_text(encoding="utf-8")
    return f"{sheet}{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}"


def page(notebook, about: Notebook, before: Notebook | None = None, after: Notebook | None = None) -> str:
    """An executed notebook as a page; `before` and `after` are where its last line leads."""
    cells = [seen for cell in notebook.cells if (seen := visible(cell, about))]
    texts = "".join(cell["html"] for cell in cells if cell["cell_type"] == "markdown")
    sections = re.findall(r'<h2 id="([^"]+)">(.+?)</h2>', texts)
    return (
        templates()
        .get_template("notebook.html.j2")
        .render(
            title=about.title,
            style=style(),
            cells=cells,
            sections=sections,
            before=before,
            after=after,
            up="../" * about.page.count("/"),
        )
    )


def contents(found: Iterable[Notebook], outcomes: dict[str, Outcome]) -> str:
    """The opening page: every notebook, and the headline figure of its last run."""
    found = list(found)
    front = next((n for n in found if n.name == "index"), None)
    listed = groupby((n for n in found if n is not front), key=lambda n: n.part)
    return (
        templates()
        .get_template("contents.html.j2")
        .render(
            title=front.title if front else "The course",
            style=style(),
            front=front,
            outcomes=outcomes,
            parts=[(part, list(some)) for part, some in listed],
            sizes=sorted({o.size for o in outcomes.values()}),
            together=clock(sum(o.seconds for o in outcomes.values())),
        )
    )
