"""Which samples are at risk: memorization scores, cheap stand-ins for them, and the sets one protects.

>>> found = memorization(p, member)                      # p [M, N]: probability of the right label
>>> chosen = protected_set(found.score, fraction=0.1)
>>> chosen.mask.sum(), chosen.risk_threshold             # doctest: +SKIP

A sample is memorized when models that trained on it get it right and models that did not get it wrong (Feldman & Zhang
2020, equation 1). Score it in the way it will be attacked: for robust models, on adversarial examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy  # its stats take half a second, and load when first asked for

from demem_lab.leakage import Interval
from demem_lab.validate import finite, integer


@dataclass(frozen=True)
class MemorizationScore:
    """score [N] = mean over in-models - mean over out-models, its standard error [N], and how many models there were."""

    score: np.ndarray
    standard_error: np.ndarray
    in_models: np.ndarray
    out_models: np.ndarray

    def models_needed(self, standard_error: float, *, share: float = 0.95) -> int:
        """How many models give at least `share` of the samples a standard error of at most `standard_error`.

        From the spread seen so far: the error falls as 1 / sqrt(models). An even number, for complementary halves.
        """
        finite("standard_error", standard_error, low=1e-6, high=1)
        finite("share", share, low=0, high=1)
        times = (self.standard_error / standard_error) ** 2  # as many models as these, to get there
        wanted = np.quantile((self.in_models + self.out_models) * times, share, method="higher")
        return max(4, int(2 * np.ceil(wanted / 2 - 1e-9)))


def memorization(p: np.ndarray, member: np.ndarray) -> MemorizationScore:
    """Memorization of each sample from p [M, N] (probability of the right label, or 0/1 for right) and member [M, N].

    Raises ValueError when a sample has no in- or no out-model. The standard error is NaN-free: with one model on a side
    that side's variance is taken as 1/4, the largest a value in [0, 1] can have. Of 0/1 it is that of a proportion with half
    a success and half a failure more: agreement of all models is not certainty.
    """
    p, member = np.asarray(p, dtype=np.float64), np.asarray(member, dtype=bool)
    if p.shape != member.shape or p.ndim != 2:
        raise ValueError(f"p and member must both be [M, N], got {list(p.shape)} and {list(member.shape)}")
    if np.isnan(p).any():
        raise ValueError("p contains NaN; check the logits it was computed from")
    inside, outside = member.sum(0), (~member).sum(0)
    if inside.min() < 1 or outside.min() < 1:
        raise ValueError("every sample needs at least one model with it and one without; use complementary halves")

    binary = bool(((p == 0) | (p == 1)).all())

    def side(who: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean = np.where(who, p, 0).sum(0) / count
        if binary:
            likely = (mean * count + 0.5) / (count + 1)
            return mean, np.where(count > 1, likely * (1 - likely), 0.25) / count
        squares = np.where(who, (p - mean) ** 2, 0).sum(0)
        return mean, np.where(count > 1, squares / np.maximum(count - 1, 1), 0.25) / count

    (mean_in, error_in), (mean_out, error_out) = side(member, inside), side(~member, outside)
    return MemorizationScore(mean_in - mean_out, np.sqrt(error_in + error_out), inside, outside)


def loss_trace_iqr(trace: np.ndarray) -> np.ndarray:
    """Interquartile range [N] of each sample's losses along training (Pollock et al. 2024): almost free.

    trace: [E, N] or [M, E, N], NaN where a sample was not seen (non-members, undrawn); several models are averaged.
    """
    trace = np.asarray(trace, dtype=np.float64)
    trace = trace[None] if trace.ndim == 2 else trace
    seen = (~np.isnan(trace)).any(1)
    if not seen.any(0).all():
        raise ValueError(f"{int((~seen.any(0)).sum())} samples were never drawn by any model; give more models or epochs")
    with np.errstate(all="ignore"):
        filled = np.where(seen[:, None], trace, 0)
        low, high = np.nanpercentile(filled, [25, 75], axis=1)
    return np.where(seen, high - low, 0).sum(0) / seen.sum(0)


def early_loss(trace: np.ndarray, *, epochs: int) -> np.ndarray:
    """Mean loss [N] of each sample over the first `epochs` epochs in which it was seen; trace as in loss_trace_iqr."""
    trace = np.asarray(trace, dtype=np.float64)
    trace = trace[None] if trace.ndim == 2 else trace
    integer("epochs", epochs, low=1, high=trace.shape[1])
    early = trace[:, :epochs]
    seen = ~np.isnan(early)
    if not seen.any((0, 1)).all():
        raise ValueError(f"{int((~seen.any((0, 1))).sum())} samples were not drawn in {epochs} epochs; take more epochs")
    return np.where(seen, early, 0).sum((0, 1)) / seen.sum((0, 1))


def out_of_sample(signal: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Mean [N] of a signal [M, N] (a loss, say) over the models that did NOT train on the sample: cross-fitting.

    Two models on complementary halves are enough: each judges the other's half. Raises ValueError for a sample that is a
    member of all models.
    """
    return _mean_over(signal, ~np.asarray(member, dtype=bool), "a member of every model; use complementary halves")


def in_sample(signal: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Mean [N] of a signal [M, N] (adversarial loss, gradient norm) over the models that trained on the sample."""
    return _mean_over(signal, np.asarray(member, dtype=bool), "a member of no model; use complementary halves")


def judge_proxies(proxies: Mapping[str, np.ndarray], score: np.ndarray, *, fraction: float) -> pd.DataFrame:
    """How well cheap proxies [N] stand in for the score [N]: a row each, rank correlation and precision at the top."""
    rows = {}
    for name, proxy in proxies.items():
        rho, hit = rank_correlation(proxy, score), precision_at_top(proxy, score, fraction=fraction)
        rows[name] = {
            "rank correlation": rho.mean, "its low": rho.low, "its high": rho.high,
            f"precision at top {fraction:.0%}": hit.mean, "low": hit.low, "high": hit.high,
        }
    return pd.DataFrame.from_dict(rows, orient="index")


@dataclass(frozen=True)
class ProtectedSet:
    """mask bool [N]; the score at or above which a sample is in it; the share of all samples."""

    mask: np.ndarray
    risk_threshold: float
    fraction: float


def protected_set(
    score: np.ndarray, *, risk_threshold: float | None = None, fraction: float | None = None
) -> ProtectedSet:
    """The samples with score >= risk_threshold, or the riskiest `fraction` of all (ties go to the lower index).

    Give exactly one of both. Nobody (threshold inf, fraction 0) and everybody (threshold -inf, fraction 1) are legal.
    """
    score = np.asarray(score, dtype=np.float64)
    if score.ndim != 1 or np.isnan(score).any():
        raise ValueError("scores must be one number a sample, without NaN")
    if (risk_threshold is None) == (fraction is None):
        raise ValueError("give either risk_threshold or fraction, exactly one of them")
    if risk_threshold is not None:
        if np.isnan(risk_threshold):
            raise ValueError("risk_threshold must not be NaN; use inf for nobody and -inf for everybody")
        mask = score >= risk_threshold
        return ProtectedSet(mask, float(risk_threshold), float(mask.mean()))
    finite("fraction", fraction, low=0, high=1)
    count = round(fraction * len(score))
    mask = np.zeros(len(score), dtype=bool)
    mask[np.argsort(-score, kind="stable")[:count]] = True
    threshold = {0: np.inf, len(score): -np.inf}.get(count)
    if threshold is None:
        threshold = score[mask].min()
    return ProtectedSet(mask, float(threshold), count / len(score))


def random_set(n: int, count: int, *, seed: int) -> np.ndarray:
    """bool [n] with exactly `count` True, at random: the control for choosing by risk."""
    integer("count", count, low=0, high=n)
    mask = np.zeros(n, dtype=bool)
    mask[np.random.default_rng(seed).permutation(n)[:count]] = True
    return mask


def deciles(score: np.ndarray, *, groups: int = 10) -> np.ndarray:
    """int [N]: 0 for the tenth with the lowest risk to groups - 1 for the highest; sizes differ by at most one."""
    score = np.asarray(score, dtype=np.float64)
    if np.isnan(score).any():
        raise ValueError("scores must not contain NaN; samples without a score cannot be ordered")
    integer("groups", groups, low=2, high=len(score))
    rank = np.empty(len(score), dtype=np.int64)
    rank[np.argsort(score, kind="stable")] = np.arange(len(score))
    return rank * groups // len(score)


def rank_correlation(a: np.ndarray, b: np.ndarray, *, level: float = 0.95) -> Interval:
    """Spearman's correlation with Fisher's interval (standard error by Bonett & Wright 2000).

    Equal orders, where that interval has no width, get the interval of orders that differ in one pair of neighbours.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(a) < 4 or len(a) != len(b):
        raise ValueError(f"a rank correlation needs two lists of the same length, at least 4, got {len(a)} and {len(b)}")
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        raise ValueError("a constant list has no ranks to correlate")
    rho = float(scipy.stats.spearmanr(a, b).statistic)
    half = scipy.stats.norm.ppf((1 + level) / 2) * np.sqrt((1 + rho**2 / 2) / (len(a) - 3))
    most = 1 - 12 / (len(a) * (len(a) ** 2 - 1))
    z = np.arctanh(np.clip(rho, -most, most))
    return Interval(rho, min(rho, float(np.tanh(z - half))), max(rho, float(np.tanh(z + half))), len(a))


def precision_at_top(proxy: np.ndarray, score: np.ndarray, *, fraction: float, level: float = 0.95) -> Interval:
    """How many of the top `fraction` by `proxy` are in the top `fraction` by `score`; Clopper-Pearson interval.

    Among equal values of `proxy` the lot decides (always the same one): by the lower index, as in `score`, scores with ties
    would agree that have nothing in common.
    """
    lot = np.random.default_rng(0).permutation(len(proxy))
    a = np.empty(len(lot), dtype=bool)
    a[lot] = protected_set(np.asarray(proxy)[lot], fraction=fraction).mask
    b = protected_set(score, fraction=fraction).mask
    hits, n = int((a & b).sum()), int(a.sum())
    if n == 0:
        raise ValueError(f"fraction {fraction:g} of {len(a)} samples is nobody; take a larger fraction")
    found = scipy.stats.binomtest(hits, n).proportion_ci(level, method="exact")
    return Interval(hits / n, float(found.low), float(found.high), n)


def _mean_over(signal: np.ndarray, who: np.ndarray, lacking: str) -> np.ndarray:
    signal = np.asarray(signal, dtype=np.float64)
    if signal.shape != who.shape or signal.ndim != 2:
        raise ValueError(f"signal and member must both be [M, N], got {list(signal.shape)} and {list(who.shape)}")
    if not who.any(0).all():
        raise ValueError(f"{int((~who.any(0)).sum())} samples are {lacking}")
    return np.where(who, signal, 0).sum(0) / who.sum(0)
