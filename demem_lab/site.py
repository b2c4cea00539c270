"""Executed notebooks as one page that can be read from question to conclusion: what was found first, then how.

>>> write("runs/tour/index.html", results, title="demem_lab", intro="What this is.")      # doctest: +SKIP

The front of the page holds the answers, copied from what the notebooks printed in this run, pictures of the live panels,
and a table with links; behind it comes every notebook with its figures to hover over and its code folded away.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nbformat

from demem_lab.pages import escaped, figure_from, page, paragraph
from demem_lab.runner import Result

PANEL = "This panel is live in JupyterLab (<code>make lab</code>); the static figure beside it shows the same results."
KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".svg": "image/svg+xml"}
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_CLAIM = re.compile(r"^(HOLDS|CONTRADICTED|NOT DECIDED): (.*)$")
_LOADS = re.compile(r"<(script|link|iframe|object|embed)\b[^>]*(?:/>|>(?:.*?</\1>)?)", re.S | re.I)
_REMOTE = re.compile(r"""\s(src|srcset|poster|background)\s*=\s*(["']?)\s*(?:https?:)?//[^"'>\s]*\2""", re.I)
_PICTURE = re.compile(r"""\ssrc\s*=\s*(["'])(?!data:)([^"':]*)\1""", re.I)


def write(path: str | Path, results: Sequence[Result], *, title: str, intro: str, folder: Path | None = None) -> Path:
    """One HTML file with every executed notebook; plotly's JavaScript is inside, once. Returns the path.

    folder: where the notebooks come from; its images/panel-NN.png and its glossary.md are shown, if they are there.
    """
    chapters = [_Chapter(result, nbformat.read(result.executed, as_version=4)) for result in results]
    glossary = folder / "glossary.md" if folder else None
    has_glossary = glossary is not None and glossary.is_file()
    names = [(c.anchor, c.number or c.anchor) for c in chapters] + [("glossary", "Words")] * has_glossary
    bar = "".join(f'<a href="#{escaped(anchor)}">{escaped(name)}</a>' for anchor, name in [("top", "Start"), *names])
    parts = [
        f'<nav class="bar" aria-label="chapters">{bar}<button id="all-code" aria-pressed="false">all code</button></nav>',
        f'<div id="top"></div>{paragraph(intro, "lead")}', _answers(chapters), _panels(chapters, folder), _table(chapters),
    ]
    for place, chapter in enumerate(chapters):
        turn = _turn(chapters[place - 1 : place] + chapters[place + 1 : place + 2], place)
        parts.append(f'<section id="{escaped(chapter.anchor)}">{chapter.html(folder)}{turn}</section>')
    if has_glossary:
        parts.append(f'<section id="glossary">{_markdown(glossary.read_text(encoding="utf-8"), folder)}</section>')
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(title, "".join(parts)), encoding="utf-8")
    return path


@dataclass(frozen=True)
class _Chapter:
    """One executed notebook."""

    result: Result
    notebook: nbformat.NotebookNode

    @property
    def anchor(self) -> str:
        return Path(self.result.notebook).stem

    @property
    def number(self) -> str:
        found = re.match(r"\d\d(?=_)", self.anchor)
        return found[0] if found else ""

    @property
    def question(self) -> str:
        """The notebook's title."""
        heads = [c.source for c in self.notebook.cells if c.cell_type == "markdown" and c.source.startswith("# ")]
        return heads[0].splitlines()[0][2:].strip() if heads else self.anchor

    @property
    def minutes(self) -> str:
        """As the notebook itself says, for somebody who works through it."""
        found = re.search(r"\*\*Time:\*\*\s*(\d+)", "\n".join(c.source for c in self.notebook.cells[:1]))
        return found[1] if found else ""

    def claims(self) -> list[tuple[str, str, str]]:
        """(verdict, sentence, anchor of the cell that printed it) of every claim that was put to the seeds."""
        found = []
        for number, cell in enumerate(self.notebook.cells):
            for line in _printed(cell):
                claim = _CLAIM.match(line)
                if claim:
                    found.append((claim[1], claim[2], f"{self.anchor}-{number}"))
        return found

    def conclusion(self) -> list[str]:
        """What was printed under the last "What was shown"."""
        lines, last = [], False
        for cell in self.notebook.cells:
            if cell.cell_type == "markdown" and cell.source.startswith("#"):
                last = cell.source.startswith("## What was shown")
            lines = lines + _printed(cell) if last else []
        return [line for line in lines if line.strip() and not _CLAIM.match(line)]

    def html(self, folder: Path | None) -> str:
        parts = []
        for number, cell in enumerate(self.notebook.cells):
            if cell.cell_type == "markdown":
                parts.append(_markdown(cell.source, folder))
            elif cell.cell_type == "code":
                parts.append(_code(cell, f"{self.anchor}-{number}", folder))
        return "\n".join(parts)


def _answers(chapters: Sequence[_Chapter]) -> str:
    """The answers in the words of this run: each notebook's last printed lines, and what the seeds say about its claims."""
    items, counts = [], {"HOLDS": 0, "CONTRADICTED": 0, "NOT DECIDED": 0}
    for chapter in chapters:
        claims = chapter.claims()
        for verdict, _, _ in claims:
            counts[verdict] += 1
        said = " ".join(line[0].upper() + line[1:].rstrip(".") + "." for line in chapter.conclusion())
        if not said and not claims:
            continue
        listed = "".join(f'<li><a href="#cell-{escaped(a)}">{v}</a>: {escaped(text)}</li>' for v, text, a in claims)
        if listed:
            listed = f"<details><summary>{_spelled(claims)}</summary><ul>{listed}</ul></details>"
        link = f'<a href="#{escaped(chapter.anchor)}">{escaped(chapter.question)}</a>'
        items.append(f"<li><b>{link}</b> {escaped(said)}{listed}</li>")
    if not items:
        return ""
    summary = ""
    if total := sum(counts.values()):
        summary = paragraph(
            f"Of the {total} claims that were put to the seeds of this run, {counts['HOLDS']} hold, "
            f"{counts['CONTRADICTED']} are contradicted, and {counts['NOT DECIDED']} are not decided: a claim counts only "
            "when the whole 95 % interval is on one side of zero."
        )
    return f'<h2 id="answers">What came out</h2>{summary}<ul class="answer">{"".join(items)}</ul>'


def _spelled(claims: Sequence[tuple[str, str, str]]) -> str:
    words = {"HOLDS": "hold", "CONTRADICTED": "contradicted", "NOT DECIDED": "not decided"}
    counted = {word: sum(verdict == name for verdict, _, _ in claims) for name, word in words.items()}
    parts = ", ".join(f"{count} {word}" for word, count in counted.items() if count)
    return f"{len(claims)} claim{'s' * (len(claims) != 1)}: {parts}"


def _panels(chapters: Sequence[_Chapter], folder: Path | None) -> str:
    """Pictures of the live panels, each a link to its notebook."""
    found = []
    for chapter in chapters:
        picture = folder / "images" / f"panel-{chapter.number}.png" if folder and chapter.number else None
        if picture is not None and picture.is_file():
            question = escaped(chapter.question)
            found.append(
                f'<figure><a href="#{escaped(chapter.anchor)}"><img alt="the live panel of notebook {chapter.number}" '
                f'src="{_embedded(picture)}"></a><figcaption>{chapter.number}: {question}</figcaption></figure>'
            )
    if not found:
        return ""
    text = paragraph("In JupyterLab each of these moves: the sliders choose, the figure and a line of text answer at once.")
    return f'<h2>The live panels</h2>{text}<div class="panels">{"".join(found)}</div>'


def _table(chapters: Sequence[_Chapter]) -> str:
    memory = chapters[0].result.memory_kind if chapters else "PSS"
    head = ("notebook", "minutes to work through", "seconds computed (budget)", f"peak memory, MB ({memory})", "size, MB",
            "computed", "reused", "state")
    rows = []
    for chapter in chapters:
        r = chapter.result
        state = "failed: " + r.error if r.error else ("over: " + ", ".join(r.over) if r.over else "ok")
        slow = ' class="over"' if r.seconds > r.budget_seconds else ""
        name = f"{chapter.number} {chapter.question}".strip()
        cells = [
            f'<a href="#{escaped(chapter.anchor)}">{escaped(name)}</a>', chapter.minutes,
            f"{r.seconds:.0f} ({r.budget_seconds})", f"{r.peak_mb:.0f}", f"{r.size_mb:.2f}", str(r.computed), str(r.reused),
            escaped(state),
        ]
        rows.append(f"<tr>{''.join(f'<td{slow if i == 2 else str()}>{c}</td>' for i, c in enumerate(cells))}</tr>")
    top = "".join(f'<th scope="col">{escaped(h)}</th>' for h in head)
    return (
        '<h2 id="notebooks">The notebooks</h2><nav aria-label="notebooks"><div class="wide">'
        f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></nav>"
    )


def _turn(neighbours: Sequence[_Chapter], place: int) -> str:
    """Links to the chapters before and after."""
    words = ["before", "next"] if place else ["next"]
    links = [
        f'<a href="#{escaped(c.anchor)}">{word}: {escaped(c.question)}</a>'
        for word, c in zip(words, neighbours, strict=False)
    ]
    return f'<p class="turn">{"".join(links)}<a href="#top">to the start</a></p>'


def _printed(cell) -> list[str]:
    """Lines that a code cell wrote to stdout; those that `controls.say` broke are whole again."""
    if cell.cell_type != "code":
        return []
    text = "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")
    return re.sub(r"\n {4}(?=\S)", " ", _ANSI.sub("", text)).splitlines()


def _markdown(source: str, folder: Path | None) -> str:
    from nbconvert.filters import markdown2html

    # the page has its own h1, so every heading of a notebook goes one level down
    source = re.sub(r"^(#{1,5}) ", r"#\1 ", source, flags=re.M)
    body = markdown2html(source)
    return _local(re.sub(r'<a class="anchor-link"[^>]*>.*?</a>', "", body), folder)


def _code(cell, anchor: str, folder: Path | None) -> str:
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    failed = any(o.output_type == "error" for o in cell.outputs)
    listing = highlight(cell.source, PythonLexer(), HtmlFormatter(cssclass="code"))
    first = next((line for line in cell.source.splitlines() if line.strip()), "")[:80]
    opened = " open" if failed else ""
    code = f'<details class="code-cell"{opened}><summary>code: {escaped(first)}</summary>{listing}</details>'
    if not cell.source.strip():
        code = ""
    outputs = "".join(_output(o, f"{anchor}-{i}", folder) for i, o in enumerate(cell.outputs))
    return f'<div id="cell-{escaped(anchor)}">{code}{outputs}</div>'


def _output(output, anchor: str, folder: Path | None) -> str:
    if output.output_type == "stream":
        text = f"<pre>{escaped(_ANSI.sub('', output.text))}</pre>"
        return f"<details><summary>messages</summary>{text}</details>" if output.name == "stderr" else text
    if output.output_type == "error":
        trace = _ANSI.sub("", "\n".join(output.traceback))
        words = f"<b>{escaped(output.ename)}: {escaped(output.evalue)}</b>\n{escaped(trace)}"
        return f'<pre class="error" role="alert">{words}</pre>'
    data = output.data
    if "application/vnd.plotly.v1+json" in data:
        return figure_from(data["application/vnd.plotly.v1+json"], anchor)
    if "application/vnd.jupyter.widget-view+json" in data:
        return f'<p class="note">{PANEL}</p>'
    if "text/html" in data:
        return f'<div class="wide">{_local(data["text/html"], folder)}</div>'
    if "text/markdown" in data:
        return _markdown(data["text/markdown"], folder)
    if "image/png" in data:
        return f'<img alt="figure" src="data:image/png;base64,{data["image/png"].strip()}">'
    return f"<pre>{escaped(data.get('text/plain', ''))}</pre>"


def _local(body: str, folder: Path | None) -> str:
    """HTML without anything that would be fetched; pictures of `folder` are put inside."""

    def inside(match) -> str:
        file = folder / match[2] if folder else None
        known = file is not None and file.suffix in KINDS and file.is_file()
        return f' src="{_embedded(file)}"' if known else ""

    return _PICTURE.sub(inside, _REMOTE.sub("", _LOADS.sub("", body)))


def _embedded(picture: Path) -> str:
    return f"data:{KINDS[picture.suffix]};base64,{base64.b64encode(picture.read_bytes()).decode()}"
