"""What a trained model follows from: a recipe, its data, its members and its seed.

>>> Recipe(model=MLP((64,)), mechanism=Plain(), epochs=10).sampler
Poisson(batch_size=50)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace

import numpy as np
import torch
from torch import Tensor

from demem_lab.augment import CropFlip
from demem_lab.data import Dataset, Deposited
from demem_lab.mechanisms import Mechanism, Plain
from demem_lab.models import MLP, Spec
from demem_lab.objectives import Natural, Objective, PerSample
from demem_lab.optimizers import SGD, AdamW, HalfFlat, Schedule
from demem_lab.precision import Precision
from demem_lab.sampling import Poisson, Sampler
from demem_lab.validate import choice, finite, instance, integer, member_mask, shown

MODULES = (
    "streams", "data", "augment", "precision", "triton_norm", "kernels", "layers", "replay", "networks", "folded", "models",
    "losses", "attacks", "objectives", "mechanisms", "budgets", "remedies", "sampling", "optimizers", "recipe", "state",
)  # whose source decides what a trained model is


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
        instance("model", self.model, having="build", example="MLP()")
        instance("objective", self.objective, having="__call__", example="PGDAT(PGD(eps=0.1))")
        instance("mechanism", self.mechanism, Mechanism, example="Plain()")
        for name, part in (("objective", self.objective), ("mechanism", self.mechanism)):
            if not is_dataclass(part):
                fix = f"write @dataclass(frozen=True) above class {type(part).__name__}"
                raise ValueError(f"{name} must be a dataclass, under whose fields results are kept, got {shown(part)}; {fix}")
        _check_called(self.objective)
        instance("optimizer", self.optimizer, having="for_models", example="SGD()")
        instance("sampler", self.sampler, having="batch_size", example="Poisson(50)")
        instance("schedule", self.schedule, having="__call__", example="HalfFlat()")
        if self.augment is not None:
            instance("augment", self.augment, having="__call__", example="CropFlip() (or None)")
        finite("epochs", self.epochs, low=0.01, high=100_000)
        choice("precision", self.precision, Precision)

    @property
    def row_by_row(self) -> bool:
        """Whether network, objective and augmentation say that what they do to a row depends on that row alone.

        They say it by `row_by_row = True`. Batch normalisation is looked for apart from it.

        Privacy noise is measured for one row's gradient: where rows mix, one sample moves those of others as well.
        """
        return all(getattr(part, "row_by_row", False) for part in (self.model, self.objective, self.augment) if part is not None)


def _check_called(objective: Objective) -> None:
    """ValueError unless an objective takes what it is given in training."""
    given = {"rng": None, **({"counts": None} if getattr(objective, "shifts_weights", False) else {})}
    try:
        inspect.signature(objective).bind(None, None, None, None, **given)
    except TypeError as error:
        name, called = type(objective).__name__, "(net, x, y, index, *, rng, counts)"
        raise ValueError(f"objective is called with {called}, and {name} does not take that: {error}") from None


def check_losses(objective: Objective, seen: PerSample, rows: int) -> None:
    """ValueError unless an objective answered with a `PerSample` of one loss for each of the rows."""
    name = type(objective).__name__
    if not isinstance(seen, PerSample):
        raise ValueError(f"the objective {name} must return a PerSample, got {shown(seen)}; demem_lab.objectives has examples")
    for what in ("loss", "adversarial_ce"):
        shape = list(getattr(getattr(seen, what), "shape", ["no tensor"]))
        if shape != [rows]:
            fix = "give one number a row, and no mean"
            raise ValueError(f"{what} of the objective {name} must have shape [M*B] = [{rows}], got {shape}; {fix}")


@dataclass(frozen=True)
class Job:
    """A recipe with its data, members and seeds: what trained models follow from, and nothing else."""

    dataset: Dataset | Deposited
    members: Tensor
    recipe: Recipe
    seeds: tuple[int, ...]
    device: torch.device
    trace: bool
    dtype: torch.dtype
    expected_members: float  # the mean row size of the whole design: cutting it in chunks must not change a schedule
    deterministic: bool = False
    compiled: bool = False  # changes speed and rounding, so not what results are kept under

    @property
    def models(self) -> int:
        """M."""
        return len(self.members)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which a sample is drawn once on average."""
        return max(1, round(self.expected_members / self.recipe.sampler.batch_size))

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return max(1, round(self.recipe.epochs * self.steps_per_epoch))

    @property
    def epochs(self) -> int:
        """Epochs begun."""
        return math.ceil(self.steps / self.steps_per_epoch)

    @property
    def sampling_rate(self) -> float:
        """Probability that a member is in a batch."""
        return self.recipe.sampler.batch_size / self.expected_members

    def part(self, rows: list[int]) -> Job:
        """The same for some of the models."""
        mechanism = self.recipe.mechanism.for_models(rows, len(self.members))
        optimizer = self.recipe.optimizer.for_models(rows, len(self.members))
        recipe = replace(self.recipe, mechanism=mechanism, optimizer=optimizer)
        return replace(self, members=self.members[rows], recipe=recipe, seeds=tuple(self.seeds[r] for r in rows))

    def config(self) -> dict:
        """What results are kept under."""
        return {
            "data": self.dataset.fingerprint, "members": self.members, "recipe": self.recipe, "seeds": self.seeds,
            "device": self.device.type, "trace": self.trace, "dtype": str(self.dtype),
            "expected_members": self.expected_members, **({"deterministic": True} if self.deterministic else {}),
        }


def apart(recipe: Recipe, members: Tensor) -> bool:
    """Whether models have to be trained one by one: with batch normalisation, rows that only fill up a shorter batch count."""
    uneven = len(set(members.sum(1).tolist())) > 1
    return getattr(recipe.model, "norm", "group") == "batch" and (recipe.mechanism.shrinks or uneven)


def joined(recipes: Sequence[Recipe], models: int, n: int) -> Recipe | None:
    """One recipe for the models of several recipes that differ in their mechanism alone, `models` each, on n samples.

    Flags of their own and tuples become one row or entry for each model. None where other settings of the mechanisms differ.
    ValueError for a tuple that has not one entry for each of the `models`.
    """
    for recipe in recipes:  # before they are joined: 2 entries and 6 would fit two times 4 models
        recipe.mechanism.for_models(range(models), models)
        recipe.optimizer.for_models(range(models), models)
    if len({type(recipe.mechanism) for recipe in recipes}) > 1:
        return None
    changes = {}
    for name in (f.name for f in fields(recipes[0].mechanism)):
        whole = _joined([getattr(recipe.mechanism, name) for recipe in recipes], models, n)
        if whole is None:
            return None
        changes[name] = whole[0]
    mechanism, optimizer = replace(recipes[0].mechanism, **changes), recipes[0].optimizer
    if isinstance(optimizer.lr, (tuple, list)):
        optimizer = replace(optimizer, lr=tuple(optimizer.lr) * len(recipes))
    return replace(recipes[0], mechanism=mechanism, optimizer=optimizer)


def _joined(values: list, models: int, n: int) -> Sequence | None:
    """(one value for all,), or None where there is none."""
    if all(isinstance(value, (tuple, list)) for value in values):
        return (tuple(entry for value in values for entry in value),)
    if not any(isinstance(value, (Tensor, np.ndarray)) for value in values):
        return values[:1] if all(value == values[0] for value in values) else None
    tables = [torch.as_tensor(value) for value in values if isinstance(value, (Tensor, np.ndarray))]
    if len(tables) < len(values) or len({(table.dtype, table.shape) for table in tables}) > 1:
        return None
    if tables[0].ndim == 2:
        return (torch.cat(tables),)
    if all(torch.equal(table, tables[0]) for table in tables):
        return values[:1]
    return (torch.stack(tables).repeat_interleave(models, 0),) if tables[0].shape == (n,) else None


def has_batch_norm(model: Spec, shape: tuple[int, int, int], classes: int) -> bool:
    """Whether networks of this architecture normalise by batch; who does not say so by `norm` is built and looked at."""
    said = getattr(model, "norm", None)
    return said == "batch" if said is not None else model.build(models=1, shape=shape, classes=classes, seeds=[0]).has_batch_norm


def check(dataset: Dataset, members: Tensor, recipe: Recipe, seeds: Sequence[int], dtype: torch.dtype) -> None:
    """ValueError unless masks, seeds, settings and batch sizes fit the data and each other."""
    instance("dataset", dataset, Dataset, example="load('digits')")
    instance("recipe", recipe, Recipe, example="Recipe(model=MLP())")
    member_mask(members, n=dataset.n)
    _check_seeds(seeds, len(members))
    half = "for 16 bits in the layers say Recipe(precision=Precision.AUTO)"
    choice("dtype", dtype, (torch.float32, torch.float64), fix=half)
    if dtype == torch.float64 and recipe.precision in (Precision.BFLOAT16, Precision.FLOAT16):
        raise ValueError(f"weights in float64 and layers in {recipe.precision.value} do not go together; use Precision.FLOAT32")
    smallest = int(members.sum(1).min())
    integer("batch_size", recipe.sampler.batch_size, low=1, high=smallest, fix=f"the smallest model has {smallest} members")
    recipe.mechanism.check(dataset.n)
    recipe.mechanism.for_models(range(len(members)), len(members))  # one setting a model, or one for all
    recipe.optimizer.for_models(range(len(members)), len(members))
    if isinstance(recipe.sampler, Poisson) and getattr(recipe.model, "norm", "group") == "batch":
        raise ValueError("batch normalisation cannot see Poisson batches of changing size; use Shuffled(...) or norm='group'")


def _check_seeds(seeds: Sequence[int], models: int) -> None:
    if isinstance(seeds, (str, bytes)) or not hasattr(seeds, "__len__") or getattr(seeds, "ndim", 1) != 1:
        fix = f"model_seeds(0, {models}) makes them"
        raise ValueError(f"seeds must be whole numbers, one for each of the {models} models, got {shown(seeds)}; {fix}")
    if len(seeds) != models:
        raise ValueError(f"{models} models need {models} seeds, got {len(seeds)}")
    for seed in seeds:
        integer("a seed", seed)
