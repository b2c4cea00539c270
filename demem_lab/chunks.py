"""One chunk of models, trained wherever a worker is: from its checkpoint where there is one, in halves where memory is short.

>>> train_chunk(Task(job, store))["losses"].shape                                                # doctest: +SKIP
(16, 30)

A `Task` is plain data, so any executor can carry it to another process or machine; what comes back is arrays.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from demem_lab import farm
from demem_lab.data import Deposited
from demem_lab.recipe import MODULES, Job
from demem_lab.state import State, cut
from demem_lab.store import Store, code_version

CHECKPOINT_SECONDS = 20.0
Tell = Callable[..., None]  # tell(steps x models done), or tell(that, state, which of the task's models)


class ChunkHalved(UserWarning):
    """Memory was short, so fewer models are trained at once; their results stay the same."""


@dataclass(frozen=True)
class Task:
    """A chunk of models, and where to keep what is done of it. `code` is the version of the package that asks."""

    job: Job
    store: Store | None = None
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    code: str = ""


class Room:
    """How many models at once the memory is known to hold."""

    def __init__(self) -> None:
        self.models = math.inf

    def halve(self, job: Job, task: Task) -> None:
        """After `job` did not fit. MemoryError when it was a single model."""
        if job.models == 1:
            kept = "" if task.store is None else f"; what was done before is kept in {task.store.root}"
            raise MemoryError(
                f"the memory of {job.device} does not hold one model with batches of {job.recipe.sampler.batch_size}: take a "
                f"smaller batch_size or model, or free the device{kept}"
            )
        self.models = job.models - job.models // 2
        warnings.warn(
            f"{job.models} models at once do not fit into the memory of {job.device}; going on with {self.models} "
            "(slower, results stay the same)", ChunkHalved, stacklevel=2,
        )


def train_chunk(task: Task, stop=None, tell: Tell = lambda *_: None, room: Room | None = None) -> dict[str, np.ndarray]:
    """Train the models of a task; what is in its store is not done again.

    stop: an Event; when it is set, state is saved and KeyboardInterrupt raised. tell: told of every step.
    Raises MemoryError when not even one model fits.
    """
    return _kept(task, task.job, list(range(task.job.models)), stop, tell, room or Room(), None)


def train_elsewhere(task: Task, stop=None) -> dict[str, np.ndarray]:
    """`train_chunk` on another process or machine, which may have another device or another version of the package."""
    if task.code != code_version(MODULES):
        raise RuntimeError(
            "a worker has another version of demem_lab or torch than the one that asked it; install the same on all machines"
        )
    farm.ready(task.job.device)
    if isinstance(task.job.dataset, Deposited):
        task = replace(task, job=replace(task.job, dataset=task.job.dataset.load()))
    with farm.deterministic(task.job.deterministic):
        return train_chunk(task, stop)


def _kept(task: Task, job: Job, which: list[int], stop, tell: Tell, room: Room, start) -> dict[str, np.ndarray]:
    store, config, result, halves = task.store, job.config(), None, []
    if store is not None:
        entry = store.get("chunk", config, modules=MODULES)
        if entry is not None:
            tell((job.steps - (0 if start is None else int(start["step"]))) * job.models)
            return dict(entry.arrays)
    if job.models <= room.models:
        result, start = _train(task, job, which, stop, tell, start)
        if result is None:
            farm.free(job.device)
            room.halve(job, task)
    if result is None:
        middle = job.models // 2
        halves = [list(range(middle)), list(range(middle, job.models))]
        begun = [None if start is None else cut(start, rows, job.models) for rows in halves]
        parts = [
            _kept(task, job.part(rows), [which[r] for r in rows], stop, tell, room, b)
            for rows, b in zip(halves, begun, strict=True)
        ]
        result = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if store is not None:
        store.put("chunk", config, result, modules=MODULES)
        store.drop("checkpoint", config, modules=MODULES)
        for rows in halves:
            store.drop("chunk", job.part(rows).config(), modules=MODULES)
    return result


def _train(task: Task, job: Job, which: list[int], stop, tell: Tell, start):
    """(result, None); or (None, where it was) when memory ran out, as State.arrays() or None for the beginning."""
    store, config, state = task.store, job.config(), None
    saved = None if store is None else store.get("checkpoint", config, modules=MODULES)
    begun = 0 if start is None else int(start["step"])
    if saved is not None and int(saved.arrays["step"]) > begun:
        start = dict(saved.arrays)
    try:
        state = State(job)
        if start is not None:
            state.restore(start)
            tell((state.step - begun) * job.models, state, which)
        last = time.monotonic()
        while state.step < job.steps:
            interrupted = stop is not None and stop.is_set()
            if store is not None and (interrupted or time.monotonic() - last > task.checkpoint_seconds):
                store.put("checkpoint", config, state.arrays(), modules=MODULES)
                last = time.monotonic()
            if interrupted:
                raise KeyboardInterrupt
            state.advance()
            tell(job.models, state, which)
        return state.result(), None
    except KeyboardInterrupt:  # in the main thread it can strike in the middle of a step: that step is repeated
        if store is not None and state is not None and state.consistent:
            store.put("checkpoint", config, state.arrays(), modules=MODULES)
        raise
    except torch.OutOfMemoryError:
        if state is None:
            return None, start
        if state.consistent:
            return None, state.arrays()
        done = 0 if start is None else int(start["step"])
        tell((done - state.step) * job.models)  # memory ran out while weights were being moved: those steps are lost
        return None, start


_probed: dict[tuple, int] = {}


def chunk_size(job: Job, largest: int) -> int:
    """Models in one batched product: the fastest of a few, over three real steps each (kept for the session)."""
    farm.one_thread_each(job.device)
    candidates = sorted({min(largest, c) for c in (1, 4, 16, 64, largest)})
    kind = type(job.recipe.objective).__name__, type(job.recipe.mechanism).__name__
    kind = *kind, job.recipe.model, job.recipe.sampler, job.recipe.precision
    key = (*kind, job.dataset.shape, largest, job.device.type, job.dtype)
    if len(candidates) > 1 and key not in _probed:
        plain = replace(job, compiled=False)  # compiling each candidate would take longer than it tells
        _probed[key] = min(candidates, key=lambda c: _seconds_a_model_step(plain, c))
    return _probed.get(key, candidates[0])


def _seconds_a_model_step(job: Job, size: int) -> float:
    # on a CPU, this thread's own time: whatever else the machine is doing must not decide
    clock = time.perf_counter if job.device.type == "cuda" else time.thread_time
    times = []
    try:
        state = State(job.part(list(range(size))))
        # the first one warms up; on a GPU those follow in which steps are recorded, for batches of a few sizes (`replay`)
        for _ in range(min(12 if job.device.type == "cuda" else 4, job.steps)):
            start = clock()
            state.advance()
            if job.device.type == "cuda":
                torch.cuda.current_stream(job.device).synchronize()
            times.append(clock() - start)
    except torch.OutOfMemoryError:
        times = [math.inf]
    farm.free(job.device)
    return min(times[1:] or times) / size
