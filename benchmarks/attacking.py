"""Attacks and attack-heavy steps against torchattacks, foolbox, the public TRADES loss, and AutoAttack alone."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from harness import Row, judged, times, versus
from shadow_models import EPS, attacked, twin_of

from demem_lab import data
from demem_lab.attacks import FGSM, PGD, autoattack, predictions, withstands
from demem_lab.mechanisms import Plain
from demem_lab.models import MLP, ResNet18, SmallCNN
from demem_lab.objectives import PGDAT, TRADES
from demem_lab.optimizers import SGD
from demem_lab.recipe import Job
from demem_lab.sampling import Shuffled
from demem_lab.state import State
from demem_lab.streams import Streams
from demem_lab.training import Recipe, train


def _images(side: int, batch: int, channels: int = 1):
    digits = data.load()
    x = F.interpolate(digits.x[:batch], size=(side, side), mode="bilinear").clamp(0, 1).expand(-1, channels, -1, -1).contiguous()
    return x, digits.y[:batch]


def pgd(quick: bool) -> list[Row]:
    """PGD-10 at full strength on one network."""
    rows, steps = [], 10
    for name, spec, side, batch in (("MLP", MLP(), 8, 256), ("small CNN", SmallCNN(), 28, 64)):
        x, y = _images(side, batch)
        net = spec.build(models=1, shape=tuple(x.shape[1:]), classes=10, seeds=(0,))
        attack = PGD(EPS, steps)
        generator = torch.Generator().manual_seed(0)
        ways = {"ours": lambda n=net, x=x, y=y, a=attack, g=generator: a(n, x, y, rng=g)}
        torch.manual_seed(0)
        notes = {}
        try:
            import torchattacks

            theirs = torchattacks.PGD(net, eps=EPS, alpha=2.5 * EPS / steps, steps=steps, random_start=True)
            ways["torchattacks"] = lambda t=theirs, x=x, y=y: t(x, y)
        except ImportError:
            notes["plain script"] = "torchattacks is not installed"
        try:
            import foolbox

            model = foolbox.PyTorchModel(net.eval(), bounds=(0, 1))
            linf = foolbox.attacks.LinfPGD(steps=steps, abs_stepsize=2.5 * EPS / steps)
            ways["foolbox"] = lambda m=model, a=linf, x=x, y=y: a(m, x, y, epsilons=EPS)
        except ImportError:
            notes["plain script"] = "foolbox is not installed"
        ways["plain script"] = lambda n=net, x=x, y=y: attacked(n, x, y, steps)
        fooled = {k: float((predictions(net, w()[1] if k == "foolbox" else w()) != y).double().mean()) for k, w in ways.items()}
        assert max(fooled.values()) - min(fooled.values()) < 0.1, f"not the same attack: {fooled}"
        rows += versus(
            "PGD-10", f"{name}, {side}x{side}, batch {batch}, eager, 1 thread", ways, rounds=3 if quick else 9,
            targets={k: 0.95 for k in ways if k != "ours"}, notes=notes,
        )
    if not quick:
        rows += _layouts()
    return rows


def _layouts() -> list[Row]:
    """The layout that a convolutional network takes by itself against the other one, and a compiled network, apart."""
    x, y = _images(32, 64, 3)
    rows, attack = [], PGD(EPS, 10, random_start=False)
    for norm in ("batch", "group"):
        net = ResNet18(width=16, norm=norm).build(models=1, shape=(3, 32, 32), classes=10, seeds=(0,)).arranged_for("cpu")
        other = ResNet18(width=16, norm=norm).build(models=1, shape=(3, 32, 32), classes=10, seeds=(0,))
        other.channels_last = not net.channels_last
        near = (attack(net, x, y) - attack(other, x, y)).abs().mean()
        assert near < EPS / 4, f"the layout must not change the attack: {near}"
        names = {True: "channels last", False: "channels first"}
        shape = f"ResNet-18 of width 16, {norm} normalisation, 32x32, batch 64, {names[net.channels_last]}, eager, 1 thread"
        peer = f"ours, {names[other.channels_last]}"
        rows += versus(
            "PGD-10", shape, {"ours": lambda n=net: attack(n, x, y), peer: lambda n=other: attack(n, x, y)}, rounds=5,
            targets={peer: 1.5 if net.channels_last else 1.0},
        )
        if norm == "batch":
            train_on = PGDAT(PGD(EPS, 3, random_start=False))

            def step(n, objective=train_on):
                loss = objective(n, x, y, torch.arange(len(x)), rng=None).loss.sum()
                return torch.autograd.grad(loss, list(n.parameters()))

            rows += versus(
                "PGD-3 AT step", shape, {"ours": lambda n=net: step(n), peer: lambda n=other: step(n)}, rounds=5,
                targets={peer: 1.5},
            )
        other.channels_last = net.channels_last
        other.fast = torch.compile(other.body)
        begun = time.process_time()
        attack(other, x, y)
        note = f"after {time.process_time() - begun:.0f} s of CPU time for compiling"
        rows += versus(
            "PGD-10, compiled", shape.replace("eager", "compiled"),
            {"ours": lambda n=other: attack(n, x, y), "ours, eager": lambda n=net: attack(n, x, y)}, rounds=5,
            notes={"ours, eager": note},
        )
    return rows


def early_exit(quick: bool) -> list[Row]:
    """robust_accuracy leaves out who is fooled already."""
    digits = data.load(subset=300 if quick else 1200)
    members = data.member_masks(digits.n, 2, seed=0)
    attacks = [FGSM(EPS), *(PGD(EPS, 10, random_start=False, step_size=s) for s in (0.02, 0.05, 0.1))]
    rows = []
    for name, spec, epochs in (("MLP", MLP(), 10),) if quick else (("MLP", MLP(), 10), ("small CNN", SmallCNN(), 4)):
        ensemble = train(digits, members, Recipe(model=spec, epochs=epochs, sampler=Shuffled(50)), seeds=(0, 1))
        net = ensemble.network([0])
        standing, active = torch.ones(digits.n, dtype=torch.bool), []
        for attack in attacks:
            active.append(float(standing.double().mean()) * attack.steps)
            standing &= withstands(net, digits.x, digits.y, [attack])
        share = sum(active) / sum(a.steps for a in attacks)

        def all_of_them(net=net):
            return torch.stack([predictions(net, a(net, digits.x, digits.y)) == digits.y for a in attacks]).all(0)

        assert bool((all_of_them() == withstands(net, digits.x, digits.y, attacks)).all())
        rows += versus(
            "robust accuracy, FGSM and three PGD-10", f"{name}, {digits.n} digits, active share {share:.2f}",
            {"ours": lambda n=net: withstands(n, digits.x, digits.y, attacks), "the same without early exit": all_of_them},
            rounds=3 if quick else 7, targets={"the same without early exit": round(0.9 / share, 2)},
        )
    return rows


def trades(quick: bool) -> list[Row]:
    """One TRADES-10 step: clean softmax once, no weight gradients in the attack, against the loss as it is published."""
    rows = []
    for name, spec, side, batch in (("MLP", MLP(), 8, 128), ("small CNN", SmallCNN(), 28, 64)):
        x, y = _images(side, batch)
        images = data.Dataset("bench", x, y, tuple("0123456789"), "digits", EPS)
        everybody = torch.ones(1, batch, dtype=torch.bool)
        recipe = Recipe(spec, TRADES(PGD(EPS, 10)), Plain(), SGD(lr=0.01), Shuffled(batch), epochs=10_000)
        job = Job(images, everybody, recipe, (0,), torch.device("cpu"), False, torch.float32, float(batch))
        state = State(job)
        net = twin_of(state.net, spec, tuple(x.shape[1:]))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        _same_trades(recipe.objective, state.net, net, x, y)
        rows += versus(
            "TRADES-10 step", f"{name}, {side}x{side}, batch {batch}, 1 thread",
            {"ours": state.advance, "as published": lambda n=net, x=x, y=y, o=optimizer: _published_step(n, x, y, o)},
            rounds=4 if quick else 11, targets={"as published": 1.25},
        )
    return rows


def _same_trades(objective: TRADES, ours, net, x, y) -> None:
    """Networks of the same weights must have the same loss both ways (within 5 %: the attacks start at their own noise)."""
    seen = objective(ours, x, y, torch.arange(len(x)), rng=Streams((0,), "attack", counts=[len(x)]))
    mine = seen.loss.mean().item()
    published = _published_step(net, x, y, None)
    assert abs(mine - published) < 0.05 * published, f"not the same loss: {mine:.4f} and {published:.4f}"


def _published_step(net, x, y, optimizer, *, beta: float = 6.0, steps: int = 10) -> float:
    """The order of work of the public implementation: the clean forward pass is repeated in every attack step, and the KL
    term is differentiated with the weights' gradients switched on."""
    net.eval()
    moved = x.detach() + 0.001 * torch.randn_like(x)
    for _ in range(steps):
        moved.requires_grad_()
        with torch.enable_grad():
            distance = F.kl_div(F.log_softmax(net(moved), 1), F.softmax(net(x), 1), reduction="sum")
        (slope,) = torch.autograd.grad(distance, [moved])
        moved = (moved.detach() + 2.5 * EPS / steps * slope.sign()).clamp(x - EPS, x + EPS).clamp(0, 1)
    net.train()
    clean = net(x)
    robust = F.kl_div(F.log_softmax(net(moved), 1), F.softmax(clean, 1), reduction="batchmean")
    loss = F.cross_entropy(clean, y) + beta * robust
    if optimizer is not None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def auto(quick: bool) -> list[Row]:
    """Our bridge to AutoAttack against pyautoattack alone."""
    from pyautoattack import AutoAttack

    digits = data.load(subset=24 if quick else 64)
    whole = data.load()
    everybody = data.member_masks(whole.n, 2, seed=0)
    recipe = Recipe(model=MLP(), objective=PGDAT(PGD(EPS, 3)), epochs=10, sampler=Shuffled(50))
    net = train(whole, everybody, recipe, seeds=(0, 1)).network([0])

    def alone():
        judge = AutoAttack(model=net, norm="Linf", eps=EPS, version="standard", device="cpu", seed=0)
        return judge.run_standard_evaluation(digits.x, digits.y, batch_size=64)[0]

    left = [(predictions(net, moved) == digits.y).sum() for moved in (autoattack(net, digits.x, digits.y, eps=EPS), alone())]
    assert left[0] == left[1], f"not the same attack: {left} images withstand"
    ways = {"ours": lambda: autoattack(net, digits.x, digits.y, eps=EPS), "alone": alone}
    found = times(ways, rounds=1 if quick else 3, warm=False)
    ratios = [a / o for a, o in zip(found["alone"], found["ours"], strict=True)]
    return [judged("AutoAttack", f"MLP, {digits.n} digits", "pyautoattack alone", ratios, target=0.95)]


def jobs(quick: bool) -> list[Row]:
    """All rows of this file."""
    return [*pgd(quick), *early_exit(quick), *trades(quick), *auto(quick)]
