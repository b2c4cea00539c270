"""Does adversarial training here learn as fast as a loop written in plain torch that shares nothing with this package?

    DEMEM_DATA=... python benchmarks/independent.py WAY [SEED EPOCHS WIDTH]   # WAY: ours, he, evaluation, training
    python benchmarks/independent.py page                                      # results/independent.md from what is there

PGD training of a ResNet-18 with batch normalisation on all of CIFAR-10, eps 8/255, crop and flip, narrow enough for a CPU.
The loop is what papers' repositories write: nn.Conv2d and nn.BatchNorm2d as torch initialises them, torch.optim.SGD, data
from torchvision. Whoever learns more slowly, or to a lower robust accuracy, has a mistake in it. The judge of both is PGD-20
written in the loop's own few lines, on 2,000 test images.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch
import torch.nn.functional as F
from harness import RESULTS, provenance
from torch import nn
from torchvision.datasets import CIFAR10

from demem_lab import data, models
from demem_lab.attacks import PGD
from demem_lab.augment import usual
from demem_lab.live import Watch
from demem_lab.models import ResNet18
from demem_lab.objectives import PGDAT
from demem_lab.optimizers import SGD, HalfFlat, WarmUp
from demem_lab.sampling import Shuffled
from demem_lab.training import Recipe, train

EPS, STEP, BATCH, RATE, DECAY = 8 / 255, 5 / 255, 128, 0.1, 5e-4
JUDGED, KEPT = 2_000, RESULTS / "independent"
EVERY = 50  # steps that one number of the page is the mean of
WAYS = {
    "ours": "ours", "he": "ours, first weights as large as He's", "evaluation": "plain torch, attacked in evaluation mode",
    "training": "plain torch, attacked in training mode",
}


def rate(step: int, total: int) -> float:
    """Up for a tenth of the steps, then flat, then down to zero over the last 70 %."""
    return min(1.0, (step + 1) / (0.1 * total)) * min(1.0, (total - step) / (0.7 * total))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )
        self.short = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        return F.relu(self.main(x) + self.short(x))


def plain_network(width: int) -> nn.Module:
    layers, inputs = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()], width
    for stage in range(4):
        for number in range(2):
            layers.append(Block(inputs, width * 2**stage, 2 if stage and not number else 1))
            inputs = width * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def attacked(net, x, y, steps: int, step: float):
    delta = torch.empty_like(x).uniform_(-EPS, EPS)
    delta = (x + delta).clamp(0, 1) - x
    for _ in range(steps):
        delta.requires_grad_()
        slope = torch.autograd.grad(F.cross_entropy(net((x + delta - 0.5) / 0.25), y), delta)[0]
        delta = (delta.detach() + step * slope.sign()).clamp(-EPS, EPS)
        delta = (x + delta).clamp(0, 1) - x
    return (x + delta).detach()


def pixels(train: bool):
    pool = CIFAR10(os.environ["DEMEM_DATA"], train=train)
    return torch.from_numpy(pool.data).permute(0, 3, 1, 2), torch.tensor(pool.targets)


def plain(mode: str, seed: int, epochs: int, width: int) -> tuple[list[float], nn.Module]:
    torch.manual_seed(seed)
    images, labels = pixels(train=True)
    each = len(images) // BATCH
    steps = each * epochs
    net = plain_network(width).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9, weight_decay=DECAY)
    losses = []
    for number in range(steps):
        if number % each == 0:
            order = torch.randperm(len(images))
        rows = order[number % each * BATCH :][:BATCH]
        x, y = images[rows].float() / 255, labels[rows]
        padded, moved = F.pad(x, (4, 4, 4, 4)), []
        for image in padded:
            (down, right), mirrored = torch.randint(9, (2,)), torch.rand(()) < 0.5
            image = image[:, down : down + 32, right : right + 32]
            moved.append(image.flip(-1) if mirrored else image)
        x = torch.stack(moved).contiguous(memory_format=torch.channels_last)
        net.train(mode == "training")
        x = attacked(net, x, y, 2, STEP)
        net.train()
        loss = F.cross_entropy(net((x - 0.5) / 0.25), y)
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate(number, steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        tell(losses)
    return losses, net.eval()


def ours(seed: int, epochs: int, width: int) -> tuple[list[float], nn.Module]:
    images, losses, sums = data.load("cifar10", split="train"), [], [0.0]
    recipe = Recipe(
        ResNet18(width=width, norm="batch"), PGDAT(PGD(EPS, 2, STEP)), optimizer=SGD(lr=RATE, weight_decay=DECAY),
        sampler=Shuffled(BATCH), schedule=WarmUp(HalfFlat(0.7), 0.1), epochs=epochs, augment=usual("cifar10"),
    )

    def look(moment) -> None:
        done = (moment.step - 1) % (moment.steps // epochs) + 1  # steps of this epoch, which `losses` is the mean of
        sums.append(float(moment.losses[0]) * done)
        losses.append(sums[-1] - (sums[-2] if done > 1 else 0.0))
        tell(losses)

    everybody = torch.ones(1, images.n, dtype=torch.bool)
    found = train(images, everybody, recipe, seeds=(seed,), watch=Watch(look))
    net = found.network()
    return losses, _Centred(net)


class _Centred(nn.Module):
    """Our network takes pixels; the judge hands it what its own networks take."""

    def __init__(self, net) -> None:
        super().__init__()
        self.net = net.eval()

    def forward(self, x):
        return self.net(x * 0.25 + 0.5)


def tell(losses: list[float]) -> None:
    if len(losses) % EVERY == 0:
        print(len(losses), round(sum(losses[-EVERY:]) / EVERY, 4), flush=True)


def main(way: str, seed: int = 0, epochs: int = 2, width: int = 16) -> None:
    """Train one way, judge it, and keep the numbers under results/independent/."""
    if way == "page":
        return page()
    torch.set_num_threads(1)
    begun = time.monotonic()
    if way == "he":
        models.NORMED_GAIN = 1.0
    losses, net = ours(seed, epochs, width) if way in ("ours", "he") else plain(way, seed, epochs, width)
    spent = time.monotonic() - begun
    images, labels = pixels(train=False)
    torch.manual_seed(1)
    right = {"clean": 0, "PGD-20": 0}
    for start in range(0, JUDGED, 250):
        x, y = images[start : start + 250].float() / 255, labels[start : start + 250]
        for name, z in (("clean", x), ("PGD-20", attacked(net, x, y, 20, 2 / 255))):
            with torch.no_grad():
                right[name] += int((net((z - 0.5) / 0.25).argmax(1) == y).sum())
    means = [sum(losses[i : i + EVERY]) / EVERY for i in range(0, len(losses) - EVERY + 1, EVERY)]
    found = {
        "way": way, "seed": seed, "epochs": epochs, "width": width, "steps": len(losses), "losses": [round(m, 4) for m in means],
        **{f"{name} accuracy": count / JUDGED for name, count in right.items()}, "provenance": provenance(spent),
    }
    KEPT.mkdir(exist_ok=True)
    (KEPT / f"{way}-{seed}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(found)


def page() -> None:
    """One table of all that was kept."""
    kept = [json.loads(path.read_text()) for path in sorted(KEPT.glob("*.json"))]
    kept.sort(key=lambda run: (list(WAYS).index(run["way"]), run["seed"]))
    at = [i for i in (0, 3, 7, 11) if i < len(kept[0]["losses"])]
    lines = [
        "| way | commit | seed | steps | " + " | ".join(f"loss to step {(i + 1) * EVERY}" for i in at) + " | clean | PGD-20 |",
        "|" + "---|" * (6 + len(at)),
    ]
    for run in kept:
        losses = " | ".join(f"{run['losses'][i]:.3f}" for i in at)
        rates = f"{run['clean accuracy']:.1%} | {run['PGD-20 accuracy']:.1%}"
        name, commit = WAYS[run["way"]], run["provenance"]["commit"]
        lines.append(f"| {name} | {commit} | {run['seed']} | {run['steps']} | {losses} | {rates} |")
    where = ", ".join(f"{what} {value}" for what, value in kept[0]["provenance"].items() if what not in ("minutes", "commit"))
    (RESULTS / "independent.md").write_text("\n".join([where, "", *lines]) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(*(kind(given) for kind, given in zip((str, int, int, int), sys.argv[1:], strict=False)))
