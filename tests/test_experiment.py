"""What arms share, who is at risk, and how a learning rate is chosen; the oracle is the training core called by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from demem_lab import training
from demem_lab.attacks import margin
from demem_lab.experiment import PROFILES, best_rate, dp_rates, profile
from demem_lab.mechanisms import DPSGD, Drop, SelectiveDP
from demem_lab.membership import lira
from demem_lab.models import SmallCNN
from demem_lab.store import Store
from demem_lab.streams import model_seeds


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Three seeds, so that "the others" of a seed are two."""
    small = profile("smoke").experiment(subset=120, seeds=3, epochs=2, progress=False)
    return replace(small, store=Store(tmp_path_factory.mktemp("store")))


def softmax(z):
    e = np.exp(z.astype(np.float64) - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_a_run_is_what_the_training_core_gives(lab):
    run, y = lab.run("none", seed=1), lab.dataset.y.numpy()
    made = training.train(lab.dataset, lab.members(1), lab.recipe(), seeds=model_seeds(1, 4))
    tables = [
        training.outputs(made, lab.dataset, **query)
        for query in ({}, {"attack": lab.query}, {"attack": lab.query, "loss": margin})
    ]
    assert np.allclose(run.clean, tables[0], atol=1e-4) and np.allclose(run.adversarial, tables[1], atol=1e-3)
    robust = np.all([table.argmax(-1) == y for table in tables], 0)
    assert (run.robust == robust).mean() > 0.995 and not (run.robust & ~(run.clean.argmax(-1) == y)).any()
    assert (run.models, run.steps, run.sampling_rate) == (4, made.steps, made.sampling_rate)
    assert np.array_equal(run.right["clean"], run.clean.argmax(-1) == y) and run.right["robust"] is run.robust


def test_a_result_is_computed_once(lab):
    first = lab.run("once", seed=0, lr=0.07)
    again = lab.run("another name", seed=0, lr=0.07)
    assert first.fresh and not again.fresh and again.name == "another name"
    assert np.array_equal(first.clean, again.clean) and np.array_equal(first.robust, again.robust)
    assert lab.run("once", seed=0, lr=0.08).fresh  # another question


def test_queries_have_no_random_start_and_add_up_in_the_scores(lab):
    run, y = lab.run("none", seed=0), lab.dataset.y.numpy()
    assert not lab.query.random_start and lab.query.steps == lab.query_steps and lab.attack.random_start
    phi = {}
    for name, table in (("clean", run.clean), ("adversarial", run.adversarial)):
        p = np.take_along_axis(softmax(table), y[None, :, None], 2)[..., 0]
        phi[name] = np.log(p) - np.log1p(-p)
        assert np.allclose(run.scores[name], lira(phi[name], run.members), atol=1e-4)
    assert np.allclose(run.scores["both"], run.scores["clean"] + run.scores["adversarial"])


def test_members_are_the_same_for_every_arm_and_differ_between_seeds(lab):
    flagged = lab.flags(0, 0.2)
    arms = [lab.run("none", seed=0), lab.run("drop", seed=0, mechanism=Drop(flagged), flagged=flagged)]
    assert all(np.array_equal(arm.members, lab.members(0).numpy()) for arm in arms)
    assert np.array_equal(lab.members(0)[0::2], ~lab.members(0)[1::2])
    assert not np.array_equal(lab.members(0), lab.members(1))
    assert torch.equal(lab.members(0, models=8)[:4], lab.members(0))
    assert np.array_equal(arms[1].flagged, flagged.numpy())


def test_risk_is_scored_by_the_other_seeds_only(lab):
    y = lab.dataset.y.numpy()
    others = [lab.run("none", seed=s) for s in (0, 2)]
    right = np.concatenate([np.take_along_axis(softmax(r.adversarial), y[None, :, None], 2)[..., 0] for r in others])
    member = np.concatenate([r.members for r in others])
    score = [right[member[:, i], i].mean() - right[~member[:, i], i].mean() for i in range(lab.dataset.n)]
    found = lab.risk(1)
    assert np.allclose(found.score, score) and (found.in_models == 4).all() and (found.out_models == 4).all()
    # whatever happened to seed 1 itself, nobody looked: an arm of garbage there changes nothing
    mine = lab.run("none", seed=1)
    garbage = replace(mine, adversarial=np.random.default_rng(0).normal(size=mine.adversarial.shape))
    assert np.array_equal(lab.risk(1, runs=[others[0], garbage, others[1]]).score, found.score)
    assert not np.allclose(lab.risk(0, runs=[others[0], garbage, others[1]]).score, lab.risk(0).score)


def test_flags_are_the_riskiest_and_the_control_is_as_many_at_random(lab):
    score = lab.risk(2).score
    for fraction, count in ((0.1, 12), (0.25, 30), (0.0, 0), (1.0, 120)):
        flagged, random = lab.flags(2, fraction).numpy(), lab.random_flags(2, fraction).numpy()
        assert flagged.sum() == random.sum() == count
        assert flagged.all() or not flagged.any() or score[flagged].min() >= score[~flagged].max()
    threshold = float(np.sort(score)[-7])
    assert np.array_equal(lab.flags(2, risk_threshold=threshold).numpy(), score >= threshold)
    assert lab.random_flags(2, risk_threshold=threshold).sum() == 7
    assert torch.equal(lab.random_flags(2, 0.1), lab.random_flags(2, 0.1))
    assert not torch.equal(lab.random_flags(2, 0.1), lab.random_flags(1, 0.1))


def test_treat_asks_who_at_every_seed(lab):
    seen = []

    def how(flagged):
        seen.append(flagged)
        return Drop(flagged)

    by_risk = lab.treat("drop", how, fraction=0.1)
    chosen = lab.treat("first ten", how, choose=lambda seed: torch.arange(120) < 10 + seed)
    assert [run.seed for run in by_risk] == [run.seed for run in chosen] == [0, 1, 2]
    assert all(torch.equal(f, lab.flags(s, 0.1)) for s, f in enumerate(seen[:3]))
    assert [int(f.sum()) for f in seen[3:]] == [10, 11, 12] and [int(r.flagged.sum()) for r in chosen] == [10, 11, 12]
    # flagged samples really are treated: dropped ones have no say in the weights, so who they are matters
    assert not np.allclose(by_risk[0].clean, lab.run("none", seed=0).clean)


def test_guarantees_say_what_was_trained(lab):
    assert not lab.run("none", seed=0).guarantee.holds
    everybody = lab.run("DP", seed=0, mechanism=DPSGD(2.0)).guarantee
    assert everybody.holds and everybody.protected == 120 and everybody.selection == "fixed"
    flagged = lab.flags(0, 0.1)
    some = lab.run("DeMem", seed=0, mechanism=SelectiveDP(2.0, 1.0, flagged), flagged=flagged).guarantee
    assert some.protected == 12 and "given the set; end to end: none" in str(some)
    assert some.budget.epsilon == everybody.budget.epsilon and some.budget.delta == lab.delta


def test_rates_are_chosen_on_the_tuning_seed_by_robust_accuracy_of_non_members(lab):
    found = lab.tune("none", (0.05, 0.3))
    members = lab.members(lab.tuning_seed, lab.tuning_models)
    for rate, row in found.items():  # every rate alone gives what it gave in the batch of all
        alone = lab.run("none", seed=lab.tuning_seed, models=lab.tuning_models, lr=rate)
        assert torch.equal(torch.as_tensor(alone.members), members)
        for kind, ok in alone.right.items():
            assert row[kind] == pytest.approx(ok[~alone.members].mean(), abs=0.015)
    assert best_rate({0.1: {"clean": 0.9, "robust": 0.2}, 0.2: {"clean": 0.3, "robust": 0.4}}) == 0.2
    assert lab.tuning_seed not in lab.seeds and lab.tuned().lr in (0.03, 0.1, 0.3)


def test_rates_to_try_fall_with_noise():
    assert max(dp_rates(0)) > max(dp_rates(0.5)) > max(dp_rates(1)) > max(dp_rates(10))
    assert np.allclose(np.array(dp_rates(2.0)) * 2, dp_rates(1.0)) and dp_rates(0.001) == dp_rates(0.03)


def test_profiles_and_what_takes_their_place(monkeypatch):
    monkeypatch.setenv("DEMEM_PROFILE", "smoke")
    assert profile() is PROFILES["smoke"] and profile("lesson") is PROFILES["lesson"]
    monkeypatch.delenv("DEMEM_PROFILE")
    assert profile() is PROFILES["lesson"]
    made = profile("smoke").experiment(subset=100, model="cnn", models=6, seeds=4, epochs=1.5, eps=0.2)
    assert (made.dataset.n, made.models, made.seeds, made.epochs, made.eps) == (100, 6, (0, 1, 2, 3), 1.5, 0.2)
    assert isinstance(made.model, SmallCNN) and made.batch_size == 25 and made.tuning_models == 4
    monkeypatch.setenv("DEMEM_HEADLESS", "1")
    assert not profile("smoke").experiment().progress and profile("smoke").experiment(progress=True).progress


@pytest.mark.parametrize(("change", "words"), [
    ({"models": 5}, "even"), ({"models": 2}, "leave-one-out"), ({"seeds": (1,)}, "2 different seeds"),
    ({"seeds": (0, 100)}, "tuning seed"), ({"seeds": (1, 1)}, "2 different seeds"),
])
def test_unfair_experiments_are_refused(lab, change, words):
    with pytest.raises(ValueError, match=words):
        replace(lab, **change)


@pytest.mark.parametrize(("call", "words"), [
    (lambda lab: profile("quick"), "'smoke', 'lesson', 'full'"), (lambda lab: lab.flags(0), "exactly one"),
    (lambda lab: lab.flags(0, 1.5), "fraction"), (lambda lab: lab.flags(0, risk_threshold=float("nan")), "NaN"),
    (lambda lab: lab.run("x", seed=0, mechanism=Drop(torch.zeros(7, dtype=torch.bool))), "120 samples"),
    (lambda lab: replace(lab, batch_size=61).run("x", seed=0), "batch_size"),
    (lambda lab: profile("smoke").experiment(model="transformer"), "'mlp', 'cnn'"),
])
def test_bad_input(lab, call, words):
    with pytest.raises(ValueError, match=words):
        call(lab)
