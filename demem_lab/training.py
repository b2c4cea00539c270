"""Training is always over M models at once; M = 1 is a special case of nothing.

>>> recipe = Recipe(model=MLP(), objective=PGDAT(PGD(eps=0.1, steps=5)), mechanism=Plain(), epochs=30)
>>> ensemble = train(digits, member_masks(digits.n, 16, seed=0), recipe, seeds=model_seeds(0, 16))  # doctest: +SKIP

Each model has its own members, seed and settings. How many models share a batched matrix product is measured on the
spot (`chunk_size`), because the best number depends on image size and machine; it changes the speed, not the streams of
random numbers. A killed run continues from its last checkpoint in the store. With an `executor`, chunks are trained by
other processes or machines:

>>> client = dask.distributed.Client("scheduler:8786")                                                # doctest: +SKIP
>>> train(digits, members, recipe, seeds=seeds, store=store, chunk=4,
...       executor=client.get_executor(resources={"GPU": 1}))                                         # doctest: +SKIP
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from demem_lab import farm
from demem_lab.chunks import CHECKPOINT_SECONDS, Room, Task, chunk_size, train_chunk, train_elsewhere
from demem_lab.data import Dataset, Deposited
from demem_lab.guarantees import Guarantee
from demem_lab.live import Watch
from demem_lab.networks import Network
from demem_lab.precision import Precision, resolve
from demem_lab.recipe import MODULES, Job, Recipe, apart, check
from demem_lab.sampling import Poisson
from demem_lab.state import State
from demem_lab.store import Store, code_version
from demem_lab.validate import integer

__all__ = ["MODULES", "Ensemble", "Recipe", "train"]


@dataclass(frozen=True)
class Ensemble:
    """M trained models: stacked parameters, who was a member of which, and how they were made."""

    parameters: dict[str, Tensor]  # each [M, ...]
    members: Tensor  # bool [M, N]
    seeds: tuple[int, ...]
    recipe: Recipe
    shape: tuple[int, int, int]
    classes: int
    steps: int
    sampling_rate: float
    losses: np.ndarray  # [M, epochs] mean adversarial cross-entropy on the images of training (clean for Natural)
    trace: np.ndarray | None = None  # [M, epochs, N] cross-entropy when last drawn in that epoch, NaN when not drawn
    seconds: float = 0.0
    fresh: bool = True  # False when it came from the store

    @property
    def models(self) -> int:
        """M."""
        return len(self.members)

    def network(self, rows: Sequence[int] | None = None, device: torch.device | str = "cpu") -> Network:
        """The trained network of the models in `rows` (all by default), in evaluation mode."""
        rows = list(range(self.models)) if rows is None else list(rows)
        net = self.recipe.model.build(
            models=len(rows), shape=self.shape, classes=self.classes, seeds=[self.seeds[r] for r in rows]
        )
        net.load_state_dict({name: tensor[rows] for name, tensor in self.parameters.items()})
        return net.to(device).arranged_for(device).eval()

    def part(self, rows: Sequence[int]) -> Ensemble:
        """Some of the models."""
        rows = list(rows)
        mechanism = self.recipe.mechanism.for_models(rows, self.models)
        recipe = replace(self.recipe, mechanism=mechanism, optimizer=self.recipe.optimizer.for_models(rows, self.models))
        return replace(
            self, parameters={name: tensor[rows] for name, tensor in self.parameters.items()}, members=self.members[rows],
            seeds=tuple(self.seeds[r] for r in rows), recipe=recipe, losses=self.losses[rows],
            trace=None if self.trace is None else self.trace[rows],
        )

    def guarantee(self, *, delta: float, model: int = 0) -> Guarantee:
        """What the mechanism promises the samples of model number `model`."""
        return self.recipe.mechanism.guarantee(
            sampling_rate=self.sampling_rate, steps=self.steps, delta=delta, n=self.members.shape[1], model=model,
            poisson=isinstance(self.recipe.sampler, Poisson), batch_norm=self.network([0]).has_batch_norm,
            row_by_row=self.recipe.row_by_row,
        )


def train(
    dataset: Dataset, members: Tensor, recipe: Recipe, *, seeds: Sequence[int], device: str = "auto",
    store: Store | None = None, trace: bool = False, progress: bool = False, label: str = "training",
    chunk: int | None = None, dtype: torch.dtype = torch.float32, checkpoint_seconds: float = CHECKPOINT_SECONDS,
    executor: Executor | None = None, deterministic: bool = False, compiled: bool = False, watch: Watch | None = None,
) -> Ensemble:
    """Train one model for each row of `members` (bool [M, N], of torch or NumPy).

    seeds: one a model. store: results are kept there and reused; an interrupted or killed run continues. trace: keep the
    loss of every sample in every epoch. chunk: models in one batched product (default: measured). dtype: of the weights.
    executor: any concurrent.futures executor of processes or machines (threads share this process anyway); "auto" is then
    the workers' device. The store must be on a file system that all of them see: a killed worker then loses at most
    `checkpoint_seconds` of one chunk, and images are read from there. Without a store every chunk carries them.
    deterministic: two runs on a GPU give the same bits, and are slower (on a CPU they do anyway). compiled: let torch.compile
    fuse the network's passes (only the attack's where per-sample norms are taken); a minute or two at first, other roundings,
    and nothing is recorded (`replay`). watch: told of every step (not of those an executor takes), and able to stop. On a CPU
    torch computes with one thread from here on (`farm.one_thread_each` says why).
    Raises ValueError for masks, flags, seeds, devices or batch sizes that do not fit, MemoryError when not even one model fits
    (chunks that do not are halved, with a ChunkHalved warning), farm.ExecutorDied when the executor stops working.
    """
    check(dataset, members, recipe, seeds, dtype)
    farm.check(executor, store)
    members = torch.tensor(members) if isinstance(members, np.ndarray) else members
    seeds = tuple(map(int, seeds))
    on = farm.device(device) if executor is None else farm.device_of(executor, device)
    recipe = replace(recipe, precision=_resolved(recipe.precision, on, executor))  # kept results say what it was
    expected = members.double().sum(1).mean().item()
    job = Job(dataset, members, recipe, seeds, on, trace, dtype, expected, deterministic, compiled)
    run = _Run(job, store, progress, label, chunk, checkpoint_seconds, executor, watch)
    if store is None:
        return _gathered(job, _packed(run.chunks()), fresh=True)
    fresh = False

    def compute():
        nonlocal fresh
        fresh = True
        return _packed(run.chunks())

    entry = store.compute("ensemble", job.config(), compute, modules=MODULES)
    return _gathered(job, entry.arrays, fresh=fresh, seconds=entry.meta.get("seconds", 0.0))


@dataclass(frozen=True)
class _Run:
    job: Job
    store: Store | None
    progress: bool
    label: str
    chunk: int | None
    checkpoint_seconds: float
    executor: Executor | None
    watch: Watch | None

    def chunks(self) -> list[dict[str, np.ndarray]]:
        job, store = self.job, self.store
        size = self._size() if self.chunk is None else integer("chunk", self.chunk, low=1)
        size = 1 if apart(job.recipe, job.members) else size
        rows = [list(range(i, min(i + size, job.models))) for i in range(0, job.models, size)]
        parts = [job.part(r) for r in rows]
        kept = {i: self._get(part) for i, part in enumerate(parts)}
        todo = [i for i, arrays in kept.items() if arrays is None]
        bar = tqdm(total=job.steps * job.models, desc=self.label, unit="step", disable=not self.progress, leave=False,
                   mininterval=1, file=sys.stdout)  # on stderr JupyterLab would leave a red bar behind
        lock = threading.Lock()

        def tell(steps: int) -> None:
            with lock:
                bar.update(steps)

        with bar:
            tell(job.steps * sum(parts[i].models for i in kept if i not in todo))
            if self.executor is None:
                found = self._here([(rows[i], parts[i]) for i in todo], tell)
            else:
                found = self._over([parts[i] for i in todo], tell)
        kept |= dict(zip(todo, found, strict=True))
        if store is not None:  # the whole ensemble is about to be stored
            for part in parts:
                store.drop("chunk", part.config(), modules=MODULES)
        return [kept[i] for i in range(len(parts))]

    def _size(self) -> int:
        job = self.job
        if self.executor is None:
            at_once = farm.workers(job.device)
            return chunk_size(job, -(-job.models // at_once))  # every worker has something to do
        few = job.part(list(range(min(job.models, 16))))  # measured by a worker, as its machine may be another one
        return farm.run(_size_elsewhere, [few], executor=self.executor)[0]

    def _get(self, part: Job) -> dict[str, np.ndarray] | None:
        entry = None if self.store is None else self.store.get("chunk", part.config(), modules=MODULES)
        return None if entry is None else dict(entry.arrays)

    def _here(self, parts: list[tuple[list[int], Job]], tell) -> list[dict[str, np.ndarray]]:
        farm.one_thread_each(self.job.device)
        room, watch = Room(), self.watch

        def one(part: tuple[list[int], Job], stop) -> dict[str, np.ndarray]:
            rows, job = part

            def told(steps: int, state: State | None = None, which: Sequence[int] = ()) -> None:
                tell(steps)
                if watch is not None and state is not None:
                    watch.on_step(state.moment(self.label, [rows[w] for w in which], self.job.models))

            return train_chunk(Task(job, self.store, self.checkpoint_seconds), stop, told, room)

        with farm.deterministic(self.job.deterministic):
            return farm.run(one, parts, at_once=farm.workers(self.job.device), stop=watch and watch.stop)

    def _over(self, parts: list[Job], tell) -> list[dict[str, np.ndarray]]:
        store = None if self.store is None else Store(self.store.root.absolute())  # a worker stands in another folder
        images = self.job.dataset if store is None else Deposited.of(self.job.dataset, store)
        sent = [replace(part, dataset=images) for part in parts]
        tasks = [Task(part, store, self.checkpoint_seconds, code_version(MODULES)) for part in sent]

        def done(number: int, _) -> None:
            tell(self.job.steps * parts[number].models)

        again = "start another one and train again: " + (
            "without a store everything is computed anew" if store is None else f"what is done is kept in {store.root}"
        )
        return farm.run(train_elsewhere, tasks, executor=self.executor, stop=self.watch and self.watch.stop, done=done, fix=again)


def _resolved(precision: Precision, on: torch.device, executor: Executor | None) -> Precision:
    if executor is None or precision is not Precision.AUTO:
        return resolve(precision, on)
    return farm.run(_resolved_elsewhere, [(precision, on)], executor=executor)[0]


def _resolved_elsewhere(asked: tuple[Precision, torch.device], stop) -> Precision:
    farm.ready(asked[1])
    return resolve(*asked)


def _size_elsewhere(job: Job, stop) -> int:
    farm.ready(job.device)
    return chunk_size(job, job.models)


def _packed(results: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([r[name] for r in results]) for name in results[0]}


def _gathered(job: Job, arrays: dict[str, np.ndarray], *, fresh: bool, seconds: float = 0.0) -> Ensemble:
    return Ensemble(
        parameters={n[4:]: torch.from_numpy(np.array(a)) for n, a in arrays.items() if n.startswith("net/")},
        members=job.members, seeds=job.seeds, recipe=job.recipe, shape=tuple(job.dataset.shape),
        classes=len(job.dataset.classes), steps=job.steps, sampling_rate=job.sampling_rate, losses=arrays["losses"],
        trace=arrays.get("trace"), seconds=seconds, fresh=fresh,
    )
