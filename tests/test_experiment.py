"""Fair arms: what they share, what is tuned where, and that nobody scores the risk of their own models."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from demem_lab import data, farm, risk
from demem_lab.attacks import PGD, margin
from demem_lab.experiment import PROFILES, best_rate, dp_rates, profile
from demem_lab.mechanisms import DPSGD, Drop, SelectiveDP
from demem_lab.membership import lira
from demem_lab.objectives import Natural
from demem_lab.queries import outputs
from demem_lab.signals import confidence, logit_margin
from demem_lab.streams import model_seeds
from demem_lab.training import train


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    from demem_lab.store import Store

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
    from demem_lab.store import Store

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
