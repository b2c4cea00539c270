"""How much privacy a noisy training run gives, by a well-kept accountant (dp_accounting).

>>> budget(noise_multiplier=1.1, sampling_rate=0.01, steps=1000, delta=1e-5).epsilon      # doctest: +ELLIPSIS
1.51...
>>> str(budget(noise_multiplier=0.0, sampling_rate=0.01, steps=1000, delta=1e-5))
'no guarantee: no noise is added'

The neighbouring relation is add/remove, batches are Poisson samples, and the numbers are upper bounds: the tight PLD
accountant where it answers in reasonable time, else RDP, named looser. Gaussian-DP approximations are not bounds and are
not offered. Sources: Mironov 2017 (RDP), Koskela et al. 2020 and Doroshenko et al. 2022 (PLD).
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from demem_lab.validate import choice, finite, integer

VACUOUS = 50.0  # above this RDP epsilon a tighter number changes nothing, and PLD becomes slow
PLD_FROM = 0.3  # with less noise, PLD takes long for one number and too long for a search
# Between these the accountants can compute. More noise than MOST is taken for MOST, which is still a bound.
LEAST, MOST = 1e-4, 1e6
ACCOUNTANTS = ("PLD", "RDP")
BELOW = "RDP, here below PLD"


@dataclass(frozen=True)
class NoGuarantee:
    """The value to use where nothing is promised: not a number, not infinity, not NaN."""

    reason: str

    def __str__(self) -> str:
        return f"no guarantee: {self.reason}"


@dataclass(frozen=True)
class Budget:
    """(epsilon, delta) of one sample under add/remove, and what it was computed from."""

    epsilon: float
    delta: float
    accountant: str  # "PLD" (tight), "RDP" (looser) or BELOW
    noise_multiplier: float
    sampling_rate: float
    steps: int

    def __str__(self) -> str:
        looser = ", looser" if self.accountant == "RDP" else ""
        return f"epsilon {bound(self.epsilon)} at delta {bound(self.delta)} ({self.accountant}{looser})"


def bound(value: float, *, upper: bool = True) -> str:
    """An upper (or lower) bound in three digits, rounded to the side on which it still holds.

    >>> bound(5.671), bound(5.67), bound(5.679, upper=False)
    ('5.68', '5.67', '5.67')
    """
    shown = f"{value:.3g}"
    if math.isfinite(value) and (float(shown) < value if upper else float(shown) > value):
        unit = 10.0 ** (math.floor(math.log10(abs(value))) - 2)
        shown = f"{float(shown) + (unit if upper else -unit):.3g}"
    return shown


def budget(
    *, noise_multiplier: float, sampling_rate: float, steps: int, delta: float, accountant: str | None = None
) -> Budget | NoGuarantee:
    """The budget spent by `steps` noisy sums, each sample in each batch with probability `sampling_rate`.

    noise_multiplier: noise std divided by the clipping bound, >= 0; under 1e-4 it gives NoGuarantee. steps: 0 spends nothing.
    accountant: "PLD", "RDP" or None for the default rule (PLD unless RDP already says epsilon > 50, or says less than PLD).
    Raises ValueError for values out of range.
    """
    sigma, rate, steps, delta = _checked(noise_multiplier, sampling_rate, steps, delta)
    if accountant is not None:
        choice("accountant", accountant, ACCOUNTANTS)
    if sigma == 0:
        return NoGuarantee("no noise is added")
    if steps == 0:
        return Budget(0.0, delta, accountant or "PLD", sigma, rate, steps)
    if sigma < LEAST:
        return _too_little(sigma)
    loose = None if accountant == "PLD" else _epsilon("RDP", sigma, rate, steps, delta)
    if accountant == "RDP" or (accountant is None and loose > VACUOUS):
        if loose == float("inf"):
            return _too_little(sigma)
        return Budget(loose, delta, "RDP", sigma, rate, steps)
    return _smaller(Budget(_epsilon("PLD", sigma, rate, steps, delta), delta, "PLD", sigma, rate, steps), loose)


def _too_little(sigma: float) -> NoGuarantee:
    return NoGuarantee(f"noise multiplier {sigma:g} is too small for the accountant to bound epsilon")


def _smaller(tight: Budget, loose: float | None) -> Budget | NoGuarantee:
    """PLD's budget, or RDP's epsilon where that is the smaller one: PLD's grid is too coarse for some very small numbers."""
    if loose is not None and loose < tight.epsilon:
        return replace(tight, epsilon=loose, accountant=BELOW)
    if tight.epsilon == float("inf"):
        return NoGuarantee(f"delta {tight.delta:g} is too small for noise multiplier {tight.noise_multiplier:g}")
    return tight


def budget_in_time(
    seconds: float, *, noise_multiplier: float, sampling_rate: float, steps: int, delta: float
) -> Budget | NoGuarantee:
    """`budget` by PLD if that is ready within `seconds`, else by RDP, named looser. Arguments as there.

    In a process of its own, because PLD cannot be interrupted: with little noise it may take minutes and gigabytes.
    """
    finite("seconds", seconds, low=0)
    sigma, rate, steps, delta = _checked(noise_multiplier, sampling_rate, steps, delta)
    asked = {"noise_multiplier": sigma, "sampling_rate": rate, "steps": steps, "delta": delta}
    loose = budget(**asked, accountant="RDP")
    if sigma < LEAST or steps == 0:
        return loose
    script = (
        "import json, sys; from demem_lab.accounting import budget; "
        "found = budget(**json.loads(sys.argv[1]), accountant='PLD'); print(getattr(found, 'epsilon', None))"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, json.dumps(asked)], timeout=seconds, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        return loose
    if done.returncode:
        raise RuntimeError(f"the PLD accountant failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    tight = float("inf") if done.stdout.strip() == "None" else float(done.stdout)
    return _smaller(Budget(tight, delta, "PLD", sigma, rate, steps), getattr(loose, "epsilon", None))


def usual_delta(n: int) -> float:
    """The largest power of ten that is at most half of 1/n, and at most 1e-4.

    At 1/n publishing one sample at random would pass; how far below delta should lie is a convention.

    >>> usual_delta(1797), usual_delta(10_000), usual_delta(60_000)
    (0.0001, 1e-05, 1e-06)
    """
    return float(f"1e{min(-4, math.floor(math.log10(0.5 / integer('n', n, low=1)) + 1e-9))}")


def noise_multiplier_for(*, epsilon: float, sampling_rate: float, steps: int, delta: float) -> float:
    """Noise that is enough for `epsilon`: the least (to 1e-3; above 1, to a thousandth of it) of 0.3 and more by PLD.

    Below 0.3, where PLD takes minutes, the least by RDP: enough, and often more than needed. So 0.3 can be more than needed
    too. ValueError out of range, or where no noise up to 1e6 is enough by either.
    """
    epsilon = finite("epsilon", epsilon, low=0.01, high=VACUOUS, fix="above 50 the promise is empty")
    _, rate, steps, delta = _checked(1.0, sampling_rate, steps, delta)
    integer("steps", steps, low=1)
    from scipy.optimize import brentq

    def loose(sigma: float) -> float:
        return _epsilon("RDP", sigma, rate, steps, delta)

    def tight(sigma: float) -> float:
        return min(_epsilon("PLD", sigma, rate, steps, delta), 2 * VACUOUS)  # a root is not found among infinities

    # RDP first, as it costs milliseconds everywhere: with too little noise PLD takes minutes and gigabytes, for a number that
    # nobody wants. From there down it is asked near the answer only.
    high = _least(lambda sigma: loose(sigma) <= epsilon)
    if high is None:  # of very small epsilons and deltas RDP has no number
        high = _least(lambda sigma: loose(sigma) <= VACUOUS)
        while high < MOST and tight(high) > epsilon:
            high = min(2 * high, MOST)
        if tight(high) > epsilon:
            raise ValueError(f"no noise multiplier up to {MOST:g} gives epsilon {epsilon:g} at delta {delta:g}; ask for more")
    if high < PLD_FROM or tight(high) > epsilon:
        return high
    low = high
    while tight(low) <= epsilon:
        if low == PLD_FROM:
            return low
        low, high = max(PLD_FROM, 0.8 * low), low
    near = 5e-4 * max(1.0, high)
    found = brentq(lambda sigma: tight(sigma) - epsilon, low, high, xtol=near)
    return next(sigma for sigma in (found, found + near, high) if tight(sigma) <= epsilon)


def _least(enough: Callable[[float], bool]) -> float | None:
    """The least noise multiplier (to a ten-thousandth of it) that is enough, of 0.01 and more; None where 1e6 is not."""
    low, high = 0.01, 1.0
    while not enough(high):
        if high == MOST:
            return None
        low, high = high, min(4 * high, MOST)
    while high > 1.0001 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def epsilon_curve(noise_multipliers: Sequence[float], *, sampling_rate: float, steps: int, delta: float, accountant="RDP"):
    """`budget` at each noise multiplier, as a list; RDP by default, which answers in milliseconds."""
    return [
        budget(noise_multiplier=s, sampling_rate=sampling_rate, steps=steps, delta=delta, accountant=accountant)
        for s in noise_multipliers
    ]


def _checked(sigma: float, rate: float, steps: int, delta: float) -> tuple[float, float, int, float]:
    sigma = finite("noise_multiplier", sigma, low=0)
    rate, delta = finite("sampling_rate", rate, low=0, high=1), finite("delta", delta, low=0, high=1)
    if rate == 0 or delta in (0, 1):
        name, value = ("sampling_rate", rate) if rate == 0 else ("delta", delta)
        raise ValueError(f"{name} must lie in (0, 1{']' if rate == 0 else ')'}, got {value:g}")
    return sigma, rate, integer("steps", steps, low=0), delta


@lru_cache(maxsize=4096)
def _epsilon(accountant: str, sigma: float, rate: float, steps: int, delta: float) -> float:
    sigma = min(sigma, MOST)
    logging.getLogger("absl").setLevel(logging.ERROR)  # orders that do not converge are left out: still an upper bound
    if accountant == "PLD":
        return float(_pld().compose(_event(sigma, rate, steps)).get_epsilon(delta))
    from dp_accounting.rdp import compute_epsilon

    orders = _orders()

    def at(place: int) -> float:
        return float(compute_epsilon([orders[place]], [steps * _rdp_of_a_step(sigma, rate, orders[place])], delta)[0])

    # Over the orders a > 1 epsilon is (steps K(a) + g(a)) / (a - 1) with K and g convex: it falls, then rises. So some whole
    # orders and then halving around the best of them give the minimum over all, with a tenth of the work: a slider waits for
    # it, and the low fractional orders are slow and come out far too high, some of them infinite.
    whole = [place for place, order in enumerate(orders) if order % 1 == 0]
    best = min(whole[:9] + whole[9::8], key=at)  # 2 to 10 lie ten places apart, the others are neighbours
    seen, lowest, highest = [at(best)], max(0, best - 9), min(len(orders) - 1, best + 9)
    # And a divergence under delta^2 counts as none; only the lowest order can be that small where the best one is not, and
    # not even that one if the total variation says otherwise (Pinsker's inequality).
    if 2 * steps * (rate * math.erf(1 / (8**0.5 * sigma))) ** 2 < -math.log1p(-(delta**2)):
        seen.append(at(0))
    while lowest < highest:
        middle = (lowest + highest) // 2
        seen += [at(middle), at(middle + 1)]
        if seen[-2] < seen[-1]:
            highest = middle
        else:
            lowest = middle + 1
    return min(seen)


@lru_cache(maxsize=65_536)
def _rdp_of_a_step(sigma: float, rate: float, order: float) -> float:
    """Nearly all the work, and the same for every number of steps and every delta."""
    return float(_rdp([order]).compose(_event(sigma, rate, 1)).rdp[0])


@lru_cache(maxsize=1)
def _orders() -> tuple[float, ...]:
    return tuple(_rdp().orders)


def _event(sigma: float, rate: float, steps: int):
    import dp_accounting as dp  # slow to import, and only needed here

    once = dp.GaussianDpEvent(sigma)
    return dp.SelfComposedDpEvent(once if rate == 1 else dp.PoissonSampledDpEvent(rate, once), steps)


def _pld():
    from dp_accounting.pld import PLDAccountant

    return PLDAccountant()


def _rdp(orders: Sequence[float] | None = None):
    from dp_accounting.rdp import RdpAccountant

    return RdpAccountant() if orders is None else RdpAccountant(orders)
