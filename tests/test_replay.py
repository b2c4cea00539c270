"""Recorded attacks: the same images as launch by launch, whatever the batch, the weights and the loss.

Without a GPU a recording is pretended: it computes everything anew from the places it was made for (tests/pretend_gpu.py), so
whatever it does not read from there is seen. With one, real graphs are compared with launches.
"""

import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pretend_gpu import played_again, pretend_gpu

from demem_lab import data, replay
from demem_lab.attacks import PGD, cross_entropy, frozen, margin
from demem_lab.budgets import BudgetedDP
from demem_lab.mechanisms import DPSGD, DownWeight, Drop, LossVariance, Plain, SelectiveDP
from demem_lab.models import MLP, ResNet18, SmallCNN
from demem_lab.objectives import AWP, PGDAT, TRADES, _Away
from demem_lab.recipe import Job, Recipe
from demem_lab.remedies import ClassVariance, ClippedRelease, GradedRelease, RelaxLoss
from demem_lab.replay import Replays, padded
from demem_lab.sampling import Poisson, Shuffled
from demem_lab.state import State
from demem_lab.streams import Streams

REAL = torch.cuda.is_available()
ON = torch.device("cuda" if REAL else "cpu")


@pytest.fixture(autouse=True)
def recordings(monkeypatch):
    """Counts of recordings made and played; each is played once more when it is made, to be compared."""
    made, real = {"made": 0, "played": 0}, replay.recorded

    def recorded(compute, pool, device):
        out, play = (real if REAL else played_again)(compute, pool, device)
        made["made"] += 1

        def counted():
            made["played"] += 1
            play()

        return out, counted

    monkeypatch.setattr(replay, "recorded", recorded)
    if not REAL:
        monkeypatch.setattr(replay, "new_pool", object)
    return made


def network(spec=None, models=1, shape=(1, 8, 8)):
    net = (spec or MLP((6,))).build(models=models, shape=shape, classes=4, seeds=range(models)).double().to(ON).eval()
    return net, net.__class__


def batch(rows, models=1, shape=(1, 8, 8), seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(models * rows, *shape, generator=generator, dtype=torch.float64)
    return x.to(ON), torch.randint(4, (models * rows,), generator=generator).to(ON)


def both(attack, net, x, y, **how):
    """The moved images as recorded and launch by launch."""
    kept, net.replays = net.replays, None
    plain = attack(net, x, y, **how)
    net.replays = kept
    return attack(net, x, y, **how), plain


@pytest.mark.parametrize("spec", [MLP((6,)), SmallCNN(), ResNet18(width=4), ResNet18(width=4, norm="batch")])
@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize("loss", [cross_entropy, margin])
def test_images_are_the_same_for_batches_of_any_size(spec, models, loss, recordings):
    net, _ = network(spec, models, (3, 16, 16))
    net.replays, attack = Replays(), PGD(0.1, 3)
    for seed, rows in enumerate((7, 5, 8, 6, 11, 9)):  # padded to 8 and to 16
        x, y = batch(rows, models, (3, 16, 16), seed)
        found, plain = both(attack, net, x, y, loss=loss, rng=Streams(range(models), "attack", seed, device=ON))
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)
        assert found.is_contiguous() and not found.requires_grad
    assert recordings == {"made": 2, "played": 4 + 2} and len(net.replays.kept) == 2


def test_l2_attacks_and_restarts_are_the_same():
    net, _ = network(models=2)
    net.replays, attack = Replays(), PGD(0.5, 3, norm="l2", restarts=3)
    for seed in range(3):
        x, y = batch(5, 2, seed=seed)
        found, plain = both(attack, net, x, y, rng=Streams((0, 1), "attack", seed, device=ON))
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)


def test_weights_are_read_where_they_lie(recordings):
    net, _ = network()
    net.replays, attack, (x, y) = Replays(), PGD(0.1, 3, random_start=False), batch(8)
    for _ in range(4):
        found, plain = both(attack, net, x, y)
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(-1.5)
    assert recordings["made"] == 1
    for p in net.parameters():  # other places: an old recording would read what was left behind
        p.data = p.data.clone() * -1
    for _ in range(3):
        found, plain = both(attack, net, x, y)
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)
    assert recordings["made"] == 2


def test_an_attack_on_the_clean_prediction_gets_each_batchs_own(recordings):
    net, _ = network(models=2)
    net.replays, objective = Replays(), TRADES(PGD(0.1, 3))
    for seed in range(4):
        x, y = batch(6, 2, seed=seed)
        rng = Streams((0, 1), "attack", seed, device=ON)
        found = objective.move(net, x, y, rng)
        kept, net.replays = net.replays, None
        torch.testing.assert_close(found, objective.move(net, x, y, rng), rtol=0, atol=1e-12)
        net.replays = kept
    assert recordings == {"made": 1, "played": 3 + 1}


def test_what_a_loss_holds_is_asked_for_before_it_is_recorded(recordings):
    net, _ = network()
    net.replays, (x, y) = Replays(), batch(8)
    for scale in (1.0, -1.0, 2.0):
        found, plain = both(PGD(0.1, 3), net, x, y, loss=lambda a, b, s=scale: s * a.sum(-1), start=x.clone())
        assert torch.equal(found, plain)
    assert recordings["made"] == 0 and not net.replays.kept
    assert hasattr(_Away(torch.rand(3, 4)), "given")


def test_settings_have_recordings_of_their_own(recordings):
    net, _ = network()
    net.replays, (x, y) = Replays(), batch(8)
    for loss in (cross_entropy, margin) * 3:
        found, plain = both(PGD(0.1, 3, random_start=False), net, x, y, loss=loss)
        assert torch.equal(found, plain)
    assert recordings.pop("made") == 2
    recordings["made"], net.replays = 0, Replays()
    attacks = [PGD(0.1, 3, random_start=False), PGD(0.1, 4, random_start=False), PGD(0.2, 3, random_start=False)]
    found = [attack(net, x, y) for _ in range(3) for attack in attacks]
    assert recordings["made"] == 3 and not torch.equal(found[6], found[7]) and not torch.equal(found[6], found[8])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(found[:3], found[6:], strict=True))
    for number in range(40):
        PGD(0.1 + number / 100, 1)(net, x, y, start=x)
    assert len(net.replays.kept) == replay.MOST


def test_one_answer_does_not_change_with_the_next():
    net, _ = network()
    net.replays, attack = Replays(), PGD(0.1, 3, random_start=False)
    x, y = batch(8)
    answers = [attack(net, x, y) for _ in range(3)]
    kept = answers[-1].clone()
    attack(net, *batch(8, seed=5))
    assert torch.equal(answers[-1], kept)


def test_what_cannot_be_recorded_goes_on_without(monkeypatch):
    def fails(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(replay, "recorded", fails)
    net, _ = network()
    net.replays, attack, (x, y) = Replays(), PGD(0.1, 3, random_start=False), batch(8)
    first = attack(net, x, y)
    with pytest.warns(UserWarning, match="the attack could not be recorded .operation not permitted when stream is captur"):
        assert torch.equal(first, attack(net, x, y))
    assert torch.equal(first, attack(net, x, y)) and net.replays.failed == {"attack"}


def test_short_memory_takes_recordings_back_first(monkeypatch):
    net, _ = network()
    net.replays, attack, (x, y) = Replays(), PGD(0.1, 3, random_start=False), batch(8)
    first = attack(net, x, y)
    with monkeypatch.context() as patched:
        patched.setattr(replay, "recorded", _full)
        with pytest.warns(UserWarning, match="memory is short: recorded steps are given up"):
            assert torch.equal(first, attack(net, x, y))
    assert torch.equal(first, attack(net, x, y)) and not net.replays.kept and net.replays.pool is None
    monkeypatch.setattr(PGD, "climb", _full)  # with nothing to give back it is for the caller to do something
    with pytest.raises(torch.OutOfMemoryError):
        attack(net, x, y)


def _full(*_):
    raise torch.OutOfMemoryError("full")


def test_an_error_holds_no_memory_when_the_pass_is_done_again(monkeypatch):
    net, _ = network()
    net.replays, attack, (x, y), taken = Replays(), PGD(0.1, 3, random_start=False), batch(8), []
    for _ in range(2):
        attack(net, x, y)
    climb = PGD.climb

    def short(*arguments):
        large = torch.rand(10)
        if not taken:
            taken.append(weakref.ref(large))
            _full()
        assert taken[0]() is None
        return climb(*arguments)

    monkeypatch.setattr(PGD, "climb", short)
    with pytest.warns(UserWarning, match="memory is short"):
        attack(net, batch(16)[0], batch(16)[1])  # another size, so not what has been recorded
    assert taken


def test_running_statistics_move_once_when_recording_finds_no_room(monkeypatch):
    spec, how = ResNet18(width=4, norm="batch"), {"sampler": Shuffled(6)}
    plain = _Recorded(spec, Plain(), (3, 16, 16), monkeypatch, **how).state.net.state()
    record, calls = replay.recorded, []

    def short(compute, pool, device):  # the attack has been recorded, the training pass finds no room
        calls.append(1)
        if len(calls) == 2:
            compute()
            _full()
        return record(compute, pool, device)

    monkeypatch.setattr(replay, "recorded", short)
    monkeypatch.setattr("pretend_gpu.played_again", short)
    with pytest.warns(UserWarning, match="memory is short"):
        found = _Recorded(spec, Plain(), (3, 16, 16), monkeypatch, **how).state
    assert found.net.replays.failed == {"all"} and len(calls) == 2
    assert all(torch.allclose(plain[name], t, atol=1e-5) for name, t in found.net.state().items())


@pytest.mark.parametrize("left", [3, 9])
def test_a_full_card_goes_on_with_launches(left, monkeypatch):
    plain = _Recorded(MLP((6,)), Plain(), (1, 8, 8), monkeypatch).state.net.state()
    move, calls = PGDAT.move, []

    def short(*arguments):  # something else than a recording finds no room
        calls.append(1)
        if len(calls) == left:
            _full()
        return move(*arguments)

    monkeypatch.setattr(PGDAT, "move", short)
    with pytest.warns(UserWarning, match="memory is short"):
        found = _Recorded(MLP((6,)), Plain(), (1, 8, 8), monkeypatch)
    assert found.state.net.replays.failed == {"all"} and len(calls) == 13
    assert all(torch.allclose(plain[name], t, atol=1e-6) for name, t in found.state.net.state().items())


def test_only_networks_on_a_card_record():
    net, _ = network()
    assert net.arranged_for("cpu").replays is None and net.arranged_for("cuda").replays is not None
    with frozen(net):
        assert padded(1) == 8 and all(r <= padded(r) < r + max(8, r / 4 + 1) for r in range(1, 3000))


def test_a_recording_that_gives_something_else_is_not_used(monkeypatch):
    def stale(compute, pool, device):
        own, whole = compute()
        return (own + 0.1, whole), lambda: None

    monkeypatch.setattr(replay, "recorded", stale)
    net, _ = network()
    net.replays, attack, (x, y) = Replays(), PGD(0.1, 3, random_start=False), batch(8)
    first = attack(net, x, y)
    with pytest.warns(UserWarning, match="could not be recorded .it gives something else than launches do.; going on"):
        assert torch.equal(first, attack(net, x, y))


@pytest.mark.parametrize("eps", [8 / 255, 1 / 255])
def test_a_recording_that_does_nothing_is_seen_however_small_the_radius(eps, monkeypatch):
    def idle(compute, pool, device):
        own, whole = compute()
        return (own, whole), lambda: own.copy_(idle.x)

    monkeypatch.setattr(replay, "recorded", idle)
    net, _ = network()
    net.replays, attack, (x, y) = Replays(), PGD(eps, 3, random_start=False), batch(8)
    idle.x = x
    first = attack(net, x, y)
    with pytest.warns(UserWarning, match="it gives something else than launches do"):
        assert torch.equal(first, attack(net, x, y))


def test_what_is_not_finite_is_recorded_another_time(recordings):
    net, _ = network()
    net.replays, rows = Replays(), torch.ones(8, 1, dtype=torch.float64, device=ON)
    rows[3] = float("nan")
    for value, made in ((None, 0), (None, 0), (1.0, 0), (1.0, 1), (1.0, 1)):
        if value is not None:
            rows[3] = value
        own, _ = net.replays.play("training pass", (), net, (rows,), (), lambda r: (2 * r, []))
        assert torch.equal(own.isnan(), rows.isnan()) and recordings["made"] == made
    assert not net.replays.failed


def test_in_deterministic_mode_nothing_is_recorded(recordings):
    net, _ = network()
    net.replays, attack, (x, y) = Replays(), PGD(0.1, 3, random_start=False), batch(8)
    try:
        torch.use_deterministic_algorithms(True)
        for _ in range(3):
            attack(net, x, y)
    finally:
        torch.use_deterministic_algorithms(False)
    assert recordings["made"] == 0 and not net.replays.kept


class _Card:
    """What `recorded` asks of torch.cuda, told in order; `fails` are the calls that raise."""

    def __init__(self, monkeypatch, *fails):
        self.said, self.fails = [], fails
        names = {"CUDAGraph": lambda: self, "Stream": lambda device: self, "current_stream": lambda: self}
        names |= {"empty_cache": lambda: self.tell("empty"), "device": self.inside, "stream": self.inside}
        for name, answer in names.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *a: self.tell("end to pool"), raising=False)
        monkeypatch.setattr(replay, "_side", lambda device: self)

    def tell(self, what):
        self.said.append(what)
        if what in self.fails:
            raise RuntimeError(what)

    @contextmanager
    def inside(self, where):
        yield

    def capture_begin(self, **how):
        self.tell("begin")

    def __getattr__(self, name):
        return lambda *a: self.tell(name)


BEGUN = ["synchronize", "empty", "begin"]


@pytest.mark.parametrize(("fails", "raised", "said"), [
    ((), None, [*BEGUN, "compute", "capture_end", "wait_stream"]),
    (("compute",), "compute", [*BEGUN, "compute", "capture_end"]),
    # a capture that was broken ends with an error, too, and the allocator must be told
    (("compute", "capture_end"), "compute", [*BEGUN, "compute", "capture_end", "end to pool"]),
    (("capture_end",), "capture_end", [*BEGUN, "compute", "capture_end", "capture_end", "end to pool"]),
    (("compute", "capture_end", "end to pool"), "compute", [*BEGUN, "compute", "capture_end", "end to pool"]),
])
def test_a_recording_that_breaks_off_leaves_the_card_as_it_was(monkeypatch, fails, raised, said):
    monkeypatch.undo()  # the pretended recording of all tests here
    card = _Card(monkeypatch, *fails)
    with nullcontext() if raised is None else pytest.raises(RuntimeError, match=raised):
        replay.recorded(lambda: card.tell("compute"), "pool", SimpleNamespace(index=0))
    assert card.said == said
    assert not replay.one_at_a_time.locked()


class _Recorded:
    """What a training on a card, real or pretended, recorded and played."""

    def __init__(self, model, mechanism, shape, monkeypatch, models=1, **how):
        self.kinds, outcome = [], Replays._outcome

        def counted(replays, kind, recording, *rest):
            found = outcome(replays, kind, recording, *rest)
            self.kinds.append((kind, recording.play is not None))
            return found

        x = torch.rand(24, *shape, generator=torch.Generator().manual_seed(0))
        toy = data.Dataset("toy", x, torch.arange(24) % 4, tuple("abcd"), "random numbers", 0.1)
        recipe = Recipe(model, how.pop("objective", PGDAT(PGD(0.1, 2))), mechanism, **{"sampler": Poisson(6), "epochs": 6, **how})
        monkeypatch.setattr(Replays, "_outcome", counted)
        with nullcontext() if REAL else pretend_gpu():
            self.state = State(Job(
                toy, data.member_masks(24, 2, seed=0)[:models], recipe, (1, 2)[:models], torch.device("cuda"), False,
                torch.float32, 12.0,
            ))
            for _ in range(12):
                self.state.advance()
            self.arrays = self.state.arrays()

    def played(self, kind):
        return sum(play for name, play in self.kinds if name == kind)


TENTH = torch.arange(24) % 4 == 0
RECORDED = {
    "Plain": Plain(), "LossVariance": LossVariance(0.2), "Drop": Drop(TENTH), "DownWeight": DownWeight(TENTH, 0.3),
    "GradedRelease": GradedRelease(torch.linspace(0.2, 1, 24)), "SelectiveDP": SelectiveDP(0.1, 1.0, TENTH), "DPSGD": DPSGD(0.1),
    "BudgetedDP": BudgetedDP(0.1, 1.0, TENTH, allowed=torch.full((24,), 9)),
}


@pytest.mark.parametrize("name", RECORDED)
def test_whose_training_pass_is_recorded(name, monkeypatch):
    found = _Recorded(MLP((6,)), RECORDED[name], (1, 8, 8), monkeypatch)
    assert found.played("attack") > 6 and found.played("training pass") > 6
    assert not found.state.net.replays.failed


@pytest.mark.parametrize("mechanism", [ClassVariance(), RelaxLoss(), ClippedRelease(torch.ones(24)), LossVariance((0.1, 0.2))])
def test_whose_is_not(mechanism, monkeypatch):
    found = _Recorded(MLP((6,)), mechanism, (1, 8, 8), monkeypatch, models=2)
    assert found.played("attack") > 6 and found.played("training pass") == 0


@dataclass(frozen=True)
class Weighted(PGDAT):
    """Every sample has a weight of its own."""

    def losses(self, net, x, x_adv, y, index):
        seen = super().losses(net, x, x_adv, y, index)
        return replace(seen, loss=seen.loss * (1 + index))


@dataclass(frozen=True)
class CleanOnly(PGDAT):
    """What `__call__` does is not what `move` and `losses` do."""

    def __call__(self, net, x, y, index, *, rng, counts=None):
        return self.losses(net, x, x, y, index)


@pytest.mark.parametrize("mechanism", [Plain(), SelectiveDP(0.0, 1.0, TENTH)])
@pytest.mark.parametrize("objective", [Weighted(PGD(0.1, 2)), CleanOnly(PGD(0.1, 2))])
def test_an_objective_of_ones_own_does_on_a_card_what_it_does_elsewhere(objective, mechanism, monkeypatch):
    found = _Recorded(MLP((6,)), mechanism, (1, 8, 8), monkeypatch, objective=objective)
    job = replace(found.state.job, device=torch.device("cpu"))
    wanted = State(job)
    for _ in range(12):
        wanted.advance()
    for name, array in wanted.arrays().items():
        assert np.allclose(found.arrays[name], array, rtol=1e-4, atol=1e-5), name
    assert bool(found.played("training pass")) == isinstance(objective, Weighted)


def test_an_objective_that_moves_weights_is_not_recorded(monkeypatch):
    found = _Recorded(MLP((6,)), Plain(), (1, 8, 8), monkeypatch, objective=AWP(PGDAT(PGD(0.1, 2))))
    assert found.played("attack") > 6 and found.played("training pass") == 0


def test_batches_of_one_size_are_not_padded(monkeypatch):
    found = _Recorded(
        ResNet18(width=4, norm="batch"), Plain(), (3, 16, 16), monkeypatch, sampler=Shuffled(6),
    )
    assert found.played("training pass") == 11 and all(len(r.rows[0]) == 6 for r in found.state.net.replays.kept.values())


def test_batches_that_samples_leave_are_padded(monkeypatch):
    found = _Recorded(MLP((6,)), Drop(TENTH), (1, 8, 8), monkeypatch, sampler=Shuffled(6))
    sizes = {len(r.rows[0]) for r in found.state.net.replays.kept.values()}
    assert sizes == {8} and found.played("training pass") == 11
    whole = _Recorded(MLP((6,)), Plain(), (1, 8, 8), monkeypatch, sampler=Shuffled(6))
    assert {len(r.rows[0]) for r in whole.state.net.replays.kept.values()} == {6}


def test_rare_sizes_of_a_network_that_cannot_pad_are_launched(monkeypatch):
    spec, how = ResNet18(width=4, norm="batch"), {"sampler": Shuffled(6)}
    everything = _Recorded(spec, Drop(TENTH), (3, 16, 16), monkeypatch, **how).state.net
    monkeypatch.setattr(replay, "MOST", 2)
    few = _Recorded(spec, Drop(TENTH), (3, 16, 16), monkeypatch, **how).state.net
    assert len(everything.replays.kept) > 2 == len(few.replays.kept)
    assert all(torch.allclose(t, few.state()[name], atol=1e-5) for name, t in everything.state().items())


def test_gradients_of_all_recordings_share_one_place(monkeypatch):
    found = _Recorded(MLP((6,)), Plain(), (1, 8, 8), monkeypatch)
    replays = found.state.net.replays
    several = [r.outcome[1] for k, r in replays.kept.items() if k[0] == "training pass" and r.outcome]
    assert several and all(g is s for whole in several for g, s in zip(whole, replays.shared, strict=True))
