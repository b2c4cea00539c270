"""What a trained model follows from: a recipe, its data, its members and its seed.

>>> Recipe(model=MLP((64,)), mechanism=Plain(), epochs=10).sampler
Poisson(batch_size=50)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from demem_lab.augment import CropFlip
from demem_lab.data import Dataset, Deposited
from demem_lab.mechanisms import Mechanism, Plain
from demem_lab.models import MLP, Spec
from demem_lab.objectives import Natural, Objective
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
