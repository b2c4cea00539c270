"""A chunk that does not fit is halved and goes on where it was; a task is plain data that any process can carry out."""

import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from demem_lab import chunks, farm
from demem_lab.attacks import PGD
from demem_lab.chunks import ChunkHalved, Task, train_chunk, train_elsewhere
from demem_lab.data import member_masks
from demem_lab.mechanisms import Plain, SelectiveDP
from demem_lab.models import MLP, VGG, Conv, ResNet18
from demem_lab.objectives import AWP, PGDAT
from demem_lab.optimizers import SGD, AdamW
from demem_lab.precision import Precision
from demem_lab.recipe import MODULES, Job, Recipe
from demem_lab.sampling import Poisson, Shuffled
from demem_lab.state import State, cut
from demem_lab.store import code_version
from demem_lab.training import train

MEMBERS, SEEDS = member_masks(24, 4, seed=0), (0, 1, 2, 3)


def recipe(**changes):
    usual = {"model": MLP((6,)), "objective": PGDAT(PGD(0.1, 2)), "optimizer": SGD(lr=0.1), "sampler": Poisson(4), "epochs": 4}
    return Recipe(**{**usual, **changes})


RECIPES = {
    "plain": recipe(), "adamw, a setting each": recipe(optimizer=AdamW(lr=(0.01, 0.02, 0.01, 0.03)), sampler=Shuffled(4)),
    "private": recipe(mechanism=SelectiveDP((0.5, 1.0, 2.0, 1.0), 0.5, torch.arange(24) < 9)),
    "awp": recipe(objective=AWP(PGDAT(PGD(0.1, 1)), 0.1)), "float16": recipe(precision=Precision.FLOAT16),
}


class Memory:
    """A device that holds `most` models at once, and fails at the `where` of a step from `first` on."""

    def __init__(self, monkeypatch, most, first=3, where="update"):
        self.most, self.first, self.steps = most, first, []
        if where == "update":
            for kind in (Plain, SelectiveDP):
                self.wrap(monkeypatch, kind, "update", lambda mechanism, net, seen, batch: (net.models, batch.step))
        elif where == "forward":
            self.wrap(monkeypatch, PGD, "__call__", lambda attack, net, *_, **__: (net.models, self.first))
        elif where == "start":
            self.wrap(monkeypatch, State, "__init__", lambda state, job: (job.models, self.first))
        else:
            real = State.advance

            def advance(state):
                if state.models > self.most and state.step >= self.first:
                    state.consistent = False  # as in the middle of the optimizer
                    raise torch.OutOfMemoryError("planted")
                self.steps.append((state.models, state.step))
                real(state)

            monkeypatch.setattr(State, "advance", advance)

    def wrap(self, monkeypatch, kind, name, size):
        real = getattr(kind, name)

        def limited(*given, **named):
            models, step = size(*given, **named)
            if models > self.most and step >= self.first:
                raise torch.OutOfMemoryError("planted")
            self.steps.append((models, step))
            return real(*given, **named)

        monkeypatch.setattr(kind, name, limited)


def same(a, b):
    return all(torch.allclose(a.parameters[n], t, atol=1e-9) for n, t in b.parameters.items()) and np.allclose(a.losses, b.losses)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("kept", [False, True])
def test_out_of_memory_halves_and_goes_on_where_it_was(tiny, store, monkeypatch, name, kept):
    setting = {"seeds": SEEDS, "chunk": 4, "trace": True} | ({} if name == "float16" else {"dtype": torch.float64})
    whole = train(tiny, MEMBERS, RECIPES[name], **setting)
    memory = Memory(monkeypatch, 2)
    with pytest.warns(ChunkHalved, match="4 models at once do not fit into the memory of cpu; going on with 2"):
        found = train(tiny, MEMBERS, RECIPES[name], **setting, store=store if kept else None)
    if name == "float16":  # rounding in 16 bits follows the shape of the batch
        assert all((whole.parameters[n] - t).abs().max() < 0.01 for n, t in found.parameters.items())
    else:
        assert same(whole, found) and np.allclose(whole.trace, found.trace, equal_nan=True)
    if name == "plain":  # nothing is done twice: three steps together, the others in halves
        assert memory.steps == [(4, 0), (4, 1), (4, 2), *[(2, t) for t in range(3, 12)] * 2]
    if kept:
        assert {e["kind"] for e in store.entries()} == {"ensemble"}


@pytest.mark.parametrize("where", ["forward", "start", "optimizer"])
def test_memory_may_run_out_anywhere(tiny, store, monkeypatch, where):
    chosen = recipe(mechanism=SelectiveDP(1.0, 0.5, torch.arange(24) < 9))
    whole = train(tiny, MEMBERS, chosen, seeds=SEEDS, chunk=4, dtype=torch.float64)
    Memory(monkeypatch, 1, where=where)
    with pytest.warns(ChunkHalved) as told:
        found = train(tiny, MEMBERS, chosen, seeds=SEEDS, chunk=4, dtype=torch.float64, store=store)
    assert same(whole, found)
    assert [str(t.message).split(" models")[0] for t in told if t.category is ChunkHalved] == ["4", "2"]  # told once each


def test_later_chunks_start_small(tiny, monkeypatch):
    monkeypatch.setenv("DEMEM_WORKERS", "1")
    members = member_masks(24, 8, seed=0)
    whole = train(tiny, members, recipe(), seeds=range(8), chunk=4, dtype=torch.float64)
    memory = Memory(monkeypatch, 2, first=0)
    with pytest.warns(ChunkHalved) as told:
        assert same(whole, train(tiny, members, recipe(), seeds=range(8), chunk=4, dtype=torch.float64))
    assert len([t for t in told if t.category is ChunkHalved]) == 1 and {m for m, _ in memory.steps} == {2}


def test_running_statistics_move_once_although_the_step_is_done_again(tiny, monkeypatch):
    data = replace(tiny, x=torch.nn.functional.interpolate(tiny.x, scale_factor=2))
    chosen = Recipe(model=VGG(width=4, norm="batch"), sampler=Shuffled(4), epochs=2)
    whole = train(data, MEMBERS, chosen, seeds=SEEDS, chunk=4, dtype=torch.float64)
    Memory(monkeypatch, 2)
    with pytest.warns(ChunkHalved):
        assert same(whole, train(data, MEMBERS, chosen, seeds=SEEDS, chunk=4, dtype=torch.float64))


def test_one_model_too_many_is_one_sentence_and_nothing_is_lost(tiny, store, monkeypatch):
    whole = train(tiny, MEMBERS, recipe(), seeds=SEEDS, chunk=1, dtype=torch.float64)
    monkeypatch.setenv("DEMEM_WORKERS", "1")
    with monkeypatch.context() as patch:
        Memory(patch, 0, first=5)
        with warnings.catch_warnings(), pytest.raises(MemoryError) as error:
            warnings.simplefilter("ignore", ChunkHalved)
            train(tiny, MEMBERS, recipe(), seeds=SEEDS, chunk=2, dtype=torch.float64, store=store, checkpoint_seconds=0)
    assert str(error.value).startswith("the memory of cpu does not hold one model with batches of 4: take a smaller batch_size")
    assert str(store.root) in str(error.value) and "\n" not in str(error.value)
    memory = Memory(monkeypatch, 4)
    found = train(tiny, MEMBERS, recipe(), seeds=SEEDS, chunk=2, dtype=torch.float64, store=store)
    assert min(step for _, step in memory.steps[:7]) >= 4 and same(whole, found)


def test_the_probe_survives_sizes_that_do_not_fit(tiny, monkeypatch):
    monkeypatch.setattr(chunks, "_probed", {})
    Memory(monkeypatch, 1, first=0)
    job = Job(tiny, MEMBERS, recipe(), SEEDS, torch.device("cpu"), False, torch.float32, 12.0)
    assert chunks.chunk_size(job, 4) == 1


def test_a_cut_checkpoint_is_that_of_the_models_alone(tiny):
    """Two models: the scale and the step have as many entries as there are models, and are still everybody's."""
    chosen = recipe(precision=Precision.FLOAT16, optimizer=AdamW(lr=(0.01, 0.02)))
    job = Job(tiny, MEMBERS[:2], chosen, SEEDS[:2], torch.device("cpu"), True, torch.float32, 12.0)
    state = State(job)
    for _ in range(4):
        state.advance()
    part = State(job.part([1]))
    part.restore(cut(state.arrays(), [1], 2))
    assert part.step == 4 and part.scaler.state().tolist() == state.scaler.state().tolist()
    for name, tensor in part.net.state().items():
        assert torch.equal(tensor[0], state.net.state()[name][1])
    for name, tensor in part.optimizer.state().items():
        assert tensor.ndim == 0 or torch.equal(tensor[0], state.optimizer.state()[name][1])


def test_a_task_survives_being_sent(tiny, store):
    job = Job(tiny, MEMBERS[:2], recipe(), SEEDS[:2], torch.device("cpu"), False, torch.float32, 12.0)
    sent = pickle.loads(pickle.dumps(Task(job, store, 1.0, code_version(MODULES))))
    here, there = train_chunk(Task(job)), train_elsewhere(sent)
    assert all(np.array_equal(here[name], a) for name, a in there.items()) and [e["kind"] for e in store.entries()] == ["chunk"]


def test_another_version_is_refused(tiny):
    job = Job(tiny, MEMBERS[:2], recipe(), SEEDS[:2], torch.device("cpu"), False, torch.float32, 12.0)
    with pytest.raises(RuntimeError, match="another version of demem_lab or torch"):
        train_elsewhere(Task(job, code="other"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_worker_without_the_device_is_one_sentence(tiny):
    job = Job(tiny, MEMBERS[:2], recipe(), SEEDS[:2], torch.device("cuda"), False, torch.float32, 12.0)
    with pytest.raises(RuntimeError, match="a worker has no GPU, but the run is for cuda: give it workers of one kind"):
        train_elsewhere(Task(job, code=code_version(MODULES)))


def test_deterministic_runs_are_equal_and_the_mode_ends_with_them(tiny, store, monkeypatch):
    seen, real = [], State.advance
    monkeypatch.setattr(State, "advance", lambda s: (seen.append(torch.are_deterministic_algorithms_enabled()), real(s))[1])
    monkeypatch.setenv("DEMEM_WORKERS", "2")
    a, b = (train(tiny, MEMBERS, recipe(), seeds=SEEDS, chunk=2, deterministic=True) for _ in range(2))
    assert all(torch.equal(a.parameters[n], t) for n, t in b.parameters.items())
    assert all(seen) and len(seen) == 48 and not torch.are_deterministic_algorithms_enabled()
    assert train(tiny, MEMBERS, recipe(), seeds=SEEDS, chunk=2, deterministic=True, store=store).fresh
    assert train(tiny, MEMBERS, recipe(), seeds=SEEDS, chunk=2, store=store).fresh  # another question


def test_the_deterministic_mode_lasts_until_the_last_user_has_left():
    with farm.deterministic():
        with farm.deterministic(), farm.deterministic(False):
            pass
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_compiled_body_is_used_in_every_pass(tiny, monkeypatch, norm):
    data = replace(tiny, x=torch.nn.functional.interpolate(tiny.x, scale_factor=2))
    chosen = Recipe(model=VGG(width=4, norm=norm), objective=PGDAT(PGD(0.1, 1)), sampler=Shuffled(4), epochs=1)
    plain = train(data, MEMBERS[:2], chosen, seeds=SEEDS[:2], chunk=2)
    passes = []

    def fake(body, dynamic):
        return lambda x: (passes.append(dynamic), body(x))[1]

    monkeypatch.setattr(torch, "compile", fake)
    fused = train(data, MEMBERS[:2], chosen, seeds=SEEDS[:2], chunk=2, compiled=True)
    assert len(passes) == 1 + 3 * 2 and all(passes)  # a trial, then attack and loss of three steps
    assert all(torch.equal(plain.parameters[n], t) for n, t in fused.parameters.items())


def test_what_cannot_be_compiled_goes_on_without(tiny, monkeypatch):
    def broken(body, dynamic):
        def fails(x):
            raise RuntimeError("no compiler here\nlong trace")
        return fails

    monkeypatch.setattr(torch, "compile", broken)
    plain = train(tiny, MEMBERS, recipe(), seeds=SEEDS, chunk=4)
    with pytest.warns(UserWarning, match=r"could not be compiled \(no compiler here\); going on without"):
        found = train(tiny, MEMBERS, recipe(), seeds=SEEDS, chunk=4, compiled=True)
    assert all(torch.equal(plain.parameters[n], t) for n, t in found.parameters.items())


def test_only_attacks_are_compiled_where_layers_are_to_be_seen(tiny, monkeypatch):
    data = replace(tiny, x=torch.nn.functional.interpolate(tiny.x, scale_factor=2))
    private = SelectiveDP(1.0, 1.0, torch.arange(24) < 6)
    chosen = Recipe(model=VGG(width=4), objective=PGDAT(PGD(0.1, 2)), mechanism=private, sampler=Shuffled(4), epochs=1)
    plain = train(data, MEMBERS[:2], chosen, seeds=SEEDS[:2], chunk=2)
    passes = []
    monkeypatch.setattr(torch, "compile", lambda body, dynamic: lambda x: (passes.append(x.requires_grad), body(x))[1])
    fused = train(data, MEMBERS[:2], chosen, seeds=SEEDS[:2], chunk=2, compiled=True)
    assert len(passes) == 1 + 2 * 3 and all(passes)  # a trial, then the two steps of three attacks
    assert all(torch.equal(plain.parameters[n], t) for n, t in fused.parameters.items())


def test_channels_last_changes_the_layout_only(monkeypatch):
    net = VGG(width=4).build(models=1, shape=(3, 8, 8), classes=4, seeds=(0,)).double()
    x = torch.rand(5, 3, 8, 8, dtype=torch.float64)
    plain, layouts, real = net(x), [], Conv.forward
    net.arranged_for("cuda")

    def watch(layer, h):
        layouts.append(h.is_contiguous(memory_format=torch.channels_last))
        return real(layer, h)

    monkeypatch.setattr(Conv, "forward", watch)
    assert torch.allclose(net(x), plain, atol=1e-12) and layouts == [True] * 6
    assert not net.arranged_for("cpu").channels_last  # group normalisation loses there what convolutions win
    mixed = ResNet18(width=8, norm="batch").build(models=1, shape=(3, 8, 8), classes=4, seeds=(0,))
    assert mixed.arranged_for("cpu").channels_last
    several = VGG(width=4).build(models=2, shape=(3, 8, 8), classes=4, seeds=(0, 1))
    assert not several.arranged_for("cuda").channels_last
    assert not MLP().build(models=1, shape=(3, 8, 8), classes=4, seeds=(0,)).arranged_for("cuda").channels_last
