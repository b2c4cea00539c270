"""Audit a model, yours or ours, from its outputs: one call, one report.

>>> report = audit({"member_logits": a, "member_labels": ya, "nonmember_logits": b, "nonmember_labels": yb})  # doctest: +SKIP
>>> report.to_frame(); report.save("audit.json"); Path("audit.html").write_text(report.to_html())             # doctest: +SKIP

With outputs of one model the attacks are thresholds on signals. With an ensemble (logits [M, N, K] and who was a member of
which) the strong attacks are there as well: every model is the target in turn, the others are its shadow models, so they
should have been trained with the same defence. With a `torch.nn.Module` and its data the outputs are computed first.
The report says how its numbers were obtained, and shows no rate that the data cannot resolve.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import scipy  # its stats take half a second, and load when first asked for

from demem_lab import __version__
from demem_lab.accounting import NoGuarantee
from demem_lab.empirical import one_run_bound
from demem_lab.files import of_anybody
from demem_lab.guarantees import Guarantee
from demem_lab.leakage import MIN_FALSE_POSITIVES, by_group, canaries, evaluate, held_out_accuracy, reliably_found
from demem_lab.membership import by_class, lira, missing_references, rmia, twins
from demem_lab.outputs import Outputs, outputs_from_arrays, robust_on, utility
from demem_lab.report import AuditReport
from demem_lab.risk import deciles, memorization
from demem_lab.signals import SIGNALS, confidence, label_robustness, logit_margin
from demem_lab.subject import ask, load_weights
from demem_lab.validate import finite
from demem_lab.validate import shown as shown_value

__all__ = ["audit", "load_weights"]
FPRS = (0.1, 0.01, 0.001)
SHADOW_ATTACKS = ("lira_online", "lira_offline", "rmia")
ATTACKS = (*SIGNALS, "label_robustness", *SHADOW_ATTACKS)
OFFLINE_A = 0.3  # RMIA's constant where in-references are lacking: what its authors use for CIFAR-10
RELIABLE = 0.9
GROUP_SHARES = {  # `by_group`'s columns as the report names them
    "found": "found", "low (pooled)": "low", "high (pooled)": "high", "accused": "accused",
    "accused low (pooled)": "accused_low", "accused high (pooled)": "accused_high", "auc": "auc",
}
ONE_TARGET = "Clopper-Pearson over the members of one target, the uncertainty of the threshold included"
UNKNOWN = "none known: outputs do not say how a model was trained"
EVERY = slice(None)  # all models, without a copy
Score = Callable[[np.ndarray | slice], np.ndarray]  # some models -> scores [m, N], with those models as the only references


def audit(
    subject, *, members=None, non_members=None, eps: float | None = None, attack=None, autoattack: int = 0,
    groups: Mapping[str, np.ndarray] | None = None, planted: np.ndarray | None = None, guarantee: object = None,
    independent_coins: bool = False, delta: float = 1e-5, fprs: Sequence[float] = FPRS, prior: float = 0.5, name: str = "",
    device: str = "auto",
) -> AuditReport:
    """Measure what a model gives away about its training set.

    subject: arrays by name (see `outputs`), `Outputs`, the path of a file of them, or a torch.nn.Module that maps images
    [B, C, H, W] to logits [B, K]; then members and non_members are (images, labels), eps the Linf radius of adversarial
    queries (none if not given), attack another attack than PGD-10, autoattack how many non-members AutoAttack is run on.
    groups: name -> bool [N]. planted: bool [N], the canaries. guarantee: what is promised, as text or a `Guarantee`.
    independent_coins: each sample was included by an independent fair coin, so that one run bounds epsilon from below.
    prior: the share of members among those asked about, for the precision. Raises ValueError for data that do not fit.
    """
    robustness, notes, how, skipped, graded = {}, [], {}, {}, None
    fprs = (fprs,) if isinstance(fprs, float) else fprs
    if not isinstance(fprs, Sequence | np.ndarray) or isinstance(fprs, str):
        raise ValueError(f"fprs must be false positive rates such as (0.1, 0.01), got {shown_value(fprs)}")
    finite("delta", delta, low=0, high=1)
    if isinstance(subject, type):
        raise ValueError(f"subject must be a network, not {shown_value(subject)}; call it first: {subject.__name__}(...)")
    if hasattr(subject, "forward") and hasattr(subject, "parameters"):
        asked = ask(
            subject, members=members, non_members=non_members, eps=eps, attack=attack, autoattack_on=autoattack, device=device
        )
        if not autoattack:
            skipped["AutoAttack"] = "not asked for; give eps and autoattack=N, how many of the non-members it is run on"
        outputs = outputs_from_arrays(asked.arrays, source=name or type(subject).__name__)
        robustness, graded, how, notes = asked.robustness, asked.graded, asked.how, [*asked.warnings]
    elif members is not None or non_members is not None or eps is not None or autoattack:
        raise ValueError("members, non_members, eps and autoattack belong to a torch.nn.Module; arrays bring their own outputs")
    else:
        outputs = of_anybody(subject, source=name or "arrays")
    if groups is not None and not isinstance(groups, Mapping):
        raise ValueError(f"groups must be bool [N] by name, such as {{'rare': rare}}, got {shown_value(groups)}")
    if planted is not None and not np.any(planted):
        raise ValueError("planted marks no sample; mark the canaries with True, or leave it out")
    finite("prior", prior, low=0, high=1)
    fprs = tuple(sorted({finite("a false positive rate", f, low=1e-9, high=1) for f in fprs}, reverse=True))
    member, y = outputs.membership, outputs.labels
    if not fprs:
        raise ValueError("at least one false positive rate is needed, got none")
    smallest = int((~member).sum(1).min())
    unresolved = [f for f in fprs if f * smallest < MIN_FALSE_POSITIVES]
    if len(unresolved) == len(fprs):
        needed = int(np.ceil(MIN_FALSE_POSITIVES / max(fprs)))
        raise ValueError(f"{smallest} non-members cannot resolve a false positive rate of {max(fprs):g}; bring at least {needed}")
    if unresolved:
        notes.append(
            f"{smallest:,} non-members cannot resolve a false positive rate of {', '.join(f'{f:g}' for f in unresolved)} "
            f"(at least {MIN_FALSE_POSITIVES} of them must lie above the threshold): not shown"
        )
    shown = tuple(f for f in fprs if f not in unresolved)
    classes = _classes_covered(outputs, skipped)
    measured, curves, best, fixed = {}, {}, None, None
    for attack_name, query, score in _attacks(outputs, graded, skipped):
        scores = score(EVERY)
        entry, curve = _measure(scores, member, y, shown, prior, attack_name in SIGNALS and classes)
        measured.setdefault(attack_name, {})[query] = entry
        curves[f"{attack_name} / {query}"] = curve
        rate = entry["tpr_at_fpr"][f"{shown[-1]:g}"]["estimate"]
        if best is None or rate > best[0]:
            best = rate, scores
        by_kind = (attack_name == "lira_online", attack_name == "lira_offline", attack_name == "loss")
        place = (*by_kind, query == "combined", query == "adversarial")
        if fixed is None or place > fixed[0]:
            fixed = place, attack_name, query, scores, score
    _, *chosen, chosen_scores, score = fixed
    rows = _groups(outputs, chosen_scores, score, shown[-1], groups or {}, skipped)
    for row in rows:
        row |= {"attack": chosen[0], "query": chosen[1], "fpr": shown[-1]}
    notes += _tied(best[-1], member, shown)
    return AuditReport(
        name=name or outputs.source, attacks=measured, utility=utility(outputs), robustness=robust_on(outputs) | robustness,
        groups=rows, canaries={} if planted is None else _canaries(*chosen, chosen_scores, member, planted, shown[-1]),
        guarantee=_promised(guarantee), reliable=_reliable(*chosen, chosen_scores, member, shown[-1], skipped),
        empirical=_empirical(*chosen, chosen_scores, member, delta, independent_coins, skipped),
        skipped=skipped, curves=curves,
        obtained=_obtained(outputs, shown, prior) | how, warnings=[*outputs.warnings, *notes],
    )


def _tied(scores: np.ndarray, member: np.ndarray, fprs: Sequence[float]) -> list[str]:
    """A note where so many scores are equal at the top that no threshold comes near a rate."""
    top = scores == scores.max(1, keepdims=True)
    share = float(np.mean([t[~m].mean() for t, m in zip(top, member, strict=True)]))
    missed = [f for f in fprs if share > f]
    if not missed:
        return []
    return [
        f"{share:.1%} of the non-members share the highest score with {top[member].mean():.1%} of the members (saturated "
        f"outputs?), so no threshold accuses as few as {', '.join(f'{f:g}' for f in missed)} of the non-members, and that nobody "
        "is found there says nothing; bring logits, or probabilities in float64, where the model has them"
    ]


def _attacks(outputs: Outputs, graded: np.ndarray | None, skipped: dict[str, str]) -> Iterator[tuple[str, str, Score]]:
    """(attack, query, how it scores) of every attack that these outputs allow; scored one at a time, to save memory."""
    y, member = outputs.labels, outputs.membership
    tables = {"clean": outputs.logits} | ({} if outputs.adv_logits is None else {"adversarial": outputs.adv_logits})
    if outputs.adv_logits is None:
        skipped["adversarial queries"] = "no outputs on adversarial inputs were given; robust models leak more to those"
    for query, table in tables.items():
        for name, signal in SIGNALS.items():
            yield name, query, lambda some, signal=signal, table=table: signal(table[some], y)
        if query == "adversarial" and graded is not None:
            yield "label_robustness", query, lambda some: graded[some]
        else:
            asked = list(tables.values()) if query == "adversarial" else [table]
            yield "label_robustness", query, lambda some, asked=asked: label_robustness([t[some] for t in asked], y)
    without, inside = (missing_references(member, who, side) for who, side in ((~member, "without"), (member, "with")))
    if without:
        skipped["LiRA and RMIA"] = without
        return
    if inside:
        skipped["LiRA online and RMIA online"] = f"{inside}; the offline attacks stand in for them"
    margins = {query: logit_margin(table, y) for query, table in tables.items()}
    a = OFFLINE_A if inside else None
    for query, table in tables.items():
        if not inside:
            yield "lira_online", query, lambda some, x=margins[query]: lira(x[some], member[some])
        yield "lira_offline", query, lambda some, x=margins[query]: lira(x[some], member[some], online=False)
        yield "rmia", query, lambda some, table=table: rmia(confidence(table[some], y), member[some], offline_a=a)
    if len(tables) > 1:
        yield f"lira_{'offline' if inside else 'online'}", "combined", lambda some: lira(
            np.stack([x[some] for x in margins.values()]), member[some], online=not inside
        )


def _classes_covered(outputs: Outputs, skipped: dict[str, str]) -> bool:
    """Whether every class has non-members among every target's references, for thresholds by class."""
    member, y = outputs.membership, outputs.labels
    if outputs.models < 4:
        return False
    try:
        by_class(np.zeros(member.shape), y, member)
    except ValueError as error:
        skipped["thresholds by class from shadow models"] = str(error)
        return False
    return True


def _measure(scores, member, y, fprs, prior: float, classes: bool) -> tuple[dict, dict]:
    """What one attack achieves, as plain numbers, and its mean ROC."""
    smallest = MIN_FALSE_POSITIVES / int((~member).sum(1).min())
    grid = np.geomspace(min(smallest, 1.0), 1, 60)
    everything = evaluate(scores, member, fprs=(*fprs, *grid))
    found = replace(
        everything, fprs=tuple(fprs), tpr=everything.tpr[:, : len(fprs)], accused=everything.accused[:, : len(fprs)]
    )
    rates = {f"{f:g}": found.over_targets(f) for f in fprs}
    entry = {
        "auc": float(found.auc.mean()), "balanced_accuracy": float(found.balanced_accuracy.mean()),
        "balanced_accuracy_held_out": float(held_out_accuracy(scores, member).mean()),
        "balanced_accuracy_by_class_held_out": float(held_out_accuracy(scores, member, y=y).mean()),
        "tpr_at_fpr": {f: {"estimate": r.mean, "low": max(0.0, r.low), "high": min(1.0, r.high)} for f, r in rates.items()},
        # each non-member judged by the others' threshold: what guessing finds of the members, which ties may keep below the rate
        "accused_at_fpr": {f"{f:g}": float(a) for f, a in zip(fprs, found.accused.mean(0), strict=True)},
        "precision_at_prior": {"prior": prior, **{f"{f:g}": found.precision(f, prior=prior) for f in fprs}},
        "members": int(found.members.min()), "non_members": int(found.non_members.min()), "targets": len(found.auc),
    }
    if classes:
        own = evaluate(by_class(scores, y, member), member, fprs=fprs)
        entry["by_class"] = {"auc": float(own.auc.mean()), "tpr_at_fpr": {f"{f:g}": own.tpr_at(f) for f in fprs}}
    curve = everything.tpr[:, len(fprs) :].mean(0)
    return entry, {"fpr": grid.tolist(), "tpr": curve.tolist()}


def _groups(
    outputs: Outputs, scores: np.ndarray, score: Score, fpr: float, given: Mapping[str, np.ndarray], skipped: dict[str, str]
) -> list[dict]:
    """Who is found: by class, by the groups given, and by risk where it can be scored apart.

    scores [M, N]: those of `score` for every model. As for the bound on epsilon, the attack is fixed by kind (LiRA if there is
    one, else the loss): the one that came out best found members by luck as well, who would look like a leak of their group.
    """
    member, rows = outputs.membership, []

    def add(kind: str, scores, member, groups) -> None:
        table = by_group(scores, member, groups, fpr=fpr)
        for group, row in table.iterrows():
            shares = {name: row[column] for column, name in GROUP_SHARES.items()}
            rows.append({"kind": kind, "group": str(group), "members": int(row["members"])} | {
                name: None if pd.isna(share) else float(share) for name, share in shares.items()
            })

    add("class", scores, member, outputs.labels)
    if given:
        add("group", scores, member, given)
    half = _two_halves(member)
    if half is None:
        skipped["groups by risk"] = (
            "risk is scored on one half of the models, and the other half attacked with none but its own as shadow models: "
            "that takes 8, in complementary halves"
        )
    else:
        table = outputs.logits if outputs.adv_logits is None else outputs.adv_logits
        tenth = deciles(memorization(confidence(table[half], outputs.labels), member[half]).score)
        # scored anew: scores that lean on the models that chose a tenth find there the noise that it was chosen by
        add("risk (scored on the other half of the models)", score(~half), member[~half], {
            f"tenth {g + 1}": tenth == g for g in range(10)
        })
    return rows


def _two_halves(member: np.ndarray) -> np.ndarray | None:
    """bool [M]: half of the models, twins together, so that each half has every sample on both sides; None if impossible.

    From 8 models on each half has two pairs at least: every target has a reference with and one without each sample, beside
    itself and its twin, which is the least that `lira` and `rmia` take.
    """
    other = twins(member)
    if len(member) < 8 or (other < 0).any():
        return None
    pairs = [m for m in range(len(member)) if m < other[m]]
    half = np.zeros(len(member), dtype=bool)
    for m in pairs[: len(pairs) // 2]:
        half[[m, other[m]]] = True
    return half


def _canaries(attack: str, query: str, scores, member, planted, fpr: float) -> dict:
    """By the attack of `_groups`: the one that found most would find more canaries than non-members without any leak."""
    return {"attack": attack, "query": query, "fpr": fpr, **canaries(scores, member, planted, fpr=fpr)}


def _promised(guarantee: object) -> str:
    """A guarantee of ours carries its conditions; one in free words is marked as the words of whoever gave them."""
    if guarantee is None:
        return UNKNOWN
    ours = isinstance(guarantee, (Guarantee, NoGuarantee))
    return str(guarantee) if ours else f"{guarantee} (as stated by whoever asked for this report; not checked here)"


def _reliable(attack: str, query: str, scores, member, fpr: float, skipped: dict[str, str]) -> dict:
    """The share of the samples that the attack of `_groups` finds whichever model is the target."""
    if len(member) < 4 or not member.any(0).all() or member.all(0).any():
        skipped["samples attacked reliably"] = "that takes at least 4 targets, with and without every sample"
        return {}
    found = reliably_found(scores, member, fpr=fpr, share=RELIABLE)
    return {"attack": attack, "query": query, "fpr": fpr, "share_of_targets": RELIABLE, "fraction": found.fraction,
            "by_chance": found.by_chance, "never_found": float((found.hit == 0).mean()),
            "targets_with_the_sample": [int(member.sum(0).min()), int(member.sum(0).max())]}


def _empirical(attack: str, query: str, scores, member, delta: float, coins: bool, skipped) -> dict:
    """A lower bound on epsilon, where the design allows one.

    The attack is fixed by kind (LiRA if there is one, else the loss), not the one that came out best: choosing it on the
    scores that give the bound would make the bound too large. Over several targets the median is taken of bounds at half
    the error probability: half of all bounds can be too large with at most twice the probability of one (Markov).
    """
    n = member.shape[1]
    if not coins or n < 1000:
        skipped["empirical epsilon"] = (
            f"one run needs at least 1,000 samples, each included by an independent fair coin; there are {n:,}" if coins else
            "one run bounds epsilon only where each sample was included by an independent fair coin (say independent_coins=True, "
            "on the command line --independent-coins)"
        )
        return {}
    odd = scipy.stats.binomtest(int(member[0].sum()), n).pvalue
    if odd < 1e-6 or (len(member) > 3 and np.ptp(member.sum(1)) == 0):
        raise ValueError(
            f"independent_coins=True, but {member.sum(1)[:3].tolist()} members of {n:,} are not what fair coins give; use "
            "data.member_masks(..., design='independent'), or leave independent_coins out"
        )
    other = twins(member)
    if (other >= 0).any():
        first = int(np.flatnonzero(other >= 0)[0])
        raise ValueError(
            f"independent_coins=True, but models {first} and {other[first]} were trained on complementary halves, so one coin "
            "decided for both; toss for every model apart, or leave independent_coins out"
        )
    if len(member) > 1 and np.ptp(member.sum(0)) == 0:
        raise ValueError(
            f"independent_coins=True, but every sample trained exactly {member[:, 0].sum()} of {len(member)} models, so the last "
            "coin was decided by the others; toss for every model apart, or leave independent_coins out"
        )
    error = 0.05 if len(member) == 1 else 0.025
    bounds = [one_run_bound(s, m, delta=delta, confidence=1 - error) for s, m in zip(scores, member, strict=True)]
    bound = replace(sorted(bounds, key=lambda b: b.epsilon)[(len(bounds) - 1) // 2], confidence=0.95)
    condition = "every sample included by an independent fair coin" + (
        "" if len(bounds) == 1 else "; the median over targets of bounds at 97.5 % each, which keeps 95 %"
    )
    return {
        "epsilon_at_least": bound.epsilon, "delta": delta, "confidence": bound.confidence, "attack": attack, "query": query,
        "targets": len(bounds), "condition": condition, "text": f"Measured with {attack}, {query} queries: {bound}; {condition}.",
    }


def _obtained(outputs: Outputs, fprs, prior: float) -> dict:
    content = hashlib.sha256(np.ascontiguousarray(outputs.logits).tobytes())
    for part in (outputs.labels, outputs.membership, outputs.adv_logits):
        content.update(b"" if part is None else np.ascontiguousarray(part).tobytes())
    return {
        "source": outputs.source, "models": outputs.models, "samples": outputs.n, "classes": outputs.classes,
        "from_probabilities": outputs.from_probabilities, "content": content.hexdigest()[:32], "fprs": list(fprs),
        "prior": prior, "demem_lab": __version__, "numpy": np.__version__,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "intervals": ONE_TARGET if outputs.models == 1 else
                     "t-interval over targets, which share samples and references: too narrow for another draw of the data",
    }
