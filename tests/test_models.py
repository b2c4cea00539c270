"""Networks and layers against single networks, torch.nn and one-sample-at-a-time autograd."""

import pytest
import torch
import torch.nn.functional as F

from demem_lab import layers
from demem_lab.attacks import PGD
from demem_lab.mechanisms import Batch, SelectiveDP
from demem_lab.models import ARCHITECTURES, MLP, VGG, ResNet18, SmallCNN, WideResNet, by_name
from demem_lab.objectives import PGDAT, TRADES, Natural
from demem_lab.streams import Streams

SPECS = {
    "mlp": (MLP((12, 9)), (1, 4, 4)), "cnn": (SmallCNN(width=4, hidden=8), (2, 8, 8)),
    "resnet": (ResNet18(width=8), (3, 8, 8)), "wide": (WideResNet(10, 1), (3, 8, 8)), "vgg": (VGG(width=4), (3, 8, 16)),
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


def test_small_cnn_is_what_torch_computes():
    net, x, _ = build("cnn", 2)
    h = (x[5:] - net.mean) / net.std
    for conv, norm, stride in zip(net.conv, net.norm, (1, 2, 1), strict=True):
        h = F.conv2d(h, conv.weight[1], conv.bias[1], stride=stride, padding=1)
        h = F.relu(F.group_norm(h, 4, norm.weight[1], norm.bias[1]))
    h = F.relu(F.linear(h.flatten(1), net.hidden.weight[1].T, net.hidden.bias[1]))
    assert torch.allclose(net(x)[5:], F.linear(h, net.out.weight[1].T, net.out.bias[1]), atol=1e-10)


def test_resnet_is_what_torch_computes():
    net, x, _ = build("resnet", 2)

    def normal(h, layer):
        return F.group_norm(h, layer.groups, layer.weight[1], layer.bias[1])

    def conv(h, layer):
        return F.conv2d(h, layer.weight[1], stride=layer.stride, padding=layer.kernel // 2)

    h = F.relu(normal(conv((x[5:] - net.mean) / net.std, net.stem), net.stem_norm))
    for block in net.blocks:
        way = F.relu(normal(conv(h, block.conv1), block.norm1))
        short = h if block.short is None else normal(conv(h, block.short), block.short_norm)
        h = F.relu(normal(conv(way, block.conv2), block.norm2) + short)
    assert [b.conv1.stride for b in net.blocks] == [1, 1, 2, 1, 2, 1, 2, 1]
    assert torch.allclose(net(x)[5:], F.linear(h.mean((2, 3)), net.out.weight[1].T, net.out.bias[1]), atol=1e-9)


def test_wide_resnet_is_what_torch_computes():
    net, x, _ = build("wide", 2)

    def active(h, layer):
        return F.relu(F.group_norm(h, layer.groups, layer.weight[1], layer.bias[1]))

    def conv(h, layer):
        return F.conv2d(h, layer.weight[1], stride=layer.stride, padding=layer.kernel // 2)

    h = conv((x[5:] - net.mean) / net.std, net.stem)
    for block in net.blocks:
        way = active(h, block.norm1)
        short = h if block.short is None else conv(way, block.short)
        h = short + conv(active(conv(way, block.conv1), block.norm2), block.conv2)
    assert [b.conv1.stride for b in net.blocks] == [1, 2, 2]
    h = active(h, net.last_norm).mean((2, 3))
    assert torch.allclose(net(x)[5:], F.linear(h, net.out.weight[1].T, net.out.bias[1]), atol=1e-9)


def test_vgg_is_what_torch_computes():
    net, x, _ = build("vgg", 2)
    h = (x[5:] - net.mean) / net.std
    for number, (conv, norm) in enumerate(zip(net.conv, net.norm, strict=True)):
        h = F.conv2d(h, conv.weight[1], padding=1)
        h = F.relu(F.group_norm(h, norm.groups, norm.weight[1], norm.bias[1]))
        h = F.max_pool2d(h, 2) if number in (1, 3, 5) else h
    assert h.shape == (5, 16, 1, 2)
    assert torch.allclose(net(x)[5:], F.linear(h.mean((2, 3)), net.out.weight[1].T, net.out.bias[1]), atol=1e-10)


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize(("name", "millions"), [("resnet18", 11.173962), ("wrn28_10", 36.479194)])
def test_large_networks_have_the_size_of_the_literature(name, millions, norm):
    # kuangliu/pytorch-cifar and the WideResNet paper's table 4 (36.5M): convolutions, scale and shift, one linear layer
    with torch.device("meta"):
        net = by_name(name, norm=norm).build(models=1, shape=(3, 32, 32), classes=10, seeds=(0,), device="meta")
    assert sum(p.numel() for p in net.parameters()) == round(millions * 1e6)
    blocks = net.blocks
    assert len(blocks) == {"resnet18": 8, "wrn28_10": 12}[name] and net.has_batch_norm == (norm == "batch")


def test_architectures_by_name():
    assert all(by_name(name) == spec for name, spec in ARCHITECTURES.items())
    assert by_name("vgg", norm="batch") == VGG(norm="batch")


@pytest.mark.parametrize("kind", SPECS)
def test_same_seed_same_weights_whatever_the_ensemble(kind):
    spec, shape = SPECS[kind]
    alone = spec.build(models=1, shape=shape, classes=3, seeds=(4,))
    among = spec.build(models=3, shape=shape, classes=3, seeds=(1, 4, 2))
    pairs = list(zip(alone.parameters(), among.parameters(), strict=True))
    assert all(torch.equal(a[0], b[1]) for a, b in pairs) and any(not torch.equal(a[0], b[0]) for a, b in pairs)


def test_first_weights_have_the_size_of_he_initialisation():
    net = SmallCNN(width=32, hidden=64).build(models=1, shape=(3, 8, 8), classes=10, seeds=(0,))
    for layer, fan_in in ((net.conv[1], 32 * 9), (net.hidden, 64 * 16)):
        std, n = (2 / fan_in) ** 0.5, layer.weight.numel()
        assert abs(float(layer.weight.detach().std()) - std) < 5 * std / (2 * n) ** 0.5


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


def test_batch_norm_is_torchs_for_each_model():
    ours = layers.BatchNorm(2, 3).double()
    theirs = [torch.nn.BatchNorm2d(3).double() for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for training in (True, True, False):
        x = torch.randn(4, 6, 5, 5, generator=generator, dtype=torch.float64) * 2 + 1
        wanted = [r.train(training)(part) for r, part in zip(theirs, x.chunk(2, 1), strict=True)]
        assert torch.allclose(ours.train(training)(x), torch.cat(wanted, 1), atol=1e-10)
    assert torch.allclose(ours.running_mean, torch.stack([r.running_mean for r in theirs]))
    assert torch.allclose(ours.running_var, torch.stack([r.running_var for r in theirs]))


@pytest.mark.parametrize("make", [lambda: layers.GroupNorm(2, 6, groups=3), lambda: layers.BatchNorm(2, 6)])
def test_scale_and_shift_are_the_same_whether_recorded_or_not(make):
    norm = make().double()
    generator = torch.Generator().manual_seed(0)
    for p in norm.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(5, 12, 4, 4, generator=generator, dtype=torch.float64)
    quick = norm(x)
    norm.calls = []
    assert torch.allclose(quick, norm(x), atol=1e-12) and len(norm.calls) == 1


def test_recording_ends_with_the_block_also_after_an_error():
    net, x, _ = build("mlp", 1)
    with pytest.raises(RuntimeError, match="planted"), net.recording():
        net(x)
        assert all(len(layer.calls) == 1 for layer in net.layers)
        raise RuntimeError("planted")
    assert all(layer.calls is None for layer in net.layers)


@pytest.mark.parametrize(("action", "words"), [
    (lambda: SmallCNN(width=6).build(models=1, shape=(1, 8, 8), classes=2, seeds=(0,)), "width"),
    (lambda: build("mlp", 3)[0](torch.rand(7, 1, 4, 4)), "7 rows"),
    (lambda: SmallCNN().build(models=1, shape=(1, 4, 4), classes=2, seeds=(0,)), "image height"),
    (lambda: ResNet18(norm="layer").build(models=1, shape=(1, 8, 8), classes=2, seeds=(0,)), "norm must be"),
    (lambda: WideResNet(12).build(models=1, shape=(1, 8, 8), classes=2, seeds=(0,)), "depth must be 6 n"),
    (lambda: VGG().build(models=1, shape=(1, 8, 4), classes=2, seeds=(0,)), "image height"),
    (lambda: by_name("vit"), "'wrn28_10'"), (lambda: by_name("cnn", norm="batch"), "only these have a choice"),
    (lambda: by_name("vgg", norm="layer"), "norm must be"),
    (lambda: MLP().build(models=2, shape=(1, 4, 4), classes=2, seeds=(0,)), "2 seeds"),
    (lambda: MLP((0,)), "hidden layer's width must be .*>= 1, got 0"), (lambda: MLP((8, 2.5)), "width must be a whole number"),
    (lambda: MLP(64), r"hidden must be the layers' widths, such as \(128, 128\), got 64"), (lambda: MLP("64"), "hidden must be"),
    (lambda: SmallCNN(hidden=0).build(models=1, shape=(1, 8, 8), classes=2, seeds=(0,)), "hidden must be"),
    (lambda: ResNet18(width=0).build(models=1, shape=(1, 8, 8), classes=2, seeds=(0,)), "width must be"),
    (lambda: VGG(width=0).build(models=1, shape=(1, 8, 8), classes=2, seeds=(0,)), "width must be"),
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
@pytest.mark.parametrize("passes", [1, 2])
def test_norms_and_weighted_sums_of_many_models_equal_autograd(kind, passes):
    """Both of a layer's formulas for M = 2, each layer by itself, against one sample at a time."""
    net, x, y = build(kind, 2)
    weights = torch.rand(2, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    views = [x, 1 - x][:passes]

    def losses():
        return sum(F.cross_entropy(net(view), y, reduction="none") for view in views)

    own = [[torch.autograd.grad(losses()[5 * m + b], list(net.parameters())) for b in range(5)] for m in range(2)]
    parameters = {p: i for i, p in enumerate(net.parameters())}
    with net.recording():
        total = losses().sum()
        outs = [out for layer in net.layers for _, out in layer.calls]
        deltas = iter(torch.autograd.grad(total, outs))
        for layer in net.layers:
            part = [next(deltas) for _ in layer.calls]
            norms, sums = layer.sample_norms(part), layer.weighted_gradients(part, weights)
            for m in range(2):
                grads = [[own[m][b][parameters[p]][m] for b in range(5)] for p in layer.parameters()]
                slow = sum(torch.stack(g).flatten(1).square().sum(1) for g in grads)
                assert torch.allclose(norms[m], slow, rtol=1e-8, atol=1e-14)
                for found, g in zip(sums, grads, strict=True):
                    wanted = torch.einsum("b,b...->...", weights[m], torch.stack(g))
                    # relative to the tensor: recording and not recording round differently, and small entries cancel
                    assert torch.allclose(found[m], wanted, rtol=1e-8, atol=1e-9 * float(wanted.abs().max()) + 1e-12)


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("objective", [Natural(), PGDAT(PGD(0.1, 2)), TRADES(PGD(0.1, 2))],
                         ids=lambda o: type(o).__name__)
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


@pytest.mark.parametrize("kind", [k for k in SPECS if "mlp" not in k])
def test_recording_changes_nothing_but_what_is_kept(kind):
    """Normalisation takes torch's fused scale and shift when nothing is recorded: the fast path against its slow twin."""
    net, x, _ = build(kind, 2)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.5)
    plain = net(x)
    with net.recording():
        kept = net(x)
    torch.testing.assert_close(plain, kept, rtol=1e-9, atol=1e-9 * plain.abs().max().item())


def test_widths_may_come_as_a_list():
    assert MLP([8, 4]) == MLP((8, 4)) and hash(MLP([8, 4])) == hash(MLP((8, 4)))
