"""Group normalisation on a GPU with the channels last: one kernel there and one back.

torch's own wants the channels first and, under autocast, float32: six more passes over memory for each layer, which make
group normalisation cost twice as much as batch normalisation. Statistics, sums and arithmetic are in float32 here as well.
"""

from __future__ import annotations

import os
import warnings
from contextlib import nullcontext
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


@lru_cache(maxsize=1)
def _kernels():
    """(forward, backward), or None where there is no Triton."""
    try:
        from demem_lab import triton_norm
    except ImportError:
        return None
    return triton_norm.forward, triton_norm.backward


@lru_cache(maxsize=8)
def _works(on: torch.device) -> bool:
    """Whether they give what torch gives; tried once in a process, on a few numbers. A compiler can fail in any way."""
    if _kernels() is None:
        return False
    x = torch.sin(37 * torch.arange(2.0 * 64 * 4, device=on)).view(2, 64, 2, 2).contiguous(memory_format=torch.channels_last)
    slope = torch.cos(11 * x)
    one, zero = torch.ones(64, device=on), torch.zeros(64, device=on)
    try:
        found, mean, rstd = normalised(x, one, zero, 32)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            wanted = F.group_norm(leaf, 32)
            at_leaf = torch.autograd.grad(wanted, leaf, slope)[0]
        pairs = (found, wanted), (back(slope, x, one, mean, rstd)[0], at_leaf)
        right = all(torch.allclose(a, b, atol=1e-3) for a, b in pairs)
        reason = "they are wrong"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        right, reason = False, f"{type(error).__name__}: {error}".strip().split("\n")[0][:200]
    if not right:
        warnings.warn(f"group normalisation's own kernels do not work here ({reason}); torch's are used, which is only slower",
                      stacklevel=2)
    return right


def able(x: Tensor, groups: int) -> bool:
    """Whether these kernels can normalise x [B, C, H, W] in `groups`."""
    if torch.compiler.is_compiling():  # the compiler makes its own
        return False
    known = x.dtype != torch.float64 and (x.is_cuda or bool(os.environ.get("TRITON_INTERPRET")))
    channels = x.shape[1]
    size = channels // groups
    whole = channels & (channels - 1) == 0 and channels == groups * size  # Triton's blocks are powers of two
    last = x.is_contiguous(memory_format=torch.channels_last)
    return known and whole and last and _works(x.device)


def normalised(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, *, eps: float = 1e-5, shortcut: Tensor | None = None, relu: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(ReLU of (normalised x [B, C, H, W], scaled and shifted, + shortcut), mean and 1 / deviation [B, groups] in float32)."""
    out, (b, channels, height, width) = torch.empty_like(x), x.shape
    mean, rstd = (torch.empty(b, groups, device=x.device) for _ in range(2))
    shortcut = None if shortcut is None else shortcut.contiguous(memory_format=torch.channels_last)
    how, grid = _cut(channels, groups, height * width, b)
    with _on(x):
        _kernels()[0][grid](
            x, out, x if shortcut is None else shortcut, weight, bias, mean, rstd, height * width, eps,
            ADD=shortcut is not None, RELU=relu, **how,
        )
    return out, mean, rstd


def back(slope: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient at x, each sample's gradient of scale and of shift [B, C]), given the one at the normalised, scaled x."""
    slope = slope.contiguous(memory_format=torch.channels_last)
    dx, (b, channels, height, width) = torch.empty_like(x), x.shape
    shifts, scales = (torch.empty(b, channels, device=x.device) for _ in range(2))
    how, grid = _cut(channels, mean.shape[1], height * width, b)
    with _on(x):
        _kernels()[1][grid](slope, x, dx, weight, mean, rstd, shifts, scales, height * width, **how)
    return dx, scales, shifts


class Normalise(torch.autograd.Function):
    """`normalised` without shortcut and ReLU, with gradients for x, weight [C] and bias [C]."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        out, mean, rstd = normalised(x, weight, bias, groups)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)
        return out, mean, rstd

    @staticmethod
    def backward(ctx, slope: Tensor, *_):
        x, weight, mean, rstd = ctx.saved_tensors
        dx, scales, shifts = back(slope, x, weight, mean, rstd)
        return dx, scales.sum(0).to(weight.dtype), shifts.sum(0).to(weight.dtype), None


def _cut(channels: int, groups: int, places: int, samples: int) -> tuple[dict[str, int], tuple[int, int]]:
    """What a program works on (32 channels at least, in whole groups, and places for four warps), and how many there are."""
    size = channels // groups
    block = min(channels, max(32 if channels <= 64 else 64, size))
    tile = max(16, min(2048 // block, 1 << (places - 1).bit_length()))
    return {"C": channels, "SIZE": size, "CB": block, "TILE": tile}, (samples, channels // block)


def _on(x: Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
