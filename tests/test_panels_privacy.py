"""The Budget panel against dp_accounting itself, the DeMem panel against the plane; training only where its button says so."""

import re
import threading
from dataclasses import replace

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from demem_lab import controls, panels_privacy, training, views_privacy, words_privacy
from demem_lab.accounting import NoGuarantee, bound, budget
from demem_lab.comparison import compare
from demem_lab.mechanisms import DPSGD, Drop
from demem_lab.panels_privacy import BudgetPanel, DeMemPanel
from demem_lab.store import Store
from demem_lab.sweep import sweep, train_point
from demem_lab.words_privacy import Setting, nearest_point, next_layer

GROUPS = ("lowest half", "highest tenth")
RATE, STEPS, DELTA = 64 / 898.5, 42, 1e-4
NOISES, FRACTIONS = (0.0, 1.0, 3.0), (0.0, 0.1, 1.0)


@pytest.fixture(autouse=True)
def no_earlier_positions(monkeypatch):
    monkeypatch.setattr(controls, "_positions", {})
    monkeypatch.setattr(panels_privacy, "_grown", {})


def text(panel):
    return re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", panel.readout.value + panel.details.value))


def traces(panel):
    return {trace.name: trace for trace in panel.figure.data}


def event(sigma, rate, steps):
    return dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(sigma)), steps)


def point(sigma):
    rng = np.random.default_rng(int(10 * sigma))
    names = ["accuracy", "robust", "leak", *(f"{m}, {g}" for g in GROUPS for m in ("robust", "leak"))]
    spent = budget(noise_multiplier=sigma, sampling_rate=RATE, steps=STEPS, delta=DELTA)
    place = {"noise_multiplier": sigma, "fpr": 0.01, "budget": spent}
    return place | dict(zip(names, rng.random(len(names)), strict=True)) | {"guarantee": f"promise {sigma:g}"}


POINTS, PLAIN = [point(s) for s in (0.0, 0.5, 1.0, 3.0)], point(9.0)


@pytest.fixture
def budget_panel(monkeypatch):
    monkeypatch.setattr(training, "train", lambda *_, **__: pytest.fail("the Budget panel must not train"))
    return BudgetPanel(POINTS, PLAIN, batch_size=64, sampling_rate=RATE, steps=STEPS, delta=DELTA)


@pytest.fixture(scope="module")
def plane(lab):
    return sweep(lab, noise_multipliers=NOISES, fractions=FRACTIONS, seed=0, lr_everybody=lab.rate_for_everybody)


@pytest.fixture(scope="module")
def report(lab, plane):
    runs = [*lab.arm("none"), *lab.treat("drop", Drop, fraction=0.1), *lab.arm("DP for everybody", mechanism=DPSGD(1.0))]
    return compare([run.part(slice(0, plane.models)) for run in runs], fpr=plane.fpr)


def test_epsilon_follows_every_control_and_is_the_accountants(budget_panel):
    panel = budget_panel
    panel.noise.value = 0.8
    for control, value in (("batch", 100), ("steps", 77), ("power", -6.0), ("noise", 2.3)):
        getattr(panel, control).value = value
        if panel._drawing:
            panel._drawing.join(30)
        sigma, rate = panel.noise.value, panel.batch.value / 898.5
        ledger = RdpAccountant().compose(event(sigma, rate, panel.steps.value))
        wanted = ledger.get_epsilon(10**panel.power.value)
        assert f"epsilon ≤ {bound(wanted)}" in text(panel)
        assert traces(panel)["your setting"].text[0].strip() == bound(wanted)  # one number, not two roundings of it
        seen = traces(panel)
        assert list(seen["your setting"].x) == [sigma] and seen["your setting"].y[0] == pytest.approx(wanted)
        place = 5  # any point of the curve
        there = RdpAccountant().compose(event(seen["RDP (upper bound)"].x[place], rate, panel.steps.value))
        assert seen["RDP (upper bound)"].y[place] == pytest.approx(there.get_epsilon(10**panel.power.value))
    panel.noise.value = 0.0
    assert "No guarantee : no noise is added" in text(panel) and traces(panel)["your setting"].y[0] is None


def test_pld_stands_at_trained_settings_and_elsewhere_on_demand(budget_panel):
    panel = budget_panel
    panel.noise.value = 1.0
    tight = PLDAccountant().compose(event(1.0, RATE, STEPS)).get_epsilon(DELTA)
    assert f"epsilon {bound(tight)} (PLD, tight)" in text(panel)
    assert list(traces(panel)["PLD (tight)"].x) == [0.5, 1.0, 3.0]
    panel.noise.value, panel.steps.value = 1.4, 50
    assert "(PLD, tight)" not in text(panel) and list(traces(panel)["PLD (tight)"].x) == []
    panel.seconds = 120
    panel.button.click()
    panel.job.join(120)
    tight = PLDAccountant().compose(event(1.4, RATE, 50)).get_epsilon(DELTA)
    assert f"epsilon {bound(tight)} (PLD, tight)" in text(panel) and not panel.button.disabled
    assert traces(panel)["PLD (tight)"].y[0] == pytest.approx(tight)
    panel.seconds, panel.noise.value = 0.01, 1.7
    panel.button.click()
    panel.job.join(30)
    assert "not ready after 0.01 s" in panel.status.value and "(PLD, tight)" not in text(panel)


def test_a_failing_accountant_is_shown(budget_panel, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("planted <failure>")

    monkeypatch.setattr(panels_privacy.accounting, "budget_in_time", broken)
    budget_panel.button.click()
    budget_panel.job.join(10)
    assert "planted &lt;failure&gt;" in budget_panel.status.value and not budget_panel.button.disabled
    monkeypatch.setattr(panels_privacy.accounting, "epsilon_curve", broken)
    budget_panel.batch.value = 70
    budget_panel._drawing.join(10)
    assert "planted &lt;failure&gt;" in budget_panel.status.value


def test_the_curve_waits_until_the_controls_rest_and_is_given_up_when_they_move_on(budget_panel, monkeypatch):
    panel, asked, original = budget_panel, [], panels_privacy.accounting.epsilon_curve

    def noted(sigmas, **given):
        asked.append(round(given["sampling_rate"] * panel.members))
        if asked.count(75) == 3 and panel.batch.value == 75:
            panel.batch.value = 80  # somebody moves on while the third point is computed
        return original(sigmas, **given)

    monkeypatch.setattr(panels_privacy.accounting, "epsilon_curve", noted)
    for value in range(70, 76):
        panel.batch.value = value
    panel._drawing.join(60)
    assert asked == [75] * 3 + [80] * panels_privacy.CURVE_POINTS
    wanted = original([traces(panel)["RDP (upper bound)"].x[4]], sampling_rate=80 / panel.members, steps=STEPS, delta=DELTA)
    assert traces(panel)["RDP (upper bound)"].y[4] == pytest.approx(wanted[0].epsilon)


def test_measured_numbers_are_those_of_the_nearest_trained_point(budget_panel):
    for asked, trained in ((0.0, 0), (0.2, 0), (0.3, 1), (0.8, 2), (1.0, 2), (2.4, 3), (6.0, 3)):
        budget_panel.noise.value = asked
        here, seen = POINTS[trained], traces(budget_panel)
        assert f"promise {here['noise_multiplier']:g}" in text(budget_panel)
        assert f"{100 * here['robust, highest tenth']:.1f} %" in text(budget_panel)
        lost = 100 * (here["robust, lowest half"] - PLAIN["robust, lowest half"])
        share = lost / PLAIN["robust, lowest half"]
        assert f"{lost:+.1f} ({share:+.0f} %)" in text(budget_panel)
        assert list(seen["nearest trained 1"].x) == [trained] * 2 == list(seen["nearest trained 2"].x)
        assert list(seen["with privacy"].y) == [100 * here[f"robust, {g}"] for g in GROUPS]
        assert list(seen["without privacy"].y) == [100 * PLAIN[f"robust, {g}"] for g in GROUPS]
        assert ("the nearest trained point" in text(budget_panel)) == (here["noise_multiplier"] != asked)
    assert list(traces(budget_panel)["leak, highest tenth"].y) == [100 * p["leak, highest tenth"] for p in POINTS]


def test_what_is_and_is_not_counted_is_said(budget_panel):
    said = text(budget_panel)
    assert "clip norm does not change epsilon" in said and "Accounted for: each single member" in said
    assert "Not accounted for: the learning rate" in said
    assert "It was trained with" not in said
    budget_panel.steps.value += 1
    assert "It was trained with batch size 64 and 42 steps" in text(budget_panel)


def test_what_could_not_be_measured_is_not_a_number():
    holes = [p | {"leak, highest tenth": None} for p in POINTS]
    panel = BudgetPanel(holes, PLAIN, batch_size=64, sampling_rate=RATE, steps=STEPS, delta=DELTA)
    assert "not resolved" in text(panel) and traces(panel)["leak, highest tenth"].y[0] is None


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_positions_that_do_not_exist(value):
    with pytest.raises(ValueError, match="noise_multiplier"):
        nearest_point(POINTS, value)


def test_the_demem_panel_shows_the_nearest_trained_point(lab, plane, report, monkeypatch):
    panel = DeMemPanel(lab, plane, report)
    monkeypatch.setattr(training, "train", lambda *_, **__: pytest.fail("no training without the button"))
    x, n = lab.dataset.x.numpy(), lab.dataset.n
    for sigma, threshold in ((0.0, 0.05), (0.9, 0.04), (2.5, -1.0), (1.0, 9.0), (3.0, 0.06)):
        panel.noise.value, panel.threshold.value = sigma, threshold
        wanted = plane.nearest(noise_multiplier=panel.noise.value, risk_threshold=panel.threshold.value)
        count, seen = int(wanted["protected"]), traces(panel)
        assert wanted["guarantee"] in text(panel).replace("&gt;", ">") and f"the {count} riskiest" in text(panel)
        assert ("Nobody is protected" in text(panel)) == (count == 0)
        assert seen["chosen"].x[0] == pytest.approx(100 * wanted["robust"])
        assert seen["chosen"].y[0] == pytest.approx(100 * wanted["leak"])
        assert seen["chosen on the map"].x[0] == FRACTIONS.index(wanted["fraction"])
        assert seen["chosen on the map"].y[0] == NOISES.index(wanted["noise_multiplier"])
        above = (plane.scores >= panel.threshold.value).mean()
        assert seen["the sliders"].x[0] == pytest.approx(np.interp(above, FRACTIONS, range(3)))
        riskiest = sorted(range(n), key=lambda i: (-plane.scores[i], i))[:count]
        shown = riskiest[::-1] if count <= 24 else [riskiest[::-1][round(k)] for k in np.linspace(0, count - 1, 24)]
        assert np.array_equal(seen["protected"].z, views_privacy.pictures_of(x[shown]).z)
        others = sorted(set(range(n)) - set(riskiest), key=lambda i: (-plane.after[wanted.name][i], i))[: count or n // 10]
        assert np.array_equal(seen["next layer"].z, views_privacy.pictures_of(x[others[:24]]).z)


def test_the_frontier_has_every_arm_with_its_interval_and_every_trained_point(lab, plane, report):
    seen = traces(DeMemPanel(lab, plane, report))
    for name in report.arms:
        across, up = report.interval(name, "robust"), report.interval(name, "leak")
        assert seen[name].x[0] == pytest.approx(100 * across.mean) and seen[name].y[0] == pytest.approx(100 * up.mean)
        assert seen[name].error_y.array[0] == pytest.approx(100 * (min(1, up.high) - up.mean))
        assert seen[name].error_x.arrayminus[0] == pytest.approx(100 * (across.mean - max(0, across.low)))
    assert list(seen["plane, one seed"].x) == pytest.approx([100 * v for v in plane.points["robust"]])
    assert len({(t.marker.color, t.marker.symbol) for t in (seen[a] for a in report.arms)}) == len(report.arms)


def test_the_words_tell_what_was_trained_from_what_is_nearest(plane):
    for _, chosen in plane.points.iterrows():
        for threshold in (np.inf, 0.1, 0.03, 0.0, -np.inf, chosen["risk_threshold"]):
            for noise in (chosen["noise_multiplier"], chosen["noise_multiplier"] + 0.3):
                said = words_privacy.demem_words(plane, chosen, noise_multiplier=noise, risk_threshold=threshold)
                exact = (plane.scores >= threshold).sum() == chosen["protected"]
                assert ("nearest trained set: the" in said, "; trained: the" in said) == (not exact, exact)
                elsewhere = noise != chosen["noise_multiplier"] and chosen["protected"] > 0
                point = f"the nearest trained point is <b>{chosen['noise_multiplier']:.3g}</b>"
                assert (point in said, "nearest trained point" in said) == (elsewhere, elsewhere)


def test_the_next_layer_counts_who_surfaced_and_its_control(plane):
    for _, chosen in plane.points.iterrows():
        found = next_layer(plane, chosen, risk_threshold=0.05)
        protected = set(np.argsort(-plane.scores, kind="stable")[: int(chosen["protected"])])
        cut = chosen["risk_threshold"] if np.isfinite(chosen["risk_threshold"]) else 0.05
        free = [i for i in range(len(plane.scores)) if i not in protected]
        assert found["above"] == sum(plane.after[chosen.name][i] >= cut for i in free)
        assert found["control"] == sum(plane.after[0][i] >= cut for i in free) and found["outside"] == len(free)
        words = words_privacy.demem_details(plane, chosen, risk_threshold=0.05)
        assert ("there is no next layer" in words) == (not free)


def test_the_button_trains_exactly_the_sliders_position(lab, plane, report):
    panel = DeMemPanel(lab, plane, report)
    panel.noise.value, panel.threshold.value = 1.7, 0.03
    noise, threshold = panel.noise.value, panel.threshold.value
    panel.train.click()
    panel.noise.value = 0.2  # somebody plays on meanwhile
    panel.job.join(60)
    assert panel.job.outcome == "done" and "trained: noise multiplier 1.7" in panel.status.value
    row, seen = panel.plane.points.iloc[-1], traces(panel)
    assert (row["noise_multiplier"], row["protected"]) == (noise, (plane.scores >= threshold).sum()) and row["added"]
    assert (panel.noise.value, panel.threshold.value) == (noise, threshold)  # it becomes the chosen one
    assert seen["chosen"].x[0] == 100 * row["robust"] == seen["trained here, one seed"].x[0]
    assert row["guarantee"] in text(panel) and seen["trained here"].text[0] == f"{100 * row['leak']:.1f}"
    assert list(seen["robust accuracy"].y) == [100 * v for v in panel.curve.points()["robust"]]
    assert list(seen["training loss"].x) == [1, 2] and panel.bar.value == 1
    assert not panel.train.disabled and panel.cancel.disabled
    panel.train.click()
    panel.job.join(60)
    assert "already on the chart" in panel.status.value and len(panel.plane.points) == len(plane.points) + 1
    panels_privacy._grown.clear()  # another session
    again = DeMemPanel(lab, plane, report)
    again.noise.value, again.threshold.value = noise, threshold
    again.train.click()
    again.job.join(60)
    assert "found in the store" in again.status.value
    assert again.plane.points.iloc[-1].equals(row)


def live_axes(panel):
    return [panel.figure.layout[f"{letter}axis{place[1:]}"].visible for letter, place in (
        ("x", traces(panel)["robust accuracy"].xaxis), ("y", traces(panel)["robust accuracy"].yaxis),
        ("y", traces(panel)["training loss"].yaxis),
    )]


def test_the_live_plot_has_axes_only_when_there_is_something_on_them(lab, plane):
    panel = DeMemPanel(lab, plane)
    assert live_axes(panel) == [False] * 3 and "train this point" in "".join(traces(panel)["live hint"].text)
    panel.noise.value = 0.35  # moving a slider is not training
    assert live_axes(panel) == [False] * 3
    panel.train.click()
    panel.job.join(60)
    assert live_axes(panel) == [True] * 3 and len(traces(panel)["live hint"].x) == 0
    panel.noise.value = 1.0  # the curve stays
    assert live_axes(panel) == [True] * 3
    others = {trace.xaxis for trace in panel.figure.data if trace.name in ("map", "chosen")}
    assert all(panel.figure.layout[f"xaxis{place[1:]}"].visible is not False for place in others)


@pytest.mark.parametrize("noise, up", [(0.9, False), (1.3, True)])
def test_a_star_covers_no_number(lab, plane, noise, up):
    """Trained beside a cell's middle: the cell's number and the star's own keep to opposite sides, outside the ring."""
    grown = train_point(lab, plane, noise_multiplier=noise, risk_threshold=float(np.quantile(plane.scores, 0.9)))
    row = grown.points.iloc[-1]
    panel = DeMemPanel(lab, grown)
    panel.noise.value, panel.threshold.value = noise, float(np.quantile(plane.scores, 0.9))
    seen, swept = traces(panel), plane.points.set_index(["noise_multiplier", "fraction"])["leak"]
    number = f"{100 * swept[1.0, 0.1]:.1f}"
    assert seen["chosen on the map"].y == seen["trained here"].y and round(seen["trained here"].y[0]) == 1
    cell = seen["map"].text[1][1].split("<br>")
    assert len(cell) == 3 and cell[2 if up else 0] == number and "".join(cell).strip() == number
    assert seen["trained here"].textposition == ("top center" if up else "bottom center",)
    assert seen["trained here"].text == (f"{100 * row['leak']:.1f}",)
    assert seen["chosen on the map"].marker.symbol == "circle-open" and len(seen["the sliders"].x) == 0
    panel.noise.value, panel.threshold.value = 3.0, -1.0
    seen = traces(panel)
    assert seen["chosen on the map"].marker.symbol == "square-open" and len(seen["the sliders"].x) == 1
    deep = [v for mark in panel.marks(row).values() for d in mark.values() if isinstance(d, dict) for v in d.values()]
    assert deep and not any(isinstance(v, dict) for v in deep)  # the browser's figure would stop following
    rest = [t for r in seen["map"].text for t in r if t != seen["map"].text[1][1]]
    assert rest and all("<br>" not in t for t in rest)


def test_what_was_trained_stays_when_the_cell_is_run_again(lab, plane, report):
    panel = DeMemPanel(lab, plane, report)
    panel.noise.value, panel.threshold.value = 1.9, 0.025
    panel.train.click()
    panel.job.join(60)
    again = DeMemPanel(lab, replace(plane, points=plane.points.copy()), report)  # computed anew, so another object
    assert again.plane.points.equals(panel.plane.points) and len(again.plane.points) == len(plane.points) + 1
    assert text(again) == text(panel) and "noise multiplier 1.9" in text(again)
    for name in ("trained here", "trained here, one seed", "chosen"):
        assert traces(again)[name].x == traces(panel)[name].x and len(traces(again)[name].x) == 1
    other = DeMemPanel(lab, replace(plane, seed=plane.seed + 1))  # other members: another chart
    assert len(other.plane.points) == len(plane.points)


def test_the_first_threshold_can_be_read_and_names_the_riskiest_tenth(lab, plane):
    panel = DeMemPanel(lab, plane)
    start = panel.threshold.value
    assert len(f"{start}") <= 8 and (plane.scores >= start).sum() == round(0.1 * len(plane.scores))
    assert panel.threshold.min < plane.scores.min() and panel.threshold.max > plane.scores.max()  # everybody, and nobody
    assert all(len(f"{v}") <= 7 for v in (panel.threshold.step, panel.threshold.min, panel.threshold.max))


def test_cancel_leaves_everything_as_it_was(lab, plane, report, monkeypatch):
    panel = DeMemPanel(lab, plane, report)
    panel.noise.value, panel.threshold.value = 2.2, 0.02
    before, begun, go = panel.figure.to_dict(), threading.Event(), threading.Event()
    real = panels_privacy.Curve.add

    def slow(self, moment):
        begun.set()
        assert go.wait(30)
        real(self, moment)

    monkeypatch.setattr(panels_privacy.Curve, "add", slow)
    panel.train.click()
    assert begun.wait(30) and panel.train.disabled and not panel.cancel.disabled
    panel.cancel.click()
    go.set()
    panel.job.join(30)
    assert panel.job.outcome == "cancelled" and "cancelled" in panel.status.value
    assert panel.plane is plane and not panel.train.disabled and panel.cancel.disabled
    after = panel.figure.to_dict()
    for old, new in zip(before["data"], after["data"], strict=True):
        assert {k: str(v) for k, v in old.items()} == {k: str(v) for k, v in new.items()}
    monkeypatch.undo()
    panel.train.click()
    panel.job.join(60)
    fresh = replace(lab, store=Store(lab.store.root.parent / "elsewhere"))
    noise, threshold = panel.position
    wanted = train_point(fresh, plane, noise_multiplier=noise, risk_threshold=threshold)
    assert panel.plane.points.iloc[-1].equals(wanted.points.iloc[-1])


def test_a_training_that_fails_says_so(lab, plane, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("planted <failure>")

    panel = DeMemPanel(lab, plane)
    monkeypatch.setattr(panels_privacy, "train_point", broken)
    panel.train.click()
    panel.job.join(30)
    assert "planted &lt;failure&gt;" in panel.status.value and panel.plane is plane and not panel.train.disabled


def test_controls_are_named_and_each_has_a_number_box(lab, plane, budget_panel):
    for panel in (DeMemPanel(lab, plane), budget_panel):
        rows = [row for box in panel.widget.children for row in (box, *getattr(box, "children", ()))]
        pairs = [r.children for r in rows if "demem-control" in getattr(r, "_dom_classes", ())]
        assert len(pairs) == (4 if panel is budget_panel else 2)
        for slider, box in pairs:
            assert slider.description and slider.tooltip == slider.description and not slider.continuous_update
            box.value = box.min
            assert slider.value == box.min and "aria-live" in panel.readout.value
    panel = DeMemPanel(lab, plane)
    assert all(b.description and b.tooltip for b in (panel.train, panel.cancel, budget_panel.button))


def test_a_panel_made_again_stands_where_the_last_one_stood(lab, plane):
    panel = DeMemPanel(lab, plane)
    panel.noise.value, panel.threshold.value = 2.6, 0.02
    again = DeMemPanel(lab, plane)
    assert (again.noise.value, again.threshold.value) == (2.6, 0.02) and text(again) == text(panel)


@pytest.mark.parametrize(("epsilon", "times"), [(0.0, "1"), (1.0, "2.72"), (1.5, "4.49"), (4.7, "110"), (8.0, "2,990")])
def test_the_promise_is_about_sets_of_outcomes_and_rounded_up(epsilon, times):
    said = words_privacy._strength(epsilon)
    assert said == f"No set of outcomes becomes more than {times} times likelier by one member, plus delta."
    assert float(times.replace(",", "")) >= np.exp(epsilon)


def test_a_delta_that_would_let_one_sample_be_published_is_named(budget_panel):
    warning = "delta is not below 1/898 : publishing one sample at random would pass"
    for power, warned in ((-4.0, False), (-3.0, False), (-2.75, True), (-2.0, True)):
        budget_panel.power.value = power
        assert (warning in text(budget_panel)) == warned == (10**power * 898.5 >= 1)
    budget_panel.noise.value = 0.0
    assert warning not in text(budget_panel)  # nothing is promised


def test_a_setting_is_what_epsilon_depends_on():
    setting = Setting(1.0, 64, 898.5, STEPS, DELTA)
    assert budget(**setting.asked) == POINTS[2]["budget"]
    assert isinstance(budget(**replace(setting, noise_multiplier=0.0).asked), NoGuarantee)
