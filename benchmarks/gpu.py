"""The same on a GPU, only where there is one: ResNet-18 against the card's own matrix rate, and models a second against M."""

from __future__ import annotations

import time

import torch
from harness import Row, judged

from demem_lab import data
from demem_lab.attacks import PGD
from demem_lab.models import MLP, ResNet18, SmallCNN, Spec
from demem_lab.objectives import PGDAT, Natural
from demem_lab.recipe import Job
from demem_lab.sampling import Shuffled
from demem_lab.state import State
from demem_lab.streams import model_seeds
from demem_lab.training import Recipe

STEPS = 10
FORWARD = 1.11e9  # floating-point operations of one forward pass of a CIFAR ResNet-18, for one image
PASSES = 3 + 2 * STEPS + 1  # in forward passes: a training step is 3, an attack step 2 (weights are frozen); 1 for the rest


def seconds(action, device: torch.device, rounds: int = 5) -> list[float]:
    """Wall seconds of each round, the device's work included, after one that does not count."""
    found = []
    for number in range(rounds + 1):
        begun = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number:
            found.append(time.perf_counter() - begun)
    return found


def matrix_rate(device: torch.device, size: int = 8192) -> float:
    """Floating-point operations a second of a large float32 product, by whatever precision torch is set to."""
    a, b = torch.rand(size, size, device=device), torch.rand(size, size, device=device)
    return 2 * size**3 / min(seconds(lambda: a @ b, device))


def state_of(models: int, spec: Spec, shape, batch: int, attack: bool, device: torch.device) -> State:
    """Models of one chunk on the device, ready for their next step, on images of noise."""
    n = 4 * batch
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))
    images = data.Dataset("noise", x, torch.arange(n) % 10, tuple("0123456789"), "random numbers", 8 / 255)
    members = data.member_masks(n, max(models, 2), seed=0)[:models]
    recipe = Recipe(spec, PGDAT(PGD(8 / 255, STEPS)) if attack else Natural(), sampler=Shuffled(batch), epochs=10_000)
    job = Job(images, members, recipe, model_seeds(0, models), device, False, torch.float32, n / 2)
    return State(job)


def jobs(quick: bool, device: torch.device | None = None, *, width: int = 64, batch: int = 128, size: int = 8192) -> list[Row]:
    """All rows of this file; none without a GPU (a device can be named to try it out)."""
    if device is None:
        if not torch.cuda.is_available():
            return []
        device = torch.device("cuda")
    rows, rate = [], matrix_rate(device, size)
    state = state_of(1, ResNet18(width=width), (3, 32, 32), batch, True, device)
    took = seconds(state.advance, device, 3)
    work = FORWARD * (width / 64) ** 2 * batch * PASSES
    shape = f"ResNet-18 of width {width}, 32x32, batch {batch}, PGD-{STEPS} AT"
    images = batch / min(took)
    rows.append(judged(
        "GPU: share of the matrix rate", shape, "a float32 product of this card", [work / s / rate for s in took],
        unit="share", note=f"{images:,.0f} images a second",
    ))
    counts = (1, 16) if quick else (1, 16, 64, 256, 1024)
    for name, spec, pixels in (("MLP", MLP(), (1, 8, 8)), ("small CNN", SmallCNN(), (1, 28, 28))):
        alone = None
        for models in counts:
            if name == "small CNN" and models > 256:
                continue  # 1,024 x 28x28 would measure the card's memory
            found = seconds(state_of(models, spec, pixels, 50, False, device).advance, device, 3)
            alone = found if alone is None else alone
            gains = [models * a / b for a, b in zip(alone, found, strict=True)]
            rows.append(judged("GPU: models at once", f"{models} x {name}, batch 50, natural", "one by one", gains))
    return rows
