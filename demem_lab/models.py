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
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demem_lab import kernels
from demem_lab.folded import Folded, Normed, before_relu
from demem_lab.layers import BatchNorm, Conv, GroupNorm, Linear
from demem_lab.networks import Network, Spec, initialised, side_by_side
from demem_lab.validate import choice, integer

# Initial logits of a convolutional network are kept near 0: from large ones, adversarial training on CIFAR-10 first has to
# unlearn a confidence that means nothing, and often ends in a constant answer.
OUT_GAIN = 0.1
# With group normalisation each block starts as little more than its shortcut (Goyal et al. 2017, arXiv 1706.02677, start at 0
# with batch normalisation): otherwise the first epochs of training only undo the start.
BLOCK_GAIN = 0.2
# Normalisation undoes the size of the weights before it, but large weights turn slowly. With torch's own first weights, a
# 1/sqrt(6) of He's, ResNet-18 learns as fast as a loop in plain torch; with He's it takes half as many steps again, and with
# group normalisation at 8/255 it long stays at chance (benchmarks/README.md). SmallCNN's rates are tuned to He's.
NORMED_GAIN = 6**-0.5


@dataclass(frozen=True)
class MLP:
    """Fully connected ReLU network on the flattened image."""

    row_by_row = True
    hidden: tuple[int, ...] = (128, 128)
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.hidden, (tuple, list)):
            raise ValueError(f"hidden must be the layers' widths, such as (128, 128), got {self.hidden!r}")
        widths = tuple(integer("a hidden layer's width", width, low=1) for width in self.hidden)
        object.__setattr__(self, "hidden", widths)  # a list could not be part of a key

    def build(self, *, models: int, shape: Sequence[int], classes: int, seeds: Sequence[int], device="cpu") -> Network:
        """M freshly initialised networks for images of `shape` (C, H, W)."""
        return initialised(_Dense(self, models, math.prod(shape), classes), seeds, device)


@dataclass(frozen=True)
class SmallCNN:
    """Three 3x3 convolutions with GroupNorm, then one hidden layer; strides and pooling follow the image size."""

    row_by_row = True
    width: int = 16
    hidden: int = 64
    mean: float = 0.5
    std: float = 0.25

    def build(self, *, models: int, shape: Sequence[int], classes: int, seeds: Sequence[int], device="cpu") -> Network:
        """M freshly initialised networks for images of `shape` (C, H, W), H and W at least 8."""
        integer("image height", shape[1], low=8, fix="use the MLP for smaller images")
        if integer("width", self.width, low=4) % 4:
            raise ValueError(f"width must be a multiple of 4, for GroupNorm's four groups, got {self.width}")
        integer("hidden", self.hidden, low=1)
        return initialised(_Convolutional(self, models, shape, classes), seeds, device)


@dataclass(frozen=True)
class ResNet18:
    """ResNet-18 with the CIFAR stem (one 3x3 convolution, no pooling), He et al. 2016.

    `norm` "group" keeps samples independent, which per-sample guarantees need; "batch" trains faster and better, and
    every privacy guarantee is void with it.
    """

    row_by_row = True  # of norm="batch" promises are refused on sight
    width: int = 64
    norm: str = "group"
    mean: float = 0.5
    std: float = 0.25

    def build(self, *, models: int, shape: Sequence[int], classes: int, seeds: Sequence[int], device="cpu") -> Network:
        """M freshly initialised networks for images of `shape` (C, H, W)."""
        integer("width", self.width, low=1)
        return initialised(_Residual(self, models, shape, classes), seeds, device)


@dataclass(frozen=True)
class WideResNet:
    """Pre-activation WideResNet-`depth`-`widen` (Zagoruyko & Komodakis 2016); 28-10 has 36.5 M weights. `norm`: as ResNet18."""

    row_by_row = True  # of norm="batch" promises are refused on sight
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
        return initialised(_Wide(self, models, shape, classes), seeds, device)


@dataclass(frozen=True)
class VGG:
    """A small VGG (Simonyan & Zisserman 2015) for SVHN: three pairs of 3x3 convolutions, each halved by max pooling."""

    row_by_row = True  # of norm="batch" promises are refused on sight
    width: int = 32
    norm: str = "group"
    mean: float = 0.5
    std: float = 0.25

    def build(self, *, models: int, shape: Sequence[int], classes: int, seeds: Sequence[int], device="cpu") -> Network:
        """M freshly initialised networks for images of `shape` (C, H, W), H and W at least 8."""
        integer("image height", min(shape[1:]), low=8, fix="use the MLP for smaller images")
        integer("width", self.width, low=1)
        return initialised(_Pairs(self, models, shape, classes), seeds, device)


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
        if self.half is not None or self.fast is not None:
            return None
        h = self.normalised(x).reshape(self.models, -1, self.linear[0].inputs)
        seen = []
        for layer in self.linear[:-1]:
            h = layer.product(h).relu_()
            seen.append(h)
        slope = slope_of(self.linear[-1].product(h).flatten(0, 1)).unflatten(0, (self.models, -1))
        relu_slope = torch.ops.aten.threshold_backward.grad_input  # in place: 2.5 times as fast
        for layer, h in zip(self.linear[:0:-1], reversed(seen), strict=True):
            slope = slope @ layer.weight.mT
            relu_slope(slope, h, 0, grad_input=slope)
        slope = (slope @ self.linear[0].weight.mT).view_as(x)
        return slope if self.std == 1 else slope.div_(self.std)


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
        h = side_by_side(x, self.models)
        for conv, norm in zip(self.conv, self.norm, strict=True):
            h = F.relu(norm(conv(h)))
        h = F.avg_pool2d(h, self.pool) if self.pool > 1 else h
        h = h.unflatten(1, (self.models, -1)).transpose(0, 1).flatten(2)  # [M, B, features]
        return self.out(F.relu(self.hidden(h))).flatten(0, 1)


class _Block(nn.Module):
    def __init__(self, models: int, inputs: int, outputs: int, stride: int, norm) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(models, inputs, outputs, stride=stride), norm(models, outputs)
        self.conv2, self.norm2 = _conv(models, outputs, outputs), norm(models, outputs)
        self.norm2.start = BLOCK_GAIN if isinstance(self.norm2, GroupNorm) else 1.0
        self.short = None
        if stride != 1 or inputs != outputs:
            self.short = _conv(models, inputs, outputs, kernel=1, stride=stride)
            self.short_norm = norm(models, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(h + (x if self.short is None else self.short_norm(self.short(x))))


class _Residual(Network):
    def __init__(self, spec: ResNet18, models: int, shape: Sequence[int], classes: int) -> None:
        super().__init__(models, spec.mean, spec.std)
        w, norm = spec.width, _norm(spec)
        self.stem, self.stem_norm = _conv(models, shape[0], w), norm(models, w)
        blocks, inputs = [], w
        for outputs, stride in ((w, 1), (w, 1), (2 * w, 2), (2 * w, 1), (4 * w, 2), (4 * w, 1), (8 * w, 2), (8 * w, 1)):
            blocks.append(_Block(models, inputs, outputs, stride, norm))
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.out = Linear(models, inputs, classes, gain=OUT_GAIN)

    def body(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem_norm(self.stem(side_by_side(x, self.models))))
        h = self.blocks(h).mean((2, 3))
        return self.out(h.unflatten(1, (self.models, -1)).transpose(0, 1)).flatten(0, 1)

    @torch.no_grad()
    def prepare(self) -> list[list[Folded | Normed]] | None:
        """The stem, then each block's convolutions, with their normalisation; None where autograd is to do it."""
        dtype, by_group = self.half or self.out.weight.dtype, isinstance(self.stem_norm, GroupNorm)
        if self.training or (by_group and not self._in_kernels(dtype)):
            return None
        pairs = [[(self.stem, self.stem_norm)]]
        for block in self.blocks:
            short = [] if block.short is None else [(block.short, block.short_norm)]
            pairs.append([(block.conv1, block.norm1), (block.conv2, block.norm2), *short])
        if by_group:
            return [[Normed.of(conv, norm, dtype) for conv, norm in some] for some in pairs]
        return [[Folded.of(conv, norm, dtype, channels_last=self.channels_last) for conv, norm in some] for some in pairs]

    def _in_kernels(self, dtype: torch.dtype) -> bool:
        """Whether group normalisation has kernels for this network."""
        norm = self.stem_norm
        like = torch.empty(1, norm.channels, 1, 1, dtype=dtype, device=norm.weight.device)
        return self.models == 1 and self.channels_last and kernels.able(like, norm.groups)

    @torch.no_grad()
    def by_hand(self, x: Tensor, slope_of: Callable[[Tensor], Tensor]) -> Tensor | None:
        """As for the MLP, in evaluation mode; None where autograd is to do it."""
        layers = self.held or self.prepare()
        if layers is None:
            return None
        (stem,), *blocks = layers
        pixels = side_by_side(self.normalised(x), self.models).to(stem.weight.dtype)
        pixels = pixels.contiguous(memory_format=torch.channels_last) if self.channels_last else pixels
        first, of_stem = stem.relu(pixels)
        h, seen = first, []
        for one, two, *short in blocks:
            beside, of_short = short[0].linear(h) if short else (h, None)
            middle, of_one = one.relu(h)
            out, of_two = two.relu(middle, beside)
            seen.append((h, middle, out, of_one, of_two, of_short))
            h = out
        features = h.to(x.dtype).mean((2, 3)).unflatten(1, (self.models, -1)).transpose(0, 1)
        slope = slope_of(self.out.product(features).flatten(0, 1)).unflatten(0, (self.models, -1))
        # float16 has no room for small gradients: all of them are `scale` times as large on the way back
        slope = (slope @ self.out.weight.mT).transpose(0, 1).flatten(1) * (self.scale / h[0, 0].numel())
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        slope = slope.to(h.dtype)[..., None, None].expand_as(h).contiguous(memory_format=layout)
        for (one, two, *short), (h, middle, out, of_one, of_two, of_short) in zip(reversed(blocks), reversed(seen), strict=True):
            slope = before_relu(slope, out)
            inner = one.back(before_relu(two.back(slope, middle, of_two), middle), h, of_one)
            slope = inner.add_(short[0].back(slope, h, of_short) if short else slope)
        slope = stem.back(before_relu(slope, first), pixels, of_stem).to(x.dtype) / (self.std * self.scale)
        return slope if self.models == 1 else slope.unflatten(1, (self.models, -1)).transpose(0, 1).flatten(0, 1)


class _WideBlock(nn.Module):
    def __init__(self, models: int, inputs: int, outputs: int, stride: int, norm) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(models, inputs), _conv(models, inputs, outputs, stride=stride)
        self.norm2, self.conv2 = norm(models, outputs), _conv(models, outputs, outputs)
        self.short = None
        if inputs != outputs:
            self.short = _conv(models, inputs, outputs, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        short = x if self.short is None else self.short(h)
        return short + self.conv2(F.relu(self.norm2(self.conv1(h))))


class _Wide(Network):
    def __init__(self, spec: WideResNet, models: int, shape: Sequence[int], classes: int) -> None:
        super().__init__(models, spec.mean, spec.std)
        norm, inputs, blocks = _norm(spec), 16, []
        self.stem = _conv(models, shape[0], inputs)
        for group in range(3):
            outputs = 16 * 2**group * spec.widen
            for number in range((spec.depth - 4) // 6):
                blocks.append(_WideBlock(models, inputs, outputs, 2 if group and not number else 1, norm))
                inputs = outputs
        self.blocks, self.last_norm = nn.Sequential(*blocks), norm(models, inputs)
        self.out = Linear(models, inputs, classes, gain=OUT_GAIN)

    def body(self, x: Tensor) -> Tensor:
        h = F.relu(self.last_norm(self.blocks(self.stem(side_by_side(x, self.models)))))
        return self.out(h.mean((2, 3)).unflatten(1, (self.models, -1)).transpose(0, 1)).flatten(0, 1)


class _Pairs(Network):
    def __init__(self, spec: VGG, models: int, shape: Sequence[int], classes: int) -> None:
        super().__init__(models, spec.mean, spec.std)
        w, norm = spec.width, _norm(spec)
        channels = (shape[0], w, w, 2 * w, 2 * w, 4 * w, 4 * w)
        self.conv = nn.ModuleList(_conv(models, a, b) for a, b in itertools.pairwise(channels))
        self.norm = nn.ModuleList(norm(models, b) for b in channels[1:])
        self.out = Linear(models, 4 * w, classes, gain=OUT_GAIN)

    def body(self, x: Tensor) -> Tensor:
        h = side_by_side(x, self.models)
        for number, (conv, norm) in enumerate(zip(self.conv, self.norm, strict=True)):
            h = F.relu(norm(conv(h)))
            h = F.max_pool2d(h, 2) if number % 2 else h
        # the mean of each channel, as in ResNet: from 2,048 features the first steps are so long that nothing is learnt after
        return self.out(h.mean((2, 3)).unflatten(1, (self.models, -1)).transpose(0, 1)).flatten(0, 1)


def _conv(models: int, inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> Conv:
    """A convolution whose output (or the sum it is part of) is normalised before anything is made of it, so without a bias."""
    return Conv(models, inputs, outputs, kernel=kernel, stride=stride, bias=False, gain=NORMED_GAIN)


def _norm(spec):
    """(models, channels) -> the normalisation that the spec asks for."""
    choice("norm", spec.norm, ("group", "batch"))
    if spec.norm == "batch":
        return BatchNorm
    return lambda models, channels: GroupNorm(models, channels, groups=math.gcd(channels, 32))


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
