"""Losses of logits that attacks climb, one for each row, with their slopes at the logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]  # logits [B, K], labels [B] -> loss [B], what an attack increases


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each row, [B]."""
    if not _few_classes(logits):
        return F.cross_entropy(logits, y, reduction="none")
    return -log_softmax(logits).gather(1, y[:, None])[:, 0]


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Best wrong logit minus the right one, [B] (Carlini & Wagner 2017): its slope never vanishes.

    A model with huge logits has a saturated softmax, whose cross-entropy is flat in float32: an attack on that loss does
    not move, and the model only looks robust.
    """
    right = logits.gather(-1, y[:, None])[:, 0]
    return logits.scatter(-1, y[:, None], float("-inf")).amax(-1) - right


cross_entropy.stateless = margin.stateless = True  # an attack on them can be recorded (`replay`)


def softmax(logits: Tensor) -> Tensor:
    """Probabilities [B, K]. torch takes a short last axis number by number: ten classes are 8 times as fast laid out first."""
    return logits.t().softmax(0).t().contiguous() if logits.shape[-1] < 16 else logits.softmax(-1)


def log_softmax(logits: Tensor) -> Tensor:
    """Their logarithms [B, K], in the same way; with its gradient, many rows of ten classes are 3 times as fast."""
    return logits.t().log_softmax(0).t() if _few_classes(logits) else logits.log_softmax(-1)


def _few_classes(logits: Tensor) -> bool:
    """Whether laying out the classes first pays for its transposition."""
    return logits.ndim == 2 and logits.shape[1] < 16 and len(logits) > 512 and not logits.is_cuda


def logit_slope(loss: Loss, logits: Tensor, y: Tensor) -> Tensor:
    """Gradient of the summed loss at the logits, [B, K]; a loss may bring its own as `slope`."""
    if hasattr(loss, "slope"):
        return loss.slope(logits, y)
    if loss is cross_entropy:  # softmax minus one-hot, in two passes instead of autograd's six
        slope = softmax(logits)
        return slope.scatter_add_(-1, y[:, None], slope.new_full((1, 1), -1).expand(len(y), 1))
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        return torch.autograd.grad(loss(logits, y).sum(), logits)[0]
