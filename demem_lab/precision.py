"""Sixteen bits inside the network, thirty-two everywhere else.

>>> resolve(Precision.AUTO, "cpu")
<Precision.FLOAT32: 'float32'>

Only a network's layers compute in 16 bits. Weights, logits, losses, per-sample norms, clipped sums, privacy noise and
everything that is measured stay in float32. float16 has so little room that gradients are scaled on their way through
the network; they are scaled back as they leave it, so before any norm is taken. When a scale proves too large the SAME
step is done again with half of it, from the same random numbers: usual practice skips such a step, but then which steps
are taken depends on the samples, and a privacy guarantee that counts steps would be void.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from enum import Enum

import torch
from torch import Tensor

from demem_lab.validate import choice

START, LARGEST, GROW_AFTER = 2.0**10, 2.0**16, 1000


class Precision(Enum):
    """Of the layers: AUTO is bfloat16 on GPUs that have it, float16 on older ones, float32 on a CPU.

    With FLOAT32, convolutions on a GPU since Ampere multiply in TF32 (eleven bits) unless you set
    torch.backends.cudnn.allow_tf32 = False; clipped sums never do. Nor do norms and clipped sums follow a lowered
    torch.set_float32_matmul_precision (`whole_products`).
    """

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    AUTO = "auto"

    @property
    def dtype(self) -> torch.dtype | None:
        """What autocast computes in; None for float32. ValueError for AUTO, which `resolve` turns into one of the others."""
        choice("precision", self, (Precision.FLOAT32, Precision.BFLOAT16, Precision.FLOAT16), fix="resolve it for a device")
        return None if self is Precision.FLOAT32 else getattr(torch, self.value)


def resolve(precision: Precision, device: torch.device | str) -> Precision:
    """AUTO decided for a device: bfloat16 from compute capability 8.0 on, float16 below; float32 on a CPU."""
    choice("precision", precision, Precision)
    if precision is not Precision.AUTO:
        return precision
    if torch.device(device).type != "cuda":
        return Precision.FLOAT32
    return Precision.BFLOAT16 if torch.cuda.get_device_capability(device) >= (8, 0) else Precision.FLOAT16


_lock, _inside, _found = threading.Lock(), 0, []


@contextmanager
def whole_products():
    """Inside, matrix products keep all digits of float32, whatever torch.set_float32_matmul_precision was told.

    The setting is the process's, and chunks are trained by threads: the first to come in keeps what it found, the last to go
    out puts that back, so nobody between them is left with fewer digits (who is elsewhere meanwhile has more, which harms no
    promise). A GPU's kernels are chosen while a pass is recorded: recorded inside, it keeps all digits when it is played.
    """
    global _inside, _found
    with _lock:
        if not _inside:
            _found = _digits()
            _set_digits(["ieee"] * len(_found))
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _set_digits(_found)


def _digits() -> list[str]:
    # not get_float32_matmul_precision, where torch has these: it refuses to answer once somebody has set one of them
    return [place.fp32_precision for place in _places()] or [torch.get_float32_matmul_precision()]


def _set_digits(digits: list[str]) -> None:
    for place, wanted in zip(_places(), digits, strict=False):
        place.fp32_precision = wanted
    if not _places():
        torch.set_float32_matmul_precision("highest" if digits == ["ieee"] else digits[0])


def _places() -> list:
    """Where torch (since 2.9) keeps the settings: on a GPU, and on a CPU, whose convolutions have one of their own."""
    backends = torch.backends
    places = (backends.cuda.matmul, getattr(backends.mkldnn, "matmul", None), getattr(backends.mkldnn, "conv", None))
    return [place for place in places if hasattr(place, "fp32_precision")]


class Scaler:
    """The scale of a float16 network's gradients: halved when they overflow, doubled after a while of peace.

    One scale for all models of a chunk, a power of two: but for what under- or overflows it changes no digit.
    """

    def __init__(self, net) -> None:
        self.net, self.scale, self.quiet = net, START, 0
        self.arm()

    def arm(self) -> None:
        """Make the network use the scale; below 1 there is nothing left to gain and the step is done in float32."""
        self.net.compute_in(torch.float16 if self.scale >= 1 else None, max(self.scale, 1.0))

    def accepts(self, gradients: list[Tensor]) -> bool:
        """Whether a step may be taken with these gradients [M, ...]; if not, it is to be done again (`arm` has been called).

        Models whose weights are no longer finite are beyond help, and have no say.
        """
        if self.scale < 1 or not bool((_finite(self.net.parameters()) & ~_finite(gradients)).any()):
            self.quiet += 1
            if self.scale < 1:
                self.scale, self.quiet = 1.0, 0
            elif self.quiet >= GROW_AFTER and self.scale < LARGEST:
                self.scale, self.quiet = 2 * self.scale, 0
            self.arm()
            return True
        self.scale, self.quiet = self.scale / 2, 0
        self.arm()
        return False

    def state(self) -> Tensor:
        """What a resumed run needs."""
        return torch.tensor([self.scale, self.quiet], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        """Back to a `state`."""
        self.scale, self.quiet = float(state[0]), int(state[1])
        self.arm()


def _finite(tensors) -> Tensor:
    """bool [M]: whether all of a model's numbers are finite. A sum of what is finite times 0 is 0, of anything else NaN."""
    tensors = [t.detach() for t in tensors]
    if tensors[0].is_cuda and len(tensors[0]) == 1:  # the same in a few launches; sums of sizes do not overflow in training
        return torch.stack(torch._foreach_norm(tensors, 1)).isfinite().all()[None]
    return sum((t.detach() * 0).flatten(1).sum(1) for t in tensors) == 0
