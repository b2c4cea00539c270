"""What is done at every step, recorded once on a GPU and played back: a thousand small launches become one.

With small batches a GPU waits for its next launch most of the time. A CUDA graph keeps the launches of a whole attack, or of
a training pass. It reads weights and images where they lie, so it stays right while the weights are trained. Rows are padded
to a few numbers, so that the batches of Poisson sampling, each of another size, share a few recordings. The first time that a
recording is played, what comes out is compared with what launches give.
"""

from __future__ import annotations

import gc
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache

import torch
from torch import Tensor

MOST = 32  # recordings of one network; the one not played for longest goes first (where sizes are `exact`: none goes)
Outcome = tuple[Tensor, list[Tensor]]  # something for each row [M*B, ...], and what belongs to all rows together
one_at_a_time = threading.Lock()  # a process can record one thing at once, and must not free memory meanwhile


class Replays:
    """The recordings of one network."""

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple, _Recording] = OrderedDict()
        self.failed: set[str] = set()  # kinds that could not be recorded
        self.pool, self.exact = None, False  # exact: nothing is padded
        self.shared: list[Tensor] | None = None

    def attack(self, attack, net, z: Tensor, x: Tensor, y: Tensor, loss) -> Tensor:
        """What `attack.climb(net, z, x, y, loss)` gives for rows [M*B, C, H, W], recorded where it can be."""
        given = getattr(loss, "given", None)
        # any other callable could hold tensors that a recording would keep as they were
        if given is None and not getattr(loss, "stateless", False):
            return attack.climb(net, z, x, y, loss)

        def climb(z: Tensor, x: Tensor, y: Tensor, *given: Tensor) -> Outcome:
            return attack.climb(net, z.clone(), x, y, type(loss)(*given) if given else loss), []

        key = attack, type(loss), loss if given is None else None
        return self.play("attack", key, net, (z, x, y, *(given or ())), (), climb, base=1)[0]

    def play(
        self, kind: str, key: tuple, net, rows: Sequence[Tensor], others: Sequence[Tensor], compute: Callable[..., Outcome], *,
        base: int | None = None,
    ) -> Outcome:
        """What `compute(*rows, *others)` gives, recorded where it can be. Tensors in the outcome are good until the next call.

        rows: [M*B, ...], padded in a recording, with zeros where there is one number a row; others: as they are. Apart from
        them `compute` may read the network and what `kind` and `key` tell apart, and nothing else. base: which of the rows the
        outcome is a small change of, so that a recording is judged by the change. In deterministic mode nothing is recorded:
        torch's deterministic kernels ask the CPU.
        """
        if kind in self.failed or "all" in self.failed or torch.are_deterministic_algorithms_enabled():
            return compute(*rows, *others)
        count = len(rows[0]) // net.models
        to = count if self.exact else padded(count)
        # a recording holds addresses and settings: with any other one it would play back something else
        where = tuple(t.data_ptr() for t in (*net.parameters(), *net.buffers()))
        shapes = tuple((t.shape[1:], t.dtype) for t in rows), tuple((t.shape, t.dtype) for t in others)
        key = (kind, *key, to, shapes, net.half, net.scale, net.training, where)
        recording = self.kept.get(key)
        if recording is None:
            now = net.half, net.scale, where
            if self.exact and len(self.kept) >= MOST:  # rare sizes would only push each other out
                self.kept = OrderedDict((k, r) for k, r in self.kept.items() if r.made_for == now)
                if len(self.kept) >= MOST:
                    return compute(*rows, *others)
            recording = self.kept[key] = _Recording(net.models, to, rows, others, base, now)
        self.kept.move_to_end(key)
        while len(self.kept) > MOST:
            self.kept.popitem(last=False)
        try:
            recording.take(rows, others)
            own, whole = self._outcome(kind, recording, net, lambda: compute(*recording.rows, *recording.others))
        except torch.OutOfMemoryError:
            # running statistics may have moved half-way: whoever trains puts them back, and does all of the step again
            if net.training or not self.holding:
                raise
            own = None
        if own is None:  # not above: while an error is handled, its traceback holds what the failed pass had taken
            recording = None
            self.release()
            return compute(*rows, *others)
        # a copy of the rows asked about, as the next batch is computed in the same place
        own = own.unflatten(0, (net.models, -1))[:, :count].clone(memory_format=torch.contiguous_format).flatten(0, 1)
        return own, whole

    def in_place(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors, copied to one place that all recordings share: a set of gradients for each would fill the card."""
        if self.shared is None:  # laid out as the weights are: an optimizer's single launch demands it
            self.shared = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
        torch._foreach_copy_(self.shared, list(tensors))
        return self.shared

    @property
    def holding(self) -> bool:
        """Whether there is memory to give back."""
        return any(recording.play is not None for recording in self.kept.values()) or self.pool is not None

    def release(self) -> None:
        """Give back what recordings hold, and record no more."""
        held = self.holding
        self.kept.clear()
        self.pool = None
        if held and "all" not in self.failed:
            self.failed.add("all")
            warnings.warn("memory is short: recorded steps are given up, which is only slower", stacklevel=2)
            gc.collect()
            with one_at_a_time:
                torch.cuda.empty_cache()

    def _outcome(self, kind: str, recording: _Recording, net, compute: Callable[[], Outcome]) -> Outcome:
        met, recording.met = recording.met, True
        if recording.play is None and met and kind not in self.failed:
            self._record(kind, recording, net, compute)
        if recording.play is None:
            return compute()  # the first time launch by launch: kernels are chosen and compiled then, which cannot be recorded
        recording.play()
        return recording.outcome

    def _record(self, kind: str, recording: _Recording, net, compute: Callable[[], Outcome]) -> None:
        statistics = [b.clone() for b in net.buffers()]

        def put_back() -> None:
            for buffer, before in zip(net.buffers(), statistics, strict=True):
                buffer.copy_(before)

        try:
            own, whole = compute()
            wanted = [t.clone() for t in (own, *whole)]
            if not all(bool(t.isfinite().all()) for t in wanted):
                put_back()
                recording.met = False
                return  # nothing to compare with: another time
            self.pool = new_pool() if self.pool is None else self.pool
            recording.outcome, recording.play = recorded(compute, self.pool, recording.rows[0].device)
            put_back()
            recording.play()
            put_back()
            own, whole = recording.outcome
            if recording.base is not None:
                start = recording.rows[recording.base]
                own, wanted[0] = own - start, wanted[0] - start
            # kernels add in any order, and an attack takes the sign of what comes out: some of its steps go the other way
            allowed = (0.02 if recording.base is None else 0.2, *[0.02] * len(whole))
            if not all(_alike(a, b, f) for a, b, f in zip((own, *whole), wanted, allowed, strict=True)):
                raise RuntimeError("it gives something else than launches do")
        except torch.OutOfMemoryError:
            recording.play = recording.outcome = None
            raise
        except RuntimeError as error:
            self.failed.add(kind)
            recording.play = recording.outcome = self.pool = None  # what comes next begins with memory of its own
            put_back()
            reason = str(error).strip().split("\n")[0][:200]
            warnings.warn(f"the {kind} could not be recorded ({reason}); going on without, which is only slower", stacklevel=2)


class _Recording:
    """What is computed for one number of rows: where its inputs are, what plays it and where the outcome is then."""

    def __init__(self, models: int, to: int, rows: Sequence[Tensor], others: Sequence[Tensor], base: int | None, now) -> None:
        self.models, self.met, self.play, self.outcome, self.base, self.made_for = models, False, None, None, base, now
        self.rows = [torch.zeros(models * to, *t.shape[1:], dtype=t.dtype, device=t.device) for t in rows]
        self.others = [torch.empty_like(t) for t in others]

    def take(self, rows: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Put a batch where the recording looks for it. Padded images keep what was there: nobody asks about them."""
        for own, new in zip(self.rows, rows, strict=True):
            own, new = (t.unflatten(0, (self.models, -1)) for t in (own, new))
            own[:, : new.shape[1]].copy_(new)
            if own.ndim == 2:  # such as whether a row counts
                own[:, new.shape[1] :].zero_()
        for own, new in zip(self.others, others, strict=True):
            own.copy_(new)


def padded(rows: int) -> int:
    """The number of rows that a batch is padded to: the next multiple of 8, or of an eighth to a quarter of it.

    >>> [padded(rows) for rows in (3, 50, 64, 139, 1000)]
    [8, 56, 64, 160, 1024]
    """
    unit = max(8, 2 ** (rows.bit_length() - 3))
    return -(-rows // unit) * unit


def recorded(compute: Callable[[], Outcome], pool, device) -> tuple[Outcome, Callable[[], None]]:
    """(where the outcome of `compute` will be, what computes it again)."""
    graph, collects, stream = torch.cuda.CUDAGraph(), gc.isenabled(), _side(device)
    with one_at_a_time, torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # not the whole device, which would end what another thread records
        torch.cuda.empty_cache()  # what launches took before is for the recording now
        gc.disable()  # what it would free in the middle must not become part of the recording
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    outcome = compute()
                    graph.capture_end()
                except BaseException:
                    _abandon(graph, pool, device)
                    raise
        finally:
            if collects:
                gc.enable()
        torch.cuda.current_stream().wait_stream(stream)
    return outcome, graph.replay


@lru_cache
def _side(device: torch.device):
    """The stream that is recorded on: memory is shared by recordings of one stream only."""
    return torch.cuda.Stream(device)


def _abandon(graph, pool, device: torch.device) -> None:
    """End a recording in whose middle something went wrong (which is raised after this, so errors here add nothing)."""
    with suppress(RuntimeError):
        graph.capture_end()
        return
    # up to torch 2.11 all memory would go to the pool of a recording that ended with an error, and none would be given back
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    if end is not None:
        with suppress(RuntimeError):
            end(device.index, pool)


def new_pool():
    """Memory that all recordings of a network share: they are never played at the same time."""
    return torch.cuda.graph_pool_handle()


def _alike(found: Tensor, wanted: Tensor, allowed: float) -> bool:
    """Whether two outcomes differ by less than that share of their size."""
    apart, size = (torch.linalg.vector_norm(t, dtype=torch.float64) for t in (found - wanted, wanted))
    return bool(apart <= allowed * size + 1e-6)
