"""The measuring half against the plain algorithms that public code uses, in one run on one thread; prints ratios.

    python benchmarks/measures.py [--quick]

The plain versions are written here, as one would write them from the papers. CPU time, the least of a few rounds, ours and
theirs in turn; where the plain version would take minutes it is timed on a part of the work and scaled up (said in the row).
"""

from __future__ import annotations

import platform
import sys
import time
import tracemalloc

import numpy as np
import scipy
import sklearn
from sklearn.metrics import roc_curve

from demem_lab.audit import audit
from demem_lab.data import member_masks
from demem_lab.leakage import evaluate
from demem_lab.membership import lira, rmia
from demem_lab.risk import memorization

QUICK = "--quick" in sys.argv


def seconds(*actions, rounds: int = 3) -> list[float]:
    """Least CPU seconds of each action, in turn."""
    best = [float("inf")] * len(actions)
    for _ in range(rounds):
        for number, action in enumerate(actions):
            start = time.process_time()
            action()
            best[number] = min(best[number], time.process_time() - start)
    return best


def gigabytes(action) -> float:
    """The most memory that an action held at a time, beside its arguments."""
    tracemalloc.start()
    action()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most / 1e9


def machine() -> str:
    """What was measured on, in words."""
    try:
        with open("/proc/cpuinfo") as lines:
            cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    versions = {"Python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__}
    return f"{cpu}, {', '.join(f'{name} {v}' for name, v in versions.items())}, scikit-learn {sklearn.__version__}"


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
    print(machine())
    n = 2000 if QUICK else 10_000
    signal, member = game(4, n)
    p, everyone = 1 / (1 + np.exp(-signal)), np.ones(n, dtype=bool)
    assert np.allclose(rmia(p, member, population=everyone)[0], pairwise_rmia(p, member, 0))
    pairs, ours = seconds(lambda: pairwise_rmia(p, member, 0), lambda: rmia(p, member, population=everyone))
    print(f"RMIA on {n:,} x {n:,}: all pairs / ours (4 targets; pairs timed for one): {4 * pairs / ours:.0f}")

    models, n = (16, 2000) if QUICK else (128, 50_000)
    signal, member = game(models, n)
    assert np.allclose(lira(signal, member, variance="per_sample")[3], plain_lira(signal, member, 3), atol=1e-6)
    plain, ours = seconds(lambda: plain_lira(signal, member, 3), lambda: lira(signal, member), rounds=2)
    print(f"LiRA, every one of {models} models the target, {n:,} samples: again for each target / ours: "
          f"{models * plain / ours:.0f} ({ours:.1f} s, {gigabytes(lambda: lira(signal, member)):.2f} GB at its peak)")
    plain, ours = seconds(lambda: plain_memorization(signal, member), lambda: memorization(signal, member), rounds=2)
    print(f"memorization scores, the same table: sample by sample / ours: {plain / ours:.1f}")

    n = 50_000 if QUICK else 1_000_000
    rng = np.random.default_rng(0)
    scores, member = rng.normal(size=(1, n)), rng.random((1, n)) < 0.5
    theirs, ours, sort = seconds(
        lambda: roc_curve(member[0], scores[0]), lambda: evaluate(scores, member), lambda: np.argsort(-scores[0])
    )
    print(f"threshold attack on {n:,} scores: scikit-learn's roc_curve / ours: {theirs / ours:.1f}; "
          f"ours / one sort: {ours / sort:.1f}")

    models, n = (8, 2000) if QUICK else (64, 50_000)
    y, member = rng.integers(0, 10, n), member_masks(n, models, seed=0).numpy()
    logits = rng.normal(size=(models, n, 10)).astype(np.float32)
    arrays = {"logits": logits, "labels": y, "membership": member, "adv_logits": logits[:, :, ::-1].copy()}
    (ours,) = seconds(lambda: audit(arrays).to_html(), rounds=1)
    print(f"report of {models} models x {n:,} samples, clean and adversarial, 17 attacks, as HTML: {ours / 60:.2f} of a minute")


if __name__ == "__main__":
    main()
