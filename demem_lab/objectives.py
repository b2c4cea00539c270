"""What a model is trained to do, as one loss for every sample.

An objective never averages over samples: mechanisms decide how samples count, so any objective combines with any
mechanism. `net` maps images [M*B, C, H, W] to logits [M*B, K].

>>> per_sample = PGDAT(PGD(eps=0.1, steps=5))(net, x, y, index, rng=streams)
>>> per_sample.loss.shape, per_sample.adversarial_ce.shape                       # doctest: +SKIP
(torch.Size([M*B]), torch.Size([M*B]))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from demem_lab.attacks import PGD, frozen
from demem_lab.losses import cross_entropy, log_softmax, softmax
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
    undo: Callable[[], None] | None = None  # to be called once the gradients are known, where weights were moved for them


class Objective(Protocol):
    """Anything that turns images into per-sample losses.

    One of your own is a frozen dataclass: results are kept under its fields. It takes `rng` and `counts` by these names, and
    returns a `PerSample`, whose losses are [M*B]: one number a row and no mean, or ValueError where it is trained.

    `counts` [M*B]: how much each row counts without a promise, 0 for padding and the protected. Only objectives that look
    at the batch as a whole read it (`AWP`); all others treat every row by itself, and their class says so with
    `row_by_row = True`, without which nothing is promised to anybody.
    """

    def __call__(self, net, x: Tensor, y: Tensor, index: Tensor, *, rng: Streams, counts: Tensor | None = None) -> PerSample: ...


class _OneByOne:
    """An objective in two parts: where the images are moved to, and the losses there. Rows do not see each other."""

    row_by_row = True

    def move(self, net, x: Tensor, y: Tensor, rng: Streams) -> Tensor:
        """The images the losses are taken on."""
        raise NotImplementedError

    def losses(self, net, x: Tensor, x_adv: Tensor, y: Tensor, index: Tensor) -> PerSample:
        """The losses, given both images."""
        raise NotImplementedError

    def __call__(self, net, x: Tensor, y: Tensor, index: Tensor, *, rng: Streams, counts: Tensor | None = None) -> PerSample:
        """`rng` gives the attack's random starts; `counts` is not used."""
        return self.losses(net, x, self.move(net, x, y, rng), y, index)


def in_two_parts(objective: Objective) -> bool:
    """Whether `move` and then `losses` are all that the objective does."""
    return isinstance(objective, _OneByOne) and type(objective).__call__ is _OneByOne.__call__


class _CrossEntropy(_OneByOne):
    def losses(self, net, x: Tensor, x_adv: Tensor, y: Tensor, index: Tensor) -> PerSample:
        logits = net(x_adv)
        loss = cross_entropy(logits, y)
        return PerSample(loss, loss, logits, y, index)


@dataclass(frozen=True)
class Natural(_CrossEntropy):
    """Cross-entropy on the images as they are."""

    def move(self, net, x: Tensor, y: Tensor, rng: Streams) -> Tensor:
        return x


@dataclass(frozen=True)
class PGDAT(_CrossEntropy):
    """Adversarial training: cross-entropy on the attacked images (Madry et al. 2018, equation 2.1).

    With a single-step attack it is fast adversarial training: `FGSM(eps)`, `RSFGSM(eps)` (Wong et al. 2020), `NFGSM(eps)`
    (de Jorge et al. 2022).
    """

    attack: PGD

    def move(self, net, x: Tensor, y: Tensor, rng: Streams) -> Tensor:
        return self.attack(net, x, y, rng=rng)


@dataclass(frozen=True)
class TRADES(_OneByOne):
    """Clean cross-entropy + beta * KL(clean prediction || adversarial prediction) (Zhang et al. 2019, equation 5).

    The adversarial image maximises the KL term, starting from the clean image plus noise of std 0.001, as in the
    authors' public code; unlike there the start is clamped to [0, 1], because networks here are promised pixels. Their
    beta is 1/lambda of the paper, and the gradient flows through both predictions. `adversarial_ce` is the cross-entropy
    on that image.
    """

    attack: PGD
    beta: float = 6.0

    def __post_init__(self) -> None:
        finite("beta", self.beta, low=0)
        if not isinstance(self.attack, PGD):
            raise ValueError(f"TRADES starts its attack at the clean image, which takes PGD, got {type(self.attack).__name__}")
        if self.attack.restarts > 1:
            raise ValueError(f"TRADES has one start, so {self.attack.restarts} restarts repeat one attack; use restarts=1")

    def move(self, net, x: Tensor, y: Tensor, rng: Streams) -> Tensor:
        with frozen(net), torch.no_grad():
            away = _Away(net(x))  # the model does not change during the attack, so neither does this
        start = (x + 0.001 * rng.normal_rows(x)).clamp_(0, 1)
        return self.attack(net, x, y, start=start, loss=away)

    def losses(self, net, x: Tensor, x_adv: Tensor, y: Tensor, index: Tensor) -> PerSample:
        clean, moved = net(x), net(x_adv)
        loss = cross_entropy(clean, y) + self.beta * _kl(clean, moved)
        return PerSample(loss, cross_entropy(moved, y), moved, y, index)


@dataclass(frozen=True)
class MART(_OneByOne):
    """Misclassification-aware adversarial training (Wang et al. 2020, equation 11).

    -log p_y(x') - log(1 - max_{k != y} p_k(x')) + beta * KL(p(x) || p(x')) * (1 - p_y(x)), with x' from PGD on the
    cross-entropy. The second logarithm is of 1.0001 - max p_k, as in the authors' public code: its slope would be infinite
    where a wrong class is certain. Their other guards (1e-12 inside logarithms, 1.0000001 - p_y) are not needed here,
    because logarithms are taken of logits. The attack starts at random in the ball, as the paper says; their code starts
    at noise of std 0.001.
    """

    attack: PGD
    beta: float = 5.0

    def __post_init__(self) -> None:
        finite("beta", self.beta, low=0)

    def move(self, net, x: Tensor, y: Tensor, rng: Streams) -> Tensor:
        return self.attack(net, x, y, rng=rng)

    def losses(self, net, x: Tensor, x_adv: Tensor, y: Tensor, index: Tensor) -> PerSample:
        clean, moved = net(x), net(x_adv)
        adversarial_ce = cross_entropy(moved, y)
        wrong = moved.softmax(-1).scatter(-1, y[:, None], 0).amax(-1)
        boosted = adversarial_ce - torch.log(1.0001 - wrong)
        unsure = 1 - clean.softmax(-1).gather(-1, y[:, None])[:, 0]
        return PerSample(boosted + self.beta * _kl(clean, moved) * unsure, adversarial_ce, moved, y, index)


@dataclass(frozen=True)
class AWP:
    """Adversarial weight perturbation around any of the others (Wu, Xia & Wang 2020, equations 8 to 10).

    The images are moved first; then each weight tensor moves by gamma times its own norm along the gradient of the mean
    loss, the losses are taken there with the same images, and `undo` puts the weights back. Rows move them as much as
    `counts` says: with SelectiveDP the protected have no part in it, and their guarantee survives. Biases and normalisation
    stay, as in the authors' public code. gamma there: 0.01 around PGDAT, 0.005 around TRADES. Weight decay acts on the
    weights that were put back, in their code on the moved ones; and there is no warm-up without the move.
    """

    inner: _OneByOne
    gamma: float = 0.01

    shifts_weights = True
    row_by_row = True  # the rows with a promise: the move reads the others only

    def __post_init__(self) -> None:
        finite("gamma", self.gamma, low=0, high=1)
        if not isinstance(self.inner, _OneByOne):
            raise ValueError(f"AWP goes around Natural, PGDAT, TRADES or MART, got {type(self.inner).__name__}")

    def __call__(self, net, x: Tensor, y: Tensor, index: Tensor, *, rng: Streams, counts: Tensor | None = None) -> PerSample:
        """`counts` [M*B], 1 for all rows by default."""
        x_adv = self.inner.move(net, x, y, rng)
        weights = [p for p in net.parameters() if p.ndim > 2]  # [M, ...] of more than one axis a model
        counts = torch.ones_like(y) if counts is None else counts
        statistics = [b.clone() for b in net.buffers()]
        with net.recording(False):
            losses = self.inner.losses(net, x, x_adv, y, index).loss
            loss = torch.where(counts > 0, losses * counts, 0).sum()
            # a model's gradient is scaled to length gamma * |w| below, so the mean over its rows need not be taken
            slopes = torch.autograd.grad(loss, weights)
        for buffer, old in zip(net.buffers(), statistics, strict=True):
            buffer.copy_(old)  # batch normalisation meets the images once, at the moved weights: there a proxy passes first
        before = [w.detach().clone() for w in weights]

        def undo() -> None:
            with torch.no_grad():
                for w, old in zip(weights, before, strict=True):
                    w.copy_(old)

        try:
            with torch.no_grad():
                for w, slope in zip(weights, slopes, strict=True):
                    size = self.gamma * _lengths(w) / _lengths(slope).clamp_min(1e-20)
                    w.add_(slope * size)
            return replace(self.inner.losses(net, x, x_adv, y, index), undo=undo)
        except BaseException:
            undo()
            raise


def _lengths(w: Tensor) -> Tensor:
    """Euclidean norm of each model's part of a tensor [M, ...], with axes to multiply by."""
    return w.flatten(1).norm(dim=1).view(-1, *[1] * (w.ndim - 1))


def _kl(clean: Tensor, moved: Tensor) -> Tensor:
    """KL(softmax(clean) || softmax(moved)) of each row, [B], from logits: a probability that rounds to 0 has a slope too."""
    log_p = log_softmax(clean)
    return (log_p.exp() * (log_p - log_softmax(moved))).sum(-1)


class _Away:
    """KL(softmax(clean) || softmax(logits)) of each row as the loss of an attack: all that stays the same is computed once."""

    def __init__(self, clean: Tensor) -> None:
        self.given = (clean,)  # what a recorded attack makes it of anew
        log_p = log_softmax(clean)
        self.p = log_p.exp()
        self.certain = (self.p * log_p).sum(-1)

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        return self.certain - (self.p * log_softmax(logits)).sum(-1)

    def slope(self, logits: Tensor, y: Tensor) -> Tensor:
        """Its gradient at the logits."""
        return softmax(logits) - self.p
