"""The solutions of all exercises: printed in the notebooks from here, and trusted by the checks.

>>> cost(attack_steps=3)
9

What a learner types is what stands here, so annotations are left out; the docstring is the task, and stands in the stub
as well (`lessons` writes both into the notebooks). Each function does one thing and leaves its arguments alone.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats


def gap(right, member):
    """bool [models, images] twice. Mean over models: accuracy on members minus on others."""
    return np.mean([r[m].mean() - r[~m].mean() for r, m in zip(right, member, strict=True)])


def interval(values):
    """values [seeds]. (low, high): the 95 % interval of their mean by Student's t."""
    t = stats.t.ppf(0.975, len(values) - 1)
    half = t * np.std(values, ddof=1) / np.sqrt(len(values))
    return np.mean(values) - half, np.mean(values) + half


def fgsm(net, x, y, eps):
    """x + eps * sign(gradient of the cross-entropy for the labels y), inside [0, 1]."""
    z = x.clone().requires_grad_()
    loss = F.cross_entropy(net(z), y, reduction="sum")
    (slope,) = torch.autograd.grad(loss, z)
    return (x + eps * slope.sign()).clamp(0, 1)


def project(z, x, eps):
    """The nearest point to z that is within eps of x in every pixel, and within [0, 1]."""
    return (x + (z - x).clamp(-eps, eps)).clamp(0, 1)


def robust(clean_right, attack_right):
    """bool [N], [attacks, N]. Share of images right as they are and after every attack."""
    return (clean_right & attack_right.all(0)).mean()


def tpr_at_fpr(scores, member, fpr):
    """scores, member [N]. Members above a threshold that at most fpr of the others exceed."""
    outside = np.sort(scores[~member])[::-1]
    allowed = int(fpr * len(outside) + 1e-9)
    if allowed >= len(outside):
        return 1.0
    return (scores[member] > outside[allowed]).mean()


def log_ratio(value, signals_in, signals_out):
    """Log density of value by the normal of signals_in, minus by signals_out (ddof=0)."""
    a, b = np.asarray(signals_in), np.asarray(signals_out)
    log_in = stats.norm.logpdf(value, a.mean(), a.std())
    return log_in - stats.norm.logpdf(value, b.mean(), b.std())


def shadow_split(members, target, image):
    """members bool [M, N]. Two bool [M]: references with the image, references without."""
    reference = ~(members == ~members[target]).all(1)  # the twin had exactly the other half
    reference[target] = False
    return reference & members[:, image], reference & ~members[:, image]


def memorization(p, member):
    """p, member [models, N]. Mean over models with the sample minus over those without."""
    return (p * member).sum(0) / member.sum(0) - (p * ~member).sum(0) / (~member).sum(0)


def top(score, fraction):
    """score [N]. bool [N]: the round(fraction * N) riskiest; ties: the lower index first."""
    mask = np.zeros(len(score), dtype=bool)
    mask[np.argsort(-score, kind="stable")[: round(fraction * len(score))]] = True
    return mask


def clip(gradients, max_grad_norm):
    """gradients [B, P]. Each row shortened to at most max_grad_norm, never lengthened."""
    norms = gradients.norm(dim=1, keepdim=True)
    return gradients * (max_grad_norm / norms.clamp_min(max_grad_norm))


def noisy_mean(clipped, noise_multiplier, max_grad_norm, expected_batch_size, rng):
    """clipped [B, P], B may be 0. (sum + Gaussian noise drawn from rng) / expected size."""
    noise = noise_multiplier * max_grad_norm * torch.randn(clipped.shape[1], generator=rng)
    return (clipped.sum(0) + noise) / expected_batch_size


def selective(gradients, protected, noise_multiplier, max_grad_norm, expected_batch_size, rng):
    """gradients [B, P], protected bool [B]. One update [P]; only the protected are clipped."""
    factor = max_grad_norm / gradients.norm(dim=1).clamp_min(max_grad_norm)
    factor = torch.where(protected, factor, torch.ones_like(factor))
    standard = torch.randn(gradients.shape[1], generator=rng)
    noise = noise_multiplier * max_grad_norm * standard
    return ((gradients * factor[:, None]).sum(0) + noise) / expected_batch_size


def loss_variance(losses, lam):
    """losses [B]. Mean plus lam times the unbiased variance; a single loss has none."""
    return losses.mean() + (lam * losses.var() if len(losses) > 1 else 0)


def until(score, power):
    """score [N]. 1 - rank ** power; rank 0 (lowest score) to 1 (highest), ties by index."""
    rank = np.empty(len(score))
    rank[np.argsort(score, kind="stable")] = np.arange(len(score)) / (len(score) - 1)
    return 1 - rank**power


def n_fgsm(net, x, y, eps, noise):
    """x + noise + eps * sign(gradient there), inside [0, 1], not projected to the ball."""
    z = (x + noise).clamp(0, 1).requires_grad_()
    loss = F.cross_entropy(net(z), y, reduction="sum")
    (slope,) = torch.autograd.grad(loss, z)
    return (z.detach() + eps * slope.sign()).clamp(0, 1)


def modified_entropy(p, y):
    """p [K], y the class. -(1 - p_y) log p_y - sum over k != y of p_k log(1 - p_k)."""
    others = np.arange(len(p)) != y
    return -(1 - p[y]) * np.log(p[y]) - (p[others] * np.log(1 - p[others])).sum()


def held_out(scores, member, new_scores, new_member):
    """Balanced accuracy on the new pair, of the threshold that is best on the first pair."""

    def accuracy(cut, s, m):
        return ((s[m] >= cut).mean() + (s[~m] < cut).mean()) / 2

    cuts = np.unique(scores)[::-1]  # of equally good ones the highest
    best = cuts[np.argmax([accuracy(cut, scores, member) for cut in cuts])]
    return accuracy(best, new_scores, new_member)


def cost(attack_steps):
    """Passes an image that a step of PGD training costs; a forward or a backward is one."""
    return 2 * attack_steps + 3


def finest(non_members, rates):
    """The smallest of the rates at which at least five non-members are false positives."""
    return min(rate for rate in rates if rate * non_members >= 5)
