"""Lower bounds against closed forms, slow loops, and mechanisms whose epsilon is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from demem_lab.empirical import clopper_pearson_bound, one_run_bound


def gaussian(n, mu, seed):
    """Independent trials of the Gaussian mechanism with sensitivity mu in units of the noise."""
    rng = np.random.default_rng(seed)
    member = rng.random(n) < 0.5
    return rng.normal(size=n) + mu * member, member


def true_epsilon(mu, delta):
    def hockey(epsilon):  # Balle & Wang 2018, theorem 8
        a, b = stats.norm.cdf(mu / 2 - epsilon / mu), stats.norm.cdf(-mu / 2 - epsilon / mu)
        return a - np.exp(epsilon) * b - delta

    return optimize.brentq(hockey, 0, 50)


@pytest.mark.parametrize(("mu", "delta"), [(0.5, 1e-5), (1.0, 1e-3), (2.0, 1e-5)])
def test_bounds_exceed_the_truth_no_more_often_than_they_say(mu, delta):
    truth = true_epsilon(mu, delta)
    over = [clopper_pearson_bound(*gaussian(400, mu, seed), delta=delta, seed=seed).epsilon > truth for seed in range(150)]
    once = [one_run_bound(*gaussian(1000, mu, seed), delta=delta).epsilon > truth for seed in range(150)]
    for wrong in (over, once):
        assert sum(wrong) <= stats.binom.ppf(0.999, 150, 0.05)


def test_bounds_hold_where_every_threshold_reaches_the_truth():
    """Laplace noise: the ratio is e^epsilon at EVERY threshold in the tail, so one that is chosen by its luck says too much.

    On Gaussian noise the best threshold is far from the rest, and a bound that judges by the half it was chosen on passes.
    """
    over = 0
    for seed in range(600):
        rng = np.random.default_rng(seed)
        member = rng.random(2000) < 0.5
        scores = rng.laplace(size=2000) + member  # sensitivity 1, scale 1: epsilon is 1
        over += clopper_pearson_bound(scores, member, delta=0.0, seed=seed).epsilon > 1
    assert over <= 18  # 0.3 to 0.7 % where it holds, 6 to 8 % where threshold and bound share their scores


def test_randomised_response_comes_close_to_its_epsilon():
    """The one mechanism whose epsilon the one-run bound should nearly reach: every guess is right with probability e/(1+e)."""
    rng, epsilon = np.random.default_rng(0), 2.0
    member = rng.random(50_000) < 0.5
    told = member ^ (rng.random(50_000) > 1 / (1 + np.exp(-epsilon)))
    scores = told + 0.01 * rng.random(50_000)
    assert 1.85 < one_run_bound(scores, member, delta=0).epsilon < epsilon
    assert 1.8 < clopper_pearson_bound(told.astype(float), member, delta=0).epsilon < epsilon


@pytest.mark.parametrize("right", [60, 110, 150, 199, 200])
def test_without_delta_one_run_is_the_binomial_tail_inverted(right):
    m, r = 1000, 200
    included = np.zeros(m, dtype=bool)
    included[: right // 2] = True  # right // 2 of the 100 guesses "in" are right
    included[m - 100 : m - 100 + (100 - (right - right // 2))] = True
    scores = -np.arange(m, dtype=float)
    found = one_run_bound(scores, included, delta=0.0)
    low = stats.beta.ppf(0.05, right, r - right + 1)
    assert found.epsilon == pytest.approx(max(0.0, np.log(low / (1 - low))), abs=1e-6)
    assert f"{right} of {r} guesses right" in str(found)


def test_with_delta_one_run_equals_a_slow_search():
    scores, member = gaussian(1000, 2.5, 3)
    delta, m, r = 1e-4, 1000, 200
    order = np.argsort(-scores, kind="stable")
    v = int(member[order[:100]].sum() + (~member[order[-100:]]).sum())

    def refuted(epsilon):
        q = np.exp(epsilon) / (1 + np.exp(epsilon))
        pmf = stats.binom.pmf(np.arange(r + 1), r, q)
        worst = max(pmf[max(0, v - i) : v].sum() / i for i in range(1, m + 1))
        return pmf[v:].sum() + 2 * m * delta * worst <= 0.05

    grid = np.arange(0, 4, 0.002)
    slow = max([e for e in grid if refuted(e)], default=0.0)
    found = one_run_bound(scores, member, delta=delta).epsilon
    assert found == pytest.approx(slow, abs=0.003) and found < one_run_bound(scores, member, delta=0.0).epsilon


@pytest.mark.parametrize("members", [200, 100])
def test_clopper_pearson_limits_of_a_perfect_attack(members):
    member = np.arange(400) < members
    found = clopper_pearson_bound(member.astype(float), member, delta=1e-3)
    low = 0.025 ** (2 / members)  # all 100 (50) members of the judging half found, alpha / 2 on one side
    high = 1 - 0.025 ** (2 / (400 - members))  # 0 of 100 (150) accused
    assert found.epsilon == pytest.approx(np.log((low - 1e-3) / high)) and found.most == pytest.approx(found.epsilon)


def test_an_attack_that_clears_non_members_counts_as_well():
    rng = np.random.default_rng(0)
    member = rng.random(2000) < 0.5
    scores = np.where(member, 0.0, np.where(rng.random(2000) < 0.3, -5.0, 0.0)) + 1e-3 * rng.random(2000)
    assert clopper_pearson_bound(scores, member, delta=1e-5).epsilon > 2


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_only_the_order_of_scores_counts_and_more_confidence_means_less_epsilon(seed):
    scores, member = gaussian(1000, 1.5, seed)
    for bound in (clopper_pearson_bound, one_run_bound):
        found = bound(scores, member, delta=1e-5)
        assert bound(np.exp(scores / 2) - 3, member, delta=1e-5).epsilon == pytest.approx(found.epsilon)
        assert 0 <= found.epsilon <= found.most and np.isfinite(found.most)
    # (with Clopper-Pearson another confidence may choose another threshold)
    assert one_run_bound(scores, member, delta=1e-5, confidence=0.99).epsilon <= found.epsilon + 1e-9


def test_where_a_tied_sample_stands_says_nothing():
    """A file lists its members first; outputs that are all alike, or of two kinds, know nothing of that."""
    member = np.arange(2000) < 1000
    two = np.random.default_rng(0).permutation(2000) % 2
    assert one_run_bound(np.zeros(2000), member, delta=0.0).epsilon == 0
    assert one_run_bound(two.astype(float), member, delta=0.0).epsilon < 0.3


@pytest.mark.parametrize("bound", [clopper_pearson_bound, one_run_bound])
def test_constant_scores_and_luck_say_nothing(bound):
    _, member = gaussian(2000, 0, 0)
    assert bound(np.zeros(2000), member, delta=1e-5).epsilon == 0
    lucky = [bound(np.random.default_rng(s).normal(size=2000), member, delta=1e-5).epsilon > 0 for s in range(60)]
    assert np.mean(lucky) < 0.15


@pytest.mark.parametrize(("confidence", "said"), [(0.95, "95"), (0.995, "99.5"), (0.9999, "99.99")])
def test_confidence_is_not_rounded_up(confidence, said):
    found = clopper_pearson_bound(*gaussian(400, 1.0, 0), delta=1e-5, confidence=confidence)
    assert f"at delta 1e-05 with {said} % confidence (Clopper-Pearson" in str(found)


@pytest.mark.parametrize(("call", "words"), [
    (lambda s, m: one_run_bound(s[:999], m[:999], delta=0), "canaries"), (lambda s, m: one_run_bound(s, m, delta=2), "delta"),
    (lambda s, m: one_run_bound(s, m, delta=0, guesses=(900, 900)), "guesses"),
    (lambda s, m: one_run_bound(s, m, delta=0, guesses=(0, 0)), "guesses"),
    (lambda s, m: clopper_pearson_bound(s, m | True, delta=0), "non-members"),
    (lambda s, m: clopper_pearson_bound(s[:4], m, delta=0), "one length"),
    (lambda s, m: clopper_pearson_bound(s * np.nan, m, delta=0), "NaN"),
    (lambda s, m: clopper_pearson_bound(s, m, delta=0, confidence=1.0), "confidence"),
])
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call(*gaussian(1000, 1, 0))
