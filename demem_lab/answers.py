"""What the panels of notebooks 01 to 03 answer at one position of their controls: pure functions, nothing is shown here.

>>> path = attack_path(net, x[:1], y[:1], FGSM(0.1))                  # one image, step by step        # doctest: +SKIP
>>> scores = membership_scores(run.clean, run.y, run.members, signal="loss", attack="LiRA")            # doctest: +SKIP
>>> leak_at(scores[0], run.members[0], share=0.05, fpr=0.01).found    # members found, with interval   # doctest: +SKIP
>>> risks_of(runs).scores["memorization"]                             # [N]                            # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import special
from torch import Tensor

from demem_lab import risk
from demem_lab.attacks import FGSM, PGD, check_query, frozen
from demem_lab.leakage import Interval, evaluate, roc
from demem_lab.membership import by_class, lira, rmia
from demem_lab.signals import SIGNALS, confidence, logit_margin
from demem_lab.tables import Run
from demem_lab.validate import choice, finite

BINS = 40
SHOWN = 12  # pictures in each row of the gallery

# from a radius (largest change of a pixel; for L2 the root mean square), steps and pixels to an attack whose answer repeats
ATTACKS: dict[str, Callable[[float, int, int], PGD | None]] = {
    "PGD, Linf": lambda eps, steps, pixels: PGD(eps, steps, random_start=False),
    "PGD, L2": lambda eps, steps, pixels: PGD(eps * pixels**0.5, steps, norm="l2", random_start=False),
    "FGSM": lambda eps, steps, pixels: FGSM(eps),
    "none": lambda eps, steps, pixels: None,
}
READ = {
    "confidence": SIGNALS["confidence"], "loss": SIGNALS["loss"], "entropy": SIGNALS["entropy"],
    "modified entropy": SIGNALS["modified_entropy"], "logit margin": logit_margin,
}
# from (signal [M, N], logits [M, N, K], labels [N], members [M, N]) to scores [M, N], higher = more likely a member
MEMBERSHIP: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "LiRA": lambda signal, logits, y, member: lira(signal, member),
    "LiRA, offline": lambda signal, logits, y, member: lira(signal, member, online=False),
    "RMIA (reads the confidence)": lambda signal, logits, y, member: rmia(confidence(logits, y), member),
    "one threshold for all": lambda signal, logits, y, member: signal,
    "one threshold a class": lambda signal, logits, y, member: by_class(signal, y, member),
}


@dataclass(frozen=True)
class AttackPath:
    """One image along an attack; entry 0 is the image itself."""

    images: np.ndarray  # [T + 1, C, H, W]
    probabilities: np.ndarray  # [T + 1, K]
    label: int

    @property
    def change(self) -> np.ndarray:
        """[C, H, W] what was added, in pixel units."""
        return self.images[-1].astype(np.float64) - self.images[0]

    @property
    def fooled(self) -> bool:
        """Whether the last image is classified wrongly."""
        return int(self.probabilities[-1].argmax()) != self.label


def attack_path(net, x: Tensor, y: Tensor, attack: PGD | None) -> AttackPath:
    """One image [1, C, H, W] with its label [1] after each step of the attack; None is no attack.

    net: anything that maps images in [0, 1] to logits, on any device. Its last image is exactly what `attack(net, x, y)`
    gives. ValueError for an attack with random starts or restarts, which has no single path.
    """
    if len(x) != 1:
        raise ValueError(f"a path belongs to one image, got {len(x)}; give x[i : i + 1]")
    if attack is not None and (attack.random_start or attack.restarts != 1):
        raise ValueError("a random start or restarts have no single path; use PGD(eps, steps, random_start=False)")
    weight = next(net.parameters(), None) if isinstance(net, torch.nn.Module) else None
    if weight is not None:
        x, y = x.to(weight.device), y.to(weight.device)
    check_query(net, x, y)
    images = [x]
    if attack is not None:
        size = 2.5 * attack.eps / attack.steps if attack.step_size is None else attack.step_size
        one = replace(attack, steps=1, step_size=size)
        for _ in range(attack.steps):
            images.append(one(net, x, y, start=images[-1]))
    with frozen(net), torch.no_grad():  # one image at a time: a batch may be rounded otherwise than the attack saw it
        p = torch.cat([net(z).double().softmax(-1) for z in images])
    return AttackPath(torch.cat(images).cpu().numpy(), p.cpu().numpy(), int(y[0]))


@dataclass(frozen=True)
class Leak:
    """What one attack knows about one target, and what it does at one threshold."""

    threshold: float  # accused: scores at or above it
    found: Interval  # members accused
    false: Interval  # non-members accused
    accuracy: Interval  # right about anybody, at this threshold
    best_accuracy: Interval  # at the threshold that suits these very scores best: flattering
    fpr: float  # the low rate that is judged at
    found_at_fpr: Interval
    curve: tuple[np.ndarray, np.ndarray]  # false and true positive rates
    edges: np.ndarray  # [BINS + 1]; the outermost bins also hold what lies beyond
    members: np.ndarray  # int [BINS]
    non_members: np.ndarray  # int [BINS]


def membership_scores(logits, y: np.ndarray, member: np.ndarray, *, signal: str, attack: str) -> np.ndarray:
    """Scores [M, N] of a named attack on a named signal (`MEMBERSHIP`, `READ`), from logits [M, N, K]."""
    read, judge = READ[choice("signal", signal, READ)], MEMBERSHIP[choice("attack", attack, MEMBERSHIP)]
    return judge(read(logits, y), logits, y, member)


def leak_at(scores: np.ndarray, member: np.ndarray, *, share: float, fpr: float) -> Leak:
    """Accuse the `share` of all samples with the highest scores [N] (and whoever ties with the last): who is hit?

    Intervals are Clopper-Pearson, 95 %, for this one target; at the low rate the threshold's own uncertainty is in it.
    """
    finite("share", share, low=0, high=1)
    scores, member = np.asarray(scores, dtype=np.float64), np.asarray(member, dtype=bool)
    count, n = round(share * len(scores)), len(scores)
    threshold = float(np.sort(scores)[n - count]) if count else float("inf")
    accused = scores >= threshold
    false_rate, true_rate = roc(scores, member)
    inside, outside = int(member.sum()), int((~member).sum())
    best = round(float((true_rate * inside + (1 - false_rate) * outside).max()))
    low, high = np.quantile(scores, [0.005, 0.995])
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    shown = np.clip(scores, edges[0], edges[-1])
    return Leak(
        threshold, proportion(int(accused[member].sum()), inside), proportion(int(accused[~member].sum()), outside),
        proportion(int((accused == member).sum()), n), proportion(best, n), fpr,
        evaluate(scores[None], member[None], fprs=(fpr,)).interval(fpr, model=0),
        (false_rate, true_rate), edges,
        np.histogram(shown[member], edges)[0], np.histogram(shown[~member], edges)[0],
    )


def proportion(count: int, n: int) -> Interval:
    """`leakage.proportion` at 95 % by quantiles of the beta distribution, not by a search: a slider asks for fifteen at once."""
    low = special.betaincinv(count, n - count + 1, 0.025) if count else 0.0
    high = special.betaincinv(count + 1, n - count, 0.975) if count < n else 1.0
    return Interval(count / n, float(low), float(high), n)


@dataclass(frozen=True)
class Risks:
    """Everything known of every sample: M models, N samples, under attack."""

    y: np.ndarray  # int [N]
    member: np.ndarray  # bool [M, N]
    p: np.ndarray  # [M, N] confidence in the right label on each model's adversarial example
    margin: np.ndarray  # [M, N] log odds of the right label, there
    score: risk.MemorizationScore
    scores: dict[str, np.ndarray]  # "memorization", then the cheap ones, each [N]

    def sides(self, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean [N] of a table [M, N] over the models that trained on a sample, and over those that did not."""
        return risk.in_sample(table, self.member), risk.out_of_sample(table, self.member)


def risks_of(runs: Sequence[Run], cheap: Mapping[str, np.ndarray] | None = None) -> Risks:
    """The samples' risk as all models of these runs see it, with cheap scores [N] beside it. ValueError for NaN in them."""
    y, member = runs[0].y, np.concatenate([run.members for run in runs])
    p = np.concatenate([confidence(run.adversarial, run.y) for run in runs])
    margin = np.concatenate([logit_margin(run.adversarial, run.y) for run in runs])
    found, scores = risk.memorization(p, member), {}
    for name, values in {"memorization": found.score, **(cheap or {})}.items():
        scores[name] = np.asarray(values, dtype=np.float64)
        if scores[name].shape != y.shape or np.isnan(scores[name]).any():
            raise ValueError(f"score {name!r} must be one number for each of {len(y)} samples, without NaN")
    return Risks(y, member, p, margin, found, scores)


@dataclass(frozen=True)
class Cut:
    """The samples sorted by one score, and a threshold in that order."""

    order: np.ndarray  # int [N] riskiest first; among equals the lower index
    count: int  # so many are at or above the threshold
    threshold: float

    @property
    def rows(self) -> dict[str, np.ndarray]:
        """The samples shown: the riskiest of all, the last ones at or above the threshold, the first ones below it."""
        return {
            "riskiest": self.order[:SHOWN], "just above": self.order[max(0, self.count - SHOWN) : self.count],
            "just below": self.order[self.count : self.count + SHOWN],
        }


def cut_at(score: np.ndarray, *, share: float) -> Cut:
    """The riskiest `share` of all samples by a score [N], as `risk.protected_set` chooses them."""
    chosen = risk.protected_set(score, fraction=share)
    return Cut(np.argsort(-np.asarray(score), kind="stable"), int(chosen.mask.sum()), chosen.risk_threshold)
