"""The contest's own measures: benchmarks/contest.py."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
contest = pytest.importorskip("contest")  # `resource`, which it reads the time from, is not everywhere


def halves(models, n, seed=0):
    rng = np.random.default_rng(seed)
    first = np.stack([rng.permutation(n) < n // 2 for _ in range(models // 2)])
    return np.concatenate([first, ~first])


def test_expected_leave_reads_neither_the_target_nor_its_twin():
    rng = np.random.default_rng(1)
    members = halves(6, 40)
    until = np.where(members, rng.random(members.shape), 1.0)
    found = contest.expected_leave(until, members)
    for m in range(6):
        others = [k for k in range(6) if k % 3 != m % 3]  # row k and k + 3 are twins
        for i in range(40):
            seen = [until[k, i] for k in others if members[k, i]]
            assert found[m, i] == pytest.approx(np.mean(seen) if seen else 1.0)


@pytest.mark.parametrize("by_target", [False, True])
def test_who_knows_the_schedule_sees_what_one_threshold_hides(by_target):
    # in every tenth of the schedule members score 1 above its level, and the levels are far apart
    models, n = 8, 1000
    rng = np.random.default_rng(2)
    members, when = halves(models, n), rng.permutation(n) / n
    level = 50 * np.floor(10 * when)
    score = level + members + 0.1 * rng.standard_normal(members.shape)
    run = SimpleNamespace(models=models, members=members, scores={"clean": score, "adversarial": score, "both": score})
    known = np.broadcast_to(when, members.shape).copy() if by_target else when
    found = contest.informed(run, known, 0.05)
    assert found["both queries"] < 0.15  # one threshold for all: the highest level's members
    assert found["by leave time, clean"] > 0.99
    blind = contest.informed(run, rng.permutation(n), 0.05)
    assert max(blind.values()) < 0.5
