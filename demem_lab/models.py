"""Networks that are M networks at once.

Every parameter carries a leading model axis, so shadow models, seeds and the whole plane behind a slider are one
forward pass. A network maps images [M*B, C, H, W] (model-major: the first B rows belong to model 0) to logits
[M*B, K]; M = 1 is an ordinary classifier.

>>> net = MLP(hidden=(32,)).build(models=4, shape=(1, 8, 8), classes=10, seeds=(0, 1, 2, 3))
>>> net(torch.rand(4 * 5, 1, 8, 8)).shape
torch.Size([20, 10])

Layers can also record what book-keeping needs (their inputs and outputs), so that per-sample gradient norms and clipped
sums cost one backward pass and never one sample at a time (Bu et al. 2022, arXiv 2210.00038).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demem_lab.layers import BatchNorm, Conv, GroupNorm, Layer, Linear
from demem_lab.streams import Streams
from demem_lab.validate import choice, integer

# Initial logits of a convolutional network are kept near 0: from large ones, adversarial training on CIFAR-10 first has to
# unlearn a confidence that means nothing, and often ends in a constant answer.
OUT_GAIN = 0.1


class Network(nn.Module):
    """M classifiers of one architecture; `models` is M, `has_batch_norm` says whether samples of a batch interact."""

    def __init__(self, models: int, mean: float, std: float) -> None:
        super().__init__()
        self.models, self.mean, self.std = models, mean, std
        self.half: torch.dtype | None = None  # what the layers compute in, if not in the dtype of their weights
        self.scale = 1.0  # of the gradients inside the network
        self.hooks: list = []
        self.channels_last = False

    def arranged_for(self, device: torch.device | str) -> Network:
        """Itself, with images laid out as the device wants them: a GPU convolves fastest with channels last."""
        convolves = any(isinstance(layer, Conv) for layer in self.layers)
        # several models side by side are one grouped convolution, which has no such kernels
        self.channels_last = torch.device(device).type == "cuda" and convolves and self.models == 1
        return self

    def compute_in(self, half: torch.dtype | None, scale: float = 1.0) -> None:
        """Let the layers compute in a 16-bit `half`, with gradients `scale` times as large inside the network.

        Logits, and gradients of weights and images, come out in float32 and unscaled. None: as the weights are.
        """
        self.half, self.scale = half, scale
        if scale != 1 and not self.hooks:
            self.hooks = [p.register_hook(lambda g: g / self.scale) for p in self.parameters()]

    def unscaled(self, deltas: Sequence[Tensor]) -> list[Tensor]:
        """Gradients at outputs inside the network, as they would be without `scale`, in float32 (or float64)."""
        if self.half is None:
            return list(deltas)
        return [delta.float() / self.scale for delta in deltas]

    def forward(self, x: Tensor) -> Tensor:
        """Images [M*B, C, H, W] in [0, 1] -> logits [M*B, K]."""
        if x.shape[0] % self.models:
            raise ValueError(f"{x.shape[0]} rows cannot be shared by {self.models} models; give the same number to each")
        # normalisation is part of the model, so that attacks and their eps live in pixel units
        x = _with_slope(x, 1 / self.scale)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.normalised(x)
        with torch.autocast(x.device.type, self.half, enabled=self.half is not None):
            logits = self.body(x)
        return logits if self.half is None else _with_slope(logits.float(), self.scale)

    def normalised(self, x: Tensor) -> Tensor:
        """Pixels as the first layer sees them."""
        return (x - self.mean) / self.std if (self.mean, self.std) != (0.0, 1.0) else x

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def layers(self) -> list[Layer]:
        """All layers with parameters, in a fixed order."""
        return [layer for layer in self.modules() if isinstance(layer, Layer)]

    @property
    def has_batch_norm(self) -> bool:
        return any(isinstance(layer, BatchNorm) for layer in self.layers)

    @contextmanager
    def recording(self, on: bool = True):
        """Inside, layers keep their inputs and outputs (`layer.calls`), what per-sample norms are computed from."""
        before = [layer.calls for layer in self.layers]
        for layer in self.layers:
            layer.calls = [] if on else None
        try:
            yield self
        finally:
            for layer, calls in zip(self.layers, before, strict=True):
                layer.calls = calls

    def state(self) -> dict[str, Tensor]:
        """Parameters and running statistics by name, each [M, ...], detached and on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.state_dict().items()}


class _Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor, None]:
        return slope * ctx.factor, None


def _with_slope(x: Tensor, factor: float) -> Tensor:
    """x, whose gradient will be multiplied by `factor` on its way back."""
    return x if factor == 1 else _Slope.apply(x, factor)


class Spec(Protocol):
    """What describes an architecture before the data are known."""

    def build(self, *, models: int, shape: Sequence[int], classes: int, seeds: Sequence[int], device="cpu") -> Network: ...


@dataclass(frozen=True)
class MLP:
    """Fully connected ReLU network on the flattened image."""

    hidden: tuple[int, ...] = (128, 128)
    mean: float = 0.0
    std: float = 1.0

    def build(self, *, models: int, shape: Sequence[int], classes: int, seeds: Sequence[int], device="cpu") -> Network:
        """M freshly initialised networks for images of `shape` (C, H, W)."""
        return _initialised(_Dense(self, models, math.prod(shape), classes), seeds, device)


@dataclass(frozen=True)
class SmallCNN:
    """Three 3x3 convolutions with GroupNorm, then one hidden layer; strides and pooling follow the image size."""

    width: int = 16
    hidden: int = 64
    mean: float = 0.5
    std: float = 0.25

    def build(self, *, models: int, shape: Sequence[int], classes: int, seeds: Sequence[int], device="cpu") -> Network:
        """M freshly initialised networks for images of `shape` (C, H, W), H and W at least 8."""
        integer("image height", shape[1], low=8, fix="use the MLP for smaller images")
        if integer("width", self.width, low=4) % 4:
            raise ValueError(f"width must be a multiple of 4, for GroupNorm's four groups, got {self.width}")
        return _initialised(_Convolutional(self, models, shape, classes), seeds, device)


@dataclass(frozen=True)
class ResNet18:
    """ResNet-18 with the CIFAR stem (one 3x3 convolution, no pooling), He et al. 2016.

    `norm` "group" keeps samples independent, which per-sample guarantees need; "batch" trains faster and better, and
    every privacy guarantee is void with it.
    """

    width: int = 64
    norm: str = "group"
    mean: float = 0.5
    std: float = 0.25

    def build(self, *, models: int, shape: Sequence[int], classes: int, seeds: Sequence[int], device="cpu") -> Network:
        """M freshly initialised networks for images of `shape` (C, H, W)."""
        return _initialised(_Residual(self, models, shape, classes), seeds, device)


@dataclass(frozen=True)
class WideResNet:
    """WideResNet-`depth`-`widen` with pre-activation blocks (Zagoruyko & Komodakis 2016); 28-10 has 36.5 million weights.

    `norm` as in ResNet18.
    """

    depth: int = 28
    widen: int = 10
    norm: str = "group"
    mean: float = 0.5
    std: float = 0.25

    def build(self, *, models: int, shape: Sequence[int], classes: int, seeds: Sequence[int], device="cpu") -> Network:
        """M freshly initialised networks for images of `shape` (C, H, W)."""
        if (integer("depth", self.depth, low=10) - 4) % 6:
            raise ValueError(f"depth must be 6 n + 4, for three groups of n blocks: 10, 16, 22, 28, 34; got {self.depth}")
        integer("widen", self.widen, low=1)
        return _initialised(_Wide(self, models, shape, classes), seeds, device)


@dataclass(frozen=True)
class VGG:
    """A small VGG (Simonyan & Zisserman 2015) for SVHN: three pairs of 3x3 convolutions, each halved by max pooling."""

    width: int = 32
    norm: str = "group"
    mean: float = 0.5
    std: float = 0.25

    def build(self, *, models: int, shape: Sequence[int], classes: int, seeds: Sequence[int], device="cpu") -> Network:
        """M freshly initialised networks for images of `shape` (C, H, W), H and W at least 8."""
        integer("image height", min(shape[1:]), low=8, fix="use the MLP for smaller images")
        return _initialised(_Pairs(self, models, shape, classes), seeds, device)


class _Dense(Network):
    def __init__(self, spec: MLP, models: int, pixels: int, classes: int) -> None:
        super().__init__(models, spec.mean, spec.std)
        sizes = (pixels, *spec.hidden, classes)
        self.linear = nn.ModuleList(Linear(models, a, b) for a, b in itertools.pairwise(sizes))

    def body(self, x: Tensor) -> Tensor:
        h = x.reshape(self.models, -1, self.linear[0].inputs)  # [M, B, pixels]
        for layer in self.linear[:-1]:
            h = F.relu(layer(h))
        return self.linear[-1](h).flatten(0, 1)

    @torch.no_grad()
    def by_hand(self, x: Tensor, slope_of: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Gradient at the images [M*B, C, H, W] of what has the gradient `slope_of(logits)` at the logits.

        An attack asks for nothing else, and autograd's graph costs as much as a third of its time. None where the layers
        compute in 16 bits or are compiled: that is autograd's business.
        """
        if self.half is not None or "body" in vars(self):
            return None
        h = self.normalised(x).reshape(self.models, -1, self.linear[0].inputs)
        seen = []
        for layer in self.linear[:-1]:
            h = layer.product(h).relu_()
            seen.append(h)
        slope = slope_of(self.linear[-1].product(h).flatten(0, 1)).unflatten(0, (self.models, -1))
        for layer, h in zip(self.linear[:0:-1], reversed(seen), strict=True):
            slope = torch.ops.aten.threshold_backward(slope @ layer.weight.mT, h, 0)
        return (slope @ self.linear[0].weight.mT).view_as(x) / self.std


class _Convolutional(Network):
    def __init__(self, spec: SmallCNN, models: int, shape: Sequence[int], classes: int) -> None:
        super().__init__(models, spec.mean, spec.std)
        c, w = shape[0], spec.width
        strides = (1, 2, 1) if shape[1] <= 16 else (1, 2, 2)
        channels = (c, w, 2 * w, 2 * w)
        self.conv = nn.ModuleList(Conv(models, channels[i], channels[i + 1], stride=strides[i]) for i in range(3))
        self.norm = nn.ModuleList(GroupNorm(models, channels[i + 1], groups=4) for i in range(3))
        height, width = shape[1:]
        for s in strides:
            height, width = -(-height // s), -(-width // s)
        # 2,048 unnormalised features into one layer make its steps so long that adversarial training kills its ReLUs
        self.pool = 2 if shape[1] > 16 else 1
        height, width = height // self.pool, width // self.pool
        self.hidden = Linear(models, 2 * w * height * width, spec.hidden)
        self.out = Linear(models, spec.hidden, classes, gain=OUT_GAIN)

    def body(self, x: Tensor) -> Tensor:
        h = _side_by_side(x, self.models)
        for conv, norm in zip(self.conv, self.norm, strict=True):
            h = F.relu(norm(conv(h)))
        h = F.avg_pool2d(h, self.pool) if self.pool > 1 else h
        h = h.unflatten(1, (self.models, -1)).transpose(0, 1).flatten(2)  # [M, B, features]
        return self.out(F.relu(self.hidden(h))).flatten(0, 1)


class _Block(nn.Module):
    def __init__(self, models: int, inputs: int, outputs: int, stride: int, norm) -> None:
        super().__init__()
        self.conv1, self.norm1 = Conv(models, inputs, outputs, stride=stride, bias=False), norm(models, outputs)
        self.conv2, self.norm2 = Conv(models, outputs, outputs, bias=False), norm(models, outputs)
        self.short = None
        if stride != 1 or inputs != outputs:
            self.short = Conv(models, inputs, outputs, kernel=1, stride=stride, bias=False)
            self.short_norm = norm(models, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(h + (x if self.short is None else self.short_norm(self.short(x))))


class _Residual(Network):
    def __init__(self, spec: ResNet18, models: int, shape: Sequence[int], classes: int) -> None:
        super().__init__(models, spec.mean, spec.std)
        w, norm = spec.width, _norm(spec)
        self.stem, self.stem_norm = Conv(models, shape[0], w, bias=False), norm(models, w)
        blocks, inputs = [], w
        for outputs, stride in ((w, 1), (w, 1), (2 * w, 2), (2 * w, 1), (4 * w, 2), (4 * w, 1), (8 * w, 2), (8 * w, 1)):
            blocks.append(_Block(models, inputs, outputs, stride, norm))
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.out = Linear(models, inputs, classes, gain=OUT_GAIN)

    def body(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem_norm(self.stem(_side_by_side(x, self.models))))
        h = self.blocks(h).mean((2, 3))
        return self.out(h.unflatten(1, (self.models, -1)).transpose(0, 1)).flatten(0, 1)


class _WideBlock(nn.Module):
    def __init__(self, models: int, inputs: int, outputs: int, stride: int, norm) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(models, inputs), Conv(models, inputs, outputs, stride=stride, bias=False)
        self.norm2, self.conv2 = norm(models, outputs), Conv(models, outputs, outputs, bias=False)
        self.short = None
        if inputs != outputs:
            self.short = Conv(models, inputs, outputs, kernel=1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        short = x if self.short is None else self.short(h)
        return short + self.conv2(F.relu(self.norm2(self.conv1(h))))


class _Wide(Network):
    def __init__(self, spec: WideResNet, models: int, shape: Sequence[int], classes: int) -> None:
        super().__init__(models, spec.mean, spec.std)
        norm, inputs, blocks = _norm(spec), 16, []
        self.stem = Conv(models, shape[0], inputs, bias=False)
        for group in range(3):
            outputs = 16 * 2**group * spec.widen
            for number in range((spec.depth - 4) // 6):
                blocks.append(_WideBlock(models, inputs, outputs, 2 if group and not number else 1, norm))
                inputs = outputs
        self.blocks, self.last_norm = nn.Sequential(*blocks), norm(models, inputs)
        self.out = Linear(models, inputs, classes, gain=OUT_GAIN)

    def body(self, x: Tensor) -> Tensor:
        h = F.relu(self.last_norm(self.blocks(self.stem(_side_by_side(x, self.models)))))
        return self.out(h.mean((2, 3)).unflatten(1, (self.models, -1)).transpose(0, 1)).flatten(0, 1)


class _Pairs(Network):
    def __init__(self, spec: VGG, models: int, shape: Sequence[int], classes: int) -> None:
        super().__init__(models, spec.mean, spec.std)
        w, norm = spec.width, _norm(spec)
        channels = (shape[0], w, w, 2 * w, 2 * w, 4 * w, 4 * w)
        self.conv = nn.ModuleList(Conv(models, a, b, bias=False) for a, b in itertools.pairwise(channels))
        self.norm = nn.ModuleList(norm(models, b) for b in channels[1:])
        self.out = Linear(models, 4 * w * (shape[1] // 8) * (shape[2] // 8), classes, gain=OUT_GAIN)

    def body(self, x: Tensor) -> Tensor:
        h = _side_by_side(x, self.models)
        for number, (conv, norm) in enumerate(zip(self.conv, self.norm, strict=True)):
            h = F.relu(norm(conv(h)))
            h = F.max_pool2d(h, 2) if number % 2 else h
        return self.out(h.unflatten(1, (self.models, -1)).transpose(0, 1).flatten(2)).flatten(0, 1)


def _norm(spec):
    """(models, channels) -> the normalisation that the spec asks for."""
    choice("norm", spec.norm, ("group", "batch"))
    if spec.norm == "batch":
        return BatchNorm
    return lambda models, channels: GroupNorm(models, channels, groups=math.gcd(channels, 32))


def _side_by_side(x: Tensor, models: int) -> Tensor:
    """[M*B, C, H, W] -> [B, M*C, H, W]: one grouped convolution then serves all models."""
    if models == 1:
        return x
    return x.unflatten(0, (models, -1)).transpose(0, 1).flatten(1, 2)


def _initialised(net: Network, seeds: Sequence[int], device) -> Network:
    if len(seeds) != net.models:
        raise ValueError(f"{net.models} models need {net.models} seeds, got {len(seeds)}")
    # drawn on the CPU whatever the device, so that a model starts from the same weights everywhere
    streams = Streams(tuple(seeds), "init")
    for number, layer in enumerate(net.layers):
        layer.initialise(streams.fork(number))
    return net.to(device)


ARCHITECTURES: dict[str, Spec] = {
    "mlp": MLP(), "cnn": SmallCNN(), "resnet18": ResNet18(), "wrn28_10": WideResNet(), "vgg": VGG(),
}


def by_name(name: str, *, norm: str = "") -> Spec:
    """The architecture of that name: mlp, cnn, resnet18, wrn28_10, vgg; `norm` "group" or "batch" where it has a choice."""
    spec = ARCHITECTURES[choice("model", name, ARCHITECTURES)]
    if not norm:
        return spec
    able = [known for known, other in ARCHITECTURES.items() if hasattr(other, "norm")]
    choice("model", name, able, fix="only these have a choice of normalisation")
    return replace(spec, norm=choice("norm", norm, ("group", "batch")))
