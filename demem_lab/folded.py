"""A convolution with its normalisation, shortcut and ReLU, there and back by hand, for attacks.

In evaluation mode batch normalisation is a scale and a shift of each channel, so it can be part of the convolution's weights:
half of an attack's passes over memory are gone. On a GPU in 16 bits cuDNN adds the shift, a shortcut and the ReLU within the
convolution. Group normalisation, which cannot be folded, takes them along in its own kernel (`kernels`). The way back is
written out, because only the images need a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from demem_lab import kernels
from demem_lab.layers import BatchNorm, Conv, GroupNorm

_fuses = [True]  # whether cuDNN has been able to, in this process


@dataclass(frozen=True)
class Folded:
    """A convolution with its batch normalisation; weight [M*outputs, inputs, k, k], bias [M*outputs]."""

    weight: Tensor
    bias: Tensor
    stride: int
    padding: int
    models: int

    @classmethod
    def of(cls, conv: Conv, norm: BatchNorm, dtype: torch.dtype, *, channels_last: bool) -> Folded:
        """Both layers as they are now, in `dtype`."""
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.EPS)  # [M, C]
        weight = (conv.weight * scale[..., None, None, None]).flatten(0, 1)
        bias = norm.bias - norm.running_mean * scale
        if conv.bias is not None:
            bias = bias + conv.bias * scale
        layout = torch.channels_last if channels_last else torch.contiguous_format
        weight = weight.to(dtype).contiguous(memory_format=layout)
        return cls(weight, bias.flatten().to(dtype), conv.stride, conv.kernel // 2, conv.models)

    def linear(self, x: Tensor) -> tuple[Tensor, None]:
        """Convolution and shift of x [B, M*inputs, H, W]; and what `back` needs of it: nothing."""
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, groups=self.models), None

    def relu(self, x: Tensor, shortcut: Tensor | None = None) -> tuple[Tensor, None]:
        """ReLU of convolution, shift and `shortcut`, [B, M*outputs, H', W']; and what `back` needs of it: nothing."""
        if _fuses[0] and x.is_cuda and self.models == 1 and x.dtype in (torch.float16, torch.bfloat16):
            how = (self.stride,) * 2, (self.padding,) * 2, (1, 1), 1
            try:
                if shortcut is None:
                    return torch.cudnn_convolution_relu(x, self.weight, self.bias, *how), None
                return torch.cudnn_convolution_add_relu(x, self.weight, shortcut, 1.0, self.bias, *how), None
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # not every card and shape has such a kernel
                _fuses[0] = False
        out, _ = self.linear(x)
        return (out if shortcut is None else out.add_(shortcut)).relu_(), None

    def back(self, slope: Tensor, x: Tensor, kept: None = None) -> Tensor:
        """Gradient at the input x, given the one at the output of `linear`, or before the ReLU."""
        return _input_slope(slope, x, self.weight, self.stride, self.padding, self.models)


@dataclass(frozen=True)
class Normed:
    """A convolution of ONE model with its group normalisation, on a GPU; weight [outputs, inputs, k, k]."""

    weight: Tensor
    stride: int
    padding: int
    norm: GroupNorm

    @classmethod
    def of(cls, conv: Conv, norm: GroupNorm, dtype: torch.dtype) -> Normed:
        """Both layers as they are now. ValueError for a convolution with a bias."""
        if conv.bias is not None:
            raise ValueError("a convolution before group normalisation is taken without a bias here; build it with bias=False")
        weight = conv.weight[0].to(dtype).contiguous(memory_format=torch.channels_last)
        return cls(weight, conv.stride, conv.kernel // 2, norm)

    def linear(self, x: Tensor, shortcut: Tensor | None = None, *, relu: bool = False) -> tuple[Tensor, tuple]:
        """Normalised convolution of x [B, inputs, H, W]; and what `back` needs of it."""
        before = F.conv2d(x, self.weight, None, self.stride, self.padding)
        scale, shift = self.norm.weight[0], self.norm.bias[0]
        out, *statistics = kernels.normalised(before, scale, shift, self.norm.groups, shortcut=shortcut, relu=relu)
        return out, (before, *statistics)

    def relu(self, x: Tensor, shortcut: Tensor | None = None) -> tuple[Tensor, tuple]:
        """ReLU of the same and `shortcut`."""
        return self.linear(x, shortcut, relu=True)

    def back(self, slope: Tensor, x: Tensor, kept: tuple) -> Tensor:
        """Gradient at the input x, given the one at the output of `linear`, or before the ReLU."""
        before, mean, rstd = kept
        slope, *_ = kernels.back(slope, before, self.norm.weight[0], mean, rstd)
        return _input_slope(slope, x, self.weight, self.stride, self.padding, 1)


def _input_slope(slope: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> Tensor:
    how = None, (stride,) * 2, (padding,) * 2, (1, 1), False, (0, 0), groups, (True, False, False)
    return torch.ops.aten.convolution_backward(slope, x, weight, *how)[0]


def before_relu(slope: Tensor, out: Tensor) -> Tensor:
    """Gradient before a ReLU, given the one at what came `out` of it."""
    return torch.ops.aten.threshold_backward(slope, out, 0)
