"""Random numbers that belong to a model, not to a machine.

Every draw comes from a stream keyed by (seed of the model, purpose, step). So model m gets the same initial weights,
batches, attack starts and privacy noise whether it is trained alone or among hundreds, in whatever chunk, on whatever
worker, and after a resume.

>>> alone = Streams(seeds=(7,), purpose="noise", step=3).normal(4)
>>> among = Streams(seeds=(5, 7), purpose="noise", step=3).normal(4)
>>> bool((alone[0] == among[1]).all())
True
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


def key(seed: int, purpose: str, step: int = 0) -> int:
    """A 63-bit seed for the stream (seed, purpose, step).

    On a CPU torch's generator takes the last 32 bits of it: of very many streams two may be the same one. That does no harm
    to initial weights, coins and attack starts; privacy noise has keys of its own (`Streams.private_normal`).
    """
    return _digest(seed, purpose, step, 8) >> 1


def _digest(seed: int, purpose: str, step: int, size: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=size).digest(), "big")


def model_seeds(seed: int, models: int, first: int = 0) -> tuple[int, ...]:
    """Seeds of models first..first+models-1 of the experiment `seed`; unrelated across experiments."""
    return tuple(key(seed, "model", m) for m in range(first, first + models))


@dataclass(frozen=True)
class Streams:
    """The streams of M models for one purpose at one step.

    `counts` [M], where given, is how many rows of a padded batch each model really has: only those rows are drawn, so
    that padding (which depends on the other models of the chunk) cannot change anybody's numbers.
    """

    seeds: tuple[int, ...]
    purpose: str
    step: int = 0
    counts: Sequence[int] | None = None
    device: torch.device | str = "cpu"

    def fork(self, name: object) -> Streams:
        """The same models and step, another purpose: for instance the second restart of an attack."""
        return replace(self, purpose=f"{self.purpose}.{name}")

    def uniform_rows(self, x: Tensor) -> Tensor:
        """Uniform numbers in [0, 1), shaped like x [M*B, ...]; rows beyond a model's count are 0."""
        return self._rows(x, Tensor.uniform_)

    def normal_rows(self, x: Tensor) -> Tensor:
        """Standard normal numbers, shaped like x [M*B, ...]; rows beyond a model's count are 0."""
        return self._rows(x, Tensor.normal_)

    def uniform(self, n: int) -> Tensor:
        """[M, n] uniform numbers in [0, 1)."""
        out = torch.empty(len(self.seeds), n, device=self.device)
        for row, g in zip(out, self._generators(), strict=True):
            row.uniform_(generator=g)
        return out

    def normal(self, n: int) -> Tensor:
        """[M, n] standard normal numbers."""
        out = torch.empty(len(self.seeds), n, device=self.device)
        for row, g in zip(out, self._generators(), strict=True):
            row.normal_(generator=g)
        return out

    def private_normal(self, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[M, n] standard normal numbers to hide somebody behind: with whole tails, and on a CPU from keys of 128 bits.

        In float32, torch's end at 5.77 standard deviations on a CPU: a sum beyond that proves that somebody was in it, which
        with little noise happens more often than a small delta allows. So they are drawn in float64, and rounded.
        """
        out = torch.empty(len(self.seeds), n, device=self.device, dtype=dtype)
        for row, seed in zip(out, self.seeds, strict=True):
            row.copy_(self._on_card(seed, n) if row.is_cuda else self._on_cpu(seed, n))
        return out

    def _on_cpu(self, seed: int, n: int) -> Tensor:
        generator = np.random.Generator(np.random.SFC64(_digest(seed, self.purpose, self.step, 16)))
        return torch.from_numpy(generator.standard_normal(n))

    def _on_card(self, seed: int, n: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(key(seed, self.purpose, self.step))
        return torch.empty(n, device=self.device, dtype=torch.float64).normal_(generator=generator)

    def _rows(self, x: Tensor, fill) -> Tensor:
        models = len(self.seeds)
        out = torch.zeros_like(x).view(models, -1, *x.shape[1:])
        for m, g in enumerate(self._generators()):
            rows = out.shape[1] if self.counts is None else int(self.counts[m])
            if rows:
                fill(out[m, :rows], generator=g)
        return out.view_as(x)

    def _generators(self):
        for seed in self.seeds:
            yield torch.Generator(self.device).manual_seed(key(seed, self.purpose, self.step))
