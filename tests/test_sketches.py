"""A figure that followed sketches is the figure that would be drawn anew."""

import json

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from plotly.utils import PlotlyJSONEncoder
from test_answers import ensemble
from torch import nn

from demem_lab import controls, data
from demem_lab import views_risk as views
from demem_lab.panels_risk import AttackPanel, LeakPanel, RiskGallery
from demem_lab.sketches import Sketch, grid, moved


@pytest.fixture(autouse=True)
def fresh_session(monkeypatch):
    monkeypatch.setattr(controls, "_positions", {})


@pytest.fixture
def panels(tiny):
    torch.manual_seed(3)
    run = ensemble(1, n=120)
    x = torch.rand(120, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    dataset = data.Dataset("made", x, torch.tensor(run.y), ("a", "b", "c"), "made", 0.1)
    cheap = {"a cheap score": np.random.default_rng(0).random(120), "another": np.arange(120.0)}
    return {
        "attack": AttackPanel(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), tiny),
        "leak": LeakPanel({"first": run, "second": ensemble(2, n=120)}),
        "gallery": RiskGallery(dataset, [run], cheap),
    }


def anew(name, panel):
    if name == "attack":
        return views.attack_view(panel.answer(), panel.dataset.classes)
    return views.leak_view(panel.answer(), panel.model.value) if name == "leak" else panel._draw()


def content(figure):
    """What of a figure can move, as text."""
    layout = figure.to_dict()["layout"]
    axes = {k: (v.get("title"), v.get("tickvals"), v.get("ticktext")) for k, v in layout.items() if k[1:5] == "axis"}
    notes = [note["text"] for note in layout["annotations"]]
    traces = {f"trace {k}": trace for k, trace in enumerate(figure.to_dict()["data"])}
    for trace in traces.values():
        trace.pop("uid", None)
    moving = {**traces, **axes, "notes": notes}
    return json.loads(json.dumps(moving, cls=PlotlyJSONEncoder))


MOVES = {
    "attack": [("steps", 3), ("eps", 0.0), ("eps", 0.27), ("image", 0), ("attack", "FGSM"), ("attack", "none"), ("steps", 20)],
    "leak": [
        ("share", 0.0), ("share", 40.0), ("target", 3), ("model", "second"), ("attack", "one threshold a class"),
        ("query", "clean images"),
    ],
    "gallery": [
        ("share", 0.0), ("share", 100.0), ("rank", 7), ("by", "another"), ("cheap", "another"), ("sample", 11), ("share", 5.0),
    ],
}


@pytest.mark.parametrize("name", MOVES)
def test_a_figure_that_followed_is_the_figure_drawn_anew(panels, name):
    panel = panels[name]
    for control, value in MOVES[name]:
        getattr(panel, control).value = value
        for (what, found), (_, wanted) in zip(content(panel.figure).items(), content(anew(name, panel)).items(), strict=True):
            assert found == wanted, (control, value, what)


def test_only_what_changed_is_touched(monkeypatch):
    def drawn(sketch, y):
        figure = grid(sketch, rows=1, cols=2, subplot_titles=("left", f"right {y}"))
        figure.add_scatter(x=[1, 2], y=[3, 4], name="still", row=1, col=1)
        figure.add_scatter(x=[1], y=[y], name="moves", row=1, col=2)
        return figure.update_xaxes(title=f"at {y}", row=1, col=2)

    live = drawn(False, 1)
    moved(live, drawn(True, 1))
    wanted, touched = content(drawn(False, 2)), []
    update = go.Scatter.update

    def seen(self, values):
        touched.append((self.name, set(values)))
        return update(self, values)

    monkeypatch.setattr(go.Scatter, "update", seen)
    moved(live, drawn(True, 2))
    assert touched == [("moves", {"y"})] and content(live) == wanted
    moved(live, drawn(True, 2))
    assert len(touched) == 1


def test_axes_are_numbered_as_plotly_numbers_them():
    specs = [[{"colspan": 3}, None, None], [{}, {}, {}]]
    figure, sketch = (grid(s, rows=2, cols=3, specs=specs) for s in (False, True))
    assert isinstance(sketch, Sketch) and sketch.notes == []
    for (row, col), number in sketch.numbers.items():
        assert figure.get_subplot(row, col).xaxis.plotly_name == f"xaxis{number}"
