"""The authors' protocol at any scale: one pool of images, many models on random halves, one treatment after the other.

>>> scaled_down = Protocol(dataset="digits", subset=300, model="mlp", models=4, epochs=2)
>>> results = run(scaled_down, arms=("none", "drop"), store=store)                               # doctest: +SKIP
>>> results.to_frame()                                                                           # doctest: +SKIP

Every treatment trains its own `models` on the same complementary halves, so that each sample is in exactly half of them,
and each model in turn is the target of an attacker who trained the others with the same treatment. Who is at risk is
scored by ONE cheap run on everybody (loss in the first epochs). Results are small: numbers for each model, and where they
come from; they can be kept, shared and shown without the models. Source: Luo & Li, arXiv 2412.05767, and their public code.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from demem_lab import data, farm, queries, risk, training
from demem_lab.attacks import PGD, margin
from demem_lab.data import Dataset
from demem_lab.leakage import Interval, evaluate, seed_interval
from demem_lab.mechanisms import DPSGD, Drop, LossVariance, Mechanism, Plain, SelectiveDP
from demem_lab.membership import lira, rmia
from demem_lab.models import MLP, ResNet18, SmallCNN, Spec
from demem_lab.objectives import AWP, PGDAT, TRADES, Natural, Objective
from demem_lab.optimizers import SGD, HalfFlat, Schedule, StepDecay
from demem_lab.remedies import GradedRelease, release_schedule
from demem_lab.sampling import Poisson, Shuffled
from demem_lab.signals import confidence, logit_margin
from demem_lab.store import Store
from demem_lab.streams import key, model_seeds
from demem_lab.training import Ensemble, Recipe
from demem_lab.validate import choice, finite, integer

MODULES = (*training.MODULES, "queries", "protocol")
ARCHITECTURES: dict[str, Spec] = {"mlp": MLP(), "cnn": SmallCNN(), "resnet18": ResNet18()}
OBJECTIVES = ("natural", "pgd-at", "trades", "awp", "trades-awp")
FPRS = (0.1, 0.05, 0.02, 0.01, 0.001)


@dataclass(frozen=True)
class Protocol:
    """Everything that decides a run. The defaults are the authors' (CIFAR-10, ResNet-18, 128 models), with GroupNorm."""

    dataset: str = "cifar10"
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
    weight_decay: float = 5e-4
    noise_multiplier: float = 1.0
    max_grad_norm: float = 1.0
    dp_lr: float = 0.1  # of DP for everybody, chosen on models that are not reported
    fraction: float = 0.1  # share of the samples that are treated
    scoring_epochs: int = 5
    delta: float = 1e-5
    seed: int = 0

    def __post_init__(self) -> None:
        choice("model", self.model, ARCHITECTURES)
        choice("objective", self.objective, OBJECTIVES)
        integer("models", self.models, low=4, fix="leave-one-out attacks need references on both sides")
        if self.models % 2:
            raise ValueError(f"models must be even, because members come in complementary halves, got {self.models}")
        finite("fraction", self.fraction, low=0, high=1)
        finite("decay_at", self.decay_at, low=0, high=1)

    def load(self, root: str | Path | None = None, *, download: bool = False) -> Dataset:
        """The images; `root` as in data.load."""
        return data.load(self.dataset, root=root, download=download, subset=self.subset or None)

    @property
    def query(self) -> PGD:
        """The attack whose images the models are asked about."""
        return PGD(self.eps, self.query_steps, self.query_step, random_start=False)

    def recipe(self, mechanism: Mechanism | None = None, *, lr: float | tuple[float, ...] | None = None) -> Recipe:
        """How a model is trained under a treatment."""
        schedule: Schedule = StepDecay((self.decay_at,)) if self.decay_at else HalfFlat()
        return Recipe(
            model=ARCHITECTURES[self.model], objective=self._objective(), mechanism=mechanism or Plain(),
            optimizer=SGD(lr=self.lr if lr is None else lr, weight_decay=self.weight_decay),
            sampler=Poisson(self.batch_size), schedule=schedule, epochs=self.epochs,
        )

    def _objective(self) -> Objective:
        attack = PGD(self.eps, self.attack_steps, self.attack_step)
        inner = {"natural": Natural(), "pgd-at": PGDAT(attack), "awp": PGDAT(attack)}.get(self.objective) or TRADES(attack)
        return AWP(inner) if self.objective.endswith("awp") else inner


@dataclass(frozen=True)
class Arm:
    """A treatment: how it makes a mechanism of the risk score [N], and the learning rate where it is not the plain one."""

    mechanism: Callable[[Protocol, np.ndarray], Mechanism]
    rate: Callable[[Protocol], float] = lambda protocol: protocol.lr


def _top(p: Protocol, score: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(risk.protected_set(score, fraction=p.fraction).mask)


ARMS: dict[str, Arm] = {
    "none": Arm(lambda p, s: Plain()),
    "LossVariance 0.2": Arm(lambda p, s: LossVariance(0.2)),
    "SelectiveDP": Arm(lambda p, s: SelectiveDP(p.noise_multiplier, p.max_grad_norm, _top(p, s))),
    "DP for everybody": Arm(lambda p, s: DPSGD(p.noise_multiplier, p.max_grad_norm), lambda p: p.dp_lr),
    "drop": Arm(lambda p, s: Drop(_top(p, s))),
    "graded release": Arm(lambda p, s: GradedRelease(release_schedule(s))),
    "LossVariance 0.6": Arm(lambda p, s: LossVariance(0.6)),
}


@dataclass(frozen=True)
class Results:
    """What was measured, a value for each model, and where it came from; a small JSON file."""

    protocol: dict
    arms: dict[str, dict[str, list[float]]]  # arm -> metric -> one value a model
    guarantees: dict[str, str]
    provenance: dict

    def interval(self, arm: str, metric: str) -> Interval:
        """Mean over the models as targets, with the 95 % t-interval. They share data, so it is on the narrow side."""
        return seed_interval(self.arms[arm][metric])

    def to_frame(self, metrics: Sequence[str] = ()) -> pd.DataFrame:
        """One row an arm: mean and half width of the interval of each metric, in per cent; and what is promised."""
        metrics = metrics or list(next(iter(self.arms.values())))
        rows = {}
        for arm, values in self.arms.items():
            cells = {}
            for metric in metrics:
                if metric in values:
                    i = self.interval(arm, metric)
                    cells[metric] = f"{100 * i.mean:.1f} ± {100 * (i.high - i.mean):.1f}"
                else:
                    cells[metric] = "not resolved"
            rows[arm] = {**cells, "guarantee": self.guarantees[arm]}
        return pd.DataFrame.from_dict(rows, orient="index")

    def save(self, path: str | Path) -> Path:
        """Write the file (replaced in one move, so that a killed run leaves the old one)."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".part")
        fresh.write_text(json.dumps(asdict(self), indent=1) + "\n")
        os.replace(fresh, path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read a file that `save` wrote. ValueError when it is something else."""
        try:
            raw = json.loads(Path(path).read_text())
            return cls(**{f.name: raw[f.name] for f in fields(cls)})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a results file of this package ({error!r}); write one with Results.save") from None


def run(
    protocol: Protocol, *, arms: Sequence[str] = tuple(ARMS), store: Store | None = None, root: str | Path | None = None,
    download: bool = False, device: str = "auto", progress: bool = True, save: str | Path | None = None,
) -> Results:
    """Train and measure every arm; what is in the store is not computed again. `save`: written anew after each arm."""
    for name in arms:
        choice("arm", name, ARMS)
    store, dataset = store or Store(), protocol.load(root, download=download)
    began, seconds = time.time(), 0.0
    score = risk_score(protocol, dataset, store=store, device=device, progress=progress)
    members = data.member_masks(dataset.n, protocol.models, seed=key(protocol.seed, "members") % 2**31)
    seeds = model_seeds(protocol.seed, protocol.models)
    top = risk.protected_set(score, fraction=protocol.fraction).mask
    measured, promised, done = {}, {}, None
    for name in arms:
        arm = ARMS[name]
        recipe = protocol.recipe(arm.mechanism(protocol, score), lr=arm.rate(protocol))
        tables, text, took = _tables(protocol, dataset, members, seeds, recipe, name, store, device, progress)
        measured[name] = measure(tables, dataset.y.numpy(), members.numpy(), at_risk=top)
        promised[name], seconds = text, seconds + took
        done = Results(
            {**asdict(protocol), "images": dataset.n}, measured, promised, _provenance(device, seconds, began),
        )
        if save is not None:
            done.save(save)
    return done


def risk_score(
    protocol: Protocol, dataset: Dataset, *, store: Store, device: str = "auto", progress: bool = False
) -> np.ndarray:
    """[N] mean adversarial loss of each sample in the first epochs of ONE plain run that trains on everybody."""
    epochs = protocol.scoring_epochs
    everybody = torch.ones(1, dataset.n, dtype=torch.bool)
    # shuffled, so that every epoch sees (almost) everybody; nothing is promised to anybody here
    recipe = replace(protocol.recipe(), sampler=Shuffled(protocol.batch_size), epochs=epochs)
    scored = training.train(
        dataset, everybody, recipe, seeds=(key(protocol.seed, "scoring"),), store=store, trace=True, device=device,
        progress=progress, label="risk score",
    )
    return risk.early_loss(scored.trace, epochs=epochs)


def tune(
    protocol: Protocol, name: str, rates: Sequence[float], *, models: int = 2, store: Store | None = None,
    root: str | Path | None = None, device: str = "auto", progress: bool = True,
) -> dict[float, float]:
    """Robust accuracy of non-members under each learning rate, on models of another seed that no result reports."""
    store, dataset = store or Store(), protocol.load(root)
    other = replace(protocol, seed=protocol.seed + 1_000)
    score = risk_score(other, dataset, store=store, device=device, progress=progress)
    members = data.member_masks(dataset.n, models, seed=key(other.seed, "members") % 2**31)
    found = {}
    for rate in rates:
        recipe = other.recipe(ARMS[name].mechanism(other, score), lr=rate)
        seeds = model_seeds(other.seed, models)
        tables, _, _ = _tables(other, dataset, members, seeds, recipe, f"{name}, lr {rate:g}", store, device, progress)
        found[rate] = float(tables["robust"][~members.numpy()].mean())
    return found


def measure(
    tables: dict[str, np.ndarray], y: np.ndarray, members: np.ndarray, *, at_risk: np.ndarray
) -> dict[str, list[float]]:
    """Metric -> one value a model, from the logits [M, N, K] on clean and adversarial images and robust [M, N].

    "found ..." is the true positive rate at that false positive rate, the larger of clean and adversarial queries in the
    mean over models; rates that the non-members cannot resolve are left out. Attacks: LiRA with pooled variances, RMIA.
    """
    clean = tables["clean"].argmax(-1) == y
    out = {}
    for prefix, who in (("", ~members), ("member ", members)):
        for label, ok in (("clean accuracy", clean), ("robust accuracy", tables["robust"])):
            out[prefix + label] = [float(o[w].mean()) for o, w in zip(ok, who, strict=True)]
    at_risk_members = zip(tables["robust"], members & at_risk, strict=True)
    out["member robust accuracy, at risk"] = [float(o[w].mean()) for o, w in at_risk_members]
    scores = {}
    for query in ("clean", "adversarial"):
        scores["LiRA", query] = lira(logit_margin(tables[query], y), members, variance="pooled")
        scores["RMIA", query] = rmia(confidence(tables[query], y), members)
    fine = [f for f in FPRS if f * (~members).sum(1).min() >= 5]
    for attack in ("LiRA", "RMIA"):
        for group, inside in (("", None), (", at risk", at_risk), (", rest", ~at_risk)):
            seen = [evaluate(scores[attack, q], members, fprs=fine, subset=inside) for q in ("clean", "adversarial")]
            for column, fpr in enumerate(fine):
                stronger = max(seen, key=lambda s, c=column: s.tpr[:, c].mean())
                out[f"{attack}: found at {100 * fpr:g} %{group}"] = stronger.tpr[:, column].tolist()
            out[f"{attack}: AUC{group}"] = max(seen, key=lambda s: s.auc.mean()).auc.tolist()
    return out


def _tables(protocol, dataset, members, seeds, recipe: Recipe, name: str, store: Store, device: str, progress: bool):
    """(tables, guarantee in words, seconds it took when it was computed) of one arm, through the store."""
    on = farm.device(device)
    config = {
        "data": dataset.fingerprint, "recipe": recipe, "members": members, "seeds": tuple(seeds), "query": protocol.query,
        "device": on.type, "delta": protocol.delta,
    }

    def compute():
        ensemble = training.train(
            dataset, members, recipe, seeds=seeds, store=store, device=device, progress=progress, label=name,
        )
        meta = {"guarantee": str(ensemble.guarantee(delta=protocol.delta))}
        return _query(ensemble, dataset, protocol.query, device), meta

    entry = store.compute("protocol", config, compute, modules=MODULES)
    return entry.arrays, entry.meta["guarantee"], entry.meta["seconds"]


def _query(ensemble: Ensemble, dataset: Dataset, attack: PGD, device: str) -> dict[str, np.ndarray]:
    y = dataset.y.numpy()
    clean = queries.outputs(ensemble, dataset, device=device)
    moved = queries.outputs(ensemble, dataset, attack=attack, device=device)
    robust = (clean.argmax(-1) == y) & (moved.argmax(-1) == y)
    # a saturated softmax blinds cross-entropy, the margin sees: robust is what withstands both
    seeing = queries.outputs(ensemble, dataset, attack=attack, loss=margin, device=device, only=robust)
    return {"clean": clean, "adversarial": moved, "robust": robust & (seeing.argmax(-1) == y)}


def _provenance(device: str, seconds: float, began: float) -> dict:
    on = farm.device(device)
    card = torch.cuda.get_device_name(on) if on.type == "cuda" else platform.processor() or platform.machine()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime(began)), "commit": commit or "unknown", "torch": torch.__version__,
        "numpy": np.__version__, "python": platform.python_version(), "device": on.type, "processor": card,
        "cores": farm.workers("cpu"), "seconds of training and queries": round(seconds, 1),
    }
