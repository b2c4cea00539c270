"""How time and memory grow with the number of models, of samples, of parameters and of threads; and the memory limits."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import torch
from harness import Row, judged, times

from demem_lab import chunks, data, queries, training
from demem_lab.attacks import PGD
from demem_lab.leakage import evaluate
from demem_lab.membership import lira, rmia
from demem_lab.models import MLP, Spec
from demem_lab.objectives import PGDAT
from demem_lab.recipe import Job
from demem_lab.sampling import Shuffled
from demem_lab.state import State
from demem_lab.streams import model_seeds
from demem_lab.training import Recipe

GIGABYTE = 2**30
LIMITS = (  # what, how it is made, gigabytes at most
    ("256 MLPs 64-128-128-10, digits, PGD-3 AT", "256, MLP(), 8", 3.0),
    ("32 small CNNs, 28x28, PGD-3 AT", "32, SmallCNN(), 28", 4.0),
)


def state_of(models: int, spec: Spec, *, batch: int = 50, attack: bool = True) -> State:
    """That many models of one chunk, ready for their next step."""
    images = data.load()
    members = data.member_masks(images.n, max(models, 2), seed=0)[:models]
    objective = PGDAT(PGD(0.1, 3)) if attack else Recipe().objective
    recipe = Recipe(spec, objective, sampler=Shuffled(batch), epochs=10_000)
    job = Job(
        images, members, recipe, model_seeds(0, models), torch.device("cpu"), False, torch.float32,
        members.double().sum(1).mean().item(),
    )
    return State(job)


def slope(job: str, shape: str, axis: str, sizes: list[float], actions: list, *, rounds: int) -> list[Row]:
    """The power of `axis` that time grows with, over all sizes and over the largest two."""
    found = times({str(s): a for s, a in zip(sizes, actions, strict=True)}, rounds=rounds)
    return powers(job, shape, axis, sizes, np.array(list(found.values())))


def powers(job: str, shape: str, axis: str, sizes: list[float], values: np.ndarray) -> list[Row]:
    """The power of `axis` that values [sizes, rounds] grow with."""
    fits = np.polyfit(np.log(sizes), np.log(values), 1)[0]
    last = np.log(values[-1] / values[-2]) / np.log(sizes[-1] / sizes[-2])
    span = f"{axis} from {sizes[0]:,} to {sizes[-1]:,}"
    return [
        judged(job, f"{shape}, {span}", "fitted power", list(fits), unit=f"power of {axis}"),
        judged(
            job, f"{shape}, {axis} from {sizes[-2]:,} to {sizes[-1]:,}", "power at the end", list(last), unit=f"power of {axis}"
        ),
    ]


def models(quick: bool) -> list[Row]:
    """Time of a training step of M models at once; how many of them the code takes into one product by itself."""
    sizes = [1, 4, 16] if quick else [1, 4, 16, 64, 256]
    states = [state_of(m, MLP()) for m in sizes]
    shape = "PGD-3 AT step, MLP 64-128-128-10, batch 50"
    rows = slope("time against M", shape, "M", sizes, [s.advance for s in states], rounds=3)
    alone, together = states[0], states[-1]
    found = times({"alone": alone.advance, "at once": together.advance}, rounds=5)
    ratios = [sizes[-1] * a / b for a, b in zip(found["alone"], found["at once"], strict=True)]
    rows.append(judged("M at once", f"the same step, {sizes[-1]} models", "one by one", ratios))
    chosen = chunks.chunk_size(together.job, sizes[-1])
    rows.append(judged("M at once", f"{sizes[-1]} models", "models in one product, as the probe chose", [chosen], unit="models"))
    return rows


def samples(quick: bool) -> list[Row]:
    """Time against the number of samples: LiRA, RMIA, rates at a threshold, an epoch of training, a table of answers."""
    sizes = [500, 2000, 8000] if quick else [500, 2000, 8000, 20_000, 60_000]
    games, images = [], []
    rng = np.random.default_rng(0)
    for n in sizes:
        member = data.member_masks(n, 16, seed=0).numpy()
        games.append((rng.normal(size=member.shape) + member, member))
        x, y = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 10
        images.append(data.Dataset("random pixels", x, y, tuple("0123456789"), "made here", 0.1))
    rows = slope("time against N", "leave-one-out LiRA, 16 models", "N", sizes, [partial(lira, *g) for g in games], rounds=3)
    ratios = [partial(rmia, 1 / (1 + np.exp(-s)), m) for s, m in games]
    rows += slope("time against N", "RMIA, 16 models", "N", sizes, ratios, rounds=3)
    rows += slope("time against N", "rates and AUC, 16 models", "N", sizes, [partial(evaluate, *g) for g in games], rounds=3)

    def epoch(pixels: data.Dataset):
        members = data.member_masks(pixels.n, 4, seed=0)
        recipe = Recipe(MLP(), sampler=Shuffled(50), epochs=1)
        return training.train(pixels, members, recipe, seeds=model_seeds(0, 4), chunk=4)

    rows += slope("time against N", "an epoch of 4 MLPs, natural", "N", sizes, [partial(epoch, i) for i in images], rounds=1)
    trained = epoch(images[0])
    asked = [partial(queries.outputs, trained, i) for i in images]
    rows += slope("time against N", "a table of answers of 4 MLPs", "N", sizes, asked, rounds=3)
    held = [_held(partial(lira, *g)) for g in games]
    return rows + powers("memory against N", "leave-one-out LiRA, 16 models", "N", sizes, np.array(held)[:, None])


def _held(action) -> int:
    """The most bytes that an action in NumPy held at a time, beside its arguments."""
    tracemalloc.start()
    action()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


def memory(quick: bool) -> list[Row]:
    """Peak memory of a process that trains M models, torch and all, each in a process of its own."""
    if quick:
        return []
    sizes = [16, 64, 256]
    peaks = np.array([[_peak_of(f"{m}, MLP(), 8")[0]] for m in sizes])
    return powers("memory against M", "PGD-3 AT, MLP 64-128-128-10, the whole process", "M", sizes, peaks)


def parameters(quick: bool) -> list[Row]:
    """Time of a training step against the number of parameters."""
    widths = [32, 128] if quick else [32, 64, 128, 256, 512]
    states = [state_of(8, MLP((w, w))) for w in widths]
    sizes = [sum(p.numel() for p in s.net.parameters()) // 8 for s in states]
    actions = [s.advance for s in states]
    return slope("time against model size", "PGD-3 AT step, 8 MLPs, batch 50", "parameters", sizes, actions, rounds=3)


def threads(quick: bool) -> list[Row]:
    """Two threads within each product against one thread for each of two chunks side by side (wall time)."""
    images = data.load()
    members = data.member_masks(images.n, 32, seed=0)
    recipe = Recipe(MLP(), PGDAT(PGD(0.1, 3)), sampler=Shuffled(50), epochs=0.3 if quick else 1)

    def side_by_side() -> None:
        training.train(images, members, recipe, seeds=model_seeds(0, 32), chunk=16)

    def within() -> None:
        state = state_of(32, MLP())
        torch.set_num_threads(2)
        for _ in range(round(recipe.epochs * state.job.steps_per_epoch)):
            state.advance()
        torch.set_num_threads(1)

    found = times({"ours": side_by_side, "within": within}, rounds=3, wall=True)
    ratios = [w / o for w, o in zip(found["within"], found["ours"], strict=True)]
    return [judged("threads", "32 MLPs, PGD-3 AT, 2 cores, wall time", "two threads within each product", ratios)]


def limits(quick: bool) -> list[Row]:
    """Peak memory of training in a process of its own, as a share of the limit; a limit that is broken fails the run."""
    rows = []
    for what, make, allowed in LIMITS[: 1 if quick else None]:
        held, seconds = _peak_of(make)
        gigabytes = held / GIGABYTE
        note = f"{gigabytes:.2f} GB, {seconds:.0f} s"
        rows.append(judged(
            MEMORY_LIMIT, what, f"{allowed:g} GB", [gigabytes / allowed], target=1.0, at_most=True, note=note,
            unit="share of the limit",
        ))
    return rows


def _peak_of(make: str) -> tuple[int, float]:
    """`peak` of those models in a process of its own, and how many seconds it took."""
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import growth; print(growth.peak({make}))"
    begun = time.perf_counter()
    told = subprocess.run([sys.executable, "-c", _WITH_MODELS + script], capture_output=True, text=True, check=True)
    return int(told.stdout.split()[-1]), time.perf_counter() - begun


MEMORY_LIMIT = "memory limit"
_WITH_MODELS = "from demem_lab.models import MLP, SmallCNN; "


def peak(models: int, spec: Spec, side: int) -> int:
    """Bytes of this process at their peak, after a few steps of all those models through the public door."""
    images = data.load()
    if side != 8:
        big = torch.nn.functional.interpolate(images.x, size=(side, side), mode="bilinear").clamp(0, 1)
        images = data.Dataset("digits, enlarged", big, images.y, images.classes, images.source, images.eps)
    members = data.member_masks(images.n, models, seed=0)
    recipe = Recipe(spec, PGDAT(PGD(0.1, 3)), sampler=Shuffled(64), epochs=0.2)
    training.train(images, members, recipe, seeds=model_seeds(0, models))
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says includes the parent, as it was when it started this process
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def jobs(quick: bool) -> list[Row]:
    """All rows of this file."""
    return [*limits(quick), *models(quick), *memory(quick), *samples(quick), *parameters(quick), *threads(quick)]
