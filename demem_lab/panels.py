"""Live panels: a few controls, one figure, one read-out. Results come in, nothing is trained and nothing plotted here.

A panel is a pure function from a position to a result (`nearest_point`, `Plane.nearest`), a figure from
`views`, and a thin class that joins them. Each slider has a number box beside it for the keyboard; the read-out says in
words what the figure shows.

>>> panel = NoisePanel(points)                            # shows itself in JupyterLab          # doctest: +SKIP
>>> panel.noise.value = 0.8; panel.readout.value          # the nearest trained point, in words # doctest: +SKIP
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from demem_lab import views
from demem_lab.controls import Panel, number
from demem_lab.data import Dataset
from demem_lab.sweep import Plane
from demem_lab.validate import finite

PICTURES = 48


class NoisePanel(Panel):
    """Noise multiplier -> epsilon, accuracy, robustness and leakage, from trained points.

    points: as in `views.noise_view`, each also with "guarantee" (text); ascending noise multipliers.
    """

    def __init__(self, points: Sequence[Mapping]) -> None:
        self.points = list(points)
        largest = self.points[-1]["noise_multiplier"]
        self.noise, box = number("noise multiplier", 0.0, largest, min(1.0, largest), step=largest / 60)
        chosen = nearest_point(self.points, self.noise.value)
        super().__init__((self.noise,), (box,), views.noise_view(self.points, chosen))

    def update(self) -> str:
        chosen = nearest_point(self.points, self.noise.value)
        with self.figure.batch_update():
            for shape in self.figure.layout.shapes:
                shape.update(x0=chosen, x1=chosen)
        point = self.points[chosen]
        return f"{_asked(self.noise.value, point)}{_table(point)}<p>{html.escape(point['guarantee'])}</p>"


class PlanePanel(Panel):
    """Noise multiplier x risk threshold over the trained plane: who is protected, what it costs, what is promised."""

    def __init__(self, plane: Plane, dataset: Dataset) -> None:
        self.plane, self.dataset = plane, dataset
        noises, _ = views.plane_axes(plane)
        low, high = float(plane.scores.min()), float(plane.scores.max())
        step = (high - low) / 200
        self.noise, first = number("noise multiplier", 0.0, noises[-1], min(1.0, noises[-1]), step=noises[-1] / 60)
        start = float(np.quantile(plane.scores, 0.9))
        self.threshold, second = number("risk threshold", low - step, high + step, start, step=step)
        chosen = self._chosen()
        figure = views.plane_view(plane, chosen, protected_images(plane, dataset, chosen))
        super().__init__((self.noise, self.threshold), (first, second), figure)

    def _chosen(self) -> Mapping:
        return self.plane.nearest(noise_multiplier=self.noise.value, risk_threshold=self.threshold.value)

    def update(self) -> str:
        chosen = self._chosen()
        marks, images = views.plane_mark(self.plane, chosen), protected_images(self.plane, self.dataset, chosen)
        with self.figure.batch_update():
            for trace in self.figure.data:
                if trace.name in ("map mark", "chosen"):
                    trace.update(marks["map" if trace.name == "map mark" else "frontier"])
            self.figure.data[-1].update({"z": views.protected_picture(images).z})
        wanted = int((self.plane.scores >= self.threshold.value).sum())
        asked = _asked(self.noise.value, chosen)
        who = (
            f"At or above threshold {self.threshold.value:.3g} lie {wanted:,} of {self.dataset.n:,} samples; nearest trained "
            f"set: the <b>{int(chosen['protected']):,}</b> riskiest. "
        )
        if not chosen["protected"]:
            asked = "<b>Nobody is protected</b>: no noise is added, whatever the slider says. "
        return f"{who}{asked}{_table(chosen)}<p>{html.escape(chosen['guarantee'])}</p>"


def protected_images(plane: Plane, dataset: Dataset, chosen: Mapping) -> np.ndarray:
    """Up to 48 of the samples protected at a point of the plane, from the lowest to the highest risk, [K, C, H, W]."""
    order = np.argsort(-plane.scores, kind="stable")[: int(chosen["protected"])][::-1]
    picked = np.unique(np.linspace(0, len(order) - 1, PICTURES).round().astype(int)) if len(order) else []
    return dataset.x[torch.as_tensor(order[picked].copy() if len(order) else [], dtype=torch.int64)].numpy()


def nearest_point(points: Sequence[Mapping], noise_multiplier: float) -> int:
    """Index of the trained point whose noise multiplier is nearest. ValueError unless it is finite and >= 0."""
    finite("noise_multiplier", noise_multiplier, low=0)
    return min(range(len(points)), key=lambda i: abs(points[i]["noise_multiplier"] - noise_multiplier))


def _asked(noise: float, point: Mapping) -> str:
    trained = point["noise_multiplier"]
    if abs(noise - trained) < 1e-9:
        return f"Trained at noise multiplier <b>{trained:g}</b>. "
    return f"You asked for noise multiplier {noise:.3g}; the nearest trained point is <b>{trained:g}</b>. "


def _table(point: Mapping) -> str:
    def show(name: str) -> str:
        value = point.get(name)
        return "not resolved" if value is None or value != value else f"{100 * value:.1f} %"

    rows = [
        ("clean accuracy", "accuracy", None, None), ("robust accuracy", "robust", "robust, high risk", "robust, rest"),
        ("members found (LiRA)", "leak", "leak, high risk", "leak, rest"),
    ]
    body = "".join(
        f"<tr><th scope='row' style='text-align:left'>{label}</th>"
        + "".join(f"<td style='padding:0 1em;text-align:right'>{show(c) if c else ''}</td>" for c in columns) + "</tr>"
        for label, *columns in rows
    )
    head = "<tr><th></th>" + "".join(
        f"<th scope='col' style='padding:0 1em'>{name}</th>" for name in ("everybody", "high risk*", "the rest*")
    ) + "</tr>"
    return f"<table>{head}{body}</table><small>* robust accuracy by group is that of members</small>"
