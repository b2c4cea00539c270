"""An attack recorded once on a GPU and played back: a thousand small launches become one.

With small batches a GPU waits for its next launch most of the time. A CUDA graph keeps the launches of a whole attack. It
reads the weights where they lie, so it stays right while they are trained. Rows are padded to a few numbers, so that the
batches of Poisson sampling, each of another size, share a few recordings; in evaluation mode rows do not see each other.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

MOST = 16  # recordings of one network; the one not played for longest goes first


class Replays:
    """The recorded attacks of one network."""

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple, _Recording] = OrderedDict()
        self.pool, self.able = None, True

    def play(self, attack, net, z: Tensor, x: Tensor, y: Tensor, loss) -> Tensor:
        """What `attack.climb(net, z, x, y, loss)` gives for rows [M*B, C, H, W], recorded where it can be."""
        if not self.able or not _recordable(loss):
            return attack.climb(net, z, x, y, loss)
        rows = padded(len(x) // net.models)
        # a recording holds addresses and settings: with any other one it would play back something else
        where = tuple(t.data_ptr() for t in (*net.parameters(), *net.buffers()))
        key = (attack, type(loss), loss if not hasattr(loss, "given") else None, rows, x.shape[1:], x.dtype, net.half, net.scale,
               id(net.fast), where)
        recording = self.kept.get(key)
        if recording is None:
            recording = self.kept[key] = _Recording(net.models, rows, z, x, y, loss)
        self.kept.move_to_end(key)
        while len(self.kept) > MOST:
            self.kept.popitem(last=False)
        recording.take(z, x, y, loss)
        # a copy of the rows asked about, as the next attack is played in the same place
        out = self._moved(recording, attack, net).unflatten(0, (net.models, -1))[:, : len(x) // net.models]
        return out.clone(memory_format=torch.contiguous_format).flatten(0, 1)

    def _moved(self, recording: _Recording, attack, net) -> Tensor:
        def again() -> Tensor:
            given = recording.given
            loss = recording.loss(*given) if given else recording.loss
            return attack.climb(net, recording.z.clone(), recording.x, recording.y, loss)

        if recording.play is None and recording.met and self.able:
            try:
                if self.pool is None:
                    self.pool = new_pool()
                recording.out, recording.play = recorded(again, self.pool, recording.x.device)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.able = False
                reason = str(error).strip().split("\n")[0][:200]
                told = f"the attack could not be recorded ({reason}); going on without, which is only slower"
                warnings.warn(told, stacklevel=2)
        recording.met = True
        if recording.play is None:
            return again()  # the first time launch by launch: kernels are chosen and compiled then, which cannot be recorded
        recording.play()
        return recording.out


class _Recording:
    """One attack with its own images, padded rows included, and what plays it."""

    def __init__(self, models: int, rows: int, z: Tensor, x: Tensor, y: Tensor, loss) -> None:
        self.models, self.met, self.play, self.out = models, False, None, None
        self.z, self.x, self.y = (_padding(t, models, rows) for t in (z, x, y))
        self.loss = type(loss) if hasattr(loss, "given") else loss
        self.given = [_padding(t, models, rows) for t in getattr(loss, "given", ())]

    def take(self, z: Tensor, x: Tensor, y: Tensor, loss) -> None:
        """Put a batch where the recording looks for it. Padded rows keep what was there: nobody asks about them."""
        for own, new in zip((self.z, self.x, self.y, *self.given), (z, x, y, *getattr(loss, "given", ())), strict=True):
            new = new.unflatten(0, (self.models, -1))
            own.unflatten(0, (self.models, -1))[:, : new.shape[1]].copy_(new)


def padded(rows: int) -> int:
    """The number of rows that a batch is padded to: the next multiple of 4 to about a sixteenth of it.

    >>> [padded(rows) for rows in (3, 50, 128, 139, 1024)]
    [4, 52, 128, 144, 1024]
    """
    unit = max(4, 2 ** (rows.bit_length() - 5))
    return -(-rows // unit) * unit


def recorded(compute: Callable[[], Tensor], pool, device) -> tuple[Tensor, Callable[[], None]]:
    """(where the result of `compute` will be, what computes it again)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        out = compute()
    return out, graph.replay


def new_pool():
    """Memory that all recordings of a network share: they are never played at the same time."""
    return torch.cuda.graph_pool_handle()


def _recordable(loss) -> bool:
    # any other callable could hold tensors that a recording would keep as they were
    return hasattr(loss, "given") or getattr(loss, "stateless", False)


def _padding(t: Tensor, models: int, rows: int) -> Tensor:
    return torch.zeros(models * rows, *t.shape[1:], dtype=t.dtype, device=t.device)
