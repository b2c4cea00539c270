"""The same on a GPU, only where there is one: ResNet-18 against the card's own matrix rate, and models a second against M.

    python benchmarks/gpu.py             # three minutes on an H200; writes results/gpu.md and gpu.json
    python benchmarks/gpu.py --eager     # without compiling anything: one minute
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace

import torch
from harness import Row, judged, table, write

from demem_lab import data
from demem_lab.attacks import PGD
from demem_lab.mechanisms import DPSGD, Mechanism, Plain, SelectiveDP
from demem_lab.models import MLP, ResNet18, SmallCNN, Spec
from demem_lab.objectives import PGDAT
from demem_lab.precision import Precision, resolve
from demem_lab.recipe import Job
from demem_lab.sampling import Shuffled
from demem_lab.state import State
from demem_lab.streams import model_seeds
from demem_lab.training import Recipe

FORWARD = 1.11e9  # floating-point operations of one forward pass of a CIFAR ResNet-18, for one image
EPS = 8 / 255


def seconds(action, device: torch.device, rounds: int = 5, warm: int = 1) -> list[float]:
    """Wall seconds of each round, the device's work included, after some that do not count."""
    found = []
    for number in range(rounds + warm):
        begun = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= warm:
            found.append(time.perf_counter() - begun)
    return found


def matrix_rate(device: torch.device, size: int = 8192) -> float:
    """Floating-point operations a second of a large product, in the precision that layers compute in on this device."""
    dtype = resolve(Precision.AUTO, device).dtype or torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / statistics.median(seconds(lambda: a @ b, device, 10, 3))


def state_of(
    models: int, spec: Spec, shape, batch: int, steps: int, device: torch.device, *, mechanism: Mechanism | None = None,
    precision: Precision = Precision.AUTO, compiled: bool = False, images: int = 0,
) -> State:
    """Models of one chunk on the device, ready for their next step of PGD training, on images of noise."""
    n = images or 4 * batch
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))
    noise = data.Dataset("noise", x, torch.arange(n) % 10, tuple("0123456789"), "random numbers", EPS)
    members = data.member_masks(n, max(models, 2), seed=0)[:models]
    recipe = Recipe(
        spec, PGDAT(PGD(EPS, steps)), mechanism or Plain(), sampler=Shuffled(batch), epochs=10_000,
        precision=resolve(precision, device),
    )
    return State(Job(noise, members, recipe, model_seeds(0, models), device, False, torch.float32, n / 2, compiled=compiled))


def _step(device: torch.device, spec: Spec, batch: int, steps: int, rounds: int, **how) -> list[float]:
    """Wall seconds of a training step of one model, after four that do not count: the second records the attack."""
    return seconds(state_of(1, spec, (3, 32, 32), batch, steps, device, **how).advance, device, rounds, 4)


def share(
    name: str, spec: ResNet18, batch: int, steps: int, device: torch.device, rate: float, *, target: float | None = None, **how
) -> tuple[Row, list[float]]:
    """The share of the matrix rate `rate` that a training step reaches; and its seconds."""
    # in forward passes: a training step is 3, an attack step 2 (weights are frozen)
    work = FORWARD * (spec.width / 64) ** 2 * batch * (3 + 2 * steps)
    took = _step(device, spec, batch, steps, 5, **how)
    shape = f"ResNet-18 of width {spec.width}, 32x32, batch {batch}, PGD-{steps} AT, {name}"
    peer = f"a product in {resolve(Precision.AUTO, device).value} at {rate / 1e12:,.0f} TFLOP/s"
    row = judged(
        "GPU: share of the matrix rate", shape, peer, [work / s / rate for s in took], unit="share", target=target,
        note=f"{batch / statistics.median(took):,.0f} images a second",
    )
    return row, took


def resnet(device: torch.device, width: int, batch: int, size: int, compiled: bool) -> list[Row]:
    """One ResNet-18: its share of the matrix rate, and what group normalisation and selective privacy cost."""
    rows, rate = [], matrix_rate(device, size)
    batch_norm, group_norm = ResNet18(width=width, norm="batch"), ResNet18(width=width)
    for steps, size_of, target in ((10, batch, 0.25), (3, max(2, batch // 8), None)):
        rows.append(share("batch normalisation", batch_norm, size_of, steps, device, rate, target=target)[0])
        row, plain = share("group normalisation", group_norm, size_of, steps, device, rate)
        rows.append(row)
        for name, spec in (("batch", batch_norm), ("group", group_norm)) if compiled else ():
            rows.append(share(f"{name} normalisation, compiled", spec, size_of, steps, device, rate, compiled=True)[0])
    tenth = SelectiveDP(1.0, 1.0, torch.arange(4 * size_of) % 10 == 0)
    private = _step(device, group_norm, size_of, 3, 5, mechanism=tenth)
    rows.append(judged(
        "GPU: SelectiveDP of a tenth", f"ResNet-18 of width {width}, 32x32, batch {size_of}, PGD-3 AT, group normalisation",
        "plain", [a / b for a, b in zip(private, plain, strict=True)], unit="time / time",
    ))
    return rows


def memory(device: torch.device, width: int, batch: int) -> list[Row]:
    """What ResNet-18 with all of CIFAR-10 takes of a T4, in float16 as there; the recorded attack included."""
    rows, card, context = [], 15e9, 5e8
    tenth = SelectiveDP(1.0, 1.0, torch.arange(50_000) % 10 == 0)
    kinds = ("batch", None, "plain"), ("group", None, "plain"), ("group", tenth, "SelectiveDP of a tenth")
    for norm, mechanism, name in (*kinds, ("group", DPSGD(1.0, 1.0), "DPSGD")):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        spec = ResNet18(width=width, norm=norm)
        state = state_of(
            1, spec, (3, 32, 32), batch, 3, device, mechanism=mechanism, precision=Precision.FLOAT16, images=50_000
        )
        for _ in range(4):
            state.advance()
        taken = torch.cuda.max_memory_reserved() + context
        rows.append(judged(
            "GPU: memory of a T4", f"ResNet-18, {norm} normalisation, {name}, float16, batch {batch}, all of CIFAR-10",
            "15 GB", [taken / card], unit="share", target=0.9, at_most=True,
            note=f"{taken / 1e6:,.0f} MB, of these 500 taken for CUDA itself",
        ))
        del state
    return rows


def many(device: torch.device, counts=(1, 16, 64, 256, 1024)) -> list[Row]:
    """Models a second against their number."""
    rows = []
    for name, spec, pixels, precision in (
        ("MLP", MLP(), (1, 8, 8), Precision.FLOAT32), ("small CNN", SmallCNN(), (1, 28, 28), Precision.AUTO),
    ):
        alone = None
        for models in counts:
            if name == "small CNN" and models > 256:
                continue  # 1,024 x 28x28 would measure the card's memory
            state = state_of(models, spec, pixels, 50, 3, device, precision=precision)
            found = seconds(state.advance, device, 5, 4)
            alone = alone or found
            gains = [models * a / b for a, b in zip(alone, found, strict=True)]
            note = f"{models / statistics.median(found):,.0f} model steps a second"
            rows.append(judged("GPU: models at once", f"{models} x {name}, batch 50, PGD-3 AT", "one by one", gains, note=note))
    return rows


def jobs(
    quick: bool, device: torch.device | None = None, *, compiled: bool = True, width: int = 64, batch: int = 1024,
    size: int = 8192,
) -> list[Row]:
    """All rows of this file; none without a GPU (a device can be named to try it out)."""
    if device is None:
        if not torch.cuda.is_available():
            return []
        device = torch.device("cuda")
    rows = resnet(device, width, batch, size, compiled and not quick)
    rows += many(device, (1, 16)) if quick else many(device)
    if device.type == "cuda":
        rows += memory(device, width, batch // 4)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "this processor"
    return [replace(row, shape=f"{row.shape} ({card})") for row in rows]


if __name__ == "__main__":
    begun = time.monotonic()
    found = jobs(False, compiled="--eager" not in sys.argv)
    if not found:
        sys.exit("there is no GPU that torch can use")
    print(table(found))
    write("gpu", found, time.monotonic() - begun)
