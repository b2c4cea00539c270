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


def test_keys_are_63_bit_and_seeds_are_unrelated():
    seeds = {s for e in range(50) for s in model_seeds(e, 20)}
    assert len(seeds) == 1000 and all(0 <= s < 2**63 for s in seeds)
    assert key(1, "x", 23) != key(12, "x", 3) and model_seeds(0, 3) == model_seeds(0, 5)[:3]
