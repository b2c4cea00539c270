"""Images shifted and mirrored at random: what training sees in place of a sample.

>>> CropFlip(padding=1)(torch.rand(6, 3, 8, 8), rng=Streams((4, 5), "augment")).shape     # 2 models, 3 rows each
torch.Size([6, 3, 8, 8])

A whole batch at once, on the device that holds it: no processes that load data. The random numbers are each model's own
(seed, "augment", step). The moved image is what attack and loss see; it is made from one sample alone, so a promise made
to single samples holds as before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from demem_lab.streams import Streams
from demem_lab.validate import integer


@dataclass(frozen=True)
class CropFlip:
    """A crop of the image padded by `padding` pixels, back at its size, and (`flip`) its mirror image half of the time.

    reflect: pad with the mirrored border in place of black pixels. Source: He et al. 2016 (arXiv 1512.03385), section 4.2.
    """

    padding: int = 4
    flip: bool = True
    reflect: bool = False

    row_by_row = True

    def __post_init__(self) -> None:
        integer("padding", self.padding, low=0)

    def __call__(self, x: Tensor, *, rng: Streams) -> Tensor:
        """Images [M*B, C, H, W] -> images of the same shape, each row moved by itself."""
        height, width = x.shape[2:]
        integer("padding", self.padding, high=min(height, width) - 1, fix=f"the images are {height} x {width}")
        draws = rng.uniform_rows(torch.empty(len(x), 3, device=x.device))
        down, right = (draws[:, :2] * (2 * self.padding + 1)).long().unbind(1)
        rows = down[:, None] + torch.arange(height, device=x.device)
        columns = right[:, None] + torch.arange(width, device=x.device)
        if self.flip:
            columns = torch.where(draws[:, 2:] < 0.5, columns.flip(1), columns)
        padded = F.pad(x, (self.padding,) * 4, mode="reflect" if self.reflect else "constant")
        sample = torch.arange(len(x), device=x.device)[:, None, None]
        # three indices around a slice put the channels last; the permutation back is only a view
        moved = padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]]
        return moved.permute(0, 3, 1, 2).contiguous()


_USUAL = {"cifar10": CropFlip(), "cifar100": CropFlip()}


def usual(name: str) -> CropFlip | None:
    """What is usual for the data set of that name: crop and flip for CIFAR; a mirrored digit or shoe is another one."""
    return _USUAL.get(name)
