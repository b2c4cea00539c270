"""The measuring half against the plain algorithms that public code uses, in one run on one thread; prints ratios.

    python benchmarks/measures.py [--quick]

The plain versions are written here, as one would write them from the papers. CPU time, the smallest of interleaved rounds;
where the plain version would take minutes it is timed on a part of the work and scaled up (said in the row).
"""

from __future__ import annotations

import resource
import sys
import time

import numpy as np
from sklearn.metrics import roc_curve

from demem_lab.audit import audit
from demem_lab.data import member_masks
from demem_lab.leakage import evaluate
from demem_lab.membership import lira, rmia
from demem_lab.risk import memorization

QUICK = "--quick" in sys.argv


def seconds(action, rounds: int = 3) -> float:
    """Least CPU seconds over rounds."""
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        action()
        best = min(best, time.process_time() - start)
    return best


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


def main() -> None:
    n = 2000 if QUICK else 10_000
    signal, member = game(4, n)
    p = 1 / (1 + np.exp(-signal))
    everyone = np.ones(n, dtype=bool)
    assert np.allclose(rmia(p, member, population=everyone)[0], pairwise_rmia(p, member, 0))
    ratio = 4 * seconds(lambda: pairwise_rmia(p, member, 0), 2) / seconds(lambda: rmia(p, member, population=everyone))
    print(f"RMIA on {n:,} x {n:,}: all pairs / ours (4 targets; pairs timed for one): {ratio:.0f}")

    models, n = (16, 2000) if QUICK else (128, 50_000)
    signal, member = game(models, n)
    assert np.allclose(lira(signal, member, variance="per_sample")[3], plain_lira(signal, member, 3), atol=1e-6)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours = seconds(lambda: lira(signal, member), 2)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    ratio = models * seconds(lambda: plain_lira(signal, member, 3), 2) / ours
    print(f"LiRA, every one of {models} models the target, {n:,} samples: again for each target / ours: {ratio:.0f} "
          f"({ours:.1f} s, {memory:.0f} MB more at its peak)")
    ratio = seconds(lambda: plain_memorization(signal, member), 2) / seconds(lambda: memorization(signal, member))
    print(f"memorization scores, the same table: sample by sample / ours: {ratio:.1f}")

    n = 50_000 if QUICK else 1_000_000
    rng = np.random.default_rng(0)
    scores, member = rng.normal(size=(1, n)), rng.random((1, n)) < 0.5
    ratio = seconds(lambda: roc_curve(member[0], scores[0])) / seconds(lambda: evaluate(scores, member))
    ratio_sort = seconds(lambda: evaluate(scores, member)) / seconds(lambda: np.argsort(scores[0]))
    print(f"threshold attack on {n:,} scores: scikit-learn's roc_curve / ours: {ratio:.1f}; ours / one sort: {ratio_sort:.1f}")

    models, n = (8, 2000) if QUICK else (64, 50_000)
    y, member = rng.integers(0, 10, n), member_masks(n, models, seed=0).numpy()
    logits = rng.normal(size=(models, n, 10)).astype(np.float32)
    start = time.perf_counter()
    audit({"logits": logits, "labels": y, "membership": member, "adv_logits": logits[:, :, ::-1].copy()})
    print(f"report of {models} models x {n:,} samples, clean and adversarial, 17 attacks: "
          f"{(time.perf_counter() - start) / 60:.2f} of a minute")


if __name__ == "__main__":
    main()
