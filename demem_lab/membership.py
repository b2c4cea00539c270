"""Who was in the training set? Signals, attacks and their measures, on plain arrays.

Every model of an ensemble serves as the target in turn; the others are the attacker's shadow models. Nothing here knows
how a model was trained, so anybody's outputs can be audited.

>>> phi = logit_margin(logits, y)                       # [M, N] from logits [M, N, K]
>>> leakage = evaluate(lira(phi, member), member)       # member bool [M, N]
>>> leakage.tpr_at(0.01), leakage.auc.mean()            # doctest: +SKIP

Leave one out: the references of a target exclude the target AND its complementary twin (the model trained on exactly the
other samples). Keeping the twin would give every member one out-reference more than it gives non-members, which is
enough to make non-members look like members.
Sources: LiRA (Carlini et al. 2022), RMIA (Zarifzadeh et al. 2024), confidence (Yeom et al. 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats
from scipy.special import log_softmax, logsumexp

from demem_lab.validate import choice, finite

PRIOR_DEGREES = 8.0  # how many observations the pooled variance counts for in the shrunk variance
VARIANCE_FLOOR = 1e-6
MIN_FALSE_POSITIVES = 5  # a rate is shown only where at least this many false positives are expected


def cross_entropy(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """-log p_y [M, N] in float64, from logits [M, N, K] and labels [N]."""
    return -_pick(log_softmax(_array(logits), axis=-1), y)


def confidence(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """p_y [M, N], the probability given to the right label."""
    return np.exp(-cross_entropy(logits, y))


def logit_margin(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """log p_y - log(1 - p_y) [M, N], LiRA's signal, straight from the logits: exact where p_y rounds to 0 or 1."""
    z = _array(logits).copy()
    right = _pick(z, y)
    index = np.broadcast_to(np.asarray(y)[..., None], (*z.shape[:-1], 1))
    np.put_along_axis(z, index, -np.inf, axis=-1)
    return right - logsumexp(z, axis=-1)


def margin_from_probability(p: np.ndarray, *, smallest: float = 1e-15) -> np.ndarray:
    """The same from probabilities p_y, when there are no logits. Values are cut to [smallest, 1 - smallest], so that
    everything beyond about 34.5 looks alike: use logits where you can."""
    p = np.clip(_array(p), smallest, 1 - smallest)
    return np.log(p) - np.log1p(-p)


def twins(member: np.ndarray) -> np.ndarray:
    """int [M]: the row that is the exact complement of each row, -1 where there is none."""
    member = np.asarray(member, dtype=bool)
    rows = {row.tobytes(): m for m, row in enumerate(member)}
    return np.array([rows.get((~row).tobytes(), -1) for row in member])


def lira(
    signal: np.ndarray, member: np.ndarray, *, variance: str = "shrunk", online: bool = True, leave_twin_out: bool = True
) -> np.ndarray:
    """Likelihood-ratio attack: scores [M, N], higher = more likely a member.

    signal: [M, N], or [Q, M, N] for several queries a sample, whose log ratios are added. variance: of each sample's own
    references ("per_sample"), of all samples together ("pooled"), or the own one shrunk towards the pooled one
    ("shrunk": (own sum of squares + 8 pooled) / (own degrees of freedom + 8), the mean of an inverse-gamma posterior).
    online: log N(signal; in) - log N(signal; out); offline: one-sided z = (signal - mean out) / std out.
    leave_twin_out=False is wrong for balanced designs and exists to show how wrong.
    Raises ValueError when there are too few models for the variance asked for.
    """
    choice("variance", variance, ("shrunk", "per_sample", "pooled"))
    signal, member = _checked(signal, member)
    other = twins(member) if leave_twin_out else np.full(len(member), -1)
    total = np.zeros(member.shape)
    for query in signal:
        inside, outside = _moments(query, member, other), _moments(query, ~member, other)
        for name, m in (("in", inside), ("out", outside)):
            needed = 2 if variance == "per_sample" else 1
            if m.count.min() < needed and (online or name == "out"):
                raise ValueError(
                    f"variance={variance!r} needs {needed} {name}-references for every sample and target, got "
                    f"{int(m.count.min())}; train at least {4 * needed + 2} models in complementary halves"
                )
        v_in, v_out = _variances(inside, variance), _variances(outside, variance)
        if variance != "per_sample" and (inside.degrees == 0 or outside.degrees == 0):
            v_in = v_out = 1.0  # one reference each: no spread to estimate, and with equal ones its size drops out
        if online:
            total += _log_normal(query, inside.mean, v_in) - _log_normal(query, outside.mean, v_out)
        else:
            total += (query - outside.mean) / np.sqrt(v_out)
    return total


def rmia(
    p: np.ndarray, member: np.ndarray, *, gamma: float = 1.0, offline_a: float | None = None,
    population: np.ndarray | None = None,
) -> np.ndarray:
    """Robust membership inference: scores [M, N] from confidences p_y [M, N] (or [Q, M, N], averaged).

    ratio(x) = p(x | target) / p(x), where p(x) is the mean over in- and out-references, or, offline,
    ((1 + a) p_out + 1 - a) / 2 with a = `offline_a`. With a `population` (bool [N]) the score is the fraction of it whose
    ratio, times gamma, x's ratio reaches. Without one it is the ratio itself, which orders one target's samples alike.
    """
    finite("gamma", gamma, low=0)
    signal, member = _checked(p, member)
    other, p = twins(member), signal.mean(0)
    outside = _moments(p, ~member, other)
    if outside.count.min() < 1:
        raise ValueError("RMIA needs an out-reference for every sample and target; train at least 4 models")
    if offline_a is None:
        mean = (_moments(p, member, other).mean + outside.mean) / 2
    else:
        finite("offline_a", offline_a, low=0, high=1)
        mean = ((1 + offline_a) * outside.mean + 1 - offline_a) / 2
    ratio = p / np.maximum(mean, 1e-300)
    if population is None:
        return ratio
    population = np.asarray(population, dtype=bool)
    if population.shape != (p.shape[1],) or not population.any():
        raise ValueError(f"the population must be bool [{p.shape[1]}] and not empty, got shape {list(population.shape)}")
    # LR(x, z) = ratio(x) / ratio(z) >= gamma, counted by sorting instead of comparing all pairs
    count = [np.searchsorted(np.sort(r[population]), r / max(gamma, 1e-300), side="right") for r in ratio]
    return np.array(count) / population.sum()


@dataclass(frozen=True)
class Interval:
    """A mean and its interval; low and high are None where one value gives none."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Leakage:
    """What an attack achieves against each of M targets."""

    fprs: tuple[float, ...]
    auc: np.ndarray  # [M]
    tpr: np.ndarray  # [M, F] at thresholds with at most that share of false positives
    balanced_accuracy: np.ndarray  # [M] at the best threshold on these very scores: optimistic
    members: np.ndarray  # int [M]
    non_members: np.ndarray  # int [M]

    @property
    def resolved(self) -> np.ndarray:
        """bool [F]: enough non-members for this rate to mean something (5 expected false positives)."""
        return np.array(self.fprs) * self.non_members.min() >= MIN_FALSE_POSITIVES

    def tpr_at(self, fpr: float) -> float | None:
        """Mean true positive rate over the targets; None where the rate cannot be resolved."""
        column = self._column(fpr)
        return float(self.tpr[:, column].mean()) if self.resolved[column] else None

    def interval(self, fpr: float, *, model: int, level: float = 0.95) -> Interval:
        """Clopper-Pearson interval of one model's true positive rate (its members are the trials)."""
        n, rate = int(self.members[model]), float(self.tpr[model, self._column(fpr)])
        found = stats.binomtest(round(rate * n), n).proportion_ci(level, method="exact")
        return Interval(rate, float(found.low), float(found.high), n)

    def to_frame(self) -> pd.DataFrame:
        """One row a model; unresolved rates are missing, not numbers."""
        columns = {"auc": self.auc, "balanced accuracy (optimistic)": self.balanced_accuracy, "members": self.members}
        frame = pd.DataFrame({**columns, "non-members": self.non_members})
        for f, fpr in enumerate(self.fprs):
            frame[f"TPR at {fpr:.1%} FPR"] = self.tpr[:, f] if self.resolved[f] else pd.NA
        return frame

    def _column(self, fpr: float) -> int:
        return self.fprs.index(choice("fpr", fpr, self.fprs))


def evaluate(
    scores: np.ndarray, member: np.ndarray, *, fprs: Sequence[float] = (0.1, 0.01, 0.001), subset: np.ndarray | None = None
) -> Leakage:
    """ROC measures of scores [M, N] for each target; `subset` bool [N] restricts the members that count.

    Thresholds are global: they come from ALL non-members of the model, also for a subset.
    """
    scores, member = _array(scores), np.asarray(member, dtype=bool)
    if scores.shape != member.shape or scores.ndim != 2:
        raise ValueError(f"scores and member must both be [M, N], got {list(scores.shape)} and {list(member.shape)}")
    if np.isnan(scores).any():
        raise ValueError("scores contain NaN; check the signals they were computed from")
    inside = member if subset is None else member & np.asarray(subset, dtype=bool)
    if not inside.any(1).all() or member.all(1).any():
        raise ValueError("every model needs at least one member (of the subset) and one non-member")
    auc, tpr, balanced = [], [], []
    for s, m, chosen in zip(scores, member, inside, strict=True):
        positive, negative = np.sort(s[chosen]), np.sort(s[~m])
        below = np.searchsorted(negative, positive, side="left")
        ties = np.searchsorted(negative, positive, side="right") - below
        auc.append((below + ties / 2).mean() / len(negative))
        # the highest score that more than fpr * n non-members reach; only what lies strictly above it is called a member
        places = [len(negative) - 1 - int(np.floor(f * len(negative) + 1e-9)) for f in fprs]
        tpr.append([1.0 if i < 0 else (positive > negative[i]).mean() for i in places])
        grid = np.concatenate([positive, [np.inf]])
        true = 1 - np.searchsorted(positive, grid) / len(positive)
        false = 1 - np.searchsorted(negative, grid) / len(negative)
        balanced.append(((true + 1 - false) / 2).max())
    counts = inside.sum(1), (~member).sum(1)
    return Leakage(tuple(fprs), np.array(auc), np.array(tpr), np.array(balanced), *counts)


def roc(scores: np.ndarray, member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates of one target (scores [N], member [N])."""
    from sklearn.metrics import roc_curve

    fpr, tpr, _ = roc_curve(np.asarray(member, dtype=bool), _array(scores), drop_intermediate=False)
    return fpr, tpr


def mean_roc(scores: np.ndarray, member: np.ndarray, *, points: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """The ROC averaged over targets on a logarithmic grid of those false positive rates that can be resolved."""
    smallest = MIN_FALSE_POSITIVES / int((~np.asarray(member, dtype=bool)).sum(1).min())
    if smallest >= 1:
        raise ValueError(f"fewer than {MIN_FALSE_POSITIVES} non-members cannot resolve any false positive rate")
    grid = np.geomspace(smallest, 1, points)
    return grid, evaluate(scores, member, fprs=tuple(grid)).tpr.mean(0)


def seed_interval(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """Mean and t-interval over seeds; one value has no interval."""
    values = _array(values)
    n, mean = len(values), float(values.mean())
    if n < 2:
        return Interval(mean, None, None, n)
    half = float(stats.t.ppf((1 + level) / 2, n - 1) * values.std(ddof=1) / np.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


@dataclass(frozen=True)
class _Moments:
    count: np.ndarray  # [M, N] references
    mean: np.ndarray
    squares: np.ndarray  # sum of squared deviations from the mean

    @property
    def degrees(self) -> float:
        return float(np.maximum(self.count - 1, 0).sum())


def _moments(signal: np.ndarray, who: np.ndarray, other: np.ndarray) -> _Moments:
    """Moments of the references in `who`, for every target, from sums over all models less target and twin."""
    center = signal.mean(0)  # sums of squares lose less precision around it
    x, w = signal - center, who.astype(np.float64)
    sums = []
    for power in (w, w * x, w * x * x):
        rest = power.sum(0) - power
        has = other >= 0
        rest[has] -= power[other[has]]
        sums.append(rest)
    count, first, second = sums
    mean = first / np.maximum(count, 1)
    return _Moments(count, mean + center, np.maximum(second - count * mean**2, 0))


def _variances(m: _Moments, kind: str) -> np.ndarray:
    if kind == "per_sample":
        return np.maximum(m.squares / np.maximum(m.count, 1), VARIANCE_FLOOR)
    free = np.maximum(m.count - 1, 0)
    # one pooled variance for each target, from that target's references only
    pooled = m.squares.sum(1, keepdims=True) / np.maximum(free.sum(1, keepdims=True), 1)
    if kind == "pooled":
        return np.maximum(np.broadcast_to(pooled, m.squares.shape), VARIANCE_FLOOR)
    return np.maximum((m.squares + PRIOR_DEGREES * pooled) / (free + PRIOR_DEGREES), VARIANCE_FLOOR)


def _log_normal(x: np.ndarray, mean: np.ndarray, variance) -> np.ndarray:
    return -((x - mean) ** 2) / (2 * variance) - np.log(variance) / 2


def _checked(signal: np.ndarray, member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    signal, member = _array(signal), np.asarray(member, dtype=bool)
    signal = signal[None] if signal.ndim == 2 else signal
    if signal.ndim != 3 or signal.shape[1:] != member.shape:
        raise ValueError(f"signal must be [M, N] or [Q, M, N] with member [M, N], got {signal.shape} and {member.shape}")
    if not np.isfinite(signal).all():
        raise ValueError("the signal must be finite; compute it from logits with logit_margin")
    return signal, member


def _pick(table: np.ndarray, y: np.ndarray) -> np.ndarray:
    index = np.broadcast_to(np.asarray(y)[..., None], (*table.shape[:-1], 1))
    return np.take_along_axis(table, index, axis=-1)[..., 0]


def _array(x) -> np.ndarray:
    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x, dtype=np.float64)
