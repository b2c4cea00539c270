"""The Budget panel (what noise promises and costs) and the DeMem panel (whom to protect, and how much).

A panel joins results at a position, a figure from `views_privacy` and words from `words_privacy`. Nothing is trained when a
control moves; the DeMem panel trains exactly the sliders' position when its button is pressed, in a thread, and stops
within a step when asked to.

>>> panel = BudgetPanel(points, plain, batch_size=64, sampling_rate=0.071, steps=420, delta=1e-4)     # doctest: +SKIP
>>> panel.noise.value = 0.8; panel.readout.value                                                   # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import html
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import ipywidgets as widgets
import numpy as np
import torch

from demem_lab import accounting, views_privacy
from demem_lab.accounting import Budget
from demem_lab.comparison import Comparison
from demem_lab.controls import Panel, number, whole
from demem_lab.experiment import Experiment
from demem_lab.live import Background, Curve
from demem_lab.sweep import Plane, train_point
from demem_lab.words_privacy import (
    Setting,
    budget_details,
    budget_words,
    demem_details,
    demem_words,
    nearest_point,
    next_layer,
)

PLD_SECONDS = 20
CURVE_POINTS = 16
REST = 0.5  # seconds without a move until the curve is computed: it must not compete with the answer to the next key

# planes with the points that were trained in this session, by their first sweep: a cell that is run again makes a new panel
_grown: dict[str, Plane] = {}


class _Threaded(Panel):
    """A panel that threads write to as well as controls, one at a time; with `details` to read below the figure."""

    def __init__(self, controls, boxes, figure) -> None:
        self._lock = threading.RLock()
        self.details = widgets.HTML()
        super().__init__(controls, boxes, figure)
        self.figure._config = {**self.figure._config, "responsive": True}  # else 700 pixels, whatever the screen
        self.widget.children = (*self.widget.children, self.details)

    def _changed(self, change) -> None:
        with self._lock:
            super()._changed(change)


class BudgetPanel(_Threaded):
    """Noise multiplier, batch size, steps and delta -> epsilon, at once; what it costs where something was trained.

    points: dicts as in `views_privacy.budget_view`, each also with "budget" (a Budget or NoGuarantee) and "guarantee" (text).
    plain: the same columns without privacy. batch_size, sampling_rate, steps, delta: what the points were trained with;
    members = batch_size / sampling_rate. seconds: how long PLD may take when its button is pressed.
    """

    def __init__(
        self, points: Sequence[Mapping], plain: Mapping, *, batch_size: int, sampling_rate: float, steps: int,
        delta: float, seconds: float = PLD_SECONDS,
    ) -> None:
        self.points, self.plain, self.seconds = list(points), plain, seconds
        self.members = members = batch_size / sampling_rate
        self.groups = tuple(name.removeprefix("robust, ") for name in plain if name.startswith("robust, "))
        self.trained = Setting(0.0, batch_size, members, steps, delta)
        self.tight = {
            replace(self.trained, noise_multiplier=p["noise_multiplier"]): p["budget"] for p in self.points
            if isinstance(p["budget"], Budget) and p["budget"].accountant == "PLD"
        }
        largest = 2 * self.points[-1]["noise_multiplier"]
        self.sigmas = np.geomspace(0.3, max(largest, 1.0), CURVE_POINTS)
        self._curves, self._drawing = {}, None
        self.noise, first = number("noise multiplier", 0.0, largest, min(1.0, largest), step=0.05)
        self.batch, second = whole("batch size", 1, int(members), batch_size)
        self.steps, third = whole("training steps", 1, 10 * steps, steps)
        self.power, fourth = number("delta: ten to the", -8.0, -2.0, math.log10(delta), step=0.25)
        self.button = widgets.Button(
            description="tight epsilon (PLD)", tooltip=f"compute the tight epsilon here, in at most {seconds:g} seconds",
            layout={"width": "200px"},
        )
        self.button.on_click(self._tighten)
        self.status = widgets.HTML()
        self._curve_of(self.setting, wait=True)
        figure = views_privacy.budget_view(self.points, self.groups, self.marks())
        rows = (widgets.HBox([first, second]), widgets.HBox([third, fourth]), widgets.HBox([self.button, self.status]))
        super().__init__((self.noise, self.batch, self.steps, self.power), rows, figure)

    @property
    def setting(self) -> Setting:
        """Where the controls stand."""
        delta = 10**self.power.value
        if math.isclose(delta, float(f"{delta:.3g}")):
            delta = float(f"{delta:.3g}")  # as one writes it: 1e-4, not its neighbour
        return Setting(self.noise.value, self.batch.value, self.members, self.steps.value, delta)

    def update(self) -> str:
        views_privacy.moved(self.figure, self.marks())
        chosen = self.points[nearest_point(self.points, self.noise.value)]
        loose = accounting.budget(**self.setting.asked, accountant="RDP")
        self.details.value = budget_details(chosen, self.plain, self.groups)
        return budget_words(self.setting, loose, self.tight.get(self.setting), chosen, trained=self.trained)

    def marks(self, noise_multiplier: float | None = None) -> dict[str, dict]:
        """What the figure shows where the controls stand, or at another noise multiplier."""
        setting = self.setting
        if noise_multiplier is not None:
            setting = replace(setting, noise_multiplier=noise_multiplier)
        found = accounting.budget(**setting.asked, accountant="RDP")
        return views_privacy.budget_marks(
            self.points, self.plain, self.groups, chosen=nearest_point(self.points, setting.noise_multiplier),
            curve=self._curve_of(setting), spot=(setting.noise_multiplier, getattr(found, "epsilon", None)),
            tight=[
                (s.noise_multiplier, b.epsilon) for s, b in self.tight.items()
                if isinstance(b, Budget) and b.accountant == "PLD" and replace(s, noise_multiplier=0.0) == _rest(setting)
            ],
        )

    def _curve_of(self, setting: Setting, *, wait: bool = False) -> tuple[list[float], list[float | None]]:
        """The curve where it is known. Else none for now: it takes half a second, and is drawn by a thread when ready."""
        key = _rest(setting)
        known = self._curves.get(key)
        if known is None and (wait or any(k.batch_size == key.batch_size for k in self._curves)):
            known = self._curves[key] = self._computed(key)  # the same sampling rate: milliseconds
        if known is None and (self._drawing is None or not self._drawing.running):
            self._drawing = Background(lambda watch: self._computed_at_rest(), on_change=self._drawn)
        return (self.sigmas.tolist(), known) if known is not None else ([], [])

    def _computed_at_rest(self) -> tuple[Setting, list[float | None]]:
        """The curve of the position at which the controls were left alone; given up at the next point when they move on."""
        curve = None
        while curve is None:
            key = _rest(self.setting)
            time.sleep(REST)
            curve = self._computed(key, wanted=lambda key=key: _rest(self.setting) == key)
        return key, curve

    def _computed(self, key: Setting, *, wanted: Callable[[], bool] = lambda: True) -> list[float | None] | None:
        curve, asked = [], {name: value for name, value in key.asked.items() if name != "noise_multiplier"}
        for sigma in self.sigmas.tolist():
            if not wanted():
                return None
            curve += [getattr(b, "epsilon", None) for b in accounting.epsilon_curve([sigma], **asked)]
        return curve

    def _drawn(self, job: Background) -> None:
        with self._lock:
            if job.error is not None:
                self.status.value = _red(job.error)
                return
            key, curve = job.result
            self._curves[key] = curve
            self._changed(None)

    def _tighten(self, _) -> None:
        setting = self.setting
        self.button.disabled = True
        self.status.value = f"computing the tight epsilon, at most {self.seconds:g} s …"
        self.job = Background(
            lambda watch: (setting, accounting.budget_in_time(self.seconds, **setting.asked)), on_change=self._tightened
        )

    def _tightened(self, job: Background) -> None:
        with self._lock:
            self.button.disabled = False
            if job.error is not None:
                self.status.value = _red(job.error)
                return
            setting, found = job.result
            self.tight[setting] = found
            late = isinstance(found, Budget) and found.accountant == "RDP"
            self.status.value = f"PLD was not ready after {self.seconds:g} s; the RDP bound stands" if late else str(found)
            self._changed(None)


class DeMemPanel(_Threaded):
    """Noise multiplier x risk threshold over the trained plane: who is protected, what it costs, what is promised.

    report: the other arms, measured like the plane. A button trains exactly where the sliders stand; what it trained is on
    the chart of every panel that is made of the same plane later in this session.
    """

    def __init__(self, lab: Experiment, plane: Plane, report: Comparison | None = None) -> None:
        self._sweep = _content(plane)
        self.lab, self.plane, self.report = lab, _grown.get(self._sweep, plane), report
        self.job: Background | None = None
        self.curve = self._new_curve()
        noises, _ = views_privacy.plane_axes(plane)
        low, high = float(plane.scores.min()), float(plane.scores.max())
        self.noise, first = number("noise multiplier", 0.0, noises[-1], min(1.0, noises[-1]), step=noises[-1] / 60)
        step = float(f"{max(high - low, 1e-6) / 200:.0e}")  # one digit: the box shows a number that one can read
        low, high = (math.floor(low / step) - 1) * step, (math.ceil(high / step) + 1) * step
        ends = (float(f"{v:.6g}") for v in (low, high))
        self.threshold, second = number("risk threshold", *ends, _short_threshold(plane.scores, 0.9), step=step)
        self.train = widgets.Button(
            description="train this point", button_style="primary", layout={"width": "170px"},
            tooltip="train exactly where the sliders stand, and put the point on the chart",
        )
        self.cancel = widgets.Button(
            description="cancel", tooltip="stop the training; the same point continues from here", disabled=True
        )
        self.train.on_click(self._start)
        self.cancel.on_click(lambda _: self.job.cancel())
        self.bar = widgets.FloatProgress(min=0.0, max=1.0, description="trained", layout={"width": "300px"})
        self.status = widgets.HTML()
        figure = views_privacy.demem_view(self.plane, report, self.marks(self._chosen()))
        buttons = widgets.HBox([self.train, self.cancel, self.bar])
        super().__init__((self.noise, self.threshold), (first, second, buttons, self.status), figure)

    def _chosen(self):
        return self.plane.nearest(noise_multiplier=self.noise.value, risk_threshold=self.threshold.value)

    def marks(self, chosen, sliders: tuple[float, int] | None = None) -> dict[str, dict]:
        """What the figure shows at a row of the plane's points."""
        layer = next_layer(self.plane, chosen, risk_threshold=self.threshold.value)
        return views_privacy.demem_marks(
            self.plane, chosen, protected=protected_images(self.plane, self.lab.dataset, chosen),
            surfaced=_images(self.lab.dataset, layer["index"][: views_privacy.PICTURES]), sliders=sliders,
            curve=self.curve.points(),
        )

    def _sliders(self) -> tuple[float, int]:
        return self.noise.value, int((self.plane.scores >= self.threshold.value).sum())

    def update(self) -> str:
        chosen = self._chosen()
        views_privacy.moved(self.figure, self.marks(chosen, self._sliders()))
        where = {"noise_multiplier": self.noise.value, "risk_threshold": self.threshold.value}
        self.details.value = demem_details(self.plane, chosen, risk_threshold=where["risk_threshold"])
        return demem_words(self.plane, chosen, **where)

    def _new_curve(self) -> Curve:
        return Curve(self.lab.dataset, attack=replace(self.lab.attack, random_start=False))

    def _start(self, _) -> None:
        noise, threshold, plane = self.noise.value, self.threshold.value, self.plane
        self.train.disabled, self.cancel.disabled = True, False
        self.curve, self.bar.value, self.bar.bar_style = self._new_curve(), 0.0, ""
        self.position = noise, threshold
        self.status.value = _said("starting …")

        def task(watch):
            lab = replace(self.lab, watch=watch, progress=False)
            return train_point(lab, plane, noise_multiplier=noise, risk_threshold=threshold)

        self.job = Background(task, on_step=self.curve.add, on_change=self._live)

    def _live(self, job: Background) -> None:
        with self._lock:
            if not job.running:
                self._ended(job)
                return
            points = self.curve.points()
            self.bar.value = self.curve.progress
            latest = f"; robust {100 * points['robust'][-1]:.1f} %, loss {points['loss'][-1]:.3g}" if points["epoch"] else ""
            self.status.value = _said(f"{html.escape(self.curve.label)}: {self.curve.progress:.0%}{latest}")
            views_privacy.moved(self.figure, views_privacy.curve_marks(points))

    def _ended(self, job: Background) -> None:
        self.train.disabled, self.cancel.disabled = False, True
        noise, threshold = self.position
        count = int((self.plane.scores >= threshold).sum())
        where = f"noise multiplier {noise:.3g}, {count:,} protected"
        if job.outcome == "cancelled":
            self.bar.bar_style = "warning"
            text = f"cancelled at {self.curve.progress:.0%}; the chart is as it was, and the same point would continue from here"
        elif job.outcome == "failed":
            self.bar.bar_style, text = "danger", _red(job.error)
        else:
            self.bar.value, self.bar.bar_style = 1.0, "success"
            new = job.result is not self.plane
            fresh = bool(self.curve.points()["epoch"])
            text = f"{'trained' if fresh else 'found in the store'}: {where}" if new else f"already on the chart: {where}"
            self.plane = _grown[self._sweep] = job.result
            with self.held():
                self.noise.value, self.threshold.value = self.position
        self.status.value = _said(text)
        self._changed(None)


def protected_images(plane: Plane, dataset, chosen: Mapping, *, count: int = views_privacy.PICTURES) -> np.ndarray:
    """Up to `count` of the samples protected at a point of the plane, from the lowest to the highest risk, [K, C, H, W]."""
    order = np.argsort(-plane.scores, kind="stable")[: int(chosen["protected"])][::-1]
    picked = np.unique(np.linspace(0, len(order) - 1, count).round().astype(int)) if len(order) else []
    return _images(dataset, order[picked] if len(order) else np.empty(0, dtype=int))


def _content(plane: Plane) -> str:
    """The same for planes with the same members, scores and numbers, whichever object holds them."""
    swept = plane.points[~plane.points["added"]]
    parts = swept.to_csv().encode(), plane.scores.tobytes(), plane.after[: len(swept)].tobytes(), str(plane.seed).encode()
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _short_threshold(scores: np.ndarray, quantile: float) -> float:
    """The quantile with as few decimals as name the same samples."""
    exact = float(np.quantile(scores, quantile))
    short = (math.floor(exact * 10**d) / 10**d for d in range(2, 9))
    return next((v for v in short if (scores >= v).sum() == (scores >= exact).sum()), exact)


def _rest(setting: Setting) -> Setting:
    return replace(setting, noise_multiplier=0.0)


def _images(dataset, index: np.ndarray) -> np.ndarray:
    return dataset.x[torch.as_tensor(np.array(index), dtype=torch.int64)].numpy()


def _said(text: str) -> str:
    return f'<div role="status" aria-live="polite">{text}</div>'


def _red(error: Exception) -> str:
    return f'<b style="color:#a31515">{html.escape(type(error).__name__)}: {html.escape(str(error))}</b>'
