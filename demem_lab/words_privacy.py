"""What the Budget panel and the DeMem panel say: a position and results in, words and tables out. No widget, no figure.

>>> setting = Setting(1.0, batch_size=64, members=899, steps=420, delta=1e-4)
>>> accounting.budget(**setting.asked, accountant="RDP").epsilon < 10
True
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from demem_lab import accounting
from demem_lab.accounting import Budget, NoGuarantee, bound
from demem_lab.sweep import Plane
from demem_lab.validate import finite

COMMON = 8.0  # the largest epsilon that is often called a promise


@dataclass(frozen=True)
class Setting:
    """What epsilon depends on, and nothing else."""

    noise_multiplier: float
    batch_size: int
    members: float  # of the mean model
    steps: int
    delta: float

    @property
    def asked(self) -> dict:
        """The arguments of `accounting.budget`."""
        return {
            "noise_multiplier": self.noise_multiplier, "sampling_rate": self.batch_size / self.members, "steps": self.steps,
            "delta": self.delta,
        }


def nearest_point(points: Sequence[Mapping], noise_multiplier: float) -> int:
    """Index of the trained point whose noise multiplier is nearest. ValueError unless it is finite and >= 0."""
    finite("noise_multiplier", noise_multiplier, low=0)
    return min(range(len(points)), key=lambda i: abs(points[i]["noise_multiplier"] - noise_multiplier))


def next_layer(plane: Plane, point, *, risk_threshold: float) -> dict:
    """Who would be the next to protect: as many unprotected samples as are protected (a tenth where nobody is).

    index int [K], riskiest first, by the score under the point's own training; above: how many unprotected samples reach the
    threshold there; control: how many of the same samples reach it, by as many models, where nobody is protected (None
    where that was not trained).
    """
    n, count = len(plane.scores), int(point["protected"])
    index = plane.surfaced(point, count or n // 10)
    outside = np.argsort(-plane.scores, kind="stable")[count:]
    cut = point["risk_threshold"] if np.isfinite(point["risk_threshold"]) else risk_threshold
    nobody = plane.points.index[plane.points["protected"] == 0]
    control = int((plane.after[nobody[0]][outside] >= cut).sum()) if len(nobody) else None
    return {
        "index": index, "threshold": cut, "outside": len(outside), "control": control,
        "above": int((plane.after[point.name][outside] >= cut).sum()),
    }


def budget_words(
    setting: Setting, loose: Budget | NoGuarantee, tight: Budget | NoGuarantee | None, chosen: Mapping, *, trained: Setting
) -> str:
    """The read-out of the Budget panel, as HTML. loose: by RDP; tight: by PLD where it is known; chosen: of the points."""
    rate = setting.batch_size / setting.members
    rate = f"{setting.batch_size:,} of {setting.members:,.0f} members a step (sampling rate {rate:.3g})"
    if isinstance(loose, NoGuarantee):
        promise = f"<b>No guarantee</b>: {html.escape(loose.reason)}."
    else:
        promise, known = f"<b>epsilon ≤ {bound(loose.epsilon)}</b> (RDP, looser)", loose.epsilon
        if isinstance(tight, Budget) and tight.accountant == "PLD":
            promise, known = promise + f"; <b>epsilon {bound(tight.epsilon)}</b> (PLD, tight)", tight.epsilon
        promise += f" at delta {bound(setting.delta)}. {_strength(known)}"
        if setting.delta * setting.members >= 1:
            promise += f" <b>delta is not below 1/{setting.members:,.0f}</b>: publishing one sample at random would pass."
    elsewhere = ""
    if (setting.batch_size, setting.steps) != (trained.batch_size, trained.steps):
        elsewhere = (
            f"It was trained with batch size {trained.batch_size} and {trained.steps:,} steps: the other controls change the "
            "promise, not what was measured."
        )
    return (
        f"{rate}, {setting.steps:,} steps, noise multiplier {setting.noise_multiplier:.3g}: {promise} "
        "<b>The clip norm does not change epsilon</b>: the noise is noise multiplier × clip norm, so both grow together.<br>"
        f"{_asked(setting.noise_multiplier, chosen)}There, robust accuracy {_percent(chosen['robust'])}, members found "
        f"{_percent(chosen['leak'])}. {elsewhere}"
    )


def budget_details(chosen: Mapping, plain: Mapping, groups: Sequence[str]) -> str:
    """Who pays at the chosen trained point, what is promised there, and what no epsilon covers; as HTML."""
    return (
        f"<p>Trained at noise multiplier {chosen['noise_multiplier']:.3g}, one seed:</p>{_payers(chosen, plain, groups)}"
        f"<p><b>The promise there.</b> {html.escape(chosen['guarantee'])}</p>"
        "<p>Accounted for: each single member (added or removed), all steps of one training. Not accounted for: the "
        "learning rate chosen on the same data, and any further model trained on it.</p>"
    )


def demem_words(plane: Plane, chosen, *, noise_multiplier: float, risk_threshold: float) -> str:
    """The read-out of the DeMem panel, as HTML. chosen: a row of `plane.points`."""
    n, count = len(plane.scores), int(chosen["protected"])
    wanted = int((plane.scores >= risk_threshold).sum())
    asked = _asked(noise_multiplier, chosen)
    if not count:
        asked = "<b>Nobody is protected</b>: no noise is added, whatever the slider says. "
    return (
        f"At or above threshold {risk_threshold:.3g} lie {wanted:,} of {n:,} samples; "
        f"{'trained' if wanted == count else 'nearest trained set'}: the <b>{count:,}</b> riskiest. {asked}"
        f"There, robust accuracy <b>{_percent(chosen['robust'])}</b>, members found <b>{_percent(chosen['leak'])}</b>.<br>"
        f"<b>The promise.</b> {html.escape(chosen['guarantee'])}"
    )


def demem_details(plane: Plane, chosen, *, risk_threshold: float) -> str:
    """The numbers by group, and the next layer of the onion; as HTML."""
    layer = next_layer(plane, chosen, risk_threshold=risk_threshold)
    if not layer["outside"]:
        onion = "Everybody is protected: there is no next layer."
    else:
        control = "" if layer["control"] is None else f" ({layer['control']:,} of the same where nobody is protected)"
        onion = (
            f"<b>The next layer</b>: of the {layer['outside']:,} unprotected, <b>{layer['above']:,}</b> score at or above "
            f"{layer['threshold']:.3g} after this training{control}, by these {plane.models} models alone."
        )
    columns = {"everybody": "", "high risk": ", high risk", "the rest": ", rest"}
    table = _table(columns, {
        "clean accuracy": [chosen["accuracy"], "", ""],
        "robust accuracy (by group: of members)": [chosen[f"robust{c}"] for c in columns.values()],
        f"members found at {100 * plane.fpr:g} % false positives": [chosen[f"leak{c}"] for c in columns.values()],
    })
    return f"<p>{onion}</p>{table}"


def _payers(chosen: Mapping, plain: Mapping, groups: Sequence[str]) -> str:
    names = ["", *(f", {g}" for g in groups)]

    def lost(name: str) -> str:
        before, after = plain.get(name), chosen.get(name)
        if before is None or after is None:
            return "not resolved"
        return f"{100 * (after - before):+z.1f}" + (f" ({100 * (after / before - 1):+z.0f} %)" if before else "")

    return _table(["everybody", *groups], {
        "clean accuracy": [chosen["accuracy"], *[""] * len(groups)],
        "robust accuracy, unseen images": [chosen.get(f"robust{n}") for n in names],
        "its change by privacy, points (share)": [lost(f"robust{n}") for n in names],
        f"members found at {100 * chosen['fpr']:g} % false positives": [chosen.get(f"leak{n}") for n in names],
    })


def _table(columns: Sequence[str], rows: Mapping[str, Sequence]) -> str:
    right = "style='padding:0 0.6em;text-align:right;white-space:nowrap'"
    body = "".join(
        f"<tr><th scope='row' style='text-align:left;white-space:nowrap'>{label}</th>"
        + "".join(f"<td {right}>{v if isinstance(v, str) else _percent(v)}</td>" for v in values) + "</tr>"
        for label, values in rows.items()
    )
    head = "".join(f"<th scope='col' style='padding:0 0.6em;text-align:right'>{name}</th>" for name in columns)
    return f"<table><tr><td></td>{head}</tr>{body}</table>"


def _percent(value) -> str:
    return "not resolved" if value is None or value != value else f"{100 * value:.1f} %"


def _asked(noise: float, point: Mapping) -> str:
    trained = point["noise_multiplier"]
    if abs(noise - trained) < 1e-9:
        return f"Trained at noise multiplier <b>{trained:.3g}</b>. "
    return f"You asked for noise multiplier {noise:.3g}; the nearest trained point is <b>{trained:.3g}</b>. "


def _strength(epsilon: float) -> str:
    if epsilon > accounting.VACUOUS:
        return "So large a number says nothing."
    if epsilon > COMMON:
        return f"That is weak: one member may make a set of outcomes exp({bound(epsilon)}) times likelier."
    times = bound(math.exp(epsilon))
    times = times if float(times) < 100 else f"{float(times):,.0f}"
    return f"No set of outcomes becomes more than {times} times likelier by one member, plus delta."
