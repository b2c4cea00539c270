"""What a run of the protocol found: a value for each model, small enough to keep, share and show without the models.

>>> results = kept()["cifar10_small_cnn"]                                                        # doctest: +SKIP
>>> results.interval("drop", "RMIA: found at 1 %", "at risk")                                    # doctest: +SKIP
>>> results.interval("drop", "found at 1 %", "at risk")          # by whichever attack finds more  # doctest: +SKIP
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd

from demem_lab.leakage import MIN_FALSE_POSITIVES, Interval, evaluate, seed_interval
from demem_lab.membership import lira, rmia
from demem_lab.signals import confidence, logit_margin

FPRS = (0.1, 0.05, 0.02, 0.01, 0.001)
ATTACKS = ("LiRA", "RMIA")


@dataclass(frozen=True)
class Results:
    """What was measured, a value for each model, and where it came from; a small JSON file."""

    protocol: dict
    arms: dict[str, dict[str, list[float]]]  # arm -> metric -> one value a model
    guarantees: dict[str, str]
    provenance: dict

    @property
    def rate(self) -> str:
        """The false positive rate to look at, as metrics spell it: 1 %, or the finest that the non-members resolve.

        ValueError where they resolve none.
        """
        named = [m.removeprefix("LiRA: found at ") for m in next(iter(self.arms.values())) if m.startswith("LiRA: found at ")]
        resolved = [rate for rate in named if "," not in rate]
        if not resolved:
            raise ValueError(f"no rate gives {MIN_FALSE_POSITIVES} false positives or more; take more images")
        return "1 %" if "1 %" in resolved else resolved[-1]

    def stronger(self, arm: str, rate: str, group: str = "all") -> str:
        """The attack that finds more of a group's members `beyond` the accused, in the mean over models: "LiRA" or "RMIA"."""
        return max(ATTACKS, key=lambda attack: np.mean(self.beyond(arm, attack, rate, group)))

    def values(self, arm: str, metric: str, group: str = "all") -> list[float]:
        """One number a model. "found at ...", "accused at ..." and "beyond at ..." without an attack's name are those of the
        `stronger` one.

        group: "all", "at risk" or "rest". KeyError for a metric that was not measured.
        """
        kind, _, rate = metric.partition(" at ")
        if kind in ("found", "accused", "beyond"):
            rate, _, named = rate.partition(", ")
            attack, group = self.stronger(arm, rate, named or group), named or group
            if kind == "beyond":
                return self.beyond(arm, attack, rate, group)
            metric = f"{attack}: {kind} at {rate}"
        return self.arms[arm][_named(metric, group)]

    def beyond(self, arm: str, attack: str, rate: str, group: str = "all") -> list[float]:
        """Members found minus NON-members accused in the same group, one number a model.

        There is one threshold for everybody, and hard images scatter: only what is found beyond that gives membership away.
        """
        found = self.arms[arm][_named(f"{attack}: found at {rate}", group)]
        accused = self.arms[arm].get(_named(f"{attack}: accused at {rate}", group))
        if accused is None and group == "all":  # a file of an older version, which took the rate itself: a little less
            accused = [float(rate.removesuffix(" %")) / 100] * len(found)
        elif accused is None:
            raise KeyError(f"nobody is accused at {rate} in group {group!r} of arm {arm!r}: it was not measured")
        return [f - a for f, a in zip(found, accused, strict=True)]

    def interval(self, arm: str, metric: str, group: str = "all") -> Interval:
        """Mean of `values` over the models as targets, with the 95 % t-interval.

        They share data, and where no attack is named it is the better of two: the interval is on the narrow side.
        """
        return seed_interval(self.values(arm, metric, group))

    def to_frame(self, metrics: Sequence[str] = ()) -> pd.DataFrame:
        """One row an arm: mean and half width of the interval of each metric, in per cent; and what is promised."""
        metrics = metrics or list(next(iter(self.arms.values())))
        rows = {}
        for arm in self.arms:
            cells = {}
            for metric in metrics:
                try:
                    i = self.interval(arm, metric)
                except KeyError:
                    cells[metric] = "not resolved"
                else:
                    cells[metric] = f"{100 * i.mean:.1f} ± {100 * (i.high - i.mean):.1f}"
            rows[arm] = {**cells, "guarantee": self.guarantees[arm]}
        return pd.DataFrame.from_dict(rows, orient="index")

    def save(self, path: str | Path) -> Path:
        """Write the file (replaced in one move, so that a killed run leaves the old one)."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.{os.getpid()}.part")  # two runs may write the same file
        fresh.write_text(json.dumps(asdict(self), indent=1) + "\n")
        os.replace(fresh, path)
        return path

    def beside(self, older: Results | None, order: Sequence[str]) -> Results:
        """With the arms of an older file that are not measured anew yet, in that order; the provenance names them."""
        rest = [] if older is None else [name for name in order if name in older.arms and name not in self.arms]
        if not rest:
            return self
        arms, promised = {**older.arms, **self.arms}, {**older.guarantees, **self.guarantees}
        order = [name for name in order if name in arms]
        kept = {"arms": rest, **{what: older.provenance.get(what) for what in ("date", "commit")}}
        return replace(
            self, arms={name: arms[name] for name in order}, guarantees={name: promised[name] for name in order},
            provenance={**self.provenance, "kept from before": kept},
        )

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read a file that `save` wrote. ValueError when it is something else."""
        try:
            raw = json.loads(Path(path).read_text())
            found = cls(**{f.name: raw[f.name] for f in fields(cls)})
            values = [v for arm in found.arms.values() for column in arm.values() for v in column]
            if not found.arms or not all(found.arms.values()):
                raise TypeError("it holds no arms, or one without measures")
            if not all(isinstance(v, (int, float)) for v in values) or set(found.arms) != set(found.guarantees):
                raise TypeError("an arm lacks numbers or its guarantee")
            if not isinstance(found.protocol, dict) or not isinstance(found.provenance, dict):
                raise TypeError("the protocol or the provenance is missing")
            return found
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # bytes that are no text are a ValueError, too
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} is not a results file of this package ({why}); write one with Results.save") from None


def _named(metric: str, group: str) -> str:
    return metric if group == "all" else f"{metric}, {group}"


def kept() -> dict[str, Results]:
    """The results that come with the package, by name: runs that took hours, to be shown without repeating them."""
    return {file.stem: Results.load(file) for file in sorted((Path(__file__).parent / "kept").glob("*.json"))}


def there_already(path: str | Path, protocol: dict, arms: Sequence[str]) -> Results | None:
    """What a file holds that a run of these arms is to be written to; None where there is no file.

    ValueError where it is something else, the result of another protocol, or has arms that the run would not measure.
    """
    if not Path(path).exists():
        return None
    older = Results.load(path)
    differ = [name for name in {**older.protocol, **protocol} if older.protocol.get(name) != protocol.get(name)]
    if differ:
        was, is_ = (", ".join(f"{name} {p.get(name, 'unsaid')}" for name in differ[:4]) for p in (older.protocol, protocol))
        raise ValueError(f"{path} holds a run with {was}, and this one has {is_}; save elsewhere")
    lost = [name for name in older.arms if name not in arms]
    if lost:
        raise ValueError(f"{path} holds {', '.join(lost)}, which this run would drop; add them to arms, or save elsewhere")
    return older


def check_measurable(members: np.ndarray, at_risk: np.ndarray, *, setting: str) -> None:
    """ValueError unless `measure` can compare the treated with the others: each model has members and non-members of both."""
    for group, inside in (("treated", at_risk), ("others", ~at_risk)):
        for side, who in (("members", members), ("non-members", ~members)):
            without = np.flatnonzero(~(who & inside).any(1))
            if len(without):
                raise ValueError(
                    f"{setting} treats {int(at_risk.sum())} of {len(at_risk)} images, so that model {without[0]} has no {side} "
                    f"among the {group}, and nothing can be measured there; change it, or take more images"
                )


def measure(
    tables: dict[str, np.ndarray], y: np.ndarray, members: np.ndarray, *, at_risk: np.ndarray
) -> dict[str, list[float]]:
    """Metric -> one value a model, from the logits [M, N, K] on clean and adversarial images and robust [M, N].

    "found ..." is the true positive rate at that false positive rate; rates that the non-members cannot resolve are left out.
    "accused ..." is the share of a group's own non-members beyond the same threshold, which is one for all groups: only what
    is found beyond it is given away by membership, the rest by being hard. Of clean and adversarial queries, the one that
    finds more beyond the accused, in the mean over models. Attacks: LiRA with pooled variances, RMIA.
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
    fine = [f for f in FPRS if f * (~members).sum(1).min() >= MIN_FALSE_POSITIVES]
    for attack in ATTACKS:
        for group, inside in (("", None), (", at risk", at_risk), (", rest", ~at_risk)):
            seen = [evaluate(scores[attack, q], members, fprs=fine, subset=inside) for q in ("clean", "adversarial")]
            for column, fpr in enumerate(fine):
                stronger = max(seen, key=lambda s, c=column: (s.tpr - s.accused)[:, c].mean())
                out[f"{attack}: found at {100 * fpr:g} %{group}"] = stronger.tpr[:, column].tolist()
                out[f"{attack}: accused at {100 * fpr:g} %{group}"] = stronger.accused[:, column].tolist()
            out[f"{attack}: AUC{group}"] = max(seen, key=lambda s: s.auc.mean()).auc.tolist()
    return out


@dataclass(frozen=True)
class Published:
    """A published number and what it was measured on."""

    what: str
    robust: float | None  # robust accuracy, per cent
    found: float | None  # TPR at 0.1 % FPR, per cent
    source: str


_DEMEM = "Luo & Li, public code and arrays: ResNet-18, half of CIFAR-100 (30,000 images), 128 models"
_LI = "Li, Li, Hu & Hu, TIFS 2024, arXiv 2208.08270, the same pipeline on CIFAR-10"
PUBLISHED = (
    Published("CIFAR-10, natural", None, 8.2, _LI),
    Published("CIFAR-10, PGD-AT, eps 8/255", None, 23.8, _LI),
    Published("CIFAR-10, TRADES, eps 8/255", None, 17.9, _LI),
    Published("CIFAR-100, PGD-AT, eps 1/255", 52.2, 43.6, _DEMEM),
    Published("CIFAR-100, PGD-AT, eps 1/255, + LossVariance 0.2", 50.7, 36.1, _DEMEM),
    Published("CIFAR-100, PGD-AT, eps 8/255", 15.8, 67.2, _DEMEM),
    Published("CIFAR-100, PGD-AT, eps 8/255, + LossVariance 0.2", 15.6, 64.7, _DEMEM),
    Published("CIFAR-100, PGD-AT, eps 8/255, + LossVariance 0.6", 13.6, 55.2, _DEMEM),
    Published("CIFAR-100, TRADES, eps 8/255, + LossVariance 0.2", 17.0, 49.7, _DEMEM),
)
