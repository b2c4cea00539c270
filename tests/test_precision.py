"""16 bits inside the network: close to float32, norms in float32, and no step is ever left out."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from demem_lab import precision
from demem_lab.attacks import PGD
from demem_lab.data import member_masks
from demem_lab.mechanisms import Batch, LossVariance, Plain, SelectiveDP
from demem_lab.models import MLP, VGG, ResNet18, SmallCNN
from demem_lab.objectives import AWP, PGDAT, Natural
from demem_lab.optimizers import SGD
from demem_lab.precision import Precision, Scaler, resolve, whole_products
from demem_lab.queries import outputs
from demem_lab.sampling import Poisson, Shuffled
from demem_lab.state import State
from demem_lab.store import Store
from demem_lab.streams import Streams
from demem_lab.training import Recipe, train

HALVES = [Precision.BFLOAT16, Precision.FLOAT16]
SPECS = {
    "mlp": MLP((12,)), "cnn": SmallCNN(width=16), "resnet": ResNet18(width=16), "vgg": VGG(width=16),
    "batch norm": VGG(width=16, norm="batch"),
}
FLAGS = torch.tensor([True, False, True, True, False, True])


def one_update(kind, half, mechanism, objective, scale=1.0):
    net = SPECS[kind].build(models=2, shape=(1, 16, 16), classes=4, seeds=(1, 2)).train()
    net.compute_in(half.dtype if half else None, scale)
    x = torch.rand(12, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    y, index = torch.arange(12) % 4, torch.arange(6).repeat(2, 1)
    batch = Batch(index, torch.ones(2, 6, dtype=torch.bool), 6.0, 0, 1, Streams((1, 2), "noise"))
    with net.recording(mechanism.per_sample):
        seen = objective(net, x, y, index.flatten(), rng=Streams((1, 2), "attack"))
        gradients = mechanism.update(net, seen, batch)
    if seen.undo:
        seen.undo()
    return net, seen, gradients


def relative(a, b):
    a, b = (torch.cat([g.flatten() for g in gradients]) for gradients in (a, b))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("mechanism", [Plain(), LossVariance(0.5), SelectiveDP(0.0, 0.5, FLAGS)], ids=lambda m: type(m).__name__)
def test_updates_are_those_of_float32_within_rounding(kind, half, mechanism):
    if kind == "batch norm" and mechanism.per_sample:
        pytest.skip("samples are not apart")
    _, seen, wanted = one_update(kind, None, mechanism, Natural())
    _, lower, found = one_update(kind, half, mechanism, Natural(), 2.0**8 if half is Precision.FLOAT16 else 1.0)
    assert {g.dtype for g in found} == {lower.loss.dtype} == {lower.logits.dtype} == {torch.float32}
    # few digits move some ReLUs across their kink; a wrong scale would be wrong by 256
    assert 0 < relative(found, wanted) < (0.25 if half is Precision.BFLOAT16 else 0.1)
    assert torch.allclose(lower.loss, seen.loss, atol=0.02 if half is Precision.BFLOAT16 else 0.002)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("kind", ["mlp", "cnn", "resnet", "vgg"])
def test_per_sample_norms_are_float32_and_unscaled(kind, half):
    def norms(half, scale):
        net = SPECS[kind].build(models=2, shape=(1, 16, 16), classes=4, seeds=(1, 2))
        net.compute_in(half.dtype if half else None, scale)
        x = torch.rand(12, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        with net.recording():
            loss = torch.nn.functional.cross_entropy(net(x), torch.arange(12) % 4, reduction="sum")
            deltas = iter(net.unscaled(torch.autograd.grad(loss, [out for layer in net.layers for _, out in layer.calls])))
            squares = [layer.sample_norms([next(deltas)]) for layer in net.layers]
            assert all(seen.dtype == torch.float32 for layer in net.layers for seen, _ in layer.calls)
        return sum(squares).sqrt()

    wanted = norms(None, 1.0)
    for scale in (1.0, 64.0) if half is Precision.FLOAT16 else (1.0,):
        found = norms(half, scale)
        assert found.dtype == torch.float32 and torch.allclose(found, wanted, rtol=0.1) and not torch.equal(found, wanted)


@pytest.mark.parametrize("half", HALVES)
def test_a_protected_samples_part_never_exceeds_the_bound(half):
    """Sensitivity in 16 bits: clipping sees the very numbers that are summed."""
    for row in range(3):
        only = torch.arange(6) == row
        net = SPECS["cnn"].build(models=1, shape=(1, 8, 8), classes=4, seeds=(1,))
        net.compute_in(half.dtype, 256.0 if half is Precision.FLOAT16 else 1.0)
        x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        batch = Batch(torch.arange(6)[None], only[None], 1.0, 0, 1, Streams((1,), "noise"))
        mechanism = SelectiveDP(0.0, 0.05)
        with net.recording():
            seen = Natural()(net, x, torch.arange(6) % 4, torch.arange(6), rng=Streams((1,), "attack"))
            update = mechanism.update(net, seen, batch)
        assert torch.cat([g.flatten() for g in update]).norm() == pytest.approx(0.05, rel=1e-4)


def test_scaling_saves_gradients_that_float16_would_lose():
    """Slopes of 1e-9 are zero in float16; scaled through the network they are not."""
    def slope(scale):
        net = MLP((12,)).build(models=1, shape=(1, 8, 8), classes=4, seeds=(1,))
        net.compute_in(torch.float16, scale)
        x = torch.rand(6, 1, 8, 8).requires_grad_()
        return torch.autograd.grad(1e-9 * net(x).sum(), [x, *net.parameters()])

    assert all(float(g.abs().max()) == 0 for g in slope(1.0)[:2])
    assert all(1e-11 < float(g.abs().max()) < 1e-7 for g in slope(2.0**16))


BASE = Recipe(model=MLP((16,)), objective=PGDAT(PGD(0.1, 2)), sampler=Poisson(20), epochs=30, optimizer=SGD(lr=0.1))


@pytest.mark.parametrize("half", HALVES)
def test_a_run_is_that_of_float32_in_distribution(digits, half):
    """16 models each: the means differ by less than chance between models explains."""
    members, found = member_masks(200, 16, seed=0), {}
    recipe = replace(BASE, model=MLP((32,)), objective=PGDAT(PGD(0.05, 1)), epochs=20)
    for kind in (Precision.FLOAT32, half):
        ensemble = train(digits, members, replace(recipe, precision=kind), seeds=range(16), chunk=16)
        right = outputs(ensemble, digits).argmax(-1) == digits.y.numpy()
        found[kind] = np.stack([(right & m).sum(1) / m.sum(1) for m in (members.numpy(), ~members.numpy())])
        assert {t.dtype for t in ensemble.parameters.values()} == {torch.float32}
    lower, full = found[half], found[Precision.FLOAT32]
    error = (lower - full).std(1, ddof=1) / 4
    assert (np.abs((lower - full).mean(1)) < 4 * error + 0.005).all() and not np.array_equal(lower, full)
    assert full.mean(1)[0] > 0.9 and full.mean(1)[1] > 0.7


def test_the_scale_is_halved_and_the_same_step_done_again(tiny, monkeypatch):
    """An overflow costs time and nothing else: no step is missing, no random number is new."""
    monkeypatch.setattr(precision, "START", 2.0**40)
    seen, real = [], Plain.update

    def watch(self, net, per_sample, batch):
        seen.append((batch.step, net.scale))
        return real(self, net, per_sample, batch)

    monkeypatch.setattr(Plain, "update", watch)
    recipe = replace(BASE, model=MLP((6,)), sampler=Poisson(4), precision=Precision.FLOAT16, epochs=5)
    members = member_masks(24, 2, seed=0)
    large = train(tiny, members, recipe, seeds=(0, 1), chunk=2)
    first = [scale for step, scale in seen if step == 0]
    assert len(first) > 5 and all(a == 2 * b for a, b in zip(first, first[1:], strict=False))
    assert sorted({step for step, _ in seen}) == list(range(15)) and large.steps == 15
    monkeypatch.setattr(precision, "START", first[-1])
    small = train(tiny, members, recipe, seeds=(0, 1), chunk=2)
    assert all(torch.equal(small.parameters[n], t) for n, t in large.parameters.items())


def test_noise_and_steps_of_a_private_run_do_not_depend_on_the_scale(tiny, monkeypatch):
    members = member_masks(24, 2, seed=0)
    recipe = Recipe(model=MLP((6,)), mechanism=SelectiveDP(1.0, 0.5, torch.arange(24) < 9), sampler=Poisson(4), epochs=5)
    draws, real = [], Streams.private_normal
    monkeypatch.setattr(Streams, "private_normal", lambda s, *how: (draws.append((s.purpose, s.step)), real(s, *how))[1])
    for start in (2.0**40, 2.0**4):
        monkeypatch.setattr(precision, "START", start)
        draws.clear()
        half = train(tiny, members, replace(recipe, precision=Precision.FLOAT16), seeds=(0, 1), chunk=2)
        assert {d for d in draws if d[0] == "noise"} == {("noise", t) for t in range(15)}  # at every step, also the repeated
    full = train(tiny, members, recipe, seeds=(0, 1), chunk=2)
    assert half.steps == full.steps and str(half.guarantee(delta=1e-5)) == str(full.guarantee(delta=1e-5))
    assert all((t - half.parameters[n]).abs().max() < 0.02 for n, t in full.parameters.items())


def test_repeated_steps_move_running_statistics_once(tiny, monkeypatch):
    x = replace(tiny, x=torch.nn.functional.interpolate(tiny.x, scale_factor=2))
    recipe = Recipe(model=VGG(width=4, norm="batch"), sampler=Shuffled(4), epochs=2, precision=Precision.FLOAT16)
    found = []
    for start in (2.0**40, 2.0**4):
        monkeypatch.setattr(precision, "START", start)
        found.append(train(x, member_masks(24, 2, seed=0), recipe, seeds=(0, 1), chunk=2).parameters)
    assert any("running_mean" in name for name in found[0])
    for name, tensor in found[0].items():
        assert torch.allclose(tensor, found[1][name], atol=2e-3), name


def test_weights_moved_by_awp_are_put_back_before_a_step_is_repeated(tiny, monkeypatch):
    monkeypatch.setattr(precision, "START", 2.0**30)
    recipe = replace(BASE, model=MLP((6,)), objective=AWP(PGDAT(PGD(0.1, 1)), 0.1), sampler=Poisson(4), epochs=1)
    members = member_masks(24, 2, seed=0)
    kinds = (Precision.FLOAT16, Precision.FLOAT32)
    half, full = (train(tiny, members, replace(recipe, precision=p), seeds=(0, 1), chunk=2) for p in kinds)
    assert all((t - half.parameters[n]).abs().max() < 5e-3 for n, t in full.parameters.items())


def test_the_scale_grows_again_and_a_lost_model_does_not_hold_the_others_back(monkeypatch):
    net = MLP((4,)).build(models=2, shape=(1, 4, 4), classes=3, seeds=(0, 1))
    scaler = Scaler(net)
    good = [torch.zeros_like(p) for p in net.parameters()]
    bad = [g.clone() for g in good]
    bad[0][1, 0, 0] = float("inf")
    assert not scaler.accepts(bad) and net.scale == precision.START / 2
    monkeypatch.setattr(precision, "GROW_AFTER", 3)
    assert all(scaler.accepts(good) for _ in range(3)) and net.scale == precision.START
    while not scaler.accepts(bad):
        assert net.half is torch.float16 or scaler.scale < 1
    assert net.scale == 1 and net.half is torch.float16  # done once in float32, then on with the smallest scale
    with torch.no_grad():
        next(net.parameters())[1, 0, 0] = float("nan")
    assert scaler.accepts(bad)
    bad[0][0, 0, 0] = float("nan")
    assert not scaler.accepts(bad)


def test_quiet_steps_are_counted_anew_after_an_overflow():
    net = MLP((6,)).build(models=1, shape=(1, 4, 4), classes=3, seeds=(0,))
    scaler, good = Scaler(net), [torch.zeros_like(p) for p in net.parameters()]
    assert scaler.accepts(good) and not scaler.accepts([g + float("inf") for g in good])
    assert scaler.state().tolist() == [precision.START / 2, 0]


def test_a_resumed_run_keeps_its_scale(tiny, store, monkeypatch):
    monkeypatch.setattr(precision, "GROW_AFTER", 4)
    members = member_masks(24, 2, seed=0)
    recipe = replace(BASE, model=MLP((6,)), sampler=Poisson(4), epochs=5, precision=Precision.FLOAT16)
    whole = train(tiny, members, recipe, seeds=(0, 1), chunk=2)
    real, scales = State.advance, []

    def fails_at_6(state):
        if state.step == 6 and not scales:
            scales.append(state.scaler.scale)
            raise KeyboardInterrupt
        if state.step == 6:
            scales.append(state.scaler.scale)
        real(state)

    monkeypatch.setattr(State, "advance", fails_at_6)
    with pytest.raises(KeyboardInterrupt):
        train(tiny, members, recipe, seeds=(0, 1), chunk=2, store=store)
    resumed = train(tiny, members, recipe, seeds=(0, 1), chunk=2, store=store)
    assert scales[0] == scales[1] == 2 * precision.START
    assert all(torch.equal(whole.parameters[n], t) for n, t in resumed.parameters.items())


def test_auto_follows_the_device(monkeypatch):
    assert resolve(Precision.AUTO, "cpu") is Precision.FLOAT32
    for capability, wanted in (((7, 5), Precision.FLOAT16), ((8, 0), Precision.BFLOAT16), ((9, 0), Precision.BFLOAT16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert resolve(Precision.AUTO, "cuda") is wanted
        assert resolve(Precision.FLOAT32, "cuda") is Precision.FLOAT32


def test_what_auto_became_is_kept_with_the_result(tiny, tmp_path):
    recipe = replace(BASE, model=MLP((6,)), sampler=Poisson(4), epochs=1, precision=Precision.AUTO)
    ensemble = train(tiny, member_masks(24, 2, seed=0), recipe, seeds=(0, 1), store=Store(tmp_path))
    assert ensemble.recipe.precision is Precision.FLOAT32


@pytest.mark.parametrize(("call", "words"), [
    (lambda tiny: replace(BASE, precision="bfloat16"), "precision must be one of"),
    (lambda tiny: train(tiny, member_masks(24, 2, seed=0), replace(BASE, sampler=Poisson(4), precision=HALVES[0]), seeds=(0, 1),
                        dtype=torch.float64), "do not go together"),
    (lambda tiny: Precision.AUTO.dtype, "resolve it for a device"), (lambda tiny: resolve("auto", "cpu"), "precision"),
])
def test_bad_input(tiny, call, words):
    with pytest.raises(ValueError, match=words):
        call(tiny)


def test_products_stay_whole_until_the_last_thread_is_out():
    """The setting is the process's: who comes in second must neither find the first one's as its own, nor lose it early."""
    def lost():
        a = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        return float(((a @ a).double() - a.double() @ a.double()).abs().max())

    torch.set_float32_matmul_precision("medium")
    try:
        before, (first, second) = lost(), (whole_products(), whole_products())
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert lost() < 1e-4
        second.__exit__(None, None, None)
        assert lost() == before and torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(KeyError), whole_products():
            raise KeyError
        assert lost() == before
    finally:
        torch.set_float32_matmul_precision("highest")
