"""Which setting? The plane noise multiplier x risk threshold as one batch, layer upon layer, and a recommendation.

>>> plane = sweep(lab, noise_multipliers=(0, 1, 3), fractions=(0.05, 0.2, 1.0), seed=0)          # doctest: +SKIP
>>> plane.nearest(noise_multiplier=0.9, risk_threshold=0.3)["leak"]                             # doctest: +SKIP

Every point has the same members and the same seeds, so neighbouring points differ by their settings alone; `train_point`
adds one. `recommend` picks a point there and judges it on other seeds; `onion` protects whoever surfaces until nobody leaks
more than a target.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from demem_lab import risk
from demem_lab.comparison import compare, finest_fpr, measure
from demem_lab.experiment import Experiment
from demem_lab.leakage import Interval, seed_interval
from demem_lab.mechanisms import DPSGD, SelectiveDP
from demem_lab.signals import confidence
from demem_lab.streams import model_seeds
from demem_lab.tables import Run
from demem_lab.validate import finite, integer

COLUMNS = {  # column of the plane <- (group, metric)
    "accuracy": ("all", "accuracy"), "robust": ("all", "robust"), "leak": ("all", "leak"), "auc": ("all", "auc"),
    "leak, high risk": ("high risk", "leak"), "leak, rest": ("rest", "leak"),
    "accused": ("all", "accused"), "accused, high risk": ("high risk", "accused"), "accused, rest": ("rest", "accused"),
    "robust, high risk": ("high risk", "member robust"), "robust, rest": ("rest", "member robust"),
}


@dataclass(frozen=True)
class Plane:
    """Trained points; one row each in `points`, measured on one seed. Column "added": not part of the first sweep."""

    points: pd.DataFrame
    scores: np.ndarray  # float [N] the risk score that the thresholds cut
    after: np.ndarray  # float [points, N] the same score under each point's training, from that point's own few models
    seed: int
    models: int
    fpr: float

    def nearest(self, *, noise_multiplier: float, risk_threshold: float) -> pd.Series:
        """The trained point nearest to a position of the sliders; nothing is interpolated.

        Nearest threshold first (in number of protected samples, the scale that training sees), then nearest noise; a point
        added later takes its place where it is at least as near in both.
        """
        finite("noise_multiplier", noise_multiplier, low=0)
        if np.isnan(risk_threshold):
            raise ValueError("risk_threshold must not be NaN; use inf to protect nobody and -inf to protect everybody")
        wanted = int((self.scores >= risk_threshold).sum())
        p = self.points
        people, noise = (p["protected"] - wanted).abs(), (p["noise_multiplier"] - noise_multiplier).abs()
        swept = ~p["added"]
        column = people[swept].min()
        best = noise[swept & (p["protected"] == p["protected"][people[swept].idxmin()])].idxmin()
        nearer = p["added"] & (people <= column) & (noise <= noise[best])
        if nearer.any():
            best = (people + noise)[nearer].idxmin()
        return p.loc[best]

    def surfaced(self, point: pd.Series, count: int) -> np.ndarray:
        """The next layer: int [count], the unprotected samples with the highest score after training at `point`."""
        protected = risk.protected_set(self.scores, fraction=point["protected"] / len(self.scores)).mask
        order = np.argsort(-np.where(protected, -np.inf, self.after[point.name]), kind="stable")
        return order[: min(count, int((~protected).sum()))]

    def to_frame(self) -> pd.DataFrame:
        """The points as a table."""
        return self.points.copy()


def sweep(
    lab: Experiment, *, noise_multipliers: Sequence[float], fractions: Sequence[float], seed: int,
    max_grad_norm: float = 1.0, models: int | None = None, lr_everybody: Callable[[float], float] | None = None,
    high_risk: float = 0.1,
) -> Plane:
    """Train SelectiveDP at every pair of noise multiplier and protected fraction (0: nobody, 1: everybody).

    lr_everybody: noise multiplier -> the learning rate tuned for DP-SGD, used where everybody is protected. high_risk: the
    fraction of samples called "high risk" in the columns, the same at every point. Nobody is trained once, without noise.
    ValueError for lists that are empty, repeat or hold something else, before anything is trained.
    """
    for name, values in (("noise_multipliers", noise_multipliers), ("fractions", fractions)):
        if isinstance(values, (str, bytes)) or not isinstance(values, Iterable) or not len(values := tuple(values)):
            raise ValueError(f"{name} must be a list of at least one number, such as (0.5, 1.0), got {values!r}")
        for value in values:
            finite("a noise multiplier" if name[0] == "n" else "a fraction", value, low=0, high=None if name[0] == "n" else 1)
    models = lab.tuning_models if models is None else integer("models", models, low=2)
    score = lab.risk(seed).score
    pairs = [(0.0, f) for f in fractions if f == 0]
    pairs += list(itertools.product([float(s) for s in noise_multipliers], [f for f in fractions if f > 0]))
    if len(set(pairs)) != len(pairs):
        raise ValueError(f"noise multipliers and fractions must not repeat, got {noise_multipliers} and {fractions}")
    sets = {f: risk.protected_set(score, fraction=f) for f in fractions}
    points = [
        _Point(s, f, sets[f], lr_everybody(s) if lr_everybody and f == 1 else lab.lr) for s, f in pairs
    ]
    return _trained(lab, points, score, seed=seed, models=models, max_grad_norm=max_grad_norm, high_risk=high_risk)


def train_point(
    lab: Experiment, plane: Plane, *, noise_multiplier: float, risk_threshold: float, max_grad_norm: float = 1.0,
    tuned: bool = True, high_risk: float = 0.1,
) -> Plane:
    """`plane` with one more row: exactly this position, with the plane's members and seeds. Kept in the store.

    tuned: where everybody is protected, tune DP-SGD's learning rate first, as the plane's points had it tuned. Where nobody
    is, no noise is added. A position that the plane has already gives the same plane. `lab.watch` may follow and stop it.
    """
    sigma = finite("noise_multiplier", noise_multiplier, low=0)
    chosen = risk.protected_set(plane.scores, risk_threshold=risk_threshold)
    count, n = int(chosen.mask.sum()), len(plane.scores)
    sigma = sigma if count else 0.0
    p = plane.points
    if ((p["protected"] == count) & (p["noise_multiplier"] == sigma)).any():
        return plane
    rate = lab.rate_for_everybody(sigma) if tuned and count == n else lab.lr
    new = _trained(
        lab, [_Point(sigma, count / n, chosen, rate)], plane.scores, seed=plane.seed, models=plane.models,
        max_grad_norm=max_grad_norm, high_risk=high_risk, added=True,
    )
    rows = pd.concat([p, new.points], ignore_index=True)
    return replace(plane, points=rows, after=np.concatenate([plane.after, new.after]))


@dataclass(frozen=True)
class _Point:
    noise_multiplier: float
    fraction: float
    who: risk.ProtectedSet
    lr: float


def _trained(
    lab: Experiment, points: Sequence[_Point], score: np.ndarray, *, seed: int, models: int, max_grad_norm: float,
    high_risk: float, added: bool = False,
) -> Plane:
    sigmas = tuple(p.noise_multiplier for p in points for _ in range(models))
    protected = torch.stack([torch.as_tensor(p.who.mask) for p in points for _ in range(models)])
    rates = tuple(p.lr for p in points for _ in range(models))
    recipe = lab.recipe(mechanism=SelectiveDP(sigmas, max_grad_norm, protected), lr=rates)
    members = lab.members(seed, models)
    run = lab.tables(
        "plane", recipe, members.repeat(len(points), 1), model_seeds(seed, models) * len(points), seed=seed
    )
    top = risk.protected_set(score, fraction=high_risk).mask
    fpr = finest_fpr(int((~members).sum(1).min()))
    rows, after = [], []
    for number, point in enumerate(points):
        part = run.part(slice(number * models, (number + 1) * models))
        found = measure(part, {"high risk": top, "rest": ~top}, fpr=fpr)
        # everybody by a fraction of 1 is a set that no data had a say in; by a threshold (`added`) they had
        fixed = point.fraction == 1 and not added
        promised = replace(part.guarantee, selection="fixed" if fixed else "from_data")
        rows.append({
            "noise_multiplier": point.noise_multiplier, "fraction": point.fraction,
            "risk_threshold": point.who.risk_threshold, "protected": int(point.who.mask.sum()), "lr": point.lr,
            **{name: found.get(place) for name, place in COLUMNS.items()},
            "epsilon": promised.budget.epsilon if promised.holds else None, "guarantee": str(promised), "added": added,
        })
        after.append(risk.memorization(confidence(part.adversarial, part.y), part.members).score)
    return Plane(pd.DataFrame(rows), score, np.stack(after), seed, models, fpr)


@dataclass(frozen=True)
class Recommendation:
    """The least costly trained point that meets a leakage target, and how it did on seeds that had no say in choosing it."""

    target: float
    fpr: float
    point: dict | None  # of the plane; None when no point of it meets the target
    judged: dict[str, Interval]  # group -> found beyond the accused on the held-out seeds; high is the one-sided 95 % limit
    cost: Interval | None  # robust accuracy lost to plain training, on the held-out seeds
    holds: bool

    def __str__(self) -> str:
        goal = (
            f"no group of which, at {100 * self.fpr:g} % false positives, more than {self.target:.1%} of the members are found "
            "beyond its accused non-members"
        )
        if self.point is None:
            return f"None of the settings tried reaches the target ({goal})."
        p = self.point
        worst = max(self.judged, key=lambda g: self.judged[g].high)
        found = self.judged[worst]
        verdict = "It holds" if self.holds else "So no setting is recommended: it does not hold with confidence"
        return (
            f"Least costly on the plane: noise multiplier {p['noise_multiplier']:g}, {p['protected']} samples protected "
            f"(risk threshold {p['risk_threshold']:.3g}), for {goal}. {verdict} on {found.n} held-out seeds: the worst group, "
            f"{worst}, has {found.mean:.1%} found beyond the accused, upper 95 % limit {found.high:.1%}; "
            f"robust accuracy lost {100 * self.cost.mean:.1f} points. {p['guarantee']}"
        )


def recommend(
    lab: Experiment, plane: Plane, target: float, *, lr_everybody: Callable[[float], float] | None = None,
    max_grad_norm: float = 1.0, high_risk: float = 0.1,
) -> Recommendation:
    """The setting with the highest robust accuracy on `plane` whose every group leaks at most `target`, judged elsewhere.

    Groups: all, high risk, rest. ONE setting is chosen, on the plane's seed; it is then trained at all seeds of `lab`, and
    only those other than the plane's judge it, so nothing was picked by what judges. It holds when each group's one-sided
    95 % limit over those seeds is at most `target` (all must pass, so no correction is needed). A group's leak is the share
    of its members found beyond that of its non-members accused: the threshold finds hard samples more often, members or not,
    and no treatment lowers that.
    """
    finite("target", target, low=0, high=1)
    held_out = [seed for seed in lab.seeds if seed != plane.seed]
    if len(held_out) < 2:
        raise ValueError(f"judging takes at least 2 seeds beside the plane's ({plane.seed}), got {held_out}; use more seeds")
    p = plane.points
    beyond = [p["leak" + group].astype(float) - p["accused" + group].astype(float) for group in ("", ", high risk", ", rest")]
    passing = p[np.all([leak <= target for leak in beyond], axis=0)]
    if not len(passing):
        return Recommendation(target, plane.fpr, None, {}, None, False)
    point = passing.loc[passing["robust"].astype(float).idxmax()].to_dict()
    sigma, fraction = point["noise_multiplier"], point["fraction"]
    if fraction == 0:
        runs = lab.arm("none")
    elif fraction == 1:
        rate = lr_everybody(sigma) if lr_everybody else lab.lr
        runs = lab.arm(f"DP for everybody, noise {sigma:g}", mechanism=DPSGD(sigma, max_grad_norm), lr=rate)
    else:
        runs = lab.treat(
            f"SelectiveDP, noise {sigma:g}, {fraction:.0%}", lambda who: SelectiveDP(sigma, max_grad_norm, who), fraction=fraction
        )

    def groups(seed: int) -> dict[str, np.ndarray]:
        top = lab.flags(seed, high_risk).numpy()
        return {"high risk": top, "rest": ~top}

    judging = [run for run in runs if run.seed in held_out]
    report = compare(judging, groups=groups, fpr=plane.fpr)
    judged = {}
    for group in ("all", "high risk", "rest"):
        values = report.values(judging[0].name, "beyond", group)
        # level 0.9 two-sided is 0.95 one-sided
        judged[group] = seed_interval(values, level=0.9)
    plain = compare([run for run in lab.arm("none") if run.seed in held_out], fpr=plane.fpr)
    cost = seed_interval(plain.values("none", "robust") - report.values(judging[0].name, "robust"))
    return Recommendation(target, plane.fpr, point, judged, cost, all(i.high <= target for i in judged.values()))


@dataclass(frozen=True)
class Onion:
    """What happened as layer upon layer was protected."""

    steps: pd.DataFrame  # one row a step: layers, protected, the worst group, its leak beyond the accused, what is kept
    target: float
    reached: bool  # no group's mean leak over seeds is above the target
    runs: list[list[Run]]  # of each step, a run a seed

    def to_frame(self) -> pd.DataFrame:
        """The steps as a table."""
        return self.steps.copy()

    def __str__(self) -> str:
        first, last = self.steps.iloc[0], self.steps.iloc[-1]
        end = "no group leaks more" if self.reached else "and still some group leaks more"
        return (
            f"Target {self.target:.1%}: after {int(last['layers'])} layers ({last['protected']:.0f} samples protected) {end}; "
            f"the worst tenth went from {first['worst leak']:.1%} to {last['worst leak']:.1%}, robust accuracy from "
            f"{first['robust']:.1%} to {last['robust']:.1%}."
        )


def onion(
    lab: Experiment, *, target: float, noise_multiplier: float = 1.0, layer: float = 0.1, max_grad_norm: float = 1.0,
    max_layers: int | None = None,
) -> Onion:
    """Protect the riskiest `layer` of all samples, score the others again under that protection, protect those, and so on.

    Ends when no tenth by the NEW risk leaks more than `target` (mean over seeds), when everybody is protected, or after
    `max_layers`. Each seed's risk is scored from the other seeds' models of the same step. The learning rate stays that of
    plain training, also when everybody is protected. Leak as in `recommend`. Source: the privacy onion, Carlini et al. 2022
    (arXiv 2206.10469).
    """
    finite("target", target, low=0, high=1)
    finite("layer", layer, low=1 / lab.dataset.n, high=1)
    n, size = lab.dataset.n, round(layer * lab.dataset.n)
    limit = -(-n // size) if max_layers is None else integer("max_layers", max_layers, low=0)
    covered = {seed: torch.zeros(n, dtype=torch.bool) for seed in lab.seeds}
    runs, rows, history = lab.arm("none"), [], []
    for layers in range(limit + 1):
        history.append(runs)
        scores = {seed: lab.risk(seed, runs).score for seed in lab.seeds}
        tenths = {seed: risk.deciles(score) for seed, score in scores.items()}
        report = compare(runs, groups=lambda seed, t=tenths: {f"tenth {g + 1}": t[seed] == g for g in range(10)})
        name = runs[0].name
        leaks = {f"tenth {g}": report.interval(name, "beyond", f"tenth {g}") for g in range(1, 11)}
        worst = max(leaks, key=lambda group: leaks[group].mean)
        rows.append({
            "layers": layers, "protected": float(np.mean([int(c.sum()) for c in covered.values()])), "worst group": worst,
            "worst leak": leaks[worst].mean, "its upper limit": min(1.0, leaks[worst].high), "leak": report.mean(name, "leak"),
            "accuracy": report.mean(name, "accuracy"), "robust": report.mean(name, "robust"),
        })
        done = leaks[worst].mean <= target
        if done or layers == limit or all(bool(c.all()) for c in covered.values()):
            break
        for seed in lab.seeds:
            score = torch.as_tensor(scores[seed]).masked_fill(covered[seed], -torch.inf)
            surfaced = score.argsort(descending=True, stable=True)[: min(size, int((~covered[seed]).sum()))]
            covered[seed] = covered[seed].index_fill(0, surfaced, True)
        runs = lab.treat(
            f"{layers + 1} layers", lambda who: SelectiveDP(noise_multiplier, max_grad_norm, who),
            choose=lambda seed: covered[seed],
        )
    return Onion(pd.DataFrame(rows), target, done, history)
