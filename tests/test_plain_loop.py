"""Adversarial training of a ResNet-18, step by step, against a loop in plain torch that shares only random numbers with it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from demem_lab.attacks import PGD
from demem_lab.augment import CropFlip
from demem_lab.data import Dataset
from demem_lab.layers import Conv
from demem_lab.models import VGG, ResNet18, WideResNet
from demem_lab.objectives import PGDAT
from demem_lab.optimizers import SGD, HalfFlat, WarmUp
from demem_lab.sampling import Shuffled
from demem_lab.streams import Streams
from demem_lab.training import Recipe, train

EPS, STEP, BATCH, RATE, DECAY, EPOCHS, WIDTH = 8 / 255, 5 / 255, 6, 0.1, 5e-4, 2, 8


def block(inputs, outputs, stride, norm):
    short = nn.Sequential()
    if stride != 1 or inputs != outputs:
        short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))
    main = nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), norm(outputs), nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), norm(outputs),
    )
    return nn.ModuleDict({"main": main, "short": short})


class Plain(nn.Module):
    def __init__(self, norm, classes):
        super().__init__()
        self.stem, inputs = nn.Sequential(nn.Conv2d(3, WIDTH, 3, 1, 1, bias=False), norm(WIDTH)), WIDTH
        self.blocks = nn.ModuleList()
        for stage in range(4):
            for number in range(2):
                self.blocks.append(block(inputs, WIDTH * 2**stage, 2 if stage and not number else 1, norm))
                inputs = WIDTH * 2**stage
        self.out = nn.Linear(inputs, classes)

    def forward(self, x):
        h = F.relu(self.stem((x - 0.5) / 0.25))
        for one in self.blocks:
            h = F.relu(one["main"](h) + one["short"](h))
        return self.out(h.mean((2, 3)))


def layers(net):
    """The parts with weights, in the order of ours: stem, then of each block both convolutions and the shortcut."""
    parts = [*net.stem]
    for one in net.blocks:
        parts += [m for m in (*one["main"], *one["short"]) if not isinstance(m, nn.ReLU)]
    return [*parts, net.out]


def ours_in_order(net):
    parts = [net.stem, net.stem_norm]
    for b in net.blocks:
        parts += [b.conv1, b.norm1, b.conv2, b.norm2, *([] if b.short is None else [b.short, b.short_norm])]
    return [*parts, net.out]


def laid_side_by_side(ours, plain):
    """Pairs of tensors that mean the same, ours as plain torch has it."""
    for a, b in zip(ours_in_order(ours), layers(plain), strict=True):
        yield a.weight[0].T if isinstance(b, nn.Linear) else a.weight[0], b.weight
        if b.bias is not None:
            yield a.bias[0], b.bias
        if isinstance(b, nn.BatchNorm2d):
            yield a.running_mean[0], b.running_mean
            yield a.running_var[0], b.running_var


def moved(x, rng):
    """Crop and flip, image by image: how far down, how far right, mirrored or not."""
    images = []
    for image, (down, right, coin) in zip(x, rng.uniform_rows(torch.empty(len(x), 3)).tolist(), strict=True):
        image = F.pad(image, (4, 4, 4, 4))[:, int(9 * down) :, int(9 * right) :][:, :16, :16]
        images.append(image.flip(-1) if coin < 0.5 else image)
    return torch.stack(images)


def attacked(net, x, y, rng):
    delta = (2 * rng.uniform_rows(x) - 1) * EPS
    delta = (x + delta).clamp(0, 1) - x
    for _ in range(3):
        delta.requires_grad_()
        slope = torch.autograd.grad(F.cross_entropy(net(x + delta), y), delta)[0]
        delta = (delta.detach() + STEP * slope.sign()).clamp(-EPS, EPS)
        delta = (x + delta).clamp(0, 1) - x
    return (x + delta).detach()


def wanted_rate(t, total):
    """Up in a straight line for 0.3 of the steps, and down to zero over the last 0.7."""
    return RATE * min(1, (t + 1) / (0.3 * total)) * min(1, (total - t) / (0.7 * total))


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_every_step_is_that_of_a_plain_loop(norm):
    generator, seed, n, losses = torch.Generator().manual_seed(0), 3, 25, []
    images = Dataset("made", torch.rand(n, 3, 16, 16, generator=generator), torch.arange(n) % 5, tuple("abcde"), "made", EPS)
    recipe = Recipe(
        ResNet18(width=WIDTH, norm=norm), PGDAT(PGD(EPS, 3, STEP)), optimizer=SGD(lr=RATE, weight_decay=DECAY),
        sampler=Shuffled(BATCH), schedule=WarmUp(HalfFlat(0.7), 0.3), epochs=EPOCHS, augment=CropFlip(),
    )
    by_group = lambda channels: nn.GroupNorm(math.gcd(channels, 32), channels)  # noqa: E731
    plain = Plain(nn.BatchNorm2d if norm == "batch" else by_group, 5).double()
    start = recipe.model.build(models=1, shape=(3, 16, 16), classes=5, seeds=(seed,)).double()
    with torch.no_grad():
        for a, b in laid_side_by_side(start, plain):
            b.copy_(a)
    optimizer = torch.optim.SGD(plain.parameters(), lr=RATE, momentum=0.9, weight_decay=DECAY)
    each = n // BATCH  # what is left over of a permutation waits
    for t in range(EPOCHS * each):
        epoch, place = divmod(t, each)
        rows = Streams((seed,), "shuffle", epoch).uniform(n)[0].argsort()[place * BATCH :][:BATCH]
        y = images.y[rows]
        z = moved(images.x[rows].double(), Streams((seed,), "augment", t))
        z = attacked(plain.eval(), z, y, Streams((seed,), "attack", t))
        loss = F.cross_entropy(plain.train()(z), y)
        optimizer.param_groups[0]["lr"] = wanted_rate(t, EPOCHS * each)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    everybody = torch.ones(1, n, dtype=torch.bool)
    found = train(images, everybody, recipe, seeds=(seed,), dtype=torch.float64)
    assert found.losses[0].tolist() == pytest.approx([sum(losses[:each]) / each, sum(losses[each:]) / each], abs=1e-8)
    with torch.no_grad():
        for a, b in laid_side_by_side(found.network().double(), plain):
            assert float((a - b).abs().max()) < 1e-7


@pytest.mark.parametrize(("spec", "first"), [
    (ResNet18(norm="batch"), "stem"), (ResNet18(), "stem"), (WideResNet(10, 2), "stem"), (VGG(), "conv.0"),
])
def test_normalised_convolutions_start_as_large_as_torchs_own(spec, first):
    torch.manual_seed(0)
    net, checked = spec.build(models=1, shape=(3, 32, 32), classes=10, seeds=(0,)), 0
    for name, layer in net.named_modules():
        if isinstance(layer, Conv):
            theirs = nn.Conv2d(layer.inputs, layer.outputs, layer.kernel, bias=False).weight.detach()
            ratio = float(layer.weight.detach().square().mean() / theirs.square().mean())
            assert abs(ratio - 1) < 6 * (2.8 / theirs.numel()) ** 0.5, name  # six standard errors of a ratio of variances
            assert (layer.inputs == 3) == (name == first)
            checked += 1
    assert checked >= 6
