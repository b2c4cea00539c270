"""Inputs moved, within a small ball, to where a model errs.

An attack is a small frozen object; calling it moves images. It works on any `net` that maps images [B, C, H, W] in
[0, 1] to logits [B, K], also on M models at once (rows model-major).

>>> pgd = PGD(eps=0.1, steps=10)
>>> x_adv = pgd(net, x, y)                                # full strength on every row
>>> robust_accuracy(net, x, y, [pgd, FGSM(eps=0.1)])      # right only if NO attack succeeds  # doctest: +SKIP

Attacks always see the network in evaluation mode with frozen weights; the training flags come back as they were.
Sources: FGSM (Goodfellow et al. 2015), PGD (Madry et al. 2018), AutoAttack (Croce & Hein 2020).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from demem_lab.bytecode import code_of
from demem_lab.losses import Loss, cross_entropy, logit_slope
from demem_lab.losses import margin as margin  # so that all an attack needs is found here
from demem_lab.networks import how_many, settings
from demem_lab.store import Store, installed
from demem_lab.streams import Streams
from demem_lab.validate import choice, finite, images, integer, labels, shown

PIXELS = "give the attack radius in pixel units of [0, 1], for instance 8/255"


@dataclass(frozen=True)
class PGD:
    """Projected gradient ascent on the loss, inside the ball of radius `eps` (pixel units) and inside [0, 1].

    norm: "linf" (steps along the sign of the gradient) or "l2" (along the normalised gradient).
    step_size: by default 2.5 * eps / steps, so that the ball can be crossed. restarts: independent random starts; each
    row keeps its best (misclassified first, then highest loss).
    """

    eps: float
    steps: int = 10
    step_size: float | None = None
    norm: str = "linf"
    restarts: int = 1
    random_start: bool = True

    def __post_init__(self) -> None:
        linf = {"high": 1} if self.norm == "linf" else {}  # no two images are further apart
        finite("eps", self.eps, low=0, **linf, fix=PIXELS)
        integer("steps", self.steps, low=1)
        integer("restarts", self.restarts, low=1)
        choice("norm", self.norm, ("linf", "l2"))
        if self.restarts > 1 and not self.random_start:
            fix = "set random_start=True, or restarts=1"
            raise ValueError(f"{self.restarts} restarts without a random start repeat one attack; {fix}")
        if self.step_size is not None:
            finite("step_size", self.step_size, low=0)

    def __call__(
        self, net: nn.Module, x: Tensor, y: Tensor, *, rng: Streams | torch.Generator | None = None,
        loss: Loss = cross_entropy, start: Tensor | None = None,
    ) -> Tensor:
        """Moved images, shaped like x. `start` replaces the random start (then `rng` is not used).

        ValueError for pixels outside [0, 1], unless rng is a `Streams`: then it is training, whose data are known.
        """
        if not isinstance(rng, Streams) and start is None:
            images(x)
        with frozen(net):
            best = self._ascend(net, x, y, rng, loss, start)
            for r in range(1, self.restarts):
                other = self._ascend(net, x, y, rng.fork(r) if isinstance(rng, Streams) else rng, loss, start)
                better = _worse_for_the_model(net, x, y, other, best, loss)
                best = torch.where(better[:, None, None, None], other, best)
        return best

    def _ascend(self, net, x, y, rng, loss, start) -> Tensor:
        if start is not None:
            z = start.clone()
        elif self.random_start:
            z = self.project(x + self._random_offset(x, rng), x)
        else:
            z = x.clone()
        replays = getattr(net, "replays", None)
        return self.climb(net, z, x, y, loss) if replays is None else replays.attack(self, net, z, x, y, loss)

    def climb(self, net, z: Tensor, x: Tensor, y: Tensor, loss: Loss) -> Tensor:
        """All steps from `z` (which is overwritten), without random numbers: weights are frozen, and nothing else changes."""
        step = 2.5 * self.eps / self.steps if self.step_size is None else self.step_size
        # the box around x and [0, 1] are one box, because x lies in [0, 1]: one clamp a step, in place
        low, high = (x - self.eps).clamp_min_(0), (x + self.eps).clamp_max_(1)
        with net.standing_still() if hasattr(net, "standing_still") else nullcontext():
            for _ in range(self.steps):
                slope = image_slope(net, z, y, loss)
                if self.norm == "linf":
                    z = z.add_(slope.sign(), alpha=step).clamp_(low, high)
                else:
                    z = self.project(z + step * _unit(slope), x)
        return z

    def project(self, z: Tensor, x: Tensor) -> Tensor:
        """The nearest point to z in the ball around x, then in [0, 1] (which never leaves the ball, as x is in [0, 1])."""
        if self.norm == "linf":
            z = torch.min(torch.max(z, x - self.eps), x + self.eps)
        else:
            offset = z - x
            z = x + offset * (self.eps / _norms(offset).clamp_min(1e-12)).clamp_max(1)
        return z.clamp_(0, 1)

    def _random_offset(self, x: Tensor, rng) -> Tensor:
        uniform = rng.uniform_rows(x) if isinstance(rng, Streams) else _rand(x, rng)
        if self.norm == "linf":
            return (2 * uniform - 1) * self.eps
        normal = rng.fork("direction").normal_rows(x) if isinstance(rng, Streams) else _rand(x, rng, normal=True)
        # uniform in the ball: a random direction, and a radius whose power of the dimension is uniform
        radius = uniform.flatten(1)[:, :1] ** (1 / x[0].numel())
        return normal / _norms(normal).clamp_min(1e-12) * radius[:, :, None, None] * self.eps


def FGSM(eps: float, *, norm: str = "linf") -> PGD:  # noqa: N802 - the attack's name
    """One full step from the clean image: PGD with a single step of size eps and no random start."""
    return PGD(eps=eps, steps=1, step_size=eps, norm=norm, random_start=False)


def RSFGSM(eps: float) -> PGD:  # noqa: N802 - the attack's name
    """One step of 1.25 * eps from a random start in the ball, for fast adversarial training (Wong, Rice & Kolter 2020)."""
    return PGD(eps=eps, steps=1, step_size=1.25 * eps)


@dataclass(frozen=True)
class NFGSM:
    """One step of eps from uniform noise of k * eps around the image, NOT projected back (de Jorge et al. 2022).

    For training only: the image leaves the ball of radius eps (by up to k * eps), which is what keeps single-step training
    from catastrophic overfitting. Noise and step are each clamped to [0, 1], as in the authors' public code; but
    the slope is taken in evaluation mode, as in all attacks here.
    """

    eps: float
    k: float = 2.0

    def __post_init__(self) -> None:
        finite("eps", self.eps, low=0, high=1, fix=PIXELS)
        finite("k", self.k, low=0)

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, *, rng=None, loss: Loss = cross_entropy) -> Tensor:
        """Moved images, shaped like x."""
        uniform = rng.uniform_rows(x) if isinstance(rng, Streams) else _rand(x, rng)
        z = (x + (2 * uniform - 1) * self.k * self.eps).clamp_(0, 1)
        with frozen(net):
            slope = image_slope(net, z, y, loss)
        return (z + self.eps * slope.sign()).clamp_(0, 1)


def image_slope(net: nn.Module, x: Tensor, y: Tensor, loss: Loss = cross_entropy) -> Tensor:
    """Gradient of the summed loss at the images, shaped like x. The network is taken as it is: freeze it first (`frozen`).

    Networks that can go backwards by hand do (MLPs: 1.1 to 1.6 times as fast); all others through autograd.
    """
    if hasattr(net, "by_hand"):
        slope = net.by_hand(x, lambda logits: logit_slope(loss, logits, y))
        if slope is not None:
            return slope
    x = x.detach().requires_grad_()
    return torch.autograd.grad(loss(net(x), y).sum(), x)[0]


@contextmanager
def frozen(net):
    """Evaluation mode, weights without gradients and nothing recorded; all of it restored on leaving."""
    if not isinstance(net, nn.Module):
        yield net
        return
    modules = [(module, module.training) for module in net.modules()]
    parameters = [(p, p.requires_grad) for p in net.parameters()]
    with net.recording(False) if hasattr(net, "recording") else nullcontext():
        try:
            net.eval()
            for p, _ in parameters:
                p.requires_grad_(False)
            with torch.enable_grad():
                yield net
        finally:
            for module, training in modules:
                module.training = training
            for p, needed in parameters:
                p.requires_grad_(needed)


def predictions(net: nn.Module, x: Tensor) -> Tensor:
    """Predicted labels [B] in evaluation mode; -1 for an answer with NaN in it, which argmax calls the largest."""
    with frozen(net), torch.no_grad():
        logits = net(x)
        return torch.where(logits.isnan().any(-1), -1, logits.argmax(-1))


def withstands(
    net, x: Tensor, y: Tensor, attacks: Sequence[PGD], *, rng=None, losses: Sequence[Loss] = (cross_entropy,)
) -> Tensor:
    """bool [B]: rows classified correctly as they are and after EVERY attack and restart (point-wise worst case).

    Each attack climbs each of `losses` in turn; with `margin` among them a saturated softmax cannot blind it. Rows already
    fooled are dropped from later attempts: they are decided. Only possible for a single model (M = 1).
    """
    _check_judges(attacks)
    if how_many(net) != 1:
        raise ValueError(f"robust accuracy with early exit takes one model at a time, got {net.models}")
    standing = predictions(net, x) == y
    _check_slopes(net, x[standing], y[standing], losses)
    for (number, attack), loss in itertools.product(enumerate(attacks), losses):
        for restart in range(attack.restarts):
            rows = standing.nonzero().flatten()
            if not len(rows):
                return standing
            one = replace(attack, restarts=1)
            own = rng.fork(f"{number}.{restart}") if isinstance(rng, Streams) else rng
            moved = one(net, x[rows], y[rows], rng=own, loss=loss)
            standing[rows] = predictions(net, moved) == y[rows]
    return standing


def _check_judges(attacks: Sequence[PGD]) -> None:
    if isinstance(attacks, str) or not isinstance(attacks, Sequence):
        raise ValueError(f"attacks must be a list, got {shown(attacks)}; write [PGD(...)]")
    if not attacks:
        raise ValueError("robust accuracy needs at least one attack, got none; for clean accuracy compare predictions")
    for attack in attacks:
        if not isinstance(attack, PGD):
            raise ValueError(
                f"robust accuracy is judged by PGD, whose images stay within eps, got {shown(attack)}; use PGD(eps) (NFGSM "
                "leaves that ball: it is for training)"
            )


def _check_slopes(net, x: Tensor, y: Tensor, losses: Sequence[Loss]) -> None:
    """Warn where no attack that follows slopes can move: sign(NaN) is 0."""
    if hasattr(net, "by_hand") or not len(x):  # our networks have finite slopes wherever their answers are finite
        return
    with frozen(net):
        lost = max(int((~image_slope(net, x, y, loss).isfinite()).flatten(1).any(1).sum()) for loss in losses)
    if lost:
        warnings.warn(
            f"{lost} of {len(x)} images that are classified correctly have a slope of NaN, so attacks that follow it stand "
            "still and robust accuracy means nothing there; mend the network (a root of 0, for instance), or ask AutoAttack",
            stacklevel=4,
        )


def robust_accuracy(
    net, x: Tensor, y: Tensor, attacks: Sequence[PGD], *, rng=None, losses: Sequence[Loss] = (cross_entropy,)
) -> float:
    """Fraction of images that `withstands` finds standing. ValueError for pixels outside [0, 1] or labels out of range."""
    check_query(net, x, y)
    return withstands(net, x, y, attacks, rng=rng, losses=losses).double().mean().item()


def autoattack(
    net, x: Tensor, y: Tensor, *, eps: float, norm: str = "linf", batch_size: int = 64, store: Store | None = None
) -> Tensor:
    """AutoAttack (standard: APGD-CE, APGD-T, FAB-T, Square) through pyautoattack; moved images [B, C, H, W].

    The honest judge: parameter-free, stronger than any single PGD. store: where what it found is kept, under the module's
    weights and the images: it takes long, and is always the same. Raises ImportError with the fix when the optional
    package is missing, ValueError when there are fewer than 4 classes (its targeted attacks need them).
    """
    check_query(net, x, y)
    choice("norm", norm, ("linf", "l2"))
    finite("eps", eps, low=0, **({"high": 1} if norm == "linf" else {}), fix=PIXELS)
    if store is not None and isinstance(net, nn.Module):
        config = {"weights": dict(net.state_dict()), "network": f"{net}", "settings": settings(net)}
        config |= {"code": code_of(*{type(part) for part in net.modules()}), "judge": installed("pyautoattack")}
        config |= {"x": x, "y": y, "eps": eps, "norm": norm}

        def compute():
            return {"moved": autoattack(net, x, y, eps=eps, norm=norm, batch_size=batch_size).cpu().numpy()}

        kept = store.compute("autoattack", config, compute, modules=("losses", "attacks", "networks", "models", "layers"))
        return torch.from_numpy(kept.arrays["moved"]).to(x)
    try:
        from pyautoattack import AutoAttack
    except ImportError:
        fix = "install it with: pip install 'demem-lab[attacks]'"
        raise ImportError(f"AutoAttack needs the package pyautoattack; {fix}") from None
    with frozen(net):
        classes = net(x[:1]).shape[-1]
        if classes < 4:
            raise ValueError(f"AutoAttack's targeted attacks need at least 4 classes, got {classes}; use PGD with restarts")
        judge = AutoAttack(
            model=net, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, version="standard", device=str(x.device), seed=0
        )
        # as many as it has wrong classes; the standard's nine fail where there are fewer
        judge.apgd_targeted.n_target_classes = judge.fab.n_target_classes = min(9, classes - 1)
        return judge.run_standard_evaluation(x, y, batch_size=batch_size)[0].detach()


def check_query(net, x: Tensor, y: Tensor) -> None:
    """ValueError unless images, labels and the network's number of classes belong together."""
    images(x)
    with frozen(net), torch.no_grad():
        classes = net(x[:1].expand(how_many(net), *x.shape[1:])).shape[-1]
    labels(y, n=len(x), classes=classes)


def _norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)[:, None, None, None]


def _unit(slope: Tensor) -> Tensor:
    """[B, C, H, W] scaled to length 1, however short (squares of 1e-23 are 0 in float32); nothing where it is 0 or NaN."""
    slope = slope.nan_to_num(0, 0, 0)
    slope = slope / slope.abs().amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
    return slope / _norms(slope).clamp_min(1e-12)


def _rand(x: Tensor, generator, *, normal: bool = False) -> Tensor:
    draw = torch.randn if normal else torch.rand
    return draw(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def _worse_for_the_model(net, x, y, candidate, current, loss) -> Tensor:
    """bool [B]: rows where `candidate` beats `current`: misclassified first, then higher loss."""
    with torch.no_grad():
        rank = []
        for z in (candidate, current):
            logits = net(z)
            rank.append((logits.argmax(-1) != y, loss(logits, y)))
    (fooled, high), (was_fooled, was_high) = rank
    return (fooled & ~was_fooled) | ((fooled == was_fooled) & (high > was_high))


