"""The report: everything inside, nothing fetched."""

import json
import re
from html.parser import HTMLParser

import nbformat
import plotly.graph_objects as go
import pytest

from demem_lab import runner, site

EVIL = """# Title

<script src="https://evil.example/x.js"></script>
![picture](https://evil.example/p.png) <img src='//evil.example/q.png'> <iframe src=https://evil.example></iframe>
A [link](https://arxiv.org/abs/2412.05767) may stay. `code <b>` and $x$."""


def notebook(path, *cells, failed=False):
    made = nbformat.v4.new_notebook(cells=list(cells))
    nbformat.write(made, path)
    error = "cell [2]: ValueError: planted" if failed else ""
    return runner.Result(path.name, path, 12.0, 345.0, "PSS", 0.1, 3, 4, error)


def code(source, *outputs):
    return nbformat.v4.new_code_cell(source, outputs=list(outputs))


def show(data):
    return nbformat.v4.new_output("display_data", data=data)


@pytest.fixture
def page(tmp_path):
    figure = go.Figure(go.Scatter(x=[1, 2], y=[3.25, 4], name="</script><b>trap")).update_layout(title={"text": "A figure"})
    first = notebook(
        tmp_path / "00_first.ipynb", nbformat.v4.new_markdown_cell(EVIL),
        code("draw()", show({"application/vnd.plotly.v1+json": json.loads(figure.to_json()), "text/plain": "Figure"})),
        code("print(1 < 2)", nbformat.v4.new_output("stream", name="stdout", text="\x1b[31mred < text\x1b[0m")),
        code("table", show({"text/html": "<table><tr><td>7</td></tr></table><script src='https://evil.example/t'></script>"})),
        code("panel", show({"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "VBox()"})),
    )
    error = nbformat.v4.new_output("error", ename="ValueError", evalue="planted", traceback=["\x1b[31mline 1\x1b[0m"])
    heading = nbformat.v4.new_markdown_cell("# Second?")
    second = notebook(tmp_path / "01_second.ipynb", heading, code("boom()", error), failed=True)
    return site.write(tmp_path / "deep" / "index.html", [first, second], title="The <title>", intro="Intro & all").read_text()


class Loads(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.text = [], []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "srcset", "poster", "data", "background") or (tag == "link" and name == "href"):
                if value and not value.startswith("data:"):
                    self.found.append((tag, name, value))


def test_nothing_is_fetched(page):
    parser = Loads()
    parser.feed(page)
    assert parser.found == [] and "evil.example" not in re.sub(r"alt=\"[^\"]*\"", "", page)
    assert "https://arxiv.org/abs/2412.05767" in page
    assert "@import" not in page.split("</style>")[0]


def test_figures_are_inside_once_with_their_data(page):
    assert page.count("Plotly.newPlot(\"figure-") == 1 and "3.25" in page and page.count("<div id=\"figure-") == 1
    assert 'aria-label="A figure"' in page
    assert "</script><b>trap" not in page and "<\\/script><b>trap" in page
    assert 3_000_000 < len(page) < 8_000_000  # plotly's JavaScript, once


def test_text_tables_panels_and_headings(page):
    assert "red &lt; text" in page and "<td>7</td>" in page and "live in JupyterLab" in page
    assert "<title>The &lt;title&gt;</title>" in page and "Intro &amp; all" in page
    assert "Second?" in page and "12 (120)" in page and "345" in page


def test_a_failed_cell_is_shown_with_its_code_open(page):
    assert "ValueError: planted" in page and "line 1" in page and "<details open>" in page and "failed: cell [2]" in page
