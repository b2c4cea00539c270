"""What a figure would show, as plain values: a live figure follows a sketch ten times faster than a second figure.

plotly checks every property of a figure that is made, which takes a tenth of a second where a slider should answer in two. A
`Sketch` takes the same calls as a figure and only writes down what can move: traces, titles of subplots, names and ticks of axes.

>>> new = grid(True, rows=1, cols=1, subplot_titles=("a",))
>>> _ = new.add_scatter(x=[1], y=[2], row=1, col=1)
>>> new.traces
[{'x': [1], 'y': [2]}]
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots


def grid(sketch: bool, **layout) -> go.Figure | Sketch:
    """`make_subplots(**layout)`, or a sketch of it."""
    return Sketch(**layout) if sketch else make_subplots(**layout)


class Sketch:
    """Takes the calls that the views make on a figure. traces: in order; notes: titles of subplots; axes: by plotly's name."""

    def __init__(self, *, rows: int, cols: int, specs=None, subplot_titles=(), **_) -> None:
        specs = specs or [[{}] * cols] * rows
        cells = [(r, c) for r, row in enumerate(specs, 1) for c, spec in enumerate(row, 1) if spec is not None]
        self.numbers = {cell: "" if k == 1 else str(k) for k, cell in enumerate(cells, 1)}  # as make_subplots counts
        self.traces: list[dict] = []
        self.axes: dict[str, dict] = {}
        self.layout = SimpleNamespace(annotations=[SimpleNamespace(text=text) for text in subplot_titles])

    @property
    def notes(self) -> list[str]:
        """The titles of the subplots."""
        return [note.text for note in self.layout.annotations]

    def add_trace(self, trace, row=None, col=None) -> Sketch:
        """A trace that is one already."""
        values = trace.to_plotly_json()
        del values["type"]
        return self._add(row, col, **values)

    def _add(self, row=None, col=None, **values) -> Sketch:
        self.traces.append(values)
        return self

    add_scatter = add_bar = add_box = _add

    def update_xaxes(self, *, row=None, col=None, **look) -> Sketch:
        """Title and ticks, where an axis is named by its row and column."""
        return self._axis("x", row, col, look)

    def update_yaxes(self, *, row=None, col=None, **look) -> Sketch:
        """The same."""
        return self._axis("y", row, col, look)

    def _axis(self, letter: str, row, col, look: dict) -> Sketch:
        told = {name: look[name] for name in ("title", "tickvals", "ticktext") if name in look}
        if told and col is not None:
            self.axes.setdefault(f"{letter}axis{self.numbers[row, col]}", {}).update(told)
        return self

    def add_vline(self, *_, **__) -> Sketch:
        """Lines and looks do not move."""
        return self

    update_layout = add_vline


def moved(live: go.Figure, new: Sketch) -> None:
    """Give a live figure the data and the words of a sketch, in one message; nothing else is drawn anew.

    What was the same in the sketch before is not even compared with the figure: that alone takes plotly 50 ms.
    """
    before = getattr(live, "_sketch", None)
    with live.batch_update():
        for number, values in enumerate(new.traces):
            old = before.traces[number] if before else {}
            fresh = {name: value for name, value in values.items() if name not in old or not _same(value, old[name])}
            if fresh:
                live.data[number].update(fresh)
        for note, text, old in zip(live.layout.annotations, new.notes, before.notes if before else new.notes, strict=True):
            if not before or text != old:
                note.text = text
        for name, look in new.axes.items():
            if before and _same(look, before.axes[name]):
                continue
            axis = live.layout[name]
            if "title" in look:
                axis.title.text = look["title"]
            if "ticktext" in look:
                axis.update(tickvals=look["tickvals"], ticktext=look["ticktext"])
    live._sketch = new


def _same(a, b) -> bool:
    if a is b:
        return True
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    return np.array_equal(a, b)
