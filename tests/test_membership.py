"""Attacks against slow loops, measures against scikit-learn and scipy, and the game itself on signals that carry nothing."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from demem_lab import leakage as lk
from demem_lab import membership as mi
from demem_lab import signals as sg
from demem_lab.data import member_masks


def game(models=8, n=60, strength=1.0, seed=0, design="balanced"):
    rng = np.random.default_rng(seed)
    member = member_masks(n, models, seed=seed, design=design).numpy()
    hardness = rng.normal(0, 3, n)
    return hardness + strength * member + rng.normal(0, 1, member.shape), member


def slow_twin(member, target):
    """Pairs of complements are made from the first row on; each row is in one pair at most."""
    taken = {}
    for m in range(len(member)):
        for k in range(m):
            if k not in taken and m not in taken and (member[k] == ~member[m]).all():
                taken[k], taken[m] = m, k
    return taken.get(target)


def slow_lira(signal, member, variance, online):
    models, n = member.shape
    out = np.zeros((models, n))
    for t in range(models):
        keep = [m for m in range(models) if m not in (t, slow_twin(member, t))]
        sides = {}
        for name, who in (("in", member), ("out", ~member)):
            squares, free = 0.0, 0
            for i in range(n):
                r = np.array([signal[m, i] for m in keep if who[m, i]])
                squares, free = squares + ((r - r.mean()) ** 2).sum(), free + len(r) - 1
            sides[name] = squares / free
        for i in range(n):
            term = {}
            for name, who in (("in", member), ("out", ~member)):
                r = np.array([signal[m, i] for m in keep if who[m, i]])
                own = ((r - r.mean()) ** 2).sum()
                v = {"per_sample": own / len(r), "pooled": sides[name],
                     "shrunk": (own + 8 * sides[name]) / (len(r) - 1 + 8)}[variance]
                term[name] = (r.mean(), np.sqrt(max(v, 1e-6)))
            x = signal[t, i]
            if online:
                out[t, i] = stats.norm.logpdf(x, *term["in"]) - stats.norm.logpdf(x, *term["out"])
            else:
                out[t, i] = (x - term["out"][0]) / term["out"][1]
    return out


@pytest.mark.parametrize("variance", ["per_sample", "pooled", "shrunk"])
@pytest.mark.parametrize("online", [True, False])
def test_lira_equals_the_loops(variance, online):
    signal, member = game(models=10, n=30)
    assert np.allclose(mi.lira(signal, member, variance=variance, online=online), slow_lira(signal, member, variance, online))


AWKWARD = {
    "ties": lambda rng, shape: rng.integers(0, 3, shape).astype(float),
    "constant": lambda rng, shape: np.full(shape, 2.5),
    "a diverged model": lambda rng, shape: rng.normal(size=shape) + 1e9 * (np.arange(shape[0]) == 3)[:, None],
    "large": lambda rng, shape: 1e6 * rng.normal(size=shape),
    "tiny differences": lambda rng, shape: 50 + 1e-2 * rng.normal(size=shape),
    "extreme confidences": lambda rng, shape: rng.choice([-800.0, -30.0, 0.0, 30.0, 800.0], shape),
}


@pytest.mark.parametrize("variance", ["per_sample", "pooled", "shrunk"])
@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("kind", AWKWARD)
def test_lira_equals_the_loops_on_awkward_signals(kind, variance, online):
    member = member_masks(12, 8, seed=1).numpy()
    signal = AWKWARD[kind](np.random.default_rng(0), member.shape)
    fast = mi.lira(signal, member, variance=variance, online=online)
    assert np.allclose(fast, slow_lira(signal, member, variance, online), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variance", ["per_sample", "pooled", "shrunk"])
def test_offline_lira_needs_no_spread_of_in_references(variance):
    """Every sample is a member of one model only: no two in-references anywhere, several out-references everywhere."""
    member = np.arange(6)[:, None] == np.arange(30) % 6
    signal = np.random.default_rng(0).normal(size=member.shape) * 10.0 ** np.arange(6)[:, None]  # models of unlike spread
    out = np.zeros(member.shape)
    for t in range(6):
        references = [signal[[m for m in range(6) if m != t and not member[m, i]], i] for i in range(30)]
        own = np.array([((r - r.mean()) ** 2).sum() for r in references])
        pooled = own.sum() / sum(len(r) - 1 for r in references)
        for i, r in enumerate(references):
            v = {"per_sample": own[i] / len(r), "pooled": pooled, "shrunk": (own[i] + 8 * pooled) / (len(r) + 7)}[variance]
            out[t, i] = (signal[t, i] - r.mean()) / np.sqrt(v)
    assert np.allclose(mi.lira(signal, member, variance=variance, online=False), out)


@given(st.integers(0, 10_000), st.sampled_from(["per_sample", "pooled", "shrunk"]), st.booleans())
@settings(max_examples=30, deadline=None)
def test_lira_equals_the_loops_whatever_the_design(seed, variance, online):
    """Independent coins, repeated rows and complements in any order: who is left out is the target and one twin."""
    rng = np.random.default_rng(seed)
    rows = rng.random((3, 6)) < 0.5
    member = np.concatenate([rows, ~rows, rows[:1], ~rows[:1], np.ones((2, 6), bool), np.zeros((2, 6), bool)])
    member = np.concatenate([member, rng.random((4, 6)) < 0.5])[rng.permutation(16)]
    signal = rng.normal(size=member.shape) * rng.choice([1.0, 1e4], 6)
    try:
        fast = mi.lira(signal, member, variance=variance, online=online)
    except ValueError as error:
        assert "references for every sample" in str(error)
        return
    assert np.allclose(fast, slow_lira(signal, member, variance, online), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variance", ["per_sample", "pooled", "shrunk"])
def test_lira_a_few_columns_at_a_time(variance, monkeypatch):
    signal, member = game(models=8, n=30)
    whole = mi.lira(signal, member, variance=variance)
    monkeypatch.setattr(mi, "COLUMNS", 7)
    assert np.allclose(mi.lira(signal, member, variance=variance), whole, rtol=1e-12)


def test_an_enormous_signal_spoils_only_the_references_it_belongs_to():
    """No row has a twin here; 1e200 squared is infinite, and infinite times "not a reference" would be NaN."""
    member = np.random.default_rng(1).random((9, 40)) < 0.5
    member[:, (member[:-1].sum(0) < 4) | (member[:-1].sum(0) > 4)] = (np.arange(9) % 2 == 0)[:, None]
    signal = np.random.default_rng(0).normal(size=member.shape)
    signal[2] = 1e200
    with np.errstate(over="ignore", invalid="ignore"):
        scores = mi.lira(signal, member, variance="per_sample", online=False)
    without = mi.lira(np.where(np.arange(9)[:, None] == 2, 0.0, signal), member, variance="per_sample", online=False)
    free = member[2] & (np.arange(9) != 2)[:, None]  # model 2 is no out-reference of these
    assert free.any() and np.allclose(scores[free], without[free])


def test_several_queries_add_their_log_ratios():
    a, member = game(seed=1)
    b, _ = game(seed=1, strength=2.0)
    assert np.allclose(mi.lira(np.stack([a, b]), member), mi.lira(a, member) + mi.lira(b, member))


def slow_rmia(p, member, gamma, population, offline_a=None):
    models, n = p.shape
    out = np.zeros((models, n))
    for t in range(models):
        keep = [m for m in range(models) if m not in (t, slow_twin(member, t))]
        ratio = np.zeros(n)
        for i in range(n):
            p_out = np.mean([p[m, i] for m in keep if not member[m, i]])
            if offline_a is None:
                mean = (np.mean([p[m, i] for m in keep if member[m, i]]) + p_out) / 2
            else:
                mean = ((1 + offline_a) * p_out + 1 - offline_a) / 2
            ratio[i] = p[t, i] / mean
        for i in range(n):
            out[t, i] = np.mean([ratio[i] / ratio[z] >= gamma for z in range(n) if population[z]])
    return out


@pytest.mark.parametrize(("gamma", "offline_a"), [(1.0, None), (2.0, None), (1.0, 0.3)])
def test_rmia_equals_all_pairs(gamma, offline_a):
    signal, member = game(models=6, n=25)
    p = 1 / (1 + np.exp(-signal))
    population = np.arange(25) % 3 > 0
    fast = mi.rmia(p, member, gamma=gamma, population=population, offline_a=offline_a)
    assert np.allclose(fast, slow_rmia(p, member, gamma, population, offline_a))


def test_rmia_averages_the_confidences_of_several_queries():
    p = np.stack([1 / (1 + np.exp(-game(models=6, n=25, strength=strength)[0])) for strength in (1.0, 3.0)])
    _, member = game(models=6, n=25)
    assert np.allclose(mi.rmia(p, member), mi.rmia(p.mean(0), member))


def slow_log_ratio_count(signal, member, population):
    """RMIA straight from its definition in logarithms, where a confidence of 0 or 1 loses nothing."""
    log_p = -np.logaddexp(0, -signal)
    out = np.zeros(signal.shape)
    for t in range(len(signal)):
        keep = [m for m in range(len(signal)) if m not in (t, slow_twin(member, t))]
        log_ratio = []
        for i in range(signal.shape[1]):
            means = [
                np.logaddexp.reduce([log_p[m, i] for m in keep if side[m, i]]) - np.log(sum(side[m, i] for m in keep))
                for side in (member, ~member)
            ]
            log_ratio.append(log_p[t, i] - np.logaddexp(*means) + np.log(2))
        log_ratio = np.array(log_ratio).round(9)
        out[t] = [np.mean(one >= log_ratio[population]) for one in log_ratio]
    return out


@pytest.mark.parametrize("kind", ["ties", "constant", "extreme confidences"])
def test_rmia_equals_all_pairs_on_awkward_confidences(kind):
    """Ties among ratios and confidences that round to 0 and 1 (a ratio of 0 to 0 cannot arise: the target is no reference)."""
    member = member_masks(12, 6, seed=2).numpy()
    signal = AWKWARD[kind](np.random.default_rng(1), member.shape).clip(-300, 300)
    population = np.arange(12) % 4 > 0
    fast = mi.rmia(1 / (1 + np.exp(-signal)), member, population=population)
    slow = slow_log_ratio_count(signal, member, population)
    assert np.allclose(fast, slow)


def test_rmia_of_confidences_that_are_0_reaches_its_equals():
    """0 / 0 is a ratio like any other tie: whoever is at 0 reaches all others at 0, and nobody else."""
    member = member_masks(12, 6, seed=2).numpy()
    p = np.random.default_rng(1).random(member.shape)
    p[0, :5] = 0.0
    population = np.arange(12) % 4 > 0
    found = mi.rmia(p, member, population=population)
    assert np.allclose(found[0, :5], population[:5].sum() / population.sum()) and (found[0, 5:] > found[0, 0]).all()


def test_rmia_without_a_population_orders_alike():
    signal, member = game(models=6, n=40)
    p = 1 / (1 + np.exp(-signal))
    plain, counted = mi.rmia(p, member), mi.rmia(p, member, population=np.ones(40, dtype=bool))
    assert all(stats.spearmanr(a, b).statistic > 0.999 for a, b in zip(plain, counted, strict=True))


ATTACKS = {
    "online shrunk": lambda s, m: mi.lira(s, m), "online pooled": lambda s, m: mi.lira(s, m, variance="pooled"),
    "offline shrunk": lambda s, m: mi.lira(s, m, online=False), "signal": lambda s, m: s,
    "rmia": lambda s, m: mi.rmia(1 / (1 + np.exp(-s)), m),
    "offline rmia": lambda s, m: mi.rmia(1 / (1 + np.exp(-s)), m, offline_a=0.5),
    "offline pooled": lambda s, m: mi.lira(s, m, variance="pooled", online=False),
    "rmia with a population": lambda s, m: mi.rmia(1 / (1 + np.exp(-s)), m, population=np.arange(s.shape[1]) % 2 > 0),
    "two queries": lambda s, m: mi.lira(np.stack([s, np.roll(s, 1, axis=1)]), m),
    "by class": lambda s, m: mi.by_class(s, np.arange(s.shape[1]) % 4, m),
}


@pytest.mark.parametrize("models", [4, 6, 8, 16])
@pytest.mark.parametrize("name", ATTACKS)
def test_signals_that_know_nothing_give_nothing(models, name):
    auc, found = [], []
    for seed in range(12):
        signal, member = game(models, 400, strength=0.0, seed=seed)
        leakage = lk.evaluate(ATTACKS[name](signal, member), member, fprs=(0.1,))
        auc.append(leakage.auc.mean())
        found.append(leakage.tpr[:, 0].mean())
    for values, truth in ((auc, 0.5), (found, 0.1)):
        error = np.std(values, ddof=1) / np.sqrt(12)
        assert abs(np.mean(values) - truth) < 5 * error + 1e-3


@pytest.mark.parametrize("models", [8, 16])
def test_per_sample_variance_knows_nothing_either(models):
    auc = []
    for seed in range(12):
        signal, member = game(models, 400, strength=0.0, seed=seed)
        auc.append(lk.evaluate(mi.lira(signal, member, variance="per_sample"), member).auc.mean())
    assert abs(np.mean(auc) - 0.5) < 5 * np.std(auc, ddof=1) / np.sqrt(12) + 1e-3


def half_of_the_models(models, n, seed):
    """The design of the public LiRA code: every sample trains exactly half of the models, and nobody has a twin."""
    return np.random.default_rng(seed).random((models, n)).argsort(0) < models // 2


@pytest.mark.parametrize("attack", [
    mi.lira, lambda s, m: mi.lira(s, m, online=False), lambda s, m: mi.lira(np.stack([s, s]), m),
    lambda s, m: mi.rmia(1 / (1 + np.exp(-s)), m),
    lambda s, m: mi.rmia(1 / (1 + np.exp(-s)), m, population=np.ones(m.shape[1], bool)),
])
def test_without_twins_but_with_half_of_the_models_each_nothing_gives_nothing(attack):
    """One in-reference fewer for members than for others is enough for an AUC of .4 with four models."""
    aucs = []
    for seed in range(12):
        member = half_of_the_models(4, 1500, seed)
        rng = np.random.default_rng(1000 + seed)
        signal = rng.normal(0, 3, 1500) + rng.normal(0, rng.uniform(0.2, 3, 1500), member.shape)
        aucs.append(lk.evaluate(attack(signal, member), member, fprs=(0.1,)).auc.mean())
    assert abs(np.mean(aucs) - 0.5) < 0.01


def test_one_model_of_the_other_side_is_left_out_for_each_sample():
    """By loops: the target's partner, of the models with the sample in their order and those without in theirs."""
    member = half_of_the_models(6, 40, 0)
    signal = np.random.default_rng(1).normal(size=member.shape)
    found = mi.lira(signal, member, variance="per_sample")
    for m in range(6):
        for i in range(40):
            inside, outside = np.flatnonzero(member[:, i]), np.flatnonzero(~member[:, i])
            own, other = (inside, outside) if member[m, i] else (outside, inside)
            gone = {m, other[list(own).index(m)]}
            a, b = (np.array([signal[k, i] for k in who if k not in gone]) for who in (inside, outside))
            wanted = stats.norm.logpdf(signal[m, i], a.mean(), a.std()) - stats.norm.logpdf(signal[m, i], b.mean(), b.std())
            assert found[m, i] == pytest.approx(wanted)
    assert mi.pairing(member_masks(40, 6, seed=0).numpy()) is None and mi.pairing(member[:5]) is None


def test_keeping_the_twin_would_bias_the_attack():
    auc = []
    for seed in range(12):
        signal, member = game(4, 400, strength=0.0, seed=seed)
        auc.append(lk.evaluate(mi.lira(signal, member, variance="pooled", leave_twin_out=False), member).auc.mean())
    assert abs(np.mean(auc) - 0.5) > 0.02


def test_real_signals_are_found():
    signal, member = game(16, 400, strength=2.0)
    assert lk.evaluate(mi.lira(signal, member), member).auc.mean() > lk.evaluate(signal, member).auc.mean() + 0.1 > 0.6


def test_twins():
    member = member_masks(11, 6, seed=0).numpy()
    assert mi.twins(member).tolist() == [1, 0, 3, 2, 5, 4]
    assert mi.twins(member[[0, 2, 3]]).tolist() == [-1, 2, 1]


def test_twins_come_in_pairs():
    rows = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 1], [1, 0, 0], [0, 1, 1], [1, 1, 1]], dtype=bool)
    assert mi.twins(rows).tolist() == [2, 4, 0, -1, 1, -1]


@given(st.lists(st.floats(-30, 30), min_size=3, max_size=6), st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_margin_is_the_log_odds(logits, label):
    z, y = np.array(logits)[None, None], np.array([label])
    p = np.exp(z[0, 0] - z[0, 0].max())
    p /= p.sum()
    rest = np.delete(p, label).sum()
    assert sg.logit_margin(z, y)[0, 0] == pytest.approx(np.log(p[label]) - np.log(rest), abs=1e-7)
    assert sg.confidence(z, y)[0, 0] == pytest.approx(p[label]) and sg.cross_entropy(z, y)[0, 0] >= 0


def test_margin_is_exact_where_probabilities_round_to_0_and_1():
    z = np.float32([[[800.0, 0.0, -5.0], [-900.0, 3.0, 3.0]]])
    found = sg.logit_margin(z, np.array([0, 0]))
    assert found[0] == pytest.approx([800 - np.log1p(np.exp(-5)), -903 - np.log(2)])
    assert sg.confidence(z, np.array([0, 0]))[0].tolist() == [1.0, 0.0]
    p = np.array([0.0, 0.2, 0.9, 1.0])
    from_p = sg.margin_from_probability(p)
    assert np.isfinite(from_p).all() and from_p[1:3] == pytest.approx(np.log(p[1:3] / (1 - p[1:3])))


@pytest.mark.parametrize("digits", [None, 0])
def test_evaluate_against_scikit_learn(digits):
    signal, member = game(4, 150, seed=3)
    scores = signal if digits is None else signal.round(digits)
    fprs = (0.0, 0.05, 0.1, 0.5, 1.0)
    found = lk.evaluate(scores, member, fprs=fprs)
    for m in range(4):
        assert found.auc[m] == pytest.approx(roc_auc_score(member[m], scores[m]))
        fpr, tpr, _ = roc_curve(member[m], scores[m], drop_intermediate=False)
        assert found.balanced_accuracy[m] == pytest.approx(((tpr + 1 - fpr) / 2).max())
        for f, column in zip(fprs, found.tpr[m], strict=True):
            assert column == pytest.approx(tpr[fpr <= f + 1e-12].max())
    assert found.members.tolist() == member.sum(1).tolist() and found.non_members.tolist() == (~member).sum(1).tolist()


def test_a_subset_is_judged_by_the_global_threshold():
    scores, member = game(2, 300, seed=4)
    subset = np.arange(300) < 40
    found = lk.evaluate(scores, member, fprs=(0.1,), subset=subset)
    for m in range(2):
        negatives = np.sort(scores[m][~member[m]])[::-1]
        threshold = negatives[int(0.1 * len(negatives))]
        assert found.tpr[m, 0] == pytest.approx((scores[m][member[m] & subset] > threshold).mean())


def test_precision_counts_those_who_are_accused():
    """Ties at the top keep the threshold from 10 %: a twentieth of the others is accused, or nobody."""
    member = np.arange(400)[None] < 200
    scores = np.where(member, (np.arange(400) % 4 == 0), (np.arange(400) % 20 == 0)).astype(float)
    found = lk.evaluate(scores, member, fprs=(0.1,))
    assert found.tpr_at(0.1) == 0.25 and found.precision(0.1, prior=0.5) == pytest.approx(0.25 / (0.25 + 0.05), abs=0.01)
    tied = lk.evaluate(np.where(member, 1.0, (np.arange(400) % 2)), member, fprs=(0.1,))
    assert tied.tpr_at(0.1) == 0 and tied.precision(0.1, prior=0.5) is None


def test_targets_that_are_alike_are_no_certainty():
    member = np.stack([np.arange(40) < 20, np.arange(40) >= 20])
    found = lk.evaluate(np.zeros(member.shape), member, fprs=(0.5,)).over_targets(0.5)
    alone = lk.evaluate(np.zeros((1, 40)), member[:1], fprs=(0.5,)).interval(0.5, model=0)
    assert found.mean == 0 and (found.low, found.high) == (alone.low, alone.high) and found.high > 0.1


def test_rates_that_cannot_be_resolved_are_not_shown():
    scores, member = game(4, 1000)
    found = lk.evaluate(scores, member, fprs=(0.1, 0.01, 0.001))
    assert found.resolved.tolist() == [True, True, False] and found.tpr_at(0.001) is None and found.tpr_at(0.01) is not None
    assert found.to_frame()["TPR at 0.1 % FPR"].isna().all()
    grid, _ = lk.mean_roc(scores, member)
    assert grid.min() == pytest.approx(5 / 500)
    with pytest.raises(ValueError, match="fpr must be one of"):
        found.tpr_at(0.5)


def test_intervals_within_a_model_and_between_seeds():
    scores, member = game(4, 1000)
    found = lk.evaluate(scores, member, fprs=(0.1,))
    within = found.interval(0.1, model=0)
    k, n = round(within.mean * 500), 500
    taken_as_given = stats.beta.ppf(0.025, k, n - k + 1), stats.beta.ppf(0.975, k + 1, n - k)
    assert within.n == n and within.low < taken_as_given[0] < within.mean < taken_as_given[1] < within.high
    values = [0.1, 0.13, 0.18]
    between = lk.seed_interval(values)
    assert (between.low, between.high) == pytest.approx(stats.t.interval(0.95, 2, np.mean(values), stats.sem(values)))
    assert lk.seed_interval([0.5]).low is None


@pytest.mark.parametrize("variance", ["shrunk", "pooled", "per_sample"])
def test_as_many_models_as_the_message_asks_for_are_enough_and_fewer_are_not(variance):
    with pytest.raises(ValueError) as error:
        mi.lira(*game(2, 60), variance=variance)
    wanted = int(re.search(r"train at least (\d+) models", str(error.value))[1])
    assert np.isfinite(mi.lira(*game(wanted, 60), variance=variance)).all()
    with pytest.raises(ValueError, match="references for every sample"):
        mi.lira(*game(wanted - 2, 60), variance=variance)


@pytest.mark.parametrize(("call", "words"), [
    (lambda s, m: mi.lira(s[:, :5], m), "signal must be"), (lambda s, m: mi.lira(s * np.nan, m), "finite"),
    (lambda s, m: mi.lira(s, m, variance="fixed"), "variance"), (lambda s, m: mi.lira(s[:2], m[:2]), "references"),
    (lambda s, m: mi.lira(s[:4], m[:4], variance="per_sample"), "needs 2"),
    (lambda s, m: mi.rmia(0 * s[:2], m[:2]), "out-reference"),
    (lambda s, m: mi.rmia(0 * s, np.arange(60) % 8 == np.arange(8)[:, None]), "in-reference .* or give offline_a"),
    (lambda s, m: mi.rmia(s, m, gamma=-1.0), "gamma"),
    (lambda s, m: mi.rmia(0 * s, m, population=np.zeros(60, dtype=bool)), "population"),
    (lambda s, m: mi.rmia(s, m), r"p must lie in \[0, 1\], got values from -.*signals.confidence"),
    (lambda s, m: mi.rmia(1 + abs(s), m, population=np.arange(60) < 30), r"p must lie in \[0, 1\]"),
    (lambda s, m: mi.lira(s[:, :0], m[:, :0]), r"at least one model and one sample, got \[8, 0\]"),
    (lambda s, m: mi.rmia(s[:, :0], m[:, :0]), r"at least one model and one sample, got \[8, 0\]"),
    (lambda s, m: lk.evaluate(s * np.nan, m), "NaN"), (lambda s, m: lk.evaluate(s, m | True), "non-member"),
    (lambda s, m: lk.evaluate(s, m, subset=np.zeros(60, dtype=bool)), "at least one member"),
    (lambda s, m: lk.evaluate(s[0], m), r"\[M, N\]"), (lambda s, m: lk.mean_roc(s[:, :8], m[:, :8]), "cannot resolve"),
])
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call(*game())


@pytest.mark.parametrize("name", ["online shrunk", "online pooled", "offline shrunk"])
def test_a_shift_of_a_sample_and_the_scale_of_all_change_no_score(name):
    signal, member = game(models=8, n=60)
    moved = 3.0 * signal + np.random.default_rng(1).normal(0, 5, 60)  # another zero for each sample, another unit
    assert np.allclose(ATTACKS[name](signal, member), ATTACKS[name](moved, member))


def test_measures_only_see_the_order_of_scores():
    scores, member = game(4, 200)
    a, b = lk.evaluate(scores, member), lk.evaluate(np.exp(scores / 3) * 7 - 1, member)
    for field in ("auc", "tpr", "balanced_accuracy"):
        assert np.array_equal(getattr(a, field), getattr(b, field))


def test_what_the_target_and_its_twin_say_has_no_part_in_the_references():
    signal, member = game(models=8, n=30)
    changed = signal.copy()
    changed[1] = np.random.default_rng(2).normal(50, 9, 30)  # row 1 is the twin of row 0
    for attack in (mi.lira, lambda s, m: mi.rmia(s / 100, m)):  # RMIA reads probabilities
        assert np.allclose(attack(abs(signal), member)[0], attack(abs(changed), member)[0], rtol=1e-6)
        assert not np.allclose(attack(abs(signal), member)[2], attack(abs(changed), member)[2])


@pytest.mark.parametrize("digits", [8, 0])
def test_one_threshold_a_class_by_loops(digits):
    signal, member = game(models=6, n=40)
    signal, y = signal.round(digits), np.random.default_rng(0).integers(0, 3, 40)
    found, other = mi.by_class(signal, y, member), mi.twins(member)
    for t in range(6):
        keep = [m for m in range(6) if m not in (t, other[t])]
        for i in range(40):
            pool = np.array([signal[m, j] for m in keep for j in range(40) if not member[m, j] and y[j] == y[i]])
            assert found[t, i] == pytest.approx((pool < signal[t, i]).mean() + (pool == signal[t, i]).mean() / 2)


def test_a_threshold_for_each_class_helps_where_classes_differ_and_is_fair_where_nothing_leaks():
    rng, y = np.random.default_rng(0), np.arange(600) % 3
    member = member_masks(600, 6, seed=0).numpy()
    noise = rng.normal(size=member.shape) + 6 * y
    told = noise + 1.5 * member
    assert lk.evaluate(mi.by_class(told, y, member), member).auc.mean() > lk.evaluate(told, member).auc.mean() + 0.1
    silent = lk.evaluate(mi.by_class(noise, y, member), member, fprs=(0.1,))
    assert abs(silent.auc.mean() - 0.5) < 0.03 and abs(silent.tpr.mean() - 0.1) < 0.03
    with pytest.raises(ValueError, match="no out-reference"):
        mi.by_class(noise[:2], y, member[:2])
    with pytest.raises(ValueError, match=r"labels must be \[N\]"):
        mi.by_class(noise, y[:5], member)


def test_the_naive_attacker_uses_other_peoples_references():
    signal, member = game(models=8, n=50)
    undefended, _ = game(models=8, n=50, strength=3.0, seed=0)
    assert np.allclose(mi.lira(signal, member, references=signal), mi.lira(signal, member))
    naive = mi.lira(signal, member, references=undefended)
    for t in (0, 5):  # target t among the undefended is what the naive attacker believes it sees
        mixed = undefended.copy()
        mixed[t] = signal[t]
        assert np.allclose(naive[t], mi.lira(mixed, member)[t])
    with pytest.raises(ValueError, match="shaped like the signal|signal must be"):
        mi.lira(signal, member, references=undefended[:, :10])


def test_who_was_treated_shows_where_treatment_takes_membership_away():
    rng, member = np.random.default_rng(0), member_masks(300, 8, seed=0).numpy()
    treated = np.arange(300) < 60
    plain = 3.0 * member + rng.normal(size=member.shape)
    defended = 3.0 * (member & ~treated) + rng.normal(size=member.shape)
    scores = mi.treated_inference(defended, plain, member)
    assert np.isnan(scores[~member]).all()
    auc = [roc_auc_score(treated[m], s[m]) for s, m in zip(scores, member, strict=True)]
    none = [roc_auc_score(treated[m], s[m]) for s, m in zip(mi.treated_inference(plain, plain, member), member, strict=True)]
    assert np.mean(auc) > 0.9 and abs(np.mean(none) - 0.5) < 0.06


def test_who_was_treated_by_loops():
    references, member = game(models=6, n=25)
    signal, _ = game(models=6, n=25, strength=0.2)
    found = mi.treated_inference(signal, references, member)
    for t in range(6):
        keep = [m for m in range(6) if m not in (t, slow_twin(member, t))]
        inside = [references[[m for m in keep if member[m, i]], i] for i in range(25)]
        squares = np.array([((r - r.mean()) ** 2).sum() for r in inside])
        free = np.array([len(r) - 1 for r in inside])
        spread = np.sqrt((squares + 8 * squares.sum() / free.sum()) / (free + 8))
        wanted = (np.array([r.mean() for r in inside]) - signal[t]) / spread
        assert np.allclose(found[t], np.where(member[t], wanted, np.nan), equal_nan=True)
