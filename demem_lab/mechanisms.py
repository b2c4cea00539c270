"""From per-sample losses to one update: who counts how much, who is clipped, and how much noise is added.

All mechanisms share one sentence: the update is the sum of coefficient x gradient over the batch's samples, plus noise,
divided by the expected batch size. They differ in the coefficient (`Drop`, `DownWeight`), in an added penalty
(`LossVariance`), or in clipping and noising some samples (`SelectiveDP`; `DPSGD` is the same with everybody protected).

>>> mechanism = SelectiveDP(noise_multiplier=1.0, max_grad_norm=1.0, protected=flags)
>>> with net.recording(mechanism.per_sample):
...     per_sample = objective(net, x, y, index, rng=streams)
...     gradients = mechanism.update(net, per_sample, batch)                     # doctest: +SKIP

Settings may differ between the M models: a number, or one for each model; flags bool [N], or [M, N].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from demem_lab.accounting import NoGuarantee, budget
from demem_lab.guarantees import Guarantee
from demem_lab.objectives import PerSample
from demem_lab.precision import whole_products
from demem_lab.streams import Streams
from demem_lab.validate import choice, finite, flags

Setting = float | Sequence[float]
SELECTIONS = ("fixed", "public", "from_data")


@dataclass(frozen=True)
class Batch:
    """What a mechanism may know of a step. Padding, non-members and undrawn samples are the rows that are not valid."""

    index: Tensor  # int64 [M, B] which sample of the data set
    valid: Tensor  # bool [M, B]
    divisor: float  # expected batch size: never the size that was drawn, which would depend on who is in
    step: int
    total_steps: int
    noise: Streams
    epoch: int = 0


class Mechanism:
    """Base of all mechanisms. Subclasses give `coefficients`, `penalty` or their own `update`.

    One of your own is a frozen dataclass: results are kept under its fields. A tuple holds one entry for each of the M models,
    and an array [M, N] one row; both are cut where models are trained apart (`for_models`). An array [N] is for all models, and
    becomes [M, N] where models that have each their own are trained at once: `look_up` reads both.
    """

    per_sample = False  # whether the update needs every sample's own gradient norm

    def coefficients(self, batch: Batch) -> Tensor | None:
        """How much each sample's gradient counts, [M, B]; None when all count 1. Below 0 its loss is climbed (unlearning)."""
        return None

    def takes_part(self, batch: Batch) -> Tensor:
        """bool [M, B]: the rows worth computing. One that counts exactly 0 costs nothing: it is neither attacked nor passed."""
        coefficients = self.coefficients(batch)
        return batch.valid if coefficients is None else batch.valid & (coefficients != 0)

    @property
    def shrinks(self) -> bool:
        """Whether samples may leave, so that batches become smaller."""
        kind = type(self)
        return kind.takes_part is not Mechanism.takes_part or kind.coefficients is not Mechanism.coefficients

    def penalty(self, per_sample: PerSample, batch: Batch) -> Tensor | None:
        """A further loss for each model, [M]; None when there is none."""
        return None

    def counted(self, batch: Batch) -> Tensor:
        """bool [M, B]: the rows that count without a promise; only they may shape what the whole batch shares."""
        return self.takes_part(batch)

    def update(self, net, per_sample: PerSample, batch: Batch) -> list[Tensor]:
        """One gradient for each of net.parameters(), each [M, ...]."""
        return self.descend(net, per_sample, batch, self.weights(batch).to(per_sample.loss.dtype))

    def weights(self, batch: Batch) -> Tensor:
        """How much each row counts, [M, B]; padding counts 0."""
        weights, coefficients = batch.valid.float(), self.coefficients(batch)
        return weights if coefficients is None else weights * coefficients

    def descend(self, net, per_sample: PerSample, batch: Batch, weights: Tensor) -> list[Tensor]:
        """The gradients, given `weights` [M, B]."""
        # where() and not a product: an invalid row may hold inf or NaN, and 0 * inf would poison the sum
        losses = torch.where(batch.valid, per_sample.loss.view_as(weights), 0)
        total = (losses * weights).sum() / batch.divisor
        penalty = self.penalty(per_sample, batch)
        if penalty is not None:
            total = total + penalty.sum()
        # models do not touch, so the gradient of the sum over models is every model's own gradient
        return list(torch.autograd.grad(total, list(net.parameters())))

    def guarantee(
        self, *, sampling_rate: float, steps: int, delta: float, n: int, poisson: bool = True, batch_norm: bool = False,
        row_by_row: bool = True, model: int = 0,
    ) -> Guarantee:
        """What this mechanism promises model number `model`'s samples."""
        return Guarantee(NoGuarantee(f"{type(self).__name__} adds no calibrated noise"), 0, n, "fixed", ())

    def for_models(self, rows: Sequence[int], models: int) -> Mechanism:
        """The same mechanism for some of the M models: settings and flags of shape [M, ...] are cut to `rows`."""
        changes = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim == 2 or isinstance(value, (tuple, list)):
                if len(value) != models:
                    raise ValueError(f"{field.name} has {len(value)} entries for {models} models; give one for each, or one")
                changes[field.name] = value[list(rows)] if hasattr(value, "ndim") else tuple(value[r] for r in rows)
        return replace(self, **changes)

    def on(self, device: torch.device) -> Mechanism:
        """The same with its flags on a device: every step looks them up."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        held = {name: torch.as_tensor(v).to(device) for name, v in held.items() if isinstance(v, (torch.Tensor, np.ndarray))}
        return replace(self, **held) if held else self

    def check(self, n: int) -> None:
        """ValueError when the mechanism's flags do not fit a data set of n samples."""


@dataclass(frozen=True)
class Plain(Mechanism):
    """Every sample counts 1."""


@dataclass(frozen=True)
class LossVariance(Mechanism):
    """Mean loss + lam * variance of the adversarial cross-entropies in the batch: DeMem as in the authors' public code.

    Unbiased variance (divisor n - 1) over the model's own valid samples; the gradient flows through all of it; fewer
    than two valid samples add 0. Equivalent to the coefficient 1 + 2 lam B / (n - 1) (l_i - mean l) for PGD-AT, B the
    expected batch size: hard samples gain, easy ones lose. No formal guarantee. Source: Luo & Li, arXiv 2412.05767.
    """

    lam: Setting = 0.2

    def __post_init__(self) -> None:
        _check("lam", self.lam)

    def penalty(self, per_sample: PerSample, batch: Batch) -> Tensor:
        losses = torch.where(batch.valid, per_sample.adversarial_ce.view_as(batch.valid), 0)
        n = batch.valid.sum(1)
        mean = losses.sum(1) / n.clamp_min(1)
        squares = torch.where(batch.valid, (losses - mean[:, None]).square(), 0)
        return _per_model(self.lam, losses) * squares.sum(1) / (n - 1).clamp_min(1)

    def guarantee(self, *, n: int, **_) -> Guarantee:
        return Guarantee(NoGuarantee("LossVariance shapes the losses and adds no noise"), 0, n, "fixed", ())


@dataclass(frozen=True)
class Drop(Mechanism):
    """Flagged samples never train: the control that any treatment of the same samples has to beat."""

    flagged: Tensor

    def coefficients(self, batch: Batch) -> Tensor:
        return (~look_up(self.flagged, batch)).float()

    def check(self, n: int) -> None:
        flags("flagged", self.flagged, n=n)

    def guarantee(self, *, n: int, **_) -> Guarantee:
        reason = "dropping is a choice made from the data; the samples left have none"
        return Guarantee(NoGuarantee(reason), 0, n, "from_data", ())


@dataclass(frozen=True)
class DownWeight(Mechanism):
    """Flagged samples count `weight` (0 is Drop, 1 is Plain)."""

    flagged: Tensor
    weight: Setting = 0.3

    def __post_init__(self) -> None:
        _check("weight", self.weight)

    def coefficients(self, batch: Batch) -> Tensor:
        flagged = look_up(self.flagged, batch)
        weight = _per_model(self.weight, torch.empty(0, device=flagged.device))
        return torch.where(flagged, weight.reshape(-1, 1), 1.0)

    def check(self, n: int) -> None:
        flags("flagged", self.flagged, n=n)


@dataclass(frozen=True)
class SelectiveDP(Mechanism):
    """DP-SGD for the protected samples, ordinary training for the rest: DeMem's explicit reading.

    A protected sample's gradient is clipped to L2 norm `max_grad_norm`; Gaussian noise of std noise_multiplier *
    max_grad_norm is added to the SUM at every step, also when no protected sample (or nobody) was drawn: noise that comes
    and goes would tell who was there. A set fixed as empty adds no noise and is Plain; a set of one adds the full noise.

    protected: bool [N] or [M, N], or None for everybody. selection: how that set came about; the guarantee is
    conditional on it. Sources: Abadi et al. 2016 (arXiv 1607.00133), algorithm 1; PAPER: Luo & Li, arXiv 2412.05767.
    """

    noise_multiplier: Setting
    max_grad_norm: Setting = 1.0
    protected: Tensor | None = None
    selection: str = "from_data"

    per_sample = True

    def counted(self, batch: Batch) -> Tensor:
        return batch.valid & ~self._is_protected(batch)

    def __post_init__(self) -> None:
        _check("noise_multiplier", self.noise_multiplier)
        _check("max_grad_norm", self.max_grad_norm, positive=True)
        choice("selection", self.selection, SELECTIONS)

    def update(self, net, per_sample: PerSample, batch: Batch) -> list[Tensor]:
        clipped = self.clipped(batch)
        return self.noised(self.sums(net, per_sample, self.takes_part(batch), clipped, self.few(net, clipped)), batch)

    def clipped(self, batch: Batch) -> Tensor:
        """bool [M, B]: the rows whose gradients are clipped."""
        return self._is_protected(batch) & batch.valid

    def sums(self, net, per_sample: PerSample, valid: Tensor, clipped: Tensor, rows: Tensor | None) -> list[Tensor]:
        """Sums of the gradients, those of `clipped` clipped, one for each of net.parameters(); `rows` as `few` gives them."""
        layers = [layer for layer in net.layers if layer.calls]
        outputs = [out for layer in layers for _, out in layer.calls]
        losses = torch.where(valid, per_sample.loss.view_as(valid), 0)
        deltas = iter(net.unscaled(torch.autograd.grad(losses.sum(), outputs)))
        by_layer = [(layer, [next(deltas) for _ in layer.calls]) for layer in layers]
        gradients = {}
        with whole_products():  # noise is measured for the bound, not for the bound and what a norm's lost digits add to it
            weights = self._factors(by_layer, valid, clipped, rows, losses)
            for layer, own in by_layer:
                gradients.update(zip(layer.parameters(), layer.weighted_gradients(own, weights), strict=True))
        return [gradients[p] for p in net.parameters()]

    def _factors(self, by_layer, valid: Tensor, clipped: Tensor, rows: Tensor | None, losses: Tensor) -> Tensor:
        norms = sum(layer.sample_norms(own, rows) for layer, own in by_layer).clamp_min(0).sqrt()  # [M, B], or of `rows`
        bound = _per_model(self.max_grad_norm, losses).reshape(-1, 1)
        factor = bound / norms.clamp_min(bound)
        if rows is not None:
            factor = torch.ones_like(losses).scatter(1, rows, factor)
        return torch.where(valid, torch.where(clipped, factor, 1.0), 0.0)

    def noised(self, sums: list[Tensor], batch: Batch) -> list[Tensor]:
        """The sums with noise, divided by the expected batch size."""
        noise_std = self._noise_std(batch, len(batch.valid), sums[0])
        # a card is not asked, as it would be waited for: noise of no length is drawn and added then
        if self._noiseless() or (not sums[0].is_cuda and not bool((noise_std > 0).any())):
            return [s / batch.divisor for s in sums]
        sizes = [s[0].numel() for s in sums]
        noise = batch.noise.private_normal(sum(sizes), sums[0].dtype).mul_(noise_std[:, None] / batch.divisor)
        noised = [part.view_as(s) for s, part in zip(sums, noise.split(sizes, 1), strict=True)]
        torch._foreach_add_(noised, sums, alpha=1 / batch.divisor)
        return noised

    def _noiseless(self) -> bool:
        sigma = self.noise_multiplier
        return not any(sigma) if isinstance(sigma, (tuple, list)) else not sigma

    def few(self, net, clipped: Tensor) -> Tensor | None:
        """int64 [M, R], the rows whose norms are needed (and some that fill up); None where all may as well be asked.

        Norms of convolutions cost as much as a plain step (one that protects a tenth: 2.2 becomes 1.2 plain steps).
        """
        if self.protected is None or not any(layer.costly for layer in net.layers):
            return None
        most, unit = max(1, int(clipped.sum(1).max())), 8 if clipped.is_cuda else 1  # a few numbers, to be recorded (`replay`)
        most = -(-most // unit) * unit
        return None if 2 * most > clipped.shape[1] else clipped.int().argsort(1, descending=True)[:, :most]

    def _is_protected(self, batch: Batch) -> Tensor:
        if self.protected is None:
            return torch.ones_like(batch.valid)
        return look_up(self.protected, batch)

    def _noise_std(self, batch: Batch, models: int, like: Tensor) -> Tensor:
        std = _per_model(self.noise_multiplier, like) * _per_model(self.max_grad_norm, like)
        anybody = True if self.protected is None else torch.as_tensor(self.protected).to(like.device).any(-1)
        return torch.where(torch.as_tensor(anybody, device=like.device), std, 0).expand(models)

    def check(self, n: int) -> None:
        if self.protected is not None:
            flags("protected", self.protected, n=n)

    def guarantee(
        self, *, sampling_rate: float, steps: int, delta: float, n: int, poisson: bool = True, batch_norm: bool = False,
        row_by_row: bool = True, model: int = 0,
    ) -> Guarantee:
        """(epsilon, delta) under add/remove for each single protected sample, conditional on the protected set.

        `protected=None` is a set that no data had a say in; flags that cover everybody are what `selection` says of them.
        row_by_row: whether images are changed, passed and judged row by row (`Recipe.row_by_row`): else one sample's gradient
        holds others, and clipping it bounds nobody's part.

        Raises ValueError when the flags do not fit n samples.
        """
        self.check(n)
        sigma = _of_model(self.noise_multiplier, model)
        protected = n
        if self.protected is not None:
            row = self.protected[model] if self.protected.ndim == 2 else self.protected
            protected = int(row.sum())
        if batch_norm:
            promised = NoGuarantee("batch normalisation mixes the samples of a batch; use norm='group'")
        elif not row_by_row:
            promised = NoGuarantee(
                "network, objective or augmentation may mix rows; give its class `row_by_row = True` if each row is apart"
            )
        elif not poisson:
            promised = NoGuarantee("shuffled batches are not Poisson samples; train with Poisson(...)")
        elif not protected:
            promised = NoGuarantee("nobody is protected")
        else:
            promised = budget(noise_multiplier=sigma, sampling_rate=sampling_rate, steps=steps, delta=delta)
        return Guarantee(promised, protected, n, "fixed" if self.protected is None else self.selection)


def DPSGD(noise_multiplier: Setting, max_grad_norm: Setting = 1.0) -> SelectiveDP:  # noqa: N802 - the method's name
    """Differentially private SGD: SelectiveDP with everybody protected (a set that no data had a say in)."""
    return SelectiveDP(noise_multiplier, max_grad_norm, protected=None, selection="fixed")


def _check(name: str, value: Setting, *, positive: bool = False) -> None:
    for number in value if isinstance(value, (tuple, list)) else (value,):
        finite(name, number, low=0)
        if positive and number == 0:
            raise ValueError(f"{name} must be > 0, got {number!r}; a bound of 0 would erase every protected sample")


def _per_model(value: Setting, like: Tensor) -> Tensor:
    if isinstance(value, (int, float)):
        return like.new_full((), value)  # nothing to fetch from the CPU, which a GPU would wait for
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def _of_model(value: Setting, model: int) -> float:
    return float(value[model] if isinstance(value, (tuple, list)) else value)


def look_up(mask: Tensor, batch: Batch) -> Tensor:
    """bool [M, B]: the flags of the batch's samples."""
    mask = torch.as_tensor(mask).to(batch.index.device)
    return mask[batch.index] if mask.ndim == 1 else mask.gather(1, batch.index)
