"""Figures show the numbers they were given, and nothing else."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import plotly.io as pio
import pytest

from demem_lab import plots
from demem_lab.comparison import Comparison
from demem_lab.leakage import Interval


@pytest.fixture
def report():
    rng = np.random.default_rng(0)
    rows = [(arm, seed, group, metric, rng.random()) for arm in ("none", "other") for seed in (0, 1, 2)
            for group in ("all", "top") for metric in ("robust", "leak", "member robust")]
    return Comparison(pd.DataFrame(rows, columns=["arm", "seed", "group", "metric", "value"]), 0.01, {})


def test_roc_curves_are_on_log_axes_with_the_diagonal():
    fpr, tpr = np.array([0.0, 0.01, 0.1, 1.0]), np.array([0.0, 0.2, 0.5, 1.0])
    figure = plots.roc_curves({"attack": (fpr, tpr)})
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    assert list(figure.data[0].x) == list(figure.data[0].y) and list(figure.data[1].x) == fpr.tolist()
    assert list(figure.data[1].y[1:]) == tpr[1:].tolist()


def test_from_the_seventh_curve_on_a_few_markers_tell_curves_apart_without_colour():
    grid = np.geomspace(0.01, 1, 60)
    figure = plots.roc_curves({f"attack {k}": (grid, grid ** (1 / (k + 1))) for k in range(9)})
    looks = [(t.line.dash, t.mode, t.marker.symbol) for t in figure.data[1:]]
    assert len(set(looks)) == 9 and {mode for _, mode, _ in looks[:6]} == {"lines"}
    assert all(t.mode == "lines+markers" and 0 < t.marker.maxdisplayed <= 12 for t in figure.data[7:])


def test_forest_draws_means_and_both_sides_of_the_interval():
    figure = plots.forest({"a": Interval(0.5, 0.3, 0.9, 3), "b": Interval(0.1, None, None, 1)}, reference=0.2)
    trace = figure.data[0]
    assert list(trace.x) == [50, 10] and list(trace.y) == ["a", "b"]
    assert list(trace.error_x.array) == pytest.approx([40, 0]) and list(trace.error_x.arrayminus) == pytest.approx([20, 0])
    assert figure.layout.shapes[0].x0 == 20


def test_two_measures_are_two_marks_and_a_line_for_each_row():
    figure = plots.two_measures({"a": (0.9, 0.1), "b": (0.4, 0.5)}, flattering="mean", honest="worst", reference=0.2)
    lines, flattering, honest = figure.data
    assert list(lines.x) == [90, 10, None, 40, 50, None] and list(lines.y) == ["a", "a", None, "b", "b", None]
    assert (flattering.name, list(flattering.x)) == ("mean", [90, 40]) and (honest.name, list(honest.x)) == ("worst", [10, 50])
    assert figure.layout.shapes[0].x0 == 20
    assert flattering.marker.symbol != honest.marker.symbol and list(honest.y) == ["a", "b"]


def test_arms_groups_and_frontier_show_the_reports_means(report):
    figure = plots.arms(report, ["robust", "leak"])
    assert list(figure.data[1].x) == [100 * report.mean(a, "leak") for a in report.arms]
    bars = plots.by_group(report, "leak", ["all", "top"])
    assert list(bars.data[1].y) == [100 * report.mean("other", "leak", g) for g in ("all", "top")]
    assert len({bar.marker.pattern.shape for bar in bars.data}) == len(report.arms)  # not by colour alone
    points = plots.frontier(report, y_group="top")
    for trace, arm in zip(points.data, report.arms, strict=True):
        assert (trace.x[0], trace.y[0]) == (100 * report.mean(arm, "robust"), 100 * report.mean(arm, "leak", "top"))
        half = report.interval(arm, "leak", "top")
        assert trace.error_y.array[0] == pytest.approx(100 * (min(1.0, half.high) - half.mean))
        assert f"± {100 * (half.high - half.mean):.1f} %" in trace.hovertemplate  # in words, the whole interval


def test_no_rate_is_drawn_below_zero_or_above_a_hundred_per_cent(report):
    wild = report.rows.assign(value=report.rows["value"].where(report.rows["seed"] > 0, 0.02))  # wide intervals
    wild = Comparison(wild, 0.01, {})
    reach = [wild.interval(a, m, g) for a in wild.arms for m in ("robust", "leak") for g in ("all", "top")]
    assert min(i.low for i in reach) < 0 and max(i.high for i in reach) > 1
    figures = [plots.frontier(wild), plots.by_group(wild, "leak", ["all", "top"]), plots.arms(wild, ["robust", "leak"])]
    figures.append(plots.forest({str(k): i for k, i in enumerate(reach)}, rates=True))
    for trace in (t for figure in figures for t in figure.data):
        for values, error in ((trace.x, trace.error_x), (trace.y, trace.error_y)):
            if error.array is not None:
                ends = [np.add(values, error.array), np.subtract(values, error.arrayminus)]
                assert np.min(ends) > -1e-9 and np.max(ends) < 100 + 1e-9
    difference = plots.forest({"a": Interval(0.1, -0.2, 0.4, 3)}).data[0]  # which may well be negative
    assert list(difference.error_x.arrayminus) == pytest.approx([30])


def test_the_axis_says_of_what_a_rate_is():
    rows = [("none", seed, "all", metric, 0.1) for seed in (0, 1) for metric in ("robust accuracy", "RMIA: found at 0.1 %")]
    made = Comparison(pd.DataFrame(rows, columns=["arm", "seed", "group", "metric", "value"]), 0.01, {})
    figure = plots.frontier(made, x="robust accuracy", y="RMIA: found at 0.1 %")
    assert figure.layout.yaxis.title.text.startswith("found at 0.1 % false positives, %")


def test_lines_over_names_and_over_numbers():
    named = plots.lines(["clean", "FGSM"], {"a": [0.9, 0.5]}, x_title="attack", y_title="accuracy")
    assert list(named.data[0].x) == ["clean", "FGSM"] and named.layout.xaxis.type != "linear"
    axis = plots.lines([0.5, 10], {"a": [1, 2]}, x_title="x", y_title="y", log_x=True).layout.xaxis
    assert axis.type == "log" and {"0.5", "1", "20"} <= set(axis.ticktext)  # in full, not a 5 between the powers of ten
    assert [float(t) for t in axis.ticktext] == pytest.approx(list(axis.tickvals))


def test_histogram_counts_everybody_once():
    values = np.random.default_rng(1).normal(size=500)
    assert sum(plots.histogram(values, threshold=1.0).data[0].y) == 500


def test_scatter_separates_the_flagged():
    x, flagged = np.arange(6.0), np.arange(6) > 3
    figure = plots.scatter(x, -x, x_title="x", y_title="y", flagged=flagged)
    assert [len(t.x) for t in figure.data] == [4, 2]


@pytest.mark.parametrize("channels", [1, 3])
def test_mosaic_puts_each_picture_in_its_place(channels):
    images = np.random.default_rng(2).random((5, channels, 4, 6))
    canvas = plots.mosaic(images, columns=3)
    assert canvas.shape[:2] == (9, 20)
    for i, image in enumerate(images):
        top, left = (i // 3) * 5, (i % 3) * 7
        part = canvas[top : top + 4, left : left + 6]
        assert np.allclose(part if channels == 1 else part.transpose(2, 0, 1), image[0] if channels == 1 else image)
    figure = plots.gallery(images, [f"picture {i}" for i in range(5)], columns=3)
    assert list(figure.data[1].text) == [f"picture {i}" for i in range(5)]


def test_a_gallery_writes_the_first_word_of_each_caption_below_its_picture():
    images = np.random.default_rng(2).random((5, 1, 28, 28))
    captions = ["7, score 0.1", "found: a member", "wrong: no member", "T-shirt/top, score 1", "Ankle boot"]
    picture, hover, words = plots.gallery(images, captions, columns=3).data
    assert list(words.text) == ["7", "found", "wrong", "T-shirt/top", "Ankle"] and words.mode == "text"
    assert list(hover.text) == captions and list(words.x) == list(hover.x)
    canvas = np.array(picture.z)
    for image, (x, y), below in zip(images, zip(hover.x, hover.y, strict=True), words.y, strict=True):
        top, left = round(y - 13.5), round(x - 13.5)
        assert np.allclose(canvas[top : top + 28, left : left + 28], image[0], atol=1e-3)
        free = canvas[top + 28 : top + 28 + 9, left : left + 28]  # and the word stands in its middle
        assert (free == 1).all() and abs(below - (top + 28 + 4)) <= 0.5


def test_figures_are_small_data_and_not_a_megabyte_of_javascript(report):
    assert pio.renderers.default == "plotly_mimetype"
    assert len(json.dumps(plots.frontier(report).to_plotly_json(), default=str)) < 20_000


def test_a_kernel_may_still_import_what_plots_left_out():
    """Addresses' grammar is kept out of plotly's import only: a later import must not meet a module that is None."""
    script = (
        "import sys, types; sys.modules['ipykernel'] = types.ModuleType('ipykernel'); from demem_lab import plots; "
        "assert 'nbformat' in sys.modules and 'rfc3987_syntax' not in sys.modules; import nbformat; nbformat.validate"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_heat_map_writes_no_minus_zero_and_nothing_where_nothing_is():
    drawn = plots.heat(np.array([[-0.04, 1.26], [np.nan, -0.7]]), ["a", "b"], ["c", "d"]).data[0]
    assert [list(row) for row in drawn.text] == [["+0.0", "+1.3"], ["", "-0.7"]] and drawn.texttemplate == "%{text}"
