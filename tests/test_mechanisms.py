"""Updates against loops over samples, noise against its distribution, promises against their conditions."""

from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from scipy import stats

from demem_lab import layers
from demem_lab.attacks import PGD
from demem_lab.augment import CropFlip
from demem_lab.data import member_masks
from demem_lab.mechanisms import DPSGD, Batch, DownWeight, Drop, LossVariance, Plain, SelectiveDP
from demem_lab.models import ARCHITECTURES, MLP, SmallCNN
from demem_lab.objectives import TRADES, Natural, PerSample
from demem_lab.recipe import Recipe
from demem_lab.sampling import Poisson
from demem_lab.streams import Streams
from demem_lab.training import train

M, B, N = 2, 6, 20


def problem(spec=None, valid=None, step=0):
    net = (spec or MLP((7,))).build(models=M, shape=(1, 8, 8), classes=3, seeds=(0, 1)).double()
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(N, 1, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.arange(N) % 3
    index = torch.stack([torch.randperm(N, generator=generator)[:B] for _ in range(M)])
    valid = torch.ones(M, B, dtype=torch.bool) if valid is None else valid
    batch = Batch(index, valid, 10.0, step, 100, Streams((8, 9), "noise", step))
    return net, x, y, batch


def update(mechanism, net, x, y, batch):
    flat = batch.index.flatten()
    with net.recording(mechanism.per_sample):
        seen = Natural()(net, x[flat], y[flat], flat, rng=Streams((0, 1), "attack"))
        gradients = mechanism.update(net, seen, batch)
    return torch.cat([g.flatten(1) for g in gradients], 1)  # [M, P]


def by_hand(net, x, y, batch):
    """Each sample's gradient, one at a time: [M, B, P]."""
    rows = []
    for m in range(M):
        for b in range(B):
            flat = batch.index.flatten()
            loss = Natural()(net, x[flat], y[flat], flat, rng=None).loss[m * B + b]
            rows.append(torch.cat([g[m].flatten() for g in torch.autograd.grad(loss, list(net.parameters()))]))
    return torch.stack(rows).view(M, B, -1)


@pytest.mark.parametrize("spec", [MLP((7,)), SmallCNN(width=4, hidden=6)], ids=["mlp", "cnn"])
def test_selective_update_equals_the_loop(spec):
    valid = torch.ones(M, B, dtype=torch.bool)
    valid[0, 4:] = False
    net, x, y, batch = problem(spec, valid)
    own = by_hand(net, x, y, batch)
    bound = float(own.norm(dim=2).median())
    protected = torch.arange(N) % 2 == 0
    factor = torch.where(protected[batch.index], bound / own.norm(dim=2).clamp_min(bound), 1.0) * valid
    noise = Streams((8, 9), "noise", 0).private_normal(own.shape[2], torch.float64) * 0.7 * bound
    wanted = ((own * factor[..., None]).sum(1) + noise) / 10
    found = update(SelectiveDP(0.7, bound, protected), net, x, y, batch)
    assert torch.allclose(found, wanted, atol=1e-8)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0], ids=["few protected", "half", "everybody"])
@pytest.mark.parametrize("objective", [Natural(), TRADES(PGD(0.1, 1, random_start=False))], ids=["one pass", "two passes"])
@pytest.mark.parametrize(("patches", "written"), [(2**20, 2**24), (1, 2**24), (5000, 0)],
                         ids=["at once", "sample by sample", "in parts, nothing kept"])
def test_every_way_through_a_convolution_gives_the_same_clipped_sum(share, objective, patches, written, monkeypatch):
    """Norms of all or of few, patches in parts, gradients kept or computed again: values as from single samples."""
    monkeypatch.setattr(layers, "PATCHES", (patches, patches))
    monkeypatch.setattr(layers, "WRITTEN", written)
    net, x, y, _ = problem(SmallCNN(width=4, hidden=6))
    generator = torch.Generator().manual_seed(3)
    index = torch.stack([torch.randperm(N, generator=generator)[:10] for _ in range(M)])
    valid = torch.ones(M, 10, dtype=torch.bool)
    valid[1, 7:] = False
    batch = Batch(index, valid, 10.0, 0, 100, Streams((8, 9), "noise", 0))
    protected = torch.arange(N) < share * N
    flat = index.flatten()

    def seen():
        return objective(net, x[flat], y[flat], flat, rng=Streams((0, 1), "attack"))

    own = torch.stack([
        torch.cat([g[b // 10].flatten() for g in torch.autograd.grad(seen().loss[b], list(net.parameters()))])
        for b in range(M * 10)
    ]).view(M, 10, -1)
    bound = float(own.norm(dim=2).median())
    factor = torch.where(protected[index], bound / own.norm(dim=2).clamp_min(bound), 1.0) * valid
    for _ in range(2):  # what the first step kept must not be found by the second, which meets other weights
        with net.recording(True):
            found = SelectiveDP(0.0, bound, protected).update(net, seen(), batch)
        assert torch.allclose(torch.cat([g.flatten(1) for g in found], 1), (own * factor[..., None]).sum(1) / 10, atol=1e-9)


def test_what_norms_kept_serves_only_the_same_gradients():
    """Clip factors of one backward pass must never meet another's gradients."""
    net, x, y, batch = problem(SmallCNN(width=4, hidden=6))
    flat = batch.index.flatten()
    with net.recording(True):
        losses = Natural()(net, x[flat], y[flat], flat, rng=None).loss
        conv = next(layer for layer in net.layers if isinstance(layer, layers.Conv))
        out = [conv.calls[0][1]]
        first = list(torch.autograd.grad(losses.sum(), out, retain_graph=True))
        second = list(torch.autograd.grad(losses[:3].sum(), out))
        weights = torch.rand(M, B, dtype=torch.float64)
        wanted = conv.weighted_gradients(second, weights)
        conv.sample_norms(first)
        found = conv.weighted_gradients(second, weights)
        conv.sample_norms(first)
        assert conv.known is not None
    assert conv.known is None  # nothing large stays behind
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_everybody_is_dpsgd_and_nobody_is_plain():
    net, x, y, batch = problem()
    everybody, nobody = torch.ones(N, dtype=torch.bool), torch.zeros(N, dtype=torch.bool)
    dpsgd = update(DPSGD(1.3, 0.5), net, x, y, batch)
    assert torch.equal(update(SelectiveDP(1.3, 0.5, everybody), net, x, y, batch), dpsgd)
    found, plain = update(SelectiveDP(1.3, 0.5, nobody), net, x, y, batch), update(Plain(), net, x, y, batch)
    assert torch.allclose(found, plain, atol=1e-12)


def noise_of(mechanism, valid, steps=40):
    quiet = SelectiveDP(0.0, mechanism.max_grad_norm, mechanism.protected)
    found = []
    for step in range(steps):
        net, x, y, batch = problem(valid=valid, step=step)
        found.append((update(mechanism, net, x, y, batch) - update(quiet, net, x, y, batch)) * 10)
    return torch.stack(found, 1)  # [M, steps, P]


@pytest.mark.parametrize("kind", ["all drawn", "nobody drawn", "no protected one drawn", "a set of one"])
def test_noise_has_its_full_size_at_every_step(kind):
    valid = torch.zeros(M, B, dtype=torch.bool) if kind == "nobody drawn" else torch.ones(M, B, dtype=torch.bool)
    protected = torch.ones(N, dtype=torch.bool)
    if kind in ("no protected one drawn", "a set of one"):
        drawn = problem()[3].index.unique().tolist()
        left = [i for i in range(N) if i not in drawn]
        protected = torch.zeros(N, dtype=torch.bool)
        protected[left if kind == "no protected one drawn" else drawn[0]] = True
        assert protected.any()
    noise = noise_of(SelectiveDP(1.5, 0.4, protected), valid).flatten().numpy()
    assert stats.kstest(noise / (1.5 * 0.4), "norm").pvalue > 1e-4
    assert abs(noise.std() - 0.6) < 5 * 0.6 / np.sqrt(2 * len(noise))


def test_noise_differs_between_steps_and_models():
    noise = noise_of(DPSGD(1.0, 1.0), torch.ones(M, B, dtype=torch.bool), steps=3).flatten(0, 1).numpy()
    correlation = np.corrcoef(noise)[np.triu_indices(len(noise), 1)]
    assert np.abs(correlation).max() < 5 / np.sqrt(noise.shape[1])


def test_a_model_that_protects_nobody_gets_no_noise_beside_one_that_does():
    protected = torch.zeros(M, N, dtype=torch.bool)
    protected[1, 0] = True
    noise = noise_of(SelectiveDP(1.5, 0.4, protected), torch.ones(M, B, dtype=torch.bool), steps=2)
    assert noise[0].abs().max() < 1e-12 and noise[1].std() > 0.5


def test_settings_may_differ_between_models():
    net, x, y, batch = problem()
    protected = torch.arange(N) < torch.tensor([[5], [15]])
    both = update(SelectiveDP((0.0, 2.0), (0.3, 0.9), protected), net, x, y, batch)
    for m, (sigma, bound, size) in enumerate([(0.0, 0.3, 5), (2.0, 0.9, 15)]):
        alone = update(SelectiveDP(sigma, bound, torch.arange(N) < size), net, x, y, batch)
        assert torch.allclose(both[m], alone[m], atol=1e-12)


def test_for_models_cuts_settings_and_flags():
    mechanism = SelectiveDP((1.0, 2.0, 3.0), 1.0, torch.eye(3, 5, dtype=torch.bool))
    part = mechanism.for_models([2, 0], 3)
    assert part.noise_multiplier == (3.0, 1.0) and torch.equal(part.protected, mechanism.protected[[2, 0]])
    with pytest.raises(ValueError, match="3 entries for 4 models"):
        mechanism.for_models([0], 4)


def test_divisor_is_the_expected_batch_size():
    valid = torch.zeros(M, B, dtype=torch.bool)
    valid[:, :2] = True
    net, x, y, batch = problem(valid=valid)
    wanted = by_hand(net, x, y, batch)[:, :2].sum(1) / 10
    for mechanism in (Plain(), SelectiveDP(0.0, 1e9), LossVariance(0.0)):
        assert torch.allclose(update(mechanism, net, x, y, batch), wanted, atol=1e-10)


FLAGGED = pytest.mark.parametrize("make", [lambda f: SelectiveDP(0.5, 1.0, f), Drop, DownWeight],
                                  ids=["selective", "drop", "weight"])


@FLAGGED
def test_flags_may_be_numpy_as_the_measuring_modules_give_them(make):
    net, x, y, batch = problem()
    flagged = torch.arange(N) < 7
    ours, theirs = (update(make(f), net, x, y, batch) for f in (flagged.numpy(), flagged))
    assert torch.equal(ours, theirs)


@FLAGGED
def test_for_models_cuts_numpy_flags_too(make):
    flags = np.eye(3, 5, dtype=bool)
    part = make(flags).for_models([2, 0], 3)
    assert np.array_equal(part.protected if isinstance(part, SelectiveDP) else part.flagged, flags[[2, 0]])


def test_one_protected_sample_moves_the_sum_by_at_most_the_bound():
    net, x, y, batch = problem()
    mechanism = SelectiveDP(0.0, 0.05, torch.arange(N) % 2 == 0)
    here, whole = mechanism.protected[batch.index], update(mechanism, net, x, y, batch)
    assert here.any() and not here.all()
    for b in range(B):
        valid = torch.arange(B).expand(M, B) != b
        without = update(mechanism, net, x, y, Batch(batch.index, valid, 10.0, 0, 100, batch.noise))
        moved = (whole - without).norm(dim=1) * 10
        assert (moved[here[:, b]] <= 0.05 + 1e-12).all() and (moved[~here[:, b]] > 0.05).all()


def test_drop_down_weight_and_plain():
    net, x, y, batch = problem()
    flagged = torch.arange(N) % 3 == 0
    own = by_hand(net, x, y, batch)
    for weight in (0.0, 0.3, 1.0):
        factor = torch.where(flagged[batch.index], weight, 1.0).double()
        wanted = (own * factor[..., None]).sum(1) / 10
        assert torch.allclose(update(DownWeight(flagged, weight), net, x, y, batch), wanted, atol=1e-7)
    assert torch.allclose(update(Drop(flagged), net, x, y, batch), update(DownWeight(flagged, 0.0), net, x, y, batch))
    undrawn = Batch(batch.index, ~flagged[batch.index], 10.0, 0, 100, batch.noise)
    assert torch.equal(update(Drop(flagged), net, x, y, batch), update(Plain(), net, x, y, undrawn))
    assert torch.allclose(update(DownWeight(flagged, 1.0), net, x, y, batch), update(Plain(), net, x, y, batch))


def test_loss_variance_formula_and_coefficients():
    valid = torch.ones(M, B, dtype=torch.bool)
    valid[1, 3:] = False
    net, x, y, batch = problem(valid=valid)
    own = by_hand(net, x, y, batch)
    flat = batch.index.flatten()
    losses = Natural()(net, x[flat], y[flat], flat, rng=None).loss.detach().view(M, B)
    found = update(LossVariance(0.4), net, x, y, batch)
    for m in range(M):
        n = int(valid[m].sum())
        part = losses[m, :n]
        # gradient of variance: 2/(n-1) * sum (l_i - mean) grad_i ; the mean loss is over the expected batch size
        weights = 1 / 10 + 0.4 * 2 / (n - 1) * (part - part.mean())
        assert torch.allclose(found[m], (own[m, :n] * weights[:, None]).sum(0), atol=1e-9)


@pytest.mark.parametrize("drawn", [0, 1])
def test_loss_variance_of_fewer_than_two_adds_nothing(drawn):
    valid = torch.zeros(M, B, dtype=torch.bool)
    valid[:, :drawn] = True
    net, x, y, batch = problem(valid=valid)
    found = update(LossVariance(3.0), net, x, y, batch)
    assert torch.isfinite(found).all() and torch.allclose(found, update(Plain(), net, x, y, batch))


@pytest.mark.parametrize("mechanism", [Plain(), LossVariance(0.2), SelectiveDP(1.0, 0.5), Drop(torch.arange(N) < 9)],
                         ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("poison", [float("inf"), float("nan"), 1e30])
def test_rows_that_are_not_there_cannot_poison(mechanism, poison):
    net, x, y, batch = problem(valid=torch.tensor([[True] * 3 + [False] * 3] * M))
    flat = batch.index.flatten()
    clean = update(mechanism, net, x, y, batch)
    with net.recording(mechanism.per_sample):
        logits = net(x[flat])
        loss = torch.nn.functional.cross_entropy(logits, y[flat], reduction="none")
        bad = torch.where(batch.valid.flatten(), loss, poison)
        found = mechanism.update(net, PerSample(bad, bad, logits, y[flat], flat), batch)
    assert torch.allclose(torch.cat([g.flatten(1) for g in found], 1), clean, atol=1e-12)


def test_loss_variance_is_of_the_adversarial_losses_and_its_weight_is_per_model():
    net, x, y, batch = problem()
    flat, lam = batch.index.flatten(), (0.0, 0.7)
    objective = TRADES(PGD(0.1, 2), beta=2.0)

    def seen():
        return objective(net, x[flat], y[flat], flat, rng=Streams((0, 1), "attack"))

    found, again = LossVariance(lam).update(net, seen(), batch), seen()
    loss, adversarial = again.loss.view(M, B), again.adversarial_ce.view(M, B)
    total = sum(loss[m].sum() / 10 + lam[m] * adversarial[m].var() for m in range(M))
    for ours, theirs in zip(found, torch.autograd.grad(total, list(net.parameters())), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_loss_variance_equals_its_coefficient_form():
    net, x, y, batch = problem()
    batch = Batch(batch.index, batch.valid, float(B), 0, 100, batch.noise)
    own, lam, flat = by_hand(net, x, y, batch), 0.3, batch.index.flatten()
    losses = Natural()(net, x[flat], y[flat], flat, rng=None).loss.detach().view(M, B)
    factor = 1 + 2 * lam * B / (B - 1) * (losses - losses.mean(1, keepdim=True))
    assert torch.allclose(update(LossVariance(lam), net, x, y, batch), (own * factor[..., None]).mean(1), atol=1e-9)


EVERYBODY = torch.ones(100, dtype=torch.bool)
SETTING = {"sampling_rate": 0.05, "steps": 100, "delta": 1e-5, "n": 100}


def half_mirrored(x, *, rng):
    return (x + x.flip(0)) / 2  # each row holds a part of another one


@dataclass(frozen=True)
class AverageOut:
    """Losses divided by their mean: every row's gradient depends on who else was drawn."""

    def __call__(self, net, x, y, index, *, rng, counts=None):
        seen = Natural()(net, x, y, index, rng=rng)
        return replace(seen, loss=seen.loss / seen.loss.mean())


class Centred(MLP):
    """Each row's features less the mean of the batch: what batch normalisation does, without a layer of that name."""

    row_by_row = False

    def build(self, *, models, **settings):
        net = super().build(models=models, **settings)
        body = net.body

        def centred(x):
            h = x.unflatten(0, (models, -1))
            return body((h - h.mean(1, keepdim=True)).flatten(0, 1))

        net.body = centred
        return net


class Unsaid:
    """Anybody's architecture, which says nothing about its rows."""

    def build(self, **settings):
        return MLP((6,)).build(**settings)


@dataclass(frozen=True)
class Apart(AverageOut):
    row_by_row = True

    def __call__(self, net, x, y, index, *, rng, counts=None):
        return Natural()(net, x, y, index, rng=rng)


@pytest.mark.parametrize(("change", "holds"), [
    ({}, True), ({"augment": CropFlip(1)}, True), ({"objective": Apart()}, True),
    ({"augment": half_mirrored}, False), ({"objective": AverageOut()}, False),
    ({"model": Centred((6,))}, False), ({"model": Unsaid()}, False),
])
def test_nothing_is_promised_where_rows_may_mix(tiny, change, holds):
    """Clipping bounds what one ROW adds: of a row that holds others it bounds nobody's part."""
    recipe = Recipe(**{"model": MLP((6,)), "objective": Natural(), "mechanism": DPSGD(1.0), "sampler": Poisson(4), "epochs": 0.2}
                    | change)
    promised = train(tiny, member_masks(24, 2, seed=0), recipe, seeds=(0, 1)).guarantee(delta=1e-3)
    assert promised.holds == holds and ("may mix rows" in str(promised)) != holds


def test_every_architecture_of_the_package_says_that_its_rows_are_apart():
    for spec in ARCHITECTURES.values():
        assert Recipe(model=spec).row_by_row and "row_by_row" not in {field.name for field in fields(spec)}  # nor in a key


def test_promises_and_their_conditions():
    some = torch.arange(100) < 10
    text = str(SelectiveDP(1.0, 1.0, some).guarantee(**SETTING))
    for part in ("the 10 protected of 100", "given the set; end to end: none", "none for the other"):
        assert part in text
    assert "not accounted: the number of members (it sets rate and steps), learning rates tuned" in text
    assert "end to end" not in str(SelectiveDP(1.0, 1.0, some, selection="public").guarantee(**SETTING))
    everybody = DPSGD(1.0).guarantee(**SETTING)
    assert everybody.holds and "all samples" in str(everybody) and everybody.protected == 100
    assert everybody.budget == SelectiveDP(1.0, 1.0, some).guarantee(**SETTING).budget


def test_no_data_had_a_say_in_everybody():
    for mechanism in (DPSGD(1.0), SelectiveDP(1.0)):
        assert mechanism.guarantee(**SETTING).selection == "fixed"
        assert "end to end" not in str(mechanism.guarantee(**SETTING))


@pytest.mark.parametrize(("selection", "told"), [("from_data", True), ("public", False), ("fixed", False)])
def test_a_set_chosen_from_the_data_is_named_also_where_it_covers_everybody(selection, told):
    """That a threshold covers everybody is something that the data decided: one sample more may lift it over somebody."""
    text = str(SelectiveDP(1.0, 1.0, torch.ones(100, dtype=torch.bool), selection=selection).guarantee(**SETTING))
    assert "all samples" in text and ("given the set; end to end: none" in text) == told


def test_rounding_is_named_where_unprotected_samples_share_the_sums():
    some = SelectiveDP(1.0, 1.0, torch.arange(100) < 10).guarantee(**SETTING)
    assert "not accounted: " in str(some) and str(some).endswith(", rounding to floating point")
    assert "rounding" not in str(DPSGD(1.0).guarantee(**SETTING))


@pytest.mark.parametrize("digits", ["high", "medium"])
@pytest.mark.parametrize("model", [MLP((48,)), SmallCNN(width=8, hidden=16)], ids=["MLP", "SmallCNN"])
def test_clipping_keeps_all_digits_where_the_process_asked_for_fewer(model, digits, monkeypatch):
    """One sample a model, twice through the network, as TRADES does; what is left of it is as long as the bound says."""
    def longest():
        net = model.build(models=8, shape=(1, 8, 8), classes=4, seeds=tuple(range(8)))
        x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(3))
        valid, flat = torch.ones(8, 1, dtype=torch.bool), torch.zeros(8, dtype=torch.int64)
        batch = Batch(torch.zeros(8, 1, dtype=torch.int64), valid, 1.0, 0, 1, Streams(tuple(range(8)), "noise"))
        with net.recording():
            logits = net(x)
            loss = (net(0.9 * x) - 0.3 * logits).square().sum(1) * 100
            update = SelectiveDP(0.0, 0.01).update(net, PerSample(loss, loss, logits, flat, flat), batch)
        return sum(g.double().flatten(1).square().sum(1) for g in update).sqrt().max() / 0.01

    torch.set_float32_matmul_precision(digits)
    try:
        assert longest() == pytest.approx(1, abs=1e-5)
        assert torch.get_float32_matmul_precision() == digits
    finally:
        torch.set_float32_matmul_precision("highest")


def test_each_model_is_promised_by_its_own_settings():
    mechanism = SelectiveDP((0.0, 1.0, 4.0), 1.0, torch.arange(100) < torch.tensor([[10], [20], [0]]))
    first, second, third = (mechanism.guarantee(**SETTING, model=m) for m in range(3))
    assert not first.holds and "no noise" in str(first) and not third.holds and "nobody" in str(third)
    assert second.protected == 20 and second.budget == DPSGD(1.0).guarantee(**SETTING).budget
    assert DPSGD((1.0, 4.0)).guarantee(**SETTING, model=1).budget.epsilon < second.budget.epsilon


@pytest.mark.parametrize(("mechanism", "setting", "why"), [
    (SelectiveDP(0.0, 1.0), {}, "no noise"), (SelectiveDP(1.0, 1.0), {"batch_norm": True}, "batch normalisation"),
    (SelectiveDP(1.0, 1.0), {"poisson": False}, "Poisson"), (SelectiveDP(1.0, 1.0, EVERYBODY & False), {}, "nobody"),
    (LossVariance(0.2), {}, "no noise"), (Plain(), {}, "no calibrated noise"), (Drop(EVERYBODY), {}, "dropping"),
    (DownWeight(EVERYBODY), {}, "no calibrated noise"),
])
def test_no_guarantee_is_said_with_its_reason(mechanism, setting, why):
    found = mechanism.guarantee(**SETTING | setting)
    assert not found.holds and str(found).startswith("no guarantee: ") and why in str(found)


@pytest.mark.parametrize(("make", "words"), [
    (lambda: SelectiveDP(-1.0), "noise_multiplier"), (lambda: SelectiveDP(float("inf")), "noise_multiplier"),
    (lambda: SelectiveDP(float("nan")), "noise_multiplier"), (lambda: SelectiveDP((1.0, -1.0)), "noise_multiplier"),
    (lambda: SelectiveDP(1.0, (1.0, 0.0)), "max_grad_norm"), (lambda: SelectiveDP(1.0, float("inf")), "max_grad_norm"),
    (lambda: LossVariance(float("nan")), "lam"), (lambda: SelectiveDP(1.0, 0.0), "max_grad_norm must be > 0"),
    (lambda: LossVariance(-0.1), "lam"),
    (lambda: DownWeight(torch.ones(3, dtype=torch.bool), -1.0), "weight"),
    (lambda: SelectiveDP(1.0, 1.0, torch.ones(7, dtype=torch.bool)).check(8), "one entry for each of the 8"),
    (lambda: Drop(torch.ones(8)).check(8), "bool"), (lambda: SelectiveDP(1.0, selection="guess"), "selection"),
])
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("shape", [(30,), (3, 30), ()])
def test_flags_that_do_not_fit_promise_nothing(shape):
    with pytest.raises(ValueError, match="protected must have one entry for each of the 100 samples, got shape"):
        SelectiveDP(1.0, 1.0, torch.ones(shape, dtype=torch.bool)).guarantee(**SETTING | {"n": 100})


def test_a_delta_that_lets_one_sample_out_is_named():
    terms = SETTING | {"n": 100}
    weak, strong = (str(DPSGD(1.0).guarantee(**terms | {"delta": d})) for d in (0.01, 0.0099))
    assert "delta is not below 1/100: publishing one sample at random would pass" in weak and "1/100" not in strong
