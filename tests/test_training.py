"""Training: many at once is one by one, interrupted is uninterrupted, bad input stops before anything is trained."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from demem_lab import data
from demem_lab.attacks import PGD
from demem_lab.augment import CropFlip
from demem_lab.data import member_masks
from demem_lab.mechanisms import DPSGD, DownWeight, Drop, LossVariance, Mechanism, Plain, SelectiveDP, look_up
from demem_lab.models import MLP, Network, ResNet18, SmallCNN
from demem_lab.objectives import AWP, PGDAT, TRADES, Natural, PerSample
from demem_lab.optimizers import SGD, AdamW, HalfFlat
from demem_lab.queries import gradient_norms, outputs
from demem_lab.remedies import GradedRelease
from demem_lab.sampling import Poisson, Shuffled
from demem_lab.state import State
from demem_lab.store import Store, StoreWarning
from demem_lab.streams import model_seeds
from demem_lab.training import Recipe, train


def recipe(**changes):
    usual = {"model": MLP((6,)), "objective": PGDAT(PGD(0.1, 2)), "optimizer": SGD(lr=0.1), "sampler": Poisson(4)}
    return Recipe(**{**usual, "epochs": 20 / 3, **changes})


MEMBERS, SEEDS = member_masks(24, 4, seed=0), model_seeds(0, 4)
RECIPES = {
    "plain": recipe(), "selective": recipe(mechanism=SelectiveDP((0.0, 0.5, 1.0, 2.0), 0.5, torch.arange(24) < 9)),
    "trades": recipe(objective=TRADES(PGD(0.1, 2)), optimizer=AdamW(lr=(0.01, 0.02, 0.01, 0.02))),
    "variance": recipe(mechanism=LossVariance(0.2), sampler=Shuffled(4)),
}


def distance(a, b):
    return max(float((a.parameters[name] - b).abs().max()) for name, b in b.parameters.items())


def alone(tiny, chosen, m, **changes):
    part = replace(chosen, mechanism=chosen.mechanism.for_models([m], 4), optimizer=chosen.optimizer.for_models([m], 4))
    one = train(tiny, MEMBERS[m : m + 1], part, seeds=SEEDS[m : m + 1], **changes)
    return one


@pytest.mark.parametrize("name", RECIPES)
def test_many_at_once_equal_one_by_one_in_double_precision(tiny, name):
    together = train(tiny, MEMBERS, RECIPES[name], seeds=SEEDS, dtype=torch.float64, chunk=4)
    assert together.steps == 20
    for m in (0, 3):
        one = alone(tiny, RECIPES[name], m, dtype=torch.float64)
        for key, tensor in one.parameters.items():
            assert (tensor[0] - together.parameters[key][m]).abs().max() < 1e-8


@pytest.mark.parametrize("name", RECIPES)
def test_three_steps_agree_in_single_precision(tiny, name):
    short = replace(RECIPES[name], epochs=1.0)
    together = train(tiny, MEMBERS, short, seeds=SEEDS, chunk=4)
    assert together.steps == 3
    for key, tensor in alone(tiny, short, 2).parameters.items():
        assert (tensor[0] - together.parameters[key][2]).abs().max() < 1e-4


def test_chunks_and_workers_change_nothing(tiny, monkeypatch):
    found = []
    for chunk, workers in ((4, "1"), (3, "2"), (1, "2")):
        monkeypatch.setenv("DEMEM_WORKERS", workers)
        found.append(train(tiny, MEMBERS, recipe(mechanism=DPSGD(1.0)), seeds=SEEDS, chunk=chunk, dtype=torch.float64))
    assert distance(found[0], found[1]) < 1e-8 and distance(found[0], found[2]) < 1e-8


def test_a_chunk_draws_at_the_rate_of_the_whole_design(tiny):
    members = torch.arange(24) < torch.tensor([[20], [10], [18], [8]])  # 14 on average
    short = recipe(objective=Natural(), epochs=3)
    a, b = (train(tiny, members, short, seeds=SEEDS, chunk=chunk, dtype=torch.float64) for chunk in (4, 1))
    assert distance(a, b) < 1e-8


@pytest.mark.parametrize("chunk", [2, None])
def test_training_inside_no_grad(tiny, chunk, monkeypatch):
    monkeypatch.setenv("DEMEM_WORKERS", "1")  # in this thread: others have a mode of their own
    right = train(tiny, MEMBERS, RECIPES["plain"], seeds=SEEDS, chunk=chunk, dtype=torch.float64)
    with torch.no_grad():
        found = train(tiny, MEMBERS, RECIPES["plain"], seeds=SEEDS, chunk=chunk, dtype=torch.float64)
    assert distance(found, right) < 1e-8


def test_the_probed_chunk_size_is_used_and_harmless(tiny):
    probed = train(tiny, MEMBERS, recipe(), seeds=SEEDS, dtype=torch.float64)
    assert distance(probed, train(tiny, MEMBERS, recipe(), seeds=SEEDS, dtype=torch.float64, chunk=2)) < 1e-8


@pytest.mark.parametrize("stop_at", [1, 7, 19])
def test_an_interrupted_run_goes_on_where_it_was(tiny, store, monkeypatch, stop_at):
    whole = train(tiny, MEMBERS, recipe(mechanism=DPSGD(1.0)), seeds=SEEDS, chunk=4, trace=True)
    monkeypatch.setenv("DEMEM_WORKERS", "1")
    real, calls = State.advance, []

    def counted(state):
        if len(calls) == stop_at:
            calls.append("interrupt")
            raise KeyboardInterrupt
        calls.append(state.step)
        real(state)

    monkeypatch.setattr(State, "advance", counted)
    setting = {"seeds": SEEDS, "chunk": 4, "store": store, "trace": True}
    with pytest.raises(KeyboardInterrupt):
        train(tiny, MEMBERS, recipe(mechanism=DPSGD(1.0)), **setting)
    calls.append("again")
    resumed = train(tiny, MEMBERS, recipe(mechanism=DPSGD(1.0)), **setting)
    after = calls[calls.index("again") + 1 :]
    assert after == list(range(stop_at, 20))  # nothing is done twice
    assert distance(whole, resumed) == 0.0
    assert np.array_equal(whole.trace, resumed.trace, equal_nan=True) and np.allclose(whole.losses, resumed.losses)
    assert {e["kind"] for e in store.entries()} == {"ensemble"}  # checkpoints are cleared away


RESUMED = {
    "adamw, shuffled": (recipe(optimizer=AdamW(lr=(0.01, 0.02, 0.01, 0.02)), sampler=Shuffled(4)), {}),
    "momentum, noise": (recipe(mechanism=SelectiveDP(1.0, 0.5, torch.arange(24) < 9)), {"trace": True}),
    "batch norm": (Recipe(model=ResNet18(width=4, norm="batch"), sampler=Shuffled(4), epochs=2), {}),
}


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_run_that_could_save_nothing_goes_on_from_its_checkpoint(tiny, store, monkeypatch, name, error):
    chosen, setting = RESUMED[name][0], {"seeds": SEEDS, "chunk": 4, **RESUMED[name][1]}
    whole = train(tiny, MEMBERS, chosen, **setting)
    monkeypatch.setenv("DEMEM_WORKERS", "1")
    kind = type(chosen.optimizer.start([torch.zeros(4, 1)]))
    real, calls = kind.apply, []

    def fails_at_4(self, *arguments):
        calls.append(1)
        real(self, *arguments)
        if len(calls) == 5:
            raise error("planted")  # the weights have moved, the step is not over: this state must not be kept

    monkeypatch.setattr(kind, "apply", fails_at_4)
    with pytest.raises(error, match="planted"):
        train(tiny, MEMBERS, chosen, **setting, store=store, checkpoint_seconds=0)
    assert {e["kind"] for e in store.entries()} == {"checkpoint"}
    resumed = train(tiny, MEMBERS, chosen, **setting, store=store)
    assert len(calls) == whole.steps + 1  # the step that failed is done again, none before it
    assert distance(whole, resumed) == 0.0 and np.array_equal(whole.losses, resumed.losses)


def test_interrupting_one_worker_saves_the_others(tiny, store, monkeypatch):
    monkeypatch.setenv("DEMEM_WORKERS", "2")
    real, armed = State.advance, [True]

    def fail_once(state):
        if state.step == 10 and armed:
            armed.clear()
            raise KeyboardInterrupt
        real(state)

    monkeypatch.setattr(State, "advance", fail_once)
    with pytest.raises(KeyboardInterrupt):
        train(tiny, MEMBERS, recipe(), seeds=SEEDS, chunk=2, store=store)
    assert {e["kind"] for e in store.entries()} & {"checkpoint", "chunk"}
    resumed = train(tiny, MEMBERS, recipe(), seeds=SEEDS, chunk=2, store=store)
    assert distance(resumed, train(tiny, MEMBERS, recipe(), seeds=SEEDS, chunk=2)) == 0.0


def test_results_are_reused_and_a_damaged_one_is_computed_again(tiny, store):
    first = train(tiny, MEMBERS, recipe(), seeds=SEEDS, chunk=4, store=store)
    second = train(tiny, MEMBERS, recipe(), seeds=SEEDS, chunk=4, store=store)
    assert first.fresh and not second.fresh and distance(first, second) == 0.0
    file = next(store.root.glob("ensemble/*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.warns(StoreWarning, match="computed again"):
        third = train(tiny, MEMBERS, recipe(), seeds=SEEDS, chunk=4, store=store)
    assert third.fresh and distance(first, third) == 0.0


def test_other_settings_are_other_results(tiny, store):
    base = train(tiny, MEMBERS, recipe(), seeds=SEEDS, chunk=4, store=store)
    for changed in (recipe(optimizer=SGD(lr=0.2)), recipe(mechanism=Drop(torch.arange(24) < 3)), recipe(epochs=6.0)):
        other = train(tiny, MEMBERS, changed, seeds=SEEDS, chunk=4, store=store)
        assert other.fresh and distance(base, other) > 1e-4
    assert distance(base, train(tiny, MEMBERS, recipe(), seeds=model_seeds(1, 4), chunk=4, store=store)) > 1e-2


def test_nobody_protected_trains_like_plain_and_everybody_like_dpsgd(tiny):
    everybody = torch.ones(24, dtype=torch.bool)
    for flags, same in ((~everybody, Plain()), (everybody, DPSGD(1.0, 0.5))):
        a, b = (train(tiny, MEMBERS, recipe(mechanism=m), seeds=SEEDS, dtype=torch.float64, chunk=4)
                for m in (SelectiveDP(1.0, 0.5, flags), same))
        assert distance(a, b) < 1e-9


def test_outputs_are_each_models_own_answers(tiny):
    ensemble = train(tiny, MEMBERS, recipe(), seeds=SEEDS)
    attack = PGD(0.1, 3, random_start=False)
    clean, moved = outputs(ensemble, tiny, block=7), outputs(ensemble, tiny, attack=attack, block=7)
    assert clean.shape == moved.shape == (4, 24, 3)
    for m in range(4):
        net = ensemble.network([m])
        assert np.allclose(clean[m], net(tiny.x).detach(), atol=1e-5)
        assert np.allclose(moved[m], net(attack(net, tiny.x, tiny.y)).detach(), atol=1e-4)


def test_random_starts_of_a_query_belong_to_the_model(tiny, monkeypatch):
    ensemble, attack, found = train(tiny, MEMBERS, recipe(), seeds=SEEDS), PGD(0.1, 2), []
    for workers in ("1", "2", "4"):
        monkeypatch.setenv("DEMEM_WORKERS", workers)
        found.append(outputs(ensemble, tiny, attack=attack))
    assert np.allclose(found[0], found[1], atol=1e-4) and np.allclose(found[0], found[2], atol=1e-4)
    assert not np.allclose(found[0], outputs(ensemble, tiny, attack=replace(attack, random_start=False)), atol=1e-3)


def test_every_block_of_a_query_has_random_starts_of_its_own(tiny):
    ensemble = train(tiny, MEMBERS[:2], recipe(epochs=3), seeds=SEEDS[:2])
    alike = replace(tiny, x=tiny.x[:1].expand(24, -1, -1, -1).contiguous())
    found = outputs(ensemble, alike, attack=PGD(0.1, 1, step_size=0.0), block=8)  # nothing but the start moves an image
    assert len(np.unique(found[0], axis=0)) == 24


def test_queries_attack_every_sample_at_full_strength(tiny):
    ensemble = train(tiny, MEMBERS[:1], recipe(), seeds=SEEDS[:1])
    pgd = PGD(0.1, 5, random_start=False)
    clean, moved = (torch.from_numpy(outputs(ensemble, tiny, attack=attack)[0]) for attack in (None, pgd))
    before, after = (torch.nn.functional.cross_entropy(z, tiny.y, reduction="none") for z in (clean, moved))
    fooled = clean.argmax(1) != tiny.y
    assert fooled.any() and (after > before + 1e-3)[fooled].all()


def test_losses_are_the_mean_of_the_trace(tiny):
    ensemble = train(tiny, MEMBERS, recipe(sampler=Shuffled(4), epochs=4), seeds=SEEDS, trace=True)
    assert np.allclose(np.nanmean(ensemble.trace, 2), ensemble.losses, atol=1e-5)


def test_divisor_steps_and_rate_do_not_depend_on_the_draw(tiny, monkeypatch):
    seen, real = [], Plain.update
    monkeypatch.setattr(Plain, "update", lambda *given: (seen.append(given[-1]), real(*given))[1])
    ensemble = train(tiny, MEMBERS, recipe(), seeds=SEEDS, chunk=4)
    assert [b.step for b in seen] == list(range(20)) and {(b.divisor, b.total_steps) for b in seen} == {(4.0, 20)}
    assert len({tuple(b.valid.sum(1).tolist()) for b in seen}) > 5 and ensemble.sampling_rate == pytest.approx(4 / 12)


def test_the_trace_is_missing_exactly_where_a_sample_was_not_drawn(tiny):
    ensemble = train(tiny, MEMBERS, recipe(epochs=4), seeds=SEEDS, trace=True, chunk=4)
    draw = Poisson(4).start(MEMBERS, SEEDS, ensemble.sampling_rate, 3)
    drawn = np.zeros(ensemble.trace.shape, dtype=bool)
    for step in range(ensemble.steps):
        index, valid = draw(step)
        for m in range(4):
            drawn[m, step // 3, index[m][valid[m]].numpy()] = True
    assert np.array_equal(~np.isnan(ensemble.trace), drawn)


def test_training_learns(digits):
    members = member_masks(digits.n, 2, seed=0)
    ensemble = train(digits, members, recipe(model=MLP((32,)), sampler=Poisson(20), epochs=15), seeds=(0, 1))
    right = outputs(ensemble, digits).argmax(-1) == digits.y.numpy()
    assert right[members.numpy()].mean() > 0.9 and (np.diff(ensemble.losses[:, [0, -1]], axis=1) < 0).all()


@pytest.mark.parametrize("spec", [SmallCNN(width=4, hidden=8), ResNet18(width=8)], ids=["cnn", "resnet"])
def test_convolutional_models_train_with_every_kind_of_mechanism(digits, spec):
    members = member_masks(digits.n, 2, seed=0)
    for mechanism in (Plain(), SelectiveDP(0.5, 1.0, torch.arange(200) < 20)):
        chosen = Recipe(model=spec, mechanism=mechanism, sampler=Poisson(20), epochs=0.6)
        assert np.isfinite(outputs(train(digits, members, chosen, seeds=(0, 1)), digits)).all()


def normed(norm, members, seeds, *, change=False, mechanism=None, **how):
    x = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    if change is not False:  # of samples that are nobody's members, or of those
        same = members.any(0) if change is True else ~change
        x = torch.where(same[:, None, None, None], x, 1 - x)
    images = data.Dataset("made", x, torch.arange(20) % 4, tuple("abcd"), "made", 0.1)
    settings = Recipe(
        model=ResNet18(width=4, norm=norm), mechanism=mechanism or Plain(), sampler=Shuffled(6), epochs=2, optimizer=SGD(lr=0.1),
    )
    return train(images, members, settings, seeds=seeds, dtype=torch.float64, **how)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_who_is_no_member_is_not_even_seen(norm):
    ten = torch.arange(20)[None] < 10  # the second batch of an epoch has room for two more
    one, other = (normed(norm, ten, (1,), change=change) for change in (False, True))
    assert one.steps == 4 and distance(one, other) == 0


def test_a_batch_of_nobody_moves_no_statistics():
    """The second model of an uneven design sees its members in every other batch; the rest hold padding only."""
    members = torch.stack([torch.arange(20) < n for n in (20, 6)])
    runs = [normed("batch", members, (1, 2), change=change) for change in (False, ~members[1])]
    assert runs[0].steps == 4
    for name in runs[0].parameters:
        assert torch.equal(*(run.parameters[name][1] for run in runs)), name


@pytest.mark.parametrize(("mechanism", "members"), [
    (Drop(torch.arange(20) % 5 == 0), member_masks(20, 2, seed=0)),
    (Plain(), torch.stack([torch.arange(20) < n for n in (10, 13)])),
])
def test_batch_norm_of_one_model_does_not_see_what_fills_up_another_ones_batch(mechanism, members):
    together = normed("batch", members, (1, 2), mechanism=mechanism, chunk=2)
    for m in range(2):
        alone = normed("batch", members[m : m + 1], (1 + m,), mechanism=mechanism)
        if len(set(members.sum(1).tolist())) == 1:  # else the number of steps is another one
            assert all(torch.equal(together.parameters[name][m], t[0]) for name, t in alone.parameters.items())
    apart = normed("batch", members, (1, 2), mechanism=mechanism, chunk=1)
    assert distance(together, apart) == 0


def test_shuffled_batches_train_without_a_guarantee(tiny):
    chosen = recipe(mechanism=DPSGD(1.0), sampler=Shuffled(4), epochs=1)
    found = train(tiny, MEMBERS[:2], chosen, seeds=SEEDS[:2]).guarantee(delta=1e-5)
    assert not found.holds and "shuffled batches" in str(found)


def test_batch_norm_trains_without_a_guarantee(digits):
    members = member_masks(digits.n, 2, seed=0)
    chosen = Recipe(model=ResNet18(width=8, norm="batch"), mechanism=DPSGD(1.0), sampler=Shuffled(20), epochs=0.4)
    found = train(digits, members, chosen, seeds=(0, 1)).guarantee(delta=1e-5)
    assert not found.holds and "batch normalisation" in str(found)


def test_progress_can_be_shown(tiny, capsys):
    train(tiny, MEMBERS, recipe(), seeds=SEEDS, progress=True, label="watch me")
    assert "watch me" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "words"), [
    ({"members": MEMBERS[:, :20]}, "membership mask must have shape"), ({"members": MEMBERS.float()}, "must be bool"),
    ({"members": MEMBERS & False}, "have none"), ({"members": MEMBERS[:0], "seeds": ()}, "at least one"),
    ({"seeds": SEEDS[:3]}, "4 seeds, got 3"),
    ({"recipe": recipe(sampler=Poisson(50))}, "batch_size.*50.*12 members"),
    ({"recipe": recipe(mechanism=SelectiveDP(1.0, 1.0, torch.arange(23) < 9))}, "one entry for each of the 24"),
    ({"recipe": recipe(mechanism=SelectiveDP((1.0, 2.0)))}, "2 entries for 4 models"),
    ({"recipe": recipe(optimizer=SGD(lr=(0.1, 0.2)))}, "2 entries for 4 models"),
    ({"recipe": recipe(model=ResNet18(norm="batch"))}, "Poisson"), ({"chunk": 0}, "chunk"),
    ({"seeds": 3}, r"seeds must be .*one for each of the 4 models, got 3; model_seeds\(0, 4\) makes them"),
    ({"seeds": "1234"}, "seeds must be .*got '1234'"), ({"seeds": (0.5, 1, 2, 3)}, "a seed must be a whole number, got 0.5"),
    ({"seeds": (0, 1, 2, "x")}, "a seed must be a number.*got 'x'"), ({"seeds": (0, 1, 2, True)}, "a seed must be .*got True"),
    ({"members": MEMBERS.tolist()}, "membership mask must have shape.*got list"),
    ({"members": MEMBERS.float().numpy()}, "must be bool, got float32; compare"),
    ({"device": "tpu"}, "device must be 'auto', 'cpu' or 'cuda'.*got 'tpu'"), ({"device": "non sense"}, "device must be"),
    ({"device": "mps"}, "device must be .*got 'mps'"), ({"device": None}, "device must be .*got None"),
    ({"dtype": "float32"}, "dtype must be one of torch.float32, torch.float64, got 'float32'"),
    ({"dtype": torch.float16}, r"dtype must be .*got torch.float16; for 16 bits .*Recipe\(precision"),
    ({"recipe": Recipe}, "recipe must be a Recipe"), ({"recipe": MLP()}, r"recipe must be a Recipe.*got MLP\("),
])
def test_bad_input_is_refused_before_training(tiny, change, words):
    setting = {"members": MEMBERS, "recipe": recipe(), "seeds": SEEDS} | change
    with pytest.raises(ValueError, match=words):
        train(tiny, setting.pop("members"), setting.pop("recipe"), **setting)


@pytest.mark.parametrize(("field", "value", "words"), [
    ("model", "mlp", r"model must be an object such as MLP\(\), got 'mlp'"), ("model", MLP, "model must be .*got the class MLP"),
    ("objective", PGDAT, "objective must be an object such as PGDAT.*got the class PGDAT"), ("objective", "trades", "must be"),
    ("mechanism", DPSGD, r"mechanism must be a Mechanism, such as Plain\(\), got the function DPSGD"),
    ("mechanism", SelectiveDP, "got the class SelectiveDP"), ("mechanism", None, "mechanism must be"),
    ("optimizer", SGD, "optimizer must be"), ("optimizer", 0.1, "optimizer must be"), ("sampler", Poisson, "sampler must be"),
    ("sampler", 50, r"sampler must be an object such as Poisson\(50\), got 50"), ("schedule", HalfFlat, "schedule must be"),
    ("augment", CropFlip, "augment must be"), ("augment", True, "augment must be an object such as CropFlip"),
])
def test_a_recipe_is_made_of_objects(field, value, words):
    with pytest.raises(ValueError, match=words):
        recipe(**{field: value})


@pytest.mark.parametrize("dataset", [torch.rand(24, 1, 4, 4), "digits", data.Dataset])
def test_only_a_dataset_can_be_trained_on(dataset):
    with pytest.raises(ValueError, match="dataset must be a Dataset"):
        train(dataset, MEMBERS, recipe(), seeds=SEEDS)


def test_masks_and_seeds_may_come_from_numpy(tiny, store):
    setting = {"dtype": torch.float64, "store": store}
    right = train(tiny, MEMBERS, recipe(), seeds=SEEDS, **setting)
    mask = MEMBERS.numpy().copy()
    mask.setflags(write=False)
    found = train(tiny, mask, recipe(), seeds=np.array(SEEDS), **setting)
    assert distance(right, found) == 0 and not found.fresh  # one and the same question
    assert torch.equal(found.members, MEMBERS) and found.seeds == SEEDS


@pytest.mark.parametrize("epochs", [0, -1, float("nan")])
def test_bad_epochs(epochs):
    with pytest.raises(ValueError, match="epochs"):
        recipe(epochs=epochs)


KILLED = """
import sys, time, torch
sys.path.insert(0, sys.argv[2])
from demem_lab import data, training
from demem_lab.state import State
from demem_lab.store import Store
from test_training import MEMBERS, SEEDS, recipe
generator = torch.Generator().manual_seed(0)
tiny = data.Dataset("tiny", torch.rand(24, 1, 4, 4, generator=generator), torch.arange(24) % 3, ("a", "b", "c"), "made", 0.1)
real = State.advance

def slow(state):
    real(state)
    print(state.step, flush=True)
    time.sleep(0.05)

State.advance = slow
training.train(tiny, MEMBERS, recipe(), seeds=SEEDS, chunk=4, store=Store(sys.argv[1]), checkpoint_seconds=0.0)
"""


def test_a_killed_run_continues_from_its_checkpoint(tiny, tmp_path, monkeypatch):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"DEMEM_WORKERS": "1"},
    )
    while int(process.stdout.readline()) < 9:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    real, steps = State.advance, []

    def counted(state):
        steps.append(state.step)
        real(state)

    monkeypatch.setattr(State, "advance", counted)
    monkeypatch.setenv("DEMEM_WORKERS", "1")
    resumed = train(tiny, MEMBERS, recipe(), seeds=SEEDS, chunk=4, store=Store(tmp_path))
    assert 7 <= steps[0] and steps == list(range(steps[0], 20))
    assert distance(resumed, train(tiny, MEMBERS, recipe(), seeds=SEEDS, chunk=4)) == 0.0


def test_asking_some_models_about_some_samples_gives_the_same_answers(tiny):
    ensemble = train(tiny, MEMBERS, RECIPES["plain"], seeds=SEEDS)
    attack = PGD(0.1, 3, random_start=False)
    only = np.random.default_rng(0).random((4, 24)) < 0.3
    only[1], only[2] = False, True
    full = outputs(ensemble, tiny, attack=attack, device="cpu", block=10)
    part = outputs(ensemble, tiny, attack=attack, device="cpu", block=10, only=only)
    assert np.isnan(part[~only]).all()
    np.testing.assert_allclose(part[only], full[only], atol=1e-5)


def test_gradient_norms_are_those_of_one_sample_at_a_time(tiny):
    ensemble = train(tiny, MEMBERS, RECIPES["plain"], seeds=SEEDS)
    found = gradient_norms(ensemble, tiny, attack=PGD(0.1, 2, random_start=False), device="cpu", block=10)
    net = ensemble.network([2])
    for i in (0, 11, 23):
        x = PGD(0.1, 2, random_start=False)(net, tiny.x[i : i + 1], tiny.y[i : i + 1])
        loss = torch.nn.functional.cross_entropy(net(x), tiny.y[i : i + 1])
        slopes = torch.autograd.grad(loss, list(net.parameters()))
        assert found[2, i] == pytest.approx(float(sum(g.square().sum() for g in slopes).sqrt()), rel=1e-3)


class _CountsZeroButComputed(Drop):
    """Drop as a coefficient of 0 on rows that are computed all the same: the slow twin."""

    def takes_part(self, batch):
        return batch.valid

    def counted(self, batch):
        return super().takes_part(batch)


@pytest.mark.parametrize("objective", [Natural(), PGDAT(PGD(0.1, 2, random_start=False)), AWP(Natural())])
def test_who_counts_nothing_is_not_computed_and_nothing_else_changes(tiny, objective, monkeypatch):
    flagged = torch.arange(tiny.n) % 4 == 0
    members = member_masks(tiny.n, 4, seed=1)
    rows = []
    forward = Network.forward
    monkeypatch.setattr(Network, "forward", lambda net, x: (rows.append(len(x)), forward(net, x))[1])
    results, work = [], []
    for mechanism in (Drop(flagged), _CountsZeroButComputed(flagged)):
        rows.clear()
        chosen = recipe(objective=objective, mechanism=mechanism, sampler=Poisson(6))
        results.append(train(tiny, members, chosen, seeds=range(4), dtype=torch.float64, chunk=4))
        work.append(sum(rows))
    for name, fast in results[0].parameters.items():
        torch.testing.assert_close(fast, results[1].parameters[name], rtol=0, atol=1e-12)
    assert work[0] < 0.9 * work[1]


def test_released_samples_leave_the_batches(tiny):
    until = torch.where(torch.arange(tiny.n) < 12, 0.5, 1.0)
    members = torch.ones(1, tiny.n, dtype=torch.bool)
    chosen = recipe(mechanism=GradedRelease(until), sampler=Shuffled(6), epochs=8)
    trace = train(tiny, members, chosen, seeds=(0,), trace=True).trace[0]
    assert not np.isnan(trace[:4]).any() and np.isnan(trace[4:, :12]).all() and not np.isnan(trace[4:, 12:]).any()


@dataclass(frozen=True)
class Mine:
    """An objective of one's own."""

    wrap: int = 0

    def __call__(self, net, x, y, index, *, rng, counts=None):
        logits = net(x)
        ce = torch.nn.functional.cross_entropy(logits, y, reduction="none")
        seen = [
            lambda: PerSample(ce, ce, logits, y, index), lambda: ce, lambda: PerSample(ce.mean(), ce, logits, y, index),
            lambda: PerSample(ce, ce.view(4, -1), logits, y, index), lambda: PerSample(ce[:, None], ce, logits, y, index),
            lambda: PerSample(ce, 0.5, logits, y, index),
        ]
        return seen[self.wrap]()


@pytest.mark.parametrize(("wrap", "words"), [
    (1, "the objective Mine must return a PerSample, got "),
    (2, r"loss of the objective Mine must have shape \[M\*B\] = .*got \[\];"),
    (3, r"adversarial_ce of the objective Mine must have shape .*got \[4, "),
    (4, r"loss of the objective Mine .*1\]; give one number a row"), (5, "adversarial_ce of the objective Mine .*no tensor"),
])
def test_an_objective_of_ones_own_that_answers_otherwise_is_one_sentence(tiny, wrap, words):
    train(tiny, MEMBERS, recipe(objective=Mine(), epochs=1), seeds=SEEDS)
    with pytest.raises(ValueError, match=words) as caught:
        train(tiny, MEMBERS, recipe(objective=Mine(wrap), epochs=1), seeds=SEEDS, chunk=4)
    assert "\n" not in str(caught.value)


def no_dataclass(base):
    class Careless(base):
        """Whose author did not read the contract."""

        def __call__(self, *given, **more):
            raise AssertionError

    return Careless()


@dataclass(frozen=True)
class Deaf:
    """An objective that draws from a generator of its own."""

    def __call__(self, net, x, y, index):
        raise AssertionError


@pytest.mark.parametrize(("change", "words"), [
    ({"mechanism": no_dataclass(Mechanism)}, r"mechanism must be a dataclass.*@dataclass\(frozen=True\) above class Careless"),
    ({"objective": no_dataclass(object)}, r"objective must be a dataclass.*@dataclass\(frozen=True\) above class Careless"),
    ({"objective": lambda net, x, y, index, **_: None}, "objective must be a dataclass"),
    ({"objective": Deaf()}, r"objective is called with \(net, x, y, index, \*, rng, counts\), and Deaf does not take .*rng"),
])
def test_what_does_not_keep_the_contract_is_refused_when_the_recipe_is_made(change, words):
    with pytest.raises(ValueError, match=words) as caught:
        recipe(**change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("given", "words"), [
    ({"executor": 4}, r"executor must be an Executor, such as farm.connect\('tcp://NODE:8786'\), got 4"),
    ({"store": "/here"}, r"store must be a Store, such as Store\('runs/store'\), got '/here'"),
])
def test_where_to_train_and_keep_is_checked(tiny, given, words):
    with pytest.raises(ValueError, match=words):
        train(tiny, MEMBERS, recipe(), seeds=SEEDS, **given)


@dataclass(frozen=True)
class Unlearn(Mechanism):
    """Gradient ascent on some samples."""

    flagged: torch.Tensor
    weight: float

    def coefficients(self, batch):
        return torch.where(look_up(self.flagged, batch), self.weight, 1.0)


def test_a_sample_that_counts_less_than_nothing_is_climbed(tiny):
    who = torch.arange(24) < 6
    up, left, down = (
        train(tiny, MEMBERS, recipe(objective=Natural(), mechanism=m), seeds=SEEDS, chunk=4, dtype=torch.float64)
        for m in (Unlearn(who, -0.5), Drop(who), DownWeight(who, 0.5))
    )
    assert distance(up, left) > 1e-3
    y = tiny.y[who].numpy()
    losses = [-np.log(np.exp(z := outputs(e, tiny)[:, who]).clip(1e-30)
                      / np.exp(z).sum(-1, keepdims=True))[:, np.arange(6), y].mean() for e in (up, left, down)]
    assert losses[0] > losses[1] > losses[2]
