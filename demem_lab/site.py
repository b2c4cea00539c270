"""Executed notebooks as one page that needs no network and no Python: prose, figures to hover over, code folded away.

>>> write("runs/tour/index.html", results, title="demem_lab", intro="What this is.")      # doctest: +SKIP
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path

import nbformat
import pandas as pd

from demem_lab.runner import Result

PANEL = "This panel is live in JupyterLab (<code>make lab</code>); the static figure beside it shows the same results."
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_LOADS = re.compile(r"<(script|link|iframe|object|embed)\b[^>]*(?:/>|>(?:.*?</\1>)?)", re.S | re.I)
_REMOTE = re.compile(r"""\s(src|srcset|poster|background)\s*=\s*(["']?)\s*(?:https?:)?//[^"'>\s]*\2""", re.I)
_STYLE = """
body { max-width: 920px; margin: 2rem auto; padding: 0 1rem; font: 17px/1.55 system-ui, sans-serif; color: #1b1b1b; }
h1, h2, h3 { line-height: 1.25; } section { border-top: 3px solid #0b4f79; margin-top: 3rem; padding-top: .5rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .25rem .6rem; border-bottom: 1px solid #ccc; }
td, th { text-align: right; } td:first-child, th:first-child { text-align: left; } .over { font-weight: bold; }
details { margin: .4rem 0; } summary { color: #555; cursor: pointer; font-size: .85rem; }
pre { background: #f6f6f4; padding: .6rem; overflow-x: auto; font-size: .82rem; line-height: 1.4; }
.error { background: #fff0ee; border-left: 5px solid #a31515; color: #7a0c0c; } .note { color: #555; font-style: italic; }
a { color: #0b4f79; } img { max-width: 100%; } nav li { margin: .2rem 0; } .wide { overflow-x: auto; }
blockquote { border-left: 4px solid #0b4f79; margin-left: 0; padding-left: 1rem; }
@media print {
  body { max-width: none; margin: 0; font-size: 11pt; } .wide, pre { overflow: visible; } .modebar { display: none; }
  table { font-size: 8.5pt; } h2, h3 { break-after: avoid; } tr, [role=img] { break-inside: avoid; }
  section { break-before: page; }
  section:first-of-type { break-before: auto; }
}
"""


def write(path: str | Path, results: Sequence[Result], *, title: str, intro: str) -> Path:
    """One HTML file with every executed notebook; plotly's JavaScript is inside, once. Returns the path."""
    sections, rows = [], []
    for result in results:
        anchor = Path(result.notebook).stem
        notebook = nbformat.read(result.executed, as_version=4)
        question = _question(notebook) or anchor
        sections.append(f'<section id="{_e(anchor)}">{_notebook(notebook, anchor)}</section>')
        rows.append(_row(result, anchor, question))
    head = ("notebook", "seconds (budget)", f"peak memory, MB ({results[0].memory_kind if results else 'PSS'})",
            "size, MB", "computed", "reused", "state")
    table = f"<tr>{''.join(f'<th>{_e(h)}</th>' for h in head)}</tr>{''.join(rows)}"
    body = f'<p>{_e(intro)}</p><nav aria-label="notebooks"><div class="wide"><table>{table}</table></div></nav>'
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(title, body + "".join(sections)), encoding="utf-8")
    return path


def page(title: str, body: str) -> str:
    """A whole HTML page around `body`; plotly's JavaScript is inside, once, and nothing is fetched."""
    from plotly.offline import get_plotlyjs
    from pygments.formatters import HtmlFormatter

    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{_e(title)}</title><style>{_STYLE}{HtmlFormatter(style="friendly").get_style_defs(".code")}</style>
<script>{get_plotlyjs()}</script></head><body>
<h1>{_e(title)}</h1>{body}
</body></html>"""


def paragraph(text: str) -> str:
    """Text as an HTML paragraph."""
    return f"<p>{_e(text)}</p>"


def table(frame: pd.DataFrame) -> str:
    """A table as HTML; numbers with three digits, missing ones as a dash."""
    body = frame.to_html(border=0, float_format="{:.3f}".format, na_rep="-", index=not isinstance(frame.index, pd.RangeIndex))
    return f'<div class="wide">{body}</div>'


def figure(made, anchor: str) -> str:
    """A plotly figure as HTML that `page` can show."""
    return _figure(json.loads(made.to_json()), anchor)


def escaped(text: object) -> str:
    """Text that cannot be mistaken for HTML."""
    return _e(str(text))


def _row(result: Result, anchor: str, question: str) -> str:
    state = "failed: " + result.error if result.error else ("over: " + ", ".join(result.over) if result.over else "ok")
    slow = ' class="over"' if result.seconds > result.budget_seconds else ""
    cells = [
        f'<a href="#{_e(anchor)}">{_e(question)}</a>', f"{result.seconds:.0f} ({result.budget_seconds})",
        f"{result.peak_mb:.0f}", f"{result.size_mb:.2f}", str(result.computed), str(result.reused), _e(state),
    ]
    return f"<tr>{''.join(f'<td{slow if i == 1 else str()}>{c}</td>' for i, c in enumerate(cells))}</tr>"


def _question(notebook) -> str:
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("# "):
            return cell.source.splitlines()[0][2:].strip()
    return ""


def _notebook(notebook, anchor: str) -> str:
    parts = []
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            parts.append(_markdown(cell.source))
        elif cell.cell_type == "code":
            parts.append(_code(cell, f"{anchor}-{number}"))
    return "\n".join(parts)


def _markdown(source: str) -> str:
    from nbconvert.filters import markdown2html

    # the page has its own h1, so every heading of a notebook goes one level down
    source = re.sub(r"^(#{1,5}) ", r"#\1 ", source, flags=re.M)
    body = markdown2html(source)
    return _local(re.sub(r'<a class="anchor-link"[^>]*>.*?</a>', "", body))


def _code(cell, anchor: str) -> str:
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    failed = any(o.output_type == "error" for o in cell.outputs)
    listing = highlight(cell.source, PythonLexer(), HtmlFormatter(cssclass="code"))
    first = next((line for line in cell.source.splitlines() if line.strip()), "")[:80]
    code = f"<details{' open' if failed else ''}><summary>code: {_e(first)}</summary>{listing}</details>"
    if not cell.source.strip():
        code = ""
    return code + "".join(_output(o, f"{anchor}-{i}") for i, o in enumerate(cell.outputs))


def _output(output, anchor: str) -> str:
    if output.output_type == "stream":
        text = f"<pre>{_e(_ANSI.sub('', output.text))}</pre>"
        return f"<details><summary>messages</summary>{text}</details>" if output.name == "stderr" else text
    if output.output_type == "error":
        trace = _ANSI.sub("", "\n".join(output.traceback))
        return f'<pre class="error" role="alert"><b>{_e(output.ename)}: {_e(output.evalue)}</b>\n{_e(trace)}</pre>'
    data = output.data
    if "application/vnd.plotly.v1+json" in data:
        return _figure(data["application/vnd.plotly.v1+json"], anchor)
    if "application/vnd.jupyter.widget-view+json" in data:
        return f'<p class="note">{PANEL}</p>'
    if "text/html" in data:
        return f'<div class="wide">{_local(data["text/html"])}</div>'
    if "text/markdown" in data:
        return _markdown(data["text/markdown"])
    if "image/png" in data:
        return f'<img alt="figure" src="data:image/png;base64,{data["image/png"].strip()}">'
    return f"<pre>{_e(data.get('text/plain', ''))}</pre>"


def _figure(figure: dict, anchor: str) -> str:
    layout = figure.get("layout", {})
    text = layout.get("title", {}).get("text", "figure") if isinstance(layout.get("title"), dict) else "figure"
    # "</" would end the script element early, wherever it stood in the data
    spec = json.dumps({"data": figure.get("data", []), "layout": layout}).replace("</", "<\\/")
    return (
        f'<div id="figure-{_e(anchor)}" role="img" aria-label="{_e(re.sub("<[^>]*>", " ", text))}"></div>'
        f'<script>(function () {{ var f = {spec}; Plotly.newPlot("figure-{_e(anchor)}", f.data, f.layout, '
        f"{{responsive: true, displaylogo: false}}); }})();</script>"
    )


def _local(body: str) -> str:
    """HTML without anything that would be fetched."""
    return _REMOTE.sub("", _LOADS.sub("", body))


def _e(text: str) -> str:
    return html.escape(str(text))
