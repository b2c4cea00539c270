"""A stranger's torch model: asked twice, it answers the same."""

import numpy as np
import pytest
import torch
from torch import nn

from demem_lab.attacks import NFGSM, PGD
from demem_lab.subject import ask


@pytest.fixture
def asked():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    sides = [(torch.rand(300, 1, 4, 4), torch.randint(0, 3, (300,))) for _ in range(2)]

    def ask_with(**how):
        return ask(net, members=sides[0], non_members=sides[1], device="cpu", **how)

    return ask_with


@pytest.mark.parametrize("attack", [PGD(0.1, 2), PGD(0.1, 2, restarts=2), PGD(0.1, 1, norm="l2"), NFGSM(0.1)])
def test_a_random_start_is_the_same_one_every_time(asked, attack):
    before = torch.get_rng_state()
    found = [asked(attack=attack) for _ in range(2)]
    for name in ("member_adv_logits", "nonmember_adv_logits"):
        assert np.array_equal(found[0].arrays[name], found[1].arrays[name])
    assert found[0].graded is None or np.array_equal(found[0].graded, found[1].graded)
    assert found[0].robustness == found[1].robustness and torch.equal(before, torch.get_rng_state())


def test_batches_do_not_share_their_random_numbers(asked):
    drawn = []

    class Told(PGD):
        def _random_offset(self, x, rng):
            drawn.append(super()._random_offset(x, rng))
            return drawn[-1]

    asked(attack=Told(0.1, 1))
    assert not torch.equal(drawn[0][:44], drawn[4][:44])  # the query of the first batch, of the second (after three radii)


def test_an_attack_of_ones_own_needs_no_generator(asked):
    found = asked(attack=lambda net, x, y: (x + 0.1).clamp(0, 1))
    assert found.arrays["member_adv_logits"].shape == (300, 3)


@pytest.mark.parametrize("attack", [PGD, "pgd", 0.1])
def test_what_is_no_attack_is_one_sentence(asked, attack):
    with pytest.raises(ValueError, match=r"attack must be an object such as PGD\(0.03\), got "):
        asked(attack=attack)
