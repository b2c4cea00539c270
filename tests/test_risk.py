import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from demem_lab import risk
from demem_lab.data import member_masks

RNG = np.random.default_rng(0)


def test_memorization_and_its_error_by_loops():
    member = RNG.random((9, 20)) < 0.5
    member[:2], member[2:4] = True, False
    p = RNG.random((9, 20))
    found = risk.memorization(p, member)
    for i in range(20):
        a, b = p[member[:, i], i], p[~member[:, i], i]
        assert found.score[i] == pytest.approx(a.mean() - b.mean())
        assert found.standard_error[i] == pytest.approx(np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b)))
        assert (found.in_models[i], found.out_models[i]) == (len(a), len(b))


def test_the_standard_error_is_the_spread_over_repetitions():
    member = np.repeat([[True], [False]], 8, axis=0).repeat(400, axis=1)
    scores = [risk.memorization(RNG.beta(2, 3, member.shape), member) for _ in range(40)]
    spread = np.std([s.score for s in scores], axis=0, ddof=1).mean()
    assert np.mean([s.standard_error.mean() for s in scores]) == pytest.approx(spread, rel=0.05)


def test_one_model_on_a_side_has_the_largest_error_there_is():
    found = risk.memorization(np.array([[0.9], [0.2]]), np.array([[True], [False]]))
    assert found.score[0] == pytest.approx(0.7) and found.standard_error[0] == pytest.approx(np.sqrt(0.5))


scores = st.lists(st.floats(-1, 1).map(lambda v: round(v, 1)), min_size=2, max_size=30).map(np.array)


@given(scores, st.floats(0, 1))
def test_a_fraction_takes_that_many_of_the_riskiest(score, fraction):
    chosen = risk.protected_set(score, fraction=fraction)
    count = round(fraction * len(score))
    assert chosen.mask.sum() == count and chosen.fraction == count / len(score)
    if 0 < count < len(score):
        assert score[chosen.mask].min() >= score[~chosen.mask].max() and chosen.risk_threshold == score[chosen.mask].min()
        tied = np.flatnonzero(score == chosen.risk_threshold)
        assert (np.diff(chosen.mask[tied].astype(int)) <= 0).all()  # the lower index goes first


@given(scores, st.floats(-1.5, 1.5))
def test_a_threshold_protects_at_or_above_it(score, threshold):
    assert np.array_equal(risk.protected_set(score, risk_threshold=threshold).mask, score >= threshold)


def test_nobody_and_everybody():
    score = np.array([0.1, 0.5, 0.3])
    settings = (({"fraction": 0}, 0), ({"fraction": 1}, 3), ({"risk_threshold": np.inf}, 0), ({"risk_threshold": -np.inf}, 3))
    for setting, size in settings:
        chosen = risk.protected_set(score, **setting)
        assert chosen.mask.sum() == size and chosen.risk_threshold == (np.inf if size == 0 else -np.inf)


def test_random_sets_are_uniform_and_of_the_right_size():
    sets = np.stack([risk.random_set(30, 6, seed=s) for s in range(600)])
    assert (sets.sum(1) == 6).all() and stats.chisquare(sets.sum(0)).pvalue > 1e-4


def test_deciles_are_ordered_and_equal():
    score = RNG.normal(size=103)
    group = risk.deciles(score)
    sizes = np.bincount(group)
    assert sizes.max() - sizes.min() <= 1 and all(score[group == g].max() <= score[group == g + 1].min() for g in range(9))


def test_ties_of_deciles_go_in_order():
    assert np.array_equal(risk.deciles(np.arange(100) % 2), np.arange(100) // 20 + 5 * (np.arange(100) % 2))


def test_trace_measures_by_loops():
    trace = RNG.random((3, 8, 10))
    trace[0, :, 4] = np.nan
    trace[1, 2:5, 6] = np.nan
    iqr, early = risk.loss_trace_iqr(trace), risk.early_loss(trace, epochs=3)
    for i in range(10):
        seen = [t[~np.isnan(t)] for t in trace[:, :, i] if (~np.isnan(t)).any()]
        assert iqr[i] == pytest.approx(np.mean([np.subtract(*np.percentile(t, [75, 25])) for t in seen]))
        assert early[i] == pytest.approx(np.nanmean(trace[:, :3, i]))
    assert np.allclose(risk.loss_trace_iqr(trace[2]), risk.loss_trace_iqr(trace[2:3]))


def test_agreement_of_a_few_models_on_right_or_wrong_is_not_certainty():
    """0/1: the interval of two standard errors covers, also where all models agree."""
    for models in (8, 40):
        member = np.arange(models)[:, None] % 2 == np.arange(4000) % 2
        rate_in, rate_out = RNG.uniform(0.9, 1, 4000), RNG.uniform(0, 0.1, 4000)
        p = RNG.random((models, 4000)) < np.where(member, rate_in, rate_out)
        found = risk.memorization(p, member)
        covered = np.abs(found.score - (rate_in - rate_out)) <= 2 * found.standard_error
        assert covered.mean() > 0.93 and found.standard_error.min() > 0
    few, many = (risk.memorization(np.arange(m)[:, None] % 2 == np.zeros(1), np.arange(m)[:, None] % 2 == np.zeros(1))
                 for m in (2, 4))
    assert few.standard_error[0] > many.standard_error[0] > 0.2


def test_equal_orders_of_a_few_are_not_certain():
    found = risk.rank_correlation(np.arange(5), np.arange(5))
    assert found.mean == pytest.approx(1) and found.low < 0.5 and found.high == found.mean
    assert risk.rank_correlation(np.arange(500), -np.arange(500)).high < -0.999


def test_rank_correlation_interval_covers():
    rho, hits = 0.6, 0
    truth = 6 / np.pi * np.arcsin(rho / 2)  # Spearman's for two normals
    for _ in range(200):
        a = RNG.normal(size=200)
        b = rho * a + np.sqrt(1 - rho**2) * RNG.normal(size=200)
        found = risk.rank_correlation(a, b)
        assert found.mean == pytest.approx(stats.spearmanr(a, b).statistic)
        hits += found.low < truth < found.high
    assert 180 <= hits <= 200


def test_rank_correlation_interval_by_its_formula():
    a, b = np.arange(20.0), np.arange(20.0)
    b[[0, 8]] = b[[8, 0]]
    rho = stats.spearmanr(a, b).statistic
    half = 1.959964 * np.sqrt((1 + rho**2 / 2) / 17)
    found = risk.rank_correlation(a, b)
    assert (found.low, found.high) == pytest.approx((np.tanh(np.arctanh(rho) - half), np.tanh(np.arctanh(rho) + half)))


def test_precision_at_the_top():
    score = np.arange(100.0)
    proxy = score.copy()
    proxy[[95, 96]] = -1
    found = risk.precision_at_top(proxy, score, fraction=0.1)
    assert found.mean == 0.8 and found.n == 10
    assert (found.low, found.high) == pytest.approx((stats.beta.ppf(0.025, 8, 3), stats.beta.ppf(0.975, 9, 2)))


def test_scores_with_ties_agree_no_more_than_they_do():
    """Of two lists of zeros and ones that have nothing in common: a tenth of one is a tenth of the other."""
    rng = np.random.default_rng(0)
    found = [risk.precision_at_top(*(rng.random((2, 400)) < 0.3).astype(float), fraction=0.1).mean for _ in range(60)]
    assert abs(np.mean(found) - 0.1) < 0.03


ONE = np.ones((2, 3), dtype=bool)


@pytest.mark.parametrize(("call", "words"), [
    (lambda: risk.memorization(np.ones((2, 3)), ONE), "one without"),
    (lambda: risk.memorization(np.ones((2, 4)), ONE), r"\[M, N\]"),
    (lambda: risk.memorization(np.full((2, 3), np.nan), ONE), "NaN"),
    (lambda: risk.protected_set(np.array([1.0, np.nan]), fraction=0.5), "without NaN"),
    (lambda: risk.protected_set(np.ones(3), risk_threshold=float("nan")), "must not be NaN"),
    (lambda: risk.protected_set(np.ones(3)), "exactly one"), (lambda: risk.protected_set(np.ones(3), fraction=1.1), "fraction"),
    (lambda: risk.protected_set(np.ones(3), fraction=0.5, risk_threshold=0.5), "exactly one"),
    (lambda: risk.random_set(3, 4, seed=0), "count"), (lambda: risk.early_loss(np.ones((4, 3)), epochs=5), "epochs"),
    (lambda: risk.loss_trace_iqr(np.full((4, 3), np.nan)), "never drawn"),
    (lambda: risk.early_loss(np.where(np.arange(12).reshape(4, 3) < 3, np.nan, 1.0), epochs=1), "not drawn"),
])
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@given(scores, st.floats(0.01, 1))
def test_the_reported_threshold_protects_at_least_the_same(score, fraction):
    chosen = risk.protected_set(score, fraction=fraction)
    again = risk.protected_set(score, risk_threshold=chosen.risk_threshold)
    assert (again.mask | ~chosen.mask).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("call", "words"), [
    (lambda: risk.rank_correlation(np.ones(9), np.arange(9)), "constant"),
    (lambda: risk.rank_correlation(np.arange(3), np.arange(3)), "at least 4"),
    (lambda: risk.precision_at_top(np.arange(9.0), np.arange(9.0), fraction=0.01), "fraction"),
    (lambda: risk.deciles(np.array([0.1, np.nan, 0.2]), groups=2), "NaN"),
])
def test_measures_of_too_little(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_models_needed_shrink_the_error_as_wanted():
    rng = np.random.default_rng(0)
    member = member_masks(400, 8, seed=0).numpy()
    found = risk.memorization(rng.uniform(size=(8, 400)), member)
    needed = found.models_needed(0.05, share=0.9)
    assert needed % 2 == 0
    # the same spread with that many models: the error of at least 90 % of the samples is as wanted, and with fewer it is not
    for models, enough in ((needed, True), (needed - 8, False)):
        assert ((found.standard_error * np.sqrt(8 / models) <= 0.05 + 1e-12).mean() >= 0.9) == enough
    many = risk.memorization(rng.uniform(size=(needed, 400)), member_masks(400, needed, seed=1).numpy())
    assert 0.03 < np.quantile(many.standard_error, 0.5) < 0.05
    with pytest.raises(ValueError, match="standard_error"):
        found.models_needed(0.0)


def with_errors(*errors):
    """Scores of two models on each side, with these standard errors."""
    two = np.full(len(errors), 2)
    return risk.MemorizationScore(np.zeros(len(errors)), np.array(errors), two, two)


def test_models_needed_leave_no_more_behind_than_they_may():
    assert with_errors(0.1, 0.1, 0.2, 0.2).models_needed(0.1, share=0.6) == 16  # with 4 only half are as sure


def test_models_needed_are_not_rounded_up_twice():
    assert with_errors(0.07, 0.07).models_needed(0.01) == 196  # 0.07 / 0.01 is 7.000000000000001


def test_out_of_sample_and_in_sample_means_against_loops():
    rng = np.random.default_rng(1)
    member, signal = member_masks(20, 4, seed=0).numpy(), rng.normal(size=(4, 20))
    outside, inside = risk.out_of_sample(signal, member), risk.in_sample(signal, member)
    for i in range(20):
        assert outside[i] == pytest.approx(np.mean([signal[m, i] for m in range(4) if not member[m, i]]))
        assert inside[i] == pytest.approx(np.mean([signal[m, i] for m in range(4) if member[m, i]]))
    with pytest.raises(ValueError, match="20 samples are a member of every model"):
        risk.out_of_sample(signal, member | True)
    with pytest.raises(ValueError, match=r"\[M, N\]"):
        risk.in_sample(signal[0], member)


def test_proxies_are_judged_by_rank_and_by_their_top():
    rng = np.random.default_rng(2)
    score = rng.normal(size=300)
    table = risk.judge_proxies({"itself": score, "noise": rng.normal(size=300)}, score, fraction=0.1)
    assert table.loc["itself", "rank correlation"] == pytest.approx(1) and table.loc["itself", "precision at top 10%"] == 1
    assert table.loc["noise", "its low"] < 0 < table.loc["noise", "its high"]
    assert table.loc["noise", "low"] < 0.1 < table.loc["noise", "high"]
