"""Batch normalisation folded into the convolution before it, for attacks.

In evaluation mode batch normalisation is a scale and a shift of each channel, so it can be part of the convolution's weights:
half of an attack's passes over memory are gone. On a GPU in 16 bits cuDNN adds the shift, a shortcut and the ReLU within the
convolution. The way back is written out, because only the images need a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from demem_lab.layers import BatchNorm, Conv

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

    def linear(self, x: Tensor) -> Tensor:
        """Convolution and shift of x [B, M*inputs, H, W]."""
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, groups=self.models)

    def relu(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """ReLU of convolution, shift and `shortcut`, [B, M*outputs, H', W']."""
        if _fuses[0] and x.is_cuda and self.models == 1 and x.dtype in (torch.float16, torch.bfloat16):
            how = (self.stride,) * 2, (self.padding,) * 2, (1, 1), 1
            try:
                if shortcut is None:
                    return torch.cudnn_convolution_relu(x, self.weight, self.bias, *how)
                return torch.cudnn_convolution_add_relu(x, self.weight, shortcut, 1.0, self.bias, *how)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # not every card and shape has such a kernel
                _fuses[0] = False
        out = self.linear(x)
        return (out if shortcut is None else out.add_(shortcut)).relu_()

    def back(self, slope: Tensor, x: Tensor) -> Tensor:
        """Gradient at the input x, given the one at the output of `linear`."""
        stride, padding = (self.stride,) * 2, (self.padding,) * 2
        how = None, stride, padding, (1, 1), False, (0, 0), self.models, (True, False, False)
        return torch.ops.aten.convolution_backward(slope, x, self.weight, *how)[0]


def before_relu(slope: Tensor, out: Tensor) -> Tensor:
    """Gradient before a ReLU, given the one at what came `out` of it."""
    return torch.ops.aten.threshold_backward(slope, out, 0)
