"""The solutions against the package, against libraries, and against slow ways to say the same."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_curve

from demem_lab import attacks, leakage, risk, solutions
from demem_lab.comparison import finest_fpr
from demem_lab.membership import lira
from demem_lab.models import MLP
from demem_lab.remedies import release_schedule
from demem_lab.signals import modified_entropy

SEEDS = st.integers(0, 2**31 - 1)
quick = settings(max_examples=25, deadline=None)


def halves(rng, pairs, n):
    half = rng.random((pairs, n)) < 0.5
    return np.concatenate([half, ~half])


@pytest.fixture(scope="module")
def net():
    return MLP(hidden=(16,)).build(models=1, shape=(1, 4, 4), classes=3, seeds=(0,))


def test_gap_by_hand():
    right, member = np.array([[1, 1, 0, 0], [1, 0, 0, 0]], bool), np.array([[1, 1, 0, 0], [1, 1, 1, 0]], bool)
    assert solutions.gap(right, member) == pytest.approx((1 - 0 + 1 / 3 - 0) / 2)


@quick
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9).filter(lambda v: np.std(v) > 1e-3))
def test_interval_is_scipys(values):
    ours, found = solutions.interval(np.array(values)), leakage.seed_interval(np.array(values))
    assert ours == pytest.approx((found.low, found.high))
    assert ours == pytest.approx(stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values)))


def test_fgsm_is_the_packages_and_raises_the_loss(net):
    x, y = torch.rand(9, 1, 4, 4), torch.randint(0, 3, (9,))
    found = solutions.fgsm(net, x, y, 0.1)
    assert torch.equal(found, attacks.FGSM(0.1)(net, x, y)) and not found.requires_grad
    assert F.cross_entropy(net(found), y) > F.cross_entropy(net(x), y)


@quick
@given(SEEDS, st.floats(0, 1))
def test_project_is_the_packages_and_nobody_nearer_is_allowed(seed, eps):
    rng = torch.Generator().manual_seed(seed)
    x, z = torch.rand(2, 1, 3, 3, generator=rng), torch.randn(2, 1, 3, 3, generator=rng)
    found = solutions.project(z, x, eps)
    assert torch.allclose(found, attacks.PGD(eps).project(z, x), atol=1e-6)
    other = solutions.project(torch.randn(2, 1, 3, 3, generator=rng), x, eps)
    assert ((found - z).abs() <= (other - z).abs() + 1e-6).all()


def test_robust_by_hand():
    clean, attacked = np.array([1, 1, 1, 0], bool), np.array([[1, 0, 1, 1], [1, 1, 0, 1]], bool)
    assert solutions.robust(clean, attacked) == 0.25


@quick
@given(SEEDS, st.sampled_from([0.0, 0.01, 0.1, 0.25, 1.0]), st.integers(0, 2))
def test_tpr_at_fpr_is_the_packages_and_sklearns(seed, fpr, digits):
    rng = np.random.default_rng(seed)
    member = rng.permutation(np.arange(60) < 20)
    scores = rng.normal(member, 1).round(digits)
    false, true, _ = roc_curve(member, scores, drop_intermediate=False)
    assert solutions.tpr_at_fpr(scores, member, fpr) == pytest.approx(true[false <= fpr + 1e-12].max())
    assert solutions.tpr_at_fpr(scores, member, fpr) == leakage.evaluate(scores[None], member[None], fprs=(fpr,)).tpr[0, 0]


@quick
@given(SEEDS, st.integers(4, 7))
def test_shadow_split_and_log_ratio_make_lira(seed, pairs):
    """Split and ratio together give the package's attack, which leaves out target and twin too."""
    rng = np.random.default_rng(seed)
    members = halves(rng, pairs, 40)
    signal = rng.normal(members, 1.0)
    scores = lira(signal, members, variance="per_sample")
    for target, image in ((0, 0), (pairs, 1), (2, 2)):
        inside, outside = solutions.shadow_split(members, target, image)
        assert inside.sum() == outside.sum() == pairs - 1
        s = signal[:, image]
        assert solutions.log_ratio(s[target], s[inside], s[outside]) == pytest.approx(scores[target, image])


def test_log_ratio_far_out_and_against_a_formula():
    rng = np.random.default_rng(0)
    a, b = rng.normal(2, 1, 8), rng.normal(-1, 2, 6)
    for value in (0.0, 300.0):
        wanted = sum(s * (-((value - v.mean()) ** 2) / (2 * v.var()) - np.log(v.var()) / 2) for s, v in ((1, a), (-1, b)))
        assert solutions.log_ratio(value, a, b) == pytest.approx(wanted)


@quick
@given(SEEDS)
def test_memorization_top_and_until_are_the_packages(seed):
    rng = np.random.default_rng(seed)
    member = halves(rng, 3, 20)
    p = rng.random(member.shape).round(1)
    score = solutions.memorization(p, member)
    np.testing.assert_allclose(score, risk.memorization(p, member).score, atol=1e-12)
    for fraction in (0.0, 0.13, 0.5, 1.0):
        assert (solutions.top(score, fraction) == risk.protected_set(score, fraction=fraction).mask).all()
    for power in (1.0, 4.0):
        np.testing.assert_allclose(solutions.until(score, power), release_schedule(score, power=power), atol=1e-6)


def test_clip_and_the_noise():
    g = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    assert torch.allclose(solutions.clip(g, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
    quiet = solutions.noisy_mean(g, 0.0, 1.0, 4, torch.Generator())
    assert torch.allclose(quiet, g.sum(0) / 4)
    wide = solutions.noisy_mean(torch.zeros(0, 100_000), 2.0, 1.5, 6, torch.Generator().manual_seed(0))
    assert float(wide.std()) == pytest.approx(3 / 6, rel=0.02) and float(wide.mean()) == pytest.approx(0, abs=0.01)


@quick
@given(SEEDS, st.floats(0, 1))
def test_selective_is_two_known_things_added(seed, sigma):
    rng = torch.Generator().manual_seed(seed)
    g, who = torch.randn(5, 7, generator=rng), torch.rand(5, generator=rng) < 0.5
    private = solutions.noisy_mean(solutions.clip(g[who], 1.0), sigma, 1.0, 4, torch.Generator().manual_seed(1))
    found = solutions.selective(g, who, sigma, 1.0, 4, torch.Generator().manual_seed(1))
    assert torch.allclose(found, private + g[~who].sum(0) / 4, atol=1e-5)


def test_loss_variance():
    losses = torch.tensor([1.0, 2.0, 4.0])
    assert solutions.loss_variance(losses, 0.2).item() == pytest.approx(7 / 3 + 0.2 * np.var([1, 2, 4], ddof=1))
    assert solutions.loss_variance(losses[:1], 0.2).item() == 1.0


def test_n_fgsm_is_the_packages_and_leaves_the_ball(net):
    x, y = torch.rand(9, 1, 4, 4), torch.randint(0, 3, (9,))
    noise = (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(5)) - 1) * 0.2
    found = solutions.n_fgsm(net, x, y, 0.1, noise)
    assert torch.allclose(found, attacks.NFGSM(0.1)(net, x, y, rng=torch.Generator().manual_seed(5)), atol=1e-6)
    assert (found - x).abs().max() > 0.1 + 1e-3


@quick
@given(SEEDS)
def test_modified_entropy_is_the_packages(seed):
    logits = np.random.default_rng(seed).normal(size=4)
    p = np.exp(logits) / np.exp(logits).sum()
    assert solutions.modified_entropy(p, 2) == pytest.approx(modified_entropy(logits[None, None], np.array([2]))[0, 0], rel=1e-4)


def test_held_out_finds_nothing_where_there_is_nothing():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(300):
        member, new = rng.random(40) < 0.5, rng.random(40) < 0.5
        found.append(solutions.held_out(rng.normal(size=40), member, rng.normal(size=40), new))
    assert np.mean(found) == pytest.approx(0.5, abs=0.015)


def test_cost_and_finest():
    assert solutions.cost(0) == 3 and solutions.cost(10) == 23
    rates = (0.1, 0.05, 0.02, 0.01, 0.001)
    assert all(solutions.finest(n, rates) == finest_fpr(n, rates) for n in (50, 120, 899, 5_000))
