"""The report against NumPy on the runs' own arrays."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from demem_lab.accounting import NoGuarantee
from demem_lab.comparison import Comparison, compare, finest_fpr, measure, merge, spell, verdict
from demem_lab.data import member_masks
from demem_lab.experiment import Run
from demem_lab.guarantees import Guarantee
from demem_lab.leakage import Interval

N, M, K = 120, 6, 3


def made_run(name="arm", seed=0, strength=1.0):
    """Tables drawn from a bell, with members a little surer of their label: nothing has to be trained."""
    rng = np.random.default_rng(10 * seed + len(name))
    y, members = rng.integers(0, K, N), member_masks(N, M, seed=seed).numpy()
    tables = []
    for sure in (1.0, 0.3):
        z = rng.normal(size=(M, N, K))
        np.put_along_axis(z, y[None, :, None].repeat(M, 0), (sure + strength * members + z[..., 0])[..., None], 2)
        tables.append(z)
    robust = (tables[0].argmax(-1) == y) & (rng.random((M, N)) < 0.5)
    guarantee = Guarantee(NoGuarantee(f"{name} is made up"), 0, N, "fixed")
    return Run(name, seed, y, members, tables[0], tables[1], robust, guarantee, steps=1, sampling_rate=0.1)


@pytest.fixture(scope="module")
def runs():
    return [made_run(name, seed) for name in ("plain", "treated") for seed in (0, 1, 2)]


GROUPS = {"high": np.arange(N) < 30, "low": np.arange(N) >= 30}


def test_every_number_by_hand(runs):
    run, fpr = runs[0], 0.1
    found = measure(run, GROUPS, fpr=fpr)
    correct = {"accuracy": run.clean.argmax(-1) == run.y, "robust": run.robust}
    for group, inside in {"all": np.ones(N, dtype=bool), **GROUPS}.items():
        for metric, ok in correct.items():
            for prefix, who in (("", ~run.members), ("member ", run.members)):
                hits = [ok[m, i] for m in range(M) for i in range(N) if who[m, i] and inside[i]]
                assert found[group, prefix + metric] == pytest.approx(np.mean(hits))
        rates, areas, accused = {}, {}, {}
        for query in ("clean", "adversarial"):
            per_model, areas[query], accused[query] = [], [], []
            for s, m in zip(run.scores[query], run.members, strict=True):
                out = np.sort(s[~m])[::-1]
                per_model.append((s[m & inside] > out[int(fpr * len(out))]).mean())  # one global threshold
                reached = [(out >= a).sum() - 1 <= int(fpr * len(out)) for a in s[~m & inside]]  # by the others, itself apart
                accused[query].append(np.mean(reached))
                areas[query].append((s[m & inside][:, None] > s[~m & inside]).mean())
            rates[query] = np.mean(per_model)
            assert found[group, f"leak {query}"] == pytest.approx(rates[query])
        stronger = max(rates, key=lambda query: rates[query] - np.mean(accused[query]))
        assert found[group, "leak"] == pytest.approx(rates[stronger])
        assert found[group, "accused"] == pytest.approx(np.mean(accused[stronger]))
        assert found[group, "auc"] == pytest.approx(max(np.mean(a) for a in areas.values()))


def test_the_query_that_gives_away_more_is_taken_not_the_one_that_scatters_more():
    """Clean queries find many of a group, and accuse as many who were not there; adversarial ones find fewer, and know."""
    rng, n, models = np.random.default_rng(0), 400, 8
    members, hard, y = member_masks(n, models, seed=0).numpy(), np.arange(n) < 100, np.zeros(n, dtype=int)
    run = made_run()
    scattered = rng.normal(size=(models, n)) * np.where(hard, 9, 1)
    told = rng.normal(size=(models, n)) + 0.7 * (members & hard)
    tables = [np.stack([z, 0 * z], -1) for z in (scattered, told)]
    run = replace(run, y=y, members=members, clean=tables[0], adversarial=tables[1], robust=members)
    run.__dict__["scores"] = {"clean": scattered, "adversarial": told}  # as an attack without references would score them
    found = measure(run, {"hard": hard}, fpr=0.05)
    assert found["hard", "leak clean"] > found["hard", "leak adversarial"] + 0.05
    assert found["hard", "leak"] == found["hard", "leak adversarial"] and found["hard", "accused"] < 0.1
    assert measure(run, {"easy": ~hard}, fpr=0.05)["easy", "leak"] <= 0.1


def test_nothing_is_no_fraction_of_zero(runs):
    report = compare(runs)
    one = (report.rows["arm"] == "plain") & (report.rows["seed"] == 1)
    rows = report.rows.assign(value=report.rows["value"].where(~one, 0.0))
    with pytest.raises(ValueError, match="'robust' of group 'all' is 0 for 'plain' at some seed"):
        replace(report, rows=rows).change("treated", "plain", "robust")


def test_a_group_without_members_has_no_leakage_and_unresolved_rates_are_missing(runs):
    lonely = np.zeros(N, dtype=bool)
    lonely[3] = True  # a member of half of the models only
    found = measure(runs[0], {"lonely": lonely}, fpr=0.1)
    assert ("lonely", "accuracy") in found and ("lonely", "leak") not in found and ("lonely", "auc") not in found
    fine = measure(runs[0], fpr=0.01)
    assert ("all", "auc") in fine and ("all", "leak") not in fine and ("all", "leak clean") not in fine


def test_intervals_over_seeds_and_differences_within_them(runs):
    report = compare(runs[::-1], groups=lambda seed: GROUPS)  # the order of the runs does not matter
    a = np.array([measure(r, GROUPS, fpr=report.fpr)["high", "robust"] for r in runs[:3]])
    b = np.array([measure(r, GROUPS, fpr=report.fpr)["high", "robust"] for r in runs[3:]])
    assert report.arms == ["treated", "plain"] and np.allclose(report.values("plain", "robust", "high"), a)
    found = report.interval("plain", "robust", "high")
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 2, a.mean(), stats.sem(a)))
    assert report.mean("plain", "robust", "high") == pytest.approx(a.mean()) and found.n == 3
    gap = report.difference("treated", "plain", "robust", "high")
    paired = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert (gap.low, gap.high) == pytest.approx((paired.low, paired.high)) and gap.mean == pytest.approx((b - a).mean())
    relative = report.change("treated", "plain", "robust", "high")
    assert relative.mean == pytest.approx(np.mean(b / a - 1))
    assert report.guarantees == {name: f"no guarantee: {name} is made up" for name in ("plain", "treated")}


def test_groups_belong_to_a_seed(runs):
    report = compare(runs[:3], groups=lambda seed: {"own": np.arange(N) % 3 == seed})
    for run, value in zip(runs[:3], report.values("plain", "accuracy", "own"), strict=True):
        own = np.arange(N) % 3 == run.seed
        assert value == pytest.approx((run.clean.argmax(-1) == run.y)[~run.members & own].mean())


def test_what_shares_between_seeds_cancels_in_differences():
    rows = [
        (arm, seed, "all", "leak", base + shift + noise)
        for seed, base, noise in ((0, 0.1, 0.01), (1, 0.5, -0.01), (2, 0.9, 0.0))
        for arm, shift, noise in (("a", 0.0, 0.0), ("b", 0.05, noise))
    ]
    report = Comparison(pd.DataFrame(rows, columns=["arm", "seed", "group", "metric", "value"]), 0.1, {})
    gap = report.difference("b", "a", "leak")
    assert gap.mean == pytest.approx(0.05) and gap.low > 0 and report.interval("a", "leak").low < 0


@given(st.integers(1, 20_000))
def test_the_finest_rate_has_five_expected_false_positives(non_members):
    if non_members < 50:
        with pytest.raises(ValueError, match="at least 50"):
            finest_fpr(non_members)
    else:
        fits = [(per_mille, f) for per_mille, f in ((1, 0.001), (10, 0.01), (20, 0.02), (50, 0.05), (100, 0.1))
                if per_mille * non_members >= 5000]
        assert finest_fpr(non_members) == min(fits)[1]


def test_the_default_rate_is_what_the_smallest_run_resolves(runs):
    assert compare(runs[:1]).fpr == 0.1 and compare(runs[:1], fpr=0.5).fpr == 0.5


def test_the_default_rate_is_what_the_smallest_of_several_runs_resolves(runs):
    run = runs[0]
    many = {name: np.concatenate(10 * [getattr(run, name)], axis=1) for name in ("members", "clean", "adversarial", "robust")}
    big = replace(run, name="big", y=np.tile(run.y, 10), **many)
    assert compare([big]).fpr == 0.01 and compare([run, big]).fpr == 0.1


def test_the_default_rate_is_what_the_smallest_model_resolves(runs):
    members = runs[0].members.copy()
    members[0, np.flatnonzero(~members[0])[:15]] = True
    with pytest.raises(ValueError, match="45 non-members cannot resolve"):
        compare([replace(runs[0], members=members)])


def test_a_table_for_people(runs):
    report = compare(runs, groups=lambda seed: GROUPS)
    table = report.to_frame((("robust", "all"), ("leak", "high")), arms=["treated"])
    assert list(table.index) == ["treated"] and list(table.columns) == ["robust", "leak, high"]
    found = report.interval("treated", "robust")
    assert table.loc["treated", "robust"] == f"{100 * found.mean:.1f} ± {100 * (found.high - found.mean):.1f}"
    assert list(report.to_frame().index) == ["plain", "treated"]
    assert spell(Interval(0.5, None, None, 1)) == "50.0" and spell(Interval(1.5, 1.0, 2.0, 3), percent=False) == "1.5 ± 0.5"


def test_reports_are_merged_at_one_rate_only(runs):
    both, apart = compare(runs, fpr=0.1), [compare(runs[:3], fpr=0.1), compare(runs[3:], fpr=0.1)]
    joined = merge(*apart, apart[0])
    assert joined.arms == both.arms and joined.guarantees == both.guarantees
    for arm in both.arms:
        assert np.array_equal(joined.values(arm, "leak"), both.values(arm, "leak"))
    with pytest.raises(ValueError, match="cannot be merged"):
        merge(apart[0], compare(runs[3:], fpr=0.2))


@pytest.mark.parametrize(("low", "high", "word"), [
    (0.01, 0.2, "HOLDS"), (-0.1, 0.2, "NOT DECIDED"), (-0.3, -0.1, "CONTRADICTED"), (None, None, "NOT DECIDED"),
    (0.0, 0.2, "NOT DECIDED"),
])
def test_a_verdict_needs_the_whole_interval(low, high, word):
    assert verdict("it leaks", Interval(0.1, low, high, 3)).startswith(f"{word}: it leaks (+10.0 points")


def test_a_difference_of_nearly_nothing_has_no_minus_zero():
    assert verdict("it leaks", Interval(-0.0004, -0.0004, 0.0004, 3)).endswith(
        "(+0.0 points, 95 % interval +0.0 to +0.0, 3 seeds)"
    )


@pytest.mark.parametrize(("call", "kind", "words"), [
    (lambda r: compare([]), ValueError, "at least one run"), (lambda r: compare([r[0], *r]), ValueError, "given twice.*plain"),
    (lambda r: compare(r, groups=lambda s: {"short": np.ones(7, dtype=bool)}), ValueError, "'short'.*120 samples"),
    (lambda r: compare(r, groups=lambda s: {"nobody": np.zeros(N, dtype=bool)}), ValueError, "not empty"),
    (lambda r: compare(r).values("plian", "leak"), KeyError, "plain.*treated"),
    (lambda r: compare(r).mean("plain", "robustness"), KeyError, "metrics"),
])
def test_bad_input(runs, call, kind, words):
    with pytest.raises(kind, match=words):
        call(runs)


@pytest.mark.parametrize("which", ["difference", "change"])
def test_only_the_same_seeds_are_paired(runs, which):
    for unpaired in (compare([runs[0], runs[4]]), compare([runs[0], *runs[3:]])):  # other seeds; one seed against three
        with pytest.raises(ValueError, match="seeds"):
            getattr(unpaired, which)("plain", "treated", "robust")


def test_reports_that_disagree_are_not_merged(runs):
    first, other = (compare(some, groups=lambda _: GROUPS) for some in (runs[:2], [made_run("plain", 1, strength=3.0)]))
    assert merge(first, first).rows.equals(first.rows)
    with pytest.raises(ValueError, match="do not agree: .* for arm 'plain' at seed 1 is .* and ") as caught:
        merge(first, other)
    assert "\n" not in str(caught.value)
    empty = pd.DataFrame([("plain", 1, "all", "auc", float("nan"))], columns=first.rows.columns)
    assert len(merge(Comparison(empty, 0.1, {}), Comparison(empty, 0.1, {})).rows) == 1


def test_beyond_needs_both_of_its_parts_at_every_seed(runs):
    report = compare(runs[:3], groups=lambda _: GROUPS, fpr=0.1)
    r = report.rows
    lacking = replace(report, rows=r[~((r.metric == "accused") & (r.group == "high") & (r.seed == 1))])
    assert np.isfinite(lacking.values("plain", "beyond", "low")).all()
    with pytest.raises(ValueError, match=r"'leak' of group 'high' at seeds \[0, 1, 2\], 'accused' at \[0, 2\]"):
        lacking.interval("plain", "beyond", "high")
    with pytest.raises(ValueError, match="'beyond' needs both"):
        lacking.difference("plain", "plain", "beyond", "high")
