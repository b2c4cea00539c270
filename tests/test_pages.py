"""One file, nothing fetched: the parts that pages are made of."""

import json
import re

import pandas as pd
import plotly.graph_objects as go

from demem_lab import pages


def spec(html):
    return json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', html, re.S)[1])


def test_a_figure_keeps_its_data_and_its_title_becomes_text():
    title = 'A <b>"bold"</b><br>title &amp; more'
    html = pages.figure(go.Figure(go.Scatter(x=[1, 2], y=[3, 4])).update_layout(title={"text": title}, height=300), 'a"b')
    assert '<figcaption>A &quot;bold&quot; title &amp; more</figcaption>' in html and "min-height: 300px" in html
    content = spec(html)
    assert content["data"][0]["type"] == "scatter" and "title" not in content["layout"]
    assert 'id="figure-a&quot;b"' in html


def test_figures_without_a_title_or_with_a_plain_one():
    assert "figcaption" not in pages.figure_from({"data": [], "layout": {}}, "x")
    assert 'aria-label="figure"' in pages.figure_from({"data": []}, "x")
    assert "<figcaption>plain</figcaption>" in pages.figure_from({"data": [], "layout": {"title": "plain"}}, "x")


def test_what_json_cannot_say_is_a_gap():
    html = pages.figure_from({"data": [{"y": [1.0, float("nan"), float("inf"), {"z": float("-inf")}]}]}, "x")
    assert spec(html)["data"][0]["y"] == [1.0, None, None, {"z": None}]


def test_data_cannot_end_the_script():
    html = pages.figure_from({"data": [{"name": "</script><b>trap"}]}, "x")
    assert "</script><b>" not in html and spec(html)["data"][0]["name"] == "</script><b>trap"


def test_a_page_is_whole_and_escapes_its_title():
    html = pages.page("<T>", pages.paragraph("a < b", "lead"))
    assert "<title>&lt;T&gt;</title>" in html and '<p class=lead>a &lt; b</p>' in html and html.rstrip().endswith("</html>")
    assert "prefers-color-scheme: dark" in html and "@media print" in html and "width=device-width" in html
    head = html[: html.index("<script>")]
    assert "@import" not in head and "url(" not in head


def test_tables_show_numbers_and_dashes():
    html = pages.table(pd.DataFrame({"a": [0.12345, None]}))
    assert "0.123" in html and ">-<" in html
