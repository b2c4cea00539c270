"""SGD and AdamW for M models at once, each model with its own learning rate; learning-rate schedules.

Same update rules as torch.optim (tests hold them to it); written out because torch's take one learning rate for a
whole tensor, and ours is one for each model of the leading axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from demem_lab.validate import finite

Setting = float | Sequence[float]


@dataclass(frozen=True)
class SGD:
    """Momentum SGD; `lr` a number, or one for each model. weight_decay is the L2 term added to the gradient."""

    lr: Setting = 0.05
    momentum: float = 0.9
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check(self.lr, self.weight_decay)
        finite("momentum", self.momentum, low=0, high=0.9999)

    def for_models(self, rows: Sequence[int], models: int) -> SGD:
        """The same optimizer for some of the M models."""
        return replace(self, lr=_cut(self.lr, rows, models))

    def start(self, parameters: list[Tensor]) -> _Running:
        """The optimizer with its state for these parameters, each [M, ...]."""
        return _RunningSGD(self, parameters)


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019); `lr` a number, or one for each model."""

    lr: Setting = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        _check(self.lr, self.weight_decay)

    def for_models(self, rows: Sequence[int], models: int) -> AdamW:
        """The same optimizer for some of the M models."""
        return replace(self, lr=_cut(self.lr, rows, models))

    def start(self, parameters: list[Tensor]) -> _Running:
        """The optimizer with its state for these parameters, each [M, ...]."""
        return _RunningAdamW(self, parameters)


class Schedule(Protocol):
    """(step, total steps) -> factor on the learning rate."""

    def __call__(self, step: int, total: int) -> float: ...


@dataclass(frozen=True)
class HalfFlat:
    """Constant, then linear to zero over the last `tail` of the steps."""

    tail: float = 0.5

    def __post_init__(self) -> None:
        finite("tail", self.tail, low=0, high=1, fix="it is a share of all steps")

    def __call__(self, step: int, total: int) -> float:
        return min(1.0, (total - step) / max(self.tail * total, 1e-9))


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from 1 to 0."""

    def __call__(self, step: int, total: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * step / total))


@dataclass(frozen=True)
class StepDecay:
    """Times `factor` at each of `milestones`, given as fractions of all steps."""

    milestones: tuple[float, ...] = (0.75,)
    factor: float = 0.1

    def __post_init__(self) -> None:
        for milestone in self.milestones:
            finite("a milestone", milestone, low=0, high=1, fix="milestones are shares of all steps, 0.75 for instance")
        finite("factor", self.factor, low=0, high=1)

    def __call__(self, step: int, total: int) -> float:
        return self.factor ** sum(step >= m * total for m in self.milestones)


@dataclass(frozen=True)
class WarmUp:
    """Another schedule, reached in a straight line over the first `share` of the steps (Goyal et al. 2017, section 2.2)."""

    inner: Schedule
    share: float = 0.1

    def __post_init__(self) -> None:
        finite("share", self.share, low=0, high=1)

    def __call__(self, step: int, total: int) -> float:
        return min(1.0, (step + 1) / max(1.0, self.share * total)) * self.inner(step, total)


class _Running:
    def __init__(self, settings, parameters: list[Tensor]) -> None:
        self.settings, self.parameters = settings, parameters
        like = parameters[0]
        self.lr = torch.as_tensor(settings.lr, dtype=like.dtype, device=like.device)

    def _rate(self, factor: float, like: Tensor) -> Tensor:
        return (self.lr * factor).reshape(-1, *[1] * (like.ndim - 1))

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        return {f"{name}{i}": t for name, many in self.buffers.items() for i, t in enumerate(many)}

    def load(self, state: dict[str, Tensor]) -> None:
        for name, many in self.buffers.items():
            for i, t in enumerate(many):
                t.copy_(state[f"{name}{i}"])


class _RunningSGD(_Running):
    def __init__(self, settings: SGD, parameters: list[Tensor]) -> None:
        super().__init__(settings, parameters)
        self.buffers = {"momentum": [torch.zeros_like(p) for p in parameters]}

    @torch.no_grad()
    def apply(self, gradients: list[Tensor], factor: float) -> None:
        """One step; `factor` is the schedule's."""
        if self.parameters[0].is_cuda and self.lr.ndim == 0:
            return self._at_once(gradients, factor)
        for p, g, v in zip(self.parameters, gradients, self.buffers["momentum"], strict=True):
            if self.settings.weight_decay:
                g = g + self.settings.weight_decay * p
            v.mul_(self.settings.momentum).add_(g)
            p.addcmul_(v, self._rate(factor, p), value=-1)

    def _at_once(self, gradients: list[Tensor], factor: float) -> None:
        """The same with a few launches for all parameters, instead of a few for each."""
        momentum = self.buffers["momentum"]
        if self.settings.weight_decay:
            gradients = torch._foreach_add(gradients, self.parameters, alpha=self.settings.weight_decay)
        torch._foreach_mul_(momentum, self.settings.momentum)
        torch._foreach_add_(momentum, gradients)
        torch._foreach_add_(self.parameters, momentum, alpha=-self.settings.lr * factor)


class _RunningAdamW(_Running):
    def __init__(self, settings: AdamW, parameters: list[Tensor]) -> None:
        super().__init__(settings, parameters)
        self.buffers = {
            "first": [torch.zeros_like(p) for p in parameters], "second": [torch.zeros_like(p) for p in parameters],
            "count": [torch.zeros(())],
        }

    @torch.no_grad()
    def apply(self, gradients: list[Tensor], factor: float) -> None:
        """One step; `factor` is the schedule's."""
        s, (b1, b2) = self.settings, self.settings.betas
        count = int(self.buffers["count"][0].add_(1))
        if self.parameters[0].is_cuda and self.lr.ndim == 0:
            return self._at_once(gradients, s.lr * factor, count)
        for p, g, m, v in zip(self.parameters, gradients, self.buffers["first"], self.buffers["second"], strict=True):
            rate = self._rate(factor, p)
            p.mul_(1 - rate * s.weight_decay)
            m.lerp_(g, 1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            p.sub_(rate / (1 - b1**count) * m / ((v / (1 - b2**count)).sqrt() + s.eps))

    def _at_once(self, gradients: list[Tensor], rate: float, count: int) -> None:
        """The same with a few launches for all parameters, instead of ten for each."""
        s, (b1, b2), first, second = self.settings, self.settings.betas, self.buffers["first"], self.buffers["second"]
        torch._foreach_mul_(self.parameters, 1 - rate * s.weight_decay)
        torch._foreach_lerp_(first, gradients, 1 - b1)
        torch._foreach_mul_(second, b2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - b2)
        below = torch._foreach_div(second, 1 - b2**count)
        torch._foreach_sqrt_(below)
        torch._foreach_add_(below, s.eps)
        torch._foreach_addcdiv_(self.parameters, first, below, -rate / (1 - b1**count))


def _check(lr: Setting, weight_decay: float) -> None:
    for rate in lr if isinstance(lr, (tuple, list)) else (lr,):
        finite("lr", rate, low=0)
    finite("weight_decay", weight_decay, low=0)


def _cut(lr: Setting, rows: Sequence[int], models: int) -> Setting:
    if not isinstance(lr, (tuple, list)):
        return lr
    if len(lr) != models:
        raise ValueError(f"lr has {len(lr)} entries for {models} models; give one for each, or one")
    return tuple(lr[r] for r in rows)
