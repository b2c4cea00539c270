"""The figures behind the panels, each made from a result and the position that is chosen; nothing is computed here.

A view is drawn once; a panel then moves the marks that `plane_mark` and `protected_picture` describe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from demem_lab.plots import COLORS, GREY, line, mosaic, percent_of, picture, styled, symbol
from demem_lab.sweep import Plane

NOISE_CURVES = (
    ("accuracy", "robust", "robust, high risk", "robust, rest"),
    ("leak", "leak, high risk", "leak, rest"),
)


def noise_view(points: Sequence[Mapping], chosen: int, *, title: str = "") -> go.Figure:
    """Accuracy, robust accuracy and leakage over the noise multiplier; the chosen trained point is marked.

    points: dicts with "noise_multiplier", "fpr" and a value for each column "accuracy", "robust", "leak",
    "leak, high risk", "leak, rest", "robust, high risk", "robust, rest" (None where it could not be measured).
    """
    figure = make_subplots(cols=2, subplot_titles=("what is kept", "what leaks"))
    sigma = [p["noise_multiplier"] for p in points]
    place = list(range(len(points)))  # equal steps: the noise multipliers are roughly geometric, and 0 has no logarithm
    for column, names in enumerate(NOISE_CURVES, 1):
        for number, name in enumerate(names):
            figure.add_scatter(
                x=place, y=[percent_of(p.get(name)) for p in points], mode="lines+markers", name=name, line=line(number),
                legendgroup=name, row=1, col=column, hovertemplate=f"{name}: %{{y:.1f}} %<extra></extra>",
            )
    figure.update_xaxes(tickvals=place, ticktext=[f"{s:g}" for s in sigma], title="noise multiplier")
    figure.update_yaxes(ticksuffix=" %", rangemode="tozero")
    for column in (1, 2):
        figure.add_vline(x=chosen, line={"color": GREY, "dash": "dash"}, row=1, col=column)
    return styled(figure, title=title, height=400)


def plane_view(plane: Plane, chosen: Mapping, images: np.ndarray, *, title: str = "") -> go.Figure:
    """The plane as a map of leakage, all its points as a frontier, and pictures [K, C, H, W] of who is protected.

    `chosen` is the row of `plane.points` to mark. Empty `images` show an empty frame.
    """
    figure = make_subplots(
        rows=2, cols=2, row_heights=[0.74, 0.26], specs=[[{}, {}], [{"colspan": 2}, None]],
        vertical_spacing=0.16, horizontal_spacing=0.14,
        subplot_titles=("leakage: members found, %", "every trained point",
                        "who is protected: lowest risk first … highest last"),
    )
    noises, fractions = plane_axes(plane)
    p = plane.points
    grid = [[_cell(p, s, f, "leak") for f in fractions] for s in noises]
    text = [["" if v is None else f"{v:.1f}" for v in row] for row in grid]
    figure.add_heatmap(
        z=grid, x=[f"{f:.0%}" for f in fractions], y=[f"{s:g}" for s in noises], text=text, texttemplate="%{text}",
        colorscale="Blues", showscale=False, row=1, col=1,
        hovertemplate="protected %{x}, noise multiplier %{y}: %{z:.1f} % found<extra></extra>",
    )
    figure.add_scatter(
        **plane_mark(plane, chosen)["map"], mode="markers", name="map mark", showlegend=False, hoverinfo="skip",
        marker={"symbol": "square-open", "size": 34, "color": COLORS[1], "line": {"width": 4}}, row=1, col=1,
    )
    for number, fraction in enumerate(fractions):
        part = p[p["fraction"] == fraction]
        figure.add_scatter(
            x=100 * part["robust"], y=[percent_of(v) for v in part["leak"]], mode="markers",
            name=f"{fraction:.0%} protected",
            marker={"size": 9, "color": COLORS[number % len(COLORS)], "symbol": symbol(number)},
            text=[f"noise multiplier {s:g}" for s in part["noise_multiplier"]], row=1, col=2,
            hovertemplate="%{text}<br>robust %{x:.1f} %, leak %{y:.1f} %<extra></extra>",
        )
    figure.add_scatter(
        **plane_mark(plane, chosen)["frontier"], mode="markers", name="chosen", row=1, col=2, hoverinfo="skip",
        marker={"symbol": "circle-open", "size": 20, "color": COLORS[1], "line": {"width": 3}},
    )
    figure.add_trace(protected_picture(images), row=2, col=1)
    figure.update_xaxes(title="share of samples protected", type="category", row=1, col=1)
    figure.update_yaxes(title="noise multiplier", type="category", row=1, col=1)
    figure.update_xaxes(title="robust accuracy, % (more is better)", row=1, col=2)
    figure.update_yaxes(title="leakage, %", rangemode="tozero", row=1, col=2)
    figure.update_xaxes(visible=False, row=2, col=1)
    figure.update_yaxes(visible=False, autorange="reversed", scaleanchor="x3", row=2, col=1)
    return styled(figure, title=title, height=640)


def plane_axes(plane: Plane) -> tuple[list[float], list[float]]:
    """The noise multipliers and fractions the plane was trained at, ascending."""
    return sorted(plane.points["noise_multiplier"].unique()), sorted(plane.points["fraction"].unique())


def plane_mark(plane: Plane, chosen: Mapping) -> dict[str, dict]:
    """Where the chosen point lies on the map and on the frontier."""
    return {
        "map": {"x": [f"{chosen['fraction']:.0%}"], "y": [f"{chosen['noise_multiplier']:g}"]},
        "frontier": {"x": [100 * chosen["robust"]], "y": [percent_of(chosen["leak"])]},
    }


def protected_picture(images: np.ndarray, *, columns: int = 24):
    """The trace with the pictures of the protected; a blank one when there are none."""
    blank = not len(images)
    return picture(mosaic(np.ones((1, *np.shape(images)[1:])) if blank else images, columns=columns))


def _cell(points, sigma: float, fraction: float, column: str) -> float | None:
    if fraction == 0:  # nobody protected: noise is not added, so the one trained point stands for the whole column
        found = points[points["fraction"] == 0]
    else:
        found = points[(points["noise_multiplier"] == sigma) & (points["fraction"] == fraction)]
    return percent_of(found[column].iloc[0]) if len(found) else None
