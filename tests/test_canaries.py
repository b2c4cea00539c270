"""The white-box audit must leave the real mechanism standing and catch planted bugs."""

import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from demem_lab.canaries import audit_in_one_run, audit_mechanism
from demem_lab.mechanisms import DPSGD, Drop, SelectiveDP


def selective(kind=SelectiveDP, sigma=1.0):
    return lambda protected: kind(sigma, 1.0, protected, "fixed")


@pytest.mark.parametrize(("sigma", "rate", "steps"), [(0.6, 1.0, 1), (1.0, 1.0, 1), (2.0, 1.0, 4), (1.0, 0.3, 5)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_real_mechanism_is_not_refuted(sigma, rate, steps, seed):
    found = audit_mechanism(selective(sigma=sigma), trials=1500, sampling_rate=rate, steps=steps, seed=seed)
    assert found.holds and found.lower.epsilon <= found.upper and "Not refuted" in str(found)


def test_the_bound_is_not_empty():
    found = audit_mechanism(selective(sigma=0.6), trials=20_000, delta=1e-3, others=2, unprotected=1)
    assert 0.4 * found.upper < found.lower.epsilon <= found.upper
    one = audit_in_one_run(lambda everybody: DPSGD(0.6), canaries=2000, delta=1e-5)
    assert 1.0 < one.lower.epsilon <= one.upper


def test_scores_are_what_the_mechanism_adds():
    """In or out is 1 or 0 clipping bounds, plus the noise: the auditor reads exactly the published sum."""
    found = audit_mechanism(selective(sigma=0.5), trials=2000)
    inside, outside = found.scores[found.included], found.scores[~found.included]
    assert inside.mean() - outside.mean() == pytest.approx(1.0, abs=0.08)
    assert inside.std() == pytest.approx(0.5, abs=0.05) and outside.std() == pytest.approx(0.5, abs=0.05)


def test_every_trial_has_its_own_noise():
    found = audit_mechanism(selective(), trials=42, others=700, unprotected=1)
    noise = (found.scores - found.included).round(3)
    assert len(np.unique(noise)) == 42  # the last two trials are computed apart from the others


def test_every_step_has_its_own_noise():
    found = audit_mechanism(selective(sigma=2.0), trials=400, steps=4, others=1, unprotected=1)
    assert found.scores[found.included].std() == pytest.approx(2.0 * 2, abs=1.0)


def test_without_noise_nothing_is_claimed_and_everything_is_found():
    found = audit_mechanism(selective(sigma=0.0), trials=400)
    assert found.upper is None and found.lower.epsilon == pytest.approx(found.lower.most) and "no guarantee" in str(found)
    dropped = audit_mechanism(lambda protected: Drop(protected), trials=400)
    assert dropped.upper is None and dropped.lower.epsilon < 1  # who is dropped leaves no trace at all


@dataclass(frozen=True)
class HalfTheNoise(SelectiveDP):
    def _noise_std(self, batch, models, like):
        return super()._noise_std(batch, models, like) / 2


@dataclass(frozen=True)
class ClipAfterAveraging(SelectiveDP):
    """The mean is clipped, and noise for a mean of clipped gradients is added: one sample can turn the whole mean."""

    def update(self, net, per_sample, batch):
        sums = super(SelectiveDP, replace(self, noise_multiplier=0.0)).update(net, per_sample, batch)
        norm = sum(s.flatten(1).square().sum(1) for s in sums).sqrt().clamp_min(1.0)
        noise = batch.noise.normal(sums[0][0].numel()) * self.noise_multiplier / batch.divisor
        clipped = [s / norm.view(-1, *[1] * (s.ndim - 1)) for s in sums]
        return [clipped[0] + noise.view_as(clipped[0]), *clipped[1:]]


@dataclass(frozen=True)
class BatchStatistic(SelectiveDP):
    """Everybody's gradient is scaled by how many protected samples were drawn, as a batch norm would."""

    def _factors(self, by_layer, valid, clipped, rows, losses):
        factors = super()._factors(by_layer, valid, clipped, rows, losses)
        return torch.where(clipped, factors, factors / (1 + clipped.sum(1, keepdim=True)))


@dataclass(frozen=True)
class NoNoiseInEmptyDraws(SelectiveDP):
    def _noise_std(self, batch, models, like):
        somebody = (self._is_protected(batch) & batch.valid).any(1)
        return torch.where(somebody, super()._noise_std(batch, models, like), 0)


@dataclass(frozen=True)
class TheSameNoiseEveryStep(SelectiveDP):
    def noised(self, sums, batch):
        return super().noised(sums, replace(batch, noise=replace(batch.noise, step=0)))


def loudest_bystander(updates, columns):
    """An unprotected sample's own direction: a canary has no business there."""
    return -updates.sum(1)[:, -1:].repeat(len(columns), 1)


def any_noise(updates, columns):
    return np.abs(updates[:, :, columns]).sum(1)


def spread_over_steps(updates, columns):
    return np.ptp(updates[:, :, columns], axis=1)


BUGS = {
    "the same noise at every step": (
        selective(TheSameNoiseEveryStep, 2.0),
        {"trials": 2000, "others": 1, "unprotected": 1, "sampling_rate": 0.3, "steps": 4, "statistic": spread_over_steps},
    ),
    "noise halved": (
        selective(HalfTheNoise, 2.0), {"trials": 20_000, "delta": 1e-3, "others": 2, "unprotected": 1},
    ),
    "clip after averaging": (selective(ClipAfterAveraging, 2.0), {"trials": 1000, "others": 40}),
    "batch statistics": (selective(BatchStatistic, 2.0), {"trials": 1000, "statistic": loudest_bystander}),
    "no noise in empty draws": (
        selective(NoNoiseInEmptyDraws, 2.0),
        {"trials": 1000, "others": 1, "unprotected": 1, "sampling_rate": 0.3, "steps": 4, "statistic": any_noise},
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_refuted(name):
    build, settings = BUGS[name]
    found = audit_mechanism(build, **settings)
    assert not found.holds and found.lower.epsilon > found.upper and "REFUTED" in str(found)


@pytest.mark.parametrize("name", BUGS)
def test_the_same_auditors_do_not_refute_the_real_mechanism(name):
    _, settings = BUGS[name]
    assert audit_mechanism(selective(SelectiveDP, 2.0), **settings).holds


@dataclass(frozen=True)
class AQuarterOfTheNoise(HalfTheNoise):
    def _noise_std(self, batch, models, like):
        return super()._noise_std(batch, models, like) / 2


def test_too_little_noise_is_refuted_in_one_run_too():
    found = audit_in_one_run(lambda everybody: AQuarterOfTheNoise(4.0, 1.0, None, "fixed"), canaries=3000)
    assert not found.holds and found.lower.epsilon > found.upper
    assert audit_in_one_run(lambda everybody: DPSGD(4.0), canaries=3000).holds


@pytest.mark.parametrize("bound", [1e-6, 1e4, 1e9])
def test_canaries_are_louder_than_any_bound(bound):
    """With a bound above the canary's own length nothing is clipped, and the noise is right for somebody louder only."""
    settings = {"delta": 1e-3, "others": 2, "unprotected": 1}
    assert not audit_mechanism(lambda who: AQuarterOfTheNoise(2.0, bound, who, "fixed"), trials=4000, **settings).holds
    assert audit_mechanism(lambda who: SelectiveDP(2.0, bound, who, "fixed"), trials=1000, **settings).holds
    found = audit_mechanism(lambda who: SelectiveDP(0.0, bound, who, "fixed"), trials=100, **settings)
    assert np.allclose(found.scores, np.where(found.included, bound, 0), rtol=1e-4)


def test_a_bound_that_no_probe_can_be_louder_than_is_refused():
    with pytest.raises(ValueError, match=r"max_grad_norm must be finite and >= 0 and <= 1e\+12, got 1e\+20; .*smaller bound"):
        audit_mechanism(lambda who: SelectiveDP(1.0, 1e20, who, "fixed"), trials=100)


@pytest.mark.parametrize(("settings", "words"), [
    ({"trials": 10}, "trials"), ({"steps": 0}, "steps"), ({"sampling_rate": 0.0}, "sampling_rate"),
    ({"unprotected": 9}, "unprotected"),
])
def test_bad_input(settings, words):
    with pytest.raises(ValueError, match=words):
        audit_mechanism(selective(), **settings)
    with pytest.raises(ValueError, match="canaries"):
        audit_in_one_run(selective(), canaries=999)


@pytest.mark.parametrize("epsilon", [5.671, 5.679, 12.34])
def test_a_claim_is_never_printed_smaller_than_it_is(epsilon):
    found = audit_mechanism(selective(), trials=100)
    claimed = replace(found.claimed, budget=replace(found.claimed.budget, epsilon=epsilon))
    shown = re.search("claimed: epsilon ([0-9.]+)", str(replace(found, claimed=claimed)))
    assert epsilon <= float(shown[1]) <= epsilon * 1.01
