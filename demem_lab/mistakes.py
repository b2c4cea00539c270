"""Wrong answers that people give, planted for the checks to recognise: by exercise, what is wrong and a function doing it.

>>> MISTAKES["cost"]["an attack needs no gradient of the weights"](attack_steps=3)
12
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats

from demem_lab import solutions


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


def _above(pool=lambda s, m: s[~m], share=lambda s, m: s[~m], strictly=True) -> Callable:
    """A true positive rate whose threshold is read from `pool`, of as many false positives as `share` allows."""

    def f(scores, member, fpr):
        outside = np.sort(pool(scores, member))[::-1]
        k = int(fpr * len(share(scores, member)) + 1e-9)
        if k >= len(outside):
            return 1.0
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


def _after_averaging(gradients, bound):
    mean = gradients.mean(0)
    return mean * (bound / mean.norm().clamp_min(bound))


def _noise(shape, rng) -> torch.Tensor:
    return torch.randn(shape, generator=rng)


def _noisy(total=lambda c: c.sum(0), std=lambda s, C, n, c: s * C, draw=lambda c, rng: _noise(c.shape[1], rng),
           size=lambda c, n: n) -> Callable:
    """A noisy mean with one part replaced."""

    def f(clipped, sigma, bound, expected, rng):
        return (total(clipped) + std(sigma, bound, expected, clipped) * draw(clipped, rng)) / size(clipped, expected)

    return f


def _selecting(who=lambda p: p, rest=1.0, std=lambda p: 1.0, size=lambda p, n: n, together=False) -> Callable:
    """Selective protection with one part replaced."""

    def f(gradients, protected, sigma, bound, expected, rng):
        chosen = gradients[who(protected)]
        private = solutions.clip(chosen.sum(0, keepdim=True) if together else chosen, bound).sum(0)
        total = private + rest * gradients[~who(protected)].sum(0)
        return (total + std(protected) * sigma * bound * _noise(gradients.shape[1], rng)) / size(protected, expected)

    return f


def _variance(spread) -> Callable:
    return lambda losses, lam: losses.mean() + (lam * spread(losses) if len(losses) > 1 else 0)


def _ranked(order=lambda s: np.argsort(s, kind="stable"), divisor=lambda n: n - 1) -> Callable:
    def f(score, power):
        rank = np.empty(len(score))
        rank[order(score)] = np.arange(len(score)) / divisor(len(score))
        return 1 - rank**power

    return f


def _balanced(cut, s, m):
    return ((s[m] >= cut).mean() + (s[~m] < cut).mean()) / 2


def _best_cut(s, m, order=-1):
    cuts = np.unique(s)[::order]
    return cuts[np.argmax([_balanced(cut, s, m) for cut in cuts])]


MISTAKES: dict[str, dict[str, Callable]] = {
    "gap": {
        "take the gap of each model first, then average: this pools all models": lambda r, m: r[m].mean() - r[~m].mean(),
        "the sign is turned, it is members minus non-members": lambda r, m: -solutions.gap(r, m),
        "this is one gap a model, average them": lambda r, m: [a[b].mean() - a[~b].mean() for a, b in zip(r, m, strict=True)],
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
        "with >= too many come in, count scores strictly above the threshold": _above(strictly=False),
        "members leak into the threshold: it comes from the non-members alone": _above(lambda s, m: s, lambda s, m: s),
        "this threshold comes from the members, it belongs to the others": _above(lambda s, m: s[m], lambda s, m: s[m]),
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
        "this is the ratio, its logarithm is asked for": lambda *a: np.exp(solutions.log_ratio(*a)),
        "each side has its own standard deviation": _ratio(std=lambda own, both, ddof: both.std()),
        "the log density also holds -log(std), which differs between the two":
            lambda v, a, b: ((v - b.mean()) / b.std()) ** 2 / 2 - ((v - a.mean()) / a.std()) ** 2 / 2,
        "a likelihood alone is not a ratio: subtract the non-members' log density":
            lambda v, a, b: stats.norm.logpdf(v, a.mean(), a.std()),
    },
    "shadow_split": {
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
        "a threshold takes all that tie with it, ask for an exact number": lambda s, q: s >= np.quantile(s, 1 - q),
        "[-0:] is everybody, not nobody": _last_entries,
        "these are indices, a mask has one entry a sample": lambda s, q: np.flatnonzero(solutions.top(s, q)),
        "a mask is bool, start from np.zeros(len(score), dtype=bool)": lambda s, q: solutions.top(s, q).astype(int),
    },
    "clip": {
        "short gradients must not be lengthened": lambda g, C: g * C / g.norm(dim=1, keepdim=True).clamp_min(1e-12),
        "a zero gradient divided by its norm is NaN":
            lambda g, C: g / g.norm(dim=1, keepdim=True) * g.norm(dim=1, keepdim=True).clamp(max=C),
        "each row by its OWN norm, this shortens the batch as a whole": lambda g, C: g * (C / g.norm().clamp_min(C)),
        "clip before averaging: one long row has already drowned the others in this mean": _after_averaging,
        "this clips single entries, the NORM of the row is to be bounded": lambda g, C: g.clamp(-C, C),
        "nothing was clipped, the rows are as they were": lambda g, C: g,
        "compare the norm with the bound, not the squared norm": lambda g, C: g * (C / (g**2).sum(1, keepdim=True).clamp_min(C)),
    },
    "noisy_mean": {
        "divide by the EXPECTED batch size, the drawn one tells how many were there": _noisy(size=lambda c, n: max(len(c), 1)),
        "divide by the EXPECTED batch size, whichever is larger": _noisy(size=lambda c, n: max(len(c), n)),
        "the mean over those drawn has a divisor of its own, sum them": _noisy(total=lambda c: c.mean(0) * len(c)),
        "the noise is scaled wrongly: add it once to the sum, not once for each sample":
            _noisy(draw=lambda c, rng: _noise(c.shape, rng).sum(0)),
        "the noise is scaled wrongly: add it to the SUM, before dividing": _noisy(std=lambda s, C, n, c: s * C * n),
        "the noise is scaled wrongly: it is divided by the batch size twice": _noisy(std=lambda s, C, n, c: s * C / n),
        "the noise is scaled wrongly: multiply noise_multiplier by max_grad_norm": _noisy(std=lambda s, C, n, c: s),
        "this is the variance, torch.randn wants the standard deviation": _noisy(std=lambda s, C, n, c: (s * C) ** 2),
        "noise is added at EVERY step: this empty batch has none, and tells that nobody was drawn":
            _noisy(std=lambda s, C, n, c: s * C * (len(c) > 0)),
        "there is no noise at all, it is added at EVERY step": _noisy(std=lambda s, C, n, c: 0.0),
        "each parameter has noise of its own: torch.randn(P, generator=rng), not one number":
            _noisy(draw=lambda c, rng: _noise(1, rng).expand(c.shape[1])),
        "the noise is uniform, Gaussian noise is torch.randn(..., generator=rng)":
            _noisy(draw=lambda c, rng: (torch.rand(c.shape[1], generator=rng) - 0.5) * 12**0.5),
        "the noise has a mean, Gaussian noise around 0 is torch.randn(..., generator=rng)":
            _noisy(draw=lambda c, rng: 1 + _noise(c.shape[1], rng)),
        "the noise does not come from rng, so nobody can repeat it: torch.randn(..., generator=rng)":
            _noisy(draw=lambda c, rng: _noise(c.shape[1], None)),
        "this is one row a sample, one update [P] is asked for": lambda c, s, C, n, rng: (c + s * C * _noise(c.shape, rng)) / n,
    },
    "selective": {
        "only the protected are clipped": _selecting(who=lambda p: p | True),
        "the protected must be clipped": _selecting(who=lambda p: p & False),
        "the wrong ones are clipped: protected is True for those to clip": _selecting(who=lambda p: ~p),
        "the unprotected count too, as they are": _selecting(rest=0.0),
        "clip each protected row before adding up, this clips their sum": _selecting(together=True),
        "divide by the EXPECTED batch size, not by how many were drawn": _selecting(size=lambda p, n: max(len(p), 1)),
        "noise is added at EVERY step: without it an observer sees that nobody protected was drawn":
            _selecting(std=lambda p: float(p.any())),
        "noise is added at EVERY step, also when the batch is empty": _selecting(std=lambda p: float(len(p) > 0)),
        "the noise is scaled wrongly: it must not depend on how many protected were drawn":
            _selecting(std=lambda p: float(p.sum()) ** 0.5),
        "the noise is scaled wrongly: its size is the same whatever share is protected":
            _selecting(std=lambda p: float(p.double().mean()) if len(p) else 1.0),
        "the noise is scaled wrongly: add it once, not per sample": _selecting(std=lambda p: max(len(p), 1) ** 0.5),
    },
    "loss_variance": {
        "the divisor of the variance is n - 1": _variance(lambda x: x.var(correction=0)),
        "this adds the standard deviation, the variance is its square": _variance(lambda x: x.std()),
        "the variance of a single loss is NaN, so fewer than two must add nothing":
            lambda x, lam: x.mean() + lam * (x.var() if len(x) > 1 else torch.nan),
        "the variance has a gradient too, it must not be detached": _variance(lambda x: x.var().detach()),
        "a number has no gradient: no .item(), no .detach()": lambda x, lam: solutions.loss_variance(x, lam).item(),
        "variance is a penalty, add it": lambda x, lam: solutions.loss_variance(x, -lam),
        "the mean of the losses, not their sum": lambda x, lam: solutions.loss_variance(x, lam) + x.sum() - x.mean(),
        "a single loss has no variance, but its mean counts": lambda x, lam: solutions.loss_variance(x, lam) * (len(x) > 1),
    },
    "until": {
        "the order is turned: rank 0 is the LOWEST risk, and stays to the end":
            _ranked(order=lambda s: np.argsort(-s, kind="stable")),
        "argsort lists the samples from low to high, which is not yet their ranks: write 0, 1, 2, ... to these places":
            lambda s, power: 1 - (np.argsort(s, kind="stable") / (len(s) - 1)) ** power,
        "the highest rank is 1, divide by N - 1": _ranked(divisor=lambda n: n),
        "use the rank, not the score": lambda s, power: 1 - s**power,
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
            lambda s, m, new, who: ((new >= _best_cut(s, m)) == who).mean(),
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
        "five are enough: >=, not >": lambda n, rates: min((r for r in rates if r * n > 5), default=1.0),
        "a rate without false positives shows nothing": lambda n, rates: min(rates),
    },
}
