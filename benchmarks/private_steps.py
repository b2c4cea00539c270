"""What privacy costs a training step: ours against an ordinary step, Opacus in its modes, and vmap over samples."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import Row, versus
from opacus import GradSampleModule
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
from shadow_models import twin_of
from torch import nn
from torch.func import functional_call, grad, vmap

from demem_lab.layers import Conv, Linear
from demem_lab.mechanisms import DPSGD, Batch, Mechanism, Plain, SelectiveDP
from demem_lab.models import MLP, ResNet18, SmallCNN
from demem_lab.networks import Network, initialised
from demem_lab.objectives import Natural
from demem_lab.streams import Streams

BOUND = 1.0


class _Pooled(Network):
    """The network of most MNIST scripts: two 3x3 convolutions of 32 and 64 channels, each pooled, and 128 hidden units."""

    def __init__(self, models: int) -> None:
        super().__init__(models, 0.0, 1.0)
        self.conv = nn.ModuleList([Conv(models, 1, 32), Conv(models, 32, 64)])
        self.linear = nn.ModuleList([Linear(models, 64 * 7 * 7, 128), Linear(models, 128, 10)])

    def body(self, x):
        for conv in self.conv:
            x = F.max_pool2d(F.relu(conv(x)), 2)
        return self.linear[1](F.relu(self.linear[0](x.flatten(1)[None])))[0]


@dataclass(frozen=True)
class Pooled:
    """One such network for 28x28, ours and torch's."""

    def build(self, *, models, shape, classes, seeds) -> Network:
        assert (models, tuple(shape), classes) == (1, (1, 28, 28), 10)
        return initialised(_Pooled(models), seeds, "cpu")

    def torch_model(self) -> nn.Sequential:
        parts = [part for a, b in ((1, 32), (32, 64)) for part in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))]
        return nn.Sequential(*parts, nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10))


class Case:
    """One network and batch; every way returns the clipped sum of gradients as one flat vector."""

    def __init__(self, spec, side: int, batch: int, channels: int = 1) -> None:
        warnings.filterwarnings("ignore")
        shape = (channels, side, side)
        self.batch, self.shape = batch, shape
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.rand(batch, *shape, generator=generator), torch.arange(batch) % 10
        self.net = spec.build(models=1, shape=shape, classes=10, seeds=(0,))
        self.parameters = sum(p.numel() for p in self.net.parameters())
        self.index = torch.arange(batch)

    def step(self, mechanism: Mechanism, noise: bool = True) -> list[torch.Tensor]:
        """One update by one of our mechanisms."""
        valid = torch.ones(1, self.batch, dtype=torch.bool)
        batch = Batch(self.index[None], valid, 1.0, 0, 1, Streams((0,), "noise"))
        with self.net.recording(mechanism.per_sample):
            return mechanism.update(self.net, Natural()(self.net, self.x, self.y, self.index, rng=None), batch)

    def twin(self, spec) -> nn.Module:
        """torch's own layers with our weights."""
        return twin_of(self.net, spec, self.shape)


def _noised(sums: list[torch.Tensor]) -> list[torch.Tensor]:
    return [s + torch.randn_like(s) for s in sums]


def opacus_mode(case: Case, spec, mode: str):
    """Per-sample gradients by Opacus, clipped and summed as its optimizer does."""
    wrapped = GradSampleModule(case.twin(spec), loss_reduction="sum", force_functorch=mode == "functorch")
    parameters = list(wrapped.parameters())

    def clipped(noise: bool = True):
        wrapped.zero_grad(set_to_none=True)
        F.cross_entropy(wrapped(case.x), case.y, reduction="sum").backward()
        norms = sum(p.grad_sample.flatten(1).square().sum(1) for p in parameters).sqrt()
        factor = (BOUND / norms).clamp_max(1)
        sums = [torch.einsum("b,b...->...", factor, p.grad_sample) for p in parameters]
        for p in parameters:
            p.grad_sample = None
        return _noised(sums) if noise else sums

    return clipped


def opacus_ghost(case: Case, spec):
    """Opacus' ghost clipping: norms without gradients, then a second backward pass with weighted losses."""
    wrapped = GradSampleModuleFastGradientClipping(
        case.twin(spec), max_grad_norm=BOUND, use_ghost_clipping=True, loss_reduction="sum"
    )
    parameters = list(wrapped.parameters())

    def clipped(noise: bool = True):
        wrapped.zero_grad(set_to_none=True)
        wrapped.enable_hooks()
        losses = F.cross_entropy(wrapped(case.x), case.y, reduction="none")
        losses.sum().backward(retain_graph=True)
        factor = wrapped.get_clipping_coef()
        wrapped.zero_grad(set_to_none=True)
        wrapped.disable_hooks()
        (losses * factor).sum().backward()
        sums = [p.grad for p in parameters]
        return _noised(sums) if noise else sums

    return clipped


def by_vmap(case: Case, spec):
    """torch.func: every sample's gradient written out."""
    net = case.twin(spec)
    weights = {n: p.detach() for n, p in net.named_parameters()}

    def loss(w, x, y):
        return F.cross_entropy(functional_call(net, w, (x[None],)), y[None])

    every = vmap(grad(loss), in_dims=(None, 0, 0))

    def clipped(noise: bool = True):
        slopes = every(weights, case.x, case.y)
        norms = sum(s.flatten(1).square().sum(1) for s in slopes.values()).sqrt()
        factor = (BOUND / norms).clamp_max(1)
        sums = [torch.einsum("b,b...->...", factor, s) for s in slopes.values()]
        return _noised(sums) if noise else sums

    return clipped


def _length(sums) -> torch.Tensor:
    return torch.stack([s.square().sum() for s in sums]).sum().sqrt()


def _against_peers(name: str, spec, side: int, batch: int, most: float, faster: float, rounds: int) -> list[Row]:
    """DP-SGD against Opacus' modes and vmap, all with noise, and against our own plain step."""
    case = Case(spec, side, batch)
    shape = f"{name}, {case.parameters // 1000}k parameters, {side}x{side}, batch {batch}, 1 thread"
    peers = {f"Opacus {mode}": opacus_mode(case, spec, mode) for mode in ("hooks", "functorch")}
    peers |= {"Opacus ghost": opacus_ghost(case, spec), "vmap(grad)": by_vmap(case, spec)}
    ours = _length(case.step(DPSGD(0.0, BOUND)))
    for peer, clipped in peers.items():  # the same clipped sum, or it is not the same job
        torch.testing.assert_close(_length(clipped(noise=False)), ours, rtol=2e-4, atol=0, msg=lambda m, p=peer: f"{p}: {m}")
    private, plain = DPSGD(1.0, BOUND), Plain()
    rows = versus(
        "DP-SGD step", shape, {"ours": lambda: case.step(private), **peers}, rounds=rounds,
        targets={peer: faster if "Opacus" in peer else 1.0 for peer in peers},
    )
    return rows + versus(
        "DP-SGD step", shape, {"ours": lambda: case.step(private), "a plain step": lambda: case.step(plain)}, rounds=rounds,
        targets={"a plain step": most}, at_most=True,
    ) + versus(
        "DP-SGD step without noise", shape,
        {"ours": lambda: case.step(DPSGD(0.0, BOUND)), "a plain step": lambda: case.step(plain)}, rounds=rounds, at_most=True,
    )


def _selective(name: str, case: Case, rounds: int, most: float | None) -> list[Row]:
    """SelectiveDP with a tenth protected against DP-SGD, a plain step, and a pass for each of the two groups."""
    batch = case.batch
    shape = f"{name}, {case.parameters // 1000}k parameters, {case.shape[1]}x{case.shape[2]}, batch {batch}, 1 thread"
    flags = torch.arange(batch) < batch // 10
    selective, private, plain = SelectiveDP(1.0, BOUND, flags), DPSGD(1.0, BOUND), Plain()

    def two_passes():
        for rows_of, mechanism in ((case.index[~flags], plain), (case.index[flags], private)):
            valid = torch.ones(1, len(rows_of), dtype=torch.bool)
            part = Batch(rows_of[None], valid, 1.0, 0, 1, Streams((0,), "noise"))
            with case.net.recording(mechanism.per_sample):
                mechanism.update(case.net, Natural()(case.net, case.x[rows_of], case.y[rows_of], rows_of, rng=None), part)

    ways = {
        "ours": lambda: case.step(selective), "DP-SGD": lambda: case.step(private), "two separate passes": two_passes,
        "a plain step": lambda: case.step(plain),
    }
    return versus(
        "SelectiveDP step, 10 % protected", shape, ways, rounds=rounds, at_most=True,
        targets={"DP-SGD": 1.05} | ({"a plain step": most} if most else {}),
    )


def jobs(quick: bool) -> list[Row]:
    """DP-SGD and SelectiveDP steps of MLPs and CNNs."""
    rows, rounds = [], 4 if quick else 15
    cases = [("MLP 64-256-256-10", MLP(hidden=(256, 256)), 8, 256, 1.4, 2.0)] if quick else [
        ("MLP 64-256-256-10", MLP(hidden=(256, 256)), 8, 256, 1.4, 2.0), ("CNN with pooling", Pooled(), 28, 128, 2.0, 1.3),
        ("small CNN of width 32", SmallCNN(width=32, hidden=128), 28, 128, 2.0, 1.3),
    ]
    for name, spec, side, batch, most, faster in cases:
        rows += _against_peers(name, spec, side, batch, most, faster, rounds)
        rows += _selective(name, Case(spec, side, batch), rounds, None if isinstance(spec, MLP) else 1.4)
    if not quick:
        rows += _selective("ResNet-18 of width 16", Case(ResNet18(width=16), 32, 64, channels=3), 7, 1.4)
    return rows
