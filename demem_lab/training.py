"""Training is always over M models at once; M = 1 is a special case of nothing.

>>> recipe = Recipe(model=MLP(), objective=PGDAT(PGD(eps=0.1, steps=5)), mechanism=Plain(), epochs=30)
>>> ensemble = train(digits, member_masks(digits.n, 16, seed=0), recipe, seeds=model_seeds(0, 16))  # doctest: +SKIP

Each model has its own members, seed and settings. How many models share a batched matrix product is measured on the
spot (`chunk_size`), because the best number depends on image size and machine; it changes the speed, not the streams of
random numbers. A killed run continues from its last checkpoint in the store.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from demem_lab import farm
from demem_lab.augment import CropFlip
from demem_lab.data import Dataset
from demem_lab.live import Moment, Watch
from demem_lab.mechanisms import Batch, Guarantee, Mechanism, Plain
from demem_lab.models import MLP, Network, Spec
from demem_lab.objectives import Natural, Objective, PerSample
from demem_lab.optimizers import SGD, AdamW, HalfFlat, Schedule
from demem_lab.precision import Precision, Scaler, resolve
from demem_lab.sampling import Poisson, Sampler, kept_only
from demem_lab.store import Store
from demem_lab.streams import Streams
from demem_lab.validate import choice, finite, integer, member_mask

MODULES = (
    "streams", "data", "augment", "precision", "layers", "models", "attacks", "objectives", "mechanisms", "budgets",
    "remedies", "sampling", "optimizers", "training",
)  # whose source decides what a trained model is
CHECKPOINT_SECONDS = 20.0


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a model is trained, apart from its members and its seed."""

    model: Spec = field(default_factory=MLP)
    objective: Objective = field(default_factory=Natural)
    mechanism: Mechanism = field(default_factory=Plain)
    optimizer: SGD | AdamW = field(default_factory=SGD)
    sampler: Sampler = field(default_factory=Poisson)
    schedule: Schedule = field(default_factory=HalfFlat)
    epochs: float = 30
    augment: CropFlip | None = None  # `augment.usual` says what is usual for a data set
    precision: Precision = Precision.FLOAT32  # of the layers; losses, norms and noise are in float32 with any

    def __post_init__(self) -> None:
        finite("epochs", self.epochs, low=0.01, high=100_000)
        choice("precision", self.precision, Precision)


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
    losses: np.ndarray  # [M, epochs] mean training loss
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
        return net.to(device).eval()

    def guarantee(self, *, delta: float, model: int = 0) -> Guarantee:
        """What the mechanism promises the samples of model number `model`."""
        return self.recipe.mechanism.guarantee(
            sampling_rate=self.sampling_rate, steps=self.steps, delta=delta, n=self.members.shape[1], model=model,
            poisson=isinstance(self.recipe.sampler, Poisson), batch_norm=self.network([0]).has_batch_norm,
        )


def train(
    dataset: Dataset, members: Tensor, recipe: Recipe, *, seeds: Sequence[int], device: str = "auto",
    store: Store | None = None, trace: bool = False, progress: bool = False, label: str = "training",
    chunk: int | None = None, dtype: torch.dtype = torch.float32, checkpoint_seconds: float = CHECKPOINT_SECONDS,
    watch: Watch | None = None,
) -> Ensemble:
    """Train one model for each row of `members` (bool [M, N]).

    seeds: one a model. store: results are kept there and reused; an interrupted or killed run continues. trace: keep the
    loss of every sample in every epoch. chunk: models in one batched product (default: measured). dtype: of the weights.
    watch: told of every step, and able to stop.
    Raises ValueError for masks, flags or batch sizes that do not fit the data.
    """
    _check(dataset, members, recipe, seeds, dtype)
    on = farm.device(device)
    recipe = replace(recipe, precision=resolve(recipe.precision, on))  # kept results say what they were computed in
    job = _Job(dataset, members, recipe, tuple(seeds), on, trace, dtype, members.double().sum(1).mean().item())
    if store is None:
        return _gathered(job, _train_chunks(job, None, progress, label, chunk, checkpoint_seconds, watch), fresh=True)
    fresh = False

    def compute():
        nonlocal fresh
        fresh = True
        return _packed(_train_chunks(job, store, progress, label, chunk, checkpoint_seconds, watch))

    entry = store.compute("ensemble", job.config(), compute, modules=MODULES)
    return _gathered(job, _unpacked(entry.arrays), fresh=fresh, seconds=entry.meta.get("seconds", 0.0))


@dataclass(frozen=True)
class _Job:
    dataset: Dataset
    members: Tensor
    recipe: Recipe
    seeds: tuple[int, ...]
    device: torch.device
    trace: bool
    dtype: torch.dtype
    expected_members: float  # the mean row size of the whole design: cutting it in chunks must not change a schedule

    @property
    def steps_per_epoch(self) -> int:
        return max(1, round(self.expected_members / self.recipe.sampler.batch_size))

    @property
    def steps(self) -> int:
        return max(1, round(self.recipe.epochs * self.steps_per_epoch))

    @property
    def epochs(self) -> int:
        return math.ceil(self.steps / self.steps_per_epoch)

    @property
    def sampling_rate(self) -> float:
        return self.recipe.sampler.batch_size / self.expected_members

    def part(self, rows: list[int]) -> _Job:
        mechanism = self.recipe.mechanism.for_models(rows, len(self.members))
        optimizer = self.recipe.optimizer.for_models(rows, len(self.members))
        recipe = replace(self.recipe, mechanism=mechanism, optimizer=optimizer)
        return replace(self, members=self.members[rows], recipe=recipe, seeds=tuple(self.seeds[r] for r in rows))

    def config(self) -> dict:
        return {
            "data": self.dataset.fingerprint, "members": self.members, "recipe": self.recipe, "seeds": self.seeds,
            "device": self.device.type, "trace": self.trace, "dtype": str(self.dtype),
            "expected_members": self.expected_members,
        }


def _check(dataset: Dataset, members: Tensor, recipe: Recipe, seeds: Sequence[int], dtype: torch.dtype) -> None:
    member_mask(members, n=dataset.n)
    if len(seeds) != len(members):
        raise ValueError(f"{len(members)} models need {len(members)} seeds, got {len(seeds)}")
    if dtype == torch.float64 and recipe.precision in (Precision.BFLOAT16, Precision.FLOAT16):
        raise ValueError(f"weights in float64 and layers in {recipe.precision.value} do not go together; use Precision.FLOAT32")
    smallest = int(members.sum(1).min())
    integer("batch_size", recipe.sampler.batch_size, low=1, high=smallest, fix=f"the smallest model has {smallest} members")
    recipe.mechanism.check(dataset.n)
    recipe.mechanism.for_models(range(len(members)), len(members))  # one setting a model, or one for all
    recipe.optimizer.for_models(range(len(members)), len(members))
    if isinstance(recipe.sampler, Poisson) and getattr(recipe.model, "norm", "group") == "batch":
        raise ValueError("batch normalisation cannot see Poisson batches of changing size; use Shuffled(...) or norm='group'")


def _train_chunks(job: _Job, store, progress, label, chunk, checkpoint_seconds, watch) -> list[dict[str, np.ndarray]]:
    farm.one_thread_each(job.device)
    models = len(job.members)
    size = chunk_size(job) if chunk is None else integer("chunk", chunk, low=1)
    chunks = [list(range(i, min(i + size, models))) for i in range(0, models, size)]
    bar = tqdm(total=job.steps * models, desc=label, unit="step", disable=not progress, leave=False, mininterval=1,
               file=sys.stdout)  # on stderr JupyterLab would leave a red bar behind
    lock = threading.Lock()

    def one(rows: list[int], stop) -> dict[str, np.ndarray]:
        part = job.part(rows)

        def advance(steps: int, state: _State | None = None) -> None:
            with lock:
                bar.update(steps)
            if watch is not None and state is not None:
                watch.on_step(state.moment(label, rows, models))

        if store is None:
            return _train_one(part, None, stop, advance, checkpoint_seconds)
        config = part.config()
        kept = store.get("chunk", config, modules=MODULES)
        if kept is not None:
            advance(job.steps * len(rows))
            return dict(kept.arrays)
        result = _train_one(part, (store, config), stop, advance, checkpoint_seconds)
        store.put("chunk", config, result, modules=MODULES)
        store.drop("checkpoint", config, modules=MODULES)
        return result

    with bar:
        results = farm.run(one, chunks, at_once=farm.workers(job.device), stop=watch and watch.stop)
    if store is not None:  # the whole ensemble is about to be stored
        for rows in chunks:
            store.drop("chunk", job.part(rows).config(), modules=MODULES)
    return results


def _train_one(job: _Job, keep, stop, advance, checkpoint_seconds: float) -> dict[str, np.ndarray]:
    state = _State(job)
    if keep is not None:
        store, config = keep
        saved = store.get("checkpoint", config, modules=MODULES)
        if saved is not None:
            state.restore(saved.arrays)
            advance(state.step * state.models, state)
    last = time.monotonic()
    while state.step < job.steps:
        interrupted = stop is not None and stop.is_set()
        if keep is not None and (interrupted or time.monotonic() - last > checkpoint_seconds):
            store.put("checkpoint", config, state.arrays(), modules=MODULES)
            last = time.monotonic()
        if interrupted:
            raise KeyboardInterrupt
        try:
            state.advance()
        except KeyboardInterrupt:  # in the main thread it can strike in the middle of a step: that step is repeated
            if keep is not None and state.consistent:
                store.put("checkpoint", config, state.arrays(), modules=MODULES)
            raise
        advance(state.models, state)
    return state.result()


class _State:
    """A chunk of models between two steps."""

    def __init__(self, job: _Job) -> None:
        self.job, self.device, self.models = job, job.device, len(job.members)
        self.x = job.dataset.x.to(job.device, job.dtype)
        self.y = job.dataset.y.to(job.device)
        self.members = job.members.to(job.device)
        self.net = job.recipe.model.build(
            models=self.models, shape=job.dataset.shape, classes=len(job.dataset.classes), seeds=job.seeds
        ).to(job.device, job.dtype)
        self.net.train()
        self.net.compute_in(job.recipe.precision.dtype)
        self.scaler = Scaler(self.net) if job.recipe.precision is Precision.FLOAT16 else None
        self.optimizer = job.recipe.optimizer.start(list(self.net.parameters()))
        self.draw = job.recipe.sampler.start(self.members, job.seeds, job.sampling_rate, job.steps_per_epoch)
        self.loss_sum = torch.zeros(self.models, job.epochs, dtype=torch.float64, device=job.device)
        self.loss_count = torch.zeros_like(self.loss_sum)
        self.trace = None
        if job.trace:
            self.trace = torch.full((self.models, job.epochs, job.dataset.n), float("nan"), device=job.device)
        self.step, self.consistent = 0, True

    def advance(self) -> None:
        job, t = self.job, self.step
        index, valid = self.draw(t)
        kept = job.recipe.mechanism.takes_part(self._batch(index, valid))
        if not torch.equal(kept, valid):  # who has left costs nothing
            index, valid = kept_only(index, kept)
        batch = self._batch(index, valid)
        seen, gradients = self._repeatable(batch)
        while self.scaler is not None and not self.scaler.accepts(gradients):
            self._put_back()
            seen, gradients = self._repeatable(batch)
        self.consistent = False
        self.optimizer.apply(gradients, job.recipe.schedule(t, job.steps))
        self._note(seen.adversarial_ce.detach().view_as(valid), index, valid, t // job.steps_per_epoch)
        self.step, self.consistent = t + 1, True

    def _batch(self, index: Tensor, valid: Tensor) -> Batch:
        job, t = self.job, self.step
        noise = Streams(job.seeds, "noise", t, device=self.device)
        return Batch(
            index, valid, float(job.recipe.sampler.batch_size), t, job.steps, noise, epoch=t // job.steps_per_epoch
        )

    def _repeatable(self, batch: Batch) -> tuple[PerSample, list[Tensor]]:
        """What the objective saw and the mechanism's update; `_put_back`, and it can be had again from the same streams."""
        self.statistics = [b.clone() for b in self.net.buffers()]
        try:
            return self._gradients(batch)
        except BaseException as error:
            self._put_back()
            # whatever ran out of memory was thrown at one place, and all that was moved has been put back
            self.consistent |= isinstance(error, torch.OutOfMemoryError)
            raise

    def _put_back(self) -> None:
        """Undo what a forward pass does to running statistics: a step that is done again must not move them twice."""
        for buffer, before in zip(self.net.buffers(), self.statistics, strict=True):
            buffer.copy_(before)

    def _gradients(self, batch: Batch) -> tuple[PerSample, list[Tensor]]:
        job, flat, t = self.job, batch.index.flatten(), batch.step
        objective, mechanism = job.recipe.objective, job.recipe.mechanism
        streams = {"counts": batch.valid.sum(1).tolist(), "device": self.device}
        x, y = self.x[flat], self.y[flat]
        if job.recipe.augment is not None:
            x = job.recipe.augment(x, rng=Streams(job.seeds, "augment", t, **streams))
        whole = {"counts": mechanism.counted(batch).flatten()} if getattr(objective, "shifts_weights", False) else {}
        self.consistent = not whole  # an interruption must not keep weights that were moved for a moment
        with self.net.recording(mechanism.per_sample):
            seen = objective(self.net, x, y, flat, rng=Streams(job.seeds, "attack", t, **streams), **whole)
            try:
                return seen, mechanism.update(self.net, seen, batch)
            finally:
                if seen.undo is not None:
                    seen.undo()

    def _note(self, losses: Tensor, index: Tensor, valid: Tensor, epoch: int) -> None:
        self.loss_sum[:, epoch] += torch.where(valid, losses, 0).sum(1)
        self.loss_count[:, epoch] += valid.sum(1)
        if self.trace is not None:
            model, place = valid.nonzero(as_tuple=True)
            self.trace[model, epoch, index[model, place]] = losses[model, place].to(self.trace.dtype)

    def moment(self, label: str, rows: list[int], models: int) -> Moment:
        last = max(0, self.step - 1) // self.job.steps_per_epoch
        ends = self.step > 0 and (self.step % self.job.steps_per_epoch == 0 or self.step == self.job.steps)
        losses = self.loss_sum[:, last] / self.loss_count[:, last]
        return Moment(label, tuple(rows), models, self.step, self.job.steps, last + ends, ends, self.net, self.members, losses)

    def arrays(self) -> dict[str, np.ndarray]:
        kept = {f"net/{name}": tensor for name, tensor in self.net.state().items()}
        kept |= {f"opt/{name}": tensor for name, tensor in self.optimizer.state().items()}
        kept |= {"step": torch.tensor(self.step), "loss_sum": self.loss_sum, "loss_count": self.loss_count}
        if self.trace is not None:
            kept["trace"] = self.trace
        if self.scaler is not None:
            kept["scaler"] = self.scaler.state()
        return {name: tensor.detach().cpu().numpy() for name, tensor in kept.items()}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        tensors = {name: torch.from_numpy(np.array(array)).to(self.device) for name, array in arrays.items()}
        self.net.load_state_dict({name[4:]: t for name, t in tensors.items() if name.startswith("net/")})
        self.optimizer.load({name[4:]: t for name, t in tensors.items() if name.startswith("opt/")})
        self.step = int(tensors["step"])
        self.loss_sum, self.loss_count = tensors["loss_sum"], tensors["loss_count"]
        if self.trace is not None:
            self.trace = tensors["trace"]
        if self.scaler is not None:
            self.scaler.load(tensors["scaler"].cpu())

    def result(self) -> dict[str, np.ndarray]:
        kept = {f"net/{name}": tensor.numpy() for name, tensor in self.net.state().items()}
        kept["losses"] = (self.loss_sum / self.loss_count).cpu().numpy()
        if self.trace is not None:
            kept["trace"] = self.trace.cpu().numpy()
        return kept


_probed: dict[tuple, int] = {}


def chunk_size(job: _Job) -> int:
    """Models in one batched product: the fastest of a few, over three real steps each (kept for the session)."""
    models, at_once = len(job.members), farm.workers(job.device)
    largest = -(-models // at_once)  # every worker has something to do
    candidates = sorted({min(largest, c) for c in (1, 4, 16, 64, largest)})
    kind = type(job.recipe.objective).__name__, type(job.recipe.mechanism).__name__
    key = (job.recipe.model, job.dataset.shape, job.recipe.sampler, kind, largest, job.device.type, job.dtype)
    if len(candidates) > 1 and key not in _probed:
        _probed[key] = min(candidates, key=lambda c: _seconds_a_model_step(job, c))
    return _probed.get(key, candidates[0])


def _seconds_a_model_step(job: _Job, size: int) -> float:
    rows = list(range(size))
    state = _State(job.part(rows))
    # on a CPU, this thread's own time: whatever else the machine is doing must not decide
    clock = time.perf_counter if job.device.type == "cuda" else time.thread_time
    times = []
    for _ in range(min(4, job.steps)):  # the first one warms up
        start = clock()
        state.advance()
        if job.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return min(times[1:] or times) / size


def _packed(results: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([r[name] for r in results]) for name in results[0]}


def _unpacked(arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    return [dict(arrays)]


def _gathered(job: _Job, results, *, fresh: bool, seconds: float = 0.0) -> Ensemble:
    arrays = _packed(results)
    return Ensemble(
        parameters={n[4:]: torch.from_numpy(np.array(a)) for n, a in arrays.items() if n.startswith("net/")},
        members=job.members, seeds=job.seeds, recipe=job.recipe, shape=tuple(job.dataset.shape),
        classes=len(job.dataset.classes), steps=job.steps, sampling_rate=job.sampling_rate, losses=arrays["losses"],
        trace=arrays.get("trace"), seconds=seconds, fresh=fresh,
    )
