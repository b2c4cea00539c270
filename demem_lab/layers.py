"""Layers for M models at once that can tell the size of every sample's own gradient.

Each layer does three things: its forward pass for all models; `sample_norms`, the squared norm of every sample's
gradient; and `weighted_gradients`, the sum over samples of coefficient x gradient. The last two read what the forward
pass recorded (`calls`) and the gradients at the layer's outputs, so that one backward pass serves all samples
("book-keeping", Bu et al. 2022, arXiv 2210.00038; norms from inner products: Goodfellow 2015, arXiv 1510.01799).

A sample may pass the network several times in a step (TRADES: clean and adversarial); its gradient is the sum over the
passes, and all formulas below are for that sum.
"""

from __future__ import annotations

import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demem_lab import kernels
from demem_lab.streams import Streams

# Floats of patches at a time, on a CPU and on a GPU: the cache of a core, and no more memory than a network needs anyway.
PATCHES = 2**20, 2**26
WRITTEN = 2**24  # floats of per-sample gradients kept between norms and their weighted sum


class Layer(nn.Module):
    """A layer with parameters [M, ...]. `calls` is None, or a list of (what the weight meets, output) being recorded."""

    costly = False  # whether the norms take about as long as the layer's own forward and backward pass

    def __init__(self, models: int) -> None:
        super().__init__()
        self.models = models
        self.calls: list[tuple[Tensor, Tensor]] | None = None
        self.known: tuple[list[Tensor], object] | None = None  # what `sample_norms` found on the way, and for which deltas

    def record(self, seen: Tensor, out: Tensor) -> Tensor:
        """Keep a call. The output is made a place where a gradient can be asked for, even with frozen weights."""
        if self.calls is not None:
            if not out.requires_grad:
                out.requires_grad_()
            seen = seen.detach()
            # 16 bits are enough to compute with, not to take squares and sums of
            self.calls.append((seen.float() if seen.dtype in (torch.bfloat16, torch.float16) else seen, out))
        return out

    def found(self, deltas: list[Tensor]):
        """What the last `sample_norms` kept of these very deltas, once; None where it kept nothing."""
        known, self.known = self.known, None
        return known[1] if known is not None and known[0] is deltas else None

    def initialise(self, streams: Streams) -> None:
        """Fresh parameters, model m from its own stream."""
        raise NotImplementedError

    def sample_norms(self, deltas: list[Tensor], rows: Tensor | None = None) -> Tensor:
        """Squared gradient norms [M, B] of this layer's parameters; `deltas` are the gradients at the outputs of `calls`.

        rows: int64 [M, R], which samples of each model are asked about; the answer is [M, R] then.
        """
        raise NotImplementedError

    def weighted_gradients(self, deltas: list[Tensor], weights: Tensor) -> list[Tensor]:
        """Sum over samples of weights [M, B] x gradient, one tensor for each parameter in `self.parameters()`' order."""
        raise NotImplementedError


class Linear(Layer):
    """[M, B, inputs] -> [M, B, outputs]; weight [M, inputs, outputs], bias [M, outputs].

    `gain` scales the initial weights.
    """

    def __init__(self, models: int, inputs: int, outputs: int, *, gain: float = 1.0) -> None:
        super().__init__(models)
        self.inputs, self.outputs, self.gain = inputs, outputs, gain
        self.weight = nn.Parameter(torch.empty(models, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(models, outputs))

    def product(self, x: Tensor) -> Tensor:
        """What `forward` gives, without a record or a graph of it; `baddbmm` copies the bias first and takes a tenth longer."""
        return torch.bmm(x, self.weight).add_(self.bias[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.record(x, torch.baddbmm(self.bias[:, None], x, self.weight))

    def initialise(self, streams: Streams) -> None:
        with torch.no_grad():
            flat = streams.normal(self.inputs * self.outputs)
            self.weight.copy_(flat.view_as(self.weight) * (self.gain * math.sqrt(2 / self.inputs)))  # He et al. 2015
            self.bias.zero_()

    def sample_norms(self, deltas: list[Tensor], rows: Tensor | None = None) -> Tensor:
        seen, deltas = [_chosen(a, rows) for a, _ in self.calls], [_chosen(d, rows) for d in deltas]
        if len(deltas) == 1:
            # the gradient of one pass is an outer product, its norm the product of two norms; + 1 is the bias
            a, d = (torch.linalg.vector_norm(x, dim=-1).square() for x in (seen[0], deltas[0]))  # 1.2 to 2 x of squares' sums
            return d * (a + 1)
        a = torch.stack(seen, 2)  # [M, B, passes, inputs]
        d = torch.stack(deltas, 2)  # [M, B, passes, outputs]
        return ((a @ a.mT + 1) * (d @ d.mT)).sum((-2, -1))

    def weighted_gradients(self, deltas: list[Tensor], weights: Tensor) -> list[Tensor]:
        weight, bias = None, None
        for (seen, _), delta in zip(self.calls, deltas, strict=True):
            scaled = delta * weights[..., None]
            part, shift = seen.mT @ scaled, scaled.sum(1)
            weight, bias = (part, shift) if weight is None else (weight + part, bias + shift)
        return [weight, bias]


class Conv(Layer):
    """'Same' convolution, [B, M*inputs, H, W] -> [B, M*outputs, H', W']; weight [M, outputs, inputs, kernel, kernel].

    `gain` scales the initial weights.
    """

    costly = True

    def __init__(
        self, models: int, inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, bias: bool = True, gain: float = 1.0
    ) -> None:
        super().__init__(models)
        self.inputs, self.outputs, self.kernel, self.stride, self.gain = inputs, outputs, kernel, stride, gain
        self.weight = nn.Parameter(torch.empty(models, outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(models, outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.flatten()
        out = F.conv2d(x, self.weight.flatten(0, 1), bias, self.stride, self.kernel // 2, groups=self.models)
        return self.record(x, out)

    def initialise(self, streams: Streams) -> None:
        with torch.no_grad():
            fan_in = self.inputs * self.kernel**2
            flat = streams.normal(self.outputs * fan_in)
            self.weight.copy_(flat.view_as(self.weight) * (self.gain * math.sqrt(2 / fan_in)))  # He et al. 2015
            if self.bias is not None:
                self.bias.zero_()

    def sample_norms(self, deltas: list[Tensor], rows: Tensor | None = None) -> Tensor:
        d = [_chosen(_split(delta, self.models), rows) for delta in deltas]  # [M, B, outputs, H', W']
        a = [_chosen(_split(seen, self.models), rows) for seen, _ in self.calls]  # [M, B, inputs, H, W]
        places, samples = sum(x[0, 0, 0].numel() for x in d), d[0].shape[1]
        window = self.inputs * self.kernel**2
        # Inner products between places cost places^2, the gradient itself inputs x outputs: take the cheaper
        # (mixed ghost norm, Bu et al. 2022, arXiv 2205.10683).
        by_places = 2 * places**2 < window * self.outputs
        written, norms = [], []
        at_once = max(1, PATCHES[d[0].is_cuda] // (self.models * window * places))
        for first in range(0, max(1, samples), at_once):
            part = slice(first, first + at_once)
            own = _joined([x[:, part].flatten(3) for x in d])  # [M, b, outputs, places]
            met = _joined([self._patches(x[:, part]) for x in a])  # [M, b, window, places]
            if by_places:
                norms.append(((met.mT @ met) * (own.mT @ own)).sum((-2, -1)))
            else:
                written.append(own @ met.mT)
                norms.append(torch.linalg.vector_norm(written[-1], dim=(-2, -1)).square())
        norms, shifts = _joined(norms, 1), sum(x.sum((3, 4)) for x in d)
        if rows is None and written and self.models * samples * self.outputs * window <= WRITTEN:
            self.known = deltas, (written, shifts)  # the weighted sum is then one small product
        return norms if self.bias is None else norms + shifts.square().sum(2)

    def weighted_gradients(self, deltas: list[Tensor], weights: Tensor) -> list[Tensor]:
        found = self.found(deltas)
        if found is not None:
            written, shifts = found
            parts = weights[:, None].split([own.shape[1] for own in written], 2)
            weight = sum(part @ own.flatten(2) for part, own in zip(parts, written, strict=True))
            gradients = [weight.view_as(self.weight), (weights[:, None] @ shifts)[:, 0]]
            return gradients[:1] if self.bias is None else gradients
        shape, weight, bias = self.weight.flatten(0, 1).shape, 0, 0
        for (seen, _), delta in zip(self.calls, deltas, strict=True):
            scaled = delta * weights.T.repeat_interleave(self.outputs, 1)[..., None, None]
            with _whole_float32():
                weight = weight + nn.grad.conv2d_weight(
                    seen, shape, scaled, stride=self.stride, padding=self.kernel // 2, groups=self.models
                )
            bias = bias + scaled.sum((0, 2, 3))
        gradients = [weight.view_as(self.weight)]
        return gradients if self.bias is None else [*gradients, bias.view_as(self.bias)]

    def _patches(self, x: Tensor) -> Tensor:
        """[M, b, inputs, H, W] -> [M, b, inputs*kernel^2, places]: what each place of the output has met."""
        # a strided copy: the same as F.unfold, 2 to 4 times as fast on a CPU
        windows = F.pad(x, (self.kernel // 2,) * 4).unfold(3, self.kernel, self.stride).unfold(4, self.kernel, self.stride)
        return windows.permute(0, 1, 2, 5, 6, 3, 4).flatten(5).flatten(2, 4)


class _Normalised(Layer):
    """Scale and shift of a normalised input; what differs is over which axes a subclass normalises."""

    start = 1.0  # of the scales

    def __init__(self, models: int, channels: int) -> None:
        super().__init__(models)
        self.channels = channels
        self.weight = nn.Parameter(torch.ones(models, channels))
        self.bias = nn.Parameter(torch.zeros(models, channels))

    def normalise(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """The normalised input, scaled and shifted where `weight` and `bias` [M*C] are given."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.flatten(), self.bias.flatten()
        if self.calls is None:
            # nobody asks for the normalised input: torch's own scale and shift save a pass over memory (CNN steps: 1.2 x)
            return self.normalise(x, weight, bias).to(x.dtype)
        seen = self.normalise(x).to(x.dtype)  # autocast normalises in float32, and all that follows would stay there
        return self.record(seen, torch.addcmul(bias[:, None, None].to(x.dtype), seen, weight[:, None, None].to(x.dtype)))

    def initialise(self, streams: Streams) -> None:
        with torch.no_grad():
            self.weight.fill_(self.start)
            self.bias.zero_()

    def sample_norms(self, deltas: list[Tensor], rows: Tensor | None = None) -> Tensor:
        own = self._per_sample(deltas)
        self.known = deltas, own
        return sum(_chosen(part, rows).square().sum(-1) for part in own)

    def weighted_gradients(self, deltas: list[Tensor], weights: Tensor) -> list[Tensor]:
        own = self.found(deltas) or self._per_sample(deltas)
        return [(weights[:, None] @ part)[:, 0] for part in own]

    def _per_sample(self, deltas: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Each sample's gradient of weight and bias, [M, B, C]: so few numbers that they can be written out."""
        scale = sum((d * seen).sum((2, 3)) for (seen, _), d in zip(self.calls, deltas, strict=True))
        shift = sum(d.sum((2, 3)) for d in deltas)
        return tuple(part.unflatten(1, (self.models, -1)).transpose(0, 1) for part in (scale, shift))


class GroupNorm(_Normalised):
    """Group normalisation (Wu & He 2018): over channels of one group of one sample, so samples stay independent."""

    def __init__(self, models: int, channels: int, *, groups: int) -> None:
        super().__init__(models, channels)
        self.groups = groups
        self.statistics: list[tuple[Tensor, Tensor]] = []  # mean and 1 / standard deviation [B, M*groups] of each of `calls`

    def normalise(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return F.group_norm(x, self.models * self.groups, weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.models == 1 and kernels.able(x, self.groups):
            out, *statistics = kernels.Normalise.apply(x, self.weight.flatten(), self.bias.flatten(), self.groups)
            self.statistics = [] if self.calls is None else [*(self.statistics if self.calls else []), tuple(statistics)]
            return self.record(x, out)
        if self.calls is None or torch.is_autocast_enabled(x.device.type):
            self.statistics = []
            return super().forward(x)
        # F.group_norm's own kernel tells its statistics: with them the input says as much as the normalised input, and
        # scale and shift stay within the kernel.
        places, groups = x[0, 0].numel(), self.models * self.groups
        out, mean, deviation = torch.native_group_norm(
            x.contiguous(), self.weight.flatten(), self.bias.flatten(), len(x), x.shape[1], places, groups, 1e-5
        )
        self.statistics = [*(self.statistics if self.calls else []), (mean.detach(), deviation.detach())]
        return self.record(x, out)

    def _per_sample(self, deltas: list[Tensor]) -> tuple[Tensor, Tensor]:
        if not self.statistics:
            return super()._per_sample(deltas)
        scales, shifts = [], []
        for (seen, _), d, statistics in zip(self.calls, deltas, self.statistics, strict=True):
            mean, inverse = (part.repeat_interleave(self.channels // self.groups, 1) for part in statistics)
            shifts.append(d.sum((2, 3)))
            scales.append(((d * seen).sum((2, 3)) - mean * shifts[-1]) * inverse)
        return tuple(sum(parts).unflatten(1, (self.models, -1)).transpose(0, 1) for parts in (scales, shifts))


class BatchNorm(_Normalised):
    """Batch normalisation: samples of a batch see each other, which voids every per-sample guarantee."""

    EPS = 1e-5  # added to the variance

    def __init__(self, models: int, channels: int) -> None:
        super().__init__(models, channels)
        self.register_buffer("running_mean", torch.zeros(models, channels))
        self.register_buffer("running_var", torch.ones(models, channels))

    def normalise(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        # .view(-1) shares memory, so that the running statistics are updated in place
        mean, var = self.running_mean.view(-1), self.running_var.view(-1)
        return F.batch_norm(x, mean, var, weight, bias, training=self.training, eps=self.EPS)


@contextmanager
def _whole_float32():
    """Inside, convolutions on a GPU keep all digits of float32; by default they round to eleven bits (TF32) first."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _split(x: Tensor, models: int) -> Tensor:
    """[B, M*C, H, W] -> [M, B, C, H, W]"""
    return x.unflatten(1, (models, -1)).transpose(0, 1)


def _chosen(x: Tensor, rows: Tensor | None) -> Tensor:
    """The `rows` [M, R] of x [M, B, ...]; all without them."""
    return x if rows is None else x[torch.arange(len(rows), device=rows.device)[:, None], rows]


def _joined(parts: list[Tensor], dim: int = 3) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)  # a copy of one part would cost as much as the product
