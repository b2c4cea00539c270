"""Attacks against closed forms on linear models, a slow PGD, and what they must leave untouched."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from demem_lab import attacks, losses
from demem_lab.attacks import FGSM, NFGSM, PGD, RSFGSM
from demem_lab.models import MLP
from demem_lab.objectives import _Away
from demem_lab.streams import Streams


class TwoClasses(nn.Module):
    """Logits (-w.x, w.x) + b: the best attack on class 0 walks along +w, on class 1 along -w."""

    def __init__(self, seed=0, pixels=16):
        super().__init__()
        self.w = nn.Parameter(torch.randn(pixels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))

    def forward(self, x):
        z = x.flatten(1) @ self.w - 0.5 * self.w.sum()
        return torch.stack([-z, z], 1)


def task(seed=0, n=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 4, 4, generator=generator, dtype=torch.float64), torch.arange(n) % 2


def uphill(net, y):
    sign = torch.where(y == 0, 1.0, -1.0).double()
    return sign[:, None, None, None] * net.w.detach().view(1, 1, 4, 4)


def slow_pgd(net, x, y, eps, steps):
    out = []
    for image, label in zip(x, y, strict=True):
        z = image.clone()
        for _ in range(steps):
            z = z.detach().requires_grad_()
            F.cross_entropy(net(z[None]), label[None]).backward()
            moved = z.detach() + 2.5 * eps / steps * z.grad.sign()
            z = torch.clamp(torch.clamp(moved, image - eps, image + eps), 0, 1)
        out.append(z)
    return torch.stack(out)


def test_fgsm_is_one_signed_step():
    net, (x, y) = TwoClasses(), task()
    assert torch.allclose(FGSM(0.07)(net, x, y), (x + 0.07 * uphill(net, y).sign()).clamp(0, 1))


def test_pgd_linf_finds_the_optimum_of_a_linear_model():
    net, (x, y) = TwoClasses(), task()
    moved = PGD(0.07, 20)(net, x, y, rng=torch.Generator().manual_seed(0))
    assert torch.allclose(moved, (x + 0.07 * uphill(net, y).sign()).clamp(0, 1), atol=1e-9)


def test_pgd_l2_finds_the_optimum_of_a_linear_model():
    net, (x, y) = TwoClasses(), task()
    x = 0.4 + 0.2 * x  # far from 0 and 1, where clamping would bend the answer
    moved = PGD(0.05, 60, step_size=0.02, norm="l2")(net, x, y, rng=torch.Generator().manual_seed(0))
    assert torch.allclose(moved, x + 0.05 * uphill(net, y) / net.w.detach().norm(), atol=2e-3)


def test_pgd_equals_a_slow_one_on_a_curved_model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = task(3)
    assert torch.allclose(PGD(0.1, 5, random_start=False)(net, x, y), slow_pgd(net, x, y, 0.1, 5), atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1), st.sampled_from(["linf", "l2"]), st.integers(1, 4), st.integers(1, 2), st.integers(0, 10**6))
def test_moved_images_stay_in_the_ball_and_in_range(eps, norm, steps, restarts, seed):
    net, (x, y) = TwoClasses(seed % 7), task(seed % 11)
    moved = PGD(eps, steps, norm=norm, restarts=restarts)(net, x, y, rng=torch.Generator().manual_seed(seed))
    distance = (moved - x).flatten(1).norm(dim=1, p=float("inf") if norm == "linf" else 2)
    assert distance.max() <= eps + 1e-9 and moved.min() >= 0 and moved.max() <= 1


def starts(norm, channels=1):
    """How far 4,000 random starts lie from grey images of two pixels."""
    x = torch.full((4000, channels, 1, 2), 0.5, dtype=torch.float64)
    attack, y = PGD(0.1, 1, step_size=0.0, norm=norm), torch.zeros(4000, dtype=torch.int64)
    return (attack(TwoClasses(pixels=2 * channels), x, y, rng=Streams((1,), "s")) - x).flatten(1)


def test_random_starts_fill_the_ball():
    for norm in ("linf", "l2"):
        away = starts(norm)
        radius = away.abs().amax(1) if norm == "linf" else away.norm(dim=1)
        inner = float((radius <= 0.05).double().mean())  # half the radius holds a quarter of the area
        assert abs(inner - 0.25) < 0.04
        assert away.mean(0).abs().max() < 0.01


@pytest.mark.parametrize("channels", [1, 3])
def test_l2_starts_are_uniform_in_the_ball_of_all_channels(channels):
    inner = starts("l2", channels).norm(dim=1) <= 0.1 * 0.5 ** (1 / (2 * channels))  # half of the volume
    assert abs(float(inner.double().mean()) - 0.5) < 0.04


def test_the_direction_of_a_start_says_nothing_about_its_radius():
    away = starts("l2").numpy()
    radius = np.linalg.norm(away, axis=1)
    parts = [away[:, 0], away[:, 1], np.abs(away[:, 0]), np.abs(away[:, 1])]
    assert max(abs(stats.spearmanr(radius, part / radius).statistic) for part in parts) < 0.08


def test_every_restart_begins_elsewhere():
    """Nobody is ever fooled here, so that every attack makes all of its restarts on every image."""
    seen = []

    class Constant(nn.Module):
        def forward(self, x):
            seen.append(x.detach().clone())
            nothing = 0 * x.flatten(1).sum(1)
            return torch.stack([1 + nothing, nothing], 1)

    x, y = torch.full((5, 1, 4, 4), 0.5), torch.zeros(5, dtype=torch.int64)
    attacks.withstands(Constant(), x, y, [PGD(0.1, 1, restarts=3)] * 2, rng=Streams((1,), "a"))
    begun = seen[2::2]  # the images themselves, for their answers and their slopes; then where each restart begins and ends
    assert len(begun) == 6 and all(not torch.equal(a, b) for i, a in enumerate(begun) for b in begun[:i])


def test_restarts_never_help_the_model():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x, y = task(5, 40)
    one, many = (PGD(0.05, 2, restarts=r)(net, x, y, rng=Streams((1,), "a")) for r in (1, 4))
    loss = [F.cross_entropy(net(z), y, reduction="none") for z in (one, many)]
    fooled = [net(z).argmax(1) != y for z in (one, many)]
    assert (fooled[1] | ~fooled[0]).all() and (loss[1] >= loss[0] - 1e-12)[fooled[0] == fooled[1]].all()
    assert (loss[1] > loss[0] + 1e-9).any()


class Flags(nn.Module):
    """Records in which mode it is called; fails on demand."""

    def __init__(self, fail=False):
        super().__init__()
        self.inner, self.frozen_part, self.modes, self.fail = nn.Linear(16, 2).double(), nn.Dropout(0.5), [], fail
        self.frozen_part.eval()
        self.inner.bias.requires_grad_(False)

    def forward(self, x):
        self.modes.append((self.training, self.inner.weight.requires_grad))
        if self.fail:
            raise RuntimeError("planted")
        return self.inner(self.frozen_part(x.flatten(1)))


@pytest.mark.parametrize("fail", [False, True])
def test_evaluation_mode_inside_everything_restored_outside(fail):
    net, (x, y) = Flags(fail), task()
    net.train()
    net.frozen_part.eval()
    try:
        PGD(0.1, 2)(net, x, y)
    except RuntimeError:
        assert fail
    assert net.modes and all(mode == (False, False) for mode in net.modes)
    assert net.training and not net.frozen_part.training
    assert net.inner.weight.requires_grad and not net.inner.bias.requires_grad and net.inner.weight.grad is None


def test_recording_goes_on_after_an_attack_and_the_attack_is_not_in_it():
    net = MLP((5,)).build(models=2, shape=(1, 4, 4), classes=2, seeds=(0, 1)).double()
    x, y = task()
    with net.recording():
        net(x)
        PGD(0.1, 3)(net, x, y)
        with pytest.raises(RuntimeError, match="planted"), attacks.frozen(net):
            raise RuntimeError("planted")
        net(x)
        assert [len(layer.calls) for layer in net.layers] == [2, 2]


def test_attacks_and_predictions_see_the_evaluation_mode():
    class Moody(nn.Module):
        def forward(self, x):
            z = (x.flatten(1)[:, 0] - 0.5) * (-1 if self.training else 1)
            return torch.stack([-z, z], 1)

    net, (x, _) = Moody().train(), task(4, 40)
    y = (x[:, 0, 0, 0] > 0.5).long()
    assert torch.equal(attacks.predictions(net, x), y) and net.training
    moved = FGSM(0.05)(net, x, y)[:, 0, 0, 0]
    assert torch.allclose(moved, (x[:, 0, 0, 0] + torch.where(y == 0, 0.05, -0.05)).clamp(0, 1))


def test_robust_accuracy_of_real_attacks_equals_attacking_everything():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, _ = task(6, 120)
    y = net(x).argmax(1)
    y[::10] = (y[::10] + 1) % 3  # some are wrong before any attack
    chosen = [PGD(0.03, 3, random_start=False), PGD(0.1, 5, norm="l2", random_start=False), FGSM(0.04)]
    right = [net(z).argmax(1) == y for z in (x, *(attack(net, x, y) for attack in chosen))]
    slow = torch.stack(right).all(0)
    assert torch.equal(attacks.withstands(net, x, y, chosen), slow) and 0 < slow.double().mean() < 0.9
    assert attacks.robust_accuracy(net, x, y, chosen) == slow.double().mean().item()


def test_a_strangers_network_may_call_anything_models():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    net.models = "several"
    x, y = task(3)
    assert 0 <= attacks.robust_accuracy(net, x, y, [PGD(0.1, 1)]) <= 1


def test_a_blind_attack_beside_a_seeing_one():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3), type(
        "Loud", (nn.Module,), {"forward": lambda self, z: 1e6 * z})()).double()
    x, _ = task(6, 120)
    y, pgd = net(x).argmax(1), PGD(0.1, 5, random_start=False)
    blind, both = (attacks.withstands(net, x, y, [pgd], losses=losses) for losses in (
        (attacks.cross_entropy,), (attacks.cross_entropy, attacks.margin)))
    alone = net(pgd(net, x, y, loss=attacks.margin)).argmax(1) == y
    assert torch.equal(both, blind & alone) and blind.double().mean() > both.double().mean() + 0.2


def test_an_answer_that_is_no_number_is_not_right():
    class Broken(nn.Module):
        def forward(self, x):
            z = torch.zeros(len(x), 3, dtype=x.dtype)
            z[:, 1] = float("nan")  # argmax calls it the largest
            return z + 0 * x.sum()

    x, y = task(1, 12)
    assert attacks.robust_accuracy(Broken(), x, torch.ones_like(y), [PGD(0.1, 1)]) == 0


@pytest.mark.parametrize(("make", "words"), [
    (lambda: PGD(0.1, restarts=3, random_start=False), "3 restarts without a random start repeat one attack; set"),
    (lambda: PGD(8), "eps must be finite and >= 0 and <= 1, got 8; give the attack radius in pixel units of .* 8/255"),
    (lambda: NFGSM(8.0), "eps must be finite and >= 0 and <= 1"),
    (lambda: PGD(0.03)(TwoClasses(), 3 * task()[0] - 1, task()[1]), "pixels must lie in"),
])
def test_settings_and_images_that_make_no_attack(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_robust_accuracy_falls_with_restarts():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x, _ = task(5, 150)
    y = net(x).argmax(1)
    few, many = (attacks.robust_accuracy(net, x, y, [PGD(0.2, 1, step_size=0.0, restarts=r)], rng=Streams((1,), "a"))
                 for r in (1, 20))
    assert 0 < many < few < 1


def test_margin_by_hand():
    logits, y = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 9.0]]), torch.tensor([0, 1])
    assert attacks.margin(logits, y).tolist() == [-1.0, 4.0]


def test_margin_of_negative_logits():
    logits, y = torch.tensor([[-3.0, -5.0, -4.0], [-9.0, -1.0, -6.0]]), torch.tensor([0, 2])
    assert attacks.margin(logits, y).tolist() == [-1.0, 5.0]


def test_robust_accuracy_is_the_point_wise_worst_case():
    class Half(nn.Module):
        def forward(self, x):  # right on the untouched images only where a pixel agrees with the label
            z = x.flatten(1)[:, 0] - 0.5
            return torch.stack([-z, z], 1)

    x, y = task(2, 200)
    y = (x.flatten(1)[:, 0] > 0.5).long()

    def move(rows):
        def attack(net, x, y, *, rng=None, loss=None, start=None):
            out = x.clone()
            near = (x.flatten(1)[:, 0] * 10).long() % 2 == rows
            out[near] = 1 - out[near]
            return out
        return attack

    even, odd = move(0), move(1)
    right = [Half()(a(None, x, y)).argmax(1) == y for a in (even, odd)]
    slow = (right[0] & right[1] & (Half()(x).argmax(1) == y)).double().mean().item()
    both = []
    for f in (even, odd):
        kind = type("Planted", (PGD,), {"__call__": lambda self, *a, f=f, **k: f(*a, **k)})
        both.append(kind(0.1, 1))
    assert attacks.robust_accuracy(Half(), x, y, both) == slow == 0.0
    assert 0 < attacks.robust_accuracy(Half(), x, y, both[:1]) < 1


def test_margin_loss_sees_through_a_saturated_softmax():
    net, (x, y) = TwoClasses(), task(1, 60)
    y = net(x).argmax(1)
    loud = nn.Sequential(net, type("Loud", (nn.Module,), {"forward": lambda self, z: z * 1e5})())
    blind = PGD(0.2, 10, random_start=False)(loud, x, y)
    seeing = PGD(0.2, 10, random_start=False)(loud, x, y, loss=attacks.margin)
    withstood = [(loud(z).argmax(1) == y).double().mean() for z in (blind, seeing)]
    assert withstood[0] > withstood[1] + 0.3


def test_autoattack_is_no_weaker_than_pgd_and_kept_for_these_weights_and_images(digits, store, monkeypatch):
    pytest.importorskip("pyautoattack", reason="install demem-lab[attacks]")
    net = MLP((32,)).build(models=1, shape=(1, 8, 8), classes=10, seeds=(0,))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(digits.x), digits.y).backward()
        optimizer.step()
    net.train()
    x, y = digits.x[:24], digits.y[:24]
    moved = attacks.autoattack(net, x, y, eps=0.1)
    assert (moved - x).abs().max() <= 0.1 + 1e-5 and moved.min() >= 0 and moved.max() <= 1 and net.training
    left = (attacks.predictions(net, moved) == y).double().mean().item()
    assert left <= attacks.robust_accuracy(net, x, y, [PGD(0.1, 20)], rng=torch.Generator().manual_seed(0)) + 1e-9
    assert all(p.requires_grad for p in net.parameters())
    kept = attacks.autoattack(net, x, y, eps=0.1, store=store)
    assert torch.equal(kept, moved) and kept.dtype == x.dtype
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    assert torch.equal(attacks.autoattack(net, x, y, eps=0.1, store=store), moved)
    for other in ({"eps": 0.2}, {"norm": "l2"}):
        with pytest.raises(ImportError):
            attacks.autoattack(net, x, y, **{"eps": 0.1, **other}, store=store)
    with pytest.raises(ImportError):
        attacks.autoattack(net, x[:5], y[:5], eps=0.1, store=store)
    with torch.no_grad():
        next(net.parameters()).add_(1e-3)
    with pytest.raises(ImportError):
        attacks.autoattack(net, x, y, eps=0.1, store=store)


class Rooted(nn.Module):
    """Its answers are finite everywhere, its slope is not where a pixel is 0."""

    def forward(self, x):
        total = x.flatten(1).sqrt().sum(1)
        return torch.stack([total, 1 - total], 1)


def test_where_the_slope_is_nan_one_is_told_and_nothing_breaks():
    x, y = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(8, dtype=torch.int64)
    x[:3, 0, 0, 0] = 0
    with pytest.warns(UserWarning, match="3 of 8 images .* slope of NaN.*AutoAttack"):
        attacks.robust_accuracy(Rooted(), x, y, [PGD(0.1, 2, random_start=False)])
    moved = PGD(0.5, 2, norm="l2", random_start=False)(Rooted(), x, y)
    assert moved.isfinite().all() and not torch.equal(moved[3:], x[3:])


@pytest.mark.parametrize("length", [1e-3, 1e-15, 1e-25, 1e-30])
def test_l2_steps_have_their_length_however_short_the_slope(length):
    class Flat(nn.Module):
        def forward(self, x):
            return torch.stack([x.flatten(1).sum(1) * length, torch.zeros(len(x))], 1)

    x, y = torch.full((2, 1, 4, 4), 0.5), torch.tensor([0, 1])
    moved = PGD(0.4, 1, step_size=0.2, norm="l2", random_start=False)(Flat(), x, y, loss=attacks.margin)
    assert (moved - x).flatten(1).norm(dim=1).tolist() == pytest.approx([0.2, 0.2], rel=1e-4)


def test_autoattack_asks_for_a_radius_that_exists_and_for_this_network(store, monkeypatch):
    class Judge:
        def __init__(self, model, **_):
            self.model, self.apgd_targeted, self.fab = model, SimpleNamespace(), SimpleNamespace()

        def run_standard_evaluation(self, x, y, batch_size):
            return self.model(x)[:, :1, None, None] + 0 * x, y

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 4)

        def forward(self, x):
            return self.linear(x.flatten(1))

    class Other(Net):
        def forward(self, x):
            return -self.linear(x.flatten(1))

    Other.__name__ = "Net"  # their text is one, too
    monkeypatch.setitem(sys.modules, "pyautoattack", SimpleNamespace(AutoAttack=Judge))
    x, y, net, other = torch.rand(3, 1, 4, 4), torch.zeros(3, dtype=torch.int64), Net(), Other()
    other.load_state_dict(net.state_dict())
    one, two = (attacks.autoattack(n, x, y, eps=0.1, store=store) for n in (net, other))
    assert str(net) == str(other) and not torch.allclose(one, two)
    for eps in (-0.1, float("nan"), 8.0):
        with pytest.raises(ValueError, match="eps must be"):
            attacks.autoattack(net, x, y, eps=eps)


@pytest.mark.parametrize("classes", [4, 6])
def test_autoattack_has_as_many_targets_as_there_are_wrong_classes(classes):
    """The standard version asks for nine, which only fails where an image survives the first attack."""
    pytest.importorskip("pyautoattack", reason="install demem-lab[attacks]")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, classes))
    x = task(1, 8)[0].float()
    y = net(x).argmax(1)
    moved = attacks.autoattack(net, x, y, eps=1e-3)
    assert (net(moved).argmax(1) == y).all() and (moved - x).abs().max() <= 1e-3 + 1e-6


def test_autoattack_of_an_inner_modules_constant_is_computed_anew(store, monkeypatch):
    """Neither weights nor text say what a plain attribute of an inner module is."""
    class Shift(nn.Module):
        def __init__(self, by):
            super().__init__()
            self.by = by

        def forward(self, x):
            return x - self.by

    torch.manual_seed(0)
    last, x = nn.Linear(16, 4), task(1, 6)[0].float()
    nets = [nn.Sequential(Shift(by), nn.Flatten(), last) for by in (0.0, 0.5)]
    judged = []

    class Judge:
        apgd_targeted = fab = type("Attack", (), {})()

        def __init__(self, model, **_):
            self.model = model

        def run_standard_evaluation(self, x, y, batch_size):
            judged.append(self.model)
            return x, y

    monkeypatch.setitem(sys.modules, "pyautoattack", type(sys)("pyautoattack"))
    sys.modules["pyautoattack"].AutoAttack = Judge
    for net in (*nets, *nets):
        attacks.autoattack(net, x, torch.zeros(6, dtype=torch.int64), eps=0.1, store=store)
    assert judged == nets


def test_autoattack_says_what_is_missing(monkeypatch):
    net, (x, y) = TwoClasses(), task()
    with monkeypatch.context() as without, pytest.raises(ImportError, match=r"demem-lab\[attacks\]"):
        without.setitem(sys.modules, "pyautoattack", None)
        attacks.autoattack(net, x, y, eps=0.1)
    pytest.importorskip("pyautoattack", reason="install demem-lab[attacks]")
    with pytest.raises(ValueError, match="at least 4 classes, got 2"):
        attacks.autoattack(net, x, y, eps=0.1)


@pytest.mark.parametrize("make", [
    lambda: PGD(-0.1), lambda: PGD(float("nan")), lambda: PGD(float("inf")), lambda: PGD(0.1, 0), lambda: PGD(0.1, 1.5),
    lambda: PGD(0.1, restarts=0), lambda: PGD(0.1, norm="l1"), lambda: PGD(0.1, step_size=float("nan")),
])
def test_bad_settings(make):
    with pytest.raises(ValueError, match="must be"):
        make()


def test_bad_queries():
    net, (x, y) = TwoClasses(), task()
    bad = ((x + 1, y, "pixels"), (x * float("nan"), y, "pixels"), (x, y + 5, "0..1"), (x[0], y, "shape"))
    for bad_x, bad_y, words in bad:
        with pytest.raises(ValueError, match=words):
            attacks.robust_accuracy(net, bad_x, bad_y, [PGD(0.1)])
    with pytest.raises(ValueError, match="at least one attack"):
        attacks.robust_accuracy(net, x, y, [])
    two = MLP((5,)).build(models=2, shape=(1, 4, 4), classes=2, seeds=(0, 1)).double()
    with pytest.raises(ValueError, match="one model at a time, got 2"):
        attacks.withstands(two, x, y, [PGD(0.1)])


def test_n_fgsm_is_one_step_from_noise_and_is_not_projected():
    net, (x, y) = TwoClasses(), task()
    found = NFGSM(0.07, k=2.0)(net, x, y, rng=torch.Generator().manual_seed(3))
    uniform = torch.rand(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    start = (x + (2 * uniform - 1) * 0.14).clamp(0, 1)  # clamped before the slope is taken, so that steps there are not lost
    assert torch.allclose(found, (start + 0.07 * uphill(net, y).sign()).clamp(0, 1))
    seen = []
    NFGSM(0.07)(lambda z: seen.append(z.detach()) or net(z), x, y, rng=torch.Generator().manual_seed(3))
    assert torch.allclose(seen[0], start)  # the network meets pixels only
    assert (found - x).abs().max() > 0.07 and found.min() >= 0 and found.max() <= 1
    assert torch.allclose(NFGSM(0.07, k=0.0)(net, x, y), FGSM(0.07)(net, x, y))
    streams = Streams((1,), "attack", 0)
    assert torch.equal(NFGSM(0.07)(net, x, y, rng=streams), NFGSM(0.07)(net, x, y, rng=streams))
    with pytest.raises(ValueError, match="k must be"):
        NFGSM(0.1, k=-1.0)


def test_rs_fgsm_is_a_long_step_back_into_the_ball():
    net, (x, y) = TwoClasses(), task()
    found = RSFGSM(0.07)(net, x, y, rng=torch.Generator().manual_seed(3))
    uniform = torch.rand(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    start = (x + (2 * uniform - 1) * 0.07).clamp(0, 1)
    moved = start + 1.25 * 0.07 * uphill(net, y).sign()
    assert torch.allclose(found, torch.min(torch.max(moved, x - 0.07), x + 0.07).clamp(0, 1))


LOSSES = {
    "cross-entropy": attacks.cross_entropy,
    "margin": attacks.margin,
    "a loss of one's own": lambda logits, y: logits.square().sum(-1) - logits.gather(-1, y[:, None])[:, 0],
    "TRADES": _Away(torch.randn(15, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("hidden", [(), (7,), (9, 7, 5)])
def test_slopes_by_hand_equal_autograd(loss, hidden):
    """Several models at once, pixels normalised by the model, weights far from where they started."""
    net = MLP(hidden, mean=0.3, std=0.4).build(models=3, shape=(1, 4, 4), classes=10, seeds=(0, 1, 2)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype))
    x = torch.rand(15, 1, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = torch.arange(15) % 10
    z = x.clone().requires_grad_()
    (right,) = torch.autograd.grad(LOSSES[loss](net(z), y).sum(), z)
    with net.recording():
        found = attacks.image_slope(net, x, y, LOSSES[loss])
        assert not any(layer.calls for layer in net.layers)
    torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)
    assert not found.requires_grad and not x.requires_grad and all(p.grad is None for p in net.parameters())


def test_sixteen_bits_and_compiled_networks_go_through_autograd():
    net = MLP((5,)).build(models=1, shape=(1, 2, 2), classes=3, seeds=(0,))
    x, y = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 2, 0])
    net.compute_in(torch.bfloat16)
    assert net.by_hand(x, lambda logits: logits) is None
    assert attacks.image_slope(net, x, y).shape == x.shape
    net.compute_in(None)
    calls = []
    net.fast = lambda z: calls.append(1) or net.body(z)
    assert attacks.image_slope(net, x, y).shape == x.shape and calls == [1]


@pytest.mark.parametrize(("rows", "classes"), [(513, 10), (512, 10), (600, 16), (600, 2)])
def test_cross_entropy_laid_out_otherwise_is_torchs(rows, classes):
    generator = torch.Generator().manual_seed(0)
    logits = (100 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).requires_grad_()
    y = torch.randint(classes, (rows,), generator=generator)
    found, wanted = attacks.cross_entropy(logits, y), F.cross_entropy(logits, y, reduction="none")
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(found.sum(), logits), torch.autograd.grad(wanted.sum(), logits), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    assert torch.allclose(losses.log_softmax(logits), logits.log_softmax(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("chosen", "words"), [
    ([PGD(0.1), NFGSM(0.1)], r"judged by PGD, whose images stay within eps, got NFGSM\(.*\); use PGD\(eps\).*is for training"),
    ([PGD], "judged by PGD.*got the class PGD"), (["pgd"], "judged by PGD.*got 'pgd'"),
    (FGSM, "attacks must be a list.*got the function FGSM"), ("pgd", "attacks must be a list.*got 'pgd'"),
    (PGD(0.1), r"attacks must be a list.*\[PGD"),
])
def test_robustness_is_judged_only_by_attacks_that_stay_in_the_ball(chosen, words):
    net, (x, y) = TwoClasses(), task()
    for judged in (attacks.robust_accuracy, attacks.withstands):
        with pytest.raises(ValueError, match=words):
            judged(net, x, y, chosen)
