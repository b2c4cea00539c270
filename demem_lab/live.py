"""Training one can watch while it happens, in a thread of its own, and stop.

>>> curve = Curve(dataset, attack=PGD(0.1, 3))
>>> job = Background(lambda watch: train(dataset, members, recipe, seeds=seeds, watch=watch), on_step=curve.add)  # doctest: +SKIP
>>> job.cancel(); job.join(); job.outcome                # doctest: +SKIP
'cancelled'

Whoever watches looks at the models between two steps and leaves them as they are, so a watched training ends with exactly
the weights of an unwatched one. What was cancelled is continued, not begun again, when it is asked for another time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from demem_lab.attacks import PGD
from demem_lab.data import Dataset
from demem_lab.networks import Network
from demem_lab.validate import integer

TELL_SECONDS = 0.5  # a browser that is told of every step does nothing else


@dataclass(frozen=True)
class Moment:
    """Some of the models after a step. To be looked at, not to be changed."""

    label: str  # what is being trained
    rows: tuple[int, ...]  # which of the models
    models: int  # how many there are in all
    step: int  # steps done, of `steps`
    steps: int
    epoch: int  # epochs done
    ends_epoch: bool
    net: Network
    members: torch.Tensor  # bool [rows, N]
    losses: torch.Tensor  # [rows] mean training loss of this epoch so far


@dataclass(frozen=True)
class Watch:
    """Who looks on, and a way to stop.

    on_step: called after every step in the thread that trains (several at once on a CPU). stop: once it is set, training
    ends at the next step with KeyboardInterrupt.
    """

    on_step: Callable[[Moment], None] = lambda moment: None
    stop: threading.Event = field(default_factory=threading.Event)


class Curve:
    """Training loss and robust accuracy on unseen samples, epoch by epoch, as `Moment`s come in.

    attack: without random start, so that looking draws no random numbers. samples: how many unseen ones each model is asked
    about, the first of its non-members.
    """

    def __init__(self, dataset: Dataset, *, attack: PGD, samples: int = 100) -> None:
        self.dataset, self.attack = dataset, attack
        self.samples = integer("samples", samples, low=1)
        self.label, self.progress = "", 0.0
        self._lock, self._done = threading.Lock(), {}
        self._epochs: dict[int, list[tuple[int, float, float]]] = {}  # epoch -> (models, sum of losses, sum of accuracies)

    def add(self, moment: Moment) -> None:
        """Take note of a moment; a new label starts a new curve."""
        found = None
        if moment.ends_epoch:
            found = len(moment.rows), float(moment.losses.sum()), float(self._robust(moment).sum())
        with self._lock:
            if moment.label != self.label:
                self.label, self._done, self._epochs = moment.label, {}, {}
            self._done[moment.rows] = moment.step
            self.progress = sum(s * len(r) for r, s in self._done.items()) / (moment.steps * moment.models)
            if found:
                self._epochs.setdefault(moment.epoch, []).append(found)

    def points(self) -> dict[str, list[float]]:
        """{"epoch", "loss", "robust"}: means over the models that got so far; robust as a fraction."""
        with self._lock:
            epochs = sorted(self._epochs)
            sums = [np.sum(self._epochs[e], axis=0) for e in epochs]
        return {"epoch": epochs, "loss": [float(s[1] / s[0]) for s in sums], "robust": [float(s[2] / s[0]) for s in sums]}

    def _robust(self, moment: Moment) -> torch.Tensor:
        net, members = moment.net, moment.members
        count = min(self.samples, int((~members).sum(1).min()))
        index = members.to(torch.uint8).argsort(dim=1, stable=True)[:, :count].cpu()
        x, y = (t[index.flatten()].to(members.device) for t in (self.dataset.x, self.dataset.y))
        x = x.to(next(net.parameters()).dtype)
        net.eval()  # running averages of a batch normalisation must not see these images
        try:
            moved = self.attack(net, x, y)
            with torch.no_grad():
                right = net(moved).argmax(-1) == y
        finally:
            net.train()
        return right.view(len(members), -1).double().mean(1)


class Background:
    """One long task in a thread, which tells when it moved and how it ended.

    task: called with a `Watch`. on_step: as there. on_change: called with this object twice a second while steps come in,
    and once at the end, from the threads that compute. outcome: None while it runs, then "done", "cancelled" or "failed".
    """

    def __init__(
        self, task: Callable[[Watch], Any], *, on_step: Callable[[Moment], None] = lambda moment: None,
        on_change: Callable[[Background], None] = lambda job: None,
    ) -> None:
        self.result: Any = None
        self.error: Exception | None = None
        self.outcome: str | None = None
        self._watch = Watch(self._step)
        self._task, self._on_step, self._on_change = task, on_step, on_change
        self._told = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="demem-live", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.outcome is None

    def cancel(self) -> None:
        """Ask it to stop; it does so at its next step."""
        self._watch.stop.set()

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended."""
        self._thread.join(timeout)

    def _step(self, moment: Moment) -> None:
        self._on_step(moment)
        if time.monotonic() - self._told > TELL_SECONDS:
            self._told = time.monotonic()
            self._on_change(self)

    def _run(self) -> None:
        try:
            self.result = self._task(self._watch)
            self.outcome = "done"
        except KeyboardInterrupt:
            self.outcome = "cancelled"
        except Exception as error:  # kept for whoever shows it: a thread has nobody to raise to
            self.error, self.outcome = error, "failed"
        self._on_change(self)
