"""The plane behind the sliders: noise multiplier x risk threshold, trained and measured as one batch.

>>> plane = sweep(lab, noise_multipliers=(0, 1, 3), fractions=(0.05, 0.2, 1.0), seed=0)          # doctest: +SKIP
>>> plane.nearest(noise_multiplier=0.9, risk_threshold=0.3)["leak"]                             # doctest: +SKIP

Every point has the same members and the same seeds, so neighbouring points differ by their settings alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from demem_lab import risk
from demem_lab.audit import finest_fpr, measure
from demem_lab.experiment import Experiment
from demem_lab.mechanisms import SelectiveDP
from demem_lab.streams import model_seeds
from demem_lab.validate import finite

COLUMNS = {  # column of the plane <- (group, metric)
    "accuracy": ("all", "accuracy"), "robust": ("all", "robust"), "leak": ("all", "leak"), "auc": ("all", "auc"),
    "leak, high risk": ("high risk", "leak"), "leak, rest": ("rest", "leak"),
    "robust, high risk": ("high risk", "member robust"), "robust, rest": ("rest", "member robust"),
}


@dataclass(frozen=True)
class Plane:
    """Trained points; one row each in `points`, measured on one seed."""

    points: pd.DataFrame
    scores: np.ndarray  # float [N] the risk score that the thresholds cut
    seed: int
    models: int
    fpr: float

    def nearest(self, *, noise_multiplier: float, risk_threshold: float) -> pd.Series:
        """The trained point nearest to a position of the sliders; nothing is interpolated.

        Nearest threshold first (in number of protected samples, the scale that training sees), then nearest noise.
        """
        finite("noise_multiplier", noise_multiplier, low=0)
        if np.isnan(risk_threshold):
            raise ValueError("risk_threshold must not be NaN; use inf to protect nobody and -inf to protect everybody")
        wanted = int((self.scores >= risk_threshold).sum())
        p = self.points
        column = p.iloc[(p["protected"] - wanted).abs().argmin()]["protected"]
        p = p[p["protected"] == column]
        return p.iloc[(p["noise_multiplier"] - noise_multiplier).abs().argmin()]

    def to_frame(self) -> pd.DataFrame:
        """The points as a table."""
        return self.points.copy()


def sweep(
    lab: Experiment, *, noise_multipliers: Sequence[float], fractions: Sequence[float], seed: int,
    max_grad_norm: float = 1.0, models: int | None = None, lr_everybody: Callable[[float], float] | None = None,
    high_risk: float = 0.1,
) -> Plane:
    """Train SelectiveDP at every pair of noise multiplier and protected fraction (0: nobody, 1: everybody).

    lr_everybody: noise multiplier -> the learning rate tuned for DP-SGD, used where everybody is protected. high_risk: the
    fraction of samples called "high risk" in the columns, the same at every point. Nobody is trained once, without noise.
    """
    models = models or lab.tuning_models
    score = lab.risk(seed).score
    points = [(0.0, f) for f in fractions if f == 0]
    points += list(itertools.product([float(s) for s in noise_multipliers], [f for f in fractions if f > 0]))
    if len(set(points)) != len(points):
        raise ValueError(f"noise multipliers and fractions must not repeat, got {noise_multipliers} and {fractions}")
    sets = {f: risk.protected_set(score, fraction=f) for f in fractions}
    sigmas = tuple(s for s, _ in points for _ in range(models))
    protected = torch.stack([torch.as_tensor(sets[f].mask) for _, f in points for _ in range(models)])
    rates = tuple(lr_everybody(s) if lr_everybody and f == 1 else lab.lr for s, f in points for _ in range(models))
    recipe = lab.recipe(mechanism=SelectiveDP(sigmas, max_grad_norm, protected), lr=rates)
    members = lab.members(seed, models)
    run = lab.tables(
        "plane", recipe, members.repeat(len(points), 1), model_seeds(seed, models) * len(points), seed=seed
    )
    top = risk.protected_set(score, fraction=high_risk).mask
    fpr = finest_fpr(int((~members).sum(1).min()))
    rows = []
    for number, (sigma, fraction) in enumerate(points):
        part = run.part(slice(number * models, (number + 1) * models))
        found = measure(part, {"high risk": top, "rest": ~top}, fpr=fpr)
        promised = recipe.mechanism.guarantee(
            sampling_rate=run.sampling_rate, steps=run.steps, delta=lab.delta, n=lab.dataset.n, model=number * models
        )
        rows.append({
            "noise_multiplier": sigma, "fraction": fraction, "risk_threshold": sets[fraction].risk_threshold,
            "protected": int(sets[fraction].mask.sum()), "lr": rates[number * models],
            **{name: found.get(place) for name, place in COLUMNS.items()},
            "epsilon": promised.budget.epsilon if promised.holds else None, "guarantee": str(promised),
        })
    return Plane(pd.DataFrame(rows), score, seed, models, fpr)
