"""The measuring half against the plain algorithms that public code uses, and against one sort of the same numbers.

The plain versions are written here, as one would write them from the papers; where one would take minutes, it is timed on a
part of the work and scaled up (said in the row).
"""

from __future__ import annotations

import tracemalloc

import dp_accounting as dp
import numpy as np
from dp_accounting.rdp import RdpAccountant
from harness import Row, judged, times, versus
from sklearn.metrics import roc_curve

from demem_lab import accounting
from demem_lab.audit import audit
from demem_lab.data import member_masks
from demem_lab.leakage import evaluate
from demem_lab.membership import lira, rmia
from demem_lab.risk import memorization


def gigabytes(action) -> float:
    """The most memory that an action held at a time, beside its arguments."""
    tracemalloc.start()
    action()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most / 1e9


def game(models: int, n: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    member = member_masks(n, models, seed=seed).numpy()
    return rng.normal(0, 2, n) + member + rng.normal(size=member.shape), member


def pairwise_rmia(p: np.ndarray, member: np.ndarray, target: int) -> np.ndarray:
    """RMIA for one target by comparing every sample with every other: an N x N table, a block of rows at a time."""
    keep = np.arange(len(p)) // 2 != target // 2
    inside = np.where(member, p, 0)[keep].sum(0) / member[keep].sum(0)
    outside = np.where(~member, p, 0)[keep].sum(0) / (~member)[keep].sum(0)
    ratio = p[target] / ((inside + outside) / 2)
    return np.concatenate([(part[:, None] / ratio[None, :] >= 1).mean(1) for part in np.array_split(ratio, 20)])


def plain_lira(signal: np.ndarray, member: np.ndarray, target: int) -> np.ndarray:
    """Online LiRA for one target, its references gathered and averaged anew (as leaving one out is usually written)."""
    keep = np.arange(len(signal)) // 2 != target // 2
    s, m = signal[keep], member[keep]
    inside, outside = np.where(m, s, np.nan), np.where(m, np.nan, s)
    mean_in, mean_out = np.nanmean(inside, 0), np.nanmean(outside, 0)
    var_in, var_out = (np.maximum(np.nanvar(side, 0), 1e-6) for side in (inside, outside))
    x = signal[target]
    return -((x - mean_in) ** 2) / (2 * var_in) - np.log(var_in) / 2 + (x - mean_out) ** 2 / (2 * var_out) + np.log(var_out) / 2


def plain_memorization(p: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Feldman & Zhang's score sample by sample."""
    return np.array([p[member[:, i], i].mean() - p[~member[:, i], i].mean() for i in range(p.shape[1])])


def bounds(rounds: int) -> list[Row]:
    """Epsilon by RDP at a position where a slider has not been: nothing of it is kept."""
    settings = [(sigma, rate) for sigma in (0.5, 1.0, 2.0) for rate in (0.07, 0.25)]

    def ours() -> list[float]:
        accounting._epsilon.cache_clear()
        accounting._rdp_of_a_step.cache_clear()
        budgets = [
            accounting.budget(noise_multiplier=s, sampling_rate=r, steps=420, delta=1e-5, accountant="RDP") for s, r in settings
        ]
        return [b.epsilon for b in budgets]

    def all_orders() -> list[float]:
        events = [dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(r, dp.GaussianDpEvent(s)), 420) for s, r in settings]
        return [RdpAccountant().compose(event).get_epsilon(1e-5) for event in events]

    assert np.allclose(ours(), all_orders(), rtol=1e-12)
    return versus(
        "epsilon by RDP", f"{len(settings)} settings, 420 steps, 1 thread",
        {"ours": ours, "dp_accounting, all orders": all_orders}, rounds=rounds, targets={"dp_accounting, all orders": 2.0},
    )


def jobs(quick: bool) -> list[Row]:
    """All rows of this file; RMIA's and LiRA's targets hold at full size only, where the work outgrows what a call costs."""
    n = 2000 if quick else 10_000
    signal, member = game(4, n)
    p, everyone = 1 / (1 + np.exp(-signal)), np.ones(n, dtype=bool)
    assert np.allclose(rmia(p, member, population=everyone)[0], pairwise_rmia(p, member, 0))
    rows = versus(
        "RMIA", f"4 targets, {n:,} samples and as many of the population, 1 thread",
        {"ours": lambda: rmia(p, member, population=everyone), "all pairs": lambda: pairwise_rmia(p, member, 0)},
        rounds=3, scale={"all pairs": 4}, targets={} if quick else {"all pairs": 100}, notes={"all pairs": "timed on one target"},
    )
    models, n = (16, 2000) if quick else (128, 50_000)
    signal, member = game(models, n)
    assert np.allclose(lira(signal, member, variance="per_sample")[3], plain_lira(signal, member, 3), atol=1e-6)
    held = gigabytes(lambda: lira(signal, member))
    rows += versus(
        "leave-one-out LiRA", f"each of {models} models the target, {n:,} samples, 1 thread, {held:.2f} GB at the peak",
        {"ours": lambda: lira(signal, member), "again for each target": lambda: plain_lira(signal, member, 3)},
        rounds=3, scale={"again for each target": models}, targets={} if quick else {"again for each target": models / 2},
        notes={"again for each target": "timed on one target"},
    )
    assert np.allclose(memorization(signal, member).score, plain_memorization(signal, member))
    rows += versus(
        "memorization", f"{models} models, {n:,} samples, 1 thread",
        {"ours": lambda: memorization(signal, member), "sample by sample": lambda: plain_memorization(signal, member)},
        rounds=3, targets={"sample by sample": 1.0},
    )
    n = 50_000 if quick else 1_000_000
    rng = np.random.default_rng(0)
    scores, member = rng.normal(size=(1, n)), rng.random((1, n)) < 0.5
    rows += versus(
        "threshold attack", f"{n:,} scores, 1 thread",
        {
            "ours": lambda: evaluate(scores, member), "scikit-learn's roc_curve": lambda: roc_curve(member[0], scores[0]),
            "one sort": lambda: np.argsort(-scores[0]),
        }, rounds=3, targets={"scikit-learn's roc_curve": 1.0},
    )
    models, n = (8, 2000) if quick else (64, 50_000)
    y, member = rng.integers(0, 10, n), member_masks(n, models, seed=0).numpy()
    logits = rng.normal(size=(models, n, 10)).astype(np.float32)
    arrays = {"logits": logits, "labels": y, "membership": member, "adv_logits": logits[:, :, ::-1].copy()}
    found = times({"ours": lambda: audit(arrays).to_html()}, rounds=1, warm=False)["ours"]
    shape = f"{models} models, {n:,} samples, clean and adversarial, 17 attacks, as HTML"
    rows.append(judged("report", shape, "a minute", [s / 60 for s in found], target=1.0, at_most=True, unit="share"))
    return rows + bounds(1 if quick else 5)
