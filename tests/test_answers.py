"""What the panels answer, against the attack itself, counting by hand, and the package's measures."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from demem_lab import answers, leakage
from demem_lab.answers import attack_path, cut_at, leak_at, membership_scores, risks_of
from demem_lab.attacks import FGSM, PGD
from demem_lab.data import member_masks
from demem_lab.leakage import evaluate
from demem_lab.membership import lira
from demem_lab.risk import protected_set
from demem_lab.signals import logit_margin


@pytest.fixture
def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 3))


def ensemble(seed, models=8, n=60):
    """A run whose models know their members, as tables."""
    rng = np.random.default_rng(seed)
    y, member = rng.integers(0, 3, n), member_masks(n, models, seed=seed).numpy()
    logits = rng.normal(size=(models, n, 3)).astype(np.float32)
    logits[:, np.arange(n), y] += 1 + 2 * member
    return SimpleNamespace(y=y, members=member, clean=logits, adversarial=logits - 0.3, models=models)


@pytest.mark.parametrize("name", ["PGD, Linf", "PGD, L2", "FGSM"])
def test_the_path_ends_where_the_attack_does(tiny, net, name):
    attack = answers.ATTACKS[name](0.15, 7, 16)
    x, y = tiny.x[4:5], tiny.y[4:5]
    path = attack_path(net, x, y, attack)
    assert np.array_equal(path.images[-1], attack(net, x, y)[0].numpy())
    assert np.array_equal(path.images[0], x[0].numpy()) and len(path.images) == attack.steps + 1
    net.eval()
    with torch.no_grad():
        wanted = torch.cat([net(torch.tensor(z[None])).softmax(-1) for z in path.images]).numpy()
    assert np.allclose(path.probabilities, wanted, atol=1e-6)
    assert path.fooled == (wanted[-1].argmax() != tiny.y[4].item())
    assert np.allclose(path.change, path.images[-1] - path.images[0])


def test_a_network_in_training_mode_answers_twice_alike(tiny, net):
    net.train()
    first, again = (attack_path(net, tiny.x[:1], tiny.y[:1], PGD(0.1, 3, random_start=False)) for _ in range(2))
    assert np.array_equal(first.probabilities, again.probabilities) and net.training


def test_l2_takes_the_root_mean_square(tiny, net):
    path = attack_path(net, tiny.x[:1] * 0.2 + 0.4, tiny.y[:1], answers.ATTACKS["PGD, L2"](0.05, 10, 16))
    assert np.sqrt((path.change**2).mean()) == pytest.approx(0.05, rel=1e-4)


def test_no_attack_is_one_picture(tiny, net):
    path = attack_path(net, tiny.x[:1], tiny.y[:1], answers.ATTACKS["none"](0.1, 5, 16))
    assert len(path.images) == len(path.probabilities) == 1 and not path.change.any()


def test_paths_that_do_not_exist(tiny, net):
    with pytest.raises(ValueError, match="one image"):
        attack_path(net, tiny.x[:2], tiny.y[:2], FGSM(0.1))
    for attack in (PGD(0.1, 3), PGD(0.1, 3, restarts=2)):
        with pytest.raises(ValueError, match="no single path"):
            attack_path(net, tiny.x[:1], tiny.y[:1], attack)
    with pytest.raises(ValueError, match="labels"):
        attack_path(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), tiny.x[2:3], tiny.y[2:3], None)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.31, 1.0])
def test_leak_is_what_one_counts(share):
    rng = np.random.default_rng(3)
    member = rng.random(400) < 0.5
    scores = rng.normal(size=400).round(1) + member  # rounded: there are ties
    leak = leak_at(scores, member, share=share, fpr=0.05)
    count = round(share * 400)
    threshold = sorted(scores, reverse=True)[count - 1] if count else np.inf
    hits = sum(1 for s, m in zip(scores, member, strict=True) if m and s >= threshold)
    alarms = sum(1 for s, m in zip(scores, member, strict=True) if not m and s >= threshold)
    inside, outside = int(member.sum()), int((~member).sum())
    assert leak.threshold == threshold
    assert leak.found.mean == hits / inside and leak.false.mean == alarms / outside
    assert leak.accuracy.mean == pytest.approx((hits + outside - alarms) / 400)
    low = stats.beta.ppf(0.025, hits, inside - hits + 1) if hits else 0.0
    assert leak.found.low == pytest.approx(low, abs=1e-9)
    best = max(((scores >= t) == member).mean() for t in [*scores, np.inf])
    assert leak.best_accuracy.mean == pytest.approx(best)
    assert leak.found_at_fpr.mean == pytest.approx(evaluate(scores[None], member[None], fprs=(0.05,)).tpr[0, 0])
    assert leak.members.sum() == inside and leak.non_members.sum() == outside
    false, true = leak.curve
    assert any(np.isclose(false, leak.false.mean) & np.isclose(true, leak.found.mean))


def test_a_constant_score_has_a_histogram():
    leak = leak_at(np.zeros(60), np.arange(60) % 2 == 0, share=0.1, fpr=0.2)
    assert leak.found.mean == leak.false.mean == 1 and leak.members.sum() == 30


def test_every_attack_on_every_signal():
    run = ensemble(0)
    for signal in answers.READ:
        for attack in answers.MEMBERSHIP:
            scores = membership_scores(run.clean, run.y, run.members, signal=signal, attack=attack)
            assert scores.shape == run.members.shape and np.isfinite(scores).all()
            assert evaluate(scores, run.members).auc.mean() > (0.5 if signal == "entropy" else 0.6), (signal, attack)
    wanted = lira(logit_margin(run.clean, run.y), run.members)
    assert np.array_equal(membership_scores(run.clean, run.y, run.members, signal="logit margin", attack="LiRA"), wanted)
    with pytest.raises(ValueError, match="attack"):
        membership_scores(run.clean, run.y, run.members, signal="loss", attack="telepathy")


def test_risks_are_means_over_both_sides_of_all_runs():
    runs = [ensemble(0), ensemble(0, models=4)]
    risks = risks_of(runs, {"cheap": np.arange(60)})
    i = 17
    p = [(m[i], np.exp(z[i, r.y[i]]) / np.exp(z[i]).sum()) for r in runs for m, z in zip(r.members, r.adversarial, strict=True)]
    inside, outside = np.mean([v for m, v in p if m]), np.mean([v for m, v in p if not m])
    assert risks.scores["memorization"][i] == pytest.approx(inside - outside, abs=1e-6)
    assert [side[i] for side in risks.sides(risks.p)] == pytest.approx([inside, outside], abs=1e-6)
    assert list(risks.scores) == ["memorization", "cheap"]
    for broken in (np.arange(59), np.full(60, np.nan)):
        with pytest.raises(ValueError, match="cheap"):
            risks_of(runs, {"cheap": broken})


@pytest.mark.parametrize("share, above, below", [(0.0, 0, 12), (0.05, 2, 12), (0.5, 12, 12), (1.0, 12, 0)])
def test_the_cut_lies_between_its_rows(share, above, below):
    score = np.random.default_rng(0).random(40).round(1)
    cut = cut_at(score, share=share)
    rows = cut.rows
    assert set(cut.order[: cut.count]) == set(np.flatnonzero(protected_set(score, fraction=share).mask))
    assert (np.diff(score[cut.order]) <= 0).all() and list(rows["riskiest"]) == list(cut.order[:12])
    assert (len(rows["just above"]), len(rows["just below"])) == (above, below)
    shown = [*rows["just above"], *rows["just below"]]
    place = list(cut.order).index(shown[0])
    assert shown == list(cut.order[place : place + len(shown)])


@pytest.mark.parametrize("count", [0, 1, 17, 898, 899])
def test_the_quick_interval_is_clopper_and_pearsons(count):
    wanted, found = leakage.proportion(count, 899), answers.proportion(count, 899)
    assert (found.mean, found.low, found.high, found.n) == pytest.approx((wanted.mean, wanted.low, wanted.high, 899), abs=1e-9)
