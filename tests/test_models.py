"""Networks and layers against single networks, torch.nn and one-sample-at-a-time autograd."""

import pytest
import torch
import torch.nn.functional as F

from demem_lab.attacks import PGD
from demem_lab.mechanisms import Batch, SelectiveDP
from demem_lab.models import MLP, ResNet18, SmallCNN
from demem_lab.objectives import PGDAT, TRADES, Natural
from demem_lab.streams import Streams

SPECS = {
    "mlp": (MLP((12, 9)), (1, 4, 4)), "cnn": (SmallCNN(width=4, hidden=8), (2, 8, 8)), "resnet": (ResNet18(width=8), (3, 8, 8)),
}


def build(kind, models, dtype=torch.float64):
    spec, shape = SPECS[kind]
    net = spec.build(models=models, shape=shape, classes=4, seeds=tuple(range(10, 10 + models))).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for p in net.parameters():  # so that no gradient is zero by symmetry
        p.data.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=dtype)[: len(p)])
    return net, torch.rand(models * 5, *shape, generator=generator, dtype=dtype), torch.arange(models * 5) % 4


def single(net, kind, m):
    spec, shape = SPECS[kind]
    one = spec.build(models=1, shape=shape, classes=4, seeds=(0,)).double()
    one.load_state_dict({name: t[m : m + 1] for name, t in net.state().items()})
    return one


@pytest.mark.parametrize("kind", SPECS)
def test_models_at_once_equal_each_model_alone(kind):
    net, x, _ = build(kind, 3)
    for m in range(3):
        assert torch.allclose(net(x)[5 * m : 5 * m + 5], single(net, kind, m)(x[5 * m : 5 * m + 5]), atol=1e-10)


def test_mlp_is_what_torch_computes():
    net, x, _ = build("mlp", 2)
    h = x[5:].flatten(1)
    for i, layer in enumerate(net.linear):
        h = F.linear(h, layer.weight[1].T, layer.bias[1])
        h = F.relu(h) if i < 2 else h
    assert torch.allclose(net(x)[5:], h, atol=1e-12)


def test_same_seed_same_weights_whatever_the_ensemble():
    alone = MLP((5,)).build(models=1, shape=(1, 2, 2), classes=3, seeds=(4,))
    among = MLP((5,)).build(models=3, shape=(1, 2, 2), classes=3, seeds=(1, 4, 2))
    assert all(torch.equal(a[0], b[1]) for a, b in zip(alone.parameters(), among.parameters(), strict=True))


@pytest.mark.parametrize("kind", SPECS)
def test_group_norm_keeps_samples_apart(kind):
    net, x, _ = build(kind, 1)
    changed = x.clone()
    changed[1:] = torch.rand_like(changed[1:])
    assert torch.allclose(net(x)[0], net(changed)[0], atol=1e-12)


def test_batch_norm_mixes_samples_and_says_so():
    net = ResNet18(width=8, norm="batch").build(models=1, shape=(3, 8, 8), classes=4, seeds=(0,)).double().train()
    x = torch.rand(5, 3, 8, 8, dtype=torch.float64)
    changed = torch.cat([x[:1], torch.rand(4, 3, 8, 8, dtype=torch.float64)])
    assert net.has_batch_norm and not torch.allclose(net(x)[0], net(changed)[0])


@pytest.mark.parametrize(("action", "words"), [
    (lambda: build("mlp", 3)[0](torch.rand(7, 1, 4, 4)), "7 rows"),
    (lambda: SmallCNN().build(models=1, shape=(1, 4, 4), classes=2, seeds=(0,)), "image height"),
    (lambda: ResNet18(norm="layer").build(models=1, shape=(1, 8, 8), classes=2, seeds=(0,)), "norm must be"),
    (lambda: MLP().build(models=2, shape=(1, 4, 4), classes=2, seeds=(0,)), "2 seeds"),
])
def test_bad_input(action, words):
    with pytest.raises(ValueError, match=words):
        action()


def slow_gradients(net, objective, x, y, index, rows):
    """Every sample's own gradient, one at a time: [samples, parameters]."""
    found = []
    for b in range(rows):
        seen = objective(net, x, y, index, rng=Streams((5,), "attack"))
        own = torch.autograd.grad(seen.loss[b], list(net.parameters()))
        found.append(torch.cat([g.flatten() for g in own]))
    return torch.stack(found)


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("objective", [Natural(), PGDAT(PGD(0.1, 2)), TRADES(PGD(0.1, 2))], ids=lambda o: type(o).__name__)
def test_clipped_sums_equal_one_sample_at_a_time(kind, objective):
    net, x, y = build(kind, 1)
    index = torch.arange(5)
    slow = slow_gradients(net, objective, x, y, index, 5)
    bound = float(slow.norm(dim=1).median())  # some are clipped, some are not
    protected = torch.tensor([True, True, False, True, False])
    factor = torch.where(protected, bound / slow.norm(dim=1).clamp_min(bound), 1.0)
    batch = Batch(index[None], torch.ones(1, 5, dtype=torch.bool), 7.0, 0, 1, Streams((5,), "noise"))
    mechanism = SelectiveDP(0.0, bound, protected)
    with net.recording():
        seen = objective(net, x, y, index, rng=Streams((5,), "attack"))
        fast = mechanism.update(net, seen, batch)
    fast = torch.cat([g.flatten() for g in fast])
    wanted = (slow * factor[:, None]).sum(0) / 7
    assert torch.allclose(fast, wanted, rtol=1e-8, atol=1e-10)


def test_per_sample_norms_agree_with_opacus():
    from opacus import GradSampleModule

    net, x, y = build("mlp", 1, torch.float32)
    linear = [torch.nn.Linear(a, b) for a, b in ((16, 12), (12, 9), (9, 4))]
    twin = torch.nn.Sequential(linear[0], torch.nn.ReLU(), linear[1], torch.nn.ReLU(), linear[2])
    for ours, theirs in zip(net.linear, twin[::2], strict=True):
        theirs.weight.data.copy_(ours.weight[0].T)
        theirs.bias.data.copy_(ours.bias[0])
    twin = GradSampleModule(twin, loss_reduction="sum")
    F.cross_entropy(twin(x.flatten(1)), y, reduction="sum").backward()
    theirs = sum(p.grad_sample.flatten(1).square().sum(1) for p in twin.parameters())
    with net.recording():
        net(x)
        deltas = torch.autograd.grad(F.cross_entropy(net.linear[-1].calls[0][1][0], y, reduction="sum"),
                                     [layer.calls[0][1] for layer in net.linear])
        ours = sum(layer.sample_norms([d])[0] for layer, d in zip(net.linear, deltas, strict=True))
    assert torch.allclose(ours, theirs, rtol=1e-4)
