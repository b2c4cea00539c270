"""Wrong answers that people give, planted for the checks to recognise: by exercise, what is wrong and a function doing it.

>>> MISTAKES["cost"]["an attack needs no gradient of the weights"](attack_steps=3)
12
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats

from demem_lab import solutions
from demem_lab.mistakes_privacy import PRIVACY


def _interval(level=0.975, ddof=1, normal=False, root=True) -> Callable:
    def f(v):
        quantile = stats.norm.ppf(level) if normal else stats.t.ppf(level, len(v) - 1)
        half = quantile * np.std(v, ddof=ddof) / (np.sqrt(len(v)) if root else 1)
        return np.mean(v) - half, np.mean(v) + half

    return f


def _slope(net, x, y) -> torch.Tensor:
    z = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(net(z), y, reduction="sum"), z)[0]


def _only_the_right(net, x, y, eps):
    right = (net(x).argmax(-1) == y)[:, None, None, None]
    return torch.where(right, solutions.fgsm(net, x, y, eps), x)


def _in_l2(z, x, eps):
    offset = z - x
    norm = offset.flatten(1).norm(dim=1)[:, None, None, None].clamp_min(1e-12)
    return (x + offset * (eps / norm).clamp(max=1)).clamp(0, 1)


def _above(
    pool=lambda s, m: s[~m], share=lambda s, m: s[~m], strictly=True, off=0, whole=lambda k: int(k + 1e-9), last=None
) -> Callable:
    """A true positive rate whose threshold is read from `pool`, `off` places from as many false positives as `share` allows."""

    def f(scores, member, fpr):
        outside = np.sort(pool(scores, member))[::-1]
        k = whole(fpr * len(share(scores, member)))
        k += off if k < len(outside) else 0
        if k >= len(outside):
            if last is None:
                return 1.0
            k = last
        return ((scores[member] > outside[k]) if strictly else (scores[member] >= outside[k])).mean()

    return f


def _ratio(ddof=0, std=lambda own, both, ddof: own.std(ddof=ddof), log=stats.norm.logpdf) -> Callable:
    def f(value, a, b):
        both = np.concatenate([a, b])
        return log(value, a.mean(), std(a, both, ddof)) - log(value, b.mean(), std(b, both, ddof))

    return f


def _references(target=False, twin=False, everybody=False, all_inside=False) -> Callable:
    """A split of the references with somebody left in who does not belong there."""

    def f(members, own, image):
        reference = ~(members == ~members[own]).all(1) | twin | everybody
        reference[own] = target or everybody
        outside = reference if all_inside else reference & ~members[:, image]
        return reference & members[:, image], outside

    return f


def _top(order=lambda s: np.argsort(-s, kind="stable"), number=round) -> Callable:
    def f(score, fraction):
        mask = np.zeros(len(score), dtype=bool)
        mask[order(score)[: number(fraction * len(score))]] = True
        return mask

    return f


def _last_entries(score, fraction):
    mask = np.zeros(len(score), dtype=bool)
    mask[np.argsort(-score, kind="stable")[::-1][-round(fraction * len(score)) :]] = True
    return mask


def _ranked(order=lambda s: np.argsort(s, kind="stable"), divisor=lambda n: n - 1) -> Callable:
    def f(score, power):
        rank = np.empty(len(score))
        rank[order(score)] = np.arange(len(score)) / divisor(len(score))
        return 1 - rank**power

    return f


def _balanced(cut, s, m, reached=np.greater_equal):
    return (reached(s[m], cut).mean() + (~reached(s[~m], cut)).mean()) / 2


def _best_cut(s, m, order=-1, reached=np.greater_equal, accuracy=_balanced):
    cuts = np.unique(s)[::order]
    return cuts[np.argmax([accuracy(cut, s, m, reached) for cut in cuts])]


def _plain(cut, s, m, reached=np.greater_equal):
    return (reached(s, cut) == m).mean()


MISTAKES: dict[str, dict[str, Callable]] = {
    "gap": {
        "take the gap of each model first, then average: this pools all models": lambda r, m: r[m].mean() - r[~m].mean(),
        "the sign is turned, it is members minus non-members": lambda r, m: -solutions.gap(r, m),
        "this is one gap a model, average them": lambda r, m: [a[b].mean() - a[~b].mean() for a, b in zip(r, m, strict=True)],
        "a gap is a difference of fractions, between -1 and 1, not per cent": lambda r, m: 100 * solutions.gap(r, m),
        "divide by the number of members, and of non-members, not by all images":
            lambda r, m: ((r & m).mean(1) - (r & ~m).mean(1)).mean(),
    },
    "interval": {
        "1.96 is the normal's, few values need Student's t with n - 1 degrees of freedom": _interval(normal=True),
        "np.std has ddof=0 unless told, use ddof=1": _interval(ddof=0),
        "the error of the MEAN is the standard deviation divided by sqrt(n)": _interval(root=False),
        "5 % outside are 2.5 % on each side: the quantile is 0.975, not 0.95": _interval(level=0.95),
        "this is the half width alone, return (mean - half, mean + half)": lambda v: solutions.interval(v)[1] - v.mean(),
        "the lower end comes first": lambda v: solutions.interval(v)[::-1],
    },
    "fgsm": {
        "the sign of the gradient is turned: this goes DOWN the loss, an attack adds the step":
            lambda net, x, y, eps: (x - eps * _slope(net, x, y).sign()).clamp(0, 1),
        "pixels live in [0, 1], clamp at the end": lambda net, x, y, eps: x + eps * _slope(net, x, y).sign(),
        "take the SIGN of the gradient: every pixel moves by eps, whatever its slope":
            lambda net, x, y, eps: (x + eps * _slope(net, x, y)).clamp(0, 1),
        "the loss is for the given labels y, not for what the model says":
            lambda net, x, y, eps: solutions.fgsm(net, x, net(x).argmax(-1), eps),
        "attack every image, also those that are wrong already": _only_the_right,
        "this is 0 / 0 where the gradient vanishes, use .sign()":
            lambda net, x, y, eps: (x + eps * (s := _slope(net, x, y)) / s.abs()).clamp(0, 1),
        "the image came back as it was": lambda net, x, y, eps: x,
    },
    "project": {
        "nothing was projected: z comes back as it was": lambda z, x, eps: z,
        "the projection is missing: the ball of radius eps around x is forgotten": lambda z, x, eps: z.clamp(0, 1),
        "pixels live in [0, 1], clamp once more": lambda z, x, eps: x + (z - x).clamp(-eps, eps),
        "a point inside the ball stays where it is, only those outside go to its border":
            lambda z, x, eps: (x + eps * (z - x).sign()).clamp(0, 1),
        "this is the ball in the L2 norm, here each pixel has its own limit": _in_l2,
        "the ball is around x, not around 0": lambda z, x, eps: z.clamp(-eps, eps).clamp(0, 1),
    },
    "robust": {
        "attacks fool different images: combine them image by image, then average": lambda c, a: a.mean(1).min(),
        "the strongest single attack is too kind: another one fools other images": lambda c, a: (c & a).mean(1).min(),
        "an image that is wrong before any attack is not robust": lambda c, a: a.all(0).mean(),
        "EVERY attack must fail, not one of them": lambda c, a: (c & a.any(0)).mean(),
        "robust is the worst case, not the average over attacks": lambda c, a: (c & a).mean(),
    },
    "tpr_at_fpr": {
        "one place too far: above outside[k + 1] lie k + 1 non-members, one more than allowed": _above(off=1),
        "one place too early: above outside[k - 1] lie fewer than the k allowed, so members are missed": _above(off=-1),
        "with >= too many come in, count scores strictly above the threshold": _above(strictly=False),
        "members leak into the threshold: it comes from the non-members alone": _above(lambda s, m: s, lambda s, m: s),
        "this threshold comes from the members, it belongs to the others": _above(lambda s, m: s[m], lambda s, m: s[m]),
        "with fpr = 1 everybody may be accused, also a member below all non-members: return 1.0": _above(last=-1),
        "allowed mistakes are whole ones, rounded DOWN: ceil() lets one too many pass":
            _above(whole=lambda k: math.ceil(k - 1e-9)),
        "allowed mistakes are whole ones, rounded DOWN: round() may let one too many pass": _above(whole=round),
        "an interpolated quantile may let more than fpr of the non-members pass, count them":
            lambda s, m, q: 1.0 if q == 1 else (s[m] > np.quantile(s[~m], 1 - q)).mean(),
        "fpr is a share of the non-members, not of everybody": _above(share=lambda s, m: s),
        "divide by the number of members, not of everybody": lambda s, m, q: solutions.tpr_at_fpr(s, m, q) * m.mean(),
        "high scores mean member, this takes the lowest": lambda s, m, q: solutions.tpr_at_fpr(-s, m, q),
    },
    "log_ratio": {
        "the sign is turned, members come first": lambda v, a, b: solutions.log_ratio(v, b, a),
        "the standard deviations need ddof=0": _ratio(ddof=1),
        "far out both densities underflow to 0, so compute the LOG density directly":
            _ratio(log=lambda *a: np.log(stats.norm.pdf(*a))),
        "logpdf takes the standard deviation, this is the variance": _ratio(std=lambda own, both, ddof: own.var(ddof=ddof)),
        "this is the ratio, its logarithm is asked for": lambda *a: np.exp(solutions.log_ratio(*a)),
        "each side has its own standard deviation": _ratio(std=lambda own, both, ddof: both.std()),
        "the log density also holds -log(std), which differs between the two":
            lambda v, a, b: ((v - b.mean()) / b.std()) ** 2 / 2 - ((v - a.mean()) / a.std()) ** 2 / 2,
        "a likelihood alone is not a ratio: subtract the non-members' log density":
            lambda v, a, b: stats.norm.logpdf(v, a.mean(), a.std()),
    },
    "shadow_split": {
        "return two bool masks with one entry a model, not the models' numbers":
            lambda *a: tuple(np.flatnonzero(side) for side in solutions.shadow_split(*a)),
        "the target is among its own references: the answer stands in the question": _references(target=True),
        "the twin is left in: a member then has one reference more without it than a non-member has": _references(twin=True),
        "target and twin are both left in": _references(everybody=True),
        "members in the shadow split: models that trained on the image stand among those that did not":
            _references(all_inside=True),
        "the order is turned, those that trained on the image come first": lambda *a: solutions.shadow_split(*a)[::-1],
        "split by the image that is asked about": lambda m, t, i: solutions.shadow_split(m, t, 0),
    },
    "memorization": {
        "the sign is turned, it is with minus without": lambda p, m: -solutions.memorization(p, m),
        "divide by how many models had the sample, not by all models": lambda p, m: np.where(m, p, -p).mean(0),
        "members leak into the second mean: it is over the models WITHOUT the sample":
            lambda p, m: (p * m).sum(0) / m.sum(0) - p.mean(0),
        "one number a model; each sample gets a score (axis 0 is models)": lambda p, m: [solutions.gap(a[None], b[None])
            for a, b in zip(p, m, strict=True)],
        "this pools all samples, each has a score": lambda p, m: np.full(p.shape[1], p[m].mean() - p[~m].mean()),
    },
    "top": {
        "among equal scores the LOWER index goes first, so sort -score with kind='stable'":
            _top(order=lambda s: np.argsort(s, kind="stable")[::-1]),
        "these are the lowest scores": lambda s, q: solutions.top(-s, q),
        "round(fraction * N), int() cuts off": _top(number=int),
        "round(fraction * N), ceil() takes one too many": _top(number=math.ceil),
        "a threshold takes all that tie with it, ask for an exact number": lambda s, q: s >= np.quantile(s, 1 - q),
        "[-0:] is everybody, not nobody": _last_entries,
        "these are indices, a mask has one entry a sample": lambda s, q: np.flatnonzero(solutions.top(s, q)),
        "a mask is bool, start from np.zeros(len(score), dtype=bool)": lambda s, q: solutions.top(s, q).astype(int),
    },
    "until": {
        "the order is turned: rank 0 is the LOWEST risk, and stays to the end":
            _ranked(order=lambda s: np.argsort(-s, kind="stable")),
        "argsort lists the samples from low to high, which is not yet their ranks: write 0, 1, 2, ... to these places":
            lambda s, power: 1 - (np.argsort(s, kind="stable") / (len(s) - 1)) ** power,
        "the highest rank is 1, divide by N - 1": _ranked(divisor=lambda n: n),
        "use the rank, not the score": lambda s, power: 1 - s**power,
        "1 minus rank ** power: the riskiest leave first": lambda s, power: 1 - solutions.until(s, power),
        "no ranks are shared, ties by index: sort with kind='stable'":
            lambda s, power: 1 - ((stats.rankdata(s) - 1) / (len(s) - 1)) ** power,
        "among equal scores the lower index has the lower rank, so sort with kind='stable'":
            _ranked(order=lambda s: np.lexsort((-np.arange(len(s)), s))),
        "1 - rank ** power, not (1 - rank) ** power": lambda s, power: solutions.until(s, 1) ** power,
    },
    "n_fgsm": {
        "no projection: the image may leave the ball around x":
            lambda net, x, y, eps, noise: solutions.project(solutions.n_fgsm(net, x, y, eps, noise), x, eps),
        "the noise is the start: take the gradient THERE, not at the clean image":
            lambda net, x, y, eps, noise: ((x + noise).clamp(0, 1) + eps * _slope(net, x, y).sign()).clamp(0, 1),
        "clamp x + noise to [0, 1] before the gradient, too: the network is promised pixels":
            lambda net, x, y, eps, noise: (x + noise + eps * _slope(net, x + noise, y).sign()).clamp(0, 1),
        "the step starts where the gradient was taken, at the CLAMPED x + noise":
            lambda net, x, y, eps, noise: (x + noise + eps * _slope(net, (x + noise).clamp(0, 1), y).sign()).clamp(0, 1),
        "pixels live in [0, 1], clamp to [0, 1] at the end, too":
            lambda net, x, y, eps, noise: (z := (x + noise).clamp(0, 1)) + eps * _slope(net, z, y).sign(),
        "the noise is the start, not an addition to the clean image's step":
            lambda net, x, y, eps, noise: (solutions.fgsm(net, x, y, eps) + noise).clamp(0, 1),
        "this forgets the noise": lambda net, x, y, eps, noise: solutions.fgsm(net, x, y, eps),
        "the sign of the gradient is turned: this goes DOWN the loss":
            lambda net, x, y, eps, noise: ((z := (x + noise).clamp(0, 1)) - eps * _slope(net, z, y).sign()).clamp(0, 1),
    },
    "modified_entropy": {
        "this is the plain entropy, which does not know the label": lambda p, y: -(p * np.log(p)).sum(),
        "the sum runs over the OTHER classes only": lambda p, y: -(1 - p[y]) * np.log(p[y]) - (p * np.log(1 - p)).sum(),
        "the sign is turned": lambda p, y: -solutions.modified_entropy(p, y),
        "the right class is weighted with 1 - p_y, not with p_y":
            lambda p, y: solutions.modified_entropy(p, y) + (1 - 2 * p[y]) * np.log(p[y]),
        "this is the cross-entropy, the other classes count too": lambda p, y: -np.log(p[y]),
    },
    "held_out": {
        "the threshold was chosen on the scores that are judged: that flatters every attack":
            lambda s, m, new, who: _balanced(_best_cut(new, who), new, who),
        "this judges the scores the threshold was chosen on": lambda s, m, new, who: _balanced(_best_cut(s, m), s, m),
        "members and non-members count equally: average the two rates, not the samples":
            lambda s, m, new, who: _plain(_best_cut(s, m), new, who),
        "the best threshold is the one with the best BALANCED accuracy, not with the most right answers":
            lambda s, m, new, who: _balanced(_best_cut(s, m, accuracy=_plain), new, who),
        "the threshold is one of the scores, and whoever reaches it counts as a member: score >= threshold":
            lambda s, m, new, who: _balanced(_best_cut(s, m, reached=np.greater), new, who, np.greater),
        "of equally good thresholds the highest": lambda s, m, new, who: _balanced(_best_cut(s, m, order=1), new, who),
        "high scores mean member: score >= threshold": lambda s, m, new, who: 1 - solutions.held_out(s, m, new, who),
    },
    "cost": {
        "an attack needs no gradient of the weights": lambda attack_steps: 3 * attack_steps + 3,
        "each attack step goes forward and backward": lambda attack_steps: attack_steps + 3,
        "training goes forward, and backward through inputs AND weights": lambda attack_steps: 2 * attack_steps + 2,
        "the training step itself costs too": lambda attack_steps: 2 * attack_steps,
    },
    "finest": {
        "one false positive is an anecdote, ask for five": lambda n, rates: min(r for r in rates if r * n >= 1),
        "the smallest rate that has enough, not the largest": lambda n, rates: max(r for r in rates if r * n >= 5),
        "4.6 false positives are not five, do not round before you compare":
            lambda n, rates: min(r for r in rates if round(r * n) >= 5),
        "five are enough: >=, not >": lambda n, rates: min((r for r in rates if r * n > 5), default=1.0),
        "a rate without false positives shows nothing": lambda n, rates: min(rates),
    },
} | PRIVACY
