"""Rivals of selective privacy: other treatments of the losses, none with a formal promise.

>>> GradedRelease(release_schedule(score, power=4))        # the riskier, the earlier a sample leaves training   # doctest: +SKIP

All are mechanisms like those in `mechanisms`, and combine with every objective.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from demem_lab.accounting import NoGuarantee
from demem_lab.guarantees import Guarantee
from demem_lab.mechanisms import Batch, Mechanism, SelectiveDP, Setting
from demem_lab.objectives import PerSample
from demem_lab.validate import finite


@dataclass(frozen=True)
class GradedRelease(Mechanism):
    """Sample i takes part in the first `until[i]` of all steps only: what a model has not seen for long it forgets.

    until: float [N] or [M, N] in [0, 1]; 1 is to the end, 0 is Drop. No guarantee: the order of leaving is chosen from the
    data, and is itself information.
    """

    until: Tensor

    def coefficients(self, batch: Batch) -> Tensor:
        until = torch.as_tensor(self.until).to(batch.index.device)
        until = until[batch.index] if until.ndim == 1 else until.gather(1, batch.index)
        return (batch.step < until * batch.total_steps).float()

    def check(self, n: int) -> None:
        until = torch.as_tensor(self.until)
        if until.ndim not in (1, 2) or until.shape[-1] != n or not bool(((until >= 0) & (until <= 1)).all()):
            raise ValueError(f"until must hold one number in [0, 1] for each of the {n} samples, got shape {list(until.shape)}")

    def guarantee(self, *, n: int, **_) -> Guarantee:
        reason = "release from training is a choice made from the data and adds no noise"
        return Guarantee(NoGuarantee(reason), 0, n, "from_data", ())


@dataclass(frozen=True)
class ClippedRelease(GradedRelease):
    """GradedRelease, and each gradient is clipped to L2 norm `max_grad_norm`: nobody pulls hard, and the riskiest not for long.

    DP-SGD's clipping without its noise, so no guarantee. Wants a learning rate of its own, several times that of plain
    training: a clipped gradient is short. METHODS.md has its numbers beside those of its two halves.
    """

    max_grad_norm: Setting = 1.0

    per_sample = True

    def __post_init__(self) -> None:
        SelectiveDP(0.0, self.max_grad_norm)  # whose sentence it is when the bound is not a positive number

    def update(self, net, per_sample: PerSample, batch: Batch) -> list[Tensor]:
        everybody = SelectiveDP(0.0, self.max_grad_norm)
        return everybody.update(net, per_sample, replace(batch, valid=self.takes_part(batch)))


def release_schedule(score: np.ndarray, *, power: float = 4.0, floor: float = 0.0) -> Tensor:
    """until [N] for GradedRelease: 1 - (1 - floor) * r ** power, r the rank of the risk score in [0, 1] (highest risk: 1)."""
    finite("power", power, low=0.01)
    finite("floor", floor, low=0, high=1)
    score = np.asarray(score, dtype=np.float64)
    if score.ndim != 1 or len(score) < 2 or np.isnan(score).any():
        raise ValueError("scores must be one number a sample, without NaN, of at least 2 samples")
    rank = np.empty(len(score))
    rank[np.argsort(score, kind="stable")] = np.arange(len(score)) / (len(score) - 1)
    return torch.as_tensor(1 - (1 - floor) * rank**power)


@dataclass(frozen=True)
class ClassVariance(Mechanism):
    """Mean loss + lam * variance over classes of the class means of the adversarial cross-entropy.

    The fairness penalty of FAT (Ma, Wang & Liu, NeurIPS 2022); unbiased variance over the classes in the batch, fewer than
    two add 0. The authors' public code fills up to 100 classes with zeros, which punishes the level of the losses as well
    and depends on how many classes a batch happens to lack; this is the variance that the paper speaks of. With TRADES and
    MART it is of the same adversarial cross-entropy.
    """

    lam: Setting = 0.2

    def __post_init__(self) -> None:
        for value in self.lam if isinstance(self.lam, (tuple, list)) else (self.lam,):
            finite("lam", value, low=0)

    def penalty(self, per_sample: PerSample, batch: Batch) -> Tensor:
        losses = torch.where(batch.valid, per_sample.adversarial_ce.view_as(batch.valid), 0)
        classes = F.one_hot(per_sample.y.view_as(batch.valid), per_sample.logits.shape[-1]) * batch.valid[..., None]
        count = classes.sum(1)  # [M, K]
        mean = (losses[..., None] * classes).sum(1) / count.clamp_min(1)
        there = count > 0
        n = there.sum(1)
        center = (mean * there).sum(1) / n.clamp_min(1)
        squares = torch.where(there, (mean - center[:, None]).square(), 0).sum(1)
        return torch.as_tensor(self.lam, dtype=losses.dtype, device=losses.device) * squares / (n - 1).clamp_min(1)


@dataclass(frozen=True)
class RelaxLoss(Mechanism):
    """Training towards a mean loss of `alpha` instead of 0 (Chen, Yu & Fritz, ICLR 2022, algorithm 1).

    Descent where the model's mean adversarial cross-entropy is above alpha. Below it: in even epochs ascent; in odd epochs
    ascent as well, plus, for wrongly classified samples, the cross-entropy to a label that keeps the model's confidence in
    the right class (at most `upper`) and spreads the rest evenly (posterior flattening). As in the authors' public code the
    gradient flows through that label too. With an objective other than a cross-entropy, its loss is what descends and
    ascends, and the adversarial cross-entropy what is compared with alpha.
    """

    alpha: Setting = 0.5
    upper: float = 1.0

    def __post_init__(self) -> None:
        for value in self.alpha if isinstance(self.alpha, (tuple, list)) else (self.alpha,):
            finite("alpha", value, low=0)
        finite("upper", self.upper, low=0, high=1)

    def update(self, net, per_sample: PerSample, batch: Batch) -> list[Tensor]:
        valid = batch.valid
        losses = torch.where(valid, per_sample.loss.view_as(valid), 0)
        reached = torch.where(valid, per_sample.adversarial_ce.detach().view_as(valid), 0).sum(1) / valid.sum(1).clamp_min(1)
        below = reached < torch.as_tensor(self.alpha, dtype=losses.dtype, device=losses.device)
        total = losses.sum(1)
        total = torch.where(below, -total, total)
        if batch.epoch % 2:
            flat = torch.where(valid, self._flattening(per_sample).view_as(valid), 0).sum(1)
            total = total + torch.where(below, flat, 0)
        return list(torch.autograd.grad(total.sum() / batch.divisor, list(net.parameters())))

    def _flattening(self, per_sample: PerSample) -> Tensor:
        logits, y = per_sample.logits, per_sample.y
        sure = logits.softmax(-1).gather(-1, y[:, None]).clamp_max(self.upper)
        soft = ((1 - sure) / (logits.shape[-1] - 1)).expand_as(logits).scatter(-1, y[:, None], sure)
        wrong = logits.argmax(-1) != y
        return torch.where(wrong, -(soft * logits.log_softmax(-1)).sum(-1), 0)
