"""Epsilon against Opacus, against the closed form of the plain Gaussian mechanism, and against common sense."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from opacus.accountants.analysis import rdp
from scipy.optimize import brentq
from scipy.stats import norm

from demem_lab import accounting
from demem_lab.accounting import (
    Budget,
    NoGuarantee,
    budget,
    budget_in_time,
    epsilon_curve,
    noise_multiplier_for,
    usual_delta,
)
from demem_lab.guarantees import Guarantee

SETTINGS = [(1.0, 0.07, 420, 1e-4), (1.1, 0.01, 1000, 1e-5), (3.0, 0.07, 420, 1e-4)]


@pytest.mark.parametrize(("sigma", "rate", "steps", "delta"), SETTINGS)
def test_rdp_agrees_with_opacus(sigma, rate, steps, delta):
    orders = [1 + x / 10 for x in range(1, 100)] + list(range(11, 256))
    spent = rdp.compute_rdp(q=rate, noise_multiplier=sigma, steps=steps, orders=orders)
    theirs, _ = rdp.get_privacy_spent(orders=orders, rdp=spent, delta=delta)
    ours = budget(noise_multiplier=sigma, sampling_rate=rate, steps=steps, delta=delta, accountant="RDP").epsilon
    assert ours == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize(("sigma", "rate", "steps", "delta"), SETTINGS[:2])
def test_pld_agrees_with_opacus_numerical_accountant(sigma, rate, steps, delta):
    theirs = PRVAccountant()
    theirs.history = [(sigma, rate, steps)]
    ours = budget(noise_multiplier=sigma, sampling_rate=rate, steps=steps, delta=delta)
    assert ours.accountant == "PLD" and ours.epsilon == pytest.approx(theirs.get_epsilon(delta), rel=0.02)


@pytest.mark.parametrize(("sigma", "steps"), [(2.0, 1), (4.0, 10), (10.0, 50)])
def test_without_sampling_it_is_the_analytic_gaussian(sigma, steps):
    mu, delta = np.sqrt(steps) / sigma, 1e-5  # Balle & Wang 2018, theorem 8

    def excess(epsilon):
        return norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu) - delta

    exact = brentq(excess, 0, 100)
    found = budget(noise_multiplier=sigma, sampling_rate=1.0, steps=steps, delta=delta)
    assert exact - 1e-6 <= found.epsilon <= exact * 1.01 + 1e-3


def test_more_steps_cost_more_and_more_noise_costs_less():
    spent = [budget(noise_multiplier=1.0, sampling_rate=0.05, steps=s, delta=1e-5).epsilon for s in (10, 100, 400)]
    assert spent == sorted(spent)
    curve = epsilon_curve([0.6, 1, 2, 4], sampling_rate=0.05, steps=100, delta=1e-5)
    assert [b.epsilon for b in curve] == sorted((b.epsilon for b in curve), reverse=True)
    tight, loose = (budget(noise_multiplier=1.0, sampling_rate=0.05, steps=100, delta=1e-5, accountant=a) for a in ("PLD", "RDP"))
    assert tight.epsilon < loose.epsilon and "looser" in str(loose) and "looser" not in str(tight)


@pytest.mark.parametrize("case", [
    {"noise_multiplier": 50.0, "sampling_rate": 0.001, "steps": 1_000_000, "delta": 1e-5},  # PLD's grid is too coarse
    {"noise_multiplier": 1.0, "sampling_rate": 0.07, "steps": 420, "delta": 1e-15},  # PLD keeps less than this of the tail
])
def test_the_smaller_of_two_bounds_is_given_and_named(case):
    loose, tight = budget(**case, accountant="RDP"), budget(**case, accountant="PLD")
    assert not hasattr(tight, "epsilon") or tight.epsilon > loose.epsilon
    for found in (budget(**case), budget_in_time(120, **case)):
        assert found.epsilon == loose.epsilon and found.accountant == "RDP, here below PLD" and "looser" not in str(found)


@given(st.integers(1, 10**9))
def test_delta_is_below_one_in_n(n):
    delta = usual_delta(n)
    assert delta * n <= 0.5 and (delta == 1e-4 or delta * n > 0.0499)


def test_no_guarantee_is_a_value_with_a_reason(monkeypatch):
    assert budget(noise_multiplier=1.0, sampling_rate=0.1, steps=0, delta=1e-5).epsilon == 0
    none = budget(noise_multiplier=0.0, sampling_rate=0.1, steps=5, delta=1e-5)
    assert isinstance(none, NoGuarantee) and str(none) == "no guarantee: no noise is added" and not hasattr(none, "epsilon")
    weak = budget(noise_multiplier=0.05, sampling_rate=0.1, steps=50, delta=1e-5)
    assert weak.accountant == "RDP" and 1000 < weak.epsilon < np.inf
    monkeypatch.setattr(accounting, "_epsilon", lambda *_: np.inf)
    hopeless = budget(noise_multiplier=0.05, sampling_rate=0.1, steps=50, delta=1e-5)
    assert isinstance(hopeless, NoGuarantee) and "too small for the accountant" in str(hopeless)


def test_noise_for_a_wanted_epsilon_is_just_enough():
    setting = {"sampling_rate": 0.2, "steps": 20, "delta": 1e-5}
    sigma = noise_multiplier_for(epsilon=3.0, **setting)
    enough, less = (budget(noise_multiplier=s, **setting) for s in (sigma, sigma - 0.01))
    assert isinstance(enough, Budget) and enough.epsilon <= 3.0 < less.epsilon


GOOD = {"noise_multiplier": 1.0, "sampling_rate": 0.1, "steps": 5, "delta": 1e-5}


@pytest.mark.parametrize("change", [
    {"noise_multiplier": -1.0}, {"noise_multiplier": float("inf")}, {"noise_multiplier": float("nan")}, {"sampling_rate": 0.0},
    {"sampling_rate": 1.1}, {"steps": -1}, {"steps": 1.5}, {"delta": 0.0}, {"delta": 1.0}, {"accountant": "GDP"},
])
def test_bad_input(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        budget(**GOOD | change)


@pytest.mark.parametrize("epsilon", [0.0, 60.0, float("nan")])
def test_bad_epsilon(epsilon):
    with pytest.raises(ValueError, match="epsilon"):
        noise_multiplier_for(epsilon=epsilon, sampling_rate=0.1, steps=5, delta=1e-5)


def test_a_wanted_epsilon_that_less_noise_than_the_smallest_gives_is_answered():
    setting = {"sampling_rate": 0.01, "steps": 1, "delta": 1e-5}
    sigma = noise_multiplier_for(epsilon=40.0, **setting)
    enough, less = (budget(noise_multiplier=s, accountant="RDP", **setting) for s in (sigma, sigma - 0.01))
    assert sigma < 0.3 and enough.epsilon <= 40.0 < less.epsilon  # an upper bound of what PLD would say


@pytest.mark.parametrize(("sigma", "rate", "steps", "delta"), [*SETTINGS, (0.4, 0.2, 7, 1e-3), (1.0, 1.0, 3, 1e-5)])
def test_steps_and_delta_are_put_on_a_cached_step_exactly_as_the_accountant_does(sigma, rate, steps, delta):
    import dp_accounting as dp
    from dp_accounting.rdp import RdpAccountant

    once = dp.GaussianDpEvent(sigma)
    event = dp.SelfComposedDpEvent(once if rate == 1 else dp.PoissonSampledDpEvent(rate, once), steps)
    theirs = RdpAccountant().compose(event).get_epsilon(delta)
    ours = budget(noise_multiplier=sigma, sampling_rate=rate, steps=steps, delta=delta, accountant="RDP").epsilon
    assert ours == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("sigma", [0.05, 0.15, 0.3, 0.42, 0.75, 1.67, 3.0, 20.0, 30.0])
def test_the_best_of_few_orders_is_the_best_of_all(sigma):
    """Where it lies wanders over all the orders; low ones come out too high or infinite; a tiny divergence counts as none."""
    import dp_accounting as dp
    from dp_accounting.rdp import RdpAccountant, compute_epsilon

    for rate in (0.0009, 0.0103, 0.37, 0.6, 0.97, 1.0):
        ledger = RdpAccountant().compose(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(sigma)))
        for steps, delta in ((1, 1e-8), (1, 1e-2), (40, 1e-5), (286, 0.23), (420, 1e-4), (140_000, 1e-6)):
            theirs = compute_epsilon(ledger.orders, steps * ledger.rdp, delta)[0]
            asked = budget(noise_multiplier=sigma, sampling_rate=rate, steps=steps, delta=delta, accountant="RDP")
            assert getattr(asked, "epsilon", float("inf")) == pytest.approx(theirs, rel=1e-12)


def test_a_tight_epsilon_in_time_is_the_tight_one_and_out_of_time_the_loose_one():
    assert budget_in_time(120, **GOOD) == budget(**GOOD, accountant="PLD")
    late = budget_in_time(0.01, **GOOD)  # no process starts that fast
    assert late == budget(**GOOD, accountant="RDP") and "looser" in str(late)
    assert isinstance(budget_in_time(1, **GOOD | {"noise_multiplier": 0.0}), NoGuarantee)
    assert budget_in_time(1, **GOOD | {"steps": 0}).epsilon == 0
    with pytest.raises(ValueError, match="seconds"):
        budget_in_time(-1, **GOOD)


def test_a_failing_accountant_is_not_taken_for_a_late_one(monkeypatch):
    monkeypatch.setattr(accounting.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="PLD accountant failed"):
        budget_in_time(30, **GOOD)


@pytest.mark.parametrize(("sigma", "epochs", "published"), [(1.12, 60, 2.92), (0.6, 30, 9.74), (1.2, 10, 1.20)])
def test_the_published_table_of_tensorflow_privacy(sigma, epochs, published, batch=256):
    """MNIST, 60,000 images, delta 1e-5: their RDP accountant of 2019, whose conversion to epsilon was looser than today's."""
    setting = {"noise_multiplier": sigma, "sampling_rate": batch / 60_000, "steps": epochs * 60_000 // batch, "delta": 1e-5}
    loose = budget(**setting, accountant="RDP").epsilon
    assert 0.75 * published < loose < published and budget(**setting).epsilon < loose
    orders, theirs = [1 + x / 10 for x in range(1, 100)] + list(range(11, 65)), {}
    for order, spent in zip(orders, rdp.compute_rdp(
        q=batch / 60_000, noise_multiplier=sigma, steps=setting["steps"], orders=orders
    ), strict=True):
        theirs[order] = spent + np.log(1e5) / (order - 1)  # Mironov 2017, proposition 3
    assert min(theirs.values()) == pytest.approx(published, rel=0.01)


def test_the_moments_accountants_own_example():
    """Abadi et al. 2016, section 3.2: q = 0.01, sigma = 4, 10,000 steps, delta 1e-5 give epsilon 1.26; it is a bound on ours."""
    assert 0.8 < budget(noise_multiplier=4.0, sampling_rate=0.01, steps=10_000, delta=1e-5).epsilon < 1.26


@pytest.mark.parametrize("accountant", ["PLD", "RDP"])
def test_epsilon_is_dp_accountings_own(accountant):
    import dp_accounting
    from dp_accounting import pld
    from dp_accounting import rdp as renyi

    ledger = {"PLD": pld.PLDAccountant, "RDP": renyi.RdpAccountant}[accountant]()
    event = dp_accounting.PoissonSampledDpEvent(0.02, dp_accounting.GaussianDpEvent(1.3))
    ledger.compose(event, 200)
    ours = budget(noise_multiplier=1.3, sampling_rate=0.02, steps=200, delta=1e-5, accountant=accountant)
    assert ours.epsilon == pytest.approx(ledger.get_epsilon(1e-5), rel=1e-12)


@pytest.mark.parametrize(("delta", "said"), [
    (1.6e-5, "1.6e-05"), (1e-4, "0.0001"), (1e-5, "1e-05"), (1.2341e-5, "1.24e-05"), (0.000123401, "0.000124"),
])
def test_delta_is_said_as_it_is_or_larger(delta, said):
    found = budget(noise_multiplier=2.0, sampling_rate=0.1, steps=10, delta=delta)
    assert f"delta {said} " in str(found)
    assert f", {said})-DP" in str(Guarantee(found, 100, 100, "fixed"))


def exactly(sigma, steps, delta):
    """Epsilon of the plain Gaussian mechanism (Balle & Wang 2018, theorem 8)."""
    mu = np.sqrt(steps) / sigma
    return brentq(lambda e: norm.cdf(mu / 2 - e / mu) - np.exp(e + norm.logcdf(-mu / 2 - e / mu)) - delta, 0, 200)


@pytest.mark.parametrize(("epsilon", "steps"), [(1.0, 2000), (1.0, 100_000), (8.0, 1), (30.0, 3)])
def test_noise_for_full_batches_is_that_of_the_analytic_gaussian_and_takes_no_memory(epsilon, steps):
    code = (
        "import resource, sys; from demem_lab.accounting import noise_multiplier_for as f; "
        "resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)); "
        f"print(f(epsilon={epsilon}, sampling_rate=1.0, steps={steps}, delta=1e-5))"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-300:]
    sigma = float(done.stdout)
    assert exactly(sigma, steps, 1e-5) <= epsilon + 1e-9
    assert exactly(sigma - 0.003 * max(1, sigma), steps, 1e-5) > epsilon


@pytest.mark.parametrize(("epsilon", "rate", "steps", "delta"), [
    (2.0, 0.05, 60, 1e-4), (0.5, 0.3, 5, 1e-3), (1.0, 1.0, 7, 1e-5), (0.01, 0.5, 40, 1e-10), (0.01, 0.01, 10**6, 1e-5),
])
def test_noise_for_a_wanted_epsilon_is_enough_and_little_less_is_not(epsilon, rate, steps, delta):
    setting = {"sampling_rate": rate, "steps": steps, "delta": delta}
    sigma = noise_multiplier_for(epsilon=epsilon, **setting)
    assert budget(noise_multiplier=sigma, **setting).epsilon <= epsilon
    assert budget(noise_multiplier=sigma * 0.997, **setting).epsilon > epsilon


def test_a_wanted_epsilon_that_no_noise_gives_by_the_accountants_is_refused(monkeypatch):
    monkeypatch.setattr(accounting, "_epsilon", lambda *_: 3.0)
    with pytest.raises(ValueError, match=r"no noise multiplier up to 1e\+06 gives epsilon 1 at delta 1e-05; ask for more"):
        noise_multiplier_for(epsilon=1.0, sampling_rate=0.1, steps=5, delta=1e-5)


def test_where_the_sample_is_hardly_ever_drawn_the_floor_of_pld_is_said():
    """With probability 1 - 1e-6 nobody looks at it: no noise is needed at this delta, and 0.3 is the least that is tried."""
    assert noise_multiplier_for(epsilon=1.0, sampling_rate=1e-6, steps=1, delta=1e-4) == 0.3


@pytest.mark.parametrize("rate", [1.0, 0.01])
@pytest.mark.parametrize("accountant", [None, "RDP"])
def test_noise_out_of_all_proportion_is_answered(rate, accountant):
    setting = {"sampling_rate": rate, "steps": 10, "delta": 1e-5, "accountant": accountant}
    for sigma in (1e-300, 1e-200, 1e-9):
        assert "too small for the accountant" in str(budget(noise_multiplier=sigma, **setting))
    for sigma in (1e7, 1e160, 1e308):  # as if it were 1e6: more noise gives no less privacy
        found = budget(noise_multiplier=sigma, **setting)
        assert found.epsilon == budget(noise_multiplier=1e6, **setting).epsilon and found.noise_multiplier == sigma
    assert budget(noise_multiplier=1e-200, **setting | {"steps": 0}).epsilon == 0


def test_noise_out_of_all_proportion_is_answered_in_time():
    assert isinstance(budget_in_time(60, **GOOD | {"noise_multiplier": 1e-200}), NoGuarantee)
    assert budget_in_time(120, **GOOD | {"noise_multiplier": 1e160}).epsilon < 0.01


@given(st.floats(1e-4, 1e6), st.booleans())
@settings(deadline=None)
def test_a_bound_is_printed_on_the_side_on_which_it_holds(value, upper):
    shown = float(accounting.bound(value, upper=upper))
    assert shown >= value if upper else shown <= value
    assert shown == pytest.approx(value, rel=0.0101)
    assert accounting.bound(shown, upper=upper) == f"{shown:.3g}"


def test_bounds_of_nothing_and_of_everything():
    assert accounting.bound(0.0) == "0" and accounting.bound(float("inf")) == "inf" and accounting.bound(9.999) == "10"
