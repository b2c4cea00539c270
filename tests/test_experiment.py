"""Fair arms: what they share, what is tuned where, and that nobody scores the risk of their own models."""

from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch

from demem_lab import data, farm, risk, training
from demem_lab.accounting import budget
from demem_lab.attacks import PGD, margin
from demem_lab.experiment import PROFILES, Experiment, best_rate, dp_rates, profile
from demem_lab.mechanisms import DPSGD, DownWeight, Drop, Plain, SelectiveDP
from demem_lab.membership import lira
from demem_lab.models import MLP, VGG
from demem_lab.objectives import Natural
from demem_lab.queries import outputs
from demem_lab.recipe import has_batch_norm
from demem_lab.remedies import GradedRelease
from demem_lab.sampling import Shuffled
from demem_lab.signals import confidence, logit_margin
from demem_lab.store import Store
from demem_lab.streams import model_seeds
from demem_lab.tables import weakest
from demem_lab.training import train


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return replace(profile("smoke").experiment(progress=False), store=Store(tmp_path_factory.mktemp("store")))


def test_a_run_is_what_training_and_querying_give(lab):
    run = lab.run("none", seed=0)
    ensemble = train(lab.dataset, lab.members(0), lab.recipe(), seeds=model_seeds(0, lab.models))
    y = lab.dataset.y.numpy()
    clean = outputs(ensemble, lab.dataset)
    by_ce = outputs(ensemble, lab.dataset, attack=PGD(lab.eps, 10, random_start=False))
    by_margin = outputs(ensemble, lab.dataset, attack=PGD(lab.eps, 10, random_start=False), loss=margin)
    assert np.allclose(run.clean, clean, atol=1e-4) and np.allclose(run.adversarial, by_ce, atol=1e-3)
    worst = (clean.argmax(-1) == y) & (by_ce.argmax(-1) == y) & (by_margin.argmax(-1) == y)
    assert (run.right["robust"] == worst).mean() > 0.999 and (run.right["clean"] == (clean.argmax(-1) == y)).mean() > 0.999
    assert np.allclose(run.scores["adversarial"], lira(logit_margin(run.adversarial, y), run.members))
    assert np.allclose(run.scores["both"], run.scores["clean"] + run.scores["adversarial"])


def test_all_arms_of_a_seed_share_members_steps_and_sampling(lab):
    arms = [lab.run("none", seed=1), lab.run("natural", seed=1, objective=Natural()),
            lab.run("DP", seed=1, mechanism=DPSGD(1.0), lr=0.05), lab.run("drop", seed=1, mechanism=Drop(torch.arange(300) < 9))]
    assert len({(a.members.tobytes(), a.steps, a.sampling_rate) for a in arms}) == 1
    assert not np.array_equal(arms[0].members, lab.run("none", seed=0).members)


def test_a_run_is_kept_and_reused(lab):
    first, again = lab.run("kept", seed=0, lr=0.07), lab.run("kept", seed=0, lr=0.07)
    assert first.fresh and not again.fresh and np.array_equal(first.clean, again.clean)
    assert lab.run("kept", seed=0, lr=0.08).fresh


def test_the_risk_for_a_seed_comes_from_the_other_seeds_only(lab):
    other = lab.run("none", seed=1)
    wanted = risk.memorization(confidence(other.adversarial, other.y), other.members).score
    assert np.array_equal(lab.risk(0).score, wanted)
    arm = lab.arm("natural", objective=Natural())
    wanted = risk.memorization(confidence(arm[1].adversarial, arm[1].y), arm[1].members).score
    assert np.array_equal(lab.risk(0, arm).score, wanted)


def test_flags_and_their_random_twin_have_the_same_size(lab):
    score = lab.risk(0).score
    assert np.array_equal(lab.flags(0, 0.2).numpy(), risk.protected_set(score, fraction=0.2).mask)
    cut = float(np.quantile(score, 0.9))
    assert np.array_equal(lab.flags(0, risk_threshold=cut).numpy(), score >= cut)
    assert lab.random_flags(0, 0.2).sum() == lab.flags(0, 0.2).sum() == 60
    assert not torch.equal(lab.random_flags(0, 0.2), lab.flags(0, 0.2))


def test_treated_runs_know_whom_they_treated(lab):
    runs = lab.treat("SelectiveDP", lambda f: SelectiveDP(0.5, 1.0, f), fraction=0.1)
    assert [r.seed for r in runs] == list(lab.seeds) and all(np.array_equal(r.flagged, lab.flags(r.seed, 0.1)) for r in runs)
    assert all("given the set; end to end: none" in str(r.guarantee) for r in runs)
    everybody = lab.treat("everybody", lambda f: SelectiveDP(0.5, 1.0, f), fraction=1)  # no data had a say in that
    assert all("all samples" in str(r.guarantee) and "end to end" not in str(r.guarantee) for r in everybody)
    covered = lab.treat("covered", lambda f: SelectiveDP(0.5, 1.0, f), risk_threshold=-10.0)  # of them, the data had
    assert all("all samples" in str(r.guarantee) and "end to end: none" in str(r.guarantee) for r in covered)
    chosen = lab.treat("mine", Drop, choose=lambda seed: torch.arange(300) == seed)
    assert [np.flatnonzero(r.flagged).tolist() for r in chosen] == [[0], [1]]


def test_seeds_trained_together_are_the_seeds_trained_apart(lab, tmp_path):
    apart = replace(lab, store=Store(tmp_path))
    for how, random in ((lambda f: SelectiveDP(0.5, 1.0, f), False), (Drop, True)):
        together = lab.treat(f"together {random}", how, fraction=0.3, random=random)
        for run in together:
            flagged = (apart.random_flags if random else apart.flags)(run.seed, 0.3)
            alone = apart.run("apart", seed=run.seed, flagged=flagged, mechanism=how(flagged))
            assert np.array_equal(run.flagged, alone.flagged) and np.array_equal(run.members, alone.members)
            assert np.allclose(run.clean, alone.clean, atol=1e-2) and str(run.guarantee) == str(alone.guarantee)
            assert (run.robust == alone.robust).mean() > 0.99 and run.fresh and run.steps == alone.steps
        assert not any(run.fresh for run in lab.treat("again", how, fraction=0.3, random=random))


def test_tuning_uses_its_own_seed_and_equals_separate_runs(lab):
    found = lab.tune("none", (0.05, 0.1))
    for lr, values in found.items():
        alone = lab.run("alone", seed=lab.tuning_seed, models=lab.tuning_models, lr=lr)
        out = ~alone.members
        assert values["clean"] == pytest.approx(alone.right["clean"][out].mean(), abs=0.01)
        assert values["robust"] == pytest.approx(alone.right["robust"][out].mean(), abs=0.01)
    assert best_rate({1.0: {"robust": 0.2}, 2.0: {"robust": 0.5}, 3.0: {"robust": 0.4}}) == 2.0
    assert lab.tuned().lr in (0.03, 0.1, 0.3) and lab.tuning_seed not in lab.seeds
    assert lab.rate_for_everybody(1.0) in dp_rates(1.0) and dp_rates(1.0) == (0.01, 0.03, 0.1) and min(dp_rates(0.0)) >= 0.5


def test_profiles_are_values_and_can_be_overruled(monkeypatch):
    monkeypatch.setenv("DEMEM_PROFILE", "smoke")
    assert profile().name == "smoke" and profile("lesson").name == "lesson"
    monkeypatch.delenv("DEMEM_PROFILE")
    assert profile().name == "lesson" and set(PROFILES) == {"smoke", "lesson", "full"}
    lab = profile("smoke").experiment(subset=100, models=6, seeds=3, epochs=2, eps=0.2, progress=False)
    assert (lab.dataset.n, lab.models, lab.seeds, lab.epochs, lab.eps) == (100, 6, (0, 1, 2), 2, 0.2)
    assert profile("lesson").experiment().dataset.n == data.load().n


@pytest.mark.parametrize(("change", "words"), [
    ({"models": 5}, "models must be even"), ({"models": 2}, "models must be"), ({"seeds": (0,)}, "at least 2"),
    ({"seeds": (0, 100)}, "tuning seed"), ({"seeds": (1, 1)}, "at least 2"),
])
def test_bad_experiments(lab, change, words):
    with pytest.raises(ValueError, match=words):
        replace(lab, **change)


@pytest.mark.parametrize(("setting", "words"), [({"model": "vit"}, "model must be"), ({"dataset": "cats"}, "dataset must be")])
def test_bad_profile_settings(setting, words):
    with pytest.raises(ValueError, match=words):
        profile("smoke").experiment(**setting)
    with pytest.raises(ValueError, match="'smoke', 'lesson', 'full'"):
        profile("huge")


def test_digits_stay_on_the_cpu_and_everything_else_follows_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert profile("lesson").experiment().device == "cpu"
    assert profile("lesson").experiment(device="cuda").device == "cuda"
    clothes = replace(data.load("digits", subset=300), name="fashion_mnist")
    monkeypatch.setattr(data, "load", lambda *names, **settings: clothes)
    assert farm.device(profile("full").experiment().device).type == "cuda"


@dataclass(frozen=True)
class Shuffling(Experiment):
    """A lab whose arms draw whole epochs."""

    def recipe(self, **changes):
        return replace(super().recipe(**changes), sampler=Shuffled(self.batch_size))


@dataclass(frozen=True)
class Batched:
    """An architecture of one's own that does not say how it normalises."""

    inner: VGG = VGG(width=4, norm="batch")

    def build(self, **how):
        return self.inner.build(**how)


def test_a_promise_is_the_weakest_of_the_models(lab):
    run = lab.run("b", seed=0, mechanism=DPSGD((2.0, 1.0, 0.5, 0.0)), epochs=1)
    text = str(run.guarantee)
    assert not run.guarantee.holds and "models differ, and model 3 has none" in text
    assert not run.part(slice(2, 4)).guarantee.holds and "model 1 has none" in str(run.part(slice(2, 4)).guarantee)
    epsilon = [budget(noise_multiplier=s, sampling_rate=run.sampling_rate, steps=run.steps, delta=lab.delta).epsilon
               for s in (2.0, 1.0, 0.5)]
    assert [p.budget.epsilon for p in run.promises[:3]] == epsilon and sorted(epsilon) == epsilon
    assert run.part(slice(0, 3)).guarantee.budget.epsilon == epsilon[2]
    assert run.part(slice(0, 1)).guarantee.budget.epsilon == epsilon[0]


def test_models_that_protect_unequally_many_have_no_promise_in_common(lab):
    sets = torch.stack([torch.arange(300) < k for k in (10, 10, 20, 0)])
    run = lab.run("b", seed=0, mechanism=SelectiveDP(1.0, 1.0, sets), epochs=1)
    assert run.part(slice(0, 2)).guarantee.protected == 10 and run.part(slice(0, 2)).guarantee.holds
    assert "differ in how many they protect (10, 20)" in str(run.part(slice(0, 3)).guarantee)
    assert "model 3 has none: nobody is protected" in str(run.guarantee)
    with pytest.raises(ValueError, match="no models"):
        weakest([])


def test_nothing_is_promised_without_poisson_batches_or_with_batch_normalisation(lab):
    shuffled = Shuffling(**{f.name: getattr(lab, f.name) for f in fields(lab)})
    run = shuffled.run("s", seed=0, mechanism=DPSGD(1.0), epochs=1)
    assert "shuffled batches are not Poisson samples" in str(run.guarantee)
    for model in (Batched(), Batched().inner):
        batched = replace(shuffled, model=model)
        assert "batch normalisation mixes" in str(batched.run("n", seed=0, mechanism=DPSGD(0.0), epochs=1).guarantee)
    assert has_batch_norm(MLP((4,)), (1, 8, 8), 10) is False


def test_the_recipes_architecture_decides_and_not_the_labs(lab):
    recipe = replace(lab.recipe(mechanism=DPSGD(0.0), epochs=1), model=Batched().inner, sampler=Shuffled(lab.batch_size))
    members = lab.members(0)
    assert "batch normalisation mixes" in str(lab.tables("n", recipe, members, range(4), seed=0).guarantee)


def test_a_setting_made_from_the_flags_is_each_seeds_own(lab, tmp_path):
    """What is stored under a seed's key is what that seed's mechanism gives, though all seeds are trained at once."""
    together, apart = (replace(lab, store=Store(tmp_path / name)) for name in ("together", "apart"))
    for how in (
        lambda w: DownWeight(w, 1 / max(1, int(w.sum()))), lambda w: SelectiveDP((0.0, 0.0, 3.0, 3.0), 1.0, w),
        lambda w: Drop(w) if w[0] else Plain(),
    ):
        choose = lambda seed: torch.arange(300) < 4 * seed  # noqa: E731
        for run in together.treat("t", how, choose=choose, epochs=1):
            alone = apart.run("a", seed=run.seed, mechanism=how(choose(run.seed)), epochs=1)
            assert np.allclose(run.clean, alone.clean, atol=1e-3) and str(run.guarantee) == str(alone.guarantee)
        assert not any(run.fresh for run in together.treat("t", how, choose=choose, epochs=1))


def test_settings_for_each_model_are_those_of_each_seed(lab, tmp_path):
    together, apart = (replace(lab, store=Store(tmp_path / name)) for name in ("together", "apart"))
    for changes in ({"mechanism": DPSGD((0, 0.5, 1, 2))}, {"lr": (0.01, 0.1, 0.1, 0.2)}):
        for run in together.arm("b", epochs=1, **changes):
            alone = apart.run("a", seed=run.seed, epochs=1, **changes)
            assert np.allclose(run.clean, alone.clean, atol=1e-3) and run.promises == alone.promises
        with pytest.raises(ValueError, match="has 3 entries for 4 models|3 learning rates for 4 models"):
            name, value = next(iter(changes.items()))
            lab.arm("c", **{name: DPSGD((0, 0.5, 1)) if name == "mechanism" else (0.1, 0.1, 0.1)})


def test_seeds_that_can_be_trained_at_once_are(lab, tmp_path, monkeypatch):
    calls, train_ = [], training.train
    monkeypatch.setattr(training, "train", lambda *a, **how: (calls.append(len(a[1])), train_(*a, **how))[1])
    fresh = replace(lab, store=Store(tmp_path))
    fresh.treat("d", Drop, choose=lambda seed: torch.arange(300) == seed, epochs=1)
    fresh.arm("n", mechanism=DPSGD((0, 0, 1, 1)), epochs=1)
    fresh.treat("g", lambda who: GradedRelease(who.numpy()), choose=lambda seed: torch.linspace(seed, 1, 300), epochs=1)
    assert calls == [8, 8, 8]
    fresh.treat("w", lambda w: DownWeight(w, 0.5 if w[0] else 0.4), choose=lambda seed: torch.arange(300) == seed, epochs=1)
    assert calls[3:] == [4, 4]


@pytest.mark.parametrize("given", [{"epochs": 0}, {"epochs": 0.0}])
def test_no_epochs_are_refused_and_none_given_are_the_labs(lab, given):
    with pytest.raises(ValueError, match="epochs must be .*>= 0.01.*got 0"):
        lab.arm("a", **given)
    assert lab.recipe(epochs=None).epochs == lab.epochs and profile("smoke").experiment(**given).epochs == 3  # notebooks say 0.0
    with pytest.raises(ValueError, match="models must be .*>= 1, got 0"):
        lab.run("a", seed=0, models=0)


@pytest.mark.parametrize(("change", "words"), [
    ({"delta": 1.0}, "delta must be < 1, got 1.0"), ({"delta": -0.1}, "delta must be .*>= 0"), ({"models": 6.0}, "write 6"),
    ({"seeds": (0.0, 1.0)}, "a seed must be a whole number, got 0.0"), ({"seeds": 2}, "seeds must be a tuple"),
    ({"store": "/tmp/x"}, r"store must be a Store, such as Store\('runs/store'\), got '/tmp/x'"),
    ({"batch_size": 8.0}, "batch_size must be a whole number, got 8.0; write 8"),
    ({"tuning_models": 0}, "tuning_models must be"), ({"tuning_seed": "1"}, "a seed must be a number"),
])
def test_bad_settings_of_a_lab_are_one_sentence(lab, change, words):
    with pytest.raises(ValueError, match=words) as caught:
        replace(lab, **change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", [{"seeds": 2.0}, {"models": 6.0}, {"subset": 100.0}])
def test_profiles_take_whole_numbers(setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))} must be a whole number, got"):
        profile("smoke").experiment(**setting)
