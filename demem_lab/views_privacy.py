"""The figures of the Budget panel and the DeMem panel, made from results and a position; nothing is computed here.

A figure is drawn once. A panel then sets what moved, by the names of the traces: `budget_marks` and `demem_marks` say which
trace gets what.

>>> figure = budget_view(points, plain, groups, budget_marks(points, plain, groups, spot))          # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from demem_lab.accounting import bound
from demem_lab.comparison import Comparison, spell
from demem_lab.plots import COLORS, GREY, bars, line, mosaic, percent_of, picture, styled, symbol
from demem_lab.sweep import Plane

TEXT = 15  # points: read from the last row
PICTURES = 24
LIVE = ("robust accuracy", "training loss")  # traces of the live training


def budget_view(
    points: Sequence[Mapping], groups: Sequence[str], marks: Mapping[str, Mapping], *, title: str = ""
) -> go.Figure:
    """Epsilon over the noise multiplier; accuracy, leak and who pays at trained noise multipliers.

    points: dicts with "noise_multiplier", "accuracy", "robust", "leak", and "robust, g" and "leak, g" for each risk group g
    (None where it could not be measured), ascending. marks: from `budget_marks`, where everything that moves is.
    """
    figure = make_subplots(
        rows=2, cols=2, horizontal_spacing=0.13, vertical_spacing=0.4,
        subplot_titles=("promised: epsilon,<br>for any setting", "kept on unseen images,<br>where trained",
                        "who pays: robust<br>accuracy by group", "leaks: members found<br>(marks as above)"),
    )
    figure.add_scatter(name="RDP (upper bound)", mode="lines", line=line(0), row=1, col=1,
                       hovertemplate="noise multiplier %{x:.2f}: epsilon ≤ %{y:.3g}<extra>RDP</extra>")
    figure.add_scatter(name="PLD (tight)", mode="markers", row=1, col=1,
                       marker={"size": 12, "symbol": "diamond-open", "color": COLORS[2], "line": {"width": 3}},
                       hovertemplate="noise multiplier %{x:.2f}: epsilon %{y:.3g}<extra>PLD</extra>")
    figure.add_scatter(name="your setting", mode="markers+text", textposition="top right", row=1, col=1, hoverinfo="skip",
                       textfont={"size": TEXT + 3, "color": COLORS[1]},
                       marker={"size": 18, "symbol": "circle-open", "color": COLORS[1], "line": {"width": 4}})
    place = list(range(len(points)))  # equal steps: the noise multipliers are roughly geometric, and 0 has no logarithm
    curves = ("accuracy", "robust", *(f"robust, {g}" for g in groups)), ("leak", *(f"leak, {g}" for g in groups))
    for row, names in enumerate(curves, 1):
        for number, name in enumerate(names):
            look = number + (row == 2)  # the same colour for the same people on both sides
            figure.add_scatter(
                x=place, y=[percent_of(p.get(name)) for p in points], mode="lines+markers", name=name, line=line(look),
                marker={"size": 9, "symbol": symbol(look)}, row=row, col=2,
                hovertemplate=f"{name}: %{{y:.1f}} %<extra></extra>", showlegend=row == 1,
            )
        figure.add_scatter(name=f"nearest trained {row}", mode="lines", line={"color": GREY, "dash": "dash", "width": 3},
                           row=row, col=2, showlegend=False, hoverinfo="skip")
    for number, name in enumerate(("without privacy", "with privacy")):
        figure.add_bar(
            name=name, row=2, col=1, texttemplate="%{y:.0f}", textposition="outside",
            marker={"color": (GREY, COLORS[2])[number], "pattern": {"shape": ("", "/")[number]}},
            hovertemplate=f"{name}, %{{x}}: %{{y:.1f}} %<extra></extra>",
        )
    figure.update_xaxes(title="noise multiplier", row=1, col=1)
    ticks = [m * 10.0**k for k in range(-2, 6) for m in (1, 3)]
    figure.update_yaxes(title="epsilon (log scale)", type="log", tickvals=ticks, ticktext=[f"{t:g}" for t in ticks], row=1, col=1)
    for row in (1, 2):
        figure.update_xaxes(tickvals=place, ticktext=[f"{p['noise_multiplier']:g}" for p in points],
                            title="trained noise multiplier", row=row, col=2)
        figure.update_yaxes(ticksuffix=" %", rangemode="tozero", row=row, col=2)
    figure.update_yaxes(range=[0, 112], ticksuffix=" %", row=2, col=1)
    figure.update_layout(barmode="group", legend=_below(0.577))
    return moved(_large(styled(figure, title=title, height=800)), marks)


def budget_marks(
    points: Sequence[Mapping], plain: Mapping, groups: Sequence[str], *, chosen: int,
    curve: tuple[Sequence[float], Sequence[float | None]], spot: tuple[float, float | None],
    tight: Sequence[tuple[float, float]] = (),
) -> dict[str, dict]:
    """{name of a trace: what it shows} at a position of the Budget panel.

    chosen: index of the nearest trained point. plain: the same columns without privacy. curve: noise multipliers and
    epsilons; spot: the position's own; tight: (noise multiplier, epsilon) known by PLD. None where nothing is promised.
    """
    sigma, epsilon = spot
    values = {
        "without privacy": [percent_of(plain.get(f"robust, {g}")) for g in groups],
        "with privacy": [percent_of(points[chosen].get(f"robust, {g}")) for g in groups],
    }
    highest = max(p.get(name) or 0 for p in points for name in ("leak", *(f"leak, {g}" for g in groups)))
    return {
        "RDP (upper bound)": {"x": list(curve[0]), "y": list(curve[1])},
        "PLD (tight)": {"x": [s for s, _ in tight], "y": [e for _, e in tight]},
        "your setting": {"x": [sigma], "y": [epsilon], "text": ["" if epsilon is None else f"  {bound(epsilon)}"]},
        "nearest trained 1": {"x": [chosen, chosen], "y": [0, 100]},
        "nearest trained 2": {"x": [chosen, chosen], "y": [0, 100 * highest]},
        **{name: {"x": list(groups), "y": y} for name, y in values.items()},
    }


def demem_view(
    plane: Plane, report: Comparison | None, marks: Mapping[str, Mapping], *, title: str = ""
) -> go.Figure:
    """The plane as a map of leakage, every trained point and every other arm as a frontier, pictures, and a live curve.

    report: the other arms, measured with as many models as the plane, with intervals over seeds; None shows the plane
    alone. marks: from `demem_marks`.
    """
    figure = make_subplots(
        rows=4, cols=2, row_heights=[0.47, 0.11, 0.21, 0.21], column_widths=[0.46, 0.54], vertical_spacing=0.08,
        horizontal_spacing=0.14,  # the empty row is for the legend
        specs=[[{}, {}], [None, None], [{}, {"rowspan": 2, "secondary_y": True}], [{}, None]],
        subplot_titles=("how much leaks: members found, %", "what it costs: all arms and points",
                        "protected: the riskiest last", "live training",
                        "next layer: unprotected, riskiest first"),
    )
    noises, fractions = plane_axes(plane)
    figure.add_heatmap(
        z=_leaks(plane), x=list(range(len(fractions))), y=list(range(len(noises))), name="map", colorscale="Blues",
        showscale=False, texttemplate="%{text}", textfont={"size": TEXT}, hovertemplate="%{z:.1f} % found<extra></extra>",
        row=1, col=1,
    )
    for name, mode, look in (
        ("trained here", "markers+text", {"symbol": "star", "size": 18, "color": COLORS[4], "line": {"width": 1}}),
        ("chosen on the map", "markers", {"color": COLORS[1], "line": {"width": 4}}),
        ("the sliders", "markers", {"symbol": "diamond-open", "size": 36, "color": "black", "line": {"width": 3}}),
    ):
        figure.add_scatter(name=name, mode=mode, marker=look, showlegend=False, row=1, col=1,
                           hoverinfo="text" if name == "trained here" else "skip")
    for name, number in (("plane, one seed", 0), ("trained here, one seed", 1)):
        look = {"size": (9, 17)[number], "symbol": ("circle-open", "star")[number], "color": (GREY, COLORS[4])[number]}
        figure.add_scatter(name=name, mode="markers", marker=look | {"line": {"width": 2 - number}}, row=1, col=2,
                           hovertemplate="%{text}<br>robust %{x:.1f} %, leak %{y:.1f} %<extra></extra>")
    for number, name in enumerate(report.arms if report else ()):
        across, up = report.interval(name, "robust"), report.interval(name, "leak")
        figure.add_scatter(
            x=[100 * across.mean], y=[100 * up.mean], mode="markers", name=name, row=1, col=2,
            marker={"size": 12, "color": COLORS[number % len(COLORS)], "symbol": symbol(number), "line": {"width": 2}},
            error_x=bars([across], thickness=1.2), error_y=bars([up], thickness=1.2),
            text=[f"{name}<br>robust {spell(across)} %, leak {spell(up)} %"],
            hovertemplate="%{text}<extra></extra>",
        )
    figure.add_scatter(name="chosen", mode="markers", row=1, col=2, hoverinfo="skip",
                       marker={"symbol": "circle-open", "size": 24, "color": COLORS[1], "line": {"width": 4}})
    for row, name in ((3, "protected"), (4, "next layer")):
        figure.add_trace(_named(pictures_of(np.ones((1, *_size(marks[name])))), name), row=row, col=1)
    figure.add_scatter(name="live hint", mode="text", textfont={"color": "black"}, showlegend=False, hoverinfo="skip",
                       cliponaxis=False, row=3, col=2)
    for number, name in enumerate(LIVE):
        figure.add_scatter(name=name, mode="lines+markers", line=line(number), marker={"symbol": symbol(number), "size": 8},
                           showlegend=False, hovertemplate=f"{name}, epoch %{{x}}: %{{y:.3g}}<extra></extra>",
                           row=3, col=2, secondary_y=bool(number))
    figure.update_xaxes(title="share of samples protected", tickvals=list(range(len(fractions))),
                        ticktext=[f"{f:.0%}" for f in fractions], row=1, col=1)
    figure.update_yaxes(title="noise multiplier", tickvals=list(range(len(noises))), ticktext=[f"{s:g}" for s in noises],
                        row=1, col=1)
    figure.update_xaxes(title="robust accuracy, % (more is better)", row=1, col=2)
    figure.update_yaxes(title="members found, % (less is better)", rangemode="tozero", row=1, col=2)
    figure.update_xaxes(title="epoch", rangemode="tozero", row=3, col=2)
    for number, name in enumerate(("robust on unseen, % (solid)", "training loss (dashed)")):
        figure.update_yaxes(title={"text": name, "font": {"color": COLORS[number]}}, rangemode="tozero",
                            showgrid=not number, tickmode="auto", nticks=6, row=3, col=2, secondary_y=bool(number))
    for row in (3, 4):
        axis = figure.get_subplot(row, 1).xaxis.plotly_name.replace("axis", "")
        figure.update_xaxes(visible=False, row=row, col=1)
        figure.update_yaxes(visible=False, autorange="reversed", scaleanchor=axis, row=row, col=1)
    figure.update_layout(legend=_below(0.561, 116))
    return moved(_large(styled(figure, title=title, height=1040)), marks)


def demem_marks(
    plane: Plane, chosen: Mapping, *, protected: np.ndarray, surfaced: np.ndarray, sliders: tuple[float, int] | None = None,
    curve: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, dict]:
    """{name of a trace: what it shows} at a position of the DeMem panel.

    chosen: a row of `plane.points`. protected, surfaced: pictures [K, C, H, W], possibly none. sliders: noise multiplier and
    number of samples at or above the threshold. curve: from `live.Curve.points`.
    """
    p = plane.points
    noises, fractions = plane_axes(plane)

    def spot(noise, count):
        across = np.interp(np.asarray(count) / len(plane.scores), fractions, range(len(fractions)))
        return {"x": np.atleast_1d(across).tolist(), "y": np.atleast_1d(np.interp(noise, noises, range(len(noises)))).tolist()}

    def frontier(part):
        words = [f"noise multiplier {s:.3g}, {c} protected" for s, c in zip(part["noise_multiplier"], part["protected"],
                                                                           strict=True)]
        return {"x": [100 * v for v in part["robust"]], "y": [percent_of(v) for v in part["leak"]], "text": words}

    added = p[p["added"]]
    stars, chosen_at = spot(added["noise_multiplier"], added["protected"]), spot(chosen["noise_multiplier"], chosen["protected"])
    sliders_at = spot(*sliders) if sliders else {"x": [], "y": []}
    if chosen["added"] and sliders_at == chosen_at:
        sliders_at = {"x": [], "y": []}  # the ring around the star says it, and the star's number stays readable
    # a ring is no larger than its star, whose number begins where the star ends; the same line for both, because a mark that
    # nests deeper (marker.line.width) stops the browser's figure from following at all
    frame = {"symbol": "circle-open", "size": 22} if chosen["added"] else {"symbol": "square-open", "size": 42}
    above = [y >= round(y) for y in stars["y"]]
    return {
        "map": {"text": _numbers(plane, stars)},
        "trained here": stars | {"text": [f"{100 * v:.1f}" for v in added["leak"]]}
        | {"textposition": ["top center" if up else "bottom center" for up in above]},
        "chosen on the map": chosen_at | {"marker": frame}, "the sliders": sliders_at,
        "plane, one seed": frontier(p[~p["added"]]), "trained here, one seed": frontier(added),
        "chosen": {"x": [100 * chosen["robust"]], "y": [percent_of(chosen["leak"])]},
        "protected": {"z": pictures_of(protected).z}, "next layer": {"z": pictures_of(surfaced).z},
        **curve_marks(curve or {"epoch": [], "robust": [], "loss": []}),
    }


def curve_marks(curve: Mapping[str, Sequence[float]]) -> dict[str, dict]:
    """The same for the live curve alone; words where there is nothing to draw."""
    empty = not curve["epoch"]
    words = "<i>train this point</i> draws here,<br>epoch by epoch:<br>robust accuracy<br>and training loss"
    corners = [0, 1, 2] if empty else []  # two blank ones hold the words in the middle
    return {
        "live hint": {"x": corners, "y": corners, "text": ["", words, ""][: len(corners)]},
        "robust accuracy": {"x": list(curve["epoch"]), "y": [100 * v for v in curve["robust"]]},
        "training loss": {"x": list(curve["epoch"]), "y": list(curve["loss"])},
    }


def moved(figure: go.Figure, marks: Mapping[str, Mapping]) -> go.Figure:
    """The figure with every trace of that name brought to its mark, in one message to the browser.

    The axes of the live training are there as long as something is drawn on them.
    """
    with figure.batch_update():
        for trace in figure.data:
            if trace.name in marks:
                trace.update(marks[trace.name])
            if trace.name in LIVE and trace.name in marks:
                for letter, name in (("x", trace.xaxis), ("y", trace.yaxis)):
                    figure.layout[f"{letter}axis{name[1:]}"].visible = bool(marks[trace.name]["x"])
    return figure


def plane_axes(plane: Plane) -> tuple[list[float], list[float]]:
    """The noise multipliers and fractions of the first sweep, ascending."""
    swept = plane.points[~plane.points["added"]]
    return sorted(swept["noise_multiplier"].unique()), sorted(swept["fraction"].unique())


def pictures_of(images: np.ndarray, *, columns: int = 8):
    """The trace with pictures [K, C, H, W] side by side; a blank frame when there are none."""
    blank = np.ones((PICTURES, *np.shape(images)[1:]))
    blank[: len(images)] = images  # always the same number of places, so that pictures keep their size
    return picture(mosaic(blank, columns=columns))


def _below(y: float, width: int = 135) -> dict:
    """A legend between the first row of plots and the second, with entries of that many pixels."""
    return {
        "font": {"size": TEXT - 2}, "orientation": "h", "x": 0.5, "xanchor": "center", "y": y, "yanchor": "top",
        "entrywidth": width,
    }


def _named(trace, name: str):
    return trace.update(name=name)


def _size(mark: Mapping) -> tuple[int, int, int]:
    return (3 if np.ndim(mark["z"]) == 3 else 1), 1, 1


def _large(figure: go.Figure) -> go.Figure:
    figure.update_annotations(font={"size": TEXT + 1})
    figure.update_xaxes(title={"font": {"size": TEXT}}).update_yaxes(title={"font": {"size": TEXT}})
    top = 105 if figure.layout.title.text else 60  # room for the titles of the upper plots
    return figure.update_layout(font={"size": TEXT}, autosize=True, margin={"t": top})


def _numbers(plane: Plane, stars: Mapping[str, Sequence[float]]) -> list[list[str]]:
    """What is written in the cells of the map. Where a star lies, the number moves out of its way, up or down by a line."""
    written = [["" if v is None else f"{v:.1f}" for v in row] for row in _leaks(plane)]
    for x, y in zip(stars["x"], stars["y"], strict=True):
        row, column = round(y), round(x)
        text = written[row][column]
        if text and "<br>" not in text:
            written[row][column] = f"<br> <br>{text}" if y >= row else f"{text}<br> <br> "
    return written


def _leaks(plane: Plane) -> list[list[float | None]]:
    noises, fractions = plane_axes(plane)
    return [[_cell(plane.points, s, f, "leak") for f in fractions] for s in noises]


def _cell(points, sigma: float, fraction: float, column: str) -> float | None:
    points = points[~points["added"]]
    if fraction == 0:  # nobody protected: noise is not added, so the one trained point stands for the whole column
        found = points[points["fraction"] == 0]
    else:
        found = points[(points["noise_multiplier"] == sigma) & (points["fraction"] == fraction)]
    return percent_of(found[column].iloc[0]) if len(found) else None
