"""Ours against the usual way, in one run on one thread; prints ratios, because lone times say nothing on other machines.

    python benchmarks/speed.py            (needs the test extra, for Opacus)

CPU time, the smallest of several interleaved rounds.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from opacus import GradSampleModule

from demem_lab.attacks import PGD
from demem_lab.data import load, member_masks
from demem_lab.mechanisms import DPSGD, Batch, Plain
from demem_lab.models import MLP, SmallCNN
from demem_lab.objectives import PGDAT, Natural
from demem_lab.sampling import Poisson
from demem_lab.streams import Streams, model_seeds
from demem_lab.training import Recipe, train


def fastest(actions: dict, rounds: int = 7) -> dict:
    """Least CPU seconds of each action over interleaved rounds."""
    best = dict.fromkeys(actions, float("inf"))
    for _ in range(rounds):
        for name, action in actions.items():
            start = time.process_time()
            action()
            best[name] = min(best[name], time.process_time() - start)
    return best


def per_sample_clipping(spec, size: int) -> dict:
    """One clipped and noised step: ours, Opacus' hooks, and an ordinary step of the same network."""
    net = spec.build(models=1, shape=(1, 8, 8), classes=10, seeds=(0,))
    x, y, index = torch.rand(size, 1, 8, 8), torch.arange(size) % 10, torch.arange(size)
    batch = Batch(index[None], torch.ones(1, size, dtype=torch.bool), float(size), 0, 1, Streams((0,), "noise"))

    def step(mechanism):
        with net.recording(mechanism.per_sample):
            mechanism.update(net, Natural()(net, x, y, index, rng=None), batch)

    twin = _torch_twin(spec)
    wrapped = GradSampleModule(twin, loss_reduction="sum")
    inputs = x.flatten(1) if isinstance(spec, MLP) else x

    def opacus():
        wrapped.zero_grad(set_to_none=True)
        F.cross_entropy(wrapped(inputs), y, reduction="sum").backward()
        parameters = [p for p in wrapped.parameters() if p.requires_grad]
        norms = sum(p.grad_sample.flatten(1).square().sum(1) for p in parameters).sqrt()
        factor = (1 / norms).clamp_max(1)
        for p in parameters:
            torch.einsum("b,b...->...", factor, p.grad_sample) + torch.randn_like(p)

    return fastest({"ours": lambda: step(DPSGD(1.0)), "opacus": opacus, "plain": lambda: step(Plain())})


def _torch_twin(spec):
    nn = torch.nn
    if isinstance(spec, MLP):
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    w = spec.width
    layers = []
    for a, b, stride in ((1, w, 1), (w, 2 * w, 2), (2 * w, 2 * w, 1)):
        layers += [nn.Conv2d(a, b, 3, stride, 1), nn.GroupNorm(4, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * w * 16, spec.hidden), nn.ReLU(), nn.Linear(spec.hidden, 10))


def many_at_once(models: int) -> dict:
    """Adversarial training of `models` MLPs: in one batched product against one after the other."""
    digits = load()
    recipe = Recipe(model=MLP(), objective=PGDAT(PGD(0.1, 3)), sampler=Poisson(64), epochs=1)
    members, seeds = member_masks(digits.n, models, seed=0), model_seeds(0, models)
    return fastest({
        name: lambda chunk=chunk: train(digits, members, recipe, seeds=seeds, chunk=chunk)
        for name, chunk in (("at once", models), ("one by one", 1))
    }, rounds=3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, spec in (("MLP 64-128-128-10", MLP()), ("small CNN, 8x8 images", SmallCNN())):
        t = per_sample_clipping(spec, 64)
        print(f"{name}, batch 64: clipping costs {t['ours'] / t['plain']:.2f} x an ordinary step; "
              f"Opacus' hooks take {t['opacus'] / t['ours']:.1f} x as long as ours")
    t = many_at_once(16)
    print(f"adversarial training of 16 MLPs at once: {t['one by one'] / t['at once']:.2f} x as fast as one by one")
