"""Individual budgets: the step limit is the accountant's own, and the mechanism is SelectiveDP for as long as it lasts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from demem_lab import data, training
from demem_lab.accounting import budget
from demem_lab.attacks import PGD
from demem_lab.budgets import PRIVATE, BudgetedDP, graded_budgets, steps_within
from demem_lab.mechanisms import Drop, SelectiveDP
from demem_lab.models import MLP
from demem_lab.objectives import PGDAT, Natural
from demem_lab.optimizers import SGD
from demem_lab.recipe import Job, Recipe
from demem_lab.sampling import Poisson
from demem_lab.state import State


def rdp_epsilon(sigma, rate, steps, delta):
    accountant = RdpAccountant()
    accountant.compose(SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(sigma)), steps))
    return accountant.get_epsilon(delta)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.7, 4), st.floats(0.005, 0.3), st.floats(0.3, 20), st.sampled_from([1e-5, 1e-3]))
def test_the_limit_is_the_last_step_that_the_accountant_allows(sigma, rate, epsilon, delta):
    limit = int(steps_within([epsilon], noise_multiplier=sigma, sampling_rate=rate, delta=delta, most=10**7)[0])
    if limit:
        assert rdp_epsilon(sigma, rate, limit, delta) <= epsilon + 1e-9
    if 0 < limit < 10**7:
        # where the accountant itself uses a better conversion for tiny losses it may allow a little more, never less
        assert rdp_epsilon(sigma, rate, limit + 1, delta) > epsilon - 0.02


def test_more_budget_lasts_longer_and_none_lasts_not_at_all():
    limits = steps_within(
        [0, 0.5, 1, 2, 4, 8, np.inf], noise_multiplier=1.1, sampling_rate=0.02, delta=1e-5, most=9000
    ).tolist()
    assert limits == sorted(limits) and limits[0] == 0 and limits[-1] == 9000 and len(set(limits)) > 4


@pytest.mark.parametrize("epsilon", [[-1.0], [np.nan], [[1.0]]])
def test_budgets_that_are_none_are_refused(epsilon):
    with pytest.raises(ValueError, match="one budget >= 0 for each sample"):
        steps_within(epsilon, noise_multiplier=1.0, sampling_rate=0.1, delta=1e-4, most=10)


def test_without_noise_no_budget_lasts():
    with pytest.raises(ValueError, match="without noise no budget lasts a single step"):
        steps_within([1.0], noise_multiplier=0.0, sampling_rate=0.1, delta=1e-4, most=10)


SIGMA = 0.8


def trained(tiny, mechanism, objective=None, models=2):
    recipe = Recipe(
        model=MLP(hidden=(8,)), objective=objective or Natural(), mechanism=mechanism, optimizer=SGD(lr=0.2),
        sampler=Poisson(6), epochs=5,
    )
    members = data.member_masks(tiny.n, models, seed=3)
    return training.train(tiny, members, recipe, seeds=range(models), dtype=torch.float64)


def same(a, b):
    return all(torch.equal(a.parameters[name], b.parameters[name]) for name in a.parameters)


@pytest.fixture
def flags(tiny):
    return torch.arange(tiny.n) % 3 == 0


def test_an_endless_budget_is_selective_privacy(tiny, flags):
    endless = torch.full((tiny.n,), 10**6)
    assert same(trained(tiny, BudgetedDP(SIGMA, 0.3, flags, allowed=endless)), trained(tiny, SelectiveDP(SIGMA, 0.3, flags)))
    everybody = trained(tiny, BudgetedDP(SIGMA, 0.3, None, allowed=endless))
    assert same(everybody, trained(tiny, SelectiveDP(SIGMA, 0.3, None)))


def test_no_budget_is_dropping(tiny, flags):
    nothing = torch.zeros(tiny.n, dtype=torch.int64)
    a, b = trained(tiny, BudgetedDP(SIGMA, 0.3, flags, allowed=nothing)), trained(tiny, Drop(flags))
    for name in a.parameters:
        torch.testing.assert_close(a.parameters[name], b.parameters[name], rtol=0, atol=1e-12)


def test_after_the_last_step_of_a_sample_nothing_depends_on_it(tiny, flags):
    """Two data sets that differ in one protected sample's image give the same second half, from the same weights."""
    attack = PGDAT(PGD(0.1, 2))
    victim = int(flags.nonzero()[0])
    allowed = torch.where(flags, 4, 0)
    twin = replace(tiny, x=tiny.x.index_fill(0, torch.tensor([victim]), 0.5))
    mechanism = BudgetedDP(SIGMA, 0.3, flags, allowed=allowed.index_fill(0, torch.tensor([victim]), 0))
    assert same(trained(tiny, mechanism, attack), trained(twin, mechanism, attack))
    mechanism = replace(mechanism, allowed=allowed)
    assert not same(trained(tiny, mechanism, attack), trained(twin, mechanism, attack))


def test_noise_lasts_until_the_last_protected_sample_has_left(tiny, flags):
    recipe = Recipe(
        model=MLP(hidden=(4,)), mechanism=BudgetedDP(SIGMA, 1.0, flags, allowed=torch.where(flags, 3, 900)), sampler=Poisson(6),
        optimizer=SGD(lr=0.1, momentum=0), epochs=3,
    )
    quiet = replace(recipe, mechanism=replace(recipe.mechanism, noise_multiplier=0.0))
    members = data.member_masks(tiny.n, 2, seed=3)
    states = []
    for r in (recipe, quiet):
        states.append(State(Job(tiny, members, r, (0, 1), torch.device("cpu"), False, torch.float64, 12.0)))
    for step in range(5):
        states[1].net.load_state_dict(states[0].net.state())
        for state in states:
            state.advance()
        noisy = any(not torch.equal(a, b) for a, b in zip(states[0].net.parameters(), states[1].net.parameters(), strict=True))
        assert noisy == (step < 3)


def test_the_guarantee_is_that_of_the_longest_serving(flags):
    allowed = torch.where(flags, torch.arange(len(flags)), 10_000)
    longest = int(torch.arange(len(flags))[flags].max())
    mechanism = BudgetedDP(1.2, 1.0, flags, allowed=allowed)
    terms = {"sampling_rate": 0.1, "delta": 1e-4}
    found = mechanism.guarantee(steps=500, n=len(flags), **terms)
    assert found.budget == budget(noise_multiplier=1.2, steps=longest, **terms) and found.protected == int(flags.sum())
    assert PRIVATE in str(found) and "given the set and the budgets; end to end: none" in str(found)
    assert PRIVATE not in str(replace(mechanism, selection="public").guarantee(steps=10, n=len(flags), **terms))
    everybody = replace(mechanism, protected=None).guarantee(steps=500, n=len(flags), **terms)
    assert "all samples" in str(everybody) and "given the budgets; end to end: none" in str(everybody)
    covers = replace(mechanism, protected=torch.ones_like(flags)).guarantee(steps=500, n=len(flags), **terms)
    assert "all samples" in str(covers) and "given the set and the budgets; end to end: none" in str(covers)
    public = replace(mechanism, protected=None, selection="public").guarantee(steps=500, n=len(flags), **terms)
    assert "end to end" not in str(public)
    spent = mechanism.spent(steps=500, **terms)
    assert set(spent) == set(allowed[flags].tolist()) and max(b.epsilon for b in spent.values()) == found.budget.epsilon
    assert not mechanism.guarantee(steps=500, n=len(flags), poisson=False, **terms).holds


def test_each_model_is_promised_by_its_own_budgets():
    few = torch.arange(24) < 3
    allowed = torch.stack([torch.where(few, 2, 4), torch.where(few, 6, 8)])
    mechanism = BudgetedDP(3.0, 1.0, torch.stack([few, ~few]), allowed=allowed)
    terms = {"sampling_rate": 0.1, "delta": 1e-4}
    for model, longest in ((0, 2), (1, 8)):
        promised = mechanism.guarantee(steps=500, n=24, model=model, **terms).budget
        assert promised == budget(noise_multiplier=3.0, steps=longest, **terms)
        assert mechanism.spent(steps=500, model=model, **terms) == {longest: promised}


def test_spent_never_exceeds_the_budget(flags):
    budgets = graded_budgets(np.arange(len(flags), dtype=float), largest=6.0, smallest=1.0, power=2)
    terms = {"noise_multiplier": 1.0, "sampling_rate": 0.05, "delta": 1e-4}
    allowed = steps_within(budgets, most=400, **terms)
    for limit, cap in list(zip(allowed.tolist(), budgets, strict=True))[::6]:
        assert budget(steps=limit, **terms).epsilon <= cap  # PLD, tighter than the filter's own RDP


def test_graded_budgets_fall_with_the_rank():
    assert graded_budgets(np.array([0.3, 0.1, 0.9]), largest=5, smallest=1, power=1).tolist() == [3, 5, 1]
    with pytest.raises(ValueError, match="smallest must be|largest must be"):
        graded_budgets(np.arange(3.0), largest=1, smallest=2)


def test_a_row_for_each_model_is_cut_with_the_models(tiny, flags):
    allowed = torch.stack([torch.zeros(tiny.n, dtype=torch.int64), torch.full((tiny.n,), 99)])
    both = trained(tiny, BudgetedDP(SIGMA, 0.3, flags, allowed=allowed))
    dropped, kept = trained(tiny, Drop(flags)), trained(tiny, SelectiveDP(SIGMA, 0.3, flags))
    for name in both.parameters:
        torch.testing.assert_close(both.parameters[name][0], dropped.parameters[name][0], rtol=0, atol=1e-12)
        assert torch.equal(both.parameters[name][1], kept.parameters[name][1])


@pytest.mark.parametrize("allowed", [torch.zeros(5, dtype=torch.int64), torch.zeros(24), torch.full((24,), -1)])
def test_steps_that_do_not_fit_are_refused(tiny, flags, allowed):
    with pytest.raises(ValueError, match="allowed must hold a whole number >= 0 for each of 24 samples"):
        trained(tiny, BudgetedDP(SIGMA, 1.0, flags, allowed=allowed))


def test_more_noise_than_the_accountant_can_square_is_taken_for_less():
    terms = {"sampling_rate": 0.1, "delta": 1e-4, "most": 10**9}
    assert steps_within([1.0], noise_multiplier=1e160, **terms) == steps_within([1.0], noise_multiplier=1e6, **terms)


def test_a_missing_schedule_is_refused():
    with pytest.raises(ValueError, match="make it with steps_within"):
        BudgetedDP(1.0)
