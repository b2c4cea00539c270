"""What all architectures share: M networks at once, pixels in and logits out.

A `Network` normalises its images, computes in 16 bits where it is told to, and lets its layers record what per-sample
gradient norms are made of. Architectures are in `models`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from demem_lab.layers import BatchNorm, Conv, Layer
from demem_lab.replay import Replays
from demem_lab.streams import Streams


class Network(nn.Module):
    """M classifiers of one architecture; `models` is M, `has_batch_norm` says whether samples of a batch interact."""

    def __init__(self, models: int, mean: float, std: float) -> None:
        super().__init__()
        self.models, self.mean, self.std = models, mean, std
        self.half: torch.dtype | None = None  # what the layers compute in, if not in the dtype of their weights
        self.scale = 1.0  # of the gradients inside the network
        self.hooks: list = []
        self.channels_last = False
        self.fast: Callable[[Tensor], Tensor] | None = None  # `body` compiled, for passes that nothing is recorded of
        self.recorded = False
        self.replays: Replays | None = None  # what is recorded on a GPU
        self.held: object = None  # what `prepare` gave, while weights stand still

    def arranged_for(self, device: torch.device | str) -> Network:
        """Itself, with images laid out as the device wants them: a GPU convolves fastest with channels last.

        So does a CPU (1.3 to 1.7 x for narrow networks), but its group normalisation loses more than that again (0.9 x).
        """
        convolves = any(isinstance(layer, Conv) for layer in self.layers)
        wanted = torch.device(device).type == "cuda" or self.has_batch_norm
        # several models side by side are one grouped convolution, which has no such kernels
        self.channels_last = wanted and convolves and self.models == 1
        self.replays = Replays() if torch.device(device).type == "cuda" else None
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
            logits = self.body(x) if self.fast is None or self.recorded else self.fast(x)
        return logits if self.half is None else _with_slope(logits.float(), self.scale)

    def normalised(self, x: Tensor) -> Tensor:
        """Pixels as the first layer sees them."""
        return (x - self.mean) / self.std if (self.mean, self.std) != (0.0, 1.0) else x

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def compile_body(self, trial: Callable[[], object]) -> None:
        """Let torch.compile fuse the body, for batches of any size. `trial` makes a first pass, in which it is compiled.

        A compiler can fail in any way, and is never needed: then there is a warning, and all goes on without.
        """
        # while it compiles it tells of powers that it cannot bound, thousands of times
        logging.getLogger("torch.utils._sympy.interp").setLevel(logging.ERROR)
        replays = self.replays
        try:
            with warnings.catch_warnings():
                for known in ("TensorFloat32 tensor cores", "The .grad attribute of a Tensor that is not a leaf"):
                    warnings.filterwarnings("ignore", message=known)
                self.fast, self.replays = torch.compile(self.body, dynamic=True), None  # one or the other
                trial()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.fast, self.replays = None, replays
            reason = str(error).strip().split("\n")[0][:200]
            warnings.warn(f"the network could not be compiled ({reason}); going on without, which is only slower", stacklevel=3)

    def prepare(self):
        """What an attack can compute once, as it follows from weights and running statistics alone; None for nothing."""
        return None

    @contextmanager
    def standing_still(self):
        """Inside, neither weights nor running statistics change."""
        self.held = self.prepare()
        try:
            yield self
        finally:
            self.held = None

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
        before, was = [layer.calls for layer in self.layers], self.recorded
        self.recorded = on
        for layer in self.layers:
            layer.calls = [] if on else None
        try:
            yield self
        finally:
            self.recorded = was
            for layer, calls in zip(self.layers, before, strict=True):
                layer.calls, layer.known = calls, None  # what norms kept belongs to these calls, and may be large

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
    """What describes an architecture before the data are known.

    One whose networks give a row logits that depend on that row alone says so by a class attribute `row_by_row = True`,
    without which nothing is promised to anybody. (Batch normalisation mixes rows whatever it says.)
    """

    def build(self, *, models: int, shape: Sequence[int], classes: int, seeds: Sequence[int], device="cpu") -> Network: ...


def side_by_side(x: Tensor, models: int) -> Tensor:
    """[M*B, C, H, W] -> [B, M*C, H, W]: one grouped convolution then serves all models."""
    if models == 1:
        return x
    return x.unflatten(0, (models, -1)).transpose(0, 1).flatten(1, 2)


def initialised(net: Network, seeds: Sequence[int], device) -> Network:
    """The network with fresh weights from each model's own seed, on `device`; ValueError unless there is one seed a model."""
    if len(seeds) != net.models:
        raise ValueError(f"{net.models} models need {net.models} seeds, got {len(seeds)}")
    # drawn on the CPU whatever the device, so that a model starts from the same weights everywhere
    streams = Streams(tuple(seeds), "init")
    for number, layer in enumerate(net.layers):
        layer.initialise(streams.fork(number))
    return net.to(device)


def how_many(net) -> int:
    """M of a network of M models; 1 of anybody's, whatever it calls `models`."""
    models = getattr(net, "models", 1)
    return models if isinstance(models, int) else 1


def settings(net: nn.Module) -> dict:
    """Plain attributes of a module and of all inside it: what answers follow from besides the weights."""
    return {
        f"{inside}.{name}": repr(value) for inside, module in net.named_modules() for name, value in vars(module).items()
        if isinstance(value, (int, float, str, tuple, list)) and name != "training"
    }
