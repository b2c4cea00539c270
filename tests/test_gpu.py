"""What runs on a CPU runs on a card and gives the same numbers: on the card of this machine, or on a pretended one.

In float64 a card may differ by rounding only; the pretended one computes with the CPU's own kernels (tests/pretend_gpu.py).
"""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from pretend_gpu import pretend_gpu
from scipy import stats

from demem_lab import data, doctor, estimate, pairs, protocol, queries
from demem_lab.attacks import PGD, robust_accuracy
from demem_lab.chunks import ChunkHalved
from demem_lab.experiment import profile
from demem_lab.live import Curve, Watch
from demem_lab.mechanisms import SelectiveDP
from demem_lab.models import MLP, ResNet18, SmallCNN
from demem_lab.precision import Precision
from demem_lab.queries import gradient_norms, outputs
from demem_lab.sampling import Poisson, Shuffled
from demem_lab.state import State
from demem_lab.store import Store
from demem_lab.streams import Streams
from demem_lab.subject import ask
from demem_lab.sweep import sweep
from demem_lab.training import Recipe, train

REAL = torch.cuda.is_available()
CARDS_OWN = Streams._on_card
SEEDS = (1, 2)


@pytest.fixture(scope="module", autouse=True)
def no_chunk_is_measured():
    """How many models share a product depends on the machine, and with it rounding: all of them, everywhere."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("demem_lab.training.chunk_size", lambda job, most: job.models)
        yield


@contextmanager
def the_real_one():
    """Random numbers drawn on the CPU, as a card's generators give others; and convolutions in all of float32."""
    uniform, normal, rows = Streams.uniform, Streams.normal, Streams._rows

    def on_cpu(streams):
        return replace(streams, device="cpu")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Streams, "uniform", lambda self, n: uniform(on_cpu(self), n).to(self.device))
        patched.setattr(Streams, "normal", lambda self, n: normal(on_cpu(self), n).to(self.device))
        patched.setattr(Streams, "_rows", lambda self, x, fill: rows(on_cpu(self), x.cpu(), fill).to(x.device))
        patched.setattr(Streams, "_on_card", lambda self, seed, n: self._on_cpu(seed, n).to(self.device))
        patched.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield


def card(capability=(8, 0), memory=16 << 30):
    return the_real_one() if REAL else pretend_gpu(capability, memory)


def toy(shape=(1, 8, 8), n=24):
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))
    return data.Dataset("toy", x, torch.arange(n) % 4, tuple("abcd"), "random numbers", 0.1)


def trained(
    device, model=None, objective="PGD-AT", mechanism="Plain", shape=(1, 8, 8), models=2, dtype=torch.float64, **how
):
    how = {"sampler": Poisson(4), "epochs": 1, "precision": Precision.FLOAT32} | how
    recipe = Recipe(model or MLP((6,)), pairs.OBJECTIVES[objective](), pairs.MECHANISMS[mechanism](), **how)
    members = data.member_masks(24, 2, seed=0)[:models]
    return train(toy(shape), members, recipe, seeds=SEEDS[:models], device=device, trace=True, dtype=dtype)


def on_both(ask_device, *, atol=1e-9):
    """The same dictionary of arrays on the CPU and on a card."""
    plain = ask_device("cpu")
    with card():
        found = ask_device("cuda")
    assert plain.keys() == found.keys()
    for name, wanted in plain.items():
        assert np.allclose(np.asarray(found[name], float), np.asarray(wanted, float), atol=atol, equal_nan=True), name
    return found


def weights(ensemble):
    return {name: tensor.numpy() for name, tensor in ensemble.parameters.items()} | {"trace": ensemble.trace}


def test_the_pretended_card_refuses_what_a_card_refuses():
    with card():
        x = torch.rand(3, device="cuda")
        with pytest.raises(RuntimeError, match="device"):
            x + torch.rand(3)
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, device="cuda", generator=torch.Generator())
        with pytest.raises(RuntimeError, match="device"):
            torch.nn.Linear(3, 2)(x)
        assert (x + 1).device.type == "cuda" and x.cpu().device.type == "cpu" and (x.double().cpu() + torch.ones(3)).sum() > 3


@pytest.mark.parametrize("mechanism", pairs.MECHANISMS)
@pytest.mark.parametrize("objective", ["PGD-AT", "TRADES-AWP"])
def test_every_mechanism_trains_the_same(mechanism, objective):
    on_both(lambda device: weights(trained(device, objective=objective, mechanism=mechanism)))


@pytest.mark.parametrize("objective", ["Natural", "TRADES", "MART", "RS-FGSM", "N-FGSM", "MART-AWP"])
def test_every_objective_trains_the_same(objective):
    on_both(lambda device: weights(trained(device, objective=objective, mechanism="SelectiveDP")))


@pytest.mark.parametrize(("models", "model", "mechanism", "shape"), [
    (2, SmallCNN(), "SelectiveDP", (1, 8, 8)), (1, SmallCNN(), "DPSGD", (1, 8, 8)), (2, SmallCNN(), "Plain", (1, 8, 8)),
    (1, ResNet18(width=4), "SelectiveDP", (3, 16, 16)), (2, ResNet18(width=4), "ClippedRelease", (3, 16, 16)),
])
def test_convolutions_train_the_same(models, model, mechanism, shape):
    on_both(lambda device: weights(trained(device, model, mechanism=mechanism, shape=shape, models=models)))


def test_privacy_noise_is_drawn_on_the_card_in_float64():
    """Where the card is pretended, runs are compared with the CPU's noise in place of its own: here is its own."""
    with card():
        noise = Streams((3, 4), "noise", 2, device="cuda")
        rows = [CARDS_OWN(noise, seed, 20_000) for seed in noise.seeds]
        assert {(row.device.type, row.dtype) for row in rows} == {("cuda", torch.float64)}
        assert noise.private_normal(5).device.type == "cuda"
        rows = [row.cpu().numpy() for row in rows]
    assert all(stats.kstest(row, "norm").pvalue > 1e-4 for row in rows) and abs(np.corrcoef(*rows)[0, 1]) < 0.04


@pytest.mark.parametrize("models", [1, 2])
def test_batch_normalisation_trains_the_same(models):
    how = {"model": ResNet18(width=4, norm="batch"), "sampler": Shuffled(6), "shape": (3, 16, 16), "models": models}
    on_both(lambda device: weights(trained(device, objective="TRADES", **how)))


@pytest.mark.skipif(REAL, reason="this machine's card has the precision that it has")
@pytest.mark.parametrize(("capability", "precision"), [((7, 5), Precision.FLOAT16), ((8, 0), Precision.BFLOAT16)])
@pytest.mark.parametrize("mechanism", ["Plain", "SelectiveDP"])
def test_sixteen_bits_by_default_and_the_same_as_on_a_cpu(capability, precision, mechanism):
    how = {"model": SmallCNN(), "mechanism": mechanism, "dtype": torch.float32}
    plain = trained("cpu", precision=precision, **how)
    with card(capability):
        found = trained("cuda", precision=Precision.AUTO, **how)
    assert found.recipe.precision is precision
    for name, wanted in plain.parameters.items():
        assert found.parameters[name].dtype == torch.float32 and torch.allclose(found.parameters[name], wanted, atol=1e-6)


@pytest.fixture(scope="module")
def ensemble():
    return trained("cpu", SmallCNN(), mechanism="SelectiveDP", epochs=2, dtype=torch.float32)


def test_everything_that_is_asked_of_trained_models(ensemble):
    images = toy()

    def asked(device):
        net = ensemble.network([0], device)
        x, y = images.x.to(device), images.y.to(device)
        attacks = [PGD(0.1, 3, restarts=2), PGD(0.5, 3, norm="l2")]
        return {
            "clean": outputs(ensemble, images, device=device),
            "moved": outputs(ensemble, images, attack=PGD(0.1, 3), device=device, block=7),
            "some": outputs(ensemble, images, device=device, only=ensemble.members.numpy()),
            "norms": gradient_norms(ensemble, images, attack=PGD(0.1, 2), device=device),
            "robust": robust_accuracy(net, x, y, attacks, rng=Streams((3,), "test", 0, device=torch.device(device))),
        }

    on_both(asked, atol=1e-5)


@pytest.mark.parametrize(("large", "chunk", "wanted"), [(1, None, [1, 1]), (10**9, None, [2]), (1, 2, [2]), (10**9, 1, [1, 1])])
def test_how_many_models_are_asked_at_once(ensemble, monkeypatch, large, chunk, wanted):
    asked, answer = [], queries._answer
    monkeypatch.setattr(queries, "LARGE", large)
    monkeypatch.setattr(queries, "_answer", lambda q, stop: (asked.append(q.ensemble.models), answer(q, stop))[1])
    with card():
        found = outputs(ensemble, toy(), device="cuda", chunk=chunk)
    assert asked == wanted and np.allclose(found, outputs(ensemble, toy(), device="cpu"), atol=1e-5)
    with pytest.raises(ValueError, match="chunk"):
        outputs(ensemble, toy(), device="cpu", chunk=0)


def test_somebodys_own_model():
    images = toy()

    def asked(device):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(108, 4))
        sides = {"members": (images.x[:12], images.y[:12]), "non_members": (images.x[12:], images.y[12:])}
        found = ask(net, **sides, eps=0.1, device=device)
        assert next(net.parameters()).device.type == "cpu"  # comes back as it was
        return found.arrays | {"graded": found.graded}

    on_both(asked, atol=1e-5)


def test_an_experiment_and_the_plane_of_the_panel(tmp_path):
    def asked(device):
        lab = profile("smoke").experiment(device=device, progress=False, subset=120, epochs=1)
        lab = replace(lab, store=Store(tmp_path / device), models=4, tuning_models=4)
        run = lab.arm("none")[0]
        plane = sweep(lab, noise_multipliers=(0.0, 1.0), fractions=(0.0, 0.2), seed=0, lr_everybody=lambda sigma: 0.05)
        scores = {name: score for name, score in run.scores.items()}
        return {"risk": lab.risk(0).score, "robust": plane.points["robust"]} | scores

    on_both(asked, atol=1e-3)  # trained in float32, and scores are log ratios


def test_the_protocol_and_its_provenance(tmp_path):
    small = protocol.Protocol(
        dataset="digits", split="train", subset=80, model="mlp", models=4, epochs=1, batch_size=32, query_steps=2, lr=0.05,
        weight_decay=0.0, attack_steps=2, scoring_epochs=8, noise_multiplier=1.5,
    )
    with card():
        results = protocol.run(small, store=Store(tmp_path), device="cuda", progress=False)
        assert results.provenance["device"] == "cuda" and results.provenance["processor"] == torch.cuda.get_device_name(0)
    assert list(results.arms) == list(protocol.arms_of(small))


def test_watching_a_card(tmp_path):
    def asked(device):
        curve = Curve(toy(), attack=PGD(0.1, 2, random_start=False))
        recipe = Recipe(MLP((6,)), pairs.OBJECTIVES["PGD-AT"](), sampler=Poisson(4), epochs=2, precision=Precision.FLOAT32)
        train(toy(), data.member_masks(24, 2, seed=0), recipe, seeds=SEEDS, device=device, watch=Watch(curve.add))
        return curve.points()

    on_both(asked, atol=1e-5)


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    recipe = Recipe(SmallCNN(), mechanism=SelectiveDP(1.0, 1.0, torch.arange(24) < 6), sampler=Poisson(4), epochs=3)
    how = {"seeds": SEEDS, "device": "cuda", "checkpoint_seconds": 0.0, "deterministic": True}
    members, advance, left = data.member_masks(24, 2, seed=0), State.advance, [4]

    def dies(state, *args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return advance(state, *args)

    with card((7, 5)):
        whole = train(toy(), members, recipe, **how)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(State, "advance", dies)
            train(toy(), members, recipe, store=Store(tmp_path), **how)
        steps = []
        monkeypatch.setattr(State, "advance", lambda state, *args: (steps.append(1), advance(state, *args))[1])
        resumed = train(toy(), members, recipe, store=Store(tmp_path), **how)
    assert 0 < len(steps) < whole.steps
    assert all(torch.equal(whole.parameters[name], tensor) for name, tensor in resumed.parameters.items())


def test_a_full_card_halves_the_chunk_and_goes_on(monkeypatch):
    recipe = Recipe(MLP((6,)), sampler=Poisson(4), epochs=1, precision=Precision.FLOAT32)
    members, advance = data.member_masks(24, 4, seed=0), State.advance

    def full(state, *args):
        if state.job.models > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return advance(state, *args)

    whole = train(toy(), members, recipe, seeds=(1, 2, 3, 4), device="cpu", dtype=torch.float64)
    monkeypatch.setattr(State, "advance", full)
    with card(), pytest.warns(ChunkHalved, match="memory of cuda"):
        found = train(toy(), members, recipe, seeds=(1, 2, 3, 4), device="cuda", dtype=torch.float64)
    assert all(torch.allclose(whole.parameters[name], tensor) for name, tensor in found.parameters.items())


@pytest.mark.skipif(REAL, reason="this machine's card says something else")
def test_the_card_is_named():
    with card((7, 5)):
        assert "Pretended 8000" in doctor.gpu().text and estimate.uses("cuda") == "GPU Pretended 8000"
