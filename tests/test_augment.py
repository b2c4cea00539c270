"""Crops and flips against torchvision, one row at a time; each model's moves are its own."""

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import functional as vision

from demem_lab.augment import CropFlip, usual
from demem_lab.data import member_masks
from demem_lab.mechanisms import SelectiveDP
from demem_lab.models import MLP
from demem_lab.objectives import Natural
from demem_lab.sampling import Poisson
from demem_lab.streams import Streams
from demem_lab.training import Recipe, train


@pytest.mark.parametrize("how", [CropFlip(2), CropFlip(3, flip=False), CropFlip(1, reflect=True), CropFlip(0)], ids=str)
def test_each_row_is_torchvisions_crop_of_the_padded_image(how):
    x = torch.rand(12, 3, 6, 7)
    rng = Streams((5, 9), "augment", 3)
    draws = rng.uniform_rows(torch.empty(12, 3))
    moved = how(x, rng=rng)
    for image, found, (down, right, side) in zip(x, moved, draws.tolist(), strict=True):
        padded = vision.pad(image, how.padding, padding_mode="reflect" if how.reflect else "constant")
        width = 2 * how.padding + 1
        wanted = vision.crop(padded, int(down * width), int(right * width), 6, 7)
        assert torch.equal(found, vision.hflip(wanted) if how.flip and side < 0.5 else wanted)


def test_shifts_and_flips_are_fair():
    x = torch.zeros(4000, 1, 5, 5)
    x[:, 0, 2, 2], x[:, 0, 2, 3] = 1.0, 0.5  # the second pixel tells on which side the image was
    moved = CropFlip(2)(x, rng=Streams((0,), "augment"))
    row, column = (moved[:, 0] == 1).flatten(1).float().argmax(1).div(5, rounding_mode="floor").long(), None
    assert stats.chisquare(np.bincount(row, minlength=5)).pvalue > 1e-4
    column = (moved[:, 0] == 1).flatten(1).float().argmax(1) % 5
    inside = (column > 0) & (column < 4)
    at = torch.arange(4000)[inside]
    left = moved[at, 0, row[inside], column[inside] - 1] == 0.5
    assert stats.chisquare(np.bincount(column, minlength=5)).pvalue > 1e-4
    assert stats.binomtest(int(left.sum()), len(left), 0.5).pvalue > 1e-4


def test_a_models_moves_do_not_depend_on_the_others_or_on_padding():
    x = torch.rand(10, 1, 8, 8)
    among = CropFlip()(x.repeat(2, 1, 1, 1), rng=Streams((4, 7), "augment", 2, counts=(10, 3)))
    alone = CropFlip()(x[:3], rng=Streams((7,), "augment", 2))
    assert torch.equal(among[10:13], alone) and not torch.equal(among[:3], alone)


def test_the_moved_image_is_what_the_objective_sees(tiny, monkeypatch):
    seen, real = [], Natural.losses
    monkeypatch.setattr(Natural, "losses", lambda *given: (seen.append(given[2]), real(*given))[1])
    members = member_masks(24, 2, seed=0)
    recipe = Recipe(model=MLP((6,)), sampler=Poisson(4), epochs=2, augment=CropFlip(1))
    train(tiny, members, recipe, seeds=(0, 1), chunk=2)
    draw = Poisson(4).start(members, (0, 1), 1 / 3, 3)
    for step, images in enumerate(seen):
        index, valid = draw(step)
        rng = Streams((0, 1), "augment", step, counts=valid.sum(1).tolist())
        assert torch.equal(images, CropFlip(1)(tiny.x[index.flatten()], rng=rng))
    assert len(seen) == 6


def test_many_at_once_equal_one_by_one_with_augmentation(tiny):
    members, flags = member_masks(24, 4, seed=0), torch.arange(24) < 8
    recipe = Recipe(model=MLP((6,)), mechanism=SelectiveDP(1.0, 0.5, flags), sampler=Poisson(4), epochs=5, augment=CropFlip(1))
    together = train(tiny, members, recipe, seeds=(0, 1, 2, 3), chunk=4, dtype=torch.float64)
    alone = train(tiny, members[2:3], recipe, seeds=(2,), dtype=torch.float64)
    assert all((t[2] - alone.parameters[n][0]).abs().max() < 1e-8 for n, t in together.parameters.items())
    still = train(tiny, members[2:3], Recipe(**{**recipe.__dict__, "augment": None}), seeds=(2,), dtype=torch.float64)
    assert max((t[0] - alone.parameters[n][0]).abs().max() for n, t in still.parameters.items()) > 1e-3


def test_what_is_usual():
    assert usual("cifar10") == usual("cifar100") == CropFlip(4, flip=True)
    assert usual("svhn") is None and usual("fashion_mnist") is None


@pytest.mark.parametrize("padding", [-1, 1.5, 8])
def test_bad_padding(padding):
    with pytest.raises(ValueError, match="padding"):
        CropFlip(padding)(torch.rand(2, 1, 8, 8), rng=Streams((0,), "augment"))
