"""Batch normalisation folded into convolutions: the same slopes as autograd's, and the same attacks."""

import pytest
import torch
from torch import nn

from demem_lab.attacks import PGD, cross_entropy, frozen, image_slope, margin
from demem_lab.folded import Folded
from demem_lab.layers import BatchNorm, Conv
from demem_lab.models import ResNet18
from demem_lab.objectives import PGDAT, TRADES
from demem_lab.streams import Streams


def network(models=1, norm="batch", half=None, device_layout=False):
    """A ResNet whose statistics and weights are those of a network that has been trained."""
    net = ResNet18(width=4, norm=norm).build(models=models, shape=(3, 16, 16), classes=5, seeds=range(models)).double()
    generator = torch.Generator().manual_seed(0)
    for layer in net.layers:
        if isinstance(layer, BatchNorm):
            for tensor, low in ((layer.running_mean, -0.5), (layer.running_var, 0.5), (layer.weight, 0.5), (layer.bias, -0.5)):
                tensor.data.copy_(low + torch.rand(tensor.shape, generator=generator, dtype=torch.float64))
    with torch.no_grad():
        net.out.weight.mul_(10)
    if device_layout:
        net.arranged_for("cpu")
        assert net.channels_last
    return net.eval()


def batch(models=1):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(models * 3, 3, 16, 16, generator=generator, dtype=torch.float64)
    return x, torch.arange(models * 3) % 5


def by_autograd(net, x, y, loss=cross_entropy):
    z = x.clone().requires_grad_()
    return torch.autograd.grad(loss(net(z), y).sum(), z)[0]


@pytest.mark.parametrize(("models", "layout"), [(1, False), (1, True), (2, False)])
@pytest.mark.parametrize("loss", [cross_entropy, margin])
def test_slopes_are_autograds(models, layout, loss):
    net, (x, y) = network(models, device_layout=layout), batch(models)
    with frozen(net):
        found = image_slope(net, x, y, loss)
        assert net.by_hand(x, lambda logits: logits) is not None
        torch.testing.assert_close(found, by_autograd(net, x, y, loss), rtol=1e-9, atol=1e-12)


def test_its_logits_are_the_networks():
    net, (x, _) = network(2), batch(2)
    seen = []
    with frozen(net):
        net.by_hand(x, lambda logits: seen.append(logits) or torch.zeros_like(logits))
        torch.testing.assert_close(seen[0], net(x), rtol=1e-9, atol=1e-12)


def test_batches_that_set_the_statistics_and_other_normalisations_go_through_autograd():
    net, (x, y) = network(), batch()
    net.train()
    assert net.by_hand(x, lambda logits: logits) is None
    before = [b.clone() for b in net.buffers()]
    right = by_autograd(net, x, y)
    for buffer, old in zip(net.buffers(), before, strict=True):
        buffer.copy_(old)
    torch.testing.assert_close(image_slope(net, x, y), right)
    group = network(norm="group")
    assert group.prepare() is None and group.by_hand(x, lambda logits: logits) is None


def test_a_convolution_with_a_bias_folds_too():
    conv, norm = Conv(2, 3, 4).double(), BatchNorm(2, 4).double()
    for tensor in (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.data.copy_(0.2 + torch.rand(tensor.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    norm.eval()
    x = torch.rand(5, 6, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        folded = Folded.of(conv, norm, torch.float64, channels_last=False)
        torch.testing.assert_close(folded.linear(x)[0], norm(conv(x)))
        shortcut = x[:, :4].repeat(1, 2, 1, 1)
        torch.testing.assert_close(folded.relu(x, shortcut)[0], (norm(conv(x)) + shortcut).relu())


def test_weights_are_folded_once_an_attack_and_anew_for_the_next(monkeypatch):
    net, (x, y) = network(), batch()
    made, of = [], Folded.of.__func__
    monkeypatch.setattr(Folded, "of", classmethod(lambda cls, *a, **k: made.append(1) or of(cls, *a, **k)))
    attack = PGD(0.1, 4, random_start=False)
    first = attack(net, x, y)
    convolutions = sum(isinstance(layer, Conv) for layer in net.layers)
    assert len(made) == convolutions and net.held is None
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(-1)
    assert not torch.equal(first, attack(net, x, y)) and len(made) == 2 * convolutions


@pytest.mark.parametrize("objective", [PGDAT(PGD(0.1, 3)), TRADES(PGD(0.1, 3))])
def test_training_meets_the_same_images(objective, monkeypatch):
    net, (x, y) = network(2), batch(2)
    rng = Streams((1, 2), "attack")
    found = objective.move(net, x, y, rng)
    monkeypatch.setattr(type(net), "by_hand", lambda *a: None)
    torch.testing.assert_close(found, objective.move(net, x, y, rng), rtol=0, atol=1e-9)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_sixteen_bits_point_where_autograd_points(half):
    """Rounding differs, so directions are compared, with those of float64: the folded one must not be further away."""
    net, (x, y) = network().float(), batch()
    x, exact = x.float(), by_autograd(network(), x, y).flatten()
    net.compute_in(half, 1024.0 if half is torch.float16 else 1.0)
    with frozen(net):
        cosines = [
            nn.functional.cosine_similarity(slope.double().flatten(), exact, dim=0)
            for slope in (image_slope(net, x, y), by_autograd(net, x, y))
        ]
        assert cosines[0] > 0.95 and cosines[0] > cosines[1] - 0.02, cosines
        lengths = [slope.double().norm() / exact.norm() for slope in (image_slope(net, x, y), by_autograd(net, x, y))]
        assert all(abs(length - 1) < 0.1 for length in lengths)
