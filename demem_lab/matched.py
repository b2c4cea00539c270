"""Is an arm better, or only weaker? Its leak against that of untreated training which is just as robust.

>>> at_matched(report, "drop", ["none", "half the epochs", "weight decay"])                     # doctest: +SKIP
Interval(mean=-0.012, low=-0.02, high=-0.004, n=3)

Any weaker training leaks less, so "less leak" alone says little. Here the untreated method is trained more or less (epochs,
weight decay), which draws a frontier of leak against robust accuracy; an arm counts as better only below that frontier.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from demem_lab.comparison import Comparison
from demem_lab.leakage import Interval, seed_interval


def efficient(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """int: which points [P] are on the frontier of much x and little y, from the smallest x to the largest.

    A point is on it when no other has at least its x and less y (of equal points the first is kept).
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or not len(x) or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a frontier needs one finite x and y for each of at least one point")
    kept, lowest = [], np.inf
    for point in np.lexsort((y, -x)):
        if y[point] < lowest:
            kept.append(int(point))
            lowest = y[point]
    return np.array(kept[::-1])


def at_matched(
    report: Comparison, arm: str, controls: Sequence[str], *, metric: str = "leak", group: str = "all", keep: str = "robust"
) -> Interval | None:
    """`metric` of `arm` minus that of the untreated `controls` at the arm's own `keep`, 95 % t-interval over seeds.

    Negative is better than any mere weakening tried. Which controls form the frontier is decided on the means over seeds;
    along it each seed interpolates its own values, so what seeds share cancels. An arm above the most robust control is
    compared with that control, which is to the arm's disadvantage. None: in some seed the arm is less robust than every
    control on the frontier, so nothing can be matched; train a weaker control.
    """
    means = [np.array([report.mean(c, m, g) for c in controls]) for m, g in ((keep, "all"), (metric, group))]
    names = [list(controls)[i] for i in efficient(*means)]
    wanted = [(name, what, of) for name in (arm, *names) for what, of in ((keep, "all"), (metric, group))]
    seeds = {(name, what): list(report.by_seed(name, what, of).index) for name, what, of in wanted}
    for (name, what), found in seeds.items():
        if found != seeds[arm, keep]:
            raise ValueError(
                f"{arm!r} has {keep!r} at seeds {seeds[arm, keep]}, {name!r} has {what!r} at {found}; a matched comparison needs "
                "the same seeds"
            )
    x = np.stack([report.values(name, keep) for name in names])  # [controls, seeds]
    y = np.stack([report.values(name, metric, group) for name in names])
    own = report.values(arm, keep)
    if (own < x.min(0)).any():
        return None
    order = x.argsort(0)
    x, y = np.take_along_axis(x, order, 0), np.take_along_axis(y, order, 0)
    matched = np.array([np.interp(r, xs, ys) for r, xs, ys in zip(own, x.T, y.T, strict=True)])
    return seed_interval(report.values(arm, metric, group) - matched)
