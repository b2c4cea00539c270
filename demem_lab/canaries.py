"""A white-box audit of a mechanism as it is implemented: canaries with gradients as long as they may be.

>>> found = audit_mechanism(lambda protected: SelectiveDP(1.0, 1.0, protected), trials=2000)            # doctest: +SKIP
>>> found.lower.epsilon <= found.upper.epsilon                                                          # doctest: +SKIP
True

The auditor sees every released update. A canary's gradient is one fixed direction, always longer than the clipping bound,
so its part of an update is exactly max_grad_norm along that direction: the worst case that (epsilon, delta) allows for.
The real sampler, the real random streams, the real layers and the mechanism's own `update` are used; only the network is a
probe whose per-sample gradients are known. A lower bound above the claimed epsilon means that the implementation is wrong.
Sources: Nasr et al. 2023 (arXiv 2302.07956), Steinke, Nasr & Jagielski 2023 (arXiv 2305.08846).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from demem_lab.accounting import bound
from demem_lab.empirical import LowerBound, clopper_pearson_bound, one_run_bound
from demem_lab.guarantees import Guarantee
from demem_lab.layers import Linear
from demem_lab.mechanisms import Batch, Mechanism
from demem_lab.networks import Network
from demem_lab.objectives import PerSample
from demem_lab.sampling import Poisson
from demem_lab.streams import Streams, key, model_seeds
from demem_lab.validate import finite, integer

LOUD = 1e3  # how much longer than the bound, or than 1, a probe's gradient is; keeps the shared bias out of the picture
Build = Callable[[Tensor], Mechanism]  # protected bool [N] -> the mechanism to audit
Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]  # updates [T, steps, D], canary columns [m] -> scores [T, m]


@dataclass(frozen=True)
class WhiteBoxAudit:
    """What the auditor found, beside what is claimed."""

    lower: LowerBound
    claimed: Guarantee
    scores: np.ndarray  # [trials] or [canaries]
    included: np.ndarray  # bool, the same

    @property
    def upper(self) -> float | None:
        """The claimed epsilon; None where nothing is claimed."""
        return self.claimed.budget.epsilon if self.claimed.holds else None

    @property
    def holds(self) -> bool:
        """False when the claim is refuted (with the confidence of `lower`). Holding proves nothing."""
        return self.upper is None or self.lower.epsilon <= self.upper

    def __str__(self) -> str:
        claim = f"claimed: epsilon {bound(self.upper)}" if self.upper is not None else f"claimed: {self.claimed}"
        return f"{'Not refuted' if self.holds else 'REFUTED'}. {claim}; found: {self.lower}"


def matched_filter(updates: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The default statistic: how far all updates together moved along each canary's own direction."""
    return updates.sum(1)[:, columns]


def audit_mechanism(
    build: Build, *, trials: int = 2000, steps: int = 1, sampling_rate: float = 1.0, others: int = 6, unprotected: int = 3,
    delta: float = 1e-5, confidence: float = 0.95, seed: int = 0, statistic: Statistic = matched_filter,
) -> WhiteBoxAudit:
    """Many independent runs, each with the canary or without it by a fair coin; a Clopper-Pearson lower bound.

    build: protected flags [1 + others] -> mechanism; the canary (sample 0) is protected, and all others but `unprotected`
    of them. sampling_rate: of the Poisson sampler. statistic: what the auditor computes from the released updates.
    """
    integer("trials", trials, low=40)
    integer("others", others, low=1)
    integer("unprotected", unprotected, low=0, high=others)
    coins = torch.rand(trials, generator=torch.Generator().manual_seed(key(seed, "canary coins"))) < 0.5
    members = torch.ones(trials, 1 + others, dtype=torch.bool)
    members[:, 0] = coins
    protected = torch.ones(1 + others, dtype=torch.bool)
    protected[1 + others - unprotected :] = False
    updates, claimed = _released(build(protected), members, steps, sampling_rate, delta, seed)
    scores = statistic(updates, np.array([0]))[:, 0]
    lower = clopper_pearson_bound(scores, coins.numpy(), delta=delta, confidence=confidence, seed=seed)
    return WhiteBoxAudit(lower, claimed, scores, coins.numpy())


def audit_in_one_run(
    build: Build, *, canaries: int = 1000, steps: int = 1, sampling_rate: float = 1.0, delta: float = 1e-5,
    confidence: float = 0.95, seed: int = 0, statistic: Statistic = matched_filter,
) -> WhiteBoxAudit:
    """ONE run with at least 1,000 canaries, each included by an independent fair coin (Steinke et al. 2023).

    build: protected flags [canaries], all True -> mechanism.
    """
    integer("canaries", canaries, low=1000, fix="fewer say next to nothing in one run")
    coins = torch.rand(canaries, generator=torch.Generator().manual_seed(key(seed, "canary coins"))) < 0.5
    updates, claimed = _released(build(torch.ones(canaries, dtype=torch.bool)), coins[None], steps, sampling_rate, delta, seed)
    scores = statistic(updates, np.arange(canaries))[0]
    return WhiteBoxAudit(
        one_run_bound(scores, coins.numpy(), delta=delta, confidence=confidence), claimed, scores, coins.numpy()
    )


class _Probe(Network):
    """logits = x W + b: the gradient of a row's first logit is the row itself, and 1 for the bias."""

    def __init__(self, models: int, inputs: int) -> None:
        super().__init__(models, 0.0, 1.0)
        self.linear = Linear(models, inputs, 1)
        for parameter in self.linear.parameters():
            torch.nn.init.zeros_(parameter)

    def body(self, x: Tensor) -> Tensor:
        return self.linear(x.reshape(self.models, -1, self.linear.inputs)).flatten(0, 1)


def _released(
    mechanism: Mechanism, members: Tensor, steps: int, sampling_rate: float, delta: float, seed: int
) -> tuple[np.ndarray, Guarantee]:
    """The noisy sums of every step, [trials, steps, N], and what the mechanism claims for them."""
    integer("steps", steps, low=1)
    finite("sampling_rate", sampling_rate, low=1e-6, high=1)
    trials, n = members.shape
    bounds = np.atleast_1d(getattr(mechanism, "max_grad_norm", 1.0))
    fix = "a probe's gradient is longer still, and float32 cannot square it; audit with a smaller bound"
    loud = LOUD * max(1.0, *(finite("max_grad_norm", float(b), low=0, high=1e12, fix=fix) for b in bounds))
    claimed = mechanism.guarantee(sampling_rate=sampling_rate, steps=steps, delta=delta, n=n)
    x = loud * torch.eye(n)[:, None, None]  # sample i's gradient is loud, and along axis i
    seeds, out = model_seeds(key(seed, "white box") % 2**31, trials), []
    at_once = max(1, 20_000_000 // (n * n))
    for first in range(0, trials, at_once):
        rows = slice(first, first + at_once)
        out.append(_run(mechanism, x, members[rows], seeds[rows], steps, sampling_rate))
    return np.concatenate(out), claimed


def _run(mechanism: Mechanism, x: Tensor, members: Tensor, seeds, steps: int, sampling_rate: float) -> np.ndarray:
    trials, n = members.shape
    net = _Probe(trials, n)
    divisor = max(1.0, sampling_rate * n)  # any fixed number would do: it is known, and taken out again
    draw = Poisson(1).start(members, seeds, sampling_rate, steps)
    sums = []
    for step in range(steps):
        index, valid = draw(step)
        batch = Batch(index, valid, divisor, step, steps, Streams(seeds, "noise", step))
        flat = index.flatten()
        with net.recording(mechanism.per_sample):
            logits = net(x[flat])
            loss = logits[:, 0]
            seen = PerSample(loss, loss, logits, torch.zeros_like(flat), flat)
            gradients = mechanism.update(net, seen, batch)
        sums.append(gradients[0].detach()[:, :, 0] * divisor)
    return torch.stack(sums, 1).numpy()
