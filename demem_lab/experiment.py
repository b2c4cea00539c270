"""A fair comparison: what all arms share is said once, so that arms can only differ in what is compared.

An `Experiment` fixes data, members, architecture, sampler, steps and divisor; an arm is an objective, a mechanism and a
tuned learning rate. Members of experiment seed s are the same for every arm.

>>> lab = profile("smoke").experiment()
>>> plain = lab.run("none", seed=lab.seeds[0])              # trains 4 models, queries them, keeps the tables
>>> plain.clean.shape == plain.adversarial.shape            # logits [M, N, K]
True

The risk of a sample is scored for seed s from the OTHER seeds' plain ensembles, so that the models under test had no say
in who is protected.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from demem_lab import data, farm, queries, risk, training
from demem_lab.accounting import usual_delta
from demem_lab.attacks import PGD, cross_entropy, margin
from demem_lab.data import Dataset
from demem_lab.live import Watch
from demem_lab.mechanisms import DPSGD, Mechanism, Plain, SelectiveDP
from demem_lab.models import MLP, Spec, by_name
from demem_lab.objectives import PGDAT, Objective
from demem_lab.optimizers import SGD
from demem_lab.recipe import has_batch_norm, joined
from demem_lab.sampling import Poisson
from demem_lab.signals import confidence
from demem_lab.store import Store
from demem_lab.streams import key, model_seeds
from demem_lab.tables import Run, weakest
from demem_lab.training import Recipe
from demem_lab.validate import choice, finite, instance, integer

Flags = torch.Tensor  # bool [N]
PLAIN_RATES = (0.03, 0.1, 0.3)
CLIP_RATES = (0.5, 1.0, 2.0, 4.0)  # a clipped gradient is short, so the steps may be long
MODULES = (*training.MODULES, "queries", "experiment")


@dataclass(frozen=True)
class Experiment:
    """What every arm of a comparison shares."""

    dataset: Dataset
    model: Spec
    eps: float  # attack radius of training and of adversarial queries
    epochs: float
    batch_size: int
    lr: float  # of plain adversarial training
    models: int  # per seed
    seeds: tuple[int, ...]  # reported
    tuning_seed: int = 100  # chooses learning rates, is never reported
    tuning_models: int = 8
    attack_steps: int = 3
    query_steps: int = 10
    delta: float = 0.0  # of all guarantees; 0: `usual_delta` of the data
    device: str = "auto"
    progress: bool = True
    watch: Watch | None = None  # who looks on while this trains, and may stop it
    store: Store = field(default_factory=Store)

    def __post_init__(self) -> None:
        integer("models", self.models, low=4, fix="leave-one-out attacks need references on both sides")
        if self.models % 2:
            raise ValueError(f"models must be even, because members come in complementary halves, got {self.models}")
        for name in ("tuning_models", "batch_size", "attack_steps", "query_steps"):
            integer(name, getattr(self, name), low=1)
        if not isinstance(self.seeds, (tuple, list)):
            raise ValueError(f"seeds must be a tuple of whole numbers, such as (0, 1, 2), got {self.seeds!r}")
        for seed in (*self.seeds, self.tuning_seed):
            integer("a seed", seed)
        instance("store", self.store, Store, example="Store('runs/store')")
        if len(set(self.seeds)) < 2 or self.tuning_seed in self.seeds:
            raise ValueError(f"at least 2 different seeds, none of them the tuning seed {self.tuning_seed}, got {self.seeds}")
        if finite("delta", self.delta, low=0, high=1, fix="0 takes the usual one of the data") == 1:
            raise ValueError(f"delta must be < 1, got {self.delta}; 0 takes the usual one of the data")
        if not self.delta:
            object.__setattr__(self, "delta", usual_delta(self.dataset.n))

    @property
    def attack(self) -> PGD:
        """The attack used in training."""
        return PGD(self.eps, self.attack_steps)

    @property
    def query(self) -> PGD:
        """The attack whose images the models are asked about; no random start, so that answers repeat."""
        return PGD(self.eps, self.query_steps, random_start=False)

    def members(self, seed: int, models: int | None = None) -> torch.Tensor:
        """bool [M, N]: complementary halves, the same for every arm of this seed."""
        models = self.models if models is None else models
        return data.member_masks(self.dataset.n, models, seed=key(seed, "members") % 2**31)

    def recipe(
        self, *, objective: Objective | None = None, mechanism: Mechanism | None = None, lr=None,
        epochs: float | None = None, weight_decay: float = 0.0,
    ) -> Recipe:
        """The training recipe of an arm; what is not said is plain adversarial training. ValueError for settings out of range."""
        return Recipe(
            model=self.model, objective=PGDAT(self.attack) if objective is None else objective,
            mechanism=Plain() if mechanism is None else mechanism, sampler=Poisson(self.batch_size),
            optimizer=SGD(lr=self.lr if lr is None else lr, weight_decay=weight_decay),
            epochs=self.epochs if epochs is None else epochs,
        )

    def run(
        self, name: str, *, seed: int, flagged: Flags | None = None, models: int | None = None, trace: bool = False,
        **changes,
    ) -> Run:
        """Train and query one arm at one seed, or read it from the store. `changes` as in `recipe`.

        flagged: who the mechanism treats, kept beside the numbers.
        """
        models = self.models if models is None else models
        recipe, members = self.recipe(**changes), self.members(seed, models)
        return self.tables(name, recipe, members, model_seeds(seed, models), seed=seed, flagged=flagged, trace=trace)

    def tables(
        self, name: str, recipe: Recipe, members, seeds: Sequence[int], *, seed: int, flagged=None, trace=False, ready=None
    ) -> Run:
        """Outputs on clean and adversarial images for models of any members and seeds, through the store.

        ready: (arrays, meta) when they were computed together with others.
        """
        config = self._config(recipe, members, seeds, trace)

        def compute():
            return ready or self._query(f"{name}, seed {seed}", recipe, members, seeds, trace)

        entry = self.store.compute("tables", config, compute, modules=MODULES)
        rate, steps = entry.meta["sampling_rate"], entry.meta["steps"]
        mixed = has_batch_norm(recipe.model, self.dataset.shape, len(self.dataset.classes))
        promises = tuple(
            recipe.mechanism.guarantee(
                sampling_rate=rate, steps=steps, delta=self.delta, n=self.dataset.n, model=model, batch_norm=mixed,
                poisson=isinstance(recipe.sampler, Poisson), row_by_row=recipe.row_by_row,
            )
            for model in range(len(members))  # settings may be one a model
        )
        return Run(
            name, seed, self.dataset.y.numpy(), members.numpy(), entry.arrays["clean"], entry.arrays["adversarial"],
            entry.arrays["robust"], weakest(promises), steps, rate, None if flagged is None else np.asarray(flagged),
            entry.arrays.get("trace"), entry.arrays.get("gradient_norms"), entry.fresh, promises,
        )

    def _config(self, recipe: Recipe, members, seeds: Sequence[int], trace: bool = False) -> dict:
        return {
            "data": self.dataset.fingerprint, "recipe": recipe, "members": members, "seeds": tuple(seeds),
            "query": self.query, "trace": trace, "delta": self.delta, "device": farm.device(self.device).type,
        }

    def _trained(self, label: str, recipe: Recipe, members, seeds: Sequence[int], trace: bool = False):
        """The models, and how to ask them."""
        ensemble = training.train(
            self.dataset, members, recipe, seeds=seeds, device=self.device, store=self.store, trace=trace,
            progress=self.progress, label=label, watch=self.watch,
        )
        return ensemble, partial(
            queries.outputs, ensemble, self.dataset, device=self.device, stop=self.watch and self.watch.stop
        )

    def _query(self, label: str, recipe: Recipe, members, seeds: Sequence[int], trace: bool = False):
        ensemble, ask = self._trained(label, recipe, members, seeds, trace)
        clean, moved = ask(), ask(attack=self.query)
        # heavy noise blows logits up until cross-entropy is flat and PGD stands still: robust only by blindness.
        # The margin loss cannot be blinded that way, so a sample counts as robust when both attacks fail.
        y = self.dataset.y.numpy()
        robust = (clean.argmax(-1) == y) & (moved.argmax(-1) == y)
        seeing = ask(attack=self.query, loss=margin, only=robust)  # whoever is fooled already is decided
        robust &= seeing.argmax(-1) == y
        arrays = {"clean": clean, "adversarial": moved, "robust": robust}
        if trace:
            norms = queries.gradient_norms(ensemble, self.dataset, attack=self.query, device=self.device)
            arrays |= {"trace": ensemble.trace, "gradient_norms": norms}
        return arrays, {"steps": ensemble.steps, "sampling_rate": ensemble.sampling_rate}

    def _each_seed(self, name: str, how: Callable[[Flags | None], Mechanism | None], flagged: dict, **changes) -> list[Run]:
        """One run a seed; those that are not in the store are trained as ONE batch, which is a third faster, where they can."""
        jobs = {}
        for seed, who in flagged.items():
            jobs[seed] = self.recipe(mechanism=how(who), **changes), self.members(seed), model_seeds(seed, self.models)
        new = [s for s, job in jobs.items() if self.store.get("tables", self._config(*job), modules=MODULES) is None]
        ready = {}
        # what `how` made of each seed's own flags is joined: of all seeds' flags at once it may make something else
        joint = joined([jobs[s][0] for s in new], self.models, self.dataset.n) if len(new) > 1 else None
        if joint is not None:
            members = torch.cat([jobs[s][1] for s in new])
            arrays, meta = self._query(name, joint, members, tuple(seed for s in new for seed in jobs[s][2]))
            for i, s in enumerate(new):
                ready[s] = {k: a[i * self.models : (i + 1) * self.models] for k, a in arrays.items()}, meta
        return [self.tables(name, *job, seed=s, flagged=flagged[s], ready=ready.get(s)) for s, job in jobs.items()]

    def risk(self, seed: int, runs: Sequence[Run] | None = None) -> risk.MemorizationScore:
        """Robust memorization of every sample [N] as seen by the models of all OTHER reported seeds.

        runs: an arm at all seeds, to ask who is at risk under its treatment; by default plain adversarial training.
        """
        others = [self.run("none", seed=s) for s in self.seeds if s != seed]
        if runs is not None:
            others = [run for run in runs if run.seed != seed]
        p = np.concatenate([confidence(run.adversarial, run.y) for run in others])
        return risk.memorization(p, np.concatenate([run.members for run in others]))

    def flags(self, seed: int, fraction: float | None = None, *, risk_threshold: float | None = None) -> Flags:
        """bool [N]: the riskiest `fraction` of the samples, or those with a score of at least `risk_threshold`."""
        chosen = risk.protected_set(self.risk(seed).score, fraction=fraction, risk_threshold=risk_threshold)
        return torch.as_tensor(chosen.mask)

    def random_flags(self, seed: int, fraction: float | None = None, *, risk_threshold: float | None = None) -> Flags:
        """As many samples as `flags`, drawn at random: the control for choosing them by risk."""
        count = int(self.flags(seed, fraction, risk_threshold=risk_threshold).sum())
        return torch.as_tensor(risk.random_set(self.dataset.n, count, seed=key(seed, "random set") % 2**31))

    def treat(
        self, name: str, how: Callable[[Flags], Mechanism], *, fraction: float | None = None,
        risk_threshold: float | None = None, random: bool = False, choose: Callable[[int], Flags] | None = None, **changes,
    ) -> list[Run]:
        """One arm that treats some samples with mechanism `how(flags)`, at every reported seed; flags are bool [N].

        Who: as in `flags`, as many at random (`random`), or whoever `choose(seed)` says. A `SelectiveDP` of the fraction 1 is
        of everybody, a set that no data had a say in, and promises so.
        """
        find = choose or (self.random_flags if random else self.flags)
        settings = {} if choose else {"fraction": fraction, "risk_threshold": risk_threshold}

        def made(who: Flags) -> Mechanism:
            mechanism = how(who)
            by_data = fraction != 1 or choose or type(mechanism) is not SelectiveDP or mechanism.selection != "from_data"
            return mechanism if by_data else replace(mechanism, selection="fixed")

        return self._each_seed(name, made, {seed: find(seed, **settings) for seed in self.seeds}, **changes)

    def arm(self, name: str, **changes) -> list[Run]:
        """One arm that treats everybody alike, at every reported seed; a tuple has an entry for each model of a seed."""
        mechanism = changes.pop("mechanism", None)
        return self._each_seed(name, lambda _: mechanism, dict.fromkeys(self.seeds), **changes)

    def tuned(self) -> Experiment:
        """The same with plain adversarial training's learning rate chosen on the tuning seed."""
        return replace(self, lr=best_rate(self.tune("none", PLAIN_RATES)))

    def rate_for_everybody(self, noise_multiplier: float) -> float:
        """The learning rate for DP-SGD with this noise multiplier, chosen on the tuning seed: each noise has its own."""
        return best_rate(self.tune_everybody(noise_multiplier))

    def tune_everybody(self, noise_multiplier: float) -> dict[float, dict[str, float]]:
        """`tune` for DP-SGD: the more noise, the smaller the rates worth trying; clipping alone wants large ones."""
        return self.tune(
            f"DP for everybody, noise {noise_multiplier:g}", dp_rates(noise_multiplier), mechanism=DPSGD(noise_multiplier)
        )

    def tune(self, name: str, rates: Sequence[float], **changes) -> dict[float, dict[str, float]]:
        """Each learning rate on the tuning seed, all as ONE batch: {lr: {"clean", "robust"}}, accuracies of non-members.

        Choose by robust accuracy; the seed it was chosen on is not reported.
        """
        models, rates = self.tuning_models, tuple(rates)
        members = self.members(self.tuning_seed, models)
        recipe = self.recipe(lr=tuple(r for r in rates for _ in range(models)), **changes)
        seeds = model_seeds(self.tuning_seed, models) * len(rates)
        members, y = members.repeat(len(rates), 1), self.dataset.y.numpy()

        def compute():
            _, ask = self._trained(f"{name}: tuning, seed {self.tuning_seed}", recipe, members, seeds)
            clean = (ask().argmax(-1) == y) & ~members.numpy()
            robust = clean
            for loss in (cross_entropy, margin):  # only non-members count, and whoever has fallen is decided
                robust = robust & (ask(attack=self.query, loss=loss, only=robust).argmax(-1) == y)
            return {"clean": clean, "robust": robust}, {}

        right = self.store.compute("tuning", self._config(recipe, members, seeds), compute, modules=MODULES).arrays
        outside = (~members.numpy()).reshape(len(rates), -1)
        rows = {kind: ok.reshape(len(rates), -1).sum(1) / outside.sum(1) for kind, ok in right.items()}
        return {rate: {kind: float(values[number]) for kind, values in rows.items()} for number, rate in enumerate(rates)}


def dp_rates(noise_multiplier: float) -> tuple[float, ...]:
    """Learning rates to try for DP-SGD with max_grad_norm 1: where noise rules, the best one goes as 1 / noise."""
    if noise_multiplier == 0:
        return CLIP_RATES
    return tuple(float(f"{rate / max(noise_multiplier, 0.03):.2g}") for rate in (0.01, 0.03, 0.1))


def best_rate(tuned: dict[float, dict[str, float]]) -> float:
    """The learning rate with the highest robust accuracy on non-members."""
    return max(tuned, key=lambda rate: tuned[rate]["robust"])


@dataclass(frozen=True)
class Profile:
    """How much of everything a notebook does: values, never another code path."""

    name: str
    dataset: str
    subset: int  # 0: all
    model: str  # as in models.by_name
    models: int
    seeds: int
    epochs: float
    plane_models: int
    tuning_models: int
    batch_size: int = 64
    lr: float = 0.1
    width: int = 128

    def experiment(
        self, *, dataset: str = "", subset: int = 0, model: str = "", models: int = 0, seeds: int = 0, epochs: float = 0,
        eps: float = 0, data_root: str = "", download: bool = False, device: str = "auto", progress: bool | None = None,
    ) -> Experiment:
        """The experiment of this profile; what is given (not empty, not 0) takes the place of the profile's value.

        device "auto" is the CPU for digits, also where a GPU is, and else a GPU where there is one.
        """
        chosen = replace(
            self, dataset=dataset or self.dataset, model=model or self.model, models=models or self.models,
            seeds=seeds or self.seeds, epochs=epochs or self.epochs, tuning_models=min(self.tuning_models, models or 64),
            subset=subset or (self.subset if dataset in ("", self.dataset) else 2000),
        )
        loaded = data.load(chosen.dataset, root=data_root or None, download=download, subset=chosen.subset or None)
        spec = MLP((self.width, self.width)) if chosen.model == "mlp" else by_name(chosen.model)
        quiet = os.environ.get("DEMEM_HEADLESS") == "1"
        return Experiment(
            dataset=loaded, model=spec, eps=eps or loaded.eps, epochs=chosen.epochs,
            batch_size=min(self.batch_size, loaded.n // 4), lr=self.lr, models=chosen.models,
            seeds=tuple(range(integer("seeds", chosen.seeds, low=2))), tuning_models=chosen.tuning_models,
            device=farm.suited(device, loaded.name),
            progress=not quiet if progress is None else progress,
        )


PROFILES = {
    "smoke": Profile("smoke", "digits", 300, "mlp", 4, 2, 3, 4, 4, batch_size=32, width=32),
    "lesson": Profile("lesson", "digits", 0, "mlp", 16, 3, 30, 8, 8),
    "full": Profile("full", "fashion_mnist", 10_000, "cnn", 16, 3, 30, 8, 8, batch_size=128),
}


def profile(name: str = "") -> Profile:
    """The profile of that name; empty: $DEMEM_PROFILE, else "lesson"."""
    name = name or os.environ.get("DEMEM_PROFILE") or "lesson"
    return PROFILES[choice("profile", name, PROFILES)]
