"""What each trick in the hot path is worth by itself: the same step with and without it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from growth import state_of
from harness import Row, judged, times
from private_steps import Case

from demem_lab import attacks, layers
from demem_lab.attacks import PGD
from demem_lab.layers import Conv, GroupNorm, _Normalised
from demem_lab.mechanisms import DPSGD, SelectiveDP
from demem_lab.models import MLP, SmallCNN
from demem_lab.objectives import TRADES

_TRAINING = """
import time, torch
from demem_lab import data, farm
from demem_lab import attacks
from demem_lab.attacks import PGD
from demem_lab.mechanisms import DPSGD, Plain
from demem_lab.models import MLP, SmallCNN
from demem_lab.objectives import PGDAT
from demem_lab.sampling import Poisson
from demem_lab.streams import model_seeds
from demem_lab.training import Recipe, train
if not {keep}:
    farm._keep_freed_memory = lambda: None
digits = data.load()
members = data.member_masks(digits.n, {models}, seed=0)
for epochs in (0.2, {epochs}):  # the first warms up
    recipe = Recipe({spec}, PGDAT(PGD(0.1, 3)), {mechanism}, sampler=Poisson(64), epochs=epochs)
    begun = time.process_time()
    train(digits, members, recipe, seeds=model_seeds(0, {models}), chunk={models} // 2)
print(time.process_time() - begun)
"""


def freed_memory(quick: bool) -> list[Row]:
    """Freed memory kept between steps (farm.one_thread_each) against glibc's usual way, each in processes of its own."""
    rows = []
    for spec, models, mechanism in (("MLP()", 64, "Plain()"), ("MLP()", 64, "DPSGD(1.0)"), ("SmallCNN()", 16, "DPSGD(1.0)")):
        ratios = []
        for _ in range(1 if quick else 4):
            seconds = []
            for keep in (False, True):
                script = _TRAINING.format(keep=keep, models=models, spec=spec, mechanism=mechanism, epochs=1 if quick else 2)
                told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
                seconds.append(float(told))
            ratios.append(seconds[0] / seconds[1])
        shape = f"{models} x {spec}, PGD-3 AT, {mechanism}, 8x8, Poisson(64), two chunks, CPU time"
        rows.append(judged("lever: freed memory is kept", shape, "without", ratios))
        if quick:
            break
    return rows


def _recorded_way(self: _Normalised, x: torch.Tensor) -> torch.Tensor:
    seen = self.normalise(x)
    return self.record(seen, torch.addcmul(self.bias.flatten()[:, None, None], seen, self.weight.flatten()[:, None, None]))


def fused_norm(quick: bool) -> list[Row]:
    """Scale and shift inside the normalisation where nothing is recorded, against one more pass."""
    state = state_of(8, SmallCNN(), attack=False)

    def two_passes() -> None:
        with mock.patch.object(_Normalised, "forward", _recorded_way):
            state.advance()

    found = times({"ours": state.advance, "without": two_passes}, rounds=3 if quick else 9)
    ratios = [w / o for w, o in zip(found["without"], found["ours"], strict=True)]
    return [judged("lever: norms scale in one pass", "8 small CNNs, 8x8, natural step, batch 50", "without", ratios)]


def many_rows(quick: bool) -> list[Row]:
    """Losses of many rows of ten classes with the classes laid out first, against torch's way."""
    rows = []
    for name in ("natural", "TRADES-3"):
        state = state_of(64, MLP(), attack=name != "natural")
        if name != "natural":
            state.job = replace(state.job, recipe=replace(state.job.recipe, objective=TRADES(PGD(0.1, 3))))

        def without(state=state):
            with mock.patch.object(attacks, "_few_classes", lambda logits: False):
                state.advance()

        found = times({"ours": state.advance, "without": without}, rounds=5 if quick else 21)
        ratios = [w / o for w, o in zip(found["without"], found["ours"], strict=True)]
        rows.append(judged("lever: losses with the classes first", f"{name} step, 64 MLPs, batch 50", "without", ratios))
    return rows


def _plain_ascent(self: PGD, net, x, y, rng, loss, start):
    step = 2.5 * self.eps / self.steps
    z = self.project(x + self._random_offset(x, rng), x)
    for _ in range(self.steps):
        z = self.project(z + step * attacks.image_slope(net, z, y, loss).sign(), x)
    return z


def steps_of_attacks(quick: bool) -> list[Row]:
    """Each trick of a PGD step on MLPs, with and without it: one clamp, slopes by hand, softmax with the classes first."""
    rows = []
    tricks = {
        "one clamp a step": (PGD, "_ascend", _plain_ascent),
        "slopes by hand": (type(state_of(1, MLP()).net), "by_hand", lambda self, x, slope_of: None),
        "softmax with the classes first": (attacks, "softmax", lambda logits: logits.softmax(-1)),
    }
    for models in (48,) if quick else (1, 48):
        state = state_of(models, MLP())
        attack, net = PGD(0.1, 10), state.net
        x, y = state.x[:50].repeat(models, 1, 1, 1), state.y[:50].repeat(models)

        def ours(attack=attack, net=net, x=x, y=y):
            return attack(net, x, y, rng=torch.Generator().manual_seed(0))

        for name, (where, what, plain) in tricks.items():

            def without(ours=ours, where=where, what=what, plain=plain):
                with mock.patch.object(where, what, plain):
                    return ours()

            # where a slope is rounded to the other side of 0 a pixel goes the other way; hardly any may
            assert ((ours() - without()).abs() > 1e-6).double().mean() < 1e-3, f"{name} changes the attack"
            found = times({"ours": ours, "without": without}, rounds=5 if quick else 25)
            ratios = [w / o for w, o in zip(found["without"], found["ours"], strict=True)]
            rows.append(judged(f"lever: {name}", f"PGD-10, {models} MLP(s), batch 50", "without", ratios))
    return rows


def _unfolded(self: Conv, x: torch.Tensor) -> torch.Tensor:
    patches = F.unfold(x.flatten(0, 1), self.kernel, padding=self.kernel // 2, stride=self.stride)
    return patches.unflatten(0, (self.models, -1))


def _told_nothing(self: GroupNorm, x: torch.Tensor) -> torch.Tensor:
    self.statistics = []
    return _Normalised.forward(self, x)


def steps_with_norms(quick: bool) -> list[Row]:
    """Each trick of per-sample norms in convolutional networks, with and without it."""
    case = Case(SmallCNN(width=32, hidden=128), 28, 128)
    shape = f"small CNN of width 32, {case.parameters // 1000}k parameters, 28x28, batch 128"
    few = SelectiveDP(0.0, 1.0, torch.arange(128) < 12)
    tricks = {
        "patches by strided copies": (DPSGD(0.0), Conv, "_patches", _unfolded),
        "patches of a few samples at a time": (DPSGD(0.0), layers, "PATCHES", (2**40, 2**40)),
        "per-sample gradients kept for their sum": (DPSGD(0.0), layers, "WRITTEN", 0),
        "statistics from the normalising kernel": (DPSGD(0.0), GroupNorm, "forward", _told_nothing),
        "norms of the protected only, a tenth": (few, SelectiveDP, "_few", lambda *_: None),
    }
    rows = []
    for name, (mechanism, where, what, plain) in tricks.items():

        def ours(mechanism=mechanism):
            return case.step(mechanism)

        def without(ours=ours, where=where, what=what, plain=plain):
            with mock.patch.object(where, what, plain):
                return ours()

        for a, b in zip(ours(), without(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n} changes the step: {m}")
        found = times({"ours": ours, "without": without}, rounds=2 if quick else 9)
        ratios = [w / o for w, o in zip(found["without"], found["ours"], strict=True)]
        rows.append(judged(f"lever: {name}", f"{type(mechanism).__name__} step, {shape}", "without", ratios))
    return rows


def profile() -> str:
    """Where a PGD-3 adversarial training step of 48 MLPs spends its time: torch's own table."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    state = state_of(48, MLP())
    for _ in range(3):
        state.advance()
    with watch(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(10):
            state.advance()
    found = sorted(seen.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in found)
    lines = ["| operator | share of the step | calls a step |", "|---|---|---|"]
    lines += [f"| {e.key} | {e.self_cpu_time_total / total:.1%} | {e.count / 10:g} |" for e in found[:12]]
    return "\n".join(lines)


def jobs(quick: bool) -> list[Row]:
    """All rows of this file."""
    return [*freed_memory(quick), *fused_norm(quick), *many_rows(quick), *steps_of_attacks(quick), *steps_with_norms(quick)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(profile())
    for row in jobs("--quick" in sys.argv):
        print(f"{row.job}, {row.shape}: {row.ratio:.2f}")
