"""How sure is a number? Intervals of a share, of a mean over seeds, and of a true positive rate at a low false positive rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # its stats take half a second, and load when first asked for

UNLIKELY = 1e-9  # counts of non-members that are less likely together do not move an interval


@dataclass(frozen=True)
class Interval:
    """A mean and its interval; low and high are None where one value gives none."""

    mean: float
    low: float | None
    high: float | None
    n: int


def proportion(count: int, n: int, *, level: float = 0.95) -> Interval:
    """count / n with its Clopper-Pearson interval."""
    found = scipy.stats.binomtest(count, n).proportion_ci(level, method="exact")
    return Interval(count / n, float(found.low), float(found.high), n)


def seed_interval(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """Mean and t-interval over seeds; one value has no interval."""
    values = np.asarray(values, dtype=np.float64)
    if not values.size:
        raise ValueError("an interval over seeds needs at least one value, got none; run a seed first")
    n, mean = len(values), float(values.mean())
    if n < 2:
        return Interval(mean, None, None, n)
    half = float(scipy.stats.t.ppf((1 + level) / 2, n - 1) * values.std(ddof=1) / np.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def rate_limits(true: np.ndarray, false: np.ndarray, fpr: float, tail: float) -> tuple[float, float]:
    """Limits of a true positive rate at the threshold that a share `fpr` of ALL negatives would exceed, not just of these.

    true, false: cumulative counts [steps + 1] of positives and negatives as the threshold falls, one step a distinct score,
    from 0. tail: the error probability of each limit. How many of the sampled negatives lie above that threshold is binomial;
    given that number the limits are Clopper-Pearson's, and their tails are averaged over it.
    """
    n, outside = int(true[-1]), int(false[-1])
    least, most = scipy.stats.binom.ppf((UNLIKELY, 1 - UNLIKELY), outside, fpr)
    above = np.arange(max(0, least), most + 1)  # non-members above the true threshold, from all that is likely
    weight = scipy.stats.binom.pmf(above, outside, fpr)
    step = np.searchsorted(false, above, side="right") - 1  # the last whole step above the next non-member: nobody missing
    sure = true[np.searchsorted(false, false[step], side="left")]  # down to the last non-member above: nobody too many
    at_most = true[step]

    def too_low(rate: float) -> float:
        return float(weight @ scipy.special.bdtrc(sure - 1.0, n, rate)) - tail

    def too_high(rate: float) -> float:
        return float(weight @ scipy.special.bdtr(at_most.astype(float), n, rate)) - tail

    low = scipy.optimize.brentq(too_low, 0, 1) if too_low(0.0) < 0 else 0.0
    high = scipy.optimize.brentq(too_high, 0, 1) if too_high(1.0) < 0 else 1.0
    return low, high
