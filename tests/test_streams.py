import numpy as np
import torch
from scipy import stats

from demem_lab.streams import Streams, key, model_seeds


def test_numbers_belong_to_the_model_not_to_its_neighbours():
    for draw in ("uniform", "normal"):
        alone = getattr(Streams((7,), "p", 3), draw)(5)
        among = getattr(Streams((5, 7, 9), "p", 3), draw)(5)
        assert torch.equal(alone[0], among[1])


def test_padding_does_not_change_anybodys_rows():
    wide, narrow = torch.zeros(2 * 6, 3), torch.zeros(2 * 4, 3)
    a = Streams((1, 2), "attack", 0, counts=[4, 2]).normal_rows(wide).view(2, 6, 3)
    b = Streams((1, 2), "attack", 0, counts=[4, 2]).normal_rows(narrow).view(2, 4, 3)
    assert torch.equal(a[:, :4], b) and (a[0, 4:] == 0).all() and (a[1, 2:] == 0).all()


def test_purposes_steps_seeds_and_forks_differ():
    kinds = [Streams((1,), "a", 0), Streams((1,), "a", 1), Streams((2,), "a", 0), Streams((1,), "b", 0)]
    kinds.append(kinds[0].fork("again"))
    draws = np.stack([k.normal(4000)[0].numpy() for k in kinds])
    off_diagonal = np.corrcoef(draws)[np.triu_indices(len(kinds), 1)]
    assert np.abs(off_diagonal).max() < 5 / np.sqrt(4000)


def test_distributions():
    stream = Streams((3,), "d")
    assert stats.kstest(stream.uniform(20_000)[0].numpy(), "uniform").pvalue > 1e-4
    assert stats.kstest(stream.fork(1).normal(20_000)[0].numpy(), "norm").pvalue > 1e-4
    rows = torch.empty(100, 200)
    assert stats.kstest(stream.fork(2).normal_rows(rows).flatten().numpy(), "norm").pvalue > 1e-4
    assert stats.kstest(stream.fork(3).uniform_rows(rows).flatten().numpy(), "uniform").pvalue > 1e-4


def test_private_noise_belongs_to_the_model_too():
    alone, among = Streams((7,), "noise", 3).private_normal(500), Streams((5, 7, 9), "noise", 3).private_normal(500)
    assert torch.equal(alone[0], among[1]) and not torch.equal(among[0], among[1])
    assert not torch.equal(alone, Streams((7,), "noise", 4).private_normal(500))
    double = Streams((7,), "noise", 3).private_normal(500, torch.float64)
    assert double.dtype == torch.float64 and torch.equal(double.float(), alone)


def test_private_noise_has_whole_tails():
    """As many in the tails as a normal has (torch's own in float32 on a CPU never pass 5.77)."""
    draws = np.concatenate([np.abs(Streams((s,), "noise").private_normal(4_000_000)[0].numpy()) for s in range(24)])
    for cut in (3.0, 4.0, 5.0, 5.6):
        expected = 2 * stats.norm.sf(cut) * len(draws)
        assert stats.poisson.sf((draws > cut).sum() - 1, expected) > 1e-4 < stats.poisson.cdf((draws > cut).sum(), expected)
    assert stats.kstest(Streams((3,), "noise").private_normal(20_000)[0].numpy(), "norm").pvalue > 1e-4


def test_streams_whose_keys_end_alike_do_not_share_their_noise():
    """A CPU generator of torch takes 32 bits of its seed, and among 100,000 streams some pair ends in the same."""
    ends: dict[int, tuple[int, int]] = {}
    for seed, step in ((s, t) for s in range(100) for t in range(3000)):
        other = ends.setdefault(key(seed, "noise", step) & 0xFFFFFFFF, (seed, step))
        if other != (seed, step):
            break
    pair = [Streams((s,), "noise", t) for s, t in ((seed, step), other)]
    assert torch.equal(pair[0].normal(50), pair[1].normal(50))  # so it is
    assert np.abs(np.corrcoef(*(one.private_normal(4000)[0].numpy() for one in pair))[0, 1]) < 0.1


def test_keys_are_63_bit_and_seeds_are_unrelated():
    seeds = {s for e in range(50) for s in model_seeds(e, 20)}
    assert len(seeds) == 1000 and all(0 <= s < 2**63 for s in seeds)
    assert key(1, "x", 23) != key(12, "x", 3) and model_seeds(0, 3) == model_seeds(0, 5)[:3]
