"""Who is in a batch: Poisson sampling (what privacy accounting assumes) or shuffled batches.

A sampler's `start` gives a function step -> (index int64 [M, B], valid bool [M, B]). B is the largest draw of the
models at hand; rows beyond a model's own draw are padding (not valid) and nobody is ever cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from demem_lab.streams import Streams
from demem_lab.validate import integer

Draw = Callable[[int], tuple[Tensor, Tensor]]


class Sampler(Protocol):
    """`batch_size` is the expected size, the divisor of every update."""

    batch_size: int

    def start(self, members: Tensor, seeds: Sequence[int], sampling_rate: float, steps_per_epoch: int) -> Draw: ...


@dataclass(frozen=True)
class Poisson:
    """Each member enters each batch by an independent coin of probability batch_size / members."""

    batch_size: int = 50

    def __post_init__(self) -> None:
        integer("batch_size", self.batch_size, low=1)

    def start(self, members: Tensor, seeds: Sequence[int], sampling_rate: float, steps_per_epoch: int) -> Draw:
        """`sampling_rate` is the coin's probability. A coin is thrown for everybody, member or not: whether one sample
        is a member then changes nobody else's coin."""

        def draw(step: int) -> tuple[Tensor, Tensor]:
            coins = Streams(tuple(seeds), "batch", step, device=members.device).uniform(members.shape[1])
            return _padded(members & (coins < sampling_rate))

        return draw


@dataclass(frozen=True)
class Shuffled:
    """Each epoch is a fresh permutation of the members, cut into batches. A remainder of half a batch or more is one as well
    (all updates are divided by `batch_size`); a smaller one waits.
    """

    batch_size: int = 50

    def __post_init__(self) -> None:
        integer("batch_size", self.batch_size, low=1)

    def start(self, members: Tensor, seeds: Sequence[int], sampling_rate: float, steps_per_epoch: int) -> Draw:
        """`sampling_rate` is not used."""
        order: dict[int, Tensor] = {}

        def draw(step: int) -> tuple[Tensor, Tensor]:
            epoch, place = divmod(step, steps_per_epoch)
            if epoch not in order:
                order.clear()
                coins = Streams(tuple(seeds), "shuffle", epoch, device=members.device).uniform(members.shape[1])
                order[epoch] = coins.masked_fill(~members, 2.0).argsort(1)  # members first, in random order
            index = order[epoch][:, place * self.batch_size : (place + 1) * self.batch_size]
            return index, members.gather(1, index)

        return draw


def kept_only(index: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """A batch (index [M, B], bool [M, B]) without the rows that are not kept, padded to its new largest draw."""
    places, valid = _padded(kept)
    return index.gather(1, places), valid


def _padded(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """bool [M, N] -> the chosen columns of each row, left-aligned, and which entries are real."""
    counts = chosen.sum(1)
    width = max(1, int(counts.max()))
    valid = torch.arange(width, device=chosen.device) < counts[:, None]
    index = torch.zeros(valid.shape, dtype=torch.int64, device=chosen.device)
    index[valid] = chosen.nonzero()[:, 1]  # both run through the rows in the same order
    return index, valid
