"""Every check accepts right answers, also unusual ones, and rejects wrong ones, also those that nobody planted."""

import json
import math
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


def tpr_at(place):
    """The threshold is another one of the non-members' scores."""
    def f(scores, member, fpr):
        outside = np.sort(scores[~member])[::-1]
        k = int(fpr * len(outside) + 1e-9)
        return 1.0 if k >= len(outside) else (scores[member] > outside[place(k)]).mean()

    return f


def tpr_with_a_last_place(scores, member, fpr):
    outside = np.sort(scores[~member])[::-1]
    return (scores[member] > outside[min(int(fpr * len(outside) + 1e-9), len(outside) - 1)]).mean()


def tpr_by_ceil(scores, member, fpr):
    outside = np.sort(scores[~member])[::-1]
    k = math.ceil(fpr * len(outside))
    return 1.0 if k >= len(outside) else (scores[member] > outside[k]).mean()


def tpr_interpolated(scores, member, fpr):
    return 1.0 if fpr == 1 else (scores[member] > np.quantile(scores[~member], 1 - fpr)).mean()


def tpr_by_quantile(scores, member, fpr):
    return 1.0 if fpr == 1 else (scores[member] > np.quantile(scores[~member], 1 - fpr, method="higher")).mean()


def held_out_by(cuts_of, called):
    """The threshold is one of `cuts_of(scores)`, and `called(scores, cut)` are the members."""
    def f(scores, member, new_scores, new_member):
        def accuracy(cut, s, m):
            return (called(s[m], cut).mean() + (~called(s[~m], cut)).mean()) / 2

        best = max(cuts_of(scores), key=lambda cut: (accuracy(cut, scores, member), cut))
        return accuracy(best, new_scores, new_member)

    return f


def held_out_by_plain_accuracy(scores, member, new_scores, new_member):
    best = max(scores, key=lambda cut: (((scores >= cut) == member).mean(), cut))
    return ((new_scores[new_member] >= best).mean() + (new_scores[~new_member] < best).mean()) / 2


def between(scores):
    cuts = np.unique(scores)
    return np.concatenate([[cuts[0] - 1], (cuts[1:] + cuts[:-1]) / 2, [cuts[-1] + 1]])


def top_by(order, number=round):
    def f(score, fraction):
        mask = np.zeros(len(score), dtype=bool)
        mask[order(score)[: number(fraction * len(score))]] = True
        return mask

    return f


def quieter_for_short_gradients(g, who, sigma, bound, expected, rng):
    longest = g.norm(dim=1).max().item() if len(g) else bound
    noise = sigma * min(bound, longest) * torch.randn(g.shape[1], generator=rng)
    return checks.check_selective.solution(g, who, 0.0, bound, expected, rng) + noise / expected


def quiet_for_a_single_one(g, who, sigma, *settings):
    return checks.check_selective.solution(g, who, sigma * (int(who.sum()) != 1), *settings)


def parts(which):
    """The models' numbers where masks are asked for."""
    return lambda members, target, image: tuple(np.flatnonzero(side) for side in which(members, target, image))


def split_with_the_target(members, target, image):
    reference = ~(members == ~members[target]).all(1)
    return reference & members[:, image], reference & ~members[:, image]


def until_by(method, power_of=lambda rank, power: 1 - rank**power):
    return lambda score, power: power_of((stats.rankdata(score, method=method) - 1) / (len(score) - 1), power)


def n_fgsm_unclamped(net, x, y, eps, noise):
    z = (x + noise).clamp(0, 1).requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(net(z), y, reduction="sum"), z)
    return z.detach() + eps * slope.sign()


def n_fgsm_from_outside(net, x, y, eps, noise):
    z = (x + noise).clamp(0, 1).requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(net(z), y, reduction="sum"), z)
    return (x + noise + eps * slope.sign()).clamp(0, 1)


def log_ratio_by_variance(v, a, b):
    return stats.norm.logpdf(v, a.mean(), a.var()) - stats.norm.logpdf(v, b.mean(), b.var())


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
    (checks.check_noisy_mean, lambda *a: noisy_mean(*a).numpy()),
    (checks.check_selective, lambda *a: checks.check_selective.solution(*a).numpy()),
    (checks.check_clip, lambda g, C: clip(g, C).numpy()),
    (checks.check_tpr_at_fpr, tpr_at(lambda k: k)),
    (checks.check_held_out, held_out_by(np.unique, np.greater_equal)),
    (checks.check_modified_entropy, modified_entropy_by_loops),
    (checks.check_held_out, held_out_by_loops),
    (checks.check_until, lambda s, power: 1 - (np.argsort(np.argsort(s, kind="stable")) / (len(s) - 1)) ** power),
    (checks.check_cost, lambda steps: steps + steps + 1 + 1 + 1),
]
# wrong answers beyond the planted ones, with a word of the hint they must earn
WRONG = [
    (checks.check_gap, lambda r, m: 0.0, "each model first"),
    (checks.check_gap, lambda r, m: 100 * np.mean([a[b].mean() - a[~b].mean() for a, b in zip(r, m, strict=True)]), "per cent"),
    (checks.check_fgsm, lambda net, x, y, eps: (x + 0.9 * eps).clamp(0, 1), "SIGN"),
    (checks.check_robust, lambda c, a: robust(c, a) * 0.99, "AND after every attack"),
    (checks.check_tpr_at_fpr, lambda s, m, fpr: 0.5, "non-members alone"),
    (checks.check_tpr_at_fpr, tpr_at(lambda k: k + 1), "outside[k + 1]"),
    (checks.check_tpr_at_fpr, tpr_at(lambda k: k - 1), "outside[k - 1]"),
    (checks.check_tpr_at_fpr, tpr_by_quantile, "outside[k - 1]"),
    (checks.check_tpr_at_fpr, tpr_with_a_last_place, "return 1.0"),
    (checks.check_tpr_at_fpr, tpr_by_ceil, "ceil()"),
    (checks.check_tpr_at_fpr, tpr_interpolated, "interpolated quantile"),
    (checks.check_lira, log_ratio_by_variance, "takes the standard deviation"),
    (checks.check_shadow_split, lambda m, t, i: np.stack(shadow_split(m, t, i)) * 0, "the other half"),
    (checks.check_shadow_split, parts(shadow_split), "two bool masks with one entry a model"),
    (checks.check_shadow_split, parts(split_with_the_target), "two arrays of the same length [models]"),
    (checks.check_memorization, lambda p, m: memorization(p, m) ** 2, "axis 0"),
    (checks.check_top, lambda s, q: top(s, q)[:, None], "exactly round"),
    (checks.check_top, lambda s, q: np.argsort(-s)[: round(q * len(s))], "these are indices"),
    (checks.check_top, lambda s, q: torch.as_tensor(-s).argsort()[: round(q * len(s))], "these are indices"),
    (checks.check_top, top_by(lambda s: np.argsort(s)[::-1]), "LOWER index goes first"),
    (checks.check_top, top_by(lambda s: np.lexsort((-np.arange(len(s)) % 5, -s))), "LOWER index goes first"),
    (checks.check_top, top_by(lambda s: np.argsort(-s, kind="stable"), math.ceil), "ceil"),
    (checks.check_clip, lambda g, C: g * (C / g.norm(dim=1, keepdim=True)), "0 / 0 is NaN: divide by max(norm"),
    (checks.check_clip, lambda g, C: clip(g, 2 * C), "OWN"),
    (checks.check_noisy_mean, nan_for_nobody, "on the sum"),
    (checks.check_noisy_mean, noisy_laplace, "randn"),
    (checks.check_noisy_mean, ten_percent_short, "on the sum"),
    (checks.check_noisy_mean, the_same_every_step, "generator=rng"),
    (checks.check_noisy_mean, lambda c, s, *a: noisy_mean(c, s, *a)[None] if s else noisy_mean(c, s, *a), "[P]"),
    (checks.check_noisy_mean, lambda c, s, *a: None if s else noisy_mean(c, s, *a), "return"),
    (checks.check_selective, quiet_among_unprotected, "EVERY"),
    (checks.check_selective, quieter_for_short_gradients, "how long the gradients drawn are"),
    (checks.check_selective, quiet_for_a_single_one, "just one protected sample was drawn"),
    (checks.check_loss_variance, lambda x, lam: loss_variance(x.detach().requires_grad_(), lam), "cuts the graph"),
    (checks.check_loss_variance, lambda x, lam: torch.tensor(loss_variance(x, lam).item(), requires_grad=True), "cuts the graph"),
    (checks.check_loss_variance, lambda x, lam: x.mean() + lam * torch.nan_to_num(x.var()), "branch on len(losses)"),
    (checks.check_loss_variance, lambda x, lam: x.mean().detach() + loss_variance(x, lam) - x.mean(), "the mean has a gradient"),
    (checks.check_loss_variance, lambda x, lam: loss_variance(x, lam).detach(), "no .detach()"),
    (checks.check_until, until_by("average"), "ties by index"),
    (checks.check_until, until_by("min"), "ties by index"),
    (checks.check_until, until_by("dense"), "ties by index"),
    (checks.check_until, until_by("ordinal", lambda rank, power: rank**power), "1 minus"),
    (checks.check_n_fgsm, n_fgsm_unclamped, "clamp to [0, 1] at the end"),
    (checks.check_n_fgsm, n_fgsm_from_outside, "CLAMPED"),
    (checks.check_held_out, held_out_by_plain_accuracy, "best BALANCED accuracy"),
    (checks.check_held_out, held_out_by(np.unique, np.greater), "score >= threshold"),
    (checks.check_held_out, held_out_by(between, np.greater_equal), "one of the scores"),
    (checks.check_finest, lambda n, rates: 0.05, "count alarms"),
    (checks.check_finest, lambda n, rates: min(r for r in rates if round(r * n) >= 5), "do not round"),
]


@pytest.mark.parametrize("check", EXERCISES.values(), ids=EXERCISES)
def test_the_solution_passes_and_says_so(check, capsys):
    assert check(check.solution) is True
    assert capsys.readouterr().out == f"passed: {check.name} is right on all inputs\n"


@pytest.mark.parametrize(("check", "f"), RIGHT)
def test_other_right_answers_pass(check, f):
    assert check(f) is True


@pytest.mark.filterwarnings(r"ignore:var\(\):UserWarning")
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
