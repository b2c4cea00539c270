"""Pages of prose, tables and figures that need no network and no Python: everything is inside the one file.

>>> Path("page.html").write_text(page("Title", paragraph("Text.") + figure(plots.roc(...), "roc")))  # doctest: +SKIP

Readable on a phone, projected, printed, in light and in dark. Figures are drawn when they come near, all of them before
printing, so that a page with forty of them opens at once.
"""

from __future__ import annotations

import html
import json
import math
import re

import pandas as pd

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --soft: #555; --line: #c9c9c9; --box: #f5f5f3;
  --accent: #0b4f79; --bad: #8c1010; --bad-box: #fff0ee; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e6e3; --paper: #16191c; --soft: #b0b0b0; --line: #454a4f;
  --box: #22272b; --accent: #7cc0ee; --bad: #ffb4a8; --bad-box: #3a1a17; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 3.4rem; -webkit-text-size-adjust: 100%; }
body { max-width: 920px; margin: 0 auto; padding: 0 1rem 4rem; font: 17px/1.55 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); overflow-wrap: break-word; }
h1, h2, h3, h4 { line-height: 1.25; } h1 { margin-top: 2rem; }
section { border-top: 3px solid var(--accent); margin-top: 3rem; padding-top: .5rem; }
a { color: var(--accent); } img { max-width: 100%; height: auto; }
nav.bar { position: sticky; top: 0; z-index: 5; background: var(--paper); border-bottom: 1px solid var(--line);
  display: flex; gap: .2rem; overflow-x: auto; white-space: nowrap; margin: 0 -1rem; padding: .3rem 1rem; }
nav.bar a, nav.bar button { padding: .3rem .6rem; text-decoration: none; border-radius: 4px; border: 0; background: none;
  color: var(--accent); font: inherit; cursor: pointer; }
nav.bar a:hover, nav.bar button:hover { background: var(--box); } nav.bar button { margin-left: auto; }
a:focus-visible, button:focus-visible, summary:focus-visible { outline: 3px solid var(--accent); outline-offset: 1px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; border: 0; margin: 1rem 0; }
th, td { padding: .25rem .6rem; border: 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
td:first-child, th:first-child { text-align: left; } .over { font-weight: bold; }
details { margin: .4rem 0; } summary { color: var(--soft); cursor: pointer; font-size: .85rem; }
pre { background: var(--box); padding: .6rem; overflow-x: auto; font-size: .82rem; line-height: 1.4; margin: .5rem 0;
  white-space: pre-wrap; } .code pre { white-space: pre; }
.error { background: var(--bad-box); border-left: 5px solid var(--bad); color: var(--bad); }
.note { color: var(--soft); font-style: italic; } .lead { font-size: 1.15rem; }
blockquote { border-left: 4px solid var(--accent); margin-left: 0; padding-left: 1rem; }
figure { margin: 1.2rem 0; } figcaption { font-weight: 600; margin-bottom: .3rem; }
.plot { background: #fff; border-radius: 6px; } .panels { display: grid; gap: 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); }
.panels figure { margin: 0; } .panels img { border: 1px solid var(--line); border-radius: 6px; background: #fff; }
.panels figcaption { font-weight: normal; font-size: .9rem; }
.answer li { margin: .5rem 0; } .answer ul { margin: .2rem 0; font-size: .92rem; } .turn { display: flex; gap: 1rem;
  justify-content: space-between; flex-wrap: wrap; }
@media (max-width: 600px) { body { font-size: 16px; } th, td { padding: .2rem .35rem; font-size: .88rem; } }
@media print {
  :root { --ink: #000; --paper: #fff; --soft: #444; --line: #999; --box: #f5f5f3; --accent: #0b4f79; color-scheme: light; }
  body { max-width: none; margin: 0; padding: 0; font-size: 11pt; } .wide, pre { overflow: visible; }
  .code pre { white-space: pre-wrap; } .modebar, nav.bar, .turn { display: none !important; }
  table { font-size: 8.5pt; } h2, h3 { break-after: avoid; } tr, figure { break-inside: avoid; }
  section { break-before: page; } section:first-of-type { break-before: auto; }
}
"""
_SCRIPT = """
(function () {
  function draw(box) {
    if (box.dataset.drawn) { return; }
    box.dataset.drawn = "yes";
    var spec = JSON.parse(document.getElementById(box.id + "-data").textContent), layout = spec.layout;
    if (box.clientWidth < 560) {  // a phone: the legend goes below, so that the plot keeps the width
      layout.legend = Object.assign({}, layout.legend, {orientation: "h", x: 0, xanchor: "left", y: -0.25, yanchor: "top"});
      layout.margin = Object.assign({}, layout.margin, {l: 55, r: 10});
    }
    Plotly.newPlot(box, spec.data, layout, {responsive: true, displaylogo: false});
  }
  var boxes = document.querySelectorAll(".plot"), all = function () { boxes.forEach(draw); };
  if ("IntersectionObserver" in window) {
    var near = new IntersectionObserver(function (seen) {
      seen.forEach(function (one) { if (one.isIntersecting) { near.unobserve(one.target); draw(one.target); } });
    }, {rootMargin: "800px"});
    boxes.forEach(function (box) { near.observe(box); });
  } else { all(); }
  window.addEventListener("beforeprint", all);
  var button = document.getElementById("all-code");
  if (button) {
    button.addEventListener("click", function () {
      var open = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", open);
      document.querySelectorAll("details.code-cell").forEach(function (one) { one.open = open; });
    });
  }
})();
"""


def page(title: str, body: str) -> str:
    """A whole HTML page around `body`; plotly's JavaScript is inside, once, and nothing is fetched."""
    from plotly.offline import get_plotlyjs
    from pygments.formatters import HtmlFormatter

    light, dark = (HtmlFormatter(style=style).get_style_defs(".code") for style in ("friendly", "github-dark"))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(title)}</title>
<style>{light} @media screen and (prefers-color-scheme: dark) {{ {dark} }} .code, .code pre {{ background: var(--box); }}
{_STYLE}</style>
<script>{get_plotlyjs()}</script></head><body>
<h1>{escaped(title)}</h1>{body}
<script>{_SCRIPT}</script>
</body></html>"""


def paragraph(text: str, kind: str = "") -> str:
    """Text as an HTML paragraph, of a class if `kind` names one."""
    return f"<p{f' class={kind}' if kind else ''}>{escaped(text)}</p>"


def table(frame: pd.DataFrame) -> str:
    """A table as HTML; numbers with three digits, missing ones as a dash."""
    body = frame.to_html(border=0, float_format="{:.3f}".format, na_rep="-", index=not isinstance(frame.index, pd.RangeIndex))
    return f'<div class="wide">{body}</div>'


def figure(made, anchor: str) -> str:
    """A plotly figure as HTML that `page` can show."""
    return figure_from(json.loads(made.to_json()), anchor)


def figure_from(content: dict, anchor: str) -> str:
    """A plotly figure, given as the dictionary that notebooks keep, as HTML; its title wraps like any text."""
    layout = dict(content.get("layout", {}))
    title = layout.pop("title", None)
    title = title.get("text", "") if isinstance(title, dict) else title or ""
    if title:  # its place inside the plot is free now
        layout["margin"] = {**layout.get("margin", {}), "t": 36}
    words = escaped(html.unescape(re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", title)).strip()))
    # "</script>" would end the script element early, and "<!--<script>" keep it from ending, wherever they stood in the data
    spec = json.dumps(_finite({"data": content.get("data", []), "layout": layout})).replace("<", "\\u003c")
    name = f"figure-{escaped(anchor)}"
    caption = f"<figcaption>{words}</figcaption>" if words else ""
    return (
        f'<figure>{caption}<div id="{name}" class="plot" role="img" aria-label="{words or "figure"}" '
        f'style="min-height: {int(layout.get("height") or 450)}px"></div>'
        f'<script type="application/json" id="{name}-data">{spec}</script></figure>'
    )


def escaped(text: object) -> str:
    """Text that cannot be mistaken for HTML."""
    return html.escape(str(text))


def _finite(value):
    """NaN and infinity as null: JSON has neither, and plotly leaves a gap."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
