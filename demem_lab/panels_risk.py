"""Live panels of notebooks 01 to 03: what an attack does, what a model gives away, and who is at risk.

A panel asks `answers` for the answer at its position, `views_risk` for the figure, and says the same in words.

>>> panel = AttackPanel(net, data)                        # any torch module from images to logits     # doctest: +SKIP
>>> panel.eps.value = 0.05; panel.readout.value           # what the attack did, in words              # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ipywidgets as widgets
import numpy as np
import torch

from demem_lab import answers
from demem_lab import views_risk as views
from demem_lab.attacks import PGD, check_query, predictions
from demem_lab.comparison import finest_fpr
from demem_lab.controls import Panel, number, whole
from demem_lab.data import Dataset
from demem_lab.sketches import moved
from demem_lab.tables import Run


class AttackPanel(Panel):
    """Pick an image, an attack, a radius and a number of steps: see what happens to one model's mind, step by step.

    net: any module from images [B, C, H, W] in [0, 1] to logits [B, classes], yours too. rows: which images to offer. eps:
    the radius that "fooled" refers to and that the panel starts at.
    """

    def __init__(self, net, dataset: Dataset, *, eps: float | None = None, rows: Sequence[int] | None = None) -> None:
        self.net, self.dataset = net, dataset
        self.rows = np.arange(dataset.n) if rows is None else np.asarray(rows)
        radius = dataset.eps if eps is None else eps
        self.groups = _groups(net, dataset, self.rows, radius)
        fooled = next((name for name in self.groups if name.startswith("fooled")), None)  # an attack that does something
        self.show = _dropdown("images", list(self.groups), start=fooled)
        self.image, first = whole("image", 0, len(self.groups[self.show.value]) - 1, 0)
        widgets.link((self.image, "max"), (first.children[1], "max"))
        self.attack = _dropdown("attack", list(answers.ATTACKS))
        self.eps, second = number("attack radius eps", 0.0, 3 * radius, radius, step=radius / 10)
        self.steps, third = whole("steps", 1, 40, 10)
        self.show.observe(self._narrow, names="value")
        controls = self.show, self.image, self.attack, self.eps, self.steps
        super().__init__(
            controls, (widgets.HBox([self.show, self.attack]), first, second, third),
            views.attack_view(self.answer(), dataset.classes),
        )

    @property
    def row(self) -> int:
        """Which image of the data set is shown."""
        return int(self.groups[self.show.value][self.image.value])

    def answer(self) -> answers.AttackPath:
        """The image along the attack, at the controls' position."""
        x, y = self.dataset.x[self.row : self.row + 1], self.dataset.y[self.row : self.row + 1]
        attack = answers.ATTACKS[self.attack.value](self.eps.value, self.steps.value, x[0].numel())
        return answers.attack_path(self.net, x, y, attack)

    def update(self) -> str:
        path, names = self.answer(), self.dataset.classes
        moved(self.figure, views.attack_view(path, names, sketch=True))
        p, kind = path.probabilities, self.attack.value
        was, now = (f"<b>{names[int(q.argmax())]}</b> ({q.max():.0%})" for q in (p[0], p[-1]))
        label = f"Image {self.row}, label <b>{names[path.label]}</b>. Before: the model says {was}."
        if kind == "none":
            return f"{label} No attack."
        how = f"{kind}, {len(p) - 1} step{'s' if len(p) > 2 else ''}, eps {self.eps.value:.3g}"
        if kind == "FGSM":
            how += " (it takes one step, whatever the slider says)"
        if kind == "PGD, L2":
            length = self.eps.value * path.change.size**0.5
            how += f" as the root mean square of a pixel's change (L2 radius {length:.3g})"
        first = next((t for t, q in enumerate(p) if int(q.argmax()) != path.label), None)
        end = "not fooled"
        if path.fooled:
            end = f"fooled{f' from step {first} on' if _stays_wrong(p, path.label, first) else ''}"
        if first == 0:
            end = "wrong before the attack already"
        return f"{label} After {how}: {now}, {end}."

    def _narrow(self, _) -> None:
        with self.held():
            self.image.max = len(self.groups[self.show.value]) - 1


class LeakPanel(Panel):
    """Choose what the attacker reads and does, and how many he accuses: see whom he hits, and how it would be reported.

    runs: what to compare, by name, each the models of one kind of training. fpr: the low false positive rate of the honest
    measure; by default the finest that every target's non-members can resolve.
    """

    def __init__(self, runs: Mapping[str, Run], *, fpr: float | None = None) -> None:
        self.runs = dict(runs)
        fewest = min(int((~run.members).sum(1).min()) for run in self.runs.values())
        self.fpr = finest_fpr(fewest) if fpr is None else fpr
        self._known: dict[tuple[str, ...], np.ndarray] = {}
        self.model = _dropdown("model", list(self.runs))
        self.query = _dropdown("asked about", ["attacked images", "clean images"])
        self.signal = _dropdown("signal", list(answers.READ), start="logit margin")
        self.attack = _dropdown("attack", list(answers.MEMBERSHIP))
        self.target, first = whole("target", 0, min(run.models for run in self.runs.values()) - 1, 0)
        self.share, second = number("accuse the top, %", 0.0, 100.0, 5.0, step=0.5)
        controls = self.model, self.query, self.signal, self.attack, self.target, self.share
        rows = widgets.HBox([self.model, self.query]), widgets.HBox([self.signal, self.attack]), first, second
        super().__init__(controls, rows, views.leak_view(self.answer(), self.model.value))

    def answer(self) -> dict[str, answers.Leak]:
        """The attack chosen, on the target chosen of every kind of model."""
        found = {}
        for name, run in self.runs.items():
            scores = self._scores(name)[self.target.value]
            found[name] = answers.leak_at(
                scores, run.members[self.target.value], share=self.share.value / 100, fpr=self.fpr
            )
        return found

    def update(self) -> str:
        found = self.answer()
        leak = found[self.model.value]
        moved(self.figure, views.leak_view(found, self.model.value, sketch=True))
        few = "" if leak.false.mean * leak.false.n >= 5 else " That is fewer than 5 people: the rate is not resolved."
        rate = f"{leak.fpr:.1%}"
        return (
            f"Accused: everybody with a score of {leak.threshold:.3g} or more. Members hit: <b>{_percent(leak.found)}</b>; "
            f"non-members hit: <b>{_percent(leak.false)}</b>.{few} Accuracy here: {_percent(leak.accuracy)}.<br>"
            f"<b>Misleading or honest?</b> Best accuracy {_percent(leak.best_accuracy)}, a coin has 50 %: "
            f"{leak.best_accuracy.mean / 0.5:.2f} times as good. Members found at {rate} false positives: "
            f"{_percent(leak.found_at_fpr)}, guessing has {rate}: <b>{leak.found_at_fpr.mean / leak.fpr:.1f} times as good</b>."
        )

    def _scores(self, name: str) -> np.ndarray:
        key = name, self.query.value, self.signal.value, self.attack.value
        if key not in self._known:
            run = self.runs[name]
            logits = run.clean if self.query.value == "clean images" else run.adversarial
            self._known[key] = answers.membership_scores(
                logits, run.y, run.members, signal=self.signal.value, attack=self.attack.value
            )
        return self._known[key]


class RiskGallery(Panel):
    """The samples along any risk score, a threshold in it, cheap scores against memorization, and one sample by itself.

    Click a picture or a point, or use the controls: `rank` walks along the order, `sample` goes to an index.
    """

    def __init__(self, dataset: Dataset, runs: Sequence[Run], cheap: Mapping[str, np.ndarray]) -> None:
        self.dataset, self.images, self.risks = dataset, dataset.x.numpy(), answers.risks_of(runs, cheap)
        self.by = _dropdown("sort by", list(self.risks.scores))
        self.cheap = _dropdown("cheap score", list(cheap))
        self.share, first = number("threshold: top, %", 0.0, 100.0, 10.0, step=0.5)
        self.rank, second = whole("rank, 1 = riskiest", 1, dataset.n, 1)
        start = int(answers.cut_at(self.risks.scores[self.by.value], share=0).order[0])
        self.sample = widgets.BoundedIntText(
            value=start, min=0, max=dataset.n - 1, description="sample", tooltip="index of the sample in the data set",
            style={"description_width": "130px"}, layout={"width": "260px"},
        )
        self.by.observe(self._find_rank, names="value")
        self.sample.observe(self._find_rank, names="value")
        self.rank.observe(self._find_sample, names="value")
        controls = self.by, self.cheap, self.share, self.sample, self.rank
        rows = widgets.HBox([self.by, self.cheap]), first, second, self.sample
        super().__init__(controls, rows, self._draw())
        for trace in self.figure.data:
            if trace.name in ("pictures", "all samples", "at or above"):
                trace.on_click(self._clicked)

    def answer(self) -> answers.Cut:
        """The order and the threshold, at the controls' position."""
        return answers.cut_at(self.risks.scores[self.by.value], share=self.share.value / 100)

    def update(self) -> str:
        moved(self.figure, self._draw(sketch=True))
        cut, i, risks = self.answer(), self.sample.value, self.risks
        above = "at or above" if i in cut.order[: cut.count] else "below"
        known = views.facts(risks)[i]
        others = ", ".join(f"{name} {values[i]:.3g}" for name, values in risks.scores.items() if name != "memorization")
        return (
            f"By {self.by.value}, <b>{cut.count:,}</b> of {len(risks.y):,} samples lie at or above the threshold "
            f"{cut.threshold:.3g}. <b>Sample {i}</b>, label <b>{self.dataset.classes[int(risks.y[i])]}</b>, rank "
            f"{self.rank.value:,}, {above} it: memorization <b>{known[1]:.2f} ± {known[2]:.2f}</b> (standard error). Under "
            f"attack, models that trained on it give its label {known[3]:.0%} on average (margin {known[5]:.1f}), the others "
            f"{known[4]:.0%} ({known[6]:.1f}). {others[:1].upper()}{others[1:]}."
        )

    def _draw(self, *, sketch: bool = False):
        return views.risk_view(
            self.risks, self.answer(), self.images, self.dataset.classes, by=self.by.value, cheap=self.cheap.value,
            sample=self.sample.value, sketch=sketch,
        )

    def _find_rank(self, _) -> None:
        with self.held():
            self.rank.value = int(np.flatnonzero(self.answer().order == self.sample.value)[0]) + 1

    def _find_sample(self, _) -> None:
        with self.held():
            self.sample.value = int(self.answer().order[self.rank.value - 1])

    def _clicked(self, trace, points, _) -> None:
        if points.point_inds:
            self.sample.value = int(trace.customdata[points.point_inds[0]][0])


def _groups(net, dataset: Dataset, rows: np.ndarray, eps: float) -> dict[str, np.ndarray]:
    """Images to choose from: all, by what PGD does to them, by class; those without an image are left out."""
    x, y = dataset.x[rows], dataset.y[rows]
    weight = next(net.parameters(), None) if isinstance(net, torch.nn.Module) else None
    if weight is not None:
        x, y = x.to(weight.device), y.to(weight.device)
    check_query(net, x[:1], y[:1])
    right = (predictions(net, x) == y).cpu().numpy()
    stands = (predictions(net, PGD(eps, 10, random_start=False)(net, x, y)) == y).cpu().numpy()
    label = dataset.y[rows].numpy()
    found = {
        "all": np.ones(len(rows), dtype=bool), "fooled by PGD-10": right & ~stands, "withstands PGD-10": right & stands,
        "wrong as it is": ~right, **{f"class {name}": label == k for k, name in enumerate(dataset.classes)},
    }
    return {f"{name} ({who.sum()})": rows[who] for name, who in found.items() if who.any()}


def _stays_wrong(p: np.ndarray, label: int, first: int) -> bool:
    return bool((p[first:].argmax(-1) != label).all())


def _dropdown(name: str, options: Sequence[str], *, start: str | None = None) -> widgets.Dropdown:
    return widgets.Dropdown(
        options=options, value=options[0] if start is None else start, description=name, tooltip=name,
        style={"description_width": "130px"}, layout={"width": "400px"},
    )


def _percent(found) -> str:
    return f"{found.mean:.1%} ({found.low:.1%} to {found.high:.1%})"
