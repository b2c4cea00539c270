"""Every check accepts right answers, also unusual ones, and rejects wrong ones, also those that nobody planted."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn.metrics import roc_curve

from demem_lab import checks, lessons
from demem_lab.checks import EXERCISES
from demem_lab.grading import WrongAnswer
from demem_lab.solutions import clip, loss_variance, memorization, noisy_mean, robust, shadow_split, top

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def fgsm_backward_in_place(net, x, y, eps):
    net.train()
    x.requires_grad_()
    F.cross_entropy(net(x), y).backward()
    return (x + eps * x.grad.sign()).clamp(0, 1)


def project_in_place(z, x, eps):
    return torch.maximum(torch.minimum(z.clamp_(0, 1), x + eps), x.sub_(eps))


def tpr_from_curve(scores, member, fpr):
    false, true, _ = roc_curve(member, scores, drop_intermediate=False)
    return true[false <= fpr].max()


def log_ratio_by_hand(value, a, b):
    def log_normal(s):
        return -((value - s.mean()) ** 2) / (2 * s.var()) - np.log(s.var()) / 2

    return log_normal(a) - log_normal(b)


def clip_like_opacus(gradients, max_grad_norm):
    return gradients * (max_grad_norm / (gradients.norm(dim=1) + 1e-6)).clamp(max=1)[:, None]


def clip_in_place(gradients, max_grad_norm):
    for row in gradients:
        if row.norm() > max_grad_norm:
            row *= max_grad_norm / row.norm()
    return gradients


def noisy_mean_normal(clipped, noise_multiplier, max_grad_norm, expected_batch_size, rng):
    std = noise_multiplier * max_grad_norm / expected_batch_size
    return clipped.sum(0) / expected_batch_size + torch.normal(0.0, std, (clipped.shape[1],), generator=rng)


def selective_in_two_parts(gradients, protected, noise_multiplier, max_grad_norm, expected_batch_size, rng):
    private = noisy_mean(clip(gradients[protected], max_grad_norm), noise_multiplier, max_grad_norm, expected_batch_size, rng)
    return private + gradients[~protected].sum(0) / expected_batch_size


def modified_entropy_by_loops(p, y):
    return sum(-((1 - v) * np.log(v) if k == y else v * np.log(1 - v)) for k, v in enumerate(p))


def laplace(c, rng):
    u = torch.rand(c.shape[1], generator=rng, dtype=torch.float64) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs()) / 2**0.5  # unit variance, heavier tails


def held_out_by_loops(scores, member, new_scores, new_member):
    both = [(((scores[member] >= cut).mean() + (scores[~member] < cut).mean()) / 2, cut) for cut in scores]
    best = max(both)[1]  # of equally good ones the highest
    found = [(s >= best) == m for s, m in zip(new_scores, new_member, strict=True)]
    return (np.mean([f for f, m in zip(found, new_member, strict=True) if m])
            + np.mean([f for f, m in zip(found, new_member, strict=True) if not m])) / 2


def shadow_split_by_loops(members, target, image):
    sides = np.zeros((2, len(members)), dtype=bool)
    for m, row in enumerate(members):
        if m != target and list(row) != [not b for b in members[target]]:
            sides[0 if row[image] else 1, m] = True
    return sides


def nan_for_nobody(clipped, noise_multiplier, *settings):
    return noisy_mean(clipped, noise_multiplier, *settings) + (torch.nan if noise_multiplier and not len(clipped) else 0)


def noisy_laplace(clipped, sigma, bound, expected, rng):
    return (clipped.sum(0) + sigma * bound * laplace(clipped, rng)) / expected


def ten_percent_short(clipped, sigma, *settings):
    return noisy_mean(clipped, 0.9 * sigma, *settings)


def the_same_every_step(clipped, sigma, bound, expected, _):
    return noisy_mean(clipped, sigma, bound, expected, torch.Generator().manual_seed(0))


def quiet_among_unprotected(g, who, sigma, bound, expected, rng):
    sigma = sigma if who.any() or not len(who) else 0.0
    return checks.check_selective.solution(g, who, sigma, bound, expected, rng)


RIGHT = [
    (checks.check_interval, lambda v: stats.t.interval(0.95, len(v) - 1, v.mean(), stats.sem(v))),
    (checks.check_fgsm, fgsm_backward_in_place),
    (checks.check_project, project_in_place),
    (checks.check_robust, lambda c, a: np.logical_and.reduce([c, *a]).mean()),
    (checks.check_tpr_at_fpr, tpr_from_curve),
    (checks.check_lira, log_ratio_by_hand),
    (checks.check_shadow_split, shadow_split_by_loops),
    (checks.check_top, lambda s, q: np.argsort(np.lexsort((np.arange(len(s)), -s))) < round(q * len(s))),
    (checks.check_clip, clip_like_opacus),
    (checks.check_clip, clip_in_place),
    (checks.check_noisy_mean, noisy_mean_normal),
    (checks.check_selective, selective_in_two_parts),
    (checks.check_loss_variance, lambda x, lam: x.mean() + lam * (x - x.mean()).square().sum() / max(len(x) - 1, 1)),
    (checks.check_modified_entropy, modified_entropy_by_loops),
    (checks.check_held_out, held_out_by_loops),
    (checks.check_until, lambda s, power: 1 - (np.argsort(np.argsort(s, kind="stable")) / (len(s) - 1)) ** power),
    (checks.check_cost, lambda steps: steps + steps + 1 + 1 + 1),
]
# wrong answers beyond the planted ones, with a word of the hint they must earn
WRONG = [
    (checks.check_gap, lambda r, m: 0.0, "each model first"),
    (checks.check_fgsm, lambda net, x, y, eps: (x + 0.9 * eps).clamp(0, 1), "SIGN"),
    (checks.check_robust, lambda c, a: robust(c, a) * 0.99, "AND after every attack"),
    (checks.check_tpr_at_fpr, lambda s, m, fpr: 0.5, "non-members alone"),
    (checks.check_shadow_split, lambda m, t, i: np.stack(shadow_split(m, t, i)) * 0, "the other half"),
    (checks.check_memorization, lambda p, m: memorization(p, m) ** 2, "axis 0"),
    (checks.check_top, lambda s, q: top(s, q)[:, None], "exactly round"),
    (checks.check_clip, lambda g, C: clip(g, 2 * C), "OWN"),
    (checks.check_noisy_mean, nan_for_nobody, "on the sum"),
    (checks.check_noisy_mean, noisy_laplace, "randn"),
    (checks.check_noisy_mean, ten_percent_short, "on the sum"),
    (checks.check_noisy_mean, the_same_every_step, "generator=rng"),
    (checks.check_noisy_mean, lambda c, s, *a: noisy_mean(c, s, *a)[None] if s else noisy_mean(c, s, *a), "[P]"),
    (checks.check_noisy_mean, lambda c, s, *a: None if s else noisy_mean(c, s, *a), "return"),
    (checks.check_selective, quiet_among_unprotected, "EVERY"),
    (checks.check_loss_variance, lambda x, lam: loss_variance(x.detach().requires_grad_(), lam), "return"),
    (checks.check_finest, lambda n, rates: 0.05, "count alarms"),
]


@pytest.mark.parametrize("check", EXERCISES.values(), ids=EXERCISES)
def test_the_solution_passes_and_says_so(check, capsys):
    assert check(check.solution) is True
    assert capsys.readouterr().out == f"passed: {check.name} is right on all inputs\n"


@pytest.mark.parametrize(("check", "f"), RIGHT)
def test_other_right_answers_pass(check, f):
    assert check(f) is True


@pytest.mark.parametrize(("check", "f", "word"), WRONG)
def test_other_wrong_answers_are_rejected_with_a_hint(check, f, word, capsys):
    with pytest.raises(WrongAnswer) as caught:
        check(f)
    message = str(caught.value)
    assert re.fullmatch(r"[^\n]+: expected [^\n]+, got [^\n]+; hint: [^\n]+", message), message
    assert word in message.split("hint: ")[1], message
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("check", EXERCISES.values(), ids=EXERCISES)
def test_every_hint_is_shown(check):
    """To an answer of the right shape that is like no planted mistake."""

    def far_off(*arguments):
        found = check.solution(*arguments)
        return [np.asarray(part, dtype=float) * 0 + 123.25 for part in found] if isinstance(found, tuple) else found * 0 + 123.25

    with pytest.raises(WrongAnswer) as caught:
        check(far_off)
    assert str(caught.value).endswith(f"hint: {check.hint}")


def test_the_noise_test_does_not_depend_on_luck():
    """The right answer passes for any stream of normal numbers, here 60 others than the one the check uses."""
    for seed in range(60):
        def other(clipped, sigma, bound, expected, rng, seed=seed):
            own = torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=rng)) + seed)
            return noisy_mean(clipped, sigma, bound, expected, own)

        assert checks.check_noisy_mean(other)


def test_the_cases_are_the_same_at_every_asking():
    for check in EXERCISES.values():
        first, second = ([q.name for q in check.cases()] for _ in range(2))
        assert first == second and len(first) >= 2


def test_every_exercise_is_in_a_notebook():
    used = {
        (check, name)
        for path in NOTEBOOKS.glob("*.ipynb")
        for _, _, check, name in lessons.exercises(json.loads(path.read_text(encoding="utf-8"))["cells"])
    }
    assert used == {(check, exercise.name) for check, exercise in EXERCISES.items()}
