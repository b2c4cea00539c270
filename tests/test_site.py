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


PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001a5f645400000"
    "000049454e44ae426082"
)
CLAIMS = """HOLDS: a leaks more than b (+3.0 points, 95 % interval +1.0 to +5.0, 3 seeds)
NOT DECIDED: c < d, which `say` wrote in two lines
    +0.1 points, 95 % interval -1.0 to +1.0, 3 seeds
"""


@pytest.fixture
def book(tmp_path):
    """A site of two notebooks with claims, a picture of a panel, and a glossary."""
    (tmp_path / "notebooks" / "images").mkdir(parents=True)
    (tmp_path / "notebooks" / "images" / "panel-02.png").write_bytes(PIXEL)
    (tmp_path / "notebooks" / "images" / "binder.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "notebooks" / "secret.txt").write_text("not a picture")
    (tmp_path / "notebooks" / "glossary.md").write_text("# Words\n\n**eps**: the attack radius")
    cells = [
        nbformat.v4.new_markdown_cell(
            "# Who <leaks>?\n\n[![Open](images/binder.svg)](https://x) ![](secret.txt) ![](no.png)\n\n"
            "**Time:** 35 minutes, most of it yours."
        ),
        code("claims()", nbformat.v4.new_output("stream", name="stdout", text=CLAIMS)),
        nbformat.v4.new_markdown_cell("## What was shown"),
        code("end()", nbformat.v4.new_output("stream", name="stdout", text="members found: <40%> of those at risk\n")),
        nbformat.v4.new_markdown_cell("**Shown:** everything."),
    ]
    last = nbformat.v4.new_markdown_cell("# Who?")
    results = [notebook(tmp_path / "02_leak.ipynb", *cells), notebook(tmp_path / "03_risk.ipynb", last)]
    page = site.write(tmp_path / "index.html", results, title="T", intro="I", folder=tmp_path / "notebooks")
    return page.read_text()


def test_the_front_page_answers_in_the_words_of_this_run(book):
    front = book[: book.index("<section")]
    assert "Of the 2 claims" in front and "1 hold, 0 are contradicted, and 1 are not decided" in front
    assert "2 claims: 1 hold, 1 not decided" in front and "c &lt; d" in front
    assert "in two lines +0.1 points, 95 % interval -1.0 to +1.0, 3 seeds</li>" in front
    assert "Members found: &lt;40%&gt; of those at risk." in front and "Who &lt;leaks&gt;?" in front
    assert '<td>35</td><td>12 (120)</td><td>345</td>' in front  # minutes, seconds, memory
    for anchor in re.findall(r'href="#([^"]+)"', book):
        assert f'id="{anchor}"' in book, anchor
    assert 'href="#cell-02_leak-1"' in front


def test_pictures_are_inside_and_nothing_else_is(book):
    book = re.sub(r"<script>.*?</script>", "", book, flags=re.S)  # plotly has pictures of its own
    assert book.count("data:image/png;base64,") == 1 and "data:image/svg+xml;base64," in book
    assert "the live panel of notebook 02" in book and "notebook 03\"" not in book
    assert 'src="secret.txt"' not in book and 'src="no.png"' not in book and "bm90IGEgcGljdHVyZQ" not in book  # in base64


def test_the_glossary_is_the_last_chapter_when_there_is_one(book, page):
    assert book.index('<section id="glossary">') > book.index('<section id="03_risk">') and "the attack radius" in book
    assert "glossary" not in page.replace("</script>", "")[page.index("</style>"):][-20000:]


def test_chapters_are_joined(book):
    assert 'href="#03_risk">next: Who?' in book and 'href="#02_leak">before: Who &lt;leaks&gt;?' in book


def test_a_run_without_claims_has_no_answers(page):
    assert "What came out" not in page and "The live panels" not in page


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
    assert page.count('<script type="application/json" id="figure-') == 1 == page.count('<div id="figure-') and "3.25" in page
    assert 'aria-label="A figure"' in page
    assert "</script><b>trap" not in page and "\\u003c/script>\\u003cb>trap" in page
    assert 3_000_000 < len(page) < 8_000_000  # plotly's JavaScript, once


def test_text_tables_panels_and_headings(page):
    assert "red &lt; text" in page and "<td>7</td>" in page and "live in JupyterLab" in page
    assert "<title>The &lt;title&gt;</title>" in page and "Intro &amp; all" in page
    assert "Second?" in page and "12 (120)" in page and "345" in page


def test_a_failed_cell_is_shown_with_its_code_open(page):
    assert "ValueError: planted" in page and "line 1" in page and "failed: cell [2]" in page
    assert page.count('<details class="code-cell" open>') == 1
