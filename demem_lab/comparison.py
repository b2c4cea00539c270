"""Utility, robustness and leakage of trained arms, for everybody and by risk group, with intervals over seeds.

>>> report = compare([*lab.arm("none"), *lab.arm("DP", mechanism=DPSGD(1.0))], groups=groups)     # doctest: +SKIP
>>> report.interval("none", "leak", "high risk")                                                # doctest: +SKIP
Interval(mean=0.64, low=0.59, high=0.69, n=3)

The attacker knows the defence: the shadow models of an arm are the arm's other models. Robust models are asked about
clean and adversarial images; "leak" is the larger of the two true positive rates (in the mean over the models of a seed).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from demem_lab.leakage import MIN_FALSE_POSITIVES, Interval, evaluate, seed_interval
from demem_lab.tables import Run

Groups = Callable[[int], Mapping[str, np.ndarray]]  # seed -> {name: bool [N]}
METRICS = {
    "accuracy": "clean accuracy, non-members", "robust": "robust accuracy (PGD), non-members",
    "member accuracy": "clean accuracy, members", "member robust": "robust accuracy (PGD), members",
    "leak": "true positive rate of LiRA, by the one of clean and adversarial queries that finds more beyond the accused",
    "leak clean": "true positive rate of LiRA, clean queries", "leak adversarial": "the same, adversarial queries",
    "accused": "share of the non-members that the same threshold accuses, the query as for the leak",
    "beyond": "leak minus accused: what membership gives away, and not only being hard",
    "auc": "area under LiRA's ROC, the larger of clean and adversarial queries",
}


def finest_fpr(non_members: int, wanted: Sequence[float] = (0.001, 0.01, 0.02, 0.05, 0.1)) -> float:
    """The smallest of the `wanted` false positive rates that this many non-members can resolve.

    Resolve: at least 5 of them lie above the threshold. ValueError when even the largest cannot be.
    """
    fine = [f for f in sorted(wanted) if f * non_members >= MIN_FALSE_POSITIVES]
    if not fine:
        raise ValueError(
            f"{non_members} non-members cannot resolve a false positive rate of {max(wanted)}; "
            f"use at least {round(MIN_FALSE_POSITIVES / max(wanted))}"
        )
    return fine[0]


def measure(run: Run, groups: Mapping[str, np.ndarray] | None = None, *, fpr: float) -> dict[tuple[str, str], float]:
    """{(group, metric): value} of one run, averaged over its models; group "all" is always there.

    Thresholds are the one global threshold of each model, also for groups. A group without members or non-members in
    some model has no entry for the metrics concerned.
    """
    n = len(run.y)
    groups = {"all": np.ones(n, dtype=bool), **(groups or {})}
    members, out = run.members, {}
    for name, inside in groups.items():
        if len(inside) != n or not inside.any():
            raise ValueError(f"group {name!r} must be a bool array with one entry for each of the {n} samples and not empty")
        for kind, ok in run.right.items():
            label = {"clean": "accuracy", "robust": "robust"}[kind]
            for prefix, who in (("", ~members), ("member ", members)):
                if (who & inside).any():
                    out[name, prefix + label] = float(ok[who & inside].mean())
        if not (members & inside).any(1).all():
            continue
        subset = None if name == "all" else inside
        found = {q: evaluate(run.scores[q], members, fprs=(fpr,), subset=subset) for q in ("clean", "adversarial")}
        for query, leakage in found.items():
            rate = leakage.tpr_at(fpr)
            if rate is not None:
                out[name, f"leak {query}"] = rate
        if (name, "leak clean") in out:
            accused = {query: float(leakage.accused.mean()) for query, leakage in found.items()}  # NaN: nobody to accuse
            stronger = max(found, key=lambda query: out[name, f"leak {query}"] - np.nan_to_num(accused[query]))
            out[name, "leak"] = out[name, f"leak {stronger}"]
            if np.isfinite(accused[stronger]):
                out[name, "accused"] = accused[stronger]
        areas = [float(leakage.auc.mean()) for leakage in found.values()]
        if np.isfinite(areas).all():
            out[name, "auc"] = max(areas)
    return out


@dataclass(frozen=True)
class Comparison:
    """All measurements of all arms, one row each: arm, seed, group, metric, value."""

    rows: pd.DataFrame
    fpr: float
    guarantees: dict[str, str]  # arm -> in words

    @property
    def arms(self) -> list[str]:
        """Names in the order they were given."""
        return list(dict.fromkeys(self.rows["arm"]))

    def values(self, arm: str, metric: str, group: str = "all") -> np.ndarray:
        """One value a seed [S], in order of seeds; "beyond" is "leak" less "accused". KeyError names what there is.

        ValueError where a seed has one of these two and not the other.
        """
        return self.by_seed(arm, metric, group).to_numpy()

    def by_seed(self, arm: str, metric: str, group: str) -> pd.Series:
        """The same, indexed by seed."""
        if metric == "beyond":
            leak, accused = (self.by_seed(arm, part, group) for part in ("leak", "accused"))
            if list(leak.index) != list(accused.index):
                raise ValueError(
                    f"{arm!r} has 'leak' of group {group!r} at seeds {list(leak.index)}, 'accused' at {list(accused.index)}, "
                    "where all models have non-members in it; 'beyond' needs both, so take larger groups"
                )
            return leak - accused
        r = self.rows
        found = r[(r.arm == arm) & (r.metric == metric) & (r.group == group)].set_index("seed")["value"].sort_index()
        if not len(found):
            raise KeyError(
                f"no {metric!r} of group {group!r} for arm {arm!r}; arms: {self.arms}, "
                f"groups: {sorted(set(r.group))}, metrics: {sorted(set(r.metric))}"
            )
        return found

    def mean(self, arm: str, metric: str, group: str = "all") -> float:
        """Mean over seeds."""
        return float(self.values(arm, metric, group).mean())

    def interval(self, arm: str, metric: str, group: str = "all") -> Interval:
        """Mean and 95 % t-interval over seeds."""
        return seed_interval(self.values(arm, metric, group))

    def difference(self, arm: str, other: str, metric: str, group: str = "all") -> Interval:
        """`arm` minus `other`, paired by seed: both had the same members, so what the seeds share cancels."""
        a, b = self._paired(arm, other, metric, group)
        return seed_interval(a - b)

    def change(self, arm: str, other: str, metric: str, group: str = "all") -> Interval:
        """The same relative to `other`, as a fraction of it: -0.1 is a tenth less. ValueError where that is 0 at some seed."""
        a, b = self._paired(arm, other, metric, group)
        if not b.all():
            raise ValueError(f"{metric!r} of group {group!r} is 0 for {other!r} at some seed, and nothing is a fraction of that")
        return seed_interval((a - b) / b)

    def _paired(self, arm: str, other: str, metric: str, group: str) -> tuple[np.ndarray, np.ndarray]:
        a, b = self.by_seed(arm, metric, group), self.by_seed(other, metric, group)
        if list(a.index) != list(b.index):
            raise ValueError(
                f"{arm!r} has {metric!r} at seeds {list(a.index)}, {other!r} at {list(b.index)}; "
                "a difference needs the same seeds"
            )
        return a.to_numpy(), b.to_numpy()

    def to_frame(
        self, columns: Sequence[tuple[str, str]] = (("accuracy", "all"), ("robust", "all"), ("leak", "all")), *,
        arms: Sequence[str] | None = None, percent: bool = True,
    ) -> pd.DataFrame:
        """A readable table: one row an arm, "mean ± half width of the 95 % interval" in each (metric, group) column."""
        table = {}
        for arm in arms or self.arms:
            row = {}
            for metric, group in columns:
                label = metric if group == "all" else f"{metric}, {group}"
                row[label] = spell(self.interval(arm, metric, group), percent=percent)
            table[arm] = row
        return pd.DataFrame.from_dict(table, orient="index")


def compare(
    runs: Sequence[Run], *, groups: Groups | None = None, fpr: float | None = None
) -> Comparison:
    """Measure every run; runs of one arm (same name) at several seeds become its interval.

    groups: seed -> {name: bool [N]}, the risk groups of that seed. fpr: by default the finest that the smallest run's
    non-members resolve (of 0.1 %, 1 %, 2 %, 5 %, 10 %).
    """
    runs = list(runs)
    if not runs:
        raise ValueError("nothing to compare: give at least one run")
    twice = {(r.name, r.seed) for r in runs if sum((o.name, o.seed) == (r.name, r.seed) for o in runs) > 1}
    if twice:
        raise ValueError(f"arm and seed must name one run each, given twice: {sorted(twice)}")
    fpr = finest_fpr(min(int((~r.members).sum(1).min()) for r in runs)) if fpr is None else fpr
    rows, guarantees = [], {}
    for run in runs:
        found = measure(run, groups(run.seed) if groups else None, fpr=fpr)
        rows += [(run.name, run.seed, group, metric, value) for (group, metric), value in found.items()]
        guarantees[run.name] = str(run.guarantee)
    return Comparison(pd.DataFrame(rows, columns=["arm", "seed", "group", "metric", "value"]), fpr, guarantees)


def merge(*reports: Comparison) -> Comparison:
    """One report of several; ValueError unless they share the false positive rate and agree where they measured the same."""
    if len({r.fpr for r in reports}) != 1:
        raise ValueError(f"reports at different false positive rates cannot be merged: {[r.fpr for r in reports]}")
    rows, place = pd.concat([r.rows for r in reports]).drop_duplicates(), ["arm", "seed", "group", "metric"]
    twice = rows[rows.duplicated(place, keep=False)]
    if len(twice):
        arm, seed, group, metric = twice.iloc[0][place]
        both = " and ".join(f"{value:.4g}" for value in twice[(twice[place] == twice.iloc[0][place]).all(axis=1)]["value"])
        raise ValueError(
            f"the reports do not agree: {metric!r} of group {group!r} for arm {arm!r} at seed {seed} is {both}; give "
            "arms that were trained or grouped differently names of their own"
        )
    return Comparison(rows, reports[0].fpr, {arm: text for r in reports for arm, text in r.guarantees.items()})


def verdict(claim: str, difference: Interval) -> str:
    """What the seeds say about a claim that a positive difference would support, as one sentence with the numbers.

    "Holds" and "contradicted" need the whole 95 % interval on one side of 0; else it is "not decided".
    """
    if difference.low is None:
        return f"NOT DECIDED: {claim} ({100 * difference.mean:+z.1f} points, one seed gives no interval)"
    word = "HOLDS" if difference.low > 0 else "CONTRADICTED" if difference.high < 0 else "NOT DECIDED"
    return (
        f"{word}: {claim} ({100 * difference.mean:+z.1f} points, 95 % interval {100 * difference.low:+z.1f} to "
        f"{100 * difference.high:+z.1f}, {difference.n} seeds)"
    )


def spell(interval: Interval, *, percent: bool = True, digits: int = 1) -> str:
    """'64.2 ± 5.0' (per cent) for an interval; without '±' where one seed gives none."""
    factor = 100 if percent else 1
    text = f"{factor * interval.mean:.{digits}f}"
    return text if interval.low is None else f"{text} ± {factor * (interval.high - interval.mean):.{digits}f}"
