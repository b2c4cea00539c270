"""Measures against brute force, scikit-learn and the promise that chance looks like chance."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from demem_lab import leakage as lk
from demem_lab.data import member_masks


def chance(models=4, n=400, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(models, n)), member_masks(n, models, seed=seed).numpy()


def brute(scores, positive, negative, fprs):
    """AUC, TPR at FPR and best balanced accuracy, by trying every threshold and every pair."""
    p, q = scores[positive], scores[negative]
    auc = np.mean([(a > q).mean() + (a == q).mean() / 2 for a in p])
    rates = [((p >= t).mean(), (q >= t).mean()) for t in [*np.unique(scores), np.inf]] + [(0.0, 0.0)]
    tpr = [max(a for a, b in rates if b <= f + 1e-12) for f in fprs]
    return auc, tpr, max((a + 1 - b) / 2 for a, b in rates)


KINDS = {
    "continuous": lambda s: s,
    "ties": lambda s: np.round(s),
    "constant": lambda s: 0 * s,
    "binary": lambda s: (s > 0.5).astype(float),
    "infinite": lambda s: np.where(s > 1, np.inf, np.where(s < -1, -np.inf, s)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("subset", [False, True])
def test_evaluate_by_brute_force(kind, subset):
    scores, member = chance(3 + 1, 60)
    scores = KINDS[kind](scores + member)
    chosen, fprs = np.arange(60) % 3 == 0, (0.0, 0.04, 0.1, 0.5, 1.0)
    found = lk.evaluate(scores, member, fprs=fprs, subset=chosen if subset else None)
    for m in range(4):
        inside = member[m] & chosen if subset else member[m]
        own = ~member[m] & chosen if subset else ~member[m]
        _, tpr, balanced = brute(scores[m], inside, ~member[m], fprs)
        auc, *_ = brute(scores[m], inside, own, fprs)
        assert found.auc[m] == pytest.approx(auc) and found.tpr[m] == pytest.approx(tpr)
        assert found.balanced_accuracy[m] == pytest.approx(balanced)
        outside = np.flatnonzero(~member[m])
        for f, fpr in enumerate(fprs):  # each is accused whom few enough of the others reach
            reached = [
                sum(scores[m, j] >= scores[m, i] for j in outside if j != i) <= np.floor(fpr * len(outside) + 1e-9)
                for i in np.flatnonzero(own)
            ]
            assert found.accused[m, f] == pytest.approx(np.mean(reached)), (m, fpr)


def test_who_is_hard_and_no_member_is_accused_all_the_same():
    """Dropped samples are no members of anything; where their scores scatter more, one threshold for all still finds them."""
    rng, hard = np.random.default_rng(0), np.arange(2000) < 200
    member = rng.random((4, 2000)) < 0.5
    scores = rng.normal(size=member.shape) * np.where(hard, 3, 1)
    found = lk.evaluate(scores, member, fprs=(0.05,), subset=hard)
    assert found.tpr_at(0.05) > 0.15 and found.accused.mean() > 0.15
    assert abs(found.tpr_at(0.05) - found.accused.mean()) < 0.06
    assert lk.evaluate(scores, member, fprs=(0.05,)).accused.mean() == pytest.approx(0.05, abs=0.001)
    assert np.isnan(lk.evaluate(scores, member | hard, fprs=(0.05,), subset=hard).accused).all()


def uneven():
    """Two targets: 100 non-members and 400."""
    member = np.arange(500) < np.array([[400], [100]])
    return np.random.default_rng(0).normal(size=member.shape) + member, member


def test_the_target_with_fewest_non_members_decides_what_is_resolved():
    scores, member = uneven()
    found = lk.evaluate(scores, member, fprs=(0.05, 0.02))
    assert found.resolved.tolist() == [True, False] and found.tpr_at(0.02) is None


def test_the_target_with_fewest_non_members_decides_what_is_shown_of_a_group():
    scores, member = uneven()
    for fpr, shown in ((0.05, True), (0.02, False)):
        assert lk.by_group(scores, member, {"all": np.ones(500, dtype=bool)}, fpr=fpr)["found"].notna().all() == shown


def test_the_target_with_fewest_non_members_decides_where_the_mean_curve_begins():
    assert lk.mean_roc(*uneven())[0][0] == pytest.approx(0.05)


@pytest.mark.parametrize("found", [
    lambda s, m: lk.evaluate(s, m, fprs=(0.29,)).tpr.mean(),
    lambda s, m: lk.by_group(s, m, {"all": np.ones(200, dtype=bool)}, fpr=0.29).loc["all", "found"],
    lambda s, m: lk.reliably_found(s, m, fpr=0.29).hit.mean(),
], ids=["of all", "of a group", "reliably"])
def test_a_rate_that_rounds_down_still_allows_its_false_positives(found):
    """0.29 * 100 is 28.999999999999996; each target has 100 non-members, and a member above each of them."""
    place, member = np.arange(200) % 100, (np.arange(200) < 100) == np.array([[True], [False]])
    assert found(np.where(member, place + 0.5, place), member) == pytest.approx(0.3)


@pytest.mark.parametrize("members", [1, 59])
def test_one_member_or_one_non_member(members):
    scores, member = np.random.default_rng(0).normal(size=(1, 60)), (np.arange(60) < members)[None]
    found = lk.evaluate(scores, member, fprs=(0.1,))
    auc, tpr, balanced = brute(scores[0], member[0], ~member[0], (0.1,))
    assert (found.auc[0], found.tpr[0, 0], found.balanced_accuracy[0]) == pytest.approx((auc, tpr[0], balanced))


@given(st.integers(0, 10_000), st.sampled_from(list(KINDS)))
@settings(max_examples=30, deadline=None)
def test_order_of_samples_means_nothing_and_rates_only_grow(seed, kind):
    scores, member = chance(2, 50, seed)
    scores = KINDS[kind](scores)
    shuffle = np.random.default_rng(seed).permutation(50)
    fprs = (0.0, 0.1, 0.3, 1.0)
    a, b = (lk.evaluate(s, m, fprs=fprs) for s, m in ((scores, member), (scores[:, shuffle], member[:, shuffle])))
    assert np.allclose(a.auc, b.auc) and np.allclose(a.tpr, b.tpr) and np.allclose(a.balanced_accuracy, b.balanced_accuracy)
    assert (np.diff(a.tpr, axis=1) >= 0).all() and (a.tpr[:, -1] == 1).all()


def test_a_held_out_threshold_is_honest_where_the_best_one_flatters():
    honest, flattering = [], []
    for seed in range(30):
        scores, member = chance(2, 100, seed)
        honest.append(lk.held_out_accuracy(scores, member, seed=seed).mean())
        flattering.append(lk.evaluate(scores, member).balanced_accuracy.mean())
    assert abs(np.mean(honest) - 0.5) < 4 * stats.sem(honest) and np.mean(flattering) > 0.55


def slow_held_out(s, m, y, seed):
    rng, half = np.random.default_rng(seed), np.zeros(len(s), dtype=bool)
    for who in (m, ~m):
        places = rng.permutation(np.flatnonzero(who))
        half[places[: len(places) // 2]] = True

    def best(where):
        if not (m & where).any() or not (~m & where).any():
            return None
        cuts = [np.inf, *np.unique(s[where])[::-1]]
        value = [
            ((s >= t) & m & where).sum() / (m & where).sum() - ((s >= t) & ~m & where).sum() / (~m & where).sum() for t in cuts
        ]
        return cuts[int(np.argmax(value))]

    right = np.zeros(len(s), dtype=bool)
    for i in range(len(s)):
        choosing = ~half if half[i] else half
        cut = best(choosing & (y == y[i]))
        cut = best(choosing) if cut is None else cut
        right[i] = (s[i] >= cut) == m[i]
    return (right[m].mean() + right[~m].mean()) / 2


@pytest.mark.parametrize("classes", [1, 3, 25])
def test_held_out_accuracy_by_loops(classes):
    scores, member = chance(2, 70)
    scores, y = (scores + member).round(1), np.random.default_rng(1).integers(0, classes, 70)
    found = lk.held_out_accuracy(scores[:1], member[:1], y=y, seed=5)
    assert found[0] == pytest.approx(slow_held_out(scores[0], member[0], y, 5))


def test_held_out_accuracy_where_it_is_known():
    _, member = chance(4, 80)
    assert (lk.held_out_accuracy(member.astype(float), member) == 1).all()
    assert (lk.held_out_accuracy(np.zeros(member.shape), member) == 0.5).all()
    y = np.arange(80) % 2
    shifted = member + 10.0 * y  # each class has its own zero
    assert (lk.held_out_accuracy(shifted, member, y=y) == 1).all() and (lk.held_out_accuracy(shifted, member) < 0.8).all()
    with pytest.raises(ValueError, match="at least 2 members"):
        lk.held_out_accuracy(np.zeros((1, 3)), np.array([[True, False, False]]))


def test_precision_is_bayes_rule():
    scores, member = chance(2, 4000)
    found = lk.evaluate(scores + member, member, fprs=(0.1,))
    rng, cut = np.random.default_rng(0), np.quantile(scores[0][~member[0]], 0.9)
    asked = rng.random(200_000) < 0.05  # one in twenty of those asked about is a member
    accused = rng.normal(size=200_000) + asked > cut
    assert found.precision(0.1, prior=0.05) == pytest.approx(asked[accused].mean(), abs=0.02)
    assert found.precision(0.1, prior=0.0) == 0 and found.precision(0.1, prior=1.0) == 1
    assert lk.evaluate(scores[:, :40], member[:, :40], fprs=(0.01,)).precision(0.01, prior=0.5) is None


def test_intervals_over_targets():
    scores, member = chance(6, 200)
    found = lk.evaluate(scores + member, member, fprs=(0.1,))
    over, rates = found.over_targets(0.1), found.tpr[:, 0]
    assert (over.low, over.high) == pytest.approx(stats.t.interval(0.95, 5, rates.mean(), stats.sem(rates)))
    one = lk.evaluate(scores[:1] + member[:1], member[:1], fprs=(0.1,))
    assert one.over_targets(0.1) == one.interval(0.1, model=0)


def simulated_interval(scores, member, fpr, draws=200_000, level=0.95):
    """The interval by simulation: how many non-members lie above the true threshold, and Clopper-Pearson given that."""
    rng, inside, outside = np.random.default_rng(0), scores[member], np.sort(scores[~member])[::-1]
    above, n = rng.binomial(len(outside), fpr, draws), len(inside)
    sure = np.array([0, *((inside >= s).sum() for s in outside)])[above]  # members from the last of those on
    at_most = np.array([*((inside > s).sum() for s in outside), n])[above]  # members above the first of the others
    low = np.where(sure > 0, rng.beta(np.maximum(sure, 1), n - sure + 1), 0)
    high = np.where(at_most < n, rng.beta(at_most + 1, np.maximum(n - at_most, 1)), 1)
    return np.quantile(low, (1 - level) / 2), np.quantile(high, (1 + level) / 2)


@pytest.mark.parametrize(("fpr", "subset"), [(0.1, False), (0.02, False), (0.5, True)])
def test_the_interval_of_one_target_by_simulation(fpr, subset):
    scores, member = chance(2, 600)
    scores, chosen = scores + 1.5 * member, np.arange(600) % 2 == 0
    found = lk.evaluate(scores, member, fprs=(fpr,), subset=chosen if subset else None)
    for m in range(2):
        counted = ~member[m] | chosen if subset else np.ones(600, dtype=bool)
        interval, wanted = found.interval(fpr, model=m), simulated_interval(scores[m][counted], member[m][counted], fpr)
        assert (interval.low, interval.high) == pytest.approx(wanted, abs=4e-3)


def test_an_interval_counts_members():
    found = lk.evaluate(*uneven(), fprs=(0.1,))
    assert [found.interval(0.1, model=m).n for m in (0, 1)] == [400, 100]


@pytest.mark.parametrize(("n", "fpr", "shift"), [(500, 0.01, 1.0), (500, 0.01, 3.0), (100, 0.1, 1.0), (500, 0.1, 0.0)])
def test_the_interval_of_one_target_covers_the_true_rate(n, fpr, shift):
    """A threshold that five non-members decide is uncertain itself; taken as given, 95 % are 63 % (500, 0.01, 1.0)."""
    member, true, covered = (np.arange(2 * n) < n)[None], stats.norm.sf(stats.norm.isf(fpr) - shift), []
    for seed in range(200):
        scores = np.random.default_rng(seed).normal(size=member.shape) + shift * member
        found = lk.evaluate(scores, member, fprs=(fpr,)).over_targets(fpr)
        covered.append(found.low <= true <= found.high)
    assert np.mean(covered) >= 0.92


@given(st.integers(0, 10_000), st.sampled_from(list(KINDS)), st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]))
@settings(max_examples=40, deadline=None)
def test_an_interval_holds_its_own_estimate_also_with_ties(seed, kind, fpr):
    scores, member = chance(2, 80, seed)
    found = lk.evaluate(KINDS[kind](scores + member), member, fprs=(fpr,)).interval(fpr, model=1)
    assert 0 <= found.low <= found.mean <= found.high <= 1 and found.n == member[1].sum()


def test_with_ties_the_interval_covers_what_the_whole_population_shows():
    """Scores in whole numbers: the true rate is that of the lowest number which at most 10 % of all non-members reach, 2."""
    assert stats.norm.sf(1.5) < 0.1 < stats.norm.sf(0.5)
    member, true, covered = (np.arange(400) < 200)[None], stats.norm.sf(1.5 - 1), []
    for seed in range(200):
        scores = np.round(np.random.default_rng(seed).normal(size=member.shape) + member)
        found = lk.evaluate(scores, member, fprs=(0.1,)).over_targets(0.1)
        covered.append(found.low <= true <= found.high)
    assert np.mean(covered) >= 0.92


@pytest.mark.parametrize(("call", "message"), [
    (lambda s, m: lk.evaluate(s, m, fprs=(-0.1,)), "fpr must be finite and >= 0 and <= 1, got -0.1"),
    (lambda s, m: lk.evaluate(s, m, fprs=(2.0,)), "<= 1, got 2.0; .* 0.01 is 1 %"),
    (lambda s, m: lk.evaluate(s, m, fprs=(0.1, np.nan)), "fpr must be finite"),
    (lambda s, m: lk.evaluate(s, m, fprs=0.1), r"fprs must be a sequence of rates, got 0.1; .* \(0.1,\)"),
    (lambda s, m: lk.evaluate(s, m, subset=[3]), r"subset must have one entry for each of the 120 samples, got shape \[1\]"),
    (lambda s, m: lk.evaluate(s, m, subset=np.arange(120)), "subset must be bool, got int64"),
    (lambda s, m: lk.evaluate(s, m, subset=np.ones((3, 120), dtype=bool)), r"subset must be bool \[120\] or \[6, 120\]"),
    (lambda s, m: lk.canaries(s, m, np.array([3, 5]), fpr=0.1), r"planted must have one entry for each of the 120 samples"),
    (lambda s, m: lk.canaries(s, m, np.arange(120), fpr=0.1), "planted must be bool"),
    (lambda s, m: lk.canaries(s, m, m, fpr=0.1), r"planted must be bool \[120\], got shape \[6, 120\]"),
    (lambda s, m: lk.reliably_found(s, m, fpr=0.0), "fpr must be > 0 and <= 1, got 0.0"),
    (lambda s, m: lk.reliably_found(s, m, fpr=-0.1), "fpr must be finite and >= 0 and <= 1, got -0.1"),
    (lambda s, m: lk.reliably_found(s, m, fpr=1.5), "fpr must be .* <= 1, got 1.5"),
    (lambda s, m: lk.seed_interval([]), "at least one value, got none"),
])
def test_impossible_questions_end_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(*chance(6, 120))
    assert "\n" not in str(error.value)


def test_at_a_rate_of_one_everybody_is_accused():
    scores, member = chance(6, 120)
    found = lk.reliably_found(scores, member, fpr=1.0)
    assert (found.hit == 1).all() and (found.false_alarm == 1).all() and found.fraction == 0


def test_the_smallest_count_is_said_in_one_place():
    folder = Path(lk.__file__).parent
    defining = [p.name for p in folder.glob("*.py") if re.search(r"^MIN_FALSE_POSITIVES\s*=", p.read_text(), re.MULTILINE)]
    assert defining == ["leakage.py"]


def test_groups_share_one_threshold():
    scores, member = chance(4, 300)
    easy = np.arange(300) < 60
    scores = scores + 4 * (member & easy)
    table = lk.by_group(scores, member, {"easy": easy, "rest": ~easy, "nobody": np.zeros(300, dtype=bool)}, fpr=0.1)
    assert list(table.index) == ["easy", "rest"]  # a group without members has no row
    for name, inside in (("easy", easy), ("rest", ~easy)):
        one = lk.evaluate(scores, member, fprs=(0.1,), subset=inside)
        alone = lk.evaluate(scores[:, inside], member[:, inside], fprs=(0.1,))
        assert table.loc[name, "auc"] == pytest.approx(alone.auc.mean()) and table.loc[name, "members"] == one.members.sum()
        assert table.loc[name, "found"] == pytest.approx((one.tpr[:, 0] * one.members).sum() / one.members.sum())
        # six non-members of a group of sixty cannot resolve a tenth: no number then
        own = table.loc[name, "found at its own threshold"]
        assert np.isnan(own) if alone.tpr_at(0.1) is None else own == pytest.approx(alone.tpr_at(0.1))
    classes = lk.by_group(scores, member, np.arange(300) % 3, fpr=0.02)
    assert list(classes.index) == ["0", "1", "2"] and "found at its own threshold" not in classes
    assert lk.by_group(scores, member, np.arange(300) % 3, fpr=0.001)["found"].isna().all()
    with pytest.raises(ValueError, match="group 'short'"):
        lk.by_group(scores, member, {"short": easy[:5]}, fpr=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_non_members_of_a_group_are_judged_by_the_others(kind):
    scores, member = chance(4, 120)
    scores, group = KINDS[kind](scores), np.arange(120) % 3 == 0
    row = lk.by_group(scores, member, {"group": group}, fpr=0.1).loc["group"]
    accused, found = [], []
    for s, m in zip(scores, member, strict=True):
        for i in np.flatnonzero(group):
            others = s[~m & (np.arange(120) != i)]
            (found if m[i] else accused).append((others >= s[i]).sum() <= 6)  # 6 of 60 may be beyond a threshold
    assert row["found"] == np.mean(found) and row["accused"] == np.mean(accused) and row["members"] == len(found)
    limits = lk.proportion(sum(accused), len(accused))
    assert (row["accused low (pooled)"], row["accused high (pooled)"]) == (limits.low, limits.high)


def test_a_group_that_only_scatters_gives_nothing_away():
    """One threshold for all finds most of what it finds there, and accuses as many of the group's non-members."""
    hard, counts = np.arange(2000) < 200, []
    for seed in range(8):
        scores, member = chance(8, 2000, seed)
        scores[:, hard] = 3 * scores[:, hard] - 2
        counts.append(lk.by_group(scores, member, {"hard": hard}, fpr=0.01).loc["hard"])
    found, accused, auc = (np.mean([c[name] for c in counts]) for name in ("found", "accused", "auc"))
    trials = 8 * 8 * 100
    assert found > 0.05 and abs(found - accused) < 3 * np.sqrt((found * (1 - found) + accused * (1 - accused)) / trials)
    assert abs(auc - 0.5) < 3 * np.sqrt(201 / (12 * 100 * 100) / 64)  # the error of a rank sum
    told = lk.by_group(scores + 9 * (member & hard), member, {"hard": hard}, fpr=0.01).loc["hard"]
    assert told["low (pooled)"] > told["accused high (pooled)"] and told["auc"] > 0.95


def test_a_group_that_everybody_trained_on_has_no_share_accused():
    scores, member = chance(4, 600)
    always, mostly = np.arange(600) < 30, np.arange(600) >= 570
    member = member | always
    member[1:, mostly] = True  # non-members of the first model only
    table = lk.by_group(scores, member, {"always": always, "mostly": mostly}, fpr=0.1)
    assert table.loc["always", ["accused", "accused low (pooled)", "accused high (pooled)", "auc"]].isna().all()
    assert table.loc["always", "found"] > 0
    alone = lk.evaluate(scores[:1, mostly], member[:1, mostly])
    assert table.loc["mostly", "auc"] == pytest.approx(alone.auc[0]) and "found at its own threshold" not in table


def test_canaries_show_the_worst_case():
    scores, member = chance(4, 600)
    planted = np.arange(600) < 200
    told = lk.canaries(scores + 5 * (member & planted), member, planted, fpr=0.1)
    assert told["at the global threshold"] > 0.95 and told["among canaries"] > 0.95 and told["canaries"] == 200
    silent = lk.canaries(scores, member, planted, fpr=0.1)
    assert silent["among canaries"] < 0.25 and abs(silent["auc among canaries"] - 0.5) < 0.1
    assert told["accused"] < 0.2 and abs(silent["accused"] - silent["at the global threshold"]) < 0.1
    scattered = lk.canaries(scores * np.where(planted, 4.0, 1.0), member, planted, fpr=0.1)  # hard ones: found as members or not
    assert scattered["at the global threshold"] > 0.2
    assert abs(scattered["accused"] - scattered["at the global threshold"]) < 0.1
    assert lk.canaries(scores, member, np.arange(600) < 40, fpr=0.1)["among canaries"] is None


def test_reliably_found_by_loops():
    scores, member = chance(6, 120)
    scores = (scores + member).round(1)
    found = lk.reliably_found(scores, member, fpr=0.1, share=0.6)
    cuts = [np.sort(s[~m])[::-1][int(0.1 * (~m).sum())] for s, m in zip(scores, member, strict=True)]
    for i in range(120):
        hits = [scores[m, i] > cuts[m] for m in range(6) if member[m, i]]
        alarms = [scores[m, i] > cuts[m] for m in range(6) if not member[m, i]]
        assert found.hit[i] == pytest.approx(np.mean(hits)) and found.false_alarm[i] == pytest.approx(np.mean(alarms))
    assert found.fraction == pytest.approx(((found.hit >= 0.6) & (found.false_alarm <= 0.4)).mean())


def test_found_by_nine_of_ten_and_accused_by_one_of_ten_is_reliable():
    member = (np.arange(20) < 10)[:, None] == (np.arange(200) < 100)
    scores = np.where(member, -1.0, np.random.default_rng(0).random(member.shape))
    scores[:, 0] = 5.0 * np.isin(np.arange(20), range(1, 11)) - 1  # found by 1 to 9 of the ten with it, accused by 10
    found = lk.reliably_found(scores, member, fpr=0.05, share=0.9)
    assert (found.hit[0], found.false_alarm[0]) == (0.9, 0.1) and found.fraction == 1 / 200


def test_the_same_few_every_time():
    scores, member = chance(8, 400)
    exposed = np.arange(400) < 40
    told = scores + 50 * (member & exposed) - 50 * (~member & exposed)
    assert lk.reliably_found(told, member, fpr=0.05).fraction == pytest.approx(0.1)
    assert lk.reliably_found(scores, member, fpr=0.05).fraction == 0
    few, mask = chance(4, 20_000)
    lucky = lk.reliably_found(few, mask, fpr=0.1)  # both of two targets, and neither of the other two: 0.1 ** 2 * 0.9 ** 2
    assert lucky.by_chance == pytest.approx(0.0081) and lucky.fraction == pytest.approx(0.0081, abs=0.002)
    with pytest.raises(ValueError, match="cannot resolve .* that takes 5000"):
        lk.reliably_found(scores, member, fpr=0.001)
    with pytest.raises(ValueError, match="a member of one target"):
        lk.reliably_found(scores[:1], member[:1], fpr=0.1)


def test_auc_equals_scikit_learn_on_many_samples():
    scores, member = chance(2, 5000)
    found = lk.evaluate(scores + member, member)
    assert found.auc == pytest.approx([roc_auc_score(m, s) for s, m in zip(scores + member, member, strict=True)])
