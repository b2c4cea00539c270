"""Somebody's torch model: weights loaded without running anything, and what it answers about its own data and others.

>>> net = load_weights(Net(), "weights.safetensors")                                                    # doctest: +SKIP
>>> found = ask(net, members=(x, y), non_members=(x2, y2), eps=8 / 255)                                 # doctest: +SKIP
>>> sorted(found.arrays)[:2]                                                                            # doctest: +SKIP
['member_adv_logits', 'member_inputs']
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from demem_lab import farm
from demem_lab.attacks import NFGSM, PGD, autoattack, check_query, cross_entropy, frozen, margin, predictions, withstands
from demem_lab.signals import label_robustness
from demem_lab.validate import instance, integer

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

    ValueError for anything else, or for names and shapes that do not fit.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, weights_only=True, map_location="cpu")
        net.load_state_dict(state.get("state_dict", state))
    except FileNotFoundError:
        raise
    except Exception as error:  # torch and safetensors raise a dozen kinds; all mean that this file will not do
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{path} does not hold weights for this network, as safetensors or plain tensors ({first})") from None
    return net


def ask(
    net, *, members, non_members, eps: float | None = None, attack=None, autoattack_on: int = 0, device: str = "auto"
) -> Asked:
    """The outputs of one torch model on members=(images, labels) and on others, clean and, with `eps` or `attack`, attacked.

    net maps [B, C, H, W] in [0, 1] to logits [B, K]; it is asked in evaluation mode, and its mode and device come back as
    they were. attack: one of `attacks`, whose random numbers are the same every time, or any function (net, x, y) -> images.
    autoattack_on: AutoAttack is run on so many non-members. Raises ValueError for data that do not fit.
    """
    if members is None or non_members is None:
        raise ValueError("a model alone cannot be audited: give members=(images, labels) and non_members=(images, labels)")
    if attack is not None:
        instance("attack", attack, having="__call__", example="PGD(0.03)")
    integer("autoattack", autoattack_on, low=0, high=len(non_members[0]), fix="it is a number of non-members")
    if autoattack_on and eps is None:
        raise ValueError("AutoAttack needs a radius: give eps in pixel units of [0, 1]")
    attack = attack or (PGD(eps, 10, random_start=False) if eps is not None else None)
    home, where = next((p.device for p in net.parameters()), torch.device("cpu")), farm.device(device)
    try:
        return _asked(net.to(where), {"member": members, "nonmember": non_members}, eps, attack, autoattack_on, where)
    finally:
        net.to(home)


def _asked(net, sides: Mapping, eps, attack, autoattack_on: int, where) -> Asked:
    arrays, robustness, graded, how = {}, {}, [], {"query attack": repr(attack) if attack else "none"}
    still, total = 0, sum(len(x) for x, _ in sides.values())
    graders = [replace(attack, eps=level * attack.eps) for level in LEVELS] if isinstance(attack, PGD) else []
    judges = [attack, replace(attack, steps=2 * attack.steps, restarts=2, random_start=True)] if graders else []
    for side, (x, y) in sides.items():
        x, y = torch.as_tensor(x).to(where), torch.as_tensor(y).to(where)
        check_query(net, x, y)
        clean, moved, withstood = [], [], []
        random = torch.Generator(where).manual_seed(0)  # asked again, the model gives the same answers
        drawn = {"rng": random} if isinstance(attack, (PGD, NFGSM)) else {}
        for start in range(0, len(x), BATCH):
            part, label = x[start : start + BATCH], y[start : start + BATCH]
            clean.append(_logits(net, part))
            if attack is not None:
                there = attack(net, part, label, **drawn)
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
