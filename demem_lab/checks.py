"""The exercises: what each is asked, and the check that takes the learner's function.

>>> check_project(lambda z, x, eps: (x + (z - x).clamp(-eps, eps)).clamp(0, 1))
passed: project is right on all inputs
True

`grading` says how an answer is judged, `solutions` holds the trusted functions, `mistakes` the planted wrong ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy import stats

from demem_lab import solutions
from demem_lab.grading import Case, Exercise, as_array, call, case
from demem_lab.mistakes import MISTAKES
from demem_lab.models import MLP


def _exercise(solution: Callable, hint: str) -> Callable[[Callable[[], Iterator[Case]]], Exercise]:
    """Makes an exercise of a function that yields its cases."""
    return lambda cases: Exercise(solution, lambda: list(cases()), hint, MISTAKES[solution.__name__])


@_exercise(solutions.gap, "take the gap of each model first, then average the gaps")
def check_gap() -> Iterator[Case]:
    """Models of different sizes, so that pooling shows."""
    rng = np.random.default_rng(0)
    for models, n in ((4, 50), (1, 10), (3, 200)):
        member = rng.random((models, n)) < np.linspace(0.2, 0.8, models)[:, None]
        member[:, 0], member[:, 1] = True, False
        right = rng.random((models, n)) < np.where(member, np.linspace(0.6, 1, models)[:, None], 0.5)
        yield case(f"{models} models with unequal numbers of members", right, member)


@_exercise(solutions.interval, "mean -+ t quantile (0.975, n - 1) * standard deviation (ddof=1) / sqrt(n)")
def check_interval() -> Iterator[Case]:
    """Two values, where Student's t matters most, and more."""
    for values in (np.array([0.1, 0.2]), np.array([0.05, 0.07, 0.1]), np.linspace(-1, 2, 9)):
        yield case(f"values {values.round(3).tolist()}", values)


@_exercise(solutions.fgsm, "move by eps along the SIGN of the gradient of the loss for the labels y, then clamp to [0, 1]")
def check_fgsm() -> Iterator[Case]:
    """The edge of the range, where the clamp matters; black has no gradient here, and sign(0) = 0 moves nothing."""
    net, x, y = _net_and_images()
    for eps in (0.0, 0.03, 0.3):
        yield case(f"eps = {eps}", net, x, y, eps)


@_exercise(solutions.project, "clamp z - x to [-eps, eps], add x, then clamp to [0, 1]")
def check_project() -> Iterator[Case]:
    """Points inside the ball and outside, near 0 and near 1; a ball larger than the range."""
    x = torch.rand(3, 1, 4, 4, generator=_seeded(0))
    x[0, 0, 0], x[0, 0, 1] = 0, 1
    z = x + torch.randn(3, 1, 4, 4, generator=_seeded(1)) * 0.3
    for eps in (0.1, 0.0, 2.0):
        yield case(f"eps = {eps}", z, x, eps)


@_exercise(solutions.robust, "an image counts only if it is right as it is AND after every attack")
def check_robust() -> Iterator[Case]:
    """Attacks that fool different images; none; all."""
    rng = np.random.default_rng(1)
    for count, clean, share in ((2, 0.8, 0.7), (1, 0.8, 0.7), (5, 0.8, 0.9), (2, 1.0, 1.0), (2, 1.0, 0.0)):
        yield case(f"{count} attacks on 40 images", rng.random(40) < clean, rng.random((count, 40)) < share)


@_exercise(solutions.tpr_at_fpr, "the threshold comes from the non-members alone, at most fpr of THEM may lie above it")
def check_tpr_at_fpr() -> Iterator[Case]:
    """Scores with ties, very few non-members, no and all false positives."""
    rng = np.random.default_rng(2)
    member = rng.permutation(np.arange(300) < 100)
    smooth = rng.normal(member * 1.0, 1.0)
    few = np.array([True, True, True, False, False, False])  # 0.3 lies below an interpolated threshold and above the next score
    cases = {"distinct scores": (smooth, member), "scores with ties": (smooth.round(), member),
             "3 non-members": (np.array([0.8, 1.0, 0.3, 0.1, 0.2, 0.9]), few)}
    for fpr in (0.1, 0.01, 0.25, 0.0, 1.0):  # at 0.1 a share of everybody is more than one score away
        for name, (scores, who) in cases.items():
            yield case(f"{name}, fpr = {fpr}", scores, who, fpr)
    lowest = np.array([0.0, 1.0, 2.0]), np.array([True, False, True])
    yield case("a member below the only non-member, fpr = 1.0", *lowest, 1.0, hint="with fpr = 1 everybody may be accused")


@_exercise(
    solutions.log_ratio, "log density under the members' normal minus that under the others', each with its own mean and std"
)
def check_lira() -> Iterator[Case]:
    """Near both distributions, and so far out that densities underflow."""
    rng = np.random.default_rng(3)
    for value in (-2.0, 0.0, 3.5, 90.0):
        yield case(f"value {value}", value, rng.normal(2, 1, 8), rng.normal(-1, 2, 6))


@_exercise(solutions.shadow_split, "leave out the target and the model that had exactly the other half, then split by the image")
def check_shadow_split() -> Iterator[Case]:
    """Complementary halves as in the notebooks; images that the target had, and that it did not."""
    half = np.random.default_rng(6).random((4, 9)) < 0.5
    members = np.concatenate([half, ~half])
    for target, image in ((0, 3), (5, 3), (2, 8)):
        form = "two arrays of the same length [models]"
        yield case(f"target {target}, image {image}", members, target, image, form=form)


@_exercise(solutions.memorization, "mean over the models WITH the sample minus mean over those without (axis 0 is models)")
def check_memorization() -> Iterator[Case]:
    """Models that had few of the samples; answers that are 0 or 1."""
    rng = np.random.default_rng(4)
    for models, n in ((9, 30), (2, 5), (40, 40)):
        member = rng.random((models, n)) < 0.3
        member[0], member[1] = True, False
        yield case(f"{models} models, {n} samples", rng.random((models, n)).round(0 if models == 40 else 3), member)


@_exercise(solutions.top, "a bool mask of exactly round(fraction * N) samples, highest scores first")
def check_top() -> Iterator[Case]:
    """Scores with and without ties; numbers of samples that round up and down; nobody and everybody."""
    rng = np.random.default_rng(5)
    ties = "among equal scores the LOWER index goes first, so sort -score with kind='stable'"
    for score in (rng.normal(size=47), rng.integers(0, 4, 47).astype(float)):
        for fraction in (0.1, 0.33, 0.45, 0.0, 1.0):
            name = f"47 samples with {len(set(score))} different scores, fraction {fraction}"
            yield Case(f"{name}, whichever of equal scores", _chosen(score, fraction))
            yield case(name, score, fraction, hint=ties)
            yield Case(f"{name}, kind of answer", _kind(score, fraction), wanted="bool",
                       hint="start from np.zeros(len(score), dtype=bool)")


@_exercise(solutions.clip, "each row by its OWN norm, before any averaging, and short rows stay as they are")
def check_clip() -> Iterator[Case]:
    """Rows of very different length, one of zeros; bounds above all and below all; nobody drawn."""
    gradients = torch.randn(6, 20, generator=_seeded(6)) * torch.tensor([0, 0.01, 0.1, 1, 5, 50])[:, None]
    for rows, bound in ((6, 0.1), (6, 1.0), (6, 30.0), (1, 1.0), (0, 1.0)):
        yield case(f"{rows} gradients (the first is zero), max_grad_norm = {bound}", gradients[:rows], bound)


@_exercise(solutions.noisy_mean, "sum, add noise once, divide by the expected size")
def check_noisy_mean() -> Iterator[Case]:
    """More and fewer drawn than expected, and nobody."""
    clipped = torch.randn(5, 40_000, generator=_seeded(7)) / 200
    for name, rows, expected in (("5 samples drawn", 5, 8), ("5 samples drawn", 5, 2), ("an empty batch", 0, 8)):
        drawn = clipped[:rows]
        yield from _updates(f"{name}, {expected} expected", (drawn,), drawn.sum(0), expected)


@_exercise(solutions.selective, "clip with a factor that is 1 for the unprotected; the noise does not look at protected")
def check_selective() -> Iterator[Case]:
    """Some, one, none and all protected; gradients that are all short; nobody drawn."""
    gradients = torch.randn(6, 40_000, generator=_seeded(9)) * torch.tensor([1, 1, 0.002, 0, 1, 1])[:, None]
    two = torch.tensor([True, False, True, False, False, False])
    cases = {"two of six protected": (gradients, two), "nobody drawn is protected": (gradients, two & False),
             "all drawn are protected": (gradients, two | True), "an empty batch": (gradients[:0], two[:0]),
             "one of six protected": (gradients, two & (torch.arange(6) == 0)), "short gradients": (gradients / 400, two)}
    for name, (g, who) in cases.items():
        short = g * (1.5 / g.norm(dim=1).clamp_min(1.5))[:, None]
        yield from _updates(name, (g, who), torch.where(who[:, None], short, g).sum(0), 8)


@_exercise(solutions.loss_variance, "mean + lam * variance")
def check_loss_variance() -> Iterator[Case]:
    """Values and gradients; equal losses; a single one; lam = 0."""
    for losses, lam in (([1.0, 2.0, 4.0], 0.2), ([0.5, 0.5], 1.0), ([3.0], 0.2), ([0.1, 5.0, 0.3, 0.2], 0.0)):
        name = f"losses {losses}, lam = {lam}"
        x = torch.tensor(losses, dtype=torch.float64)
        yield Case(name, lambda f, x=x, lam=lam: f(x.clone().requires_grad_(), lam))
        yield Case(f"gradient for {name}", _has_gradient(x, lam), wanted="a tensor with a gradient",
                   hint="no .item(), no .detach()")
        yield Case(f"gradient for {name}", _gradient(x, lam), hint="mean and variance both have a gradient")


@_exercise(solutions.until, "rank 0 is the LOWEST risk and stays to the end, rank 1 the highest and leaves at once")
def check_until() -> Iterator[Case]:
    """Scores in no order, with ties, and in order."""
    ties = "every sample has a rank of its own, ties by index: sort with kind='stable'"
    for numbers, power, hint in (
        ([0.3, 0.1, 0.9, 0.2, 0.5], 4.0, ""), ([1.0, 1.0, 0.0, 2.0, 1.0], 1.0, ties), (range(9), 2.0, "")
    ):
        score = np.array(numbers, dtype=float)
        yield case(f"score = {score.tolist()}, power = {power}", score, power, hint=hint)


@_exercise(solutions.n_fgsm, "take the gradient at x + noise, and step from there")
def check_n_fgsm() -> Iterator[Case]:
    """Noise that leaves the ball, as it does in N-FGSM."""
    net, x, y = _net_and_images()
    for eps in (0.03, 0.2):
        noise = (2 * torch.rand(x.shape, generator=_seeded(2)) - 1) * 2 * eps
        yield case(f"eps = {eps}", net, x, y, eps, noise)


@_exercise(solutions.modified_entropy, "(1 - p) log p for the right class, p log(1 - p) for every other, and the sign is minus")
def check_modified_entropy() -> Iterator[Case]:
    """Right, wrong and undecided answers (Song & Mittal 2021)."""
    for p, y in (([0.7, 0.2, 0.1], 0), ([0.7, 0.2, 0.1], 1), ([0.5, 0.5], 0), ([0.1, 0.2, 0.3, 0.4], 3)):
        yield case(f"p = {p}, y = {y}", np.array(p), y)


@_exercise(solutions.held_out, "choose the threshold on the first pair alone, then use it on the second")
def check_held_out() -> Iterator[Case]:
    """Two equally good thresholds, and new scores between them and the next; a strong, a weak and no signal."""
    rng = np.random.default_rng(4)
    for n, strength in ((60, 1.0), (200, 0.3), (40, 0.0)):
        member, new_member = (rng.random(n) < 0.4 for _ in range(2))
        scores, new_scores = (rng.normal(size=n).round(1) + strength * m for m in (member, new_member))
        yield case(f"{n} scores to choose on", scores, member, new_scores, new_member)
    equal = np.array([1.0, 2.0, 3.0, 4.0]), np.array([False, True, False, True])
    yield case("4 scores, thresholds 2 and 4 equally good", *equal, np.array([2.5, 3.7, 9.0]), np.arange(3) != 1)


@_exercise(solutions.cost, "an attack step is a forward and an input backward")
def check_cost() -> Iterator[Case]:
    """The authors' attack, none, and long ones."""
    for steps in (10, 0, 1, 3):
        yield case(f"attack_steps = {steps}", steps)


@_exercise(solutions.finest, "count alarms: rate x non-members")
def check_finest() -> Iterator[Case]:
    """From few non-members to the authors' 30,000."""
    rates = (0.1, 0.05, 0.01, 0.001)
    for count in (600, 100, 50, 5_000, 30_000, 460):  # 460 at 1 % are 4.6, and not five
        yield case(f"{count} non-members, rates {rates}", count, rates)


EXERCISES = {name: found for name, found in list(globals().items()) if isinstance(found, Exercise)}


def _updates(name: str, drawn: tuple, total: torch.Tensor, expected: int) -> Iterator[Case]:
    """(total + noise) / expected is wanted, judged by 40,000 numbers of noise: size (known to 0.35 %), mean and
    kurtosis may be 5 standard errors off."""
    sigma, bound, std, n = 2.0, 1.5, 3.0, total.numel()

    def answer(f: Callable, sigma: float = sigma, rng: torch.Generator | None = None):
        return call(f, *drawn, sigma, bound, expected, rng or _seeded(1))

    def noise(f: Callable, rng: torch.Generator | None = None) -> np.ndarray:
        return as_array(answer(f, rng=rng), name) * expected - total.double().numpy()

    def follows(f: Callable) -> str:
        rng = _seeded(1)
        first, second, again = noise(f, rng), noise(f, rng), noise(f)
        good = np.array_equal(first, again) and not np.allclose(first, second, atol=1e-3)
        return "noise that follows rng" if good else "noise that does not"

    def shape(f: Callable):
        found = answer(f)
        return None if found is None else np.zeros(np.shape(found))

    yield Case(f"{name}, no noise", lambda f: answer(f, 0.0), wanted=total / expected)
    yield Case(name, shape, wanted=np.zeros(n), hint="one update [P]")
    yield Case(f"{name}, size (root mean square) and spread (standard deviation) of the noise on the sum",
               lambda f: [np.sqrt((noise(f) ** 2).mean()), noise(f).std()], wanted=[std, std],
               tolerance=5 / np.sqrt(2 * n), hint="noise on the sum, once")
    gaussian = "Gaussian noise is torch.randn(..., generator=rng)"
    yield Case(f"{name}, mean of the noise", lambda f: noise(f).mean(), wanted=0.0, tolerance=5 * std / np.sqrt(n), hint=gaussian)
    yield Case(f"{name}, excess kurtosis of the noise", lambda f: stats.kurtosis(noise(f)), wanted=0.0,
               tolerance=5 * np.sqrt(24 / n), hint=gaussian)
    yield Case(name, follows, wanted="noise that follows rng", hint=gaussian)


def _chosen(score: np.ndarray, fraction: float) -> Callable:
    """What is chosen, forgiving the order of ties; of numbers of samples (no mask) only how many, in whatever order."""
    right = solutions.top(score, fraction)

    def ask(f: Callable):
        found = call(f, score, fraction)
        try:
            given = np.asarray(found)
        except ValueError:  # lists of different lengths
            return found
        if given.dtype.kind in "iu" and given.ndim == 1 and len(given) != len(score):
            return np.zeros(len(given))
        mask = given == 1
        same = given.shape == score.shape and (mask | (given == 0)).all() and mask.sum() == right.sum()
        return right if same and np.array_equal(np.sort(score[mask]), np.sort(score[right])) else found

    return ask


def _kind(score: np.ndarray, fraction: float) -> Callable:
    return lambda f: np.asarray(call(f, score, fraction)).dtype.name


def _has_gradient(x: torch.Tensor, lam: float) -> Callable:
    def ask(f: Callable) -> str:
        mine = x.clone().requires_grad_()
        found = f(mine, lam)
        if not getattr(found, "requires_grad", False):
            return "none"
        reached = torch.autograd.grad(found.sum(), mine, allow_unused=True)[0] is not None
        return "a tensor with a gradient" if reached else "one whose gradient does not reach losses"

    return ask


def _gradient(x: torch.Tensor, lam: float) -> Callable:
    def ask(f: Callable):
        mine = x.clone().requires_grad_()
        return torch.autograd.grad(f(mine, lam), mine, allow_unused=True)[0]

    return ask


def _net_and_images() -> tuple[Callable, torch.Tensor, torch.Tensor]:
    net = MLP(hidden=(16,)).build(models=1, shape=(1, 4, 4), classes=3, seeds=(0,))
    x = torch.rand(12, 1, 4, 4, generator=_seeded(0))
    x[0], x[1] = 0, 1
    return net, x, torch.randint(0, 3, (12,), generator=_seeded(1))


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
