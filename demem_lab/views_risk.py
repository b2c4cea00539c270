"""The figures of the Attack panel, the Leak panel and the Risk gallery, each made from an answer; nothing is computed here.

A figure is drawn once; `moved` then brings the traces of a live one in line with a `sketch` of a new one.

>>> attack_view(attack_path(net, x[:1], y[:1], FGSM(0.1)), data.classes).show()                         # doctest: +SKIP

Members are hatched and diamonds, non-members plain and circles: nothing is told by colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from demem_lab.answers import SHOWN, AttackPath, Cut, Leak, Risks
from demem_lab.leakage import MIN_FALSE_POSITIVES, Interval
from demem_lab.plots import COLORS, GREY, line, mosaic, picture, styled, symbol
from demem_lab.sketches import Sketch, grid

TEXT = 15  # pixels: read from the last row
LINES = 4  # classes that get a line of their own
IN, OUT = COLORS[1], COLORS[0]


def attack_view(
    path: AttackPath, classes: Sequence[str], *, title: str = "", sketch: bool = False
) -> go.Figure | Sketch:
    """The image, what was added (with its scale said), the attacked image, and the probabilities along the way."""
    figure = grid(
        sketch, rows=2, cols=3, row_heights=[0.46, 0.54], vertical_spacing=0.13, horizontal_spacing=0.03,
        specs=[[{}, {}, {}], [{"colspan": 3}, None, None]],
        subplot_titles=(" ", " ", " ", "what the model believes, step by step"),
    )
    change = path.change
    largest = max(np.abs(change).max(), 1e-12)
    canvases = path.images[0], change / (2 * largest) + 0.5, path.images[-1]
    for column, canvas in enumerate(canvases, 1):
        figure.add_trace(picture(mosaic(np.asarray(canvas)[None], columns=1)), row=1, col=column)
    steps, p = list(range(len(path.images))), path.probabilities
    for number, (name, values) in enumerate(_believed(p, path.label, classes)):
        figure.add_scatter(
            x=steps, y=values, mode="lines+markers", name=name, line=line(number) | {"width": 3}, row=2, col=1,
            marker={"size": 9, "symbol": symbol(number)}, hovertemplate="step %{x}: %{y:.1%}<extra>%{fullData.name}</extra>",
        )
    first, last = (classes[int(q.argmax())] for q in (p[0], p[-1]))
    captions = (
        f"original: label {classes[path.label]}<br>model: <b>{first}</b> ({p[0].max():.0%})",
        f"{1 / (2 * largest):.3g} times the change,<br>at most {largest:.3g} of 1",
        f"attacked<br>model: <b>{last}</b> ({p[-1].max():.0%})",
    )
    if not change.any():
        captions = captions[0], "change: none<br>", captions[2]
    for annotation, text in zip(figure.layout.annotations[:3], captions, strict=True):
        annotation.text = text
    for column, anchor in ((1, "x"), (2, "x2"), (3, "x3")):
        _frame(figure, anchor, row=1, col=column)
    figure.update_layout(legend={"orientation": "h", "y": -0.17, "x": 0, "yanchor": "top"})
    ticks = steps[:: max(1, len(steps) // 10)]  # plotly's own would have half steps
    figure.update_xaxes(title="step of the attack", row=2, col=1, rangemode="tozero", tickvals=ticks,
                        ticktext=[str(t) for t in ticks])
    figure.update_yaxes(title="probability", range=[-0.03, 1.03], tickformat=".0%", row=2, col=1)
    return _finished(figure, title=title, height=660, top=125 if title else 70)


def leak_view(
    answers: Mapping[str, Leak], chosen: str, *, title: str = "", sketch: bool = False
) -> go.Figure | Sketch:
    """Histograms, ROC and two measures of one attack; `answers` holds the same attack on one target of each model.

    The measures stand side by side: accuracy, which flatters, and members found at few false positives.
    """
    leak = answers[chosen]
    rate = f"{100 * leak.fpr:g} %"
    figure = grid(
        sketch, rows=2, cols=2, row_heights=[0.68, 0.32], vertical_spacing=0.22, horizontal_spacing=0.15,
        subplot_titles=("scores of one target", "its ROC, both axes logarithmic", "misleading: best accuracy<br>(dotted: a coin)",
                        f"honest: found at {rate} false<br>(dotted: guessing)"),
    )
    middle, width = (leak.edges[1:] + leak.edges[:-1]) / 2, np.diff(leak.edges)
    both = ("non-members", leak.non_members, -1, OUT, ""), ("members", leak.members, 1, IN, "/")
    for name, counts, sign, color, shape in both:
        figure.add_bar(
            x=middle, y=sign * counts, width=width, name=name, row=1, col=1, customdata=counts,
            hovertemplate=f"%{{customdata}} {name} near %{{x:.3g}}<extra></extra>",
            marker={"color": color, "line": {"width": 0}, "pattern": {"shape": shape, "fgcolor": "white", "size": 7}},
        )
    at = float(np.clip(leak.threshold, leak.edges[0], leak.edges[-1]))
    top = int(max(leak.members.max(), leak.non_members.max()))
    figure.add_scatter(x=[at, at], y=[-top, top], mode="lines", name="threshold", row=1, col=1, hoverinfo="skip",
                       line={"color": "black", "width": 4, "dash": "dash"})
    _add_roc(figure, leak)
    names, marks = list(answers), ["star-diamond" if name == chosen else "circle" for name in answers]
    for column, (found, guess) in enumerate(((lambda a: a.best_accuracy, 0.5), (lambda a: a.found_at_fpr, leak.fpr)), 1):
        values = [found(answers[name]) for name in names]
        figure.add_scatter(
            x=[v.mean for v in values], y=names, mode="markers+text", row=2, col=column, showlegend=False,
            name="best accuracy" if column == 1 else "found at few false", texttemplate="%{x:.1%}", textposition="top right",
            cliponaxis=False,
            marker={"color": "black", "size": 14, "symbol": marks}, textfont={"size": TEXT},
            error_x={"type": "data", "array": [v.high - v.mean for v in values], "thickness": 2.5,
                     "arrayminus": [v.mean - v.low for v in values]},
            hovertemplate="%{y}: %{x:.1%} (+%{error_x.array:.1%} / -%{error_x.arrayminus:.1%})<extra></extra>",
        )
        figure.add_vline(x=guess, line={"color": COLORS[3], "dash": "dot", "width": 3}, row=2, col=column)
    figure.update_xaxes(range=[0, 1], tickformat=".0%", row=2, col=1)
    figure.update_xaxes(rangemode="tozero", tickformat=".0%", row=2, col=2)
    figure.update_yaxes(automargin=True, range=[len(names) - 0.6, -0.8], row=2)
    figure.update_yaxes(showticklabels=False, row=2, col=2)  # the same names as on the left
    figure.update_xaxes(title="score (ends: all beyond)", row=1, col=1)
    ticks = [-top, -(top // 2), 0, top // 2, top]
    figure.update_yaxes(title="non-members | members", tickvals=ticks, ticktext=[f"{abs(t)}" for t in ticks], row=1, col=1)
    figure.update_layout(barmode="overlay", bargap=0, legend={"orientation": "h", "y": -0.13, "x": 0, "yanchor": "top"})
    return _finished(figure, title=title, height=720, top=90 if title else 45)


def risk_view(
    risks: Risks, cut: Cut, images: np.ndarray, classes: Sequence[str], *, by: str, cheap: str, sample: int, title: str = "",
    sketch: bool = False,
) -> go.Figure | Sketch:
    """A gallery along the order `by`, the scatter of a cheap score against memorization, and one sample by itself.

    images: [N, C, H, W].
    """
    figure = grid(
        sketch, rows=2, cols=3, row_heights=[0.42, 0.58], column_widths=[0.5, 0.2, 0.3], vertical_spacing=0.12,
        horizontal_spacing=0.1,
        specs=[[{"colspan": 3}, None, None], [{}, {}, {}]],
        subplot_titles=(f"sorted by {by}; the threshold lies between the lower two rows", "cheap against expensive",
                        f"sample {sample}", "under attack"),
    )
    figure.add_trace(picture(gallery_canvas(cut, images)), row=1, col=1)
    figure.add_trace(_hover_spots(risks, cut, classes, images.shape[2:]), row=1, col=1)
    figure.add_scatter(mode="markers", name="chosen picture", hoverinfo="skip", showlegend=False, cliponaxis=False, row=1, col=1,
                       marker={"size": 62, "symbol": "square-open", "color": COLORS[1], "line": {"width": 5}},
                       **_place(cut, sample, images.shape[2:]))
    x, y, above = risks.scores[cheap], risks.scores["memorization"], np.zeros(len(risks.y), dtype=bool)
    above[cut.order[: cut.count]] = True
    kind = go.Scatter if len(x) <= 1000 else go.Scattergl  # beyond that, a browser draws vectors too slowly for a slider
    known, words = facts(risks), np.asarray(classes)[risks.y]
    everybody = np.ones_like(above)  # stands still under those above, who cover their own points: a threshold sends few
    for name, who, number in (("all samples", everybody, 0), ("at or above", above, 1)):
        figure.add_trace(kind(
            x=x[who], y=y[who], mode="markers", name=name, customdata=known[who], text=words[who], hovertemplate=_hover(risks),
            marker={"size": 7 + 2 * number, "color": COLORS[number], "symbol": symbol(number),
                    "opacity": (0.6, 1)[number]},
        ), row=2, col=1)
    edge = cut.threshold if np.isfinite(cut.threshold) else None
    lines = {"memorization": ([x.min(), x.max()], [edge, edge]), cheap: ([edge, edge], [y.min(), y.max()])}
    across, along = lines.get(by, ([None, None], [None, None]))
    figure.add_scatter(x=across, y=along, mode="lines", name="threshold", hoverinfo="skip", row=2, col=1,
                       line={"color": "black", "dash": "dash", "width": 3})
    figure.add_scatter(x=[x[sample]], y=[y[sample]], mode="markers", name="chosen sample", hoverinfo="skip", row=2, col=1,
                       marker={"size": 22, "symbol": "circle-open", "color": "black", "line": {"width": 4}})
    figure.add_trace(picture(mosaic(images[sample][None], columns=1)), row=2, col=2)
    for number, (name, who) in enumerate((("did not", ~risks.member[:, sample]), ("trained on it", risks.member[:, sample]))):
        p = risks.p[who, sample]
        figure.add_box(
            x=p, y=[name] * len(p), name=name, orientation="h", boxpoints="all", jitter=0.6, pointpos=0, boxmean=True,
            fillcolor="rgba(0,0,0,0)", line={"color": COLORS[number], "width": 2}, showlegend=False, row=2, col=3,
            marker={"size": 10, "symbol": symbol(number), "color": COLORS[number]},
            hovertemplate=f"{name}: %{{x:.1%}}<extra></extra>",
        )
    _frame(figure, "x", row=1, col=1)
    _frame(figure, "x3", row=2, col=2)
    height, middle = images.shape[2] + 1, (images.shape[2] - 1) / 2
    figure.update_yaxes(
        showticklabels=True, tickvals=[middle + k * height for k in range(3)], ticktext=list(cut.rows), row=1, col=1,
        ticks="outside", ticklen=8, tickcolor="rgba(0,0,0,0)", autorange=False, range=[3 * height - 1.5, -0.5],
    )
    figure.update_xaxes(range=[-0.5, SHOWN * (images.shape[3] + 1) - 1.5], row=1, col=1)
    figure.update_xaxes(title=cheap, row=2, col=1)
    figure.update_yaxes(title="memorization", row=2, col=1)
    figure.update_xaxes(title="confidence", range=[-0.04, 1.04], tickformat=".0%", row=2, col=3)
    # in two lines, else they reach into the picture
    figure.update_yaxes(tickvals=["did not", "trained on it"], ticktext=["did<br>not", "trained<br>on it"], row=2, col=3)
    figure.update_layout(legend={"orientation": "h", "y": -0.12, "x": 0, "yanchor": "top"})
    return _finished(figure, title=title, height=780, top=90 if title else 50)


def facts(risks: Risks) -> np.ndarray:
    """Everything known of every sample, [N, 7 + cheap scores]: index, memorization, its standard error, then mean confidence
    and mean margin of the models that trained on it and of those that did not, then the cheap scores."""
    cheap = [values for name, values in risks.scores.items() if name != "memorization"]
    columns = np.arange(len(risks.y)), risks.score.score, risks.score.standard_error
    table = np.stack([*columns, *risks.sides(risks.p), *risks.sides(risks.margin), *cheap], axis=1)
    return table.round(4)  # a message of short numbers


def gallery_canvas(cut: Cut, images: np.ndarray) -> np.ndarray:
    """Three rows of pictures, white where a row has fewer."""
    white = np.ones((1, *images.shape[1:]))
    rows = [np.concatenate([images[i], np.repeat(white, SHOWN - len(i), axis=0)]) for i in cut.rows.values()]
    return mosaic(np.concatenate(rows), columns=SHOWN)


def _believed(p: np.ndarray, label: int, classes: Sequence[str]) -> list[tuple[str, np.ndarray]]:
    """The right class, the wrong ones that ever come highest, and the sum of the others: names and curves."""
    wrong = [int(k) for k in np.argsort(-p.max(0), kind="stable") if k != label][: LINES - 1]
    curves = [(f"{classes[label]} (right)", p[:, label])] + [(str(classes[k]), p[:, k]) for k in wrong]
    if len(classes) > LINES:
        curves.append(("all others", np.maximum(1 - sum(values for _, values in curves), 0)))
    return curves


def _add_roc(figure: go.Figure | Sketch, leak: Leak) -> None:
    """The curve, guessing, the threshold's point with its interval, and where counts are too small to mean much."""
    outside = leak.false.n
    least = 0.5 / outside  # where 0 is drawn: half a false positive
    false, true = (np.maximum(rate, least) for rate in leak.curve)
    figure.add_scatter(x=[least, 1], y=[least, 1], mode="lines", name="guessing", row=1, col=2, hoverinfo="skip",
                       line={"color": GREY, "dash": "dot", "width": 3}, showlegend=False)
    edge = min(1.0, MIN_FALSE_POSITIVES / outside)
    figure.add_scatter(x=[edge, edge], y=[least, 1], mode="lines", name=f"left of it: fewer than {MIN_FALSE_POSITIVES} false",
                       row=1, col=2, hoverinfo="skip", line={"color": GREY, "width": 2, "dash": "longdash"})
    figure.add_scatter(x=false, y=true, mode="lines", name="ROC", row=1, col=2, showlegend=False,
                       line={"color": COLORS[2], "width": 3.5}, hovertemplate="false %{x:.2%}, found %{y:.2%}<extra></extra>")
    x, y = max(leak.false.mean, least), max(leak.found.mean, least)
    figure.add_scatter(
        x=[x], y=[y], mode="markers", name="at the threshold", row=1, col=2, hoverinfo="skip",
        marker={"size": 15, "symbol": "star-diamond", "color": "black"},
        error_x=_bar(x, leak.false, least), error_y=_bar(y, leak.found, least),
    )
    ticks = [10.0**k for k in range(-5, 1)]
    look = {"type": "log", "tickvals": ticks, "ticktext": [f"{100 * t:g} %" for t in ticks], "range": [np.log10(least), 0.03]}
    figure.update_xaxes(title="non-members accused", row=1, col=2, **look)
    figure.update_yaxes(title="members found", row=1, col=2, **look)


def _bar(at: float, found: Interval, least: float) -> dict:
    return {"type": "data", "array": [found.high - at], "arrayminus": [at - max(found.low, least)], "thickness": 2.5}


def _hover(risks: Risks) -> str:
    cheap = [name for name in risks.scores if name != "memorization"]
    return "<br>".join([
        "<b>sample %{customdata[0]:d}</b>, label %{text}",
        "memorization %{customdata[1]:.2f} ± %{customdata[2]:.2f} (standard error)",
        "confidence %{customdata[3]:.1%} trained on it, %{customdata[4]:.1%} did not",
        "margin %{customdata[5]:.2f} trained on it, %{customdata[6]:.2f} did not",
        *(f"{name} %{{customdata[{7 + k}]:.3g}}" for k, name in enumerate(cheap)),
    ]) + "<extra></extra>"


def _spots(cut: Cut, size: tuple[int, int]) -> dict[int, tuple[float, float]]:
    """Where each sample shown in the gallery has the middle of its picture."""
    height, width = size
    return {
        int(i): (c * (width + 1) + (width - 1) / 2, r * (height + 1) + (height - 1) / 2)
        for r, row in reversed(list(enumerate(cut.rows.values()))) for c, i in enumerate(row)
    }


def _place(cut: Cut, sample: int, size: tuple[int, int]) -> dict:
    x, y = _spots(cut, size).get(sample, (None, None))
    return {"x": [x], "y": [y]}


def _hover_spots(risks: Risks, cut: Cut, classes: Sequence[str], size: tuple[int, int]) -> go.Scatter:
    spots = _spots(cut, size)
    who = list(spots)
    return go.Scatter(
        x=[x for x, _ in spots.values()], y=[y for _, y in spots.values()], mode="markers", name="pictures", showlegend=False,
        customdata=facts(risks)[who], text=np.asarray(classes)[risks.y[who]], hovertemplate=_hover(risks),
        marker={"size": 50, "opacity": 0, "symbol": "square"},
    )


def _frame(figure: go.Figure | Sketch, anchor: str, *, row: int, col: int) -> None:
    """Axes of a picture: square pixels, first row on top, a thin frame and nothing else."""
    look = {"showticklabels": False, "showgrid": False, "zeroline": False, "ticks": "", "constrain": "domain",
            "showline": True, "mirror": True, "linecolor": GREY}
    figure.update_xaxes(row=row, col=col, **look)
    figure.update_yaxes(row=row, col=col, autorange="reversed", scaleanchor=anchor, **look)


def _finished(figure: go.Figure | Sketch, *, title: str, height: int, top: int) -> go.Figure | Sketch:
    """Text that can be read from the last row. A sketch has no looks."""
    if isinstance(figure, Sketch):
        return figure
    styled(figure, title=title, height=height)
    figure.update_layout(font={"size": TEXT}, hoverlabel={"font": {"size": TEXT}}, margin={"t": top})
    return figure.update_annotations(font={"size": TEXT + 1})
