"""Exercise checks: each takes the learner's function and compares it with a trusted one on several inputs.

>>> check_project(lambda z, x, eps: (x + (z - x).clamp(-eps, eps)).clamp(0, 1))
passed: project is right on all inputs
True

A stub that raises NotImplementedError is "not solved yet" (False), so notebooks run headless. A wrong answer raises WrongAnswer:
the input, what was expected, what came back, the likely mistake. Every other error is the learner's own and passes through.
"""

from __future__ import annotations

import copy
import dis
from collections.abc import Callable
from functools import partial, wraps

import numpy as np
import torch
from scipy import stats

from demem_lab import attacks, risk
from demem_lab.leakage import evaluate, seed_interval
from demem_lab.models import MLP
from demem_lab.remedies import release_schedule


class WrongAnswer(AssertionError):
    """The function answers, but not correctly."""


def _exercise(name: str) -> Callable:
    """Makes a check of comparisons: it prints the outcome, says if it is solved, and keeps the global random state."""

    def decorate(compare: Callable) -> Callable[[Callable], bool]:
        @wraps(compare)
        def check(f: Callable) -> bool:
            state = np.random.get_state()
            try:
                with torch.random.fork_rng(devices=[]):
                    compare(f)
            except NotImplementedError as error:
                if not _is_stub(error):
                    raise
                print(f"not solved yet: fill in {name}")
                return False
            finally:
                np.random.set_state(state)
            print(f"passed: {name} is right on all inputs")
            return True

        return check

    return decorate


@_exercise("gap")
def check_gap(f: Callable) -> bool:
    """f(right [M, N], member [M, N]) -> mean over models of (accuracy on members - accuracy on non-members)."""
    rng = np.random.default_rng(0)
    for models, n in ((1, 10), (4, 50), (3, 200)):
        member = rng.random((models, n)) < np.linspace(0.2, 0.8, models)[:, None]  # models of different sizes
        member[:, 0], member[:, 1] = True, False
        right = rng.random((models, n)) < np.where(member, np.linspace(0.6, 1, models)[:, None], 0.5)
        wanted = np.mean([r[m].mean() - r[~m].mean() for r, m in zip(right, member, strict=True)])
        _same(f"{models} models with unequal numbers of members", _ask(f, right, member), wanted,
              "take the gap of each model first, then average the gaps", {
                  "this pools the entries of all models": right[member].mean() - right[~member].mean(),
                  "the sign is turned, it is members minus non-members": -wanted})


@_exercise("interval")
def check_interval(f: Callable) -> bool:
    """f(values [S]) -> (low, high), the 95 % t-interval of the mean over seeds."""
    for values in (np.array([0.1, 0.2]), np.array([0.05, 0.07, 0.1]), np.linspace(-1, 2, 9)):
        found = seed_interval(values)
        error, t = stats.sem(values), stats.t.ppf(0.975, len(values) - 1)
        slips = {"1.96 is the normal's, few values need Student's t with n - 1 degrees of freedom": stats.norm.ppf(0.975) * error,
                 "np.std has ddof=0 unless told, use ddof=1": t * values.std() / np.sqrt(len(values)),
                 "the error of the MEAN is the standard deviation divided by sqrt(n)": t * values.std(ddof=1)}
        _same(f"values {values.round(3).tolist()}", _ask(f, values), [found.low, found.high],
              "mean -+ t quantile (0.975, n - 1) * standard deviation (ddof=1) / sqrt(n)",
              {text: [values.mean() - half, values.mean() + half] for text, half in slips.items()})


@_exercise("fgsm")
def check_fgsm(f: Callable) -> bool:
    """f(net, x, y, eps) -> x + eps * sign(gradient of the cross-entropy), inside [0, 1]."""
    net = MLP(hidden=(16,)).build(models=1, shape=(1, 4, 4), classes=3, seeds=(0,))
    x = torch.rand(12, 1, 4, 4, generator=_seeded(0))
    x[0], x[1] = 0, 1  # at the edge the clamp matters; black has no gradient here, and sign(0) = 0 moves nothing
    y = torch.randint(0, 3, (12,), generator=_seeded(1))
    for eps in (0.0, 0.03, 0.3):
        down = attacks.FGSM(eps)(net, x, y, loss=lambda *logits_and_y: -attacks.cross_entropy(*logits_and_y))
        _same(f"eps = {eps}", _ask(f, net, x, y, eps), attacks.FGSM(eps)(net, x, y),
              "move by eps along the SIGN of the gradient of the loss for the labels y, then clamp to [0, 1]",
              {"this goes DOWN the loss, an attack adds the step": down})


@_exercise("project")
def check_project(f: Callable) -> bool:
    """f(z, x, eps) -> the nearest point to z within eps of x in every pixel and within [0, 1]."""
    x = torch.rand(3, 1, 4, 4, generator=_seeded(0))
    x[0, 0, 0], x[0, 0, 1] = 0, 1
    z = x + torch.randn(3, 1, 4, 4, generator=_seeded(1)) * 0.3
    for eps in (0.0, 0.1, 2.0):
        _same(f"eps = {eps}", _ask(f, z, x, eps), attacks.PGD(eps).project(z, x),
              "clamp z - x to [-eps, eps], add x, then clamp to [0, 1]", {
                  "the ball of radius eps around x is forgotten": z.clamp(0, 1),
                  "pixels live in [0, 1], clamp once more": x + (z - x).clamp(-eps, eps)})


@_exercise("robust")
def check_robust(f: Callable) -> bool:
    """f(clean_right [N], attack_right [A, N]) -> share of samples right as they are and after every attack."""
    rng = np.random.default_rng(1)
    for count, clean_share, share in ((2, 0.8, 0.7), (1, 0.8, 0.7), (5, 0.8, 0.9), (2, 1.0, 1.0), (2, 1.0, 0.0)):
        clean, attacked = rng.random(40) < clean_share, rng.random((count, 40)) < share
        _same(f"{count} attacks on 40 images", _ask(f, clean, attacked), (clean & attacked.all(0)).mean(),
              "an image counts only if it is right as it is AND after every attack", {
                  "an image that is wrong before any attack is not robust": attacked.all(0).mean(),
                  "attacks may fool different images, so combine them image by image, then average": attacked.mean(1).min()})


@_exercise("tpr_at_fpr")
def check_tpr_at_fpr(f: Callable) -> bool:
    """f(scores [N], member [N], fpr) -> true positive rate with at most that share of false positives."""
    rng = np.random.default_rng(2)
    member = rng.permutation(np.arange(300) < 100)
    smooth = rng.normal(member * 1.0, 1.0)
    few = np.array([True, True, False, False, False])
    cases = {"distinct scores": (smooth, member), "scores with ties": (smooth.round(), member),
             "3 non-members": (np.array([0.8, 1.0, 0.1, 0.2, 0.9]), few)}
    for fpr in (0.01, 0.1, 0.25, 0.0, 1.0):
        for name, (scores, who) in cases.items():
            outside = np.sort(scores[~who])[::-1]
            k = min(int(fpr * len(outside)), len(outside) - 1)
            _same(f"{name}, fpr = {fpr}", _ask(f, scores, who, fpr), evaluate(scores[None], who[None], fprs=(fpr,)).tpr[0, 0],
                  "the threshold comes from the non-members alone, at most fpr of THEM may lie above it",
                  {"with >= too many come in, count scores strictly above the threshold": (scores[who] >= outside[k]).mean()})


@_exercise("log_ratio")
def check_lira(f: Callable) -> bool:
    """f(value, signals_in, signals_out) -> log normal density under the first minus under the second (both ddof=0)."""
    rng = np.random.default_rng(3)
    for value in (-2.0, 0.0, 3.5, 90.0):
        a, b = rng.normal(2, 1, 8), rng.normal(-1, 2, 6)
        wanted, ddof1 = (stats.norm.logpdf(value, a.mean(), a.std(ddof=d)) - stats.norm.logpdf(value, b.mean(), b.std(ddof=d))
                         for d in (0, 1))
        _same(f"value {value}", _ask(f, value, a, b), wanted,
              "log density under the members' normal minus that under the non-members', each with its own mean and std", {
                  "the sign is turned, members come first": -wanted, "the standard deviations need ddof=0": ddof1,
                  "far out both densities underflow to 0, so compute the LOG density directly": np.nan})


@_exercise("memorization")
def check_memorization(f: Callable) -> bool:
    """f(p [M, N], member [M, N]) -> mean over the models with the sample minus mean over those without it, [N]."""
    rng = np.random.default_rng(4)
    for models, n in ((2, 5), (9, 30), (40, 40)):
        member = rng.random((models, n)) < 0.3
        member[0], member[1] = True, False
        p = rng.random((models, n)).round(0 if models == 40 else 3)
        wanted = risk.memorization(p, member).score
        _same(f"{models} models, {n} samples", _ask(f, p, member), wanted,
              "mean over the models WITH the sample minus mean over those without, for each sample (axis 0 is models)", {
                  "the sign is turned, it is with minus without": -wanted,
                  "divide by how many models had the sample, not by all models": np.where(member, p, -p).mean(0)})


@_exercise("top")
def check_top(f: Callable) -> bool:
    """f(score [N], fraction) -> bool [N], the round(fraction * N) riskiest; ties go to the lower index."""
    rng = np.random.default_rng(5)
    for score in (rng.normal(size=47), rng.integers(0, 4, 47).astype(float)):
        for fraction in (0.1, 0.33, 0.0, 1.0):
            case, found = f"47 samples with {len(set(score))} different scores, fraction {fraction}", _ask(f, score, fraction)
            late = np.isin(np.arange(47), np.argsort(score, kind="stable")[::-1][:round(fraction * 47)])
            _same(case, found, risk.protected_set(score, fraction=fraction).mask,
                  "a bool mask of exactly round(fraction * N) samples, highest scores first",
                  {"among equal scores the LOWER index goes first, so sort -score with kind='stable'": late})
            if (kind := np.asarray(found).dtype.name) != "bool":
                raise WrongAnswer(f"{case}: expected a bool mask, got {kind}; hint: start from np.zeros(len(score), dtype=bool)")


@_exercise("clip")
def check_clip(f: Callable) -> bool:
    """f(gradients [B, P], max_grad_norm) -> each row shortened to at most that norm, never lengthened."""
    gradients = torch.randn(6, 20, generator=_seeded(6)) * torch.tensor([0, 0.01, 0.1, 1, 5, 50])[:, None]
    for rows, bound in ((6, 0.1), (6, 1.0), (6, 30.0), (1, 1.0), (0, 1.0)):
        g = gradients[:rows]
        norms = g.norm(dim=1, keepdim=True)
        _same(f"{rows} gradients (the first is zero), max_grad_norm = {bound}", _ask(f, g, bound),
              torch.where(norms > bound, g * bound / norms.clamp_min(1e-12), g),
              "each row by its OWN norm, before any averaging, and short rows stay as they are", {
                  "a zero gradient divided by its norm is NaN": g / norms * norms.clamp(max=bound),
                  "gradients shorter than the bound must not be lengthened": g * bound / norms.clamp_min(1e-12)})


@_exercise("noisy_mean")
def check_noisy_mean(f: Callable) -> bool:
    """f(clipped [B, P], noise_multiplier, max_grad_norm, expected_batch_size, rng) -> (sum + noise) / expected size, [P]."""
    clipped = torch.randn(5, 40_000, generator=_seeded(7)) / 200
    for case, rows, expected in (("5 samples drawn", 5, 8), ("5 samples drawn", 5, 2), ("an empty batch", 0, 8)):
        _same_update(f"{case}, {expected} expected", lambda *settings, rows=rows: _ask(f, clipped[:rows], *settings),
                     clipped[:rows].sum(0), rows, expected)


@_exercise("selective")
def check_selective(f: Callable) -> bool:
    """f(gradients [B, P], protected [B], noise_multiplier, max_grad_norm, expected_batch_size, rng) -> one update [P]."""
    gradients = torch.randn(6, 40_000, generator=_seeded(9)) * torch.tensor([1, 1, 0.002, 0, 1, 1])[:, None]
    two = torch.tensor([True, False, True, False, False, False])
    cases = {"two of six protected": (gradients, two), "nobody drawn is protected": (gradients, two & False),
             "all drawn are protected": (gradients, two | True), "an empty batch": (gradients[:0], two[:0])}
    for case, (g, who) in cases.items():
        short = g * (1.5 / g.norm(dim=1).clamp_min(1.5))[:, None]
        _same_update(case, lambda *settings, g=g, who=who: _ask(f, g, who, *settings),
                     torch.where(who[:, None], short, g).sum(0), len(g), 8, {
                         "only the protected are clipped": short.sum(0) / 8, "the protected must be clipped": g.sum(0) / 8,
                         "the unprotected count too, as they are": short[who].sum(0) / 8})


@_exercise("until")
def check_until(f: Callable) -> bool:
    """f(score [N], power) -> 1 - rank ** power, the rank from 0 (lowest score) to 1 (highest), ties to the lower index."""
    for numbers, power in (([0.3, 0.1, 0.9, 0.2], 4.0), ([1.0, 1.0, 0.0, 2.0, 1.0], 1.0), (range(9), 2.0)):
        score = np.array(numbers, dtype=float)
        wanted = release_schedule(score, power=power).numpy()
        turned = release_schedule(-score, power=power).numpy()
        steps = np.argsort(np.argsort(score, kind="stable"), kind="stable")
        _same(f"score = {score.tolist()}, power = {power}", _ask(f, score, power), wanted,
              "rank 0 is the LOWEST risk and stays to the end, rank 1 the highest and leaves at once", {
                  "the order is turned, the riskiest leave first": turned,
                  "the highest rank is 1, divide by N - 1": 1 - (steps / len(score)) ** power,
                  "use the rank, not the score": 1 - score**power})


@_exercise("n_fgsm")
def check_n_fgsm(f: Callable) -> bool:
    """f(net, x, y, eps, noise) -> x + noise + eps * sign(gradient there), inside [0, 1] but not inside the ball."""
    net = MLP(hidden=(16,)).build(models=1, shape=(1, 4, 4), classes=3, seeds=(0,))
    x, y = torch.rand(12, 1, 4, 4, generator=_seeded(0)), torch.randint(0, 3, (12,), generator=_seeded(1))
    for eps in (0.03, 0.2):
        noise = (2 * torch.rand(x.shape, generator=_seeded(2)) - 1) * 2 * eps

        plain, wanted = attacks.FGSM(eps)(net, x, y), _one_step(net, x + noise, y, eps)
        _same(f"eps = {eps}", _ask(f, net, x, y, eps, noise), wanted, "take the gradient at x + noise, and step from there", {
            "no projection: the image may leave the ball around x": (x + (wanted - x).clamp(-eps, eps)).clamp(0, 1),
            "the noise is the start, not an addition to the clean image's step": (plain + noise).clamp(0, 1),
            "this forgets the noise": plain})


@_exercise("cost")
def check_cost(f: Callable) -> bool:
    """f(attack_steps) -> passes an image that one PGD training step costs; a backward through inputs counts as one."""
    for steps in (0, 1, 3, 10):
        _same(f"attack_steps = {steps}", _ask(f, steps), 2 * steps + 3, "an attack step is a forward and an input backward", {
            "an attack needs no gradient of the weights": 3 * steps + 3,
            "each attack step goes forward and backward": steps + 3,
            "training goes forward, and backward through inputs AND weights": 2 * steps + 2})


@_exercise("finest")
def check_finest(f: Callable) -> bool:
    """f(non_members, rates) -> the smallest of the rates at which at least five non-members are false positives."""
    rates = (0.1, 0.05, 0.01, 0.001)
    for count in (50, 100, 600, 5_000, 30_000):
        fine = [rate for rate in rates if rate * count >= 5]
        _same(f"{count} non-members, rates {rates}", _ask(f, count, rates), min(fine), "count alarms: rate x non-members", {
            "one false positive is an anecdote, ask for five": min(rate for rate in rates if rate * count >= 1),
            "the smallest rate that has enough, not the largest": max(fine)})


def _one_step(net, start: torch.Tensor, y: torch.Tensor, eps: float) -> torch.Tensor:
    z = start.clone().requires_grad_()
    with attacks.frozen(net):
        (slope,) = torch.autograd.grad(attacks.cross_entropy(net(z), y).sum(), z)
    return (z.detach() + eps * slope.sign()).clamp(0, 1)


@_exercise("modified_entropy")
def check_modified_entropy(f: Callable) -> bool:
    """f(p [K], y) -> -(1 - p_y) log p_y - sum over k != y of p_k log(1 - p_k) (Song & Mittal 2021)."""
    for p, y in (([0.7, 0.2, 0.1], 0), ([0.7, 0.2, 0.1], 1), ([0.5, 0.5], 0), ([0.1, 0.2, 0.3, 0.4], 3)):
        p = np.array(p)
        others = np.arange(len(p)) != y
        tail = (p * np.log(1 - p))[others].sum()
        _same(f"p = {p.tolist()}, y = {y}", _ask(f, p, y), -(1 - p[y]) * np.log(p[y]) - tail,
              "the right class counts (1 - p) log p, every other class p log(1 - p), and the sign is minus", {
                  "this is the plain entropy, which does not know the label": -(p * np.log(p)).sum(),
                  "the sum runs over the OTHER classes only": -(1 - p[y]) * np.log(p[y]) - (p * np.log(1 - p)).sum(),
                  "the sign is turned": (1 - p[y]) * np.log(p[y]) + tail,
                  "the right class is weighted with 1 - p_y, not with p_y": -p[y] * np.log(p[y]) - tail})


@_exercise("held_out")
def check_held_out(f: Callable) -> bool:
    """f(scores, member, new_scores, new_member) -> balanced accuracy on the new ones, the threshold chosen on the first.

    The threshold is the score with the best balanced accuracy of "member if score >= threshold"; of equally good ones the
    highest.
    """
    rng = np.random.default_rng(4)
    equal = np.array([1.0, 2.0, 3.0, 4.0]), np.array([False, True, False, True]), np.array([2.5, 2.5, 9.0]), np.arange(3) != 1
    cases = [equal]  # thresholds 2 and 4 are equally good
    for n, strength in ((60, 1.0), (200, 0.3), (40, 0.0)):
        member, new_member = (rng.random(n) < 0.4 for _ in range(2))
        scores, new_scores = (rng.normal(size=n).round(1) + strength * m for m in (member, new_member))
        cases.append((scores, member, new_scores, new_member))
    for scores, member, new_scores, new_member in cases:

        def accuracy(cut, s, m):
            return ((s[m] >= cut).mean() + (s[~m] < cut).mean()) / 2

        def best(s, m, accuracy=accuracy):
            cuts = np.unique(s)[::-1]
            return cuts[int(np.argmax([accuracy(c, s, m) for c in cuts]))]

        cut = best(scores, member)
        _same(f"{len(scores)} scores to choose on", _ask(f, scores, member, new_scores, new_member),
              accuracy(cut, new_scores, new_member), "choose the threshold on the first pair alone, then use it on the second", {
                  "the threshold was chosen on the scores that are judged: that flatters every attack":
                      accuracy(best(new_scores, new_member), new_scores, new_member),
                  "this judges the scores the threshold was chosen on": accuracy(cut, scores, member),
                  "members and non-members count equally: average the two rates, not the samples":
                      ((new_scores >= cut) == new_member).mean()})


@_exercise("loss_variance")
def check_loss_variance(f: Callable) -> bool:
    """f(losses [B], lam) -> mean + lam * unbiased variance, with a gradient; fewer than two losses add nothing."""
    for losses, lam in (([1.0, 2.0, 4.0], 0.2), ([0.5, 0.5], 1.0), ([3.0], 0.2), ([0.1, 5.0, 0.3, 0.2], 0.0)):
        mine, x, n = torch.tensor(losses, dtype=torch.float64, requires_grad=True), np.array(losses), len(losses)
        case, found, free = f"losses {losses}, lam = {lam}", f(mine, lam), max(n - 1, 1)
        _same(case, found, x.mean() + lam * ((x - x.mean()) ** 2).sum() / free, "mean + lam * variance", {
            "the divisor of the variance is n - 1": x.mean() + lam * x.var(),
            "this adds the standard deviation": x.mean() + lam * x.std(ddof=n > 1),
            "the variance of a single loss is NaN, so fewer than two must add nothing": np.nan})
        if not getattr(found, "requires_grad", False):
            raise WrongAnswer(f"{case}: expected a tensor with a gradient, got none; hint: no .item(), no .detach()")
        (slope,) = torch.autograd.grad(found, mine, allow_unused=True)
        _same(f"gradient for {case}", slope, 1 / n + 2 * lam * (x - x.mean()) / free, "the variance has a gradient too")


def _same_update(case: str, ask: Callable, total: torch.Tensor, drawn: int, expected: int, slips: dict | None = None) -> None:
    """WrongAnswer unless ask(sigma, bound, expected, rng) is (total + noise) / expected, judged by 40,000 numbers of noise:
    mean, standard deviation (known to 0.35 %) and kurtosis may be 5 standard errors off."""
    sigma, bound, std, n = 2.0, 1.5, 3.0, total.numel()
    _same(f"{case}, no noise", ask(0.0, bound, expected, _seeded(0)), total / expected,
          "divide the sum by the EXPECTED batch size, not by how many were drawn", slips)
    answers = [ask(sigma, bound, expected, rng) for rng in 2 * [_seeded(1)] + [_seeded(1)]]  # two steps, and the first again
    for answer in answers:  # their shape only
        _same(case, None if answer is None else np.zeros_like(_array(case, answer)), np.zeros(n), "one update [P]")
    first, second, again = (_array(case, answer) * expected - _array(case, total) for answer in answers)
    found = float(first.std())
    if not abs(found - std) <= 5 * std / np.sqrt(2 * n):  # "not <=", so that NaN is wrong too
        known = {"noise is added at EVERY step, whoever was drawn": 0, "multiply noise_multiplier by max_grad_norm": sigma,
                 "add the noise to the SUM, before dividing": std * expected, "add it once, not per sample": std * drawn**0.5}
        likely = [text for text, value in known.items() if abs(found - value) <= 0.02 * value + 1e-3] + ["noise on the sum, once"]
        raise WrongAnswer(f"{case}: expected noise of standard deviation {std} on the sum, got {found:.4g}; hint: {likely[0]}")
    mean, tails, hint = float(first.mean()), float(stats.kurtosis(first)), "use torch.randn(..., generator=rng)"
    if abs(mean) > 5 * std / np.sqrt(n) or abs(tails) > 5 * np.sqrt(24 / n):
        raise WrongAnswer(f"{case}: expected Gaussian noise, got mean {mean:.3g} and excess kurtosis {tails:.2g}; hint: {hint}")
    if not np.array_equal(first, again) or np.allclose(first, second, atol=1e-3):
        raise WrongAnswer(f"{case}: expected noise that follows rng, got noise that does not; hint: {hint}")


def _same(case: str, found, wanted, hint: str, slips: dict | None = None) -> None:
    """WrongAnswer unless both are equal. `slips` maps known mistakes to the answers that they lead to."""
    if found is None:
        raise WrongAnswer(f"{case}: expected an answer, got None; hint: does the function return its result?")
    a, b = _array(case, found), _array(case, wanted)
    if a.shape != b.shape:
        raise WrongAnswer(f"{case}: expected shape {list(b.shape)}, got {list(a.shape)}; hint: {hint}")
    close = partial(np.allclose, a, rtol=1e-5, atol=1e-5, equal_nan=True)  # no right answer has NaN, but a slip's may
    if not close(b):
        likely = [text for text, slip in (slips or {}).items() if close(_array(case, slip))] + [hint]
        worst = np.unravel_index(np.argmax(np.nan_to_num(np.abs(a - b), nan=np.inf)), b.shape)
        at = f" at entry {[int(i) for i in worst]}" if worst else ""
        raise WrongAnswer(f"{case}: expected {b[worst]:.5g}{at}, got {a[worst]:.5g}; hint: {likely[0]}")


def _array(case: str, value) -> np.ndarray:
    try:
        return np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value, dtype=np.float64)
    except (TypeError, ValueError):
        raise WrongAnswer(f"{case}: expected numbers, got {type(value).__name__}; hint: return an array or a number") from None


def _ask(f: Callable, *arguments):
    """The answer to copies, so that working in place cannot spoil the next case; a generator stays itself."""
    return f(*(a if isinstance(a, torch.Generator) else copy.deepcopy(a) for a in arguments))


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _is_stub(error: NotImplementedError) -> bool:
    """Whether a `raise` statement raised it: torch uses the same type for a wrong dtype, a bug that must be shown."""
    last = error.__traceback__
    while last.tb_next:
        last = last.tb_next
    return dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
