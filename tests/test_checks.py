"""Every check accepts right answers, also unusual ones, and rejects the plausible wrong ones with a useful sentence."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn.metrics import roc_curve

from demem_lab import checks
from demem_lab.checks import WrongAnswer

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


# 00 -- the gap, the interval


def gap(right, member):
    return float(np.mean([r[m].mean() - r[~m].mean() for r, m in zip(right, member, strict=True)]))


def interval(values, level=0.975, ddof=1, root=True, quantile=stats.t):
    n = len(values)
    q = quantile.ppf(level, n - 1) if quantile is stats.t else quantile.ppf(level)
    half = q * np.std(values, ddof=ddof) / (np.sqrt(n) if root else 1)
    return np.mean(values) - half, np.mean(values) + half


# 01 -- attacks


def fgsm(net, x, y, eps, sign=1, clamp=True, slope_sign=True):
    z = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(net(z), y, reduction="sum"), z)
    moved = x + sign * eps * (slope.sign() if slope_sign else slope)
    return moved.clamp(0, 1) if clamp else moved


def fgsm_backward_in_place(net, x, y, eps):
    net.train()
    x.requires_grad_()
    F.cross_entropy(net(x), y).backward()
    return (x + eps * x.grad.sign()).clamp(0, 1)


def fgsm_sign_by_division(net, x, y, eps):
    z = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(net(z), y), z)
    return (x + eps * slope / slope.abs()).clamp(0, 1)


def fgsm_own_label(net, x, y, eps):
    return fgsm(net, x, net(x).argmax(-1), eps)


def fgsm_leaves_the_fooled(net, x, y, eps):
    return torch.where((net(x).argmax(-1) == y)[:, None, None, None], fgsm(net, x, y, eps), x)


def project(z, x, eps):
    return (x + (z - x).clamp(-eps, eps)).clamp(0, 1)


def project_in_place(z, x, eps):
    return torch.maximum(torch.minimum(z.clamp_(0, 1), x + eps), x.sub_(eps))


def project_l2(z, x, eps):
    offset = z - x
    norm = offset.flatten(1).norm(dim=1)[:, None, None, None].clamp_min(1e-12)
    return (x + offset * (eps / norm).clamp(max=1)).clamp(0, 1)


def robust(clean_right, attack_right):
    return float((clean_right & attack_right.all(0)).mean())


# 02 -- leakage


def tpr_at_fpr(scores, member, fpr):
    outside = np.sort(scores[~member])[::-1]
    allowed = int(np.floor(fpr * len(outside) + 1e-9))
    return 1.0 if allowed >= len(outside) else float((scores[member] > outside[allowed]).mean())


def tpr_from_curve(scores, member, fpr):
    false, true, _ = roc_curve(member, scores, drop_intermediate=False)
    return true[false <= fpr].max()


def tpr_ties_come_in(scores, member, fpr):
    outside = np.sort(scores[~member])[::-1]
    return float((scores[member] >= outside[min(int(fpr * len(outside)), len(outside) - 1)]).mean())


def tpr_threshold_from_all(scores, member, fpr):
    everybody = np.sort(scores)[::-1]
    k = int(fpr * len(everybody))
    return 1.0 if k >= len(everybody) else float((scores[member] > everybody[k]).mean())


def tpr_threshold_from_members(scores, member, fpr):
    return float((scores[member] > np.quantile(scores[member], 1 - fpr)).mean())


def tpr_interpolated(scores, member, fpr):
    return 1.0 if fpr == 1 else float((scores[member] > np.quantile(scores[~member], 1 - fpr)).mean())


def tpr_share_of_everybody(scores, member, fpr):
    outside = np.sort(scores[~member])[::-1]
    k = int(fpr * len(scores))
    return 1.0 if k >= len(outside) else float((scores[member] > outside[k]).mean())


def log_ratio(value, signals_in, signals_out, ddof=0):
    a, b = np.asarray(signals_in), np.asarray(signals_out)
    return stats.norm.logpdf(value, a.mean(), a.std(ddof=ddof)) - stats.norm.logpdf(value, b.mean(), b.std(ddof=ddof))


def log_ratio_by_hand(value, a, b):
    def log_normal(s):
        return -((value - s.mean()) ** 2) / (2 * s.var()) - np.log(s.var()) / 2

    return log_normal(a) - log_normal(b)


def log_ratio_of_densities(value, a, b):
    with np.errstate(all="ignore"):
        return np.log(stats.norm.pdf(value, a.mean(), a.std())) - np.log(stats.norm.pdf(value, b.mean(), b.std()))


def log_ratio_shared_std(value, a, b):
    std = np.concatenate([a, b]).std()
    return stats.norm.logpdf(value, a.mean(), std) - stats.norm.logpdf(value, b.mean(), std)


def log_ratio_no_scale(value, a, b):
    return ((value - b.mean()) / b.std()) ** 2 / 2 - ((value - a.mean()) / a.std()) ** 2 / 2


# 03 -- risk


def memorization(p, member):
    return (p * member).sum(0) / member.sum(0) - (p * ~member).sum(0) / (~member).sum(0)


def top(score, fraction, order=lambda s: np.argsort(-s, kind="stable"), number=round):
    mask = np.zeros(len(score), dtype=bool)
    mask[order(score)[: number(fraction * len(score))]] = True
    return mask


def top_by_quantile(score, fraction):
    return score >= np.quantile(score, 1 - fraction)


def top_last_entries(score, fraction):
    mask = np.zeros(len(score), dtype=bool)
    mask[np.argsort(-score, kind="stable")[::-1][-round(fraction * len(score)) :]] = True
    return mask


# 04 -- clip and noise


def clip(gradients, max_grad_norm):
    return gradients * (max_grad_norm / gradients.norm(dim=1, keepdim=True).clamp_min(max_grad_norm))


def clip_like_opacus(gradients, max_grad_norm):
    return gradients * (max_grad_norm / (gradients.norm(dim=1) + 1e-6)).clamp(max=1)[:, None]


def clip_in_place(gradients, max_grad_norm):
    for row in gradients:
        if row.norm() > max_grad_norm:
            row *= max_grad_norm / row.norm()
    return gradients


def clip_nan_at_zero(gradients, max_grad_norm):
    norms = gradients.norm(dim=1, keepdim=True)
    return gradients / norms * norms.clamp(max=max_grad_norm)


def clip_the_batch(gradients, max_grad_norm):
    return gradients * (max_grad_norm / gradients.norm().clamp_min(max_grad_norm))


def clip_after_averaging(gradients, max_grad_norm):
    mean = gradients.mean(0)
    return mean * (max_grad_norm / mean.norm().clamp_min(max_grad_norm))


def noise_like(clipped, std, rng, shape=None):
    return std * torch.randn(shape or clipped.shape[1], generator=rng)


def noisy_mean(clipped, noise_multiplier, max_grad_norm, expected_batch_size, rng):
    return (clipped.sum(0) + noise_like(clipped, noise_multiplier * max_grad_norm, rng)) / expected_batch_size


def noisy_mean_normal(clipped, noise_multiplier, max_grad_norm, expected_batch_size, rng):
    std = noise_multiplier * max_grad_norm / expected_batch_size
    return clipped.sum(0) / expected_batch_size + torch.normal(0.0, std, (clipped.shape[1],), generator=rng)


def noisy(total=lambda c: c.sum(0), std=lambda s, C, n: s * C, draw=None, size=lambda c, n: n, only_if=lambda c: True):
    """A noisy mean with one part replaced."""

    def f(clipped, noise_multiplier, max_grad_norm, expected_batch_size, rng):
        scale = std(noise_multiplier, max_grad_norm, expected_batch_size) if only_if(clipped) else 0.0
        standard = draw(clipped, rng) if draw else noise_like(clipped, 1.0, rng)
        return (total(clipped) + scale * standard) / size(clipped, expected_batch_size)

    return f


def nan_for_nobody(clipped, noise_multiplier, *settings):
    return noisy_mean(clipped, noise_multiplier, *settings) + (torch.nan if noise_multiplier and not len(clipped) else 0)


def laplace(c, rng):
    u = torch.rand(c.shape[1], generator=rng, dtype=torch.float64) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs()) / 2**0.5  # unit variance, heavier tails


# 05 -- selective protection, loss variance


def selective(gradients, protected, noise_multiplier, max_grad_norm, expected_batch_size, rng):
    norms = gradients.norm(dim=1)
    factor = torch.where(protected, max_grad_norm / norms.clamp_min(max_grad_norm), torch.ones_like(norms))
    noise = noise_multiplier * max_grad_norm * torch.randn(gradients.shape[1], generator=rng)
    return ((gradients * factor[:, None]).sum(0) + noise) / expected_batch_size


def selective_in_two_parts(gradients, protected, noise_multiplier, max_grad_norm, expected_batch_size, rng):
    private = noisy_mean(clip(gradients[protected], max_grad_norm), noise_multiplier, max_grad_norm, expected_batch_size, rng)
    return private + gradients[~protected].sum(0) / expected_batch_size


def selecting(who=lambda p: p, rest=1.0, only_if=lambda p: True, count=lambda p: 1.0, size=lambda p, n: n):
    """Selective protection with one part replaced."""

    def f(gradients, protected, noise_multiplier, max_grad_norm, expected_batch_size, rng):
        chosen = who(protected)
        total = clip(gradients[chosen], max_grad_norm).sum(0) + rest * gradients[~chosen].sum(0)
        std = noise_multiplier * max_grad_norm * count(protected) if only_if(protected) else 0.0
        return (total + noise_like(gradients, std, rng)) / size(protected, expected_batch_size)

    return f


def selective_clip_after_averaging(gradients, protected, noise_multiplier, max_grad_norm, expected_batch_size, rng):
    total = clip(gradients[protected].sum(0, keepdim=True), max_grad_norm)[0] + gradients[~protected].sum(0)
    return (total + noise_like(gradients, noise_multiplier * max_grad_norm, rng)) / expected_batch_size


def loss_variance(losses, lam):
    return losses.mean() + (lam * losses.var() if len(losses) > 1 else 0)


def with_spread(spread):
    return lambda losses, lam: losses.mean() + (lam * spread(losses) if len(losses) > 1 else 0)


def unbiased(losses):
    return (losses - losses.mean()).square().sum() / (len(losses) - 1)


# exercise name: check, right answers, wrong answers with a word of the hint they must earn (None: any hint)
# 07 -- the entropy that knows the label, the threshold chosen elsewhere


def modified_entropy(p, y):
    others = np.arange(len(p)) != y
    return -(1 - p[y]) * np.log(p[y]) - (p[others] * np.log(1 - p[others])).sum()


def modified_entropy_by_loops(p, y):
    return sum(-((1 - v) * np.log(v) if k == y else v * np.log(1 - v)) for k, v in enumerate(p))


def balanced(cut, scores, member):
    return ((scores[member] >= cut).mean() + (scores[~member] < cut).mean()) / 2


def best_cut(scores, member, order=-1):
    cuts = np.unique(scores)[::order]
    return cuts[np.argmax([balanced(cut, scores, member) for cut in cuts])]


def held_out(scores, member, new_scores, new_member):
    return balanced(best_cut(scores, member), new_scores, new_member)


def held_out_by_loops(scores, member, new_scores, new_member):
    best = max((balanced(cut, scores, member), cut) for cut in scores)[1]  # of equally good ones the highest
    found = [(s >= best) == m for s, m in zip(new_scores, new_member, strict=True)]
    return (np.mean([f for f, m in zip(found, new_member, strict=True) if m])
            + np.mean([f for f, m in zip(found, new_member, strict=True) if not m])) / 2


# 06 -- the release schedule, one step from noise


def cost(steps, backward=1):
    return (1 + backward) * steps + 3


def finest(non_members, rates, least=5, pick=min):
    return pick(rate for rate in rates if rate * non_members >= least)


def until(score, power, sign=1, top=1, ranks=True):
    rank = np.empty(len(score))
    rank[np.argsort(sign * score, kind="stable")] = np.arange(len(score)) / (len(score) - top)
    return 1 - (rank if ranks else score) ** power


def until_by_counting(score, power):
    below = [sum(b < a or (b == a and j < i) for j, b in enumerate(score)) for i, a in enumerate(score)]
    return [1 - (k / (len(score) - 1)) ** power for k in below]


def n_fgsm(net, x, y, eps, noise, at_noise=True, keep_noise=True, project=False):
    z = (x + noise if at_noise else x).detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(net(z), y, reduction="sum"), z)
    moved = (x + noise if keep_noise else x) + eps * slope.sign()
    return (torch.max(torch.min(moved, x + eps), x - eps) if project else moved).clamp(0, 1)


EXERCISES = {
    "cost": (checks.check_cost, [cost, lambda steps: 3 + sum(2 for _ in range(steps))], {
        "weights' gradients too": (lambda k: cost(k, backward=2), "no gradient of the weights"),
        "no backward": (lambda k: cost(k, backward=0), "forward and backward"),
        "training without the inputs": (lambda k: 2 * k + 2, "inputs AND weights"),
        "attack only": (lambda k: 2 * k, None),
    }),
    "finest": (checks.check_finest, [finest, lambda n, rates: next(r for r in sorted(rates) if r * n >= 5)], {
        "a single false positive": (lambda n, rates: finest(n, rates, least=1), "ask for five"),
        "the largest": (lambda n, rates: finest(n, rates, pick=max), "smallest"),
        "more than five": (lambda n, rates: min((r for r in rates if r * n > 5), default=1), None),
    }),
    "until": (checks.check_until, [until, until_by_counting], {
        "order turned": (lambda s, q: until(s, q, sign=-1), "turned"),
        "divided by N": (lambda s, q: until(s, q, top=0), "N - 1"),
        "score for rank": (lambda s, q: until(s, q, ranks=False), "rank"),
        "rank for what is left": (lambda s, q: 1 - until(s, q), None),
        "ties to the higher index": (lambda s, q: until(s[::-1], q)[::-1], None),
    }),
    "n_fgsm": (checks.check_n_fgsm, [n_fgsm, lambda *a: n_fgsm(*a).detach().numpy()], {
        "projected": (lambda *a: n_fgsm(*a, project=True), "no projection"),
        "gradient at the clean image": (lambda *a: n_fgsm(*a, at_noise=False), None),
        "plain FGSM": (lambda *a: n_fgsm(*a, at_noise=False, keep_noise=False), "forgets"),
        "down the loss": (lambda net, x, y, eps, noise: n_fgsm(net, x, y, -eps, noise), None),
        "not clamped": (lambda net, x, y, eps, noise: x + noise + (n_fgsm(net, x, y, eps, noise) - x - noise).sign() * eps, None),
    }),
    "modified_entropy": (checks.check_modified_entropy, [modified_entropy, modified_entropy_by_loops], {
        "plain entropy": (lambda p, y: -(p * np.log(p)).sum(), "plain entropy"),
        "right class in the sum": (lambda p, y: -(1 - p[y]) * np.log(p[y]) - (p * np.log(1 - p)).sum(), "OTHER"),
        "sign turned": (lambda p, y: -modified_entropy(p, y), "sign"),
        "p log p for the right class": (
            lambda p, y: modified_entropy(p, y) + (1 - 2 * p[y]) * np.log(p[y]), "1 - p_y"),
        "cross-entropy": (lambda p, y: -np.log(p[y]), None),
    }),
    "held_out": (checks.check_held_out, [held_out, held_out_by_loops], {
        "chosen on what is judged": (lambda s, m, t, w: balanced(best_cut(t, w), t, w), "flatters"),
        "judged on what it was chosen on": (lambda s, m, t, w: balanced(best_cut(s, m), s, m), "chosen on"),
        "plain accuracy": (lambda s, m, t, w: ((t >= best_cut(s, m)) == w).mean(), "equally"),
        "the lowest of equally good": (lambda s, m, t, w: balanced(best_cut(s, m, order=1), t, w), None),
        "the threshold itself": (lambda s, m, t, w: best_cut(s, m), None),
        "median for a threshold": (lambda s, m, t, w: balanced(np.median(s), t, w), None),
    }),
    "gap": (checks.check_gap, [gap], {
        "pooled over entries": (lambda r, m: r[m].mean() - r[~m].mean(), "pools"),
        "sign turned": (lambda r, m: -gap(r, m), "sign"),
        "members against everybody": (lambda r, m: np.mean([a[b].mean() - a.mean() for a, b in zip(r, m, strict=True)]), None),
        "one gap a model, not averaged": (lambda r, m: [gap(a[None], b[None]) for a, b in zip(r, m, strict=True)], "average"),
        "non-members counted in": (lambda r, m: ((r & m).mean(1) - (r & ~m).mean(1)).mean(), None),
    }),
    "interval": (checks.check_interval, [interval, lambda v: stats.t.interval(0.95, len(v) - 1, v.mean(), stats.sem(v))], {
        "normal instead of t": (lambda v: interval(v, quantile=stats.norm), "Student"),
        "ddof 0": (lambda v: interval(v, ddof=0), "ddof=1"),
        "spread of the values": (lambda v: interval(v, root=False), "sqrt"),
        "one-sided quantile": (lambda v: interval(v, level=0.95), "0.975"),
        "half width only": (lambda v: interval(v)[1] - v.mean(), "t quantile"),
        "high before low": (lambda v: interval(v)[::-1], None),
    }),
    "fgsm": (checks.check_fgsm, [fgsm, fgsm_backward_in_place], {
        "wrong sign of the gradient": (lambda *a: fgsm(*a, sign=-1), "DOWN"),
        "no clamp": (lambda *a: fgsm(*a, clamp=False), "clamp"),
        "gradient without sign": (lambda *a: fgsm(*a, slope_sign=False), "SIGN"),
        "0 / 0 where the gradient vanishes": (fgsm_sign_by_division, "SIGN"),
        "the model's own label": (fgsm_own_label, "labels y"),
        "only those still right": (fgsm_leaves_the_fooled, None),
        "not moved": (lambda net, x, y, eps: x, None),
    }),
    "project": (checks.check_project, [project, project_in_place], {
        "projection forgotten": (lambda z, x, eps: z, None),
        "only the pixel range": (lambda z, x, eps: z.clamp(0, 1), "ball"),
        "only the ball": (lambda z, x, eps: x + (z - x).clamp(-eps, eps), "[0, 1]"),
        "always to the border": (lambda z, x, eps: (x + eps * (z - x).sign()).clamp(0, 1), None),
        "ball in the L2 norm": (project_l2, None),
        "ball around 0": (lambda z, x, eps: z.clamp(-eps, eps).clamp(0, 1), None),
    }),
    "robust": (checks.check_robust, [robust, lambda c, a: np.logical_and.reduce([c, *a]).mean()], {
        "smallest of the accuracies": (lambda c, a: min(c.mean(), a.mean(1).min()), None),
        "smallest, clean image by image": (lambda c, a: (c & a).mean(1).min(), None),
        "attacks alone": (lambda c, a: a.all(0).mean(), "before any attack"),
        "attacks' smallest accuracy": (lambda c, a: a.mean(1).min(), "image by image"),
        "survives any attack": (lambda c, a: (c & a.any(0)).mean(), None),
        "average over attacks": (lambda c, a: (c & a).mean(), None),
    }),
    "tpr_at_fpr": (checks.check_tpr_at_fpr, [tpr_at_fpr, tpr_from_curve], {
        ">= the threshold": (tpr_ties_come_in, "strictly"),
        "members leak into the threshold": (tpr_threshold_from_all, "non-members alone"),
        "threshold from members": (tpr_threshold_from_members, None),
        "interpolated quantile": (tpr_interpolated, None),
        "share of everybody": (tpr_share_of_everybody, None),
        "true positives among everybody": (lambda s, m, fpr: tpr_at_fpr(s, m, fpr) * m.mean(), None),
        "lowest scores": (lambda s, m, fpr: tpr_at_fpr(-s, m, fpr), None),
    }),
    "log_ratio": (checks.check_lira, [log_ratio, log_ratio_by_hand], {
        "ddof 1": (lambda *a: log_ratio(*a, ddof=1), "ddof=0"),
        "out minus in": (lambda v, a, b: log_ratio(v, b, a), "members come first"),
        "logarithm of densities": (log_ratio_of_densities, "underflow"),
        "ratio without logarithm": (lambda v, a, b: np.exp(log_ratio(v, a, b)), None),
        "one std for both": (log_ratio_shared_std, "own"),
        "log std term missing": (log_ratio_no_scale, None),
        "in only": (lambda v, a, b: stats.norm.logpdf(v, a.mean(), a.std()), None),
    }),
    "memorization": (checks.check_memorization, [memorization], {
        "without minus with": (lambda p, m: -memorization(p, m), "sign"),
        "divided by all models": (lambda p, m: (p * m).mean(0) - (p * ~m).mean(0), "not by all"),
        "members leak into the second mean": (lambda p, m: (p * m).sum(0) / m.sum(0) - p.mean(0), None),
        "one number a model": (lambda p, m: np.array([a[b].mean() - a[~b].mean() for a, b in zip(p, m, strict=True)]), "axis 0"),
        "pooled": (lambda p, m: np.full(p.shape[1], p[m].mean() - p[~m].mean()), None),
    }),
    "top": (checks.check_top, [top, lambda s, q: np.argsort(np.lexsort((np.arange(len(s)), -s))) < round(q * len(s))], {
        "ties to the higher index": (lambda s, q: top(s, q, order=lambda s: np.argsort(s, kind="stable")[::-1]), "LOWER"),
        "lowest scores": (lambda s, q: top(-s, q), None),
        "rounded down": (lambda s, q: top(s, q, number=int), "round"),
        "all that tie": (top_by_quantile, None),
        "[-0:] is everybody": (top_last_entries, None),
        "indices": (lambda s, q: np.flatnonzero(top(s, q)), "mask"),
        "0 and 1": (lambda s, q: top(s, q).astype(int), "dtype=bool"),
    }),
    "clip": (checks.check_clip, [clip, clip_like_opacus, clip_in_place], {
        "short ones lengthened": (lambda g, C: g * C / g.norm(dim=1, keepdim=True).clamp_min(1e-12), "lengthened"),
        "zero becomes NaN": (clip_nan_at_zero, "NaN"),
        "the whole batch": (clip_the_batch, "OWN"),
        "clip after averaging": (clip_after_averaging, "averaging"),
        "single entries": (lambda g, C: g.clamp(-C, C), None),
        "not at all": (lambda g, C: g, None),
        "squared norm": (lambda g, C: g * (C / (g**2).sum(1, keepdim=True).clamp_min(C)), None),
    }),
    "noisy_mean": (checks.check_noisy_mean, [noisy_mean, noisy_mean_normal], {
        "divides by the drawn size": (noisy(size=lambda c, n: max(len(c), 1)), "EXPECTED"),
        "divides by the larger size": (noisy(size=lambda c, n: max(len(c), n)), "EXPECTED"),
        "noise per sample": (noisy(draw=lambda c, rng: noise_like(c, 1.0, rng, c.shape).sum(0)), "once"),
        "noise on the mean": (noisy(std=lambda s, C, n: s * C * n), "SUM"),
        "divides the noise twice": (noisy(std=lambda s, C, n: s * C / n), None),
        "bound forgotten": (noisy(std=lambda s, C, n: s), "max_grad_norm"),
        "variance for std": (noisy(std=lambda s, C, n: (s * C) ** 2), None),
        "std 10 % short": (noisy(std=lambda s, C, n: 0.9 * s * C), None),
        "noise only when drawn": (noisy(only_if=len), "EVERY"),
        "no noise": (noisy(std=lambda *a: 0.0), "EVERY"),
        "mean of nobody": (noisy(total=lambda c: c.mean(0) * len(c)), None),
        "NaN with noise for nobody": (nan_for_nobody, "on the sum"),
        "one number for all parameters": (noisy(draw=lambda c, rng: torch.randn(1, generator=rng)), None),
        "uniform noise": (noisy(draw=lambda c, rng: torch.rand(c.shape[1], generator=rng)), None),
        "Laplace noise": (noisy(draw=laplace), "randn"),
        "noise of mean 1": (noisy(draw=lambda c, rng: 1 + noise_like(c, 1.0, rng)), "randn"),
        "global generator": (noisy(draw=lambda c, rng: noise_like(c, 1.0, None)), "generator=rng"),
        "the same noise every step": (noisy(draw=lambda c, _: noise_like(c, 1.0, torch.manual_seed(0))), "generator=rng"),
        "one row a sample": (lambda c, s, C, n, rng: (c + noise_like(c, s * C, rng)) / n, None),
        "shape lost with noise": (lambda c, s, *a: noisy_mean(c, s, *a)[None] if s else noisy_mean(c, s, *a), "[P]"),
        "nothing with noise": (lambda c, s, *a: None if s else noisy_mean(c, s, *a), "return"),
    }),
    "selective": (checks.check_selective, [selective, selective_in_two_parts, selecting()], {
        "everybody clipped": (selecting(who=lambda p: p | True), "only the protected"),
        "nobody clipped": (selecting(who=lambda p: p & False), "must be clipped"),
        "the rest clipped": (selecting(who=lambda p: ~p), None),
        "the rest dropped": (selecting(rest=0.0), "unprotected"),
        "noise only when one is drawn": (selecting(only_if=lambda p: p.any()), "EVERY"),
        "no noise when only others are drawn": (selecting(only_if=lambda p: p.any() or not len(p)), "EVERY"),
        "noise only when somebody is drawn": (selecting(only_if=len), "EVERY"),
        "noise per protected": (selecting(count=lambda p: p.sum() ** 0.5), None),
        "noise for the protected share": (selecting(count=lambda p: p.double().mean() if len(p) else 1.0), None),
        "noise per sample drawn": (selecting(count=lambda p: max(len(p), 1) ** 0.5), "once"),
        "divides by the drawn size": (selecting(size=lambda p, n: max(len(p), 1)), "EXPECTED"),
        "clips after averaging": (selective_clip_after_averaging, None),
    }),
    "loss_variance": (checks.check_loss_variance, [loss_variance, with_spread(unbiased)], {
        "divisor n": (with_spread(lambda x: x.var(correction=0)), "n - 1"),
        "standard deviation": (with_spread(lambda x: x.std()), "standard deviation"),
        "NaN for one loss": (lambda x, lam: x.mean() + lam * unbiased(x), "single"),
        "variance without gradient": (with_spread(lambda x: x.var().detach()), "gradient"),
        "no gradient at all": (lambda x, lam: loss_variance(x, lam).item(), ".item()"),
        "constant with a gradient": (lambda x, lam: loss_variance(x.detach().requires_grad_(), lam), "return"),
        "rewards variance": (lambda x, lam: loss_variance(x, -lam), None),
        "sum for mean": (lambda x, lam: loss_variance(x, lam) + x.sum() - x.mean(), None),
        "one loss gives 0": (lambda x, lam: loss_variance(x, lam) * (len(x) > 1), None),
    }),
}
RIGHT = [pytest.param(name, f, id=f"{name}-{i}") for name, (_, right, _) in EXERCISES.items() for i, f in enumerate(right)]
WRONG = [pytest.param(name, *case, id=f"{name}-{slip}") for name, (*_, bad) in EXERCISES.items() for slip, case in bad.items()]
ALL = pytest.mark.parametrize("name", EXERCISES)


@pytest.mark.parametrize("name, f", RIGHT)
def test_a_right_answer_passes(name, f, capsys):
    assert EXERCISES[name][0](f) is True
    assert capsys.readouterr().out == f"passed: {name} is right on all inputs\n"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name, f, word", WRONG)
def test_a_wrong_answer_is_rejected_in_one_sentence(name, f, word, capsys):
    with pytest.raises(WrongAnswer) as caught:
        EXERCISES[name][0](f)
    message = str(caught.value)
    assert re.fullmatch(r"[^\n]+: expected [^\n]+, got [^\n]+; hint: [^\n]+", message), message
    assert word is None or word in message.split("hint: ")[1], message
    assert capsys.readouterr().out == ""


@ALL
def test_a_check_is_there_for_every_exercise_and_says_what_it_is(name):
    check, right, wrong = EXERCISES[name]
    assert right and len(wrong) >= 3 and check.__doc__.startswith("f(")
    assert {c for c in vars(checks) if c.startswith("check_")} == {c.__name__ for c, *_ in EXERCISES.values()}


@ALL
def test_a_stub_is_not_solved_yet(name, capsys):
    def stub(*_):
        raise NotImplementedError

    def stub_with_a_text(*_):
        raise NotImplementedError("write me")

    for f in (stub, stub_with_a_text, lambda *_: stub()):
        assert EXERCISES[name][0](f) is False
        assert capsys.readouterr().out == f"not solved yet: fill in {name}\n"


@ALL
@pytest.mark.parametrize("kind", [ZeroDivisionError, AssertionError, KeyboardInterrupt])
def test_other_errors_are_the_learners_own(name, kind, capsys):
    own = kind("mine")

    def broken(*_):
        raise own

    with pytest.raises(kind) as caught:
        EXERCISES[name][0](broken)
    assert caught.value is own and not isinstance(own, WrongAnswer)
    assert capsys.readouterr().out == ""


@ALL
def test_a_wrong_dtype_is_a_bug_and_not_an_empty_stub(name, capsys):
    """Torch reports it as NotImplementedError."""
    with pytest.raises(RuntimeError, match="dtype"):
        EXERCISES[name][0](lambda *_: torch.tensor([True]).mean())
    assert capsys.readouterr().out == ""


@ALL
@pytest.mark.parametrize("value, words", [
    (None, "return its result"), ("text", "expected numbers, got str"), ({}, "expected numbers, got dict"),
    ([[1], [2, 3]], "expected numbers, got list"), (np.zeros((2, 2, 2, 2, 2)), "got [2, 2, 2, 2, 2]"), (np.nan, "got"),
])
def test_nonsense_is_a_wrong_answer(name, value, words):
    with pytest.raises(WrongAnswer, match=re.escape(words)):
        EXERCISES[name][0](lambda *_: value)


@ALL
def test_the_global_random_state_is_left_alone_and_does_not_matter(name):
    check, (right, *_), _ = EXERCISES[name]

    def restless(*arguments):
        _ = torch.manual_seed(0), torch.rand(3), np.random.seed(0)
        return right(*arguments)

    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), np.random.get_state()[2], random.getstate()

    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = state()
        assert check(restless) and check(right)
        assert state() == before


def test_the_state_comes_back_after_a_wrong_answer_too():
    before = torch.get_rng_state(), np.random.get_state()[1]
    with pytest.raises(WrongAnswer):
        checks.check_gap(lambda *_: np.random.rand() + torch.rand(()).item() + 5)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


def test_the_noise_test_does_not_depend_on_luck():
    """The right answer passes for any stream of normal numbers, here 60 others than the one the check uses."""
    for seed in range(60):
        def other(clipped, sigma, bound, expected, rng, seed=seed):
            own = torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=rng)) + seed)
            return noisy_mean(clipped, sigma, bound, expected, own)

        assert checks.check_noisy_mean(other)


def exercise_cells():
    """(name of the check, the learner's function, stub cell, solution) of every exercise in the notebooks."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        for text, code in zip(cells, cells[1:], strict=False):
            source, solution = "".join(code["source"]), re.findall(r"```python\n(.*?)```", "".join(text["source"]), re.DOTALL)
            for check, f in re.findall(r"checks\.(check_\w+)\((\w+)\)", source):
                yield pytest.param(check, f, source, solution, id=f"{path.stem}-{f}")


@pytest.mark.parametrize("check, f, stub, solution", list(exercise_cells()))
def test_a_notebooks_stub_runs_and_its_solution_passes(check, f, stub, solution, capsys):
    namespace = {"np": np, "torch": torch, "checks": checks}  # imported in earlier cells
    exec(stub, namespace)
    assert capsys.readouterr().out == f"not solved yet: fill in {f}\n"
    (code,) = solution
    exec(code, namespace)
    assert getattr(checks, check)(namespace[f]) is True


def test_every_check_is_used_in_a_notebook():
    assert {p.values[0] for p in exercise_cells()} == {check.__name__ for check, *_ in EXERCISES.values()}
