"""The frontier of untreated training, and what an arm leaks beside it at the same robust accuracy."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from demem_lab.comparison import Comparison
from demem_lab.leakage import seed_interval
from demem_lab.matched import at_matched, efficient

POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=20)


@given(POINTS)
def test_the_frontier_is_who_is_not_beaten(points):
    x, y = np.array(points, dtype=float).T
    kept = efficient(x, y)
    beaten = [any((x[j] >= x[i] and y[j] < y[i]) or (x[j] > x[i] and y[j] <= y[i]) for j in range(len(x))) for i in range(len(x))]
    assert {(x[i], y[i]) for i in kept} == {(x[i], y[i]) for i in range(len(x)) if not beaten[i]}
    assert (np.diff(x[kept]) > 0).all() and (np.diff(y[kept]) > 0).all()


def report(**arms):
    """arm -> one (robust, leak) for each seed."""
    rows = [
        (arm.replace("_", " "), seed, "all", metric, value)
        for arm, points in arms.items() for seed, point in enumerate(points)
        for metric, value in zip(("robust", "leak"), point, strict=True)
    ]
    return Comparison(pd.DataFrame(rows, columns=["arm", "seed", "group", "metric", "value"]), 0.01, {})


STRONG, MIDDLE, WEAK = [(0.8, 0.2), (0.82, 0.22), (0.78, 0.2)], [(0.7, 0.1), (0.72, 0.1), (0.68, 0.12)], [(0.5, 0.05)] * 3
CONTROLS = ["strong", "middle", "weak"]


def test_interpolated_seed_by_seed():
    arm = [(0.75, 0.1), (0.6, 0.05), (0.78, 0.1)]
    found = at_matched(report(strong=STRONG, middle=MIDDLE, weak=WEAK, arm=arm), "arm", CONTROLS)
    wanted = [0.1 - 0.15, 0.05 - (0.05 + 0.05 * 0.1 / 0.22), 0.1 - 0.2]
    assert found == seed_interval(np.array(wanted))


def test_seeds_are_compared_by_which_they_are():
    """As many are not the same ones."""
    both = report(strong=STRONG, middle=MIDDLE, arm=[(0.75, 0.1)] * 3)
    for name in ("arm", "middle"):
        rows = both.rows.assign(seed=both.rows.seed + 3 * (both.rows.arm == name))
        with pytest.raises(ValueError, match="needs the same seeds"):
            at_matched(Comparison(rows, 0.01, {}), "arm", ["strong", "middle"])


def test_a_seed_in_which_the_controls_change_places():
    strong, middle, arm = [(0.8, 0.2), (0.6, 0.2), (0.8, 0.2)], [(0.7, 0.1)] * 3, [(0.75, 0.1), (0.65, 0.1), (0.75, 0.1)]
    found = at_matched(report(strong=strong, middle=middle, arm=arm), "arm", ["strong", "middle"])
    assert found.mean == pytest.approx(0.1 - 0.15)


def test_a_group_has_a_frontier_of_its_own():
    """Among those at risk the weak control leaks more than the strong one, and is no longer on the frontier."""
    points = {"strong": (0.8, 0.2, 0.5), "weak": (0.7, 0.1, 0.6), "arm": (0.75, 0.1, 0.4)}
    named = (("all", "robust"), ("all", "leak"), ("at risk", "leak"))
    rows = [
        (arm, seed, *name, value)
        for arm, point in points.items() for seed in (0, 1) for name, value in zip(named, point, strict=True)
    ]
    both = Comparison(pd.DataFrame(rows, columns=["arm", "seed", "group", "metric", "value"]), 0.01, {})
    assert at_matched(both, "arm", ["strong", "weak"]).mean == pytest.approx(0.1 - 0.15)
    assert at_matched(both, "arm", ["strong", "weak"], group="at risk") is None  # less robust than the one that is left


def test_a_control_matches_itself_and_a_beaten_control_is_not_on_the_frontier():
    r = report(strong=STRONG, middle=MIDDLE, weak=WEAK, beaten=[(0.69, 0.3)] * 3)
    assert at_matched(r, "middle", [*CONTROLS, "beaten"]).mean == pytest.approx(0, abs=1e-12)
    assert at_matched(r, "beaten", [*CONTROLS, "beaten"]).mean > 0.15


def test_more_robust_than_any_control_is_compared_with_the_most_robust():
    found = at_matched(report(strong=STRONG, middle=MIDDLE, arm=[(0.9, 0.1)] * 3), "arm", ["strong", "middle"])
    assert found.mean == pytest.approx(0.1 - np.mean([0.2, 0.22, 0.2]))


def test_weaker_than_any_control_cannot_be_matched():
    assert at_matched(report(strong=STRONG, arm=[(0.85, 0.1), (0.85, 0.1), (0.6, 0.1)]), "arm", ["strong"]) is None


def test_bad_input():
    with pytest.raises(ValueError, match="the same seeds"):
        at_matched(report(strong=STRONG, arm=[(0.9, 0.1)] * 2), "arm", ["strong"])
    with pytest.raises(ValueError, match="finite"):
        efficient(np.array([0.1, np.nan]), np.array([0.1, 0.2]))
    with pytest.raises(ValueError, match="at least one"):
        efficient(np.array([]), np.array([]))
