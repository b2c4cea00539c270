"""Group normalisation's own kernels against torch's, on the card of this machine or in Triton's interpreter.

test_kernels.py runs this in a process of its own: whether Triton interprets is decided when it is first imported.
"""

import pytest
import torch
import torch.nn.functional as F

from demem_lab import kernels
from demem_lab.attacks import cross_entropy, frozen, image_slope
from demem_lab.folded import Normed
from demem_lab.layers import Conv, GroupNorm
from demem_lab.models import ResNet18

REAL = torch.cuda.is_available()
ON = "cuda" if REAL else "cpu"
DTYPE = torch.bfloat16 if REAL else torch.float32
SHAPES = [
    (3, 64, 8, 8, 32), (2, 128, 4, 4, 32), (2, 512, 2, 2, 32), (1, 8, 5, 3, 8), (2, 4, 7, 7, 4), (1, 1024, 2, 1, 32),
    (2, 64, 1, 1, 2),
]


@pytest.fixture(autouse=True)
def tried_anew():
    kernels._works.cache_clear()
    yield
    kernels._works.cache_clear()


def made(b, c, h, w, seed=0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, c, h, w, generator=generator) + offset
    weight, bias, slope = torch.randn(c, generator=generator), torch.randn(c, generator=generator), torch.randn_like(x)
    last = {"memory_format": torch.channels_last}
    return x.to(ON, DTYPE).contiguous(**last), weight.to(ON), bias.to(ON), slope.to(ON, DTYPE).contiguous(**last)


def close(found, wanted, times=1.0):
    tolerance = times * (2e-2 if DTYPE is torch.bfloat16 else 2e-5)
    torch.testing.assert_close(found.float(), wanted.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("b", "c", "h", "w", "groups"), SHAPES)
def test_what_comes_out_and_its_gradients_are_torchs(b, c, h, w, groups):
    x, weight, bias, slope = made(b, c, h, w)
    assert kernels.able(x, groups)
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    out, *_ = kernels.Normalise.apply(*leaves, groups)
    assert out.is_contiguous(memory_format=torch.channels_last) and out.dtype == DTYPE
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    wanted = F.group_norm(exact[0], groups, exact[1], exact[2])
    close(out, wanted)
    found, right = torch.autograd.grad(out, leaves, slope), torch.autograd.grad(wanted, exact, slope.double())
    for a, b_, t in zip(found, right, leaves, strict=True):
        assert a.dtype == t.dtype
        close(a, b_, times=5)


def test_shortcut_and_relu_come_with_it():
    x, weight, bias, shortcut = made(2, 64, 6, 6)
    wanted = (F.group_norm(x.float(), 32, weight, bias) + shortcut.float()).relu()
    close(kernels.normalised(x, weight, bias, 32, shortcut=shortcut, relu=True)[0], wanted)
    close(kernels.normalised(x, weight, bias, 32, relu=True)[0], F.group_norm(x.float(), 32, weight, bias).relu())
    added = F.group_norm(x.float(), 32, weight, bias) + shortcut.float()
    close(kernels.normalised(x, weight, bias, 32, shortcut=shortcut)[0], added)


def test_statistics_and_each_samples_gradients():
    x, weight, bias, slope = made(3, 64, 4, 4)
    _, mean, rstd = kernels.normalised(x, weight, bias, 16)
    parts = x.float().reshape(3, 16, -1)
    close(mean, parts.mean(2))
    close(rstd, (parts.var(2, unbiased=False) + 1e-5).rsqrt())
    _, scales, shifts = kernels.back(slope, x, weight, mean, rstd)
    plain = F.group_norm(x.float(), 16)
    close(scales, (plain * slope.float()).sum((2, 3)), times=5)
    close(shifts, slope.float().sum((2, 3)), times=5)


def test_a_large_mean_does_not_drown_the_variance():
    x, weight, bias, _ = made(2, 64, 8, 8, offset=100.0)
    wanted = F.group_norm(x.double(), 32, weight.double(), bias.double())
    torch.testing.assert_close(kernels.normalised(x, weight, bias, 32)[0].double(), wanted, rtol=2e-2, atol=2e-2)


def test_what_they_cannot_do_is_left_to_torch(monkeypatch):
    x, *_ = made(1, 64, 4, 4)
    assert not kernels.able(x.contiguous(), 32) and not kernels.able(torch.randn(1, 48, 2, 2), 16)
    with monkeypatch.context() as patched:
        patched.setattr(kernels, "_kernels", lambda: None)
        kernels._works.cache_clear()
        assert not kernels.able(x, 32)


def test_kernels_that_fail_or_are_wrong_are_not_used(monkeypatch):
    x, *_ = made(1, 64, 4, 4)
    def wrong(x, *_, **__):
        return x, x[:, :32, 0, 0], x[:, :32, 0, 0]

    bugs = (lambda *a, **k: 1 / 0, "ZeroDivisionError"), (wrong, "they are wrong")
    for name, broken, reason in [(name, *kind) for name in ("normalised", "back") for kind in bugs]:
        kernels._works.cache_clear()
        with monkeypatch.context() as patched, pytest.warns(UserWarning, match=f"do not work here .{reason}.*torch's are used"):
            patched.setattr(kernels, name, broken)
            assert not kernels.able(x, 32)
        assert not kernels.able(x, 32)  # tried once
    kernels._works.cache_clear()
    assert kernels.able(x, 32)


def test_elsewhere_nothing_is_tried(monkeypatch):
    x, *_ = made(1, 64, 4, 4)
    assert not kernels.able(x.double(), 32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernels, "_kernels", lambda: 1 / 0)
    assert not kernels.able(x.cpu(), 32)


def network():
    """A ResNet with all of its normalisation in the kernels."""
    net = ResNet18(width=4).build(models=1, shape=(3, 16, 16), classes=5, seeds=(0,)).to(ON)
    net.channels_last = True
    for layer in net.layers:
        if isinstance(layer, GroupNorm):
            generator = torch.Generator().manual_seed(1)
            layer.weight.data.copy_(0.5 + torch.rand(layer.weight.shape, generator=generator))
            layer.bias.data.copy_(torch.rand(layer.bias.shape, generator=generator) - 0.5)
    x = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(2)).to(ON)
    return net, x, (torch.arange(6) % 5).to(ON)


def torchs(monkeypatch):
    monkeypatch.setattr(kernels, "able", lambda *a: False)


def alike(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.fixture
def whole_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def test_a_networks_slopes_by_hand(monkeypatch, whole_float32):
    net, x, y = network()
    with frozen(net):
        assert all(isinstance(part, Normed) for block in net.prepare() for part in block)
        found = image_slope(net, x, y)
        monkeypatch.setattr(type(net), "by_hand", lambda *a: None)
        through_autograd = image_slope(net, x, y)
        torchs(monkeypatch)
        wanted = image_slope(net, x, y)
    alike(found, wanted)
    alike(through_autograd, wanted)


def test_a_networks_gradients_and_per_sample_norms(monkeypatch, whole_float32):
    def asked():
        net, x, y = network()
        with net.recording():
            loss = cross_entropy(net(x), y)
            layers = [layer for layer in net.layers if layer.calls]
            used = [isinstance(layer, GroupNorm) and bool(layer.statistics) for layer in layers]
            deltas = torch.autograd.grad(loss.sum(), [out for layer in layers for _, out in layer.calls])
            deltas = net.unscaled(deltas)
            norms = [layer.sample_norms([d]) for layer, d in zip(layers, deltas, strict=True)]
            sums = [
                part for layer, d in zip(layers, deltas, strict=True)
                for part in layer.weighted_gradients([d], torch.rand(1, 6, generator=torch.Generator().manual_seed(3)).to(ON))
            ]
        plain = torch.autograd.grad(cross_entropy(net(x), y).sum(), list(net.parameters()))
        return norms, sums, plain, used

    norms, sums, plain, used = asked()
    assert sum(used) == 20
    torchs(monkeypatch)
    for found, wanted in zip((norms, sums, plain), asked()[:3], strict=True):
        for a, b in zip(found, wanted, strict=True):
            alike(a, b)


def test_in_sixteen_bits_norms_are_nearer_to_float32_than_torchs(monkeypatch):
    """A network of one channel a group amplifies every rounding; there must be less of it, not more."""
    def norms(half):
        net, x, y = network()
        net.compute_in(half)
        with net.recording():
            loss = cross_entropy(net(x), y)
            layers = [layer for layer in net.layers if layer.calls]
            deltas = net.unscaled(torch.autograd.grad(loss.sum(), [out for layer in layers for _, out in layer.calls]))
            return [layer.sample_norms([d]).float() for layer, d in zip(layers, deltas, strict=True)]

    def nearness(found):
        return sum(float(F.cosine_similarity(a, b)) for a, b in zip(found, exact, strict=True)) / len(exact)

    exact, own = norms(None), norms(torch.bfloat16)
    torchs(monkeypatch)
    assert nearness(own) > 0.9 and nearness(own) > nearness(norms(torch.bfloat16))


def test_several_models_side_by_side_and_biases_are_not_for_them():
    net, x, _ = network()
    several = ResNet18(width=4).build(models=2, shape=(3, 16, 16), classes=5, seeds=(0, 1)).to(ON)
    assert several.eval().prepare() is None and several(x).shape == (6, 5)
    net.channels_last = False
    assert net.eval().prepare() is None
    with pytest.raises(ValueError, match="bias=False"):
        Normed.of(Conv(1, 3, 4), GroupNorm(1, 4, groups=4), torch.float32)
