"""Wrong answers to the exercises about privacy (04 and 05), as in `mistakes`, which joins them to its own.

>>> PRIVACY["clip"]["nothing was clipped, the rows are as they were"]("gradients", 1.0)
'gradients'
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from demem_lab import solutions


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


def _selecting(who=lambda p: p, rest=1.0, std=lambda p: 1.0, size=lambda p, n: n, together=False,
               by_length=lambda longest, bound: bound) -> Callable:
    """Selective protection with one part replaced."""

    def f(gradients, protected, sigma, bound, expected, rng):
        chosen = gradients[who(protected)]
        private = solutions.clip(chosen.sum(0, keepdim=True) if together else chosen, bound).sum(0)
        total = private + rest * gradients[~who(protected)].sum(0)
        longest = float(gradients.norm(dim=1).max()) if len(gradients) else bound
        scale = std(protected) * sigma * by_length(longest, bound)
        return (total + scale * _noise(gradients.shape[1], rng)) / size(protected, expected)

    return f


def _variance(spread) -> Callable:
    return lambda losses, lam: losses.mean() + (lam * spread(losses) if len(losses) > 1 else 0)


PRIVACY: dict[str, dict[str, Callable]] = {
    "clip": {
        "short rows are lengthened, and 0 / 0 is NaN: divide by max(norm, max_grad_norm)":
            lambda g, C: g * (C / g.norm(dim=1, keepdim=True)),
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
        "noise is added at EVERY step, also when just one protected sample was drawn":
            _selecting(std=lambda p: float(p.sum() != 1)),
        "the noise is scaled wrongly: it must not depend on how long the gradients drawn are": _selecting(by_length=min),
        "the noise is scaled wrongly: add it once, not per sample": _selecting(std=lambda p: max(len(p), 1) ** 0.5),
    },
    "loss_variance": {
        "the divisor of the variance is n - 1": _variance(lambda x: x.var(correction=0)),
        "this adds the standard deviation, the variance is its square": _variance(lambda x: x.std()),
        "the variance of a single loss is NaN, so fewer than two must add nothing":
            lambda x, lam: x.mean() + lam * (x.var() if len(x) > 1 else torch.nan),
        "the gradient at a single loss is NaN: branch on len(losses)": lambda x, lam: x.mean() + lam * torch.nan_to_num(x.var()),
        "the variance has a gradient too, it must not be detached": _variance(lambda x: x.var().detach()),
        "the mean has a gradient too, it must not be detached":
            lambda x, lam: solutions.loss_variance(x, lam) - x.mean() + x.mean().detach(),
        "a number has no gradient: no .item(), no .detach()": lambda x, lam: solutions.loss_variance(x, lam).item(),
        "the result does not depend on losses: torch.tensor(...) or .detach() cuts the graph":
            lambda x, lam: torch.tensor(solutions.loss_variance(x, lam).item(), requires_grad=True),
        "variance is a penalty, add it": lambda x, lam: solutions.loss_variance(x, -lam),
        "the mean of the losses, not their sum": lambda x, lam: solutions.loss_variance(x, lam) + x.sum() - x.mean(),
        "a single loss has no variance, but its mean counts": lambda x, lam: solutions.loss_variance(x, lam) * (len(x) > 1),
    },
}
