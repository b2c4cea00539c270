"""What a model is trained to do, as one loss for every sample.

An objective never averages over samples: mechanisms decide how samples count, so any objective combines with any
mechanism. `net` maps images [M*B, C, H, W] to logits [M*B, K].

>>> per_sample = PGDAT(PGD(eps=0.1, steps=5))(net, x, y, index, rng=streams)
>>> per_sample.loss.shape, per_sample.adversarial_ce.shape                       # doctest: +SKIP
(torch.Size([M*B]), torch.Size([M*B]))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from demem_lab.attacks import PGD, cross_entropy, frozen
from demem_lab.streams import Streams
from demem_lab.validate import finite


@dataclass(frozen=True)
class PerSample:
    """What an objective returns; every tensor has M*B rows, model-major."""

    loss: Tensor  # [M*B] what is minimised
    adversarial_ce: Tensor  # [M*B] cross-entropy on the adversarial example (on the clean image for Natural)
    logits: Tensor  # [M*B, K] on the images the cross-entropy was taken on
    y: Tensor  # [M*B]
    index: Tensor  # [M*B] which sample of the data set each row is


class Objective(Protocol):
    """Anything that turns images into per-sample losses."""

    def __call__(self, net, x: Tensor, y: Tensor, index: Tensor, *, rng: Streams) -> PerSample: ...


@dataclass(frozen=True)
class Natural:
    """Cross-entropy on the images as they are."""

    def __call__(self, net, x: Tensor, y: Tensor, index: Tensor, *, rng: Streams) -> PerSample:
        """`rng` is not used."""
        logits = net(x)
        loss = cross_entropy(logits, y)
        return PerSample(loss, loss, logits, y, index)


@dataclass(frozen=True)
class PGDAT:
    """Adversarial training: cross-entropy on the attacked images (Madry et al. 2018, equation 2.1)."""

    attack: PGD

    def __call__(self, net, x: Tensor, y: Tensor, index: Tensor, *, rng: Streams) -> PerSample:
        """`rng` gives the attack's random starts."""
        logits = net(self.attack(net, x, y, rng=rng))
        loss = cross_entropy(logits, y)
        return PerSample(loss, loss, logits, y, index)


@dataclass(frozen=True)
class TRADES:
    """Clean cross-entropy + beta * KL(clean prediction || adversarial prediction) (Zhang et al. 2019, equation 5).

    The adversarial image maximises the KL term, starting from the clean image plus noise of std 0.001, as in the
    authors' public code. `adversarial_ce` is the cross-entropy on that image.
    """

    attack: PGD
    beta: float = 6.0

    def __post_init__(self) -> None:
        finite("beta", self.beta, low=0)

    def __call__(self, net, x: Tensor, y: Tensor, index: Tensor, *, rng: Streams) -> PerSample:
        """`rng` gives the attack's random starts."""
        with frozen(net), torch.no_grad():
            anchor = net(x).softmax(-1)  # the model does not change during the attack, so neither does this
        start = (x + 0.001 * rng.normal_rows(x)).clamp_(0, 1)
        x_adv = self.attack(net, x, y, start=start, loss=lambda logits, _: _kl(anchor, logits))
        clean, moved = net(x), net(x_adv)
        loss = cross_entropy(clean, y) + self.beta * _kl(clean.softmax(-1), moved)
        return PerSample(loss, cross_entropy(moved, y), moved, y, index)


def _kl(p: Tensor, logits: Tensor) -> Tensor:
    """KL(p || softmax(logits)) of each row, [B]."""
    return F.kl_div(logits.log_softmax(-1), p, reduction="none").sum(-1)
