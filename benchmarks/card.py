"""What a card would have to hold, launch and wait for, counted without one.

    python benchmarks/card.py            # three minutes; writes results/card.md and card.json

A training step runs on the tests' pretended card (tests/pretend_gpu.py), where every operation and every tensor is seen. The
bytes alive at the worst moment are counted for two batch sizes (or numbers of models) and carried on in a straight line. A
real card needs more: its context, the workspace of its kernels, and the gaps between blocks. So this can show that something
does NOT fit, and how much room is left where it should; `gpu.py` measures on a card.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import Row, judged, table, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from pretend_gpu import OnCard, pretend_gpu  # noqa: E402

from demem_lab import data  # noqa: E402
from demem_lab.attacks import PGD  # noqa: E402
from demem_lab.mechanisms import DPSGD, Mechanism, Plain, SelectiveDP  # noqa: E402
from demem_lab.models import MLP, ResNet18, SmallCNN, Spec  # noqa: E402
from demem_lab.objectives import PGDAT  # noqa: E402
from demem_lab.precision import Precision  # noqa: E402
from demem_lab.recipe import Job, Recipe  # noqa: E402
from demem_lab.sampling import Poisson, Shuffled  # noqa: E402
from demem_lab.state import State  # noqa: E402
from demem_lab.streams import model_seeds  # noqa: E402

T4 = 15 * 2**30
# operations that only look at memory in another way: nothing is launched for them
VIEWS = (
    "view", "_unsafe_view", "t.default", "transpose", "permute", "expand", "detach", "slice", "select", "unsqueeze", "squeeze",
    "alias", "as_strided", "unbind", "split", "unfold",
)
WAITS = ("_local_scalar_dense", "nonzero", "equal.default")  # whose answer the CPU has to have before it goes on


class Watch:
    """Bytes alive, the most of them at any moment, and operations by name."""

    def __init__(self) -> None:
        self.alive = self.most = 0
        self.users: dict[int, list[int]] = {}  # address of a block -> [tensors that use it, bytes]
        self.calls: Counter[str] = Counter()

    def called(self, func) -> None:
        self.calls[str(func).removeprefix("aten.")] += 1

    def made(self, tensor: OnCard) -> None:
        block = tensor.inside.untyped_storage()
        if not block.nbytes():
            return
        users = self.users.setdefault(block.data_ptr(), [0, block.nbytes()])
        if not users[0]:
            self.alive += users[1]
            self.most = max(self.most, self.alive)
        users[0] += 1
        weakref.finalize(tensor, self._gone, block.data_ptr())

    def _gone(self, address: int) -> None:
        users = self.users[address]
        users[0] -= 1
        if not users[0]:
            self.alive -= users[1]
            del self.users[address]

    def start(self) -> None:
        """Count from here on."""
        self.calls.clear()
        self.most = self.alive


@dataclass(frozen=True)
class Step:
    """One training step, as counted."""

    memory: int  # bytes at the worst moment
    launches: int
    waits: int


def step(
    models: int, spec: Spec, shape, batch: int, mechanism: Mechanism, *, attack_steps: int = 1,
    precision: Precision = Precision.BFLOAT16,
) -> Step:
    """The second step of PGD-AT on images of noise: by then everything that lasts is there."""
    n = 4 * batch
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))
    noise = data.Dataset("noise", x, torch.arange(n) % 10, tuple("0123456789"), "random numbers", 8 / 255)
    members = data.member_masks(n, max(models, 2), seed=0)[:models]
    sampler = Shuffled(batch) if getattr(spec, "norm", "") == "batch" else Poisson(batch)
    recipe = Recipe(spec, PGDAT(PGD(8 / 255, attack_steps)), mechanism, sampler=sampler, epochs=10_000, precision=precision)
    with pretend_gpu():
        watch = OnCard.watch = Watch()
        try:
            state = State(Job(noise, members, recipe, model_seeds(0, models), torch.device("cuda"), False, torch.float32, n / 2))
            state.advance()
            watch.start()
            state.advance()
        finally:
            OnCard.watch = None
    launches = sum(n for name, n in watch.calls.items() if not name.startswith(VIEWS))
    return Step(watch.most, launches, sum(n for name, n in watch.calls.items() if name.startswith(WAITS)))


def carried(small: tuple[int, Step], large: tuple[int, Step], to: int) -> float:
    """Bytes at `to`, in a straight line through two sizes."""
    slope = (large[1].memory - small[1].memory) / (large[0] - small[0])
    return large[1].memory + slope * (to - large[0])


def tenth(n: int) -> SelectiveDP:
    """SelectiveDP of the first tenth."""
    return SelectiveDP(1.0, 1.0, torch.arange(n) < max(1, n // 10))


def jobs() -> list[Row]:
    """All rows."""
    rows, mb = [], 2**20
    for name, spec, mechanism in (
        ("batch normalisation, Plain", ResNet18(norm="batch"), lambda n: Plain()),
        ("group normalisation, Plain", ResNet18(), lambda n: Plain()),
        ("group normalisation, SelectiveDP of a tenth", ResNet18(), tenth),
        ("group normalisation, DPSGD", ResNet18(), lambda n: DPSGD(1.0)),
    ):
        found = [(b, step(1, spec, (3, 32, 32), b, mechanism(4 * b))) for b in (16, 32)]
        memory = carried(*found, 256) + 50_000 * 3 * 32 * 32 * 4  # and CIFAR-10 itself
        last = found[-1][1]
        rows.append(judged(
            "counted: memory of a T4", f"ResNet-18, {name}, 16 bits, batch 256, all of CIFAR-10", "15 GB", [memory / T4],
            target=0.5, at_most=True, unit="share",
            note=f"{memory / mb:,.0f} MB; {last.launches} launches and {last.waits} waits a step with PGD-1",
        ))
    for name, spec, shape, mechanism, low, high in (
        ("MLPs, digits, Plain", MLP(), (1, 8, 8), lambda n: Plain(), 16, 256),
        ("MLPs, digits, SelectiveDP of a tenth", MLP(), (1, 8, 8), tenth, 16, 256),
        ("small CNNs, Fashion-MNIST, Plain", SmallCNN(), (1, 28, 28), lambda n: Plain(), 8, 32),
        ("small CNNs, Fashion-MNIST, SelectiveDP of a tenth", SmallCNN(), (1, 28, 28), tenth, 8, 32),
    ):
        found = [
            (m, step(m, spec, shape, 50, mechanism(200), attack_steps=3, precision=Precision.FLOAT32)) for m in (1, low, high)
        ]
        (_, one), (_, few), (_, many) = found
        launches = many.launches + (many.launches - few.launches) / (high - low) * (256 - high)
        memory = carried(*found[1:], 256)
        rows.append(judged(
            "counted: 256 models at once", f"{name}, float32, batch 50, PGD-3", "launches of one model",
            [launches / one.launches], unit="launches / launches",
            note=f"{launches:,.0f} launches, {many.waits} waits a step; {memory / mb:,.0f} MB",
        ))
    return rows


def main() -> None:
    """Count, and write the page."""
    begun = time.monotonic()
    rows = jobs()
    print(table(rows))
    write("card", rows, time.monotonic() - begun)


if __name__ == "__main__":
    main()
