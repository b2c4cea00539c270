import pytest
import torch
import torch.nn.functional as F

from demem_lab.accounting import budget
from demem_lab.attacks import NFGSM, PGD, RSFGSM
from demem_lab.data import member_masks
from demem_lab.mechanisms import DPSGD, DownWeight, Drop, LossVariance, Plain, SelectiveDP
from demem_lab.models import MLP, ResNet18
from demem_lab.objectives import AWP, MART, PGDAT, TRADES, Natural
from demem_lab.remedies import ClassVariance, GradedRelease, RelaxLoss
from demem_lab.sampling import Poisson
from demem_lab.streams import Streams
from demem_lab.training import Recipe, train


@pytest.fixture
def task():
    net = MLP((10,)).build(models=2, shape=(1, 4, 4), classes=3, seeds=(0, 1)).double()
    x = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return net, x, torch.arange(12) % 3, torch.arange(12)


def rng():
    return Streams((3, 4), "attack", 7)


def test_natural_is_cross_entropy_row_by_row(task):
    net, x, y, index = task
    seen = Natural()(net, x, y, index, rng=rng())
    assert torch.allclose(seen.loss, F.cross_entropy(net(x), y, reduction="none"))
    assert seen.loss.shape == (12,) and torch.equal(seen.adversarial_ce, seen.loss) and torch.equal(seen.index, index)


def test_pgdat_is_cross_entropy_on_the_attacked_images(task):
    net, x, y, index = task
    attack = PGD(0.1, 4)
    seen = PGDAT(attack)(net, x, y, index, rng=rng())
    moved = attack(net, x, y, rng=rng())
    assert torch.allclose(seen.loss, F.cross_entropy(net(moved), y, reduction="none"))
    assert (seen.loss.sum() > F.cross_entropy(net(x), y, reduction="sum"))


def kl(p, q):
    return (p * (p.log() - q.log())).sum(1)


def test_trades_formula(task):
    net, x, y, index = task
    attack = PGD(0.1, 4)
    seen = TRADES(attack, beta=5.0)(net, x, y, index, rng=rng())
    start = (x + 0.001 * rng().normal_rows(x)).clamp(0, 1)
    z = start.clone()
    for _ in range(4):  # PGD on the KL term, written out
        z.requires_grad_()
        (slope,) = torch.autograd.grad(kl(net(x).softmax(1).detach(), net(z).softmax(1)).sum(), z)
        z = torch.min(torch.max(z.detach() + 2.5 * 0.1 / 4 * slope.sign(), x - 0.1), x + 0.1).clamp(0, 1)
    wanted = F.cross_entropy(net(x), y, reduction="none") + 5 * kl(net(x).softmax(1), net(z).softmax(1))
    assert torch.allclose(seen.loss, wanted, atol=1e-9)
    assert torch.allclose(seen.adversarial_ce, F.cross_entropy(net(z), y, reduction="none"), atol=1e-9)


def test_trades_without_beta_is_natural(task):
    net, x, y, index = task
    a = TRADES(PGD(0.1, 2), beta=0.0)(net, x, y, index, rng=rng()).loss
    assert torch.allclose(a, Natural()(net, x, y, index, rng=rng()).loss)


@pytest.mark.parametrize("beta", [-1.0, float("nan"), float("inf")])
def test_bad_beta(beta):
    with pytest.raises(ValueError, match="beta must be"):
        TRADES(PGD(0.1), beta=beta)


EVERY = pytest.mark.parametrize("objective", [
    Natural(), PGDAT(PGD(0.1, 3)), PGDAT(NFGSM(0.1)), PGDAT(RSFGSM(0.1)), TRADES(PGD(0.1, 3)), MART(PGD(0.1, 3)),
],
                                ids=lambda o: type(o).__name__)


@EVERY
def test_losses_are_never_reduced_and_models_do_not_touch(task, objective):
    net, x, y, index = task
    seen = objective(net, x, y, index, rng=rng())
    assert seen.loss.shape == seen.adversarial_ce.shape == (12,) and seen.logits.shape == (12, 3)
    assert torch.allclose(seen.adversarial_ce, F.cross_entropy(seen.logits, y, reduction="none"))
    assert torch.equal(seen.y, y) and torch.equal(seen.index, index)
    other = x.clone()
    other[6:] = 1 - other[6:]
    again = objective(net, other, y, index, rng=rng())
    assert torch.allclose(again.loss[:6], seen.loss[:6]) and not torch.allclose(again.loss[6:], seen.loss[6:])
    gradients = torch.autograd.grad(seen.loss[:6].sum(), list(net.parameters()))
    assert all((g[1] == 0).all() and (g[0] != 0).any() for g in gradients)


@EVERY
def test_attack_starts_come_from_the_given_stream(task, objective):
    net, x, y, index = task
    first, same, other = (objective(net, x, y, index, rng=r).loss for r in (rng(), rng(), Streams((3, 4), "attack", 8)))
    assert torch.equal(first, same) and torch.equal(first, other) == isinstance(objective, Natural)


FLAGS = torch.arange(24) < 6
PAIRS = {
    "Plain": Plain(), "LossVariance": LossVariance(0.2), "Drop": Drop(FLAGS), "DownWeight": DownWeight(FLAGS, 0.3),
    "SelectiveDP": SelectiveDP(1.0, 1.0, FLAGS), "SelectiveDP, nobody": SelectiveDP(1.0, 1.0, FLAGS & False),
    "SelectiveDP, no noise": SelectiveDP(0.0, 1.0, FLAGS), "DPSGD": DPSGD(1.0),
    "GradedRelease": GradedRelease(torch.linspace(0, 1, 24)), "ClassVariance": ClassVariance(0.2), "RelaxLoss": RelaxLoss(5.0),
}
OBJECTIVES = {
    "Natural": Natural(), "PGDAT": PGDAT(PGD(0.1, 2)), "TRADES": TRADES(PGD(0.1, 2)), "MART": MART(PGD(0.1, 2)),
    "N-FGSM": PGDAT(NFGSM(0.1)), "RS-FGSM": PGDAT(RSFGSM(0.1)), "AWP": AWP(PGDAT(PGD(0.1, 2))),
    "TRADES-AWP": AWP(TRADES(PGD(0.1, 2))),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("name", PAIRS)
def test_every_pair_trains_and_says_what_it_promises(tiny, objective, name):
    """The promise does not depend on the objective (each sample's loss is its own), and never comes without conditions."""
    recipe = Recipe(model=MLP((6,)), objective=objective, mechanism=PAIRS[name], sampler=Poisson(4), epochs=1)
    ensemble = train(tiny, member_masks(24, 2, seed=0), recipe, seeds=(0, 1))
    assert all(torch.isfinite(p).all() for p in ensemble.parameters.values())
    promised = ensemble.guarantee(delta=1e-3)
    if name not in ("SelectiveDP", "DPSGD"):
        assert not promised.holds and str(promised).startswith("no guarantee: ") and not any(c.isdigit() for c in str(promised))
        return
    rate, steps = ensemble.sampling_rate, ensemble.steps
    assert promised.budget == budget(noise_multiplier=1.0, sampling_rate=rate, steps=steps, delta=1e-3)
    text = str(promised)
    assert "add/remove" in text and "not accounted: the number of members" in text and promised.budget.accountant in text
    assert ("given the set; end to end: none" in text) == (name == "SelectiveDP")


def test_mart_by_its_definition(task):
    net, x, y, index = task
    seen = MART(PGD(0.1, 3), beta=4.0)(net, x, y, index, rng=rng())
    x_adv = PGD(0.1, 3)(net, x, y, rng=rng())
    p, q = net(x).softmax(-1), net(x_adv).softmax(-1)
    for i in range(12):
        wrong = max(q[i, k] for k in range(3) if k != y[i])
        kl = sum(p[i, k] * torch.log(p[i, k] / q[i, k]) for k in range(3))
        wanted = -torch.log(q[i, y[i]]) - torch.log(1.0001 - wrong) + 4 * kl * (1 - p[i, y[i]])
        assert torch.allclose(seen.loss[i], wanted, atol=1e-8)
        assert torch.allclose(seen.adversarial_ce[i], -torch.log(q[i, y[i]]), atol=1e-8)


@pytest.mark.parametrize("objective", [TRADES(PGD(0.1, 3), 4.0), MART(PGD(0.1, 3), 4.0)], ids=lambda o: type(o).__name__)
def test_the_gradient_flows_through_both_predictions(task, objective):
    net, x, y, index = task
    seen = objective(net, x, y, index, rng=rng())
    p, q, right = net(x).softmax(1), net(objective.move(net, x, y, rng())).softmax(1), F.one_hot(y, 3) > 0
    wanted = -p[right].log() + 4 * kl(p, q)
    if isinstance(objective, MART):
        wanted = -q[right].log() - (1.0001 - q.masked_fill(right, 0).amax(1)).log() + 4 * kl(p, q) * (1 - p[right])
    slopes = [torch.autograd.grad(loss.sum(), list(net.parameters())) for loss in (seen.loss, wanted)]
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*slopes, strict=True))


@pytest.mark.parametrize("objective", [TRADES(PGD(0.1, 3)), MART(PGD(0.1, 3))], ids=lambda o: type(o).__name__)
def test_slopes_are_finite_where_a_wrong_class_is_certain(task, objective):
    net, x, y, index = task
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(400)
    seen = objective(net, x, y, index, rng=rng())
    assert (seen.logits.softmax(-1).scatter(-1, y[:, None], 0).amax(-1) == 1).any()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(seen.loss.sum(), list(net.parameters())))


def test_what_the_authors_guards_change_stays_below_the_bound(task):
    """MART's loss written as its authors' code has it, logarithms of probabilities with 1e-12 and 1.0000001."""
    net, x, y, index = task
    seen = MART(PGD(0.1, 3), beta=6.0)(net, x, y, index, rng=rng())
    clean, moved = net(x).softmax(1).detach(), seen.logits.softmax(1).detach()
    order = moved.argsort(1)
    second = torch.where(order[:, -1] == y, order[:, -2], order[:, -1])
    rows = torch.arange(12)
    distance = (clean * (clean.log() - (moved + 1e-12).log())).sum(1)
    wanted = -moved[rows, y].log() - (1.0001 - moved[rows, second] + 1e-12).log()
    wanted = wanted + 6 * distance * (1.0000001 - clean[rows, y])
    assert torch.allclose(seen.loss, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("attack", "step", "reach"), [(RSFGSM(0.1), 0.125, 1.0), (NFGSM(0.1, 2.0), 0.1, 2.0)], ids=["RS", "N"])
def test_single_step_training_by_its_definition(task, attack, step, reach):
    """RS-FGSM: uniform in the ball, one step of 1.25 eps, back to the ball. N-FGSM: uniform in k times the ball, no way back."""
    net, x, y, index = task
    seen = PGDAT(attack)(net, x, y, index, rng=rng())
    z = x + (2 * rng().uniform_rows(x) - 1) * reach * 0.1
    z = z.clamp(0, 1).requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(net(z), y, reduction="sum"), z)
    moved = z.detach() + step * slope.sign()
    if isinstance(attack, PGD):
        moved = x + (moved - x).clamp(-0.1, 0.1)
    else:
        assert ((moved.clamp(0, 1) - x).abs().amax() > 0.1)
    wanted = F.cross_entropy(net(moved.clamp(0, 1)), y, reduction="none")
    assert torch.allclose(seen.loss, wanted, atol=1e-9)


INNER = [Natural(), PGDAT(PGD(0.1, 3)), TRADES(PGD(0.1, 3)), MART(PGD(0.1, 3))]


@pytest.mark.parametrize("inner", INNER, ids=lambda o: type(o).__name__)
def test_awp_by_its_definition(task, inner):
    """Each weight matrix of each model moves by gamma |w| along its own gradient; losses there; and back again."""
    net, x, y, index = task
    counts = torch.arange(12) % 4 != 1  # model 0 has rows 0..5
    x_adv = inner.move(net, x, y, rng())
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    moved = {name: p.clone() for name, p in before.items()}
    for m in range(2):
        rows = torch.arange(12)[6 * m : 6 * m + 6]
        mean = inner.losses(net, x, x_adv, y, index).loss[rows[counts[rows]]].mean()
        for (name, p), slope in zip(net.named_parameters(), torch.autograd.grad(mean, list(net.parameters())), strict=True):
            if p.ndim > 2:
                moved[name][m] += 0.02 * p[m].detach().norm() * slope[m] / slope[m].norm()
    seen = AWP(inner, 0.02)(net, x, y, index, rng=rng(), counts=counts)
    for name, p in net.named_parameters():
        assert torch.allclose(p, moved[name], atol=1e-10)
    assert torch.allclose(seen.loss, inner.losses(net, x, x_adv, y, index).loss, atol=1e-10)
    gradients = torch.autograd.grad(seen.loss.sum(), list(net.parameters()))
    assert any((g != 0).any() for g in gradients)
    seen.undo()
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_awp_leaves_biases_alone(task):
    net, x, y, index = task
    biases = [p for p in net.parameters() if p.ndim == 2]
    with torch.no_grad():
        for p in biases:
            p.add_(1)  # a bias of 0 could not move by a share of its length
    before = [p.detach().clone() for p in biases]
    AWP(Natural(), 0.1)(net, x, y, index, rng=rng())  # not undone
    assert biases and all(torch.equal(p, old) for p, old in zip(biases, before, strict=True))


def test_awp_looks_at_the_unprotected_only(tiny):
    """With everybody protected AWP has nothing to climb, and is the inner objective; protected rows never move the weights."""
    members, attack = member_masks(24, 2, seed=0), PGD(0.1, 2)

    def trained(objective, mechanism):
        recipe = Recipe(model=MLP((6,)), objective=objective, mechanism=mechanism, sampler=Poisson(4), epochs=2)
        return train(tiny, members, recipe, seeds=(0, 1)).parameters

    for a, b in zip(*(trained(o, DPSGD(1.0)).values() for o in (AWP(PGDAT(attack)), PGDAT(attack))), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    selective = [trained(o, SelectiveDP(0.0, 1.0, FLAGS)) for o in (AWP(PGDAT(attack), 0.05), PGDAT(attack))]
    assert any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(*(s.values() for s in selective), strict=True))


def test_who_counts_next_to_nothing_hardly_moves_awps_weights(tiny):
    """Down-weighting goes over into dropping."""
    members = member_masks(24, 2, seed=0)

    def trained(mechanism):
        recipe = Recipe(model=MLP((6,)), objective=AWP(Natural(), 0.05), mechanism=mechanism, sampler=Poisson(4), epochs=2)
        return train(tiny, members, recipe, seeds=(0, 1), dtype=torch.float64).parameters.values()

    for a, b in zip(trained(DownWeight(FLAGS, 1e-9)), trained(Drop(FLAGS)), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("protected", [True, False])
def test_what_a_protected_sample_shows_does_not_reach_awps_move(task, protected):
    net, x, y, index = task
    counts = torch.ones(12, dtype=torch.bool)
    counts[3] = not protected
    places = []
    for image in (x[3], 1 - x[3]):
        other = x.clone()
        other[3] = image
        seen = AWP(PGDAT(PGD(0.1, 3)), 0.05)(net, other, y, index, rng=rng(), counts=counts)
        places.append([p.detach().clone() for p in net.parameters()])
        seen.undo()
    assert all(torch.allclose(a, b) for a, b in zip(*places, strict=True)) == protected


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_awp_puts_the_weights_back_when_the_losses_fail_at_the_moved_ones(task, monkeypatch, error):
    net, x, y, index = task
    before, seen, losses = [p.detach().clone() for p in net.parameters()], [], PGDAT.losses

    def fails_the_second_time(self, *arguments):
        seen.append([p.detach().clone() for p in net.parameters()])
        if len(seen) == 2:
            raise error("planted")
        return losses(self, *arguments)

    monkeypatch.setattr(PGDAT, "losses", fails_the_second_time)
    with pytest.raises(error, match="planted"):
        AWP(PGDAT(PGD(0.1, 3)), 0.05)(net, x, y, index, rng=rng())
    assert any(not torch.equal(moved, old) for moved, old in zip(seen[1], before, strict=True))
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("inner", [Natural(), TRADES(PGD(0.1, 2))], ids=lambda o: type(o).__name__)
def test_running_statistics_meet_the_images_once_at_awps_weights(inner):
    net = ResNet18(width=4, norm="batch").build(models=1, shape=(1, 8, 8), classes=3, seeds=(0,)).double()
    x, y, index = torch.rand(6, 1, 8, 8, dtype=torch.float64), torch.arange(6) % 3, torch.arange(6)
    stream, before = Streams((3,), "attack", 7), [b.clone() for b in net.buffers()]
    x_adv = inner.move(net, x, y, stream)
    AWP(inner, 0.05)(net, x, y, index, rng=stream)
    found = [b.clone() for b in net.buffers()]
    for b, old in zip(net.buffers(), before, strict=True):
        b.copy_(old)
    inner.losses(net, x, x_adv, y, index)  # the weights have not been put back
    assert all(torch.allclose(a, b) for a, b in zip(found, net.buffers(), strict=True))
    assert any(not torch.allclose(a, b) for a, b in zip(found, before, strict=True))


def test_awp_goes_around_a_single_objective():
    with pytest.raises(ValueError, match="AWP goes around"):
        AWP(AWP(Natural()))
    with pytest.raises(ValueError, match="gamma"):
        AWP(Natural(), -1.0)
