"""Live panels: a few controls, one figure, one read-out. Results come in, nothing is trained and nothing plotted here.

A panel is a pure function from a position to a result (`attack_result`), a figure from `views`, and a thin class that
joins them. Each slider has a number box beside it for the keyboard; the read-out says in
words what the figure shows.

>>> panel = AttackPanel(net, digits)                      # shows itself in JupyterLab          # doctest: +SKIP
>>> panel.steps.value = 20; panel.readout.value           # what the attack did, in words       # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
import torch

from demem_lab import views
from demem_lab.attacks import PGD
from demem_lab.controls import Panel, number, whole
from demem_lab.data import Dataset

PICTURES = 48


class AttackPanel(Panel):
    """Pick an image, an attack radius and a number of steps: see what the attack does to one model's mind."""

    def __init__(self, net, dataset: Dataset, *, eps: float | None = None, rows: Sequence[int] | None = None) -> None:
        self.net, self.dataset = net, dataset
        self.rows = list(range(dataset.n)) if rows is None else list(rows)
        radius = dataset.eps if eps is None else eps
        self.image, first = whole("image", 0, len(self.rows) - 1, 0)
        self.eps, second = number("attack radius eps", 0.0, 3 * radius, radius, step=radius / 10)
        self.steps, third = whole("PGD steps", 1, 40, 10)
        super().__init__((self.image, self.eps, self.steps), (first, second, third), self._draw(self._result()))

    def _result(self) -> dict:
        row = self.rows[self.image.value]
        x, y = self.dataset.x[row : row + 1], self.dataset.y[row : row + 1]
        return attack_result(self.net, x, y, eps=self.eps.value, steps=self.steps.value)

    def _draw(self, found: dict) -> go.Figure:
        seen = found["clean"], found["moved"], found["before"], found["after"]
        return views.attacked(*seen, self.dataset.classes, eps=found["eps"])

    def update(self) -> str:
        found = self._result()
        new = views.attack_traces(
            found["clean"], found["moved"], found["before"], found["after"], self.dataset.classes, eps=found["eps"]
        )
        with self.figure.batch_update():
            for old, trace in zip(self.figure.data, new, strict=True):
                old.update({"y": trace.y} if trace.type == "bar" else {"z": trace.z})
        names = self.dataset.classes
        right, was, now = names[found["label"]], names[found["before"].argmax()], names[found["after"].argmax()]
        return (
            f"Label <b>{right}</b>. Before: {was} ({found['before'].max():.0%}). After {self.steps.value} steps within "
            f"{self.eps.value:.3g}: <b>{now}</b> ({found['after'].max():.0%}){'' if now == right else ', fooled'}."
        )


def attack_result(net, x: torch.Tensor, y: torch.Tensor, *, eps: float, steps: int) -> dict:
    """One image [1, C, H, W] attacked: clean and moved [C, H, W], probabilities [K] before and after, label, eps."""
    moved = PGD(eps, steps, random_start=False)(net, x, y)
    with torch.no_grad():
        before, after = net(x).softmax(-1)[0].double().numpy(), net(moved).softmax(-1)[0].double().numpy()
    return {
        "clean": x[0].numpy(), "moved": moved[0].numpy(), "before": before, "after": after, "label": int(y[0]), "eps": eps,
    }
