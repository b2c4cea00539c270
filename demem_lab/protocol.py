"""The authors' protocol at any scale: one pool of images, many models on random halves, one treatment after the other.

>>> scaled_down = Protocol(dataset="digits", subset=300, model="mlp", models=4, epochs=2)
>>> results = run(scaled_down, arms=("none", "drop"), store=store)                               # doctest: +SKIP
>>> results.to_frame()                                                                           # doctest: +SKIP

Every treatment trains its own `models` on the same complementary halves, so that each sample is in exactly half of them,
and each model in turn is the target of an attacker who trained the others with the same treatment. Who is at risk is
scored by ONE short run on everybody (its mean loss). Source: Luo & Li, arXiv 2412.05767, and their public code.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from demem_lab import __version__, data, farm, queries, risk, training
from demem_lab.attacks import PGD, margin
from demem_lab.augment import usual
from demem_lab.data import Dataset
from demem_lab.mechanisms import DPSGD, Drop, LossVariance, Mechanism, Plain, SelectiveDP
from demem_lab.models import ARCHITECTURES
from demem_lab.objectives import AWP, PGDAT, TRADES, Natural, Objective
from demem_lab.optimizers import SGD, HalfFlat, Schedule, StepDecay, WarmUp
from demem_lab.precision import Precision, resolve
from demem_lab.remedies import GradedRelease, release_schedule
from demem_lab.results import Results, check_measurable, measure, there_already
from demem_lab.sampling import Poisson, Shuffled
from demem_lab.store import Store, installed
from demem_lab.streams import key, model_seeds
from demem_lab.training import Recipe
from demem_lab.validate import choice, finite, instance, integer

MODULES = (*training.MODULES, "queries", "protocol", "accounting", "guarantees")  # what is promised is kept with the numbers
OBJECTIVES = ("natural", "pgd-at", "trades", "awp", "trades-awp")


@dataclass(frozen=True)
class Protocol:
    """Everything that decides a run. The defaults are the authors' (CIFAR-10, ResNet-18, 128 models), with GroupNorm."""

    dataset: str = "cifar10"
    split: str = "all"  # train and test images as one pool, as the authors have it; or "train", "test"
    subset: int = 0  # 0: all
    model: str = "resnet18"
    objective: str = "pgd-at"
    eps: float = 8 / 255
    attack_steps: int = 3
    attack_step: float = 3.33 / 255
    query_steps: int = 20
    query_step: float = 1 / 255
    models: int = 128
    epochs: float = 100
    batch_size: int = 256
    lr: float = 0.1
    decay_at: float = 0.75  # fraction of the steps after which the rate falls to a tenth; 0: flat, then linear to zero
    warm_up: float = 0.0  # share of the steps in which the rate rises to `lr`
    weight_decay: float = 5e-4
    noise_multiplier: float = 1.0
    max_grad_norm: float = 1.0
    augment: bool = True  # crop and flip where that is usual for the data
    precision: str = "auto"  # of the layers: 16 bits on a GPU, float32 on a CPU; see `precision.Precision`
    dp_lr: float = 0.1  # of DP for everybody, chosen on models that are not reported
    fraction: float = 0.1  # share of the samples that are treated, the riskiest first
    risk_threshold: float = 0.0  # treat from this early loss on instead; 0: by fraction
    lams: tuple[float, ...] = (0.2, 0.6)  # of LossVariance, an arm each
    scoring_epochs: int = 5
    delta: float = 1e-5
    seed: int = 0

    def __post_init__(self) -> None:
        choice("model", self.model, ARCHITECTURES)
        choice("objective", self.objective, OBJECTIVES)
        choice("precision", self.precision, [p.value for p in Precision])
        integer("models", self.models, low=4, fix="leave-one-out attacks need references on both sides")
        if self.models % 2:
            raise ValueError(f"models must be even, because members come in complementary halves, got {self.models}")
        for name in ("subset", "attack_steps", "query_steps", "batch_size", "scoring_epochs"):
            integer(name, getattr(self, name), low=0 if name == "subset" else 1)
        integer("seed", self.seed)
        for name in ("eps", "attack_step", "query_step", "lr", "weight_decay", "noise_multiplier", "max_grad_norm", "dp_lr",
                     "risk_threshold"):
            finite(name, getattr(self, name), low=0)
        for name in ("fraction", "decay_at", "warm_up", "delta"):
            finite(name, getattr(self, name), low=0, high=1)
        if self.delta in (0, 1):
            raise ValueError(f"delta must lie in (0, 1), got {self.delta}; at 0 and at 1 there is nothing to promise")
        finite("epochs", self.epochs, low=0.01, high=100_000)
        if not isinstance(self.lams, (tuple, list)):
            raise ValueError(f"lams must be a tuple of numbers, such as (0.2, 0.6), got {self.lams!r}")
        for lam in self.lams:
            finite("lam", lam, low=0)
        if len({f"{lam:g}" for lam in self.lams}) < len(self.lams):
            raise ValueError(f"lams name an arm each, by six digits, so they must not repeat, got {self.lams!r}")

    def load(self, root: str | Path | None = None, *, download: bool = False) -> Dataset:
        """The images; `root` as in data.load."""
        return data.load(self.dataset, root=root, download=download, split=self.split, subset=self.subset or None)

    @property
    def query(self) -> PGD:
        """The attack whose images the models are asked about."""
        return PGD(self.eps, self.query_steps, self.query_step, random_start=False)

    def recipe(self, mechanism: Mechanism | None = None, *, lr: float | tuple[float, ...] | None = None) -> Recipe:
        """How a model is trained under a treatment."""
        schedule: Schedule = StepDecay((self.decay_at,)) if self.decay_at else HalfFlat()
        schedule = WarmUp(schedule, self.warm_up) if self.warm_up else schedule
        return Recipe(
            model=ARCHITECTURES[self.model], objective=self._objective(), mechanism=mechanism or Plain(),
            optimizer=SGD(lr=self.lr if lr is None else lr, weight_decay=self.weight_decay),
            sampler=Poisson(self.batch_size), schedule=schedule, epochs=self.epochs,
            augment=usual(self.dataset) if self.augment else None, precision=Precision(self.precision),
        )

    def _objective(self) -> Objective:
        attack = PGD(self.eps, self.attack_steps, self.attack_step)
        inner = {"natural": Natural(), "pgd-at": PGDAT(attack), "awp": PGDAT(attack)}.get(self.objective) or TRADES(attack)
        gamma = 0.005 if isinstance(inner, TRADES) else 0.01  # as their authors did
        return AWP(inner, gamma) if self.objective.endswith("awp") else inner


PROFILES = {
    "smoke": Protocol(
        dataset="digits", split="train", subset=300, model="mlp", eps=0.1, attack_step=0.08, query_steps=3, query_step=0.08,
        models=6, epochs=3, batch_size=32, decay_at=0, weight_decay=0, scoring_epochs=6,
    ),
    "lesson": Protocol(
        dataset="digits", split="train", model="mlp", eps=0.1, attack_step=0.08, query_steps=10, query_step=0.025, models=16,
        epochs=30, batch_size=64, decay_at=0, weight_decay=0, dp_lr=0.05,
    ),
    # half the radius of "paper": with so few steps, twice that was not learnt on a card (before models.NORMED_GAIN)
    "full": Protocol(
        split="train", subset=3_000, eps=4 / 255, attack_step=1.67 / 255, query_steps=10, query_step=1 / 255, models=8, epochs=32,
        batch_size=64, decay_at=0, warm_up=0.1, noise_multiplier=0.1,
    ),
    "paper": Protocol(),
}


@dataclass(frozen=True)
class Arm:
    """A treatment: how it makes a mechanism of the risk score [N], and the learning rate where it is not the plain one."""

    mechanism: Callable[[Protocol, np.ndarray], Mechanism]
    rate: Callable[[Protocol], float] = lambda protocol: protocol.lr


def arms_of(protocol: Protocol) -> dict[str, Arm]:
    """The treatments of a protocol, by name: "none" first, the controls among them."""
    arms = {
        "none": Arm(lambda p, s: Plain()),
        "SelectiveDP": Arm(lambda p, s: SelectiveDP(p.noise_multiplier, p.max_grad_norm, treated(p, s))),
        "DP for everybody": Arm(lambda p, s: DPSGD(p.noise_multiplier, p.max_grad_norm), lambda p: p.dp_lr),
        "drop": Arm(lambda p, s: Drop(treated(p, s))),
        "graded release": Arm(lambda p, s: GradedRelease(release_schedule(s))),
    }
    for lam in protocol.lams:
        arms[f"LossVariance {lam:g}"] = Arm(lambda p, s, lam=lam: LossVariance(lam))
    return arms


def treated(protocol: Protocol, score: np.ndarray) -> torch.Tensor:
    """bool [N]: whom the selective arms treat, by the risk score [N]."""
    cut = {"risk_threshold": protocol.risk_threshold} if protocol.risk_threshold else {"fraction": protocol.fraction}
    return torch.as_tensor(risk.protected_set(score, **cut).mask)


def run(
    protocol: Protocol, *, arms: Sequence[str] = (), store: Store | None = None, root: str | Path | None = None,
    download: bool = False, device: str = "auto", progress: bool = True, save: str | Path | None = None,
    executor: Executor | None = None, chunk: int | None = None,
) -> Results:
    """Train and measure arms (all by default); what is in the store is not computed again.

    device: "auto" is the CPU for digits, also where a GPU is, and else a GPU where there is one (or the executor's workers'
    device). save: a file that is written anew after each arm; arms that it has stay in it until they are measured again.
    executor: where chunks of models are trained and asked, as in `training.train`; the store must be on a file system that its
    workers see. chunk: as there, for queries too. Raises ValueError for an unknown arm, and for a file that would lose arms, is
    of another protocol or something else, before anything is trained; before any arm is, for a `fraction` or `risk_threshold`
    that leaves some model without members or non-members among the treated or the others.
    """
    instance("protocol", protocol, Protocol, example="PROFILES['smoke']")
    treatments = arms_of(protocol)
    if isinstance(arms, str):
        raise ValueError(f"arms must be a list of names, got {arms!r}; write ({arms!r},)")
    arms = tuple(arms) or tuple(treatments)
    for name in arms:
        choice("arm", name, treatments)
    if save is not None and Path(save).is_dir():
        raise ValueError(f"save must name a file, and {save} is a folder; give {Path(save) / 'results.json'}, for instance")
    farm.check(executor, store)
    store, dataset = store or Store(), protocol.load(root, download=download)
    device = farm.suited(device, dataset.name)
    settings = {**json.loads(json.dumps(asdict(protocol))), "images": dataset.n}
    older = None if save is None else there_already(save, settings, arms)
    began, seconds, machine = time.time(), 0.0, None
    how = {"device": device, "progress": progress, "executor": executor}
    score = risk_score(protocol, dataset, store=store, **how)
    members = data.member_masks(dataset.n, protocol.models, seed=key(protocol.seed, "members") % 2**31)
    seeds = model_seeds(protocol.seed, protocol.models)
    top, cut = treated(protocol, score).numpy(), "risk_threshold" if protocol.risk_threshold else "fraction"
    check_measurable(members.numpy(), top, setting=f"{cut} {getattr(protocol, cut)}")
    measured, promised, done = {}, {}, None
    for name in arms:
        arm = treatments[name]
        recipe = protocol.recipe(arm.mechanism(protocol, score), lr=arm.rate(protocol))
        tables, text, took = _tables(protocol, dataset, members, seeds, recipe, name, store, chunk=chunk, **how)
        machine = machine or _machine_of(device, executor)
        measured[name] = measure(tables, dataset.y.numpy(), members.numpy(), at_risk=top)
        promised[name], seconds = text, seconds + took
        done = Results(settings, measured, promised, _provenance(machine, seconds, began))
        if save is not None:
            done.beside(older, arms).save(save)
    return done


def profile(name: str = "") -> Protocol:
    """The protocol of that profile; empty: $DEMEM_PROFILE, else "lesson". ValueError for a name that there is none of."""
    return PROFILES[choice("profile", name or os.environ.get("DEMEM_PROFILE") or "lesson", PROFILES)]


def risk_score(
    protocol: Protocol, dataset: Dataset, *, store: Store, device: str = "auto", progress: bool = False,
    executor: Executor | None = None,
) -> np.ndarray:
    """[N] mean adversarial loss of each sample over ONE plain run of `scoring_epochs` epochs that trains on everybody.

    device and executor as in `run`.
    """
    epochs = protocol.scoring_epochs
    everybody = torch.ones(1, dataset.n, dtype=torch.bool)
    # shuffled, so that every epoch sees (almost) everybody; nothing is promised to anybody here
    recipe = replace(protocol.recipe(), sampler=Shuffled(protocol.batch_size), epochs=epochs)
    scored = training.train(
        dataset, everybody, recipe, seeds=(key(protocol.seed, "scoring"),), store=store, trace=True,
        device=farm.suited(device, dataset.name), progress=progress, label="risk score", executor=executor,
    )
    return risk.early_loss(scored.trace, epochs=epochs)


def tune(
    protocol: Protocol, name: str, rates: Sequence[float], *, models: int = 2, store: Store | None = None,
    root: str | Path | None = None, device: str = "auto", progress: bool = True,
) -> dict[float, float]:
    """Robust accuracy of non-members under each learning rate, on models of another seed that no result reports.

    device as in `run`. Raises ValueError for an unknown arm, bad rates or an odd number of models.
    """
    instance("protocol", protocol, Protocol, example="PROFILES['smoke']")
    choice("arm", name, arms_of(protocol))
    if isinstance(rates, str) or not isinstance(rates, Iterable):
        raise ValueError(f"rates must be a list of learning rates, such as (0.05, 0.1), got {rates!r}")
    rates = [finite("a learning rate", rate, low=0) for rate in rates]
    if integer("models", models, low=2) % 2:
        raise ValueError(f"models must be even, because members come in complementary halves, got {models}")
    farm.check(None, store)
    store, dataset = store or Store(), protocol.load(root)
    device = farm.suited(device, dataset.name)
    other = replace(protocol, seed=protocol.seed + 1_000)
    score = risk_score(other, dataset, store=store, device=device, progress=progress)
    members = data.member_masks(dataset.n, models, seed=key(other.seed, "members") % 2**31)
    found = {}
    for rate in rates:
        recipe = other.recipe(arms_of(other)[name].mechanism(other, score), lr=rate)
        seeds = model_seeds(other.seed, models)
        label = f"{name}, lr {rate:g}"
        tables, _, _ = _tables(other, dataset, members, seeds, recipe, label, store, device=device, progress=progress)
        found[rate] = float(tables["robust"][~members.numpy()].mean())
    return found


def _tables(
    protocol, dataset, members, seeds, recipe: Recipe, name, store: Store, *, device: str, progress: bool, executor=None,
    chunk: int | None = None,
):
    """(tables, guarantee in words, seconds it took when it was computed) of one arm, through the store."""
    on = farm.device(device) if executor is None else farm.device_of(executor, device)
    recipe = replace(recipe, precision=resolve(recipe.precision, on))  # kept results say what it was
    config = {
        "data": dataset.fingerprint, "recipe": recipe, "members": members, "seeds": tuple(seeds), "query": protocol.query,
        "device": on.type, "delta": protocol.delta, "accountant": installed("dp-accounting"),
    }

    def compute():
        ensemble = training.train(
            dataset, members, recipe, seeds=seeds, store=store, device=device, progress=progress, label=name,
            executor=executor, chunk=chunk,
        )
        meta = {"guarantee": str(ensemble.guarantee(delta=protocol.delta))}
        ask = partial(
            queries.outputs, ensemble, dataset, device=device, executor=executor, store=store, chunk=chunk,
            block=1000 if chunk == 1 else 300,
        )
        return _query(ask, dataset.y.numpy(), protocol.query), meta

    entry = store.compute("protocol", config, compute, modules=MODULES)
    return entry.arrays, entry.meta["guarantee"], entry.meta["seconds"]


def _query(ask: Callable[..., np.ndarray], y: np.ndarray, attack: PGD) -> dict[str, np.ndarray]:
    clean, moved = ask(), ask(attack=attack)
    robust = (clean.argmax(-1) == y) & (moved.argmax(-1) == y)
    # a saturated softmax blinds cross-entropy, the margin sees: robust is what withstands both
    seeing = ask(attack=attack, loss=margin, only=robust)
    return {"clean": clean, "adversarial": moved, "robust": robust & (seeing.argmax(-1) == y)}


def _provenance(machine: dict, seconds: float, began: float) -> dict:
    date = time.strftime("%Y-%m-%d", time.gmtime(began))
    return {"date": date, "commit": _commit(), **machine, "seconds of training and queries": round(seconds, 1)}


def _commit() -> str:
    """The commit that this code is, "+" where it was changed since; without a repository of its own, the version."""
    here, version = Path(__file__).resolve().parents[1], f"version {__version__}"

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != here:
            return version  # installed inside somebody else's repository
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "demem_lab") else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return version


def _machine_of(device: str, executor: Executor | None) -> dict:
    """What computes: this machine, or one of the executor's workers, which should all be of a kind."""
    if executor is None:
        return _machine(farm.device(device))
    return farm.run(_machine, [farm.device_of(executor, device)], executor=executor)[0]


def _machine(on: torch.device, stop=None) -> dict:
    there = on.type == "cuda" and torch.cuda.is_available()  # a worker without its GPU is told off when it is to train
    return {
        "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version(), "device": on.type,
        "processor": torch.cuda.get_device_name(on) if there else platform.processor() or platform.machine(),
        "cores": farm.workers("cpu"),
    }
