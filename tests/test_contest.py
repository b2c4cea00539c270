"""The contest's own measures: benchmarks/contest.py."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_comparison import made_run

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
def test_who_knows_the_schedule_sees_what_one_threshold_hides(by_target, monkeypatch):
    # in every tenth of the schedule members score 1 above its level, and the levels are far apart
    models, n = 8, 1000
    rng = np.random.default_rng(2)
    members, when = halves(models, n), rng.permutation(n) / n
    level = 50 * np.floor(10 * when)
    score = level + members + 0.1 * rng.standard_normal(members.shape)
    run = SimpleNamespace(
        models=models, members=members, scores={"clean": score, "adversarial": score, "both": score}, clean=score,
        adversarial=score, y=None,
    )
    # the shadow models' scores are what these tables say, whoever their references are
    monkeypatch.setattr(contest, "logit_margin", lambda table, y: table)
    monkeypatch.setattr(contest, "lira", lambda signal, members: signal if signal.ndim == 2 else signal[0])
    known = np.broadcast_to(when, members.shape).copy() if by_target else when
    found = contest.informed(run, known, 0.05)
    assert found["both queries"] < 0.15  # one threshold for all: the highest level's members
    assert found["by leave time, clean"] > 0.99
    blind = contest.informed(run, rng.permutation(n), 0.05)
    assert max(blind.values()) < 0.5


def test_who_knows_the_schedule_finds_nothing_where_there_is_nothing():
    """Signals drawn without regard to membership. With the target among the shadow models' references, 11.8 % were found."""
    models, n, rates = 8, 1000, []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        run = made_run(seed=seed)
        run = replace(
            run, y=np.zeros(n, dtype=int), members=halves(models, n, seed), clean=rng.normal(size=(models, n, 2)),
            adversarial=rng.normal(size=(models, n, 2)),
        )
        rates.append(contest.informed(run, rng.random(n), 0.1))
    for attack in rates[0]:  # 50 of 500 non-members may be accused: of members as good as these, 51 in 501 are found
        assert np.mean([r[attack] for r in rates]) == pytest.approx(51 / 501, abs=0.006), attack
