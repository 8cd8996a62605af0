"""The one page of all reports: it stands alone, and what a file said cannot break it."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from cxr_course.core import CourseError
from cxr_course.page import embed, page, table_html
from cxr_course.show import show_images


@pytest.fixture
def figure():
    figure, ax = plt.subplots(figsize=(2, 1))
    ax.plot([0, 1])
    plt.close(figure)
    return figure


def test_words_are_escaped_and_html_is_not():
    made = page("a < b", [("x & y", "<p>1</p>"), ("", "<p>2</p>")], footer="<i>")
    assert (
        "<title>a &lt; b</title>" in made
        and "x &amp; y</h2>" in made
        and "<p>1</p>" in made
        and "&lt;i&gt;" in made
    )
    assert made.count("<h2") == 1 and made.rstrip().endswith("</html>")


def test_figures_lie_inside(figure):
    plot, sheet = embed(figure, 'a "plot"'), embed(show_images([np.zeros((8, 8))]), "an image")
    assert (
        "data:image/png" in plot
        and "a &#34;plot&#34;" in plot.replace("&quot;", "&#34;")
        and "data:image/jpeg" in sheet
    )
    assert embed(b"\x89PNG", "bytes").startswith("<figure>")
    with pytest.raises(CourseError, match="alternative text"):
        embed(figure, " ")


def test_a_table_escapes_what_a_file_said():
    assert "&lt;script&gt;" in table_html(
        pd.DataFrame(dict(name=["<script>"], auc=[0.91234]))
    ) and "0.912" in table_html([dict(auc=0.91234)])


@pytest.mark.parametrize(
    "body",
    [
        '<img alt="" src="https://example.org/a.png">',
        "<script src='//cdn.example.org/x.js'></script>",
        '<link rel="stylesheet" href="http://example.org/a.css">',
    ],
)
def test_nothing_is_fetched(body):
    with pytest.raises(CourseError, match="another machine"):
        page("t", [("", body)])
    page("t", [("", '<p><a href="https://example.org">a link that a reader may follow</a></p>')])
