"""How much do scores give away? Measures that look at the worst cases first, with intervals.

>>> found = evaluate(scores, member)                    # both [M, N]; higher score = more likely a member  # doctest: +SKIP
>>> found.tpr_at(0.01), found.auc.mean()                                                                    # doctest: +SKIP

An average over samples hides the few that are given away for certain, so the headline is the true positive rate at a low
false positive rate (Carlini et al. 2022); it is shown only where there are enough non-members to resolve it. Averages
are there as well, labelled for what they are: `balanced_accuracy` chooses its threshold on the very scores that it then
judges (as Song & Mittal 2021 do), `held_out_accuracy` does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import scipy  # its stats take half a second, and load when first asked for

from demem_lab.intervals import Interval, proportion, rate_limits, seed_interval
from demem_lab.validate import choice, finite, flags

MIN_FALSE_POSITIVES = 5  # a rate is shown only where at least this many false positives are expected
SHARE = "give a share: 0.01 is 1 %"


@dataclass(frozen=True)
class Leakage:
    """What an attack achieves against each of M targets."""

    fprs: tuple[float, ...]
    auc: np.ndarray  # [M]
    tpr: np.ndarray  # [M, F] at thresholds with at most that share of false positives
    accused: np.ndarray  # [M, F] share of the non-members (of the subset) that those thresholds accuse; NaN where there is none
    balanced_accuracy: np.ndarray  # [M] at the best threshold on these very scores: optimistic
    members: np.ndarray  # int [M]
    non_members: np.ndarray  # int [M]
    # cumulative true and false positives of each target as the threshold falls; intervals read them
    steps: tuple[tuple[np.ndarray, np.ndarray], ...] = field(repr=False)

    @property
    def resolved(self) -> np.ndarray:
        """bool [F]: enough non-members for this rate to mean something (5 expected false positives)."""
        return np.array(self.fprs) * self.non_members.min() >= MIN_FALSE_POSITIVES

    def tpr_at(self, fpr: float) -> float | None:
        """Mean true positive rate over the targets; None where the rate cannot be resolved."""
        column = self._column(fpr)
        return float(self.tpr[:, column].mean()) if self.resolved[column] else None

    def interval(self, fpr: float, *, model: int, level: float = 0.95) -> Interval:
        """Interval of one model's true positive rate at the threshold that exactly `fpr` of ALL non-members would exceed.

        Where that threshold lies among the scores is uncertain: the number of sampled non-members above it is binomial.
        Given that number, the limits are Clopper-Pearson's over the members; their tails are averaged over it. Taking the
        measured threshold as given instead covers 63 %, not 95 %, where 5 false positives are expected.
        """
        rate = float(self.tpr[model, self._column(fpr)])
        low, high = rate_limits(*self.steps[model], fpr, (1 - level) / 2)
        return Interval(rate, low, high, int(self.members[model]))

    def over_targets(self, fpr: float, *, level: float = 0.95) -> Interval:
        """The true positive rate with an interval: `interval` for one target, a t-interval over several.

        Targets of one ensemble share samples and serve as each other's references: the interval says how much targets
        differ, not how another draw of the data would. None for a rate that cannot be resolved is the caller's to check.
        """
        rates = self.tpr[:, self._column(fpr)]
        if np.ptp(rates) == 0:  # also where several targets are alike by chance: that they do not differ is not certainty
            return replace(self.interval(fpr, model=0, level=level), n=len(rates) if len(rates) > 1 else int(self.members[0]))
        return seed_interval(rates, level=level)

    def precision(self, fpr: float, *, prior: float) -> float | None:
        """The share of true members among those accused, if a share `prior` of all samples asked about were members.

        At 1 % false positives and a prior of 1 %, an attack needs a true positive rate of 50 % to be right every other time.
        Non-members count as `accused` has them: ties keep the threshold away from `fpr`, and guessing finds as many of the
        members. None where the rate cannot be resolved or nobody is accused.
        """
        finite("prior", prior, low=0, high=1)
        rate = self.tpr_at(fpr)
        if rate is None:
            return None
        accused = prior * rate + (1 - prior) * float(self.accused[:, self._column(fpr)].mean())
        return prior * rate / accused if accused else None

    def to_frame(self) -> pd.DataFrame:
        """One row a model; unresolved rates are missing, not numbers."""
        columns = {"auc": self.auc, "balanced accuracy (optimistic)": self.balanced_accuracy, "members": self.members}
        frame = pd.DataFrame({**columns, "non-members": self.non_members})
        for f, fpr in enumerate(self.fprs):
            frame[f"TPR at {100 * fpr:g} % FPR"] = self.tpr[:, f] if self.resolved[f] else pd.NA
        return frame

    def _column(self, fpr: float) -> int:
        return self.fprs.index(choice("fpr", fpr, self.fprs))


def evaluate(
    scores: np.ndarray, member: np.ndarray, *, fprs: Sequence[float] = (0.1, 0.01, 0.001), subset: np.ndarray | None = None
) -> Leakage:
    """ROC measures of scores [M, N] for each target; `subset` bool [N] restricts the members that count.

    Thresholds are global: they come from ALL non-members of the model (each non-member's from all others), also for a subset.
    Such a threshold may accuse the subset's non-members more often than others: `tpr` of a subset says something about
    membership only where it exceeds `accused`. `auc` compares the subset's members with its own non-members (NaN without any).
    One sort a model. Raises ValueError for rates outside [0, 1] and for a subset of indices.
    """
    scores, member = _checked(scores, member)
    fprs, subset = _rates(fprs), True if subset is None else _flags("subset", subset, member, each=True)
    inside, beside = member & subset, ~member & subset
    if not inside.any(1).all() or member.all(1).any():
        raise ValueError("every model needs at least one member (of the subset) and one non-member")
    auc, tpr, accused, balanced, steps = [], [], [], [], []
    for s, m, chosen, own in zip(scores, member, inside, beside, strict=True):
        true, false, accusing = _steps(s, chosen, ~m, own)
        rows = (true[1:] + true[:-1]) / 2 * np.diff(accusing)
        auc.append(rows.sum() / (true[-1] * accusing[-1]) if accusing[-1] else np.nan)
        # the last step with at most fpr * n false positives; ties are one step, so nobody is accused by halves
        at = [np.searchsorted(false, np.floor(f * false[-1] + 1e-9), side="right") - 1 for f in fprs]
        tpr.append(true[at] / true[-1])
        # a non-member is judged by what the OTHERS allow (`_beyond` says why)
        others = [np.searchsorted(false, np.floor(f * false[-1] + 1e-9) + 1, side="right") - 1 for f in fprs]
        accused.append(accusing[others] / accusing[-1] if accusing[-1] else np.full(len(at), np.nan))
        balanced.append(((true / true[-1] + 1 - false / false[-1]) / 2).max())
        steps.append((true.astype(np.int32), false.astype(np.int32)))
    counts = inside.sum(1), (~member).sum(1)
    return Leakage(fprs, np.array(auc), np.array(tpr), np.array(accused), np.array(balanced), *counts, tuple(steps))


def held_out_accuracy(
    scores: np.ndarray, member: np.ndarray, *, y: np.ndarray | None = None, seed: int = 0
) -> np.ndarray:
    """Balanced accuracy [M] of a threshold that was chosen elsewhere: each half of the samples is judged by the other's.

    The halves are drawn at random among members and non-members alike. y: labels [N], for one threshold a class (Song &
    Mittal 2021); a class that the choosing half lacks on either side uses the global one. About 0.5 where nothing leaks,
    which `Leakage.balanced_accuracy` never is.
    """
    scores, member = _checked(scores, member)
    y = np.zeros(scores.shape[1], dtype=int) if y is None else np.asarray(y)
    if y.shape != member.shape[1:]:
        raise ValueError(f"labels must be [N] = [{member.shape[1]}], got {list(y.shape)}")
    few = min(member.sum(1).min(), (~member).sum(1).min())
    if few < 2:
        raise ValueError(f"a held-out threshold needs at least 2 members and 2 non-members of every model, got {few} on one side")
    _, y, sizes = np.unique(y, return_inverse=True, return_counts=True)
    y = y.astype(np.uint16) if len(sizes) <= 2**16 else y  # 16 bits are sorted by counting, in a tenth of the time
    rng, out, ends = np.random.default_rng(seed), [], np.cumsum(sizes)
    for s, m in zip(scores, member, strict=True):
        half = np.zeros(len(s), dtype=bool)
        for who in (m, ~m):
            places = rng.permutation(np.flatnonzero(who))
            half[places[: len(places) // 2]] = True
        order = np.argsort(-s)
        together = order[np.argsort(y[order], kind="stable")] if len(ends) > 1 else order
        right = 0.0
        for choosing in (half, ~half):
            everywhere = None
            for part in np.split(together, ends[:-1]):
                mine, theirs = part[choosing[part]], part[~choosing[part]]
                if m[mine].any() and not m[mine].all():
                    cut = _best_threshold(s[mine], m[mine])
                else:
                    if everywhere is None:
                        chosen = order[choosing[order]]
                        everywhere = _best_threshold(s[chosen], m[chosen])
                    cut = everywhere
                accused, members = s[theirs] >= cut, m[theirs]
                right += (accused & members).sum() / m.sum() + (~accused & ~members).sum() / (~m).sum()
        out.append(right / 2)
    return np.array(out)


def by_group(
    scores: np.ndarray, member: np.ndarray, groups: Mapping[str, np.ndarray] | np.ndarray, *, fpr: float
) -> pd.DataFrame:
    """One row a group: members found and non-members accused at the one global threshold, each with its limits, and the AUC.

    groups: name -> bool [N], or labels [N] for one group a class. "accused" is the share of the group's own non-members beyond
    the threshold, which is what guessing finds there: where scores scatter more it is above `fpr`, though nothing leaks. Each
    is judged by the others' threshold, as members are, so that without a leak both shares are alike on average. Samples of
    all targets are pooled for the Clopper-Pearson limits, so they are too narrow where targets share samples (said in the
    column's name), and they take the threshold as given. "auc" sets members against the group's own non-members, in the mean
    over the targets that have both; without non-members there is neither an AUC nor a share accused.
    Thresholds of their own, chosen on the group's non-members, only where fpr is at least 10 %: elsewhere a group has too few.
    """
    scores, member = _checked(scores, member)
    if not isinstance(groups, Mapping):
        groups = {str(label): np.asarray(groups) == label for label in np.unique(groups)}
    (fpr,) = _rates((fpr,))
    resolved, beyond = fpr * (~member).sum(1).min() >= MIN_FALSE_POSITIVES, _beyond(scores, member, fpr)
    rows = {}
    for name, inside in groups.items():
        inside = np.asarray(inside, dtype=bool)
        if inside.shape != member.shape[1:]:
            raise ValueError(f"group {name!r} must be bool [{member.shape[1]}], got shape {list(inside.shape)}")
        if not (member & inside).any(1).all():
            continue
        row = rows[name] = {"members": int((member & inside).sum())}
        for what, limit, who in (("found", "", member & inside), ("accused", "accused ", ~member & inside)):
            shown = resolved and who.any()
            pooled = proportion(int((beyond & who).sum()), int(who.sum())) if shown else Interval(None, None, None, 0)
            row |= {what: pooled.mean, f"{limit}low (pooled)": pooled.low, f"{limit}high (pooled)": pooled.high}
        both = (~member & inside).any(1)
        own = evaluate(scores[both][:, inside], member[both][:, inside], fprs=(fpr,)) if both.any() else None
        row["auc"] = None if own is None else float(own.auc.mean())
        if fpr >= 0.1 and both.all():
            row["found at its own threshold"] = own.tpr_at(fpr)
    return pd.DataFrame.from_dict(rows, orient="index")


def canaries(scores: np.ndarray, member: np.ndarray, planted: np.ndarray, *, fpr: float) -> dict[str, float | int | None]:
    """How far planted worst cases (for instance mislabelled samples) are given away: bool [N] `planted`.

    "at the global threshold": as the attacker of everybody would find them; "accused": canaries that were left out, beyond
    that same threshold, which is what guessing finds; "among canaries": told apart from those left out, the measure of Aerni,
    Zhang & Tramer (CCS 2024), None where they cannot resolve `fpr`.
    """
    scores, member = _checked(scores, member)
    planted = _flags("planted", planted, member)
    everybody = evaluate(scores, member, fprs=(fpr,), subset=planted)
    alone = evaluate(scores[:, planted], member[:, planted], fprs=(fpr,))
    found = everybody.tpr_at(fpr)
    return {
        "canaries": int(planted.sum()), "at the global threshold": found,
        "accused": None if found is None else float(everybody.accused.mean()), "among canaries": alone.tpr_at(fpr),
        "auc among canaries": float(alone.auc.mean()),
    }


@dataclass(frozen=True)
class Reliability:
    """How surely each sample is attacked, whichever model is the target."""

    hit: np.ndarray  # [N] share of the targets with the sample that find it at the false positive rate asked for
    false_alarm: np.ndarray  # [N] share of the targets without it that accuse it
    fraction: float  # of the samples: found by at least `share` of their targets and accused by no more than 1 - share
    by_chance: float  # the same fraction, if every target accused everybody with probability `fpr`, apart from the others


def reliably_found(scores: np.ndarray, member: np.ndarray, *, fpr: float, share: float = 0.9) -> Reliability:
    """The samples that are attacked reliably across targets: an average of 5 % may be 5 % of the people, every time.

    Raises ValueError where `fpr` (in (0, 1]) cannot be resolved or a sample is a member (or non-member) of no target.
    """
    finite("share", share, low=0.5, high=1)
    if finite("fpr", fpr, low=0, high=1, fix=SHARE) == 0:
        raise ValueError(f"fpr must be > 0 and <= 1, got {fpr!r}; {SHARE}")
    scores, member = _checked(scores, member)
    outside = int((~member).sum(1).min())
    if fpr * outside < MIN_FALSE_POSITIVES:
        needed = int(np.ceil(MIN_FALSE_POSITIVES / fpr))
        raise ValueError(f"{outside} non-members cannot resolve a false positive rate of {fpr:g}; that takes {needed}")
    if not member.any(0).all() or member.all(0).any():
        raise ValueError("every sample must be a member of one target at least and a non-member of another")
    accused = np.zeros_like(member)
    for row, s, m in zip(accused, scores, member, strict=True):
        negative = np.sort(s[~m])
        last = len(negative) - 1 - int(np.floor(fpr * len(negative) + 1e-9))
        row[:] = s > negative[last] if last >= 0 else True
    hit = (accused & member).sum(0) / member.sum(0)
    alarm = (accused & ~member).sum(0) / (~member).sum(0)
    inside, without = member.sum(0), (~member).sum(0)
    luck = scipy.stats.binom.sf(np.ceil(share * inside - 1e-9) - 1, inside, fpr)
    luck *= scipy.stats.binom.cdf(np.floor((1 - share) * without + 1e-9), without, fpr)
    return Reliability(hit, alarm, float(((hit >= share) & (alarm <= 1 - share + 1e-12)).mean()), float(luck.mean()))


def roc(scores: np.ndarray, member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates of one target (scores [N], member [N])."""
    from sklearn.metrics import roc_curve

    fpr, tpr, _ = roc_curve(np.asarray(member, dtype=bool), np.asarray(scores, dtype=np.float64), drop_intermediate=False)
    return fpr, tpr


def mean_roc(scores: np.ndarray, member: np.ndarray, *, points: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """The ROC averaged over targets on a logarithmic grid of those false positive rates that can be resolved."""
    smallest = MIN_FALSE_POSITIVES / int((~np.asarray(member, dtype=bool)).sum(1).min())
    if smallest >= 1:
        raise ValueError(f"fewer than {MIN_FALSE_POSITIVES} non-members cannot resolve any false positive rate")
    grid = np.geomspace(smallest, 1, points)
    return grid, evaluate(scores, member, fprs=tuple(grid)).tpr.mean(0)


def _steps(scores: np.ndarray, positive: np.ndarray, negative: np.ndarray, *some: np.ndarray) -> tuple[np.ndarray, ...]:
    """Cumulative true and false positives [steps + 1] as the threshold falls from infinity, one step a distinct score.

    `some`: parts of the positive and negative that are counted as well.
    """
    counted = positive | negative
    s = scores[counted]
    order = np.argsort(-s)
    s = s[order]
    last = np.append(s[1:] != s[:-1], True)  # the end of every run of equal scores
    return tuple(np.concatenate([[0], np.cumsum(part[counted][order])[last]]) for part in (positive, negative, *some))


def _beyond(scores: np.ndarray, member: np.ndarray, fpr: float) -> np.ndarray:
    """bool [M, N]: scores beyond the threshold that the model's OTHER non-members set, k of whom `fpr` allows to be beyond it.

    For members that is `evaluate`'s threshold: they have at most k non-members at or above them. Judged by the very threshold
    that they set, exactly k non-members are beyond it, where chance alone finds k + 1 members among as many.
    """
    found = np.empty(member.shape, dtype=bool)
    for row, s, m in zip(found, scores, member, strict=True):
        negative = np.sort(-s[~m])
        at_least = np.searchsorted(negative, -s, side="right") - ~m  # other non-members that score as high or higher
        row[:] = at_least <= np.floor(fpr * len(negative) + 1e-9)
    return found


def _rates(fprs: Sequence[float]) -> tuple[float, ...]:
    """False positive rates as they came, all in [0, 1]."""
    if np.ndim(fprs) == 0:
        raise ValueError(f"fprs must be a sequence of rates, got {fprs!r}; for a single one give ({fprs!r},)")
    for fpr in fprs:
        finite("fpr", fpr, low=0, high=1, fix=SHARE)
    return tuple(fprs)


def _flags(name: str, mask: np.ndarray, member: np.ndarray, *, each: bool = False) -> np.ndarray:
    """bool [N] (or [M, N], where `each` target may have its own); indices and other shapes are refused."""
    mask, (models, n) = np.asarray(mask), member.shape
    flags(name, mask, n=n)
    if mask.shape != (n,) and not (each and mask.shape == (models, n)):
        allowed = f"[{n}] or [{models}, {n}]" if each else f"[{n}]"
        raise ValueError(f"{name} must be bool {allowed}, got shape {list(mask.shape)}")
    return mask


def _best_threshold(scores: np.ndarray, member: np.ndarray) -> float:
    """The score s for which "member where score >= s" has the best balanced accuracy; inf when nobody is best.

    scores must fall from left to right.
    """
    last = np.append(scores[1:] != scores[:-1], True)
    true, false = np.cumsum(member), np.cumsum(~member)
    gain = (true / true[-1] - false / false[-1])[last]
    best = int(gain.argmax())
    return float(scores[last][best]) if gain[best] > 0 else np.inf


def _checked(scores: np.ndarray, member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, member = np.asarray(scores, dtype=np.float64), np.asarray(member, dtype=bool)
    if scores.shape != member.shape or scores.ndim != 2:
        raise ValueError(f"scores and member must both be [M, N], got {list(scores.shape)} and {list(member.shape)}")
    if np.isnan(scores).any():
        raise ValueError("scores contain NaN; check the signals they were computed from")
    return scores, member
