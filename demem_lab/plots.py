"""Results to plotly figures; nothing is computed here.

>>> figure = roc_curves({"plain": (fpr, tpr)}, title="Who was in the training set?")      # doctest: +SKIP

Colours are the Okabe-Ito palette, which people with colour blindness can tell apart; lines differ in dash and
bars in hatching as well.
Importing this module makes figures appear as data plus plotly's own renderer, not as 5 MB of JavaScript a notebook
(Colab keeps its own way).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
from plotly.subplots import make_subplots

from demem_lab.comparison import METRICS, Comparison, spell
from demem_lab.leakage import Interval


def _load_nbformat() -> None:
    """nbformat, which plotly asks for its version, without the grammar of internet addresses that it brings along.

    It takes 2 s in every kernel, for a check of addresses that nobody makes here; whoever imports it later still can.
    """
    name = "rfc3987_syntax"
    if "ipykernel" not in sys.modules or name in sys.modules or "jsonschema" in sys.modules:
        return
    sys.modules[name] = None  # "not installed", for as long as the import takes
    try:
        import nbformat  # noqa: F401
    finally:
        del sys.modules[name]


_load_nbformat()
if "google.colab" not in sys.modules:
    if "plotly.io._renderers" in sys.modules:
        pio.renderers.default = "plotly_mimetype"
    else:  # the same, without loading the renderers (IPython, a grammar of addresses: 2 s) before something is shown
        os.environ.setdefault("PLOTLY_RENDERER", "plotly_mimetype")

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8a7400")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
HATCHES = ("", "/", "x", "-", ".", "\\", "|", "+")
GREY = "#999999"


def styled(figure: go.Figure, *, title: str = "", height: int = 400, width: int | None = None) -> go.Figure:
    """The look all figures share."""
    return figure.update_layout(
        template="plotly_white", title={"text": title, "font": {"size": 16}}, height=height, width=width,
        margin={"l": 70, "r": 20, "t": 60 if title else 20, "b": 55}, font={"size": 13}, hoverlabel={"align": "left"},
    )


def roc_curves(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], *, title: str = "") -> go.Figure:
    """True against false positive rate on logarithmic axes, {name: (fpr, tpr)}; the diagonal is guessing.

    A few markers stand on the curves for which no dash is left.
    """
    figure = go.Figure()
    smallest = min((float(f[f > 0].min()) for f, _ in curves.values() if (f > 0).any()), default=1e-3)
    figure.add_scatter(
        x=[smallest, 1], y=[smallest, 1], mode="lines", name="guessing", hoverinfo="skip",
        line={"color": GREY, "dash": "dot"},
    )
    for number, (name, (fpr, tpr)) in enumerate(curves.items()):
        figure.add_scatter(
            x=fpr, y=np.maximum(tpr, smallest / 10), mode="lines" if number < len(DASHES) else "lines+markers", name=name,
            line=line(number), marker={"symbol": symbol(number), "size": 9, "maxdisplayed": 8},
            hovertemplate=f"{name}<br>false positives %{{x:.2%}}<br>true positives %{{y:.2%}}<extra></extra>",
        )
    ticks = [m * 10.0**k for k in range(-6, 1) for m in (1, 2, 5) if m * 10**k <= 1]  # plotly's own run into each other
    look = {"type": "log", "tickvals": ticks, "ticktext": [f"{100 * t:g} %" for t in ticks]}
    figure.update_xaxes(title="non-members wrongly accused (false positive rate)", **look)
    figure.update_yaxes(title="members found (true positive rate)", **look)
    return styled(figure, title=title, height=440)


def forest(
    rows: Mapping[str, Interval], *, axis: str = "", percent: bool = True,
    reference: float | None = None, title: str = "", rates: bool = False,
) -> go.Figure:
    """One dot with its interval for each row, in the given order from top to bottom; `reference` draws a line.

    rates: the values lie between 0 and 1 (not differences), and so does what is drawn of their intervals.
    """
    scale = 100 if percent else 1
    names = list(rows)
    means = [scale * r.mean for r in rows.values()]
    figure = go.Figure(go.Scatter(
        x=means, y=names, mode="markers", marker={"size": 10, "color": COLORS[0]}, showlegend=False,
        error_x=bars(rows.values(), thickness=2, scale=scale, rates=rates),
        hovertemplate="%{y}: %{x:.1f} (+%{error_x.array:.1f} / -%{error_x.arrayminus:.1f})<extra></extra>",
    ))
    if reference is not None:
        figure.add_vline(x=scale * reference, line={"color": GREY, "dash": "dot"})
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(title=axis)
    return styled(figure, title=title, height=120 + 34 * len(rows))


def arms(
    report: Comparison, metrics: Sequence[str], *, group: str = "all", names: Sequence[str] | None = None,
    title: str = "",
) -> go.Figure:
    """Means and 95 % intervals over seeds, a panel for each metric, a row for each arm."""
    names = list(names or report.arms)
    titles = [_short(m).replace(" by ", "<br>by ") for m in metrics]
    figure = make_subplots(cols=len(metrics), shared_yaxes=True, subplot_titles=titles)
    for column, metric in enumerate(metrics, 1):
        found = [report.interval(name, metric, group) for name in names]
        figure.add_scatter(
            x=[100 * f.mean for f in found], y=names, mode="markers", marker={"size": 10, "color": COLORS[column - 1]},
            error_x=bars(found, thickness=2), showlegend=False, row=1, col=column, text=[spell(f) for f in found],
            hovertemplate=f"%{{y}}<br>{METRICS[metric]}: %{{text}} %<extra></extra>",
        )
        figure.update_xaxes(ticksuffix=" %", row=1, col=column)
    figure.update_yaxes(autorange="reversed", automargin=True)
    return styled(figure, title=title, height=190 + 32 * len(names)).update_layout(margin={"t": 105})


def by_group(
    report: Comparison, metric: str, groups: Sequence[str], *, names: Sequence[str] | None = None, title: str = ""
) -> go.Figure:
    """One metric by risk group: a bar for each arm in each group, with intervals over seeds."""
    figure = go.Figure()
    for number, name in enumerate(names or report.arms):
        found = [report.interval(name, metric, group) for group in groups]
        hatch = {"shape": HATCHES[number % len(HATCHES)], "fgcolor": "white"}
        figure.add_bar(
            x=list(groups), y=[100 * f.mean for f in found], name=name, error_y=bars(found, thickness=1.5),
            marker={"color": COLORS[number % len(COLORS)], "pattern": hatch}, hovertext=[spell(f) for f in found],
            hovertemplate=f"{name}, %{{x}}<br>{METRICS[metric]}: %{{hovertext}} %<extra></extra>",
        )
    figure.update_yaxes(title=_short(metric), ticksuffix=" %")
    figure.update_layout(barmode="group")
    return styled(figure, title=title)


def frontier(
    report: Comparison, *, x: str = "robust", y: str = "leak", group: str = "all", y_group: str = "", title: str = "",
    names: Sequence[str] | None = None,
) -> go.Figure:
    """Every arm as a point with intervals: what it keeps (x) against what it leaks (y). Best is bottom right."""
    figure = go.Figure()
    for number, name in enumerate(names or report.arms):
        a, b = report.interval(name, x, group), report.interval(name, y, y_group or group)
        figure.add_scatter(
            x=[100 * a.mean], y=[100 * b.mean], mode="markers", name=name,
            marker={"size": 12, "color": COLORS[number % len(COLORS)], "symbol": symbol(number)},
            error_x=bars([a]), error_y=bars([b]),
            hovertemplate=f"{name}<br>{_short(x)} {spell(a)} %<br>{_short(y)} {spell(b)} %<extra></extra>",
        )
    figure.update_xaxes(title=f"{_short(x)}, % (more is better)")
    figure.update_yaxes(title=f"{_short(y)}{', ' + y_group if y_group else ''}, % (less is better)", rangemode="tozero")
    return styled(figure, title=title, height=480)


def two_measures(
    rows: Mapping[str, tuple[float, float]], *, flattering: str, honest: str, axis: str = "", percent: bool = True,
    reference: float | None = None, title: str = "",
) -> go.Figure:
    """The same results under a flattering and an honest measure: two marks and the line between them for each row.

    `reference` draws a line, for instance where guessing is.
    """
    scale = 100 if percent else 1
    figure = go.Figure()
    pairs = [[scale * value for value in pair] for pair in rows.values()]
    between = {"x": [v for pair in pairs for v in (*pair, None)], "y": [n for name in rows for n in (name, name, None)]}
    figure.add_scatter(**between, mode="lines", line={"color": GREY, "width": 3}, showlegend=False, hoverinfo="skip")
    for number, name in enumerate((flattering, honest)):
        figure.add_scatter(
            x=[pair[number] for pair in pairs], y=list(rows), mode="markers", name=name,
            marker={"size": 12, "color": COLORS[1 - number], "symbol": symbol(1 - number)},
            hovertemplate=f"%{{y}}<br>{name}: %{{x:.3g}}<extra></extra>",
        )
    if reference is not None:
        figure.add_vline(x=scale * reference, line={"color": GREY, "dash": "dot"})
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(title=axis)
    figure.update_layout(legend={"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0})
    return styled(figure, title=title, height=190 + 34 * len(rows)).update_layout(margin={"t": 90})


def histogram(values: np.ndarray, *, threshold: float | None = None, axis: str = "", title: str = "") -> go.Figure:
    """How many samples have which value; everything at or right of `threshold` is marked."""
    counts, edges = np.histogram(values, bins=50)
    middle = (edges[1:] + edges[:-1]) / 2
    high = np.zeros(50, dtype=bool) if threshold is None else middle >= threshold
    figure = go.Figure(go.Bar(
        x=middle, y=counts, width=np.diff(edges), marker={"color": np.where(high, COLORS[1], COLORS[0])},
        hovertemplate=f"{axis} %{{x:.2f}}: %{{y}} samples<extra></extra>",
    ))
    if threshold is not None and np.isfinite(threshold):
        figure.add_vline(x=threshold, line={"color": COLORS[1], "dash": "dash"})
    figure.update_xaxes(title=axis)
    figure.update_yaxes(title="samples")
    return styled(figure, title=title, height=340)


def scatter(
    x: np.ndarray, y: np.ndarray, *, x_title: str, y_title: str, title: str = "", labels: Sequence[str] | None = None,
    flagged: np.ndarray | None = None,
) -> go.Figure:
    """One point for each sample; `flagged` ones in another colour and shape."""
    flagged = np.zeros(len(x), dtype=bool) if flagged is None else np.asarray(flagged)
    text = np.asarray(labels if labels is not None else [f"sample {i}" for i in range(len(x))])
    figure = go.Figure()
    for name, who, number in (("others", ~flagged, 0), ("flagged", flagged, 1)):
        if who.any():
            figure.add_scattergl(
                x=x[who], y=y[who], mode="markers", name=name, text=text[who], showlegend=bool(flagged.any()),
                marker={"size": 5 + number, "color": COLORS[number], "opacity": 0.55, "symbol": symbol(number)},
                hovertemplate="%{text}<br>(%{x:.3f}, %{y:.3f})<extra></extra>",
            )
    figure.update_xaxes(title=x_title)
    figure.update_yaxes(title=y_title)
    return styled(figure, title=title)


def lines(
    x: Sequence[float] | Sequence[str], curves: Mapping[str, Sequence[float]], *, x_title: str, y_title: str, title: str = "",
    log_x: bool = False, log_y: bool = False,
) -> go.Figure:
    """Named curves over common x."""
    figure = go.Figure()
    for number, (name, values) in enumerate(curves.items()):
        figure.add_scatter(x=list(x), y=list(values), mode="lines+markers", name=name, line=line(number))
    ticks = [m * 10.0**k for k in range(-6, 7) for m in (1, 2, 5)]  # plotly's own write a lonely 5 for 0.5
    log = {"type": "log", "tickvals": ticks, "ticktext": [f"{t:g}" for t in ticks]}
    # not "linear": an axis of names would then stay empty
    figure.update_xaxes(title=x_title, **(log if log_x else {}))
    figure.update_yaxes(title=y_title, **(log if log_y else {}))
    return styled(figure, title=title)


def heat(values: np.ndarray, columns: Sequence[str], rows: Sequence[str], *, title: str = "") -> go.Figure:
    """A table of numbers [rows, columns] as colours, with the numbers in the cells."""
    cells = [["" if np.isnan(v) else f"{v:+z.1f}" for v in row] for row in np.asarray(values, dtype=float)]  # no -0.0
    figure = go.Figure(go.Heatmap(
        z=values, text=cells, x=list(columns), y=list(rows), colorscale="Cividis", reversescale=True, showscale=False,
        texttemplate="%{text}", textfont={"size": 14}, hovertemplate="%{y}, %{x}: %{z:+.2f}<extra></extra>",
    ))
    figure.update_yaxes(autorange="reversed", automargin=True)
    return styled(figure, title=title, height=130 + 45 * len(rows))


def mosaic(images: np.ndarray, *, columns: int = 12, gap: int = 1, below: int = 0) -> np.ndarray:
    """Images [K, C, H, W] in [0, 1] side by side: float [rows, width] for one channel, [rows, width, 3] for three.

    below: lines of pixels left free under each picture, besides the gap.
    """
    images = np.asarray(images, dtype=np.float64)
    k, c, h, w = images.shape
    rows = max(1, -(-k // columns))
    canvas = np.ones((rows * (h + below + gap) - gap, columns * (w + gap) - gap, c))
    for i, image in enumerate(images):
        top, left = (i // columns) * (h + below + gap), (i % columns) * (w + gap)
        canvas[top : top + h, left : left + w] = image.transpose(1, 2, 0)
    return canvas[..., 0] if c == 1 else canvas


def gallery(
    images: np.ndarray, captions: Sequence[str], *, columns: int = 12, title: str = "", tall: int = 78
) -> go.Figure:
    """Pictures [K, C, H, W] with a caption each (shown on hover, and the first word of it below the picture)."""
    k, _, h, w = np.shape(images)
    below = round(0.3 * (h + 1))  # as high as a line of text is, in pixels of the pictures
    figure = go.Figure(picture(mosaic(images, columns=columns, below=below)))
    x = [(i % columns) * (w + 1) + (w - 1) / 2 for i in range(k)]
    y = [(i // columns) * (h + below + 1) + (h - 1) / 2 for i in range(k)]
    figure.add_scatter(
        x=x, y=y, mode="markers", text=list(captions), showlegend=False, marker={"size": 36, "opacity": 0},
        hovertemplate="%{text}<extra></extra>",
    )
    words = [re.split(r"[\s,:;]", caption, maxsplit=1)[0] for caption in captions]
    figure.add_scatter(
        x=x, y=[v + (h + below) / 2 for v in y], mode="text", text=words, textfont={"size": 11}, showlegend=False,
        hoverinfo="skip",
    )
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False, autorange="reversed", scaleanchor="x")
    rows = max(1, -(-k // columns))
    height = 70 + round(tall * rows * (1 + below / (h + 1)))
    return styled(figure, title=title, height=height).update_layout(margin={"l": 5, "r": 5, "b": 5})


def picture(canvas: np.ndarray):
    """The trace that shows a `mosaic`."""
    if canvas.ndim == 2:
        return go.Heatmap(z=np.round(canvas, 3), zmin=0, zmax=1, colorscale="gray", showscale=False, hoverinfo="skip")
    return go.Image(z=(canvas * 255).round().astype(np.uint8), hoverinfo="skip")


def percent_of(value) -> float | None:
    """100 x value; None for what could not be measured."""
    return None if value is None or value != value else 100 * float(value)


def line(number: int) -> dict:
    """The look of curve number `number`."""
    return {"color": COLORS[number % len(COLORS)], "dash": DASHES[number % len(DASHES)], "width": 2.5}


def symbol(number: int) -> str:
    """The marker of point number `number`: open ones when the colours begin again."""
    shape = ("circle", "diamond", "square", "triangle-up", "cross", "x", "star", "hexagon")[number % 8]
    return shape + ("-open" if number // 8 % 2 else "")


def bars(intervals: Iterable[Interval], *, thickness: float = 1, scale: float = 100, rates: bool = True) -> dict:
    """Plotly's error bars. Those of rates stay within 0 and 100 %: few seeds make intervals that reach beyond."""
    up, down = [], []
    for i in intervals:
        low, high = (i.mean if v is None else min(1.0, max(0.0, v)) if rates else v for v in (i.low, i.high))
        up.append(scale * (high - i.mean))
        down.append(scale * (i.mean - low))
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": thickness}


def _short(metric: str) -> str:
    names = {
        "leak": "members found", "beyond": "beyond the accused", "robust": "robust accuracy",
        "member robust": "members' robust accuracy", "leak clean": "found by clean queries",
        "leak adversarial": "found by adversarial queries",
    }
    at = re.fullmatch(r"(.+: )?(found|beyond) at ([\d.]+ %)", metric)  # as `results` names them
    if at and at[2] == "beyond":
        return f"beyond the accused at {at[3]}"  # with its group and "less is better" it has to fit beside a figure
    return f"found at {at[3]} false positives" if at else names.get(metric, metric)
