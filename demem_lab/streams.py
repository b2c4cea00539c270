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

import torch
from torch import Tensor


def key(seed: int, purpose: str, step: int = 0) -> int:
    """A 63-bit seed for the stream (seed, purpose, step); different triples give unrelated streams."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


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
