"""Exercise checks: each takes the learner's function and compares it with a trusted one on several inputs.

>>> check_top(lambda score, fraction: score > 0)                                       # doctest: +SKIP
WrongAnswer: with scores [...] and fraction 0.5: expected ..., got ...

A stub that raises NotImplementedError is "not solved yet", so that notebooks run headless; a wrong answer raises
WrongAnswer with the input, both answers and the likely mistake; any other error is the learner's own and passes through.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy import stats

from demem_lab import attacks, risk
from demem_lab.membership import evaluate
from demem_lab.models import MLP


class WrongAnswer(AssertionError):
    """The function answers, but not correctly."""


def check_gap(f: Callable) -> None:
    """f(right, member) -> mean over models of (accuracy on members - accuracy on non-members)."""
    rng = np.random.default_rng(0)
    cases = []
    for models, n in ((1, 10), (4, 50), (3, 200)):
        member = rng.random((models, n)) < rng.uniform(0.2, 0.8, (models, 1))  # models of different sizes
        member[:, 0], member[:, 1] = True, False
        right = rng.random((models, n)) < np.where(member, 0.9, 0.6)
        cases.append((right, member, np.mean([r[m].mean() - r[~m].mean() for r, m in zip(right, member, strict=True)])))

    def verify() -> None:
        for right, member, wanted in cases:
            _same(f"{len(right)} models of different sizes", f(right, member), wanted,
                  "take the gap of each model first, then average the gaps")

    _run("gap", verify)


def check_interval(f: Callable) -> None:
    """f(values) -> (low, high), the 95 % t-interval of the mean."""

    def verify() -> None:
        for values in (np.array([0.1, 0.2]), np.array([0.05, 0.07, 0.1]), np.linspace(-1, 2, 9)):
            wanted = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
            _same(f"values {values.round(3).tolist()}", f(values), wanted,
                  "use Student's t with n - 1 degrees of freedom, ddof=1, and divide by sqrt(n)")

    _run("interval", verify)


def check_fgsm(f: Callable) -> None:
    """f(net, x, y, eps) -> x + eps * sign(gradient of the cross-entropy), inside [0, 1]."""
    net, x, y = _small_task()

    def verify() -> None:
        for eps in (0.0, 0.03, 0.3):
            wanted = attacks.FGSM(eps)(net, x, y)
            _same(f"eps = {eps}", f(net, x.clone(), y, eps), wanted,
                  "go UP the loss along the sign of the gradient, and clamp to [0, 1]")

    _run("fgsm", verify)


def check_project(f: Callable) -> None:
    """f(z, x, eps) -> the nearest point to z within eps of x in every pixel and within [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, 1, 4, 4, generator=generator)
    z = x + torch.randn(3, 1, 4, 4, generator=generator)

    def verify() -> None:
        for eps in (0.0, 0.1, 2.0):
            wanted = torch.min(torch.max(z, x - eps), x + eps).clamp(0, 1)
            _same(f"eps = {eps}", f(z.clone(), x.clone(), eps), wanted, "clamp z - x to [-eps, eps], then the sum to [0, 1]")

    _run("project", verify)


def check_robust(f: Callable) -> None:
    """f(clean_right [N], attack_right [A, N]) -> share of samples right as they are and after every attack."""
    rng = np.random.default_rng(1)

    def verify() -> None:
        for count in (1, 2, 5):
            clean, attacked = rng.random(40) < 0.8, rng.random((count, 40)) < 0.7
            _same(f"{count} attacks", f(clean, attacked), np.logical_and.reduce([clean, *attacked]).mean(),
                  "an image counts only if it is right as it is AND after every attack")

    _run("robust", verify)


def check_tpr_at_fpr(f: Callable) -> None:
    """f(scores [N], member [N], fpr) -> true positive rate with at most that share of false positives."""
    rng = np.random.default_rng(2)
    member = rng.random(400) < 0.5
    smooth = rng.normal(member * 1.0, 1.0)
    tied = smooth.round(0)

    def verify() -> None:
        for name, scores in (("distinct scores", smooth), ("scores with ties", tied)):
            for fpr in (0.0, 0.01, 0.1, 1.0):
                wanted = evaluate(scores[None], member[None], fprs=(fpr,)).tpr[0, 0]
                _same(f"{name}, fpr = {fpr}", f(scores, member, fpr), wanted,
                      "the threshold comes from the non-members alone; only scores strictly above it count")

    _run("tpr_at_fpr", verify)


def check_lira(f: Callable) -> None:
    """f(value, signals_in, signals_out) -> log normal density under the first minus under the second."""
    rng = np.random.default_rng(3)

    def verify() -> None:
        for value in (-2.0, 0.0, 3.5):
            a, b = rng.normal(2, 1, 8), rng.normal(-1, 2, 6)
            wanted = stats.norm.logpdf(value, a.mean(), a.std()) - stats.norm.logpdf(value, b.mean(), b.std())
            _same(f"value {value}", f(value, a, b), wanted,
                  "log density of the members' normal minus that of the non-members'; each with its own std (ddof=0)")

    _run("log_ratio", verify)


def check_memorization(f: Callable) -> None:
    """f(p [M, N], member [M, N]) -> mean with the sample minus mean without it, [N]."""
    rng = np.random.default_rng(4)
    member = rng.random((9, 30)) < 0.4
    member[0], member[1] = True, False
    p = rng.random((9, 30))

    def verify() -> None:
        _same("9 models, 30 samples, unequal halves", f(p, member), risk.memorization(p, member).score,
              "mean over the models WITH the sample minus mean over those without, for each sample")

    _run("memorization", verify)


def check_top(f: Callable) -> None:
    """f(score [N], fraction) -> bool [N], the round(fraction * N) riskiest; ties go to the lower index."""
    rng = np.random.default_rng(5)

    def verify() -> None:
        for score in (rng.normal(size=50), rng.integers(0, 4, 50).astype(float)):
            for fraction in (0.0, 0.1, 0.33, 1.0):
                found, wanted = np.asarray(f(score, fraction)), risk.protected_set(score, fraction=fraction).mask
                if found.dtype != bool:
                    raise WrongAnswer(f"expected a bool array, got {found.dtype}; return a mask, not indices")
                _same(f"{len(set(score))} different scores, fraction {fraction}", found, wanted,
                      "exactly round(fraction * N) samples, highest scores first, ties to the lower index")

    _run("top", verify)


def check_clip(f: Callable) -> None:
    """f(gradients [B, P], max_grad_norm) -> each row shortened to at most that norm, never lengthened."""
    gradients = torch.randn(6, 20, generator=torch.Generator().manual_seed(6)) * torch.tensor([0.0, 0.01, 0.1, 1, 5, 50])[:, None]

    def verify() -> None:
        for bound in (0.1, 1.0, 30.0):
            found = f(gradients.clone(), bound)
            if torch.isnan(torch.as_tensor(found)).any():
                raise WrongAnswer(f"max_grad_norm = {bound}: a gradient of zero became NaN; do not divide by its norm")
            norms = gradients.norm(dim=1, keepdim=True)
            wanted = torch.where(norms > bound, gradients * bound / norms.clamp_min(1e-12), gradients)
            _same(f"max_grad_norm = {bound}", found, wanted,
                  "each sample's own norm; short gradients stay as they are; clip before any averaging")

    _run("clip", verify)


def check_noisy_mean(f: Callable) -> None:
    """f(clipped [B, P], noise_multiplier, max_grad_norm, expected_batch_size, rng) -> (sum + noise) / expected size, [P]."""
    clipped = torch.randn(5, 4000, generator=torch.Generator().manual_seed(7)) / 70

    def verify() -> None:
        rng = torch.Generator().manual_seed(8)
        _same("no noise, 5 samples drawn, 8 expected", f(clipped, 0.0, 1.0, 8, rng), clipped.sum(0) / 8,
              "divide by the EXPECTED batch size, not by how many were drawn")
        for name, part in (("5 samples", clipped), ("an empty batch", clipped[:0])):
            noise = (torch.as_tensor(f(part, 2.0, 1.5, 8, rng)) - part.sum(0) / 8) * 8
            _noise(name, noise, 2.0 * 1.5)

    _run("noisy_mean", verify)


def check_selective(f: Callable) -> None:
    """f(gradients [B, P], protected [B], noise_multiplier, max_grad_norm, expected_batch_size, rng) -> one update [P]."""
    gradients = torch.randn(6, 4000, generator=torch.Generator().manual_seed(9))
    some = torch.tensor([True, False, True, False, False, False])

    def verify() -> None:
        rng = torch.Generator().manual_seed(10)
        for name, who in (("two of six protected", some), ("nobody drawn is protected", some & False), ("all", some | True)):
            factor = torch.where(who, 1.5 / gradients.norm(dim=1).clamp_min(1.5), torch.ones(6))
            total = (gradients * factor[:, None]).sum(0)
            _same(f"no noise, {name}", f(gradients, who, 0.0, 1.5, 8, rng), total / 8,
                  "clip the protected only, add the others as they are, divide by the expected batch size")
            noise = (torch.as_tensor(f(gradients, who, 2.0, 1.5, 8, rng)) - total / 8) * 8
            _noise(name, noise, 2.0 * 1.5)

    _run("selective", verify)


def check_loss_variance(f: Callable) -> None:
    """f(losses [B], lam) -> mean + lam * unbiased variance, with a gradient; fewer than two losses add nothing."""

    def verify() -> None:
        for losses, lam in (([1.0, 2.0, 4.0], 0.2), ([0.5, 0.5], 1.0), ([3.0], 0.2), ([0.1, 5.0, 0.3, 0.2], 0.0)):
            mine = torch.tensor(losses, dtype=torch.float64, requires_grad=True)
            theirs = mine.detach().clone().requires_grad_()
            wanted = theirs.mean() + (lam * theirs.var() if len(losses) > 1 else 0)
            found = f(mine, lam)
            _same(f"losses {losses}, lam = {lam}", torch.as_tensor(found).detach(), wanted.detach(),
                  "mean + lam * variance with divisor n - 1; fewer than two losses have no variance")
            if not getattr(found, "requires_grad", False):
                raise WrongAnswer("the result has no gradient; compute with torch, without .item() or .detach()")
            found.backward()
            wanted.backward()
            _same(f"gradient for losses {losses}, lam = {lam}", mine.grad, theirs.grad,
                  "let the gradient flow through the variance")

    _run("loss_variance", verify)


def _run(name: str, verify: Callable[[], None]) -> None:
    try:
        verify()
    except NotImplementedError:
        print(f"not solved yet: fill in {name}")
    else:
        print(f"passed: {name} is right on all inputs")


def _same(case: str, found, wanted, hint: str, tolerance: float = 1e-5) -> None:
    if found is None:
        raise WrongAnswer(f"{case}: nothing came back; does the function return its result?")
    a, b = _array(found), _array(wanted)
    if a.shape != b.shape:
        raise WrongAnswer(f"{case}: expected shape {list(b.shape)}, got {list(a.shape)}. Hint: {hint}")
    if not np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=False):
        worst = np.unravel_index(np.argmax(np.abs(np.nan_to_num(a, nan=np.inf) - b)), b.shape)
        raise WrongAnswer(f"{case}: expected {b[worst]:.5g}, got {a[worst]:.5g}. Hint: {hint}")


def _noise(case: str, noise: torch.Tensor, std: float) -> None:
    """4,000 numbers: their standard deviation is known to 1.1 %, their mean to std / 63; five of those are allowed."""
    n = noise.numel()
    found, mean = float(noise.std()), float(noise.mean())
    if abs(found - std) > 5 * std / np.sqrt(2 * n) or abs(mean) > 5 * std / np.sqrt(n):
        raise WrongAnswer(
            f"{case}: the noise on the SUM should have mean 0 and standard deviation {std:.3g}, got {mean:.3g} and {found:.3g}. "
            "Hint: noise_multiplier * max_grad_norm, added once to the sum at every step, also when nobody was drawn"
        )


def _array(value) -> np.ndarray:
    return np.asarray(value.detach() if hasattr(value, "detach") else value, dtype=np.float64)


def _small_task():
    net = MLP(hidden=(16,)).build(models=1, shape=(1, 4, 4), classes=3, seeds=(0,))
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(12, 1, 4, 4, generator=generator)
    x[0], x[1] = 0, 1  # at the edge of the image range the clamp matters
    return net, x, torch.randint(0, 3, (12,), generator=generator)
