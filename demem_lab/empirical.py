"""How little privacy can there be? Lower bounds on epsilon from attacks, to stand beside the accountant's upper bound.

>>> bound = clopper_pearson_bound(scores, member, delta=1e-5)          # independent trials, e.g. one model each # doctest: +SKIP
>>> bound = one_run_bound(scores, included, delta=1e-5)                # 1,000 canaries in ONE run               # doctest: +SKIP
>>> str(bound)                                                         # doctest: +SKIP
'epsilon >= 1.23 at delta 1e-05 with 95 % confidence (one run, 182 of 200 guesses right)'

An attack that succeeds too often refutes a claimed epsilon; one that fails proves nothing. Arrays in, numbers out.
Sources: Jagielski et al. 2020 (arXiv 2006.07709), Nasr et al. 2023 (arXiv 2302.07956), Steinke, Nasr & Jagielski 2023
(arXiv 2305.08846).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy  # its stats take half a second, and load when first asked for

from demem_lab.accounting import bound
from demem_lab.validate import finite, integer

LARGEST = 60.0  # epsilon beyond this is not told apart


@dataclass(frozen=True)
class LowerBound:
    """epsilon is at least this, with that confidence, if the trials were what the method needs them to be."""

    epsilon: float
    delta: float
    confidence: float
    method: str
    detail: str
    most: float  # the bound that a perfect attack would have given on as many trials

    def __str__(self) -> str:
        return (
            f"epsilon >= {bound(self.epsilon, upper=False)} at delta {self.delta:.3g} with {100 * self.confidence:g} % "
            f"confidence ({self.method}, {self.detail}; at most {self.most:.3g} could have been seen)"
        )


def clopper_pearson_bound(
    scores: np.ndarray, member: np.ndarray, *, delta: float, confidence: float = 0.95, seed: int = 0
) -> LowerBound:
    """Lower bound from scores [n] of independent trials, member bool [n]; higher score = more likely a member.

    Each trial should be its own training run (one canary, in or out): samples of one model are not independent, and a bound
    from them is an approximation. The test (threshold, and whether it accuses the high or clears the low) is chosen on a
    random half; on the other half, epsilon >= log((TPR - delta) / FPR) with one-sided Clopper-Pearson limits, the error
    probability split equally over both rates. Raises ValueError for fewer than 2 trials on either side.
    """
    scores, member = _checked(scores, member, delta, confidence)
    rng, first = np.random.default_rng(seed), np.zeros(len(scores), dtype=bool)
    for who in (member, ~member):
        places = rng.permutation(np.flatnonzero(who))
        if len(places) < 2:
            raise ValueError(f"the bound needs at least 2 members and 2 non-members, got {len(places)} on one side")
        first[places[: len(places) // 2]] = True
    alpha = (1 - confidence) / 2
    sign, cut = _best_test(scores[first], member[first], delta, alpha)
    hits, positives, alarms, negatives = _counts(scores[~first], member[~first], sign, cut)
    perfect = _epsilon(positives, positives, 0, negatives, delta, alpha)
    what = f"{'score' if sign > 0 else 'no score'} at or above {cut:.3g}"
    detail = f"threshold from a held-out half: {what} for {hits} of {positives} against {alarms} of {negatives}"
    epsilon = _epsilon(hits, positives, alarms, negatives, delta, alpha)
    return LowerBound(epsilon, delta, confidence, "Clopper-Pearson", detail, perfect)


def one_run_bound(
    scores: np.ndarray, included: np.ndarray, *, delta: float, confidence: float = 0.95,
    guesses: tuple[int, int] | None = None, minimum: int = 1000,
) -> LowerBound:
    """Lower bound from ONE training run with canaries [m], each included by an independent fair coin.

    The auditor guesses "in" for the guesses[0] highest scores and "out" for the guesses[1] lowest, and abstains on the rest
    (default: a tenth of all on either side, where most of the certainty is; the number must not be tuned on these
    scores). With v of r guesses right, (epsilon, delta) is refuted when
    P[Binomial(r, q) >= v] + 2 m delta max_i P[v > Binomial(r, q) >= v - i] / i  <=  1 - confidence,  q = 1 / (1 + exp(-epsilon))
    (Steinke et al. 2023, theorem 5.2). Ties are broken by lot: the order of a file may say who is a member. Raises
    ValueError for fewer than `minimum` canaries.
    """
    scores, included = _checked(scores, included, delta, confidence)
    m = len(scores)
    integer("number of canaries", m, low=minimum, fix="fewer say next to nothing in one run")
    high, low = (m // 10, m // 10) if guesses is None else guesses
    integer("guesses 'in'", high, low=0, high=m)
    integer("guesses 'out'", low, low=0, high=m - high)
    r = integer("guesses", high + low, low=1)
    order = np.lexsort((np.random.default_rng(0).permutation(m), -scores))
    right = int(included[order[:high]].sum()) + int((~included[order[m - low :]]).sum())

    def largest(v: int) -> float:
        refuted = [0.0, LARGEST]
        if not _p_value(v, r, m, delta, 0.0) <= 1 - confidence:
            return 0.0
        for _ in range(60):
            middle = sum(refuted) / 2
            refuted[0 if _p_value(v, r, m, delta, middle) <= 1 - confidence else 1] = middle
        return refuted[0]

    return LowerBound(largest(right), delta, confidence, "one run", f"{right} of {r} guesses right on {m} canaries", largest(r))


def _p_value(v: int, r: int, m: int, delta: float, epsilon: float) -> float:
    """How likely v or more of r guesses are right if (epsilon, delta) holds: at most this."""
    q = 1 / (1 + np.exp(-epsilon))
    tail = scipy.stats.binom.sf(v - 1, r, q)
    if delta == 0 or v == 0:
        return float(tail)
    i = np.arange(1, v + 1)  # beyond v there is no further probability, and the divisor only grows
    between = scipy.stats.binom.sf(v - i - 1, r, q) - tail
    return float(min(1.0, tail + 2 * m * delta * (between / i).max()))


def _best_test(scores, member, delta: float, alpha: float) -> tuple[int, float]:
    """(sign, threshold) with the largest bound on these trials; all thresholds of both directions at once."""
    cuts = np.unique(scores)
    inside, outside = np.sort(scores[member]), np.sort(scores[~member])
    below_in, below_out = np.searchsorted(inside, cuts), np.searchsorted(outside, cuts)
    accuse = _epsilon(len(inside) - below_in, len(inside), len(outside) - below_out, len(outside), delta, alpha)
    clear = _epsilon(below_out, len(outside), below_in, len(inside), delta, alpha)
    best = int(np.argmax(np.concatenate([accuse, clear])))
    return (1, float(cuts[best])) if best < len(cuts) else (-1, float(cuts[best - len(cuts)]))


def _epsilon(hits, positives: int, alarms, negatives: int, delta: float, alpha: float):
    """log((TPR - delta) / FPR), at least 0, from one-sided Clopper-Pearson limits; numbers or arrays of hits and alarms."""
    hits, alarms = np.asarray(hits, dtype=float), np.asarray(alarms, dtype=float)
    # the beta distribution needs positive parameters; the limits at 0 hits and at nothing but alarms are 0 and 1
    low = np.where(hits > 0, scipy.stats.beta.ppf(alpha, np.maximum(hits, 1), positives - hits + 1), 0.0)
    high = np.where(alarms < negatives, scipy.stats.beta.ppf(1 - alpha, alarms + 1, np.maximum(negatives - alarms, 1)), 1.0)
    found = np.log(np.maximum(low - delta, high) / high)
    return found if found.ndim else float(found)


def _counts(scores, member, sign: int, cut: float) -> tuple[int, int, int, int]:
    """Hits, trials, false alarms, trials of "member if score >= cut" (sign 1) or of "non-member if score < cut" (sign -1)."""
    above = scores >= cut
    if sign > 0:
        return int((above & member).sum()), int(member.sum()), int((above & ~member).sum()), int((~member).sum())
    return int((~above & ~member).sum()), int((~member).sum()), int((~above & member).sum()), int(member.sum())


def _checked(scores, member, delta: float, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    scores, member = np.asarray(scores, dtype=np.float64), np.asarray(member, dtype=bool)
    if scores.ndim != 1 or scores.shape != member.shape:
        raise ValueError(f"scores and members must be lists of one length, got shapes {scores.shape} and {member.shape}")
    if np.isnan(scores).any():
        raise ValueError("scores contain NaN; leave such trials out on both sides")
    finite("delta", delta, low=0, high=1)
    finite("confidence", confidence, low=0.5, high=0.9999)
    return scores, member
