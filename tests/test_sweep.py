"""Each point of the plane against the same arm trained by itself, and the slider's rule against brute force."""

from dataclasses import dataclass, fields, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from demem_lab import risk
from demem_lab.comparison import measure
from demem_lab.experiment import Experiment
from demem_lab.live import Watch
from demem_lab.mechanisms import DPSGD, SelectiveDP
from demem_lab.sampling import Shuffled
from demem_lab.signals import confidence
from demem_lab.store import Store
from demem_lab.sweep import COLUMNS, Plane, onion, recommend, sweep, train_point

NOISES, FRACTIONS = (0.0, 2.0), (0.0, 0.2, 1.0)


@pytest.fixture(scope="module")
def plane(lab):
    return sweep(lab, noise_multipliers=NOISES, fractions=FRACTIONS, seed=0, lr_everybody=lambda sigma: 0.02)


def test_the_plane_has_nobody_once_and_every_other_pair(plane, lab):
    pairs = list(zip(plane.points["noise_multiplier"], plane.points["fraction"], strict=True))
    assert pairs == [(0, 0), (0, 0.2), (0, 1), (2, 0.2), (2, 1)] and plane.models == lab.tuning_models == 4
    assert plane.points["protected"].tolist() == [0, 24, 120, 24, 120]
    assert plane.points["lr"].tolist() == [0.1, 0.1, 0.02, 0.1, 0.02]  # tuned rates only where everybody is protected
    assert np.array_equal(plane.scores, lab.risk(0).score) and plane.fpr == 0.1
    assert plane.points["risk_threshold"].tolist() == [
        np.inf, *[np.sort(plane.scores)[-24], -np.inf] * 2,
    ]


def arms(lab):
    some = lab.flags(0, 0.2)
    return {
        (0.0, 0.0): {},
        (0.0, 1.0): {"mechanism": DPSGD(0.0), "lr": 0.02}, (2.0, 1.0): {"mechanism": DPSGD(2.0), "lr": 0.02},
        (0.0, 0.2): {"mechanism": SelectiveDP(0.0, 1.0, some)}, (2.0, 0.2): {"mechanism": SelectiveDP(2.0, 1.0, some)},
    }


def test_every_point_is_the_arm_of_its_own(plane, lab):
    """Nobody protected is plain training, everybody is DP-SGD: same members, same seeds, same numbers."""
    top = risk.protected_set(lab.risk(0).score, fraction=0.1).mask
    for (sigma, fraction), changes in arms(lab).items():
        run = lab.run("alone", seed=0, models=4, **changes)
        found = measure(run, {"high risk": top, "rest": ~top}, fpr=plane.fpr)
        p = plane.points
        point = p[(p["noise_multiplier"] == sigma) & (p["fraction"] == fraction)].iloc[0]
        for column, place in COLUMNS.items():  # sums in another order: a sample on the fence may fall to the other side
            slack = 0.1 if place[0] == "high risk" else 0.03
            assert point[column] == pytest.approx(found[place], abs=slack), (sigma, fraction, column)
        if run.guarantee.holds:
            assert point["guarantee"] == str(run.guarantee)
        else:
            assert point["guarantee"].startswith("no guarantee: ")
        expected = run.guarantee.budget.epsilon if run.guarantee.holds else np.nan
        assert point["epsilon"] == pytest.approx(expected, nan_ok=True)
    assert plane.points["epsilon"].notna().tolist() == [False, False, False, True, True]


def test_logits_of_the_plane_are_those_of_the_arms(lab, monkeypatch):
    seen = []
    real = type(lab).tables

    def spy(self, name, *arguments, **named):
        run = real(self, name, *arguments, **named)
        seen.append((name, run))
        return run

    monkeypatch.setattr(type(lab), "tables", spy)
    sweep(lab, noise_multipliers=NOISES, fractions=FRACTIONS, seed=0, lr_everybody=lambda sigma: 0.02)
    run = next(run for name, run in seen if name == "plane")
    for number, pair in enumerate([(0, 0), (0, 0.2), (0, 1), (2, 0.2), (2, 1)]):
        alone = lab.run("alone", seed=0, models=4, **arms(lab)[pair])
        part = run.part(slice(4 * number, 4 * number + 4))
        assert np.array_equal(part.members, alone.members)
        assert np.median(abs(part.clean - alone.clean)) < 1e-3, pair


def test_the_second_time_nothing_is_trained(plane, lab, monkeypatch):
    monkeypatch.setattr("demem_lab.training.train", lambda *a, **k: pytest.fail("trained again"))
    again = sweep(lab, noise_multipliers=NOISES, fractions=FRACTIONS, seed=0, lr_everybody=lambda sigma: 0.02)
    pd.testing.assert_frame_equal(again.to_frame(), plane.to_frame())


def made_plane():
    points = [(0.0, 0.0, 0)] + [(s, f, round(100 * f)) for s in (0.5, 1.0, 3.0) for f in (0.05, 0.3, 1.0)]
    frame = pd.DataFrame(points, columns=["noise_multiplier", "fraction", "protected"]).assign(added=False)
    return Plane(frame, np.arange(100) // 5 / 10, np.zeros((len(points), 100)), 0, 4, 0.1)


@given(st.floats(0, 5), st.floats(-1, 3) | st.sampled_from([np.inf, -np.inf, *np.arange(20) / 10]))
def test_the_nearest_trained_point_by_brute_force(noise, threshold):
    made = made_plane()
    wanted = sum(s >= threshold for s in made.scores)
    best = min(
        range(len(made.points)),
        key=lambda i: (abs(made.points["protected"][i] - wanted), abs(made.points["noise_multiplier"][i] - noise)),
    )
    found = made.nearest(noise_multiplier=noise, risk_threshold=threshold)
    assert found.name == best and found["protected"] == made.points["protected"][best]  # a trained point, named


def test_infinite_thresholds_are_nobody_and_everybody(plane):
    assert plane.nearest(noise_multiplier=3.0, risk_threshold=np.inf)["fraction"] == 0
    everybody = plane.nearest(noise_multiplier=1.4, risk_threshold=-np.inf)
    assert (everybody["fraction"], everybody["noise_multiplier"]) == (1, 2)


extras = st.tuples(st.floats(0, 5) | st.sampled_from([0.5, 1.0, 3.0]), st.integers(1, 99) | st.sampled_from([5, 30]))


@given(st.floats(0, 5), st.floats(-1, 3), st.lists(extras, max_size=3))
@example(1.5, 1.85, [(1.4, 5)])  # as near in people as the column that the sweep has
@example(1.5, 1.85, [(2.0, 6)])  # as near in noise
def test_an_added_point_is_taken_where_it_is_at_least_as_near_in_both(noise, threshold, extra):
    made = made_plane()
    new = pd.DataFrame([(s, c / 100, c, True) for s, c in extra], columns=made.points.columns).astype(made.points.dtypes)
    rows = pd.concat([made.points, new], ignore_index=True)
    both = replace(made, points=rows, after=np.zeros((len(rows), 100)))
    wanted = sum(s >= threshold for s in made.scores)
    old = made.nearest(noise_multiplier=noise, risk_threshold=threshold)

    def off(point):
        return abs(point["protected"] - wanted), abs(point["noise_multiplier"] - noise)

    added = [p for _, p in rows[rows["added"]].iterrows()]
    better = [p for p in added if all(a <= b for a, b in zip(off(p), off(old), strict=True))]
    found = both.nearest(noise_multiplier=noise, risk_threshold=threshold)
    if better:
        assert found["added"] and sum(off(found)) == min(sum(off(p)) for p in better)
    else:
        assert found.name == old.name


def test_a_point_trained_later_is_the_point_the_sweep_would_have_trained(plane, lab):
    """Same members, seeds, set and rate; compared with a sweep that has it, with the arm of its own, and after."""
    cut = risk.protected_set(plane.scores, fraction=0.35).risk_threshold
    more = train_point(lab, plane, noise_multiplier=1.3, risk_threshold=cut, tuned=False)
    row = more.points.iloc[-1]
    assert len(more.points) == len(plane.points) + 1 == len(more.after) and bool(row["added"])
    pd.testing.assert_frame_equal(more.points.iloc[:-1], plane.points)
    whole = sweep(lab, noise_multipliers=(1.3,), fractions=(0.2, 0.35), seed=0).points
    theirs = whole[whole["fraction"] == 0.35].iloc[0]
    for column in ("noise_multiplier", "fraction", "risk_threshold", "protected", "lr", "epsilon", "guarantee"):
        assert row[column] == theirs[column], column
    for column, place in COLUMNS.items():  # sums in another order: a sample on the fence may fall to the other side
        assert row[column] == pytest.approx(theirs[column], abs=0.1 if place[0] == "high risk" else 0.03), column
    alone = lab.run("alone", seed=0, models=4, mechanism=SelectiveDP(1.3, 1.0, lab.flags(0, 0.35)))
    p, inside = confidence(alone.adversarial, alone.y), alone.members
    score = [p[inside[:, i], i].mean() - p[~inside[:, i], i].mean() for i in range(120)]
    assert np.median(abs(more.after[-1] - score)) < 1e-3
    chosen = more.nearest(noise_multiplier=1.3, risk_threshold=cut)
    assert chosen.name == row.name


def test_the_same_point_twice_comes_from_the_store_or_from_the_plane(plane, lab, monkeypatch):
    first = train_point(lab, plane, noise_multiplier=0.7, risk_threshold=0.0, tuned=False)
    monkeypatch.setattr("demem_lab.training.train", lambda *a, **k: pytest.fail("trained again"))
    again = train_point(lab, plane, noise_multiplier=0.7, risk_threshold=0.0, tuned=False)
    pd.testing.assert_frame_equal(again.points, first.points)
    assert train_point(lab, first, noise_multiplier=0.7, risk_threshold=0.0) is first
    assert train_point(lab, plane, noise_multiplier=0.7, risk_threshold=np.inf) is plane  # nobody: no noise, already there
    assert train_point(lab, plane, noise_multiplier=2.0, risk_threshold=-np.inf) is plane


def test_everybody_protected_has_its_rate_tuned_first(plane, lab):
    more = train_point(lab, plane, noise_multiplier=1.5, risk_threshold=-np.inf)
    assert more.points.iloc[-1]["lr"] == lab.rate_for_everybody(1.5) and more.points.iloc[-1]["fraction"] == 1
    # the threshold looked at the data; a fraction of 1 does not
    of_fraction = more.points[(more.points["fraction"] == 1) & ~more.points["added"] & (more.points["noise_multiplier"] > 0)]
    assert "given the set; end to end: none" in more.points.iloc[-1]["guarantee"]
    assert len(of_fraction) and not of_fraction["guarantee"].str.contains("end to end").any()


def test_a_cancelled_point_leaves_nothing_half_done(plane, lab):
    def kinds():
        return sorted((row["kind"], row["key"]) for row in lab.store.entries() if row["kind"] != "checkpoint")

    before, seen = kinds(), []
    watch = Watch(lambda moment: (seen.append(moment.step), watch.stop.set()))
    with pytest.raises(KeyboardInterrupt):
        train_point(replace(lab, watch=watch), plane, noise_multiplier=2.7, risk_threshold=0.05)
    assert seen and max(seen) <= 2 and kinds() == before
    ready = train_point(lab, plane, noise_multiplier=2.7, risk_threshold=0.05)  # goes on from there
    fresh = replace(lab, store=Store(lab.store.root.parent / "other"))
    pd.testing.assert_frame_equal(ready.points, train_point(fresh, plane, noise_multiplier=2.7, risk_threshold=0.05).points)


def test_stopping_while_the_models_are_asked_is_possible_too(plane, lab):
    watch = Watch(lambda moment: moment.step == moment.steps and watch.stop.set())
    with pytest.raises(KeyboardInterrupt):
        train_point(replace(lab, watch=watch), plane, noise_multiplier=2.9, risk_threshold=0.05)


def test_the_next_layer_by_brute_force(plane):
    for _, point in plane.points.iterrows():
        count = int(point["protected"])
        first = set(sorted(range(120), key=lambda i: (-plane.scores[i], i))[:count])
        others = sorted(set(range(120)) - first, key=lambda i: (-plane.after[point.name][i], i))
        assert plane.surfaced(point, 30).tolist() == others[:30]


@pytest.mark.parametrize(("call", "words"), [
    (lambda p, lab: p.nearest(noise_multiplier=1, risk_threshold=float("nan")), "NaN"),
    (lambda p, lab: p.nearest(noise_multiplier=-1, risk_threshold=0), "noise_multiplier"),
    (lambda p, lab: p.nearest(noise_multiplier=float("inf"), risk_threshold=0), "noise_multiplier"),
    (lambda p, lab: sweep(lab, noise_multipliers=(1, 1.0), fractions=(0.1,), seed=0), "must not repeat"),
    (lambda p, lab: sweep(lab, noise_multipliers=(1,), fractions=(0, 0.0), seed=0), "must not repeat"),
    (lambda p, lab: sweep(lab, noise_multipliers=(1,), fractions=(1.2,), seed=0), "fraction"),
    (lambda p, lab: sweep(lab, noise_multipliers=(-1,), fractions=(0.2,), seed=0), "noise multiplier"),
    (lambda p, lab: sweep(lab, noise_multipliers=(), fractions=(0.2,), seed=0), r"noise_multipliers must be a list .*got \(\)"),
    (lambda p, lab: sweep(lab, noise_multipliers=1.0, fractions=(0.2,), seed=0), "noise_multipliers must be a list .*got 1.0"),
    (lambda p, lab: sweep(lab, noise_multipliers=(1.0,), fractions=[], seed=0), "fractions must be a list"),
    (lambda p, lab: sweep(lab, noise_multipliers=("1",), fractions=(0.2,), seed=0), "a noise multiplier must be a number"),
    (lambda p, lab: sweep(lab, noise_multipliers=(1,), fractions=(0.2,), seed=0, models=0), "models must be"),
])
def test_bad_input(plane, lab, call, words):
    with pytest.raises(ValueError, match=words):
        call(plane, lab)


def test_the_recommendation_is_the_most_robust_point_that_passes_and_is_judged_on_other_seeds(lab):
    three = replace(lab, seeds=(0, 1, 2))
    plane = sweep(three, noise_multipliers=NOISES, fractions=FRACTIONS, seed=0)
    p = plane.points
    worst = np.max([p[f"leak{g}"].astype(float) - p[f"accused{g}"].astype(float) for g in ("", ", high risk", ", rest")], axis=0)
    target = max(0.0, float(np.median(worst)))
    found = recommend(three, plane, target)
    passing = p[worst <= target]
    assert found.point["robust"] == passing["robust"].max() and set(found.judged) == {"all", "high risk", "rest"}
    for group, interval in found.judged.items():
        assert interval.n == 2 and group in ("all", "high risk", "rest")
    assert found.holds == all(i.high <= target for i in found.judged.values())
    # what judges is what the arm shows at the other two seeds
    sigma, fraction = found.point["noise_multiplier"], found.point["fraction"]
    values = []
    for seed in (1, 2):
        top = three.flags(seed, 0.1).numpy()
        changes = {"mechanism": SelectiveDP(sigma, 1.0, three.flags(seed, fraction))} if 0 < fraction < 1 else (
            {"mechanism": DPSGD(sigma)} if fraction else {}
        )
        run = three.run("again", seed=seed, **changes)
        shown = measure(run, {"rest": ~top}, fpr=plane.fpr)
        values.append(shown["rest", "leak"] - shown["rest", "accused"])
    assert found.judged["rest"].mean == pytest.approx(np.mean(values), abs=0.02)
    limit = np.mean(values) + 6.3138 * np.std(values, ddof=1) / np.sqrt(2)
    assert found.judged["rest"].high == pytest.approx(limit, abs=0.1)
    assert ("It holds" in str(found)) == found.holds


def test_no_setting_is_said_plainly_and_one_judging_seed_is_refused(lab, plane):
    three = replace(lab, seeds=(0, 1, 2))
    p = plane.points.assign(leak=0.5, accused=0.1)
    answer = recommend(three, replace(plane, points=p), 0.01)
    assert answer.point is None and not answer.holds and "None of the settings" in str(answer)
    with pytest.raises(ValueError, match="at least 2 seeds"):
        recommend(lab, plane, 0.5)
    with pytest.raises(ValueError, match="target"):
        recommend(three, plane, 2.0)


def test_a_setting_that_passes_by_luck_on_the_plane_is_not_recommended(lab, plane):
    three = replace(lab, seeds=(0, 1, 2))
    lucky = plane.points.assign(**dict.fromkeys(["leak", "leak, high risk", "leak, rest"], 0.0))
    answer = recommend(three, replace(plane, points=lucky), 0.0001)
    assert answer.point is not None and not answer.holds and "does not hold" in str(answer)


def test_the_onion_goes_on_until_nobody_or_everybody(lab):
    impossible = onion(lab, target=0.0, layer=0.4)
    assert impossible.steps["protected"].tolist() == [0, 48, 96, 120] and len(impossible.runs) == 4
    assert impossible.reached == (impossible.steps["worst leak"].iloc[-1] <= 0)
    easy = onion(lab, target=1.0, layer=0.4)
    assert easy.reached and easy.steps["layers"].tolist() == [0]
    for before, after in zip(impossible.runs[1:], impossible.runs[2:], strict=False):  # a layer is never taken off again
        assert all((b.flagged <= a.flagged).all() for b, a in zip(before, after, strict=True))


def test_the_first_layer_is_the_riskiest_and_the_second_those_who_surfaced(lab):
    found = onion(lab, target=0.0, layer=0.25, max_layers=2)
    for run in found.runs[1]:
        assert np.array_equal(run.flagged, lab.flags(run.seed, 0.25).numpy())
    for run in found.runs[2]:
        first = lab.flags(run.seed, 0.25).numpy()
        score = np.where(first, -np.inf, lab.risk(run.seed, found.runs[1]).score)
        assert np.array_equal(run.flagged & ~first, risk.protected_set(score, fraction=0.25).mask)
    with pytest.raises(ValueError, match="layer"):
        onion(lab, target=0.1, layer=0.0)


@dataclass(frozen=True)
class Shuffling(Experiment):
    """A lab whose arms draw whole epochs."""

    def recipe(self, **changes):
        return replace(super().recipe(**changes), sampler=Shuffled(self.batch_size))


def test_points_know_how_batches_were_drawn_and_each_promises_its_own(lab, plane):
    settings = {f.name: getattr(lab, f.name) for f in fields(lab)}
    points = sweep(Shuffling(**settings), noise_multipliers=(1.0,), fractions=(0.0, 0.2), seed=0).points
    assert "nobody is protected" not in points["guarantee"][1] and "not Poisson samples" in points["guarantee"][1]
    assert points["epsilon"].isna().all()
    for _, point in plane.points.iterrows():
        holds = point["noise_multiplier"] > 0 and point["protected"] > 0
        assert (point["epsilon"] is not None and not np.isnan(point["epsilon"])) == holds, point["guarantee"]
        assert "models differ" not in point["guarantee"]
