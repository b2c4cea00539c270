"""A privacy budget for every sample: noise while it takes part, and it leaves when its budget is spent.

>>> steps_within([1.0, 4.0], noise_multiplier=1.0, sampling_rate=0.05, delta=1e-4, most=500).tolist()
[0, 147]

Selective privacy gives all protected samples the same epsilon. Here each has its own: a protected sample is charged at
EVERY step, drawn or not, with what the mechanism could reveal about it at the clipping bound, and takes no further part
once the next charge would exceed its budget (a Renyi filter; Feldman & Zrnic 2021, arXiv 2008.11193). Charged at the
bound, the filter is a limit on steps that is known in advance and looks at nothing but the budget. Give the riskiest the
smallest budgets, and it is graded release with a promise, given the budgets: these are then a choice made from everybody's
data, which no noise covers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from demem_lab.accounting import MOST, Budget, NoGuarantee, budget
from demem_lab.guarantees import Guarantee
from demem_lab.mechanisms import Batch, SelectiveDP, look_up
from demem_lab.validate import finite, integer

PRIVATE = "individual budgets chosen from the data, which are private themselves"


@dataclass(frozen=True)
class BudgetedDP(SelectiveDP):
    """SelectiveDP whose protected samples take part in their first `allowed` steps only.

    allowed: int64 [N] or [M, N], from `steps_within`; entries of unprotected samples are not read. The noise goes on until
    the last of the protected has left: who has left is fixed by the budgets, so its end says nothing about the batches.
    selection: how set AND budgets came about; the promise covers that choice only for "fixed" and "public" ones. Allowed
    everything, this is SelectiveDP; allowed nothing, it is Drop.
    """

    allowed: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allowed is None:
            raise ValueError("allowed must say in how many steps each sample may take part; make it with steps_within(...)")

    def takes_part(self, batch: Batch) -> Tensor:
        """bool [M, B]: everybody who has not left."""
        return batch.valid & ~(self._is_protected(batch) & (batch.step >= look_up(self.allowed, batch)))

    def _noise_std(self, batch: Batch, models: int, like: Tensor) -> Tensor:
        last = torch.as_tensor(self._allowed_to_protected().amax(-1), device=like.device)
        return torch.where(batch.step < last, super()._noise_std(batch, models, like), 0)

    def _allowed_to_protected(self) -> Tensor:
        allowed = torch.as_tensor(self.allowed)
        return allowed if self.protected is None else torch.where(torch.as_tensor(self.protected), allowed, 0)

    def check(self, n: int) -> None:
        """ValueError unless flags and steps fit n samples."""
        super().check(n)
        allowed = torch.as_tensor(self.allowed)
        if allowed.is_floating_point() or allowed.ndim not in (1, 2) or allowed.shape[-1] != n or bool((allowed < 0).any()):
            raise ValueError(f"allowed must hold a whole number >= 0 for each of {n} samples, got shape {list(allowed.shape)}")

    def guarantee(self, *, steps: int, model: int = 0, **settings) -> Guarantee:
        """The budget that the longest-serving protected sample has spent; everybody else of the protected spent at most that."""
        allowed = self._allowed_to_protected()
        longest = int((allowed[model] if allowed.ndim == 2 else allowed).max())
        promised = super().guarantee(steps=min(steps, longest), model=model, **settings)
        private = (PRIVATE,) if self.selection == "from_data" else ()
        return replace(promised, not_accounted=(*promised.not_accounted, *private), budgets=self.selection)

    def spent(self, *, sampling_rate: float, steps: int, delta: float, model: int = 0) -> dict[int, Budget | NoGuarantee]:
        """{steps a protected sample took part in: what it spent}. Not for publication: who spent what is information itself."""
        sigma = self.noise_multiplier[model] if isinstance(self.noise_multiplier, (tuple, list)) else self.noise_multiplier
        allowed = torch.as_tensor(self.allowed)
        allowed = allowed[model] if allowed.ndim == 2 else allowed
        if self.protected is not None:
            who = torch.as_tensor(self.protected)
            allowed = allowed[who[model] if who.ndim == 2 else who]
        return {
            int(t): budget(noise_multiplier=sigma, sampling_rate=sampling_rate, steps=int(t), delta=delta)
            for t in allowed.clamp_max(steps).unique()
        }


def steps_within(
    epsilon, *, noise_multiplier: float, sampling_rate: float, delta: float, most: int
) -> Tensor:
    """int64 [N]: in how many steps (at most `most`) a sample with budget epsilon [N] at `delta` may take part.

    The largest T for which T times the Renyi divergence of one step of the Poisson-subsampled Gaussian mechanism, at the
    order that is best for that budget, converts to at most epsilon. inf: no limit. ValueError for NaN, epsilon < 0 or no noise.
    """
    import dp_accounting as dp
    from dp_accounting.rdp import RdpAccountant

    epsilon = np.asarray(epsilon, dtype=np.float64)
    if epsilon.ndim != 1 or np.isnan(epsilon).any() or (epsilon < 0).any():
        raise ValueError("epsilon must be one budget >= 0 for each sample, without NaN; inf is no limit")
    sigma = finite("noise_multiplier", noise_multiplier, low=0.01, fix="without noise no budget lasts a single step")
    rate, most = finite("sampling_rate", sampling_rate, low=0, high=1), integer("most", most, low=0)
    delta = finite("delta", delta, low=1e-300, high=0.99)
    accountant = RdpAccountant()
    once = dp.GaussianDpEvent(min(sigma, MOST))
    accountant.compose(once if rate == 1 else dp.PoissonSampledDpEvent(rate, once))
    orders, charge = np.asarray(accountant.orders, dtype=np.float64), np.asarray(accountant.rdp, dtype=np.float64)
    usable = (orders > 1) & np.isfinite(charge) & (charge > 0)
    orders, charge = orders[usable], charge[usable]
    # epsilon of a Renyi bound r at order a: r + log(1 - 1/a) - log(delta * a) / (a - 1)  (Canonne et al. 2020, proposition 12)
    room = epsilon[:, None] - np.log1p(-1 / orders) + np.log(delta * orders) / (orders - 1)
    steps = np.where(epsilon == 0, 0, np.floor((room / charge).max(1, initial=0)))
    return torch.as_tensor(np.minimum(steps, most).astype(np.int64))


def graded_budgets(score: np.ndarray, *, largest: float, smallest: float, power: float = 4.0) -> np.ndarray:
    """epsilon [N]: from `largest` at the lowest risk score [N] down to `smallest` at the highest, by rank ** power."""
    finite("smallest", smallest, low=0)
    finite("largest", largest, low=smallest)
    score = np.asarray(score, dtype=np.float64)
    if score.ndim != 1 or len(score) < 2 or np.isnan(score).any():
        raise ValueError("scores must be one number a sample, without NaN, of at least 2 samples")
    rank = np.empty(len(score))
    rank[np.argsort(score, kind="stable")] = np.arange(len(score)) / (len(score) - 1)
    return largest - (largest - smallest) * rank**power
