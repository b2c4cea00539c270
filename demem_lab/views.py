"""The figures behind the panels, each made from a result and the position that is chosen; nothing is computed here.

A view is drawn once; a panel then moves the marks that `attack_traces` describes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from demem_lab.plots import COLORS, mosaic, picture, styled


def attacked(
    clean: np.ndarray, moved: np.ndarray, before: np.ndarray, after: np.ndarray, classes: Sequence[str], *, eps: float,
    title: str = "",
) -> go.Figure:
    """An image [C, H, W], what the attack made of it, the change (scaled to the radius), and the probabilities [K]."""
    figure = make_subplots(
        cols=4, column_widths=[0.2, 0.2, 0.2, 0.4], subplot_titles=("before", "after", "change", "probability"),
        horizontal_spacing=0.04,
    )
    for column, trace in enumerate(attack_traces(clean, moved, before, after, classes, eps=eps), 1):
        figure.add_trace(trace, row=1, col=min(column, 4))
    for column, anchor in ((1, "x"), (2, "x2"), (3, "x3")):
        figure.update_xaxes(visible=False, row=1, col=column)
        figure.update_yaxes(visible=False, autorange="reversed", scaleanchor=anchor, row=1, col=column)
    figure.update_yaxes(range=[0, 1], row=1, col=4)
    figure.update_layout(barmode="group", legend={"orientation": "h", "y": -0.15, "x": 0.62})
    return styled(figure, title=title, height=330)


def attack_traces(clean, moved, before, after, classes: Sequence[str], *, eps: float) -> list:
    """The traces of `attacked`, for panels that update them in place."""
    change = (np.asarray(moved, dtype=np.float64) - clean) / (2 * max(eps, 1e-12)) + 0.5
    pictures = [picture(mosaic(np.asarray(z)[None], columns=1)) for z in (clean, moved, np.clip(change, 0, 1))]
    bars = [
        go.Bar(x=list(classes), y=values, name=name, marker={"color": COLORS[number]}, hovertemplate="%{x}: %{y:.1%}")
        for number, (name, values) in enumerate((("before", before), ("after", after)))
    ]
    return [*pictures, *bars]
