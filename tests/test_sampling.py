import pytest
import torch
from scipy import stats

from demem_lab.data import member_masks
from demem_lab.sampling import Poisson, Shuffled


def draws(sampler, members, seeds, rate, steps):
    draw = sampler.start(members, seeds, rate, 5)
    out = []
    for step in range(steps):
        index, valid = draw(step)
        out.append([set(index[m][valid[m]].tolist()) for m in range(len(members))])
        assert index.shape == valid.shape and valid.sum(1).tolist() == [len(s) for s in out[-1]]  # nobody twice
    return out


def test_poisson_inclusion_is_an_independent_coin_for_members_only():
    members = member_masks(40, 2, seed=0)
    found = draws(Poisson(5), members, (1, 2), 0.25, 400)
    for m in range(2):
        counts = torch.zeros(40)
        for step in found:
            for i in step[m]:
                counts[i] += 1
        assert (counts[~members[m]] == 0).all()
        total = int(counts.sum())
        assert stats.binomtest(total, 400 * 20, 0.25).pvalue > 1e-4
        assert stats.chisquare(counts[members[m]].numpy()).pvalue > 1e-4
        sizes = torch.tensor([float(len(step[m])) for step in found])
        assert abs(sizes.var() / (20 * 0.25 * 0.75) - 1) < 0.4  # independent coins, not batches of fixed size


@pytest.mark.parametrize("sampler", [Poisson(5), Shuffled(4)])
def test_every_step_of_every_epoch_has_a_draw_of_its_own(sampler):
    found = draws(sampler, member_masks(40, 2, seed=0), (1, 2), 0.25, 15)  # three epochs
    for m in range(2):
        assert len({frozenset(step[m]) for step in found}) == 15


def test_a_models_draw_does_not_depend_on_its_neighbours():
    members = member_masks(40, 6, seed=1)
    seeds = tuple(range(6))
    together = draws(Poisson(5), members, seeds, 0.2, 20)
    alone = draws(Poisson(5), members[3:4], seeds[3:4], 0.2, 20)
    assert [step[3] for step in together] == [step[0] for step in alone]


def test_one_more_member_changes_nobody_elses_draw():
    members = torch.zeros(1, 30, dtype=torch.bool)
    members[0, :10] = True
    more = members.clone()
    more[0, 20] = True
    before, after = (draws(Poisson(5), m, (7,), 0.4, 50) for m in (members, more))
    assert [s[0] - {20} for s in after] == [s[0] for s in before] and any(20 in s[0] for s in after)


def test_a_batch_may_be_empty_and_is_never_cut():
    members = torch.ones(2, 30, dtype=torch.bool)
    empty = draws(Poisson(1), members, (0, 1), 1e-9, 3)
    full = draws(Poisson(1), members, (0, 1), 1.0, 3)
    assert all(not s for step in empty for s in step) and all(len(s) == 30 for step in full for s in step)


def test_shuffled_batches_cover_the_members_once_an_epoch():
    members = member_masks(40, 2, seed=0)
    found = draws(Shuffled(4), members, (3, 4), 0.2, 10)
    for m in range(2):
        for epoch in (found[:5], found[5:]):
            parts = [step[m] for step in epoch]
            assert sum(map(len, parts)) == 20 and set().union(*parts) == set(members[m].nonzero().flatten().tolist())
    assert found[0] != found[5]


@pytest.mark.parametrize("count", [18, 22])
def test_shuffled_batches_with_a_remainder(count):
    members = torch.zeros(1, 40, dtype=torch.bool)
    members[0, 3 : 3 + count] = True
    steps = round(count / 4)  # rounded down: some members wait; rounded up: the last batch is not full
    draw = Shuffled(4).start(members, (0,), 0.1, steps)
    for epoch in range(6):
        batches = [draw(step) for step in range(epoch * steps, (epoch + 1) * steps)]
        drawn = torch.cat([index[0][valid[0]] for index, valid in batches]).tolist()
        assert len(drawn) == len(set(drawn)) == min(count, 4 * steps) and members[0, drawn].all()


@pytest.mark.parametrize("kind", [Poisson, Shuffled])
def test_any_step_can_be_drawn_again_in_any_order(kind):
    members = member_masks(40, 2, seed=0)
    draw, again = (kind(5).start(members, (1, 2), 0.25, 4) for _ in range(2))
    seen = [draw(step) for step in range(10)]
    for step in (7, 2, 9, 0):
        assert all(torch.equal(a, b) for a, b in zip(again(step), seen[step], strict=True))


def test_models_and_steps_draw_unrelated_batches():
    draw, rows = Poisson(5).start(torch.ones(2, 2000, dtype=torch.bool), (1, 2), 0.5, 5), []
    for step in (0, 1):
        index, valid = draw(step)
        rows += [torch.zeros(2000).index_fill(0, index[m][valid[m]], 1.0) for m in range(2)]
    correlation = torch.corrcoef(torch.stack(rows)) - torch.eye(4)
    assert correlation.abs().max() < 5 / 2000**0.5


@pytest.mark.parametrize("kind", [Poisson, Shuffled])
@pytest.mark.parametrize("size", [0, -3, 2.5])
def test_bad_batch_size(kind, size):
    with pytest.raises(ValueError, match="batch_size"):
        kind(size)
