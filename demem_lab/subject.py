"""Somebody's torch model: weights loaded without running anything, and what it answers about its own data and others.

>>> net = load_weights(Net(), "weights.safetensors")                                                    # doctest: +SKIP
>>> found = ask(net, members=(x, y), non_members=(x2, y2), eps=8 / 255)                                 # doctest: +SKIP
>>> sorted(found.arrays)[:2]                                                                            # doctest: +SKIP
['member_adv_logits', 'member_inputs']
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from demem_lab import farm
from demem_lab.attacks import NFGSM, PGD, autoattack, check_query, cross_entropy, frozen, margin, predictions, withstands
from demem_lab.networks import how_many
from demem_lab.outputs import ROUNDING, listed
from demem_lab.signals import label_robustness
from demem_lab.validate import instance, integer, shown

BATCH = 256
LEVELS = (0.25, 0.5, 0.75)  # of the radius, besides the radius itself: for who withstands how much


@dataclass(frozen=True)
class Asked:
    """What a model answered, by the names of `outputs`; its robustness; and how it was asked."""

    arrays: dict[str, np.ndarray]
    robustness: dict[str, float]
    graded: np.ndarray | None  # [N], members first: share of the radii up to eps that a sample withstands
    how: dict[str, str]
    warnings: tuple[str, ...] = ()


def load_weights(net, path: str | Path):
    """Load parameters into a torch.nn.Module, from .safetensors or a checkpoint of plain tensors; never runs a pickle.

    A checkpoint may hold them under state_dict, model_state_dict or model, and named as DataParallel or torch.compile name
    them. ValueError for anything else, or for names and shapes that do not fit.
    """
    path = Path(path)
    try:
        state = _checkpoint(path)
        for key in ("state_dict", "model_state_dict", "model"):
            if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
                state = state[key]
        if not isinstance(state, Mapping):
            raise ValueError(f"it holds a {type(state).__name__}: save net.state_dict()")
        own = net.state_dict()
        for prefix in ("module.", "_orig_mod."):
            if state and all(str(name).startswith(prefix) for name in state) and not any(n.startswith(prefix) for n in own):
                state = {name.removeprefix(prefix): value for name, value in state.items()}
        try:
            net.load_state_dict(state)
        except Exception as error:
            raise ValueError(_misfits(own, state) or _said(error)) from None
    except FileNotFoundError:
        raise
    except Exception as error:  # torch and safetensors raise a dozen kinds; all mean that this file will not do
        why = str(error) if type(error) is ValueError else _said(error)
        raise ValueError(f"{path} does not hold weights for this network, as safetensors or plain tensors ({why})") from None
    return net


def _checkpoint(path: Path):
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        if type(error).__name__ == "UnpicklingError":  # of a module that is not imported here, on purpose
            whole = "it holds a whole model or other objects, and reading those can run code: save net.state_dict()"
            raise ValueError(whole if "GLOBAL" in str(error) else "it is damaged or no checkpoint of torch") from None
        raise


def _misfits(own: Mapping, state: Mapping) -> str:
    """The names that are missing, that nobody knows, and that have another shape."""
    both = [name for name in own if name in state]
    shapes = [(n, list(getattr(state[n], "shape", ())), list(own[n].shape)) for n in both if hasattr(own[n], "shape")]
    found = {
        "missing": [name for name in own if name not in state], "unexpected": [name for name in state if name not in own],
        "of another shape": [f"{name} {got} for {wanted}" for name, got, wanted in shapes if got != wanted],
    }
    return "; ".join(f"{what}: {listed(names, most=4)}" for what, names in found.items() if names)


def _said(error: Exception) -> str:
    return listed(str(error).split("\n"), most=3) if str(error).strip() else type(error).__name__


def ask(
    net, *, members, non_members, eps: float | None = None, attack=None, autoattack_on: int = 0, device: str = "auto"
) -> Asked:
    """The outputs of one torch model on members=(images, labels) and on others, clean and, with `eps` or `attack`, attacked.

    net maps [B, C, H, W] in [0, 1] to logits [B, K]; it is asked in evaluation mode, and its mode and device come back as
    they were. attack: one of `attacks`, whose random numbers are the same every time, or any function (net, x, y) -> images.
    autoattack_on: AutoAttack is run on so many non-members. Network and attack get copies of the images. Raises ValueError for
    data that do not fit, for a network that answers with probabilities, and for one without a slope that an attack needs.
    """
    sides = {"member": _pair("members", members), "nonmember": _pair("non_members", non_members)}
    if attack is not None:
        instance("attack", attack, having="__call__", example="PGD(0.03)")
    integer("autoattack", autoattack_on, low=0, high=len(sides["nonmember"][0]), fix="it is a number of non-members")
    if autoattack_on and eps is None:
        raise ValueError("AutoAttack needs a radius: give eps in pixel units of [0, 1]")
    attack = attack or (PGD(eps, 10, random_start=False) if eps is not None else None)
    home, where = next((p.device for p in net.parameters()), torch.device("cpu")), farm.device(device)
    try:
        with _on_copies(net.to(where)):
            asked = _answering(net, sides["member"][0], where)
            if isinstance(attack, (PGD, NFGSM)) or autoattack_on:
                _check_slope(asked, sides["member"][0], where)
            return _asked(asked, sides, eps, attack, autoattack_on, where)
    finally:
        net.to(home)


@contextmanager
def _on_copies(net):
    """Inside, a stranger's network meets copies: one that normalises in place would change the caller's images.

    And an attack's, whose slope is then no longer to be had: torch calls them leaves, which must not change.
    """
    if hasattr(net, "recording"):  # one of this package, which changes nothing
        yield
        return
    copied = net.register_forward_pre_hook(lambda _, given: tuple(x.clone() if torch.is_tensor(x) else x for x in given))
    try:
        yield
    finally:
        copied.remove()


class _InPrecision(torch.nn.Module):
    """A network of another precision, for images in float32: an attack's small steps would be lost in half precision."""

    def __init__(self, net, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.dtype = net, dtype

    def forward(self, x):
        return self.net(x.to(self.dtype)).float()


def _pair(name: str, given) -> tuple[torch.Tensor, torch.Tensor]:
    """(images float32 [N, C, H, W], labels int64 [N]) from a pair of arrays; ValueError for anything else."""
    if given is None or (isinstance(given, (tuple, list)) and any(part is None for part in given)):
        raise ValueError("a model alone cannot be audited: give members=(images, labels) and non_members=(images, labels)")
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise ValueError(
            f"{name} must be a pair of arrays (images, labels), got {shown(given)}; of a Dataset take x, y = zip(*data), and "
            "then (torch.stack(x), torch.tensor(y))"
        )
    try:
        x, y = (torch.as_tensor(part).detach() for part in given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a pair of arrays (images, labels), which these are not ({_said(error)})") from None
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(
            f"{name} must be images [N, C, H, W] with no empty axis, got {list(x.shape)}; add the missing axes, and of a model "
            "of tables or text give arrays of outputs instead (member_logits, member_labels, ...)"
        )
    if x.is_floating_point() and (x.min() < 0 or x.max() > 1):
        raise ValueError(
            f"the images of {name} must lie in [0, 1], got values from {x.min():g} to {x.max():g}; put the normalisation inside "
            "the network, nn.Sequential(Normalize(mean, std), net), and give the images as they are before it"
        )
    whole = not y.is_floating_point() and not y.is_complex()
    return x.float() if x.is_floating_point() else x, y.long() if whole else y


def _answering(net, x: torch.Tensor, where):
    """The network, taking float32; ValueError unless it answers one such image with a row of logits."""
    kind = next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)
    asked = x[:1].to(where).expand(how_many(net), *x.shape[1:])
    try:
        with frozen(net), torch.no_grad():
            answer = net(asked.to(kind))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"the network does not answer images of shape {list(x.shape[1:])}: {_said(error)}") from error
    if not isinstance(answer, torch.Tensor):
        raise ValueError(
            f"the network must return a tensor of logits [B, K], got a {type(answer).__name__}; wrap it in one that returns the "
            "logits alone"
        )
    if answer.ndim != 2 or len(answer) != len(asked) or answer.shape[1] < 2:
        raise ValueError(
            f"the network must return logits [B, K] of at least 2 classes, got {list(answer.shape)} for one image; flatten its "
            "answer, or give arrays of outputs instead"
        )
    return net if kind == torch.float32 else _InPrecision(net, kind)


def _check_slope(net, x: torch.Tensor, where) -> None:
    """ValueError unless the answers have a gradient at the images, which the attacks of this package climb."""
    with frozen(net):
        image = x[:1].to(where).expand(how_many(net), *x.shape[1:]).clone().requires_grad_()
        try:
            torch.autograd.grad(net(image).sum(), image)
        except RuntimeError as error:
            raise ValueError(
                f"the attack needs the gradient of the answers at the images, and this network has none ({_said(error)}); take "
                "torch.no_grad(), detach() and changes in place out of its forward pass, or give neither eps nor attack"
            ) from None


def _check_logits(answers: np.ndarray) -> None:
    if answers.min() >= -1e-6 and answers.max() <= 1 + 1e-6 and np.abs(answers.sum(-1, dtype=np.float64) - 1).max() < ROUNDING:
        raise ValueError(
            "the network answers with probabilities (all in [0, 1], rows sum to 1); leave out the softmax at its end, so that it "
            "returns logits"
        )


def _asked(net, sides: Mapping, eps, attack, autoattack_on: int, where) -> Asked:
    arrays, robustness, graded, how = {}, {}, [], {"query attack": repr(attack) if attack else "none"}
    still, total = 0, sum(len(x) for x, _ in sides.values())
    graders = [replace(attack, eps=level * attack.eps) for level in LEVELS] if isinstance(attack, PGD) else []
    judges = [attack, replace(attack, steps=2 * attack.steps, restarts=2, random_start=True)] if graders else []
    for side, (x, y) in sides.items():
        x, y = x.to(where), y.to(where)
        check_query(net, x, y)
        clean, moved, withstood = [], [], []
        random = torch.Generator(where).manual_seed(0)  # asked again, the model gives the same answers
        drawn = {"rng": random} if isinstance(attack, (PGD, NFGSM)) else {}
        for start in range(0, len(x), BATCH):
            part, label = x[start : start + BATCH], y[start : start + BATCH]
            clean.append(_logits(net, part))
            if not start:
                _check_logits(clean[0])
            if attack is not None:
                there = attack(net, part.clone(), label, **drawn)
                still += int((there == part).flatten(1).all(1).sum())
                moved.append(_logits(net, there))
                nearer = [_logits(net, grader(net, part, label, **drawn)) for grader in graders]
                graded.append(label_robustness([clean[-1], *nearer, moved[-1]], label.cpu()))
            if judges and side == "nonmember":
                rng = torch.Generator(where).manual_seed(0)
                # a saturated softmax blinds cross-entropy, the margin sees
                withstood.append(withstands(net, part, label, judges, rng=rng, losses=(cross_entropy, margin)).cpu())
        arrays |= {f"{side}_logits": np.concatenate(clean), f"{side}_labels": y.cpu().numpy(), f"{side}_inputs": x.cpu().numpy()}
        if moved:
            arrays[f"{side}_adv_logits"] = np.concatenate(moved)
        if withstood:
            robustness["non-members under the query attack and PGD with restarts"] = float(torch.cat(withstood).double().mean())
            how["PGD with restarts"] = f"{judges[1]}, on the cross-entropy and on the margin"
        if side == "nonmember" and autoattack_on:
            part, label = x[:autoattack_on], y[:autoattack_on]
            moved_far = autoattack(net, part, label, eps=eps)
            ok = (predictions(net, part) == label) & (predictions(net, moved_far) == label)
            robustness[f"AutoAttack, the first {autoattack_on} non-members"] = float(ok.double().mean())
            how["AutoAttack"] = f"standard version, Linf radius {eps:g}"
    # an attack that finds no slope, or none in reach, asks for the clean image again
    blind = graders and attack.eps > 0 and still > total / 100
    told = (
        f"the query attack left {still / total:.0%} of the images as they were, for want of a slope: its adversarial queries "
        "are clean ones there, and robust accuracy on them means nothing (gradient masking); believe the margin, or AutoAttack",
    ) if blind else ()
    return Asked(arrays, robustness, np.concatenate(graded)[None] if graders else None, how, told)


def _logits(net, x) -> np.ndarray:
    with frozen(net), torch.no_grad():
        return net(x).float().cpu().numpy()
