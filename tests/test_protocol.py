"""The authors' protocol: arms that share what they must, numbers that a slow reading of the tables gives, files that last."""

import json
import platform
import subprocess
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from demem_lab import data, farm, protocol, queries, risk, training
from demem_lab.attacks import PGD
from demem_lab.augment import CropFlip
from demem_lab.leakage import evaluate
from demem_lab.mechanisms import DPSGD, SelectiveDP
from demem_lab.membership import lira, rmia
from demem_lab.objectives import AWP, PGDAT, TRADES, Natural
from demem_lab.optimizers import HalfFlat, StepDecay
from demem_lab.precision import Precision
from demem_lab.protocol import PROFILES, Protocol, arms_of, run
from demem_lab.results import ATTACKS, PUBLISHED, Results, check_measurable, kept, measure
from demem_lab.signals import confidence, logit_margin
from demem_lab.streams import key, model_seeds

SMALL = Protocol(
    dataset="digits", split="train", subset=240, model="mlp", models=6, epochs=2, batch_size=32, query_steps=2, lr=0.05,
    weight_decay=0.0,
    attack_steps=2, scoring_epochs=8, noise_multiplier=1.5,
)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    from demem_lab.store import Store

    folder = tmp_path_factory.mktemp("protocol")
    store = Store(folder / "store")
    return run(SMALL, store=store, progress=False, save=folder / "r.json"), store, folder / "r.json"


def test_every_arm_is_there_with_one_value_a_model(done):
    results, _, _ = done
    assert list(results.arms) == list(arms_of(SMALL)) == list(results.guarantees)
    for values in results.arms.values():
        assert {len(v) for v in values.values()} == {SMALL.models}
        assert all(0 <= v <= 1 for column in values.values() for v in column)


def test_the_numbers_of_an_arm_are_those_of_its_models_trained_by_hand(done):
    results, store, _ = done
    digits = SMALL.load()
    score = protocol.risk_score(SMALL, digits, store=store)
    members = data.member_masks(digits.n, 6, seed=key(0, "members") % 2**31)
    top = torch.as_tensor(risk.protected_set(score, fraction=0.1).mask)
    recipe = replace(SMALL.recipe(), mechanism=SelectiveDP(1.5, 1.0, top))
    ensemble = training.train(digits, members, recipe, seeds=model_seeds(0, 6), chunk=1)
    y, inside = digits.y.numpy(), members.numpy()
    clean = queries.outputs(ensemble, digits)
    right = clean.argmax(-1) == y
    for m in range(6):
        assert results.arms["SelectiveDP"]["clean accuracy"][m] == pytest.approx(right[m][~inside[m]].mean(), abs=0.02)
        assert results.arms["SelectiveDP"]["member clean accuracy"][m] == pytest.approx(right[m][inside[m]].mean(), abs=0.02)
    assert results.guarantees["SelectiveDP"] == str(ensemble.guarantee(delta=SMALL.delta))
    assert "given the set; end to end: none" in results.guarantees["SelectiveDP"]


def made_tables(seed=0, models=6, n=400, classes=4):
    rng = np.random.default_rng(seed)
    members = data.member_masks(n, models, seed=seed).numpy()
    y = rng.integers(0, classes, n)
    tables = {}
    for query, shift in (("clean", 0.5), ("adversarial", 2.0)):
        logits = rng.normal(size=(models, n, classes))
        logits[:, np.arange(n), y] += shift * members
        tables[query] = logits.astype(np.float32)
    tables["robust"] = rng.random((models, n)) < 0.4 + 0.3 * members
    return tables, y, members


def test_measuring_equals_a_slow_reading():
    tables, y, members = made_tables()
    top = np.arange(len(y)) < 100
    found = measure(tables, y, members, at_risk=top)
    for m in range(6):
        out = [i for i in range(len(y)) if not members[m, i]]
        assert found["robust accuracy"][m] == pytest.approx(np.mean([tables["robust"][m, i] for i in out]))
        assert found["clean accuracy"][m] == pytest.approx(np.mean([tables["clean"][m, i].argmax() == y[i] for i in out]))
        risky = [i for i in range(len(y)) if members[m, i] and top[i]]
        assert found["member robust accuracy, at risk"][m] == pytest.approx(np.mean([tables["robust"][m, i] for i in risky]))
    for attack, scores in (
        ("LiRA", lira(logit_margin(tables["adversarial"], y), members, variance="pooled")),
        ("RMIA", rmia(confidence(tables["adversarial"], y), members)),
    ):  # the adversarial query was made the stronger one
        for m in range(6):
            negative = np.sort(scores[m][~members[m]])[::-1]
            allowed = int(0.05 * len(negative))
            positive = scores[m][members[m] & top]
            assert found[f"{attack}: found at 5 %, at risk"][m] == pytest.approx((positive > negative[allowed]).mean())
            everybody = [(negative >= a).sum() - 1 <= allowed for a in negative]
            assert found[f"{attack}: accused at 5 %"][m] == pytest.approx(np.mean(everybody))
            for group, inside in (("at risk", top), ("rest", ~top)):
                accused = [(negative >= a).sum() - 1 <= allowed for a in scores[m][~members[m] & inside]]  # by all others
                assert found[f"{attack}: accused at 5 %, {group}"][m] == pytest.approx(np.mean(accused))


def test_the_stronger_query_is_chosen_for_each_rate(monkeypatch):
    """Clean queries give away a few for certain, adversarial ones many a little: best at small and at large rates."""
    monkeypatch.setattr("demem_lab.results.lira", lambda signal, members, **_: signal)
    rng, members = np.random.default_rng(0), data.member_masks(400, 4, seed=0).numpy()
    few, many = rng.normal(size=(2, *members.shape)) + 0.75 * members * np.array([0, 1])[:, None, None]
    few = few + 9 * (members & (rng.random(members.shape) < 0.15))
    tables = {"clean": np.stack([0 * few, few], -1), "adversarial": np.stack([0 * many, many], -1), "robust": members}
    found = measure(tables, np.ones(400, dtype=int), members, at_risk=np.arange(400) < 100)
    for rate, query, other in ((0.1, many, few), (0.05, few, many)):
        wanted, less = (evaluate(signal, members, fprs=(rate,)) for signal in (query, other))
        assert (wanted.tpr - wanted.accused).mean() > (less.tpr - less.accused).mean()
        assert found[f"LiRA: found at {100 * rate:g} %"] == pytest.approx(wanted.tpr[:, 0])


def test_the_auc_is_that_of_the_stronger_query():
    tables, y, members = made_tables()
    wanted = evaluate(rmia(confidence(tables["adversarial"], y), members), members).auc  # it was made the stronger one
    for turned in (tables, tables | {"clean": tables["adversarial"], "adversarial": tables["clean"]}):
        assert measure(turned, y, members, at_risk=np.arange(len(y)) < 100)["RMIA: AUC"] == pytest.approx(wanted)


def test_a_file_never_loses_the_arms_it_has(done, tmp_path):
    results, store, file = done
    before = file.read_text()
    with pytest.raises(ValueError, match="holds .*graded release.* would drop; add them to arms"):
        run(SMALL, arms=("none", "drop"), store=store, progress=False, save=file)
    assert file.read_text() == before
    other = tmp_path / "notes.json"
    other.write_text('{"my": "notes"}')
    with pytest.raises(ValueError, match="not a results file"):
        run(SMALL, store=store, progress=False, save=other)
    assert other.read_text() == '{"my": "notes"}'
    run(SMALL, arms=("none",), store=store, progress=False, save=tmp_path / "new.json")
    run(SMALL, arms=("none", "drop"), store=store, progress=False, save=tmp_path / "new.json")
    assert Results.load(tmp_path / "new.json").arms == {name: results.arms[name] for name in ("none", "drop")}


@pytest.mark.parametrize(("change", "words"), [
    ({"seed": 1}, "holds a run with seed 0, and this one has seed 1; save elsewhere"),
    ({"subset": 200}, "holds a run with subset 240, images 240, and this one has subset 200, images 200; save elsewhere"),
    ({"lams": (0.2, 0.7)}, r"holds a run with lams \[0.2, 0.6\], and this one has lams \[0.2, 0.7\]"),
])
def test_a_file_of_another_protocol_is_left_alone(done, monkeypatch, change, words):
    _, store, file = done
    before = file.read_text()
    monkeypatch.setattr(training, "train", lambda *_, **__: pytest.fail("it trained"))
    with pytest.raises(ValueError, match=words):
        run(replace(SMALL, **change), store=store, progress=False, save=file)
    assert file.read_text() == before


def test_what_a_file_has_stays_until_it_is_measured_again(done, tmp_path, monkeypatch):
    results, store, _ = done
    file, tables, arms = tmp_path / "r.json", protocol._tables, ("none", "drop", "SelectiveDP")
    whole_ = run(SMALL, arms=arms, store=store, progress=False, save=file)
    old = json.loads(file.read_text())
    old["arms"]["drop"]["clean accuracy"], old["provenance"]["commit"] = [0.5] * 6, "before"
    file.write_text(json.dumps(old))

    def second_arm_fails(*arguments, **how):
        if arguments[5] == "drop":
            raise KeyboardInterrupt
        return tables(*arguments, **how)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(protocol, "_tables", second_arm_fails)
        with pytest.raises(KeyboardInterrupt):
            run(SMALL, arms=arms, store=store, progress=False, save=file)
    left = Results.load(file)
    assert list(left.arms) == list(left.guarantees) == list(arms) and left.arms["drop"]["clean accuracy"] == [0.5] * 6
    assert left.provenance["kept from before"] == {
        "arms": ["drop", "SelectiveDP"], "date": whole_.provenance["date"], "commit": "before",
    }
    run(SMALL, arms=arms, store=store, progress=False, save=file)
    assert Results.load(file).arms == {name: results.arms[name] for name in arms}
    assert "kept from before" not in Results.load(file).provenance


@pytest.mark.parametrize(("change", "words"), [
    ({"fraction": 0.0}, "^fraction 0.0 treats 0 of 240 images, so that model 0 has no members among the treated, and nothing"),
    ({"fraction": 1.0}, "^fraction 1.0 treats 240 of 240 images, .* has no members among the others"),
    ({"risk_threshold": 1e9}, "^risk_threshold 1000000000.0 treats 0 of 240"),
    ({"fraction": 1 / 240}, "treats 1 of 240 images, so that model [01] has no (non-)?members among the treated"),
])
def test_groups_that_cannot_be_measured_are_refused_before_an_arm_is_trained(store, monkeypatch, change, words):
    monkeypatch.setattr(training, "train", lambda *_, **__: pytest.fail("it trained"))
    monkeypatch.setattr(protocol, "risk_score", lambda *_, **__: np.arange(240.0))
    with pytest.raises(ValueError, match=words):
        run(replace(SMALL, **change), store=store, progress=False)


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")
def test_groups_that_can_be_measured_are_those_that_the_check_lets_through():
    tables, y, members = made_tables(n=40)
    for inside in (np.arange(40) < k for k in range(41)):
        refused, failed = False, False
        try:
            check_measurable(members, inside, setting="fraction")
        except ValueError:
            refused = True
        try:
            found = measure(tables, y, members, at_risk=inside)
            failed = not all(np.isfinite(v).all() for v in found.values())
        except ValueError:
            failed = True
        assert refused == failed


def test_rates_that_the_non_members_cannot_resolve_are_left_out():
    tables, y, members = made_tables()
    found = measure(tables, y, members, at_risk=np.arange(len(y)) < 100)
    assert "RMIA: found at 5 %" in found and "RMIA: found at 2 %" not in found  # 200 non-members: 5 of them are 2.5 %


def test_the_model_with_fewest_non_members_decides_which_rates_are_there():
    tables, y, members = made_tables(models=8, n=500)
    members[0, np.flatnonzero(~members[0])[:10]] = True  # 240 non-members, where 2 % takes 250
    found = measure(tables, y, members, at_risk=np.arange(500) < 100)
    assert "RMIA: found at 5 %" in found and "RMIA: found at 2 %" not in found


def test_nothing_to_find_is_found_at_the_rate_of_false_alarms():
    rates, beyond = [], []
    for seed in range(12):
        tables, y, members = made_tables(seed)
        rng = np.random.default_rng(100 + seed)
        for query in ("clean", "adversarial"):
            tables[query] = rng.normal(size=tables[query].shape)
        found = measure(tables, y, members, at_risk=np.arange(len(y)) < 100)
        rates.append([np.mean(found["RMIA: AUC"]), np.mean(found["LiRA: AUC"])])
        beyond.append([np.mean(Results({}, {"a": found}, {}, {}).beyond("a", attack, "5 %")) for attack in ATTACKS])
    # the larger of two queries is taken, so the mean lies a little above one half
    assert np.abs(np.mean(rates, axis=0) - 0.5).max() < 0.02
    assert np.abs(np.mean(beyond, axis=0)).max() < 0.006


def test_what_is_kept_is_not_computed_again_and_arms_can_be_added(done, monkeypatch):
    results, store, _ = done
    monkeypatch.setattr(protocol, "_query", lambda *_: pytest.fail("computed again"))
    again = run(SMALL, arms=("none", "drop"), store=store, progress=False)
    assert again.arms == {name: results.arms[name] for name in ("none", "drop")}


def test_a_results_file_comes_back_and_says_where_it_came_from(done):
    results, _, file = done
    assert Results.load(file) == results
    assert results.protocol["images"] == 240 and results.protocol["noise_multiplier"] == 1.5
    assert {"date", "commit", "torch", "device", "cores"} <= set(results.provenance)
    table = results.to_frame(["clean accuracy", "RMIA: found at 0.1 %"])
    assert (table["RMIA: found at 0.1 %"] == "not resolved").all() and "±" in table["clean accuracy"].iloc[0]


def whole(**changes):
    values = {"protocol": {}, "arms": {"none": {"AUC": [0.5]}}, "guarantees": {"none": ""}, "provenance": {}} | changes
    return json.dumps(values)


@pytest.mark.parametrize("content", [
    "not json", "{}", json.dumps({"arms": {}}), "[]", whole()[:40], whole()[:40] + "\x00\xff", whole(arms=[1]), whole(protocol=1),
    whole(arms={"none": {"AUC": 0.5}}), whole(arms={"none": {"AUC": ["0.5"]}}), whole(guarantees={}),
    whole(arms={}, guarantees={}), whole(arms={"none": {}}),
])
def test_another_file_is_refused_in_one_sentence(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match="x.json is not a results file of this package"):
        Results.load(tmp_path / "x.json")


def test_a_damaged_file_among_those_that_come_with_the_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "kept").mkdir()
    for name in ("first", "second"):
        (tmp_path / "kept" / f"{name}.json").write_text(whole())
    monkeypatch.setattr("demem_lab.results.__file__", str(tmp_path / "results.py"))
    assert list(kept()) == ["first", "second"] and kept()["first"].arms == {"none": {"AUC": [0.5]}}
    (tmp_path / "kept" / "second.json").write_text(whole()[:50])
    with pytest.raises(ValueError, match="second.json is not a results file of this package"):
        kept()


@pytest.mark.parametrize("when", ["while the second arm trains", "while its file is written"])
def test_a_run_that_is_killed_leaves_the_file_of_the_arms_before(done, tmp_path, monkeypatch, when):
    results, store, _ = done
    file, tables, write = tmp_path / "r.json", protocol._tables, Path.write_text

    def second_arm_fails(*arguments, **how):
        if arguments[5] == "drop":
            raise KeyboardInterrupt
        return tables(*arguments, **how)

    def half(path, text):
        if '"drop": {' in text:
            write(path, text[: len(text) // 2])
            raise KeyboardInterrupt
        return write(path, text)

    if when == "while the second arm trains":
        monkeypatch.setattr(protocol, "_tables", second_arm_fails)
    else:
        monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        run(SMALL, arms=("none", "drop"), store=store, progress=False, save=file)
    assert Results.load(file).arms == {"none": results.arms["none"]}


def test_tuning_uses_other_models_and_another_score(store, monkeypatch):
    used, train = [], training.train
    monkeypatch.setattr(training, "train", lambda *a, seeds, **how: (used.extend(seeds), train(*a, seeds=seeds, **how))[1])
    found = protocol.tune(SMALL, "DP for everybody", (0.001, 0.1), store=store, progress=False)
    assert list(found) == [0.001, 0.1] and all(0 <= v <= 1 for v in found.values())
    assert used and not set(used) & {key(SMALL.seed, "scoring"), *model_seeds(SMALL.seed, SMALL.models)}


def test_the_defaults_are_the_authors():
    p = Protocol()
    recipe = p.recipe()
    assert recipe.objective.attack == PGD(8 / 255, 3, 3.33 / 255) and recipe.objective.attack.random_start
    assert (p.models, p.epochs, p.batch_size, p.query) == (128, 100, 256, PGD(8 / 255, 20, 1 / 255, random_start=False))
    assert recipe.schedule == StepDecay((0.75,), 0.1) and recipe.optimizer.momentum == 0.9
    assert recipe.optimizer.weight_decay == 5e-4
    assert recipe.augment == CropFlip() and recipe.precision == Precision.AUTO and p.split == "all"
    assert replace(p, augment=False).recipe().augment is None
    assert isinstance(replace(p, decay_at=0.0).recipe().schedule, HalfFlat)


def test_every_objective_by_name():
    attack = PGD(8 / 255, 3, 3.33 / 255)
    wanted = {
        "natural": Natural(), "pgd-at": PGDAT(attack), "trades": TRADES(attack), "awp": AWP(PGDAT(attack)),
        "trades-awp": AWP(TRADES(attack), 0.005),
    }
    assert {name: Protocol(objective=name).recipe().objective for name in wanted} == wanted


def test_who_is_treated_is_the_top_of_the_score():
    score = np.arange(20.0)
    chosen = arms_of(SMALL)["SelectiveDP"].mechanism(replace(SMALL, fraction=0.2), score).protected
    assert chosen.nonzero().flatten().tolist() == [16, 17, 18, 19]
    by_threshold = arms_of(SMALL)["drop"].mechanism(replace(SMALL, risk_threshold=17.0), score).flagged
    assert by_threshold.nonzero().flatten().tolist() == [17, 18, 19]
    everybody = arms_of(SMALL)["DP for everybody"]
    assert everybody.mechanism(SMALL, score) == DPSGD(1.5) and everybody.rate(replace(SMALL, dp_lr=0.7)) == 0.7


@pytest.mark.parametrize(("change", "words"), [
    ({"models": 5}, "models must be even"), ({"models": 2}, "models must be"), ({"model": "vit"}, "model must be one of"),
    ({"risk_threshold": -1.0}, "risk_threshold must be"),
    ({"objective": "free"}, "objective must be one of"), ({"fraction": 1.5}, "fraction must be"),
    ({"delta": 0.0}, r"delta must lie in \(0, 1\), got 0.0"), ({"delta": 1}, r"delta must lie in \(0, 1\), got 1"),
    ({"lams": (0.2, 0.2000001)}, r"must not repeat, got \(0.2, 0.2000001\)"), ({"models": 6.0}, "models must be .*write 6"),
])
def test_bad_settings_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **change)


def test_an_unknown_arm_is_refused_before_anything_is_trained(store):
    with pytest.raises(ValueError, match="arm must be one of"):
        run(SMALL, arms=("none", "magic"), store=store, progress=False)


def test_each_lam_is_an_arm():
    arms = arms_of(replace(SMALL, lams=(0.5,)))
    assert "LossVariance 0.5" in arms and "LossVariance 0.2" not in arms
    assert arms["LossVariance 0.5"].mechanism(SMALL, np.arange(3.0)).lam == 0.5


def test_profiles_and_published_numbers_are_whole():
    assert list(PROFILES) == ["smoke", "lesson", "full", "paper"] and PROFILES["paper"] == Protocol()
    assert all(p.source and (p.found is None or 0 < p.found < 100) for p in PUBLISHED)


def test_groups_of_a_kept_result_have_intervals(done):
    results, _, _ = done
    values = results.arms["none"]["RMIA: AUC, at risk"]
    assert results.interval("none", "RMIA: AUC", "at risk").mean == pytest.approx(np.mean(values))


def hand_made():
    def arm(lira, rmia):
        named = {"LiRA": lira, "RMIA": rmia}
        return {f"{a}: {what}": values for a, metrics in named.items() for what, values in metrics.items()}

    none = arm(
        {"found at 10 %": [0.3, 0.5], "found at 1 %": [0.1, 0.3]}, {"found at 10 %": [0.1, 0.1], "found at 1 %": [0.2, 0.1]}
    )
    none |= arm(
        {"found at 1 %, rest": [0.4, 0.4], "accused at 1 %, rest": [0.3, 0.3]},  # finds more, and accuses as much
        {"found at 1 %, rest": [0.3, 0.1], "accused at 1 %, rest": [0.05, 0.0]},
    )
    return Results({}, {"none": none | {"robust accuracy": [0.5, 0.7]}}, {"none": "no guarantee"}, {})


def test_without_an_attacks_name_the_stronger_one_speaks_for_each_group():
    results = hand_made()  # without "accused" of everybody, as older files are: the rate itself is taken
    assert results.stronger("none", "1 %") == "LiRA" and results.stronger("none", "1 %", "rest") == "RMIA"
    assert results.values("none", "found at 1 %") == [0.1, 0.3]  # 0.2 in the mean, RMIA 0.15
    assert results.values("none", "found at 1 %, rest") == results.values("none", "found at 1 %", "rest") == [0.3, 0.1]
    assert results.values("none", "accused at 1 %, rest") == [0.05, 0.0]  # of the attack that finds more, not the larger one
    assert results.values("none", "robust accuracy") == [0.5, 0.7]
    assert results.interval("none", "RMIA: found at 10 %").mean == pytest.approx(0.1)
    assert results.beyond("none", "RMIA", "1 %", "rest") == pytest.approx([0.25, 0.1])
    assert results.values("none", "beyond at 1 %", "rest") == results.values("none", "beyond at 1 %, rest")
    assert results.values("none", "beyond at 1 %, rest") == results.beyond("none", "RMIA", "1 %", "rest")
    assert results.values("none", "beyond at 1 %") == pytest.approx([0.09, 0.29])
    table = results.to_frame(["found at 1 %", "found at 1 %, at risk", "robust accuracy"])
    assert table["found at 1 %"].iloc[0].startswith("20.0 ±") and table["found at 1 %, at risk"].iloc[0] == "not resolved"


def test_the_rate_to_look_at_is_resolved():
    results = hand_made()
    assert results.rate == "1 %"
    coarse = {m: v for m, v in results.arms["none"].items() if "1 %" not in m}
    assert replace(results, arms={"none": coarse}).rate == "10 %"
    with pytest.raises(ValueError, match="take more images"):
        _ = replace(results, arms={"none": {"robust accuracy": [0.5]}}).rate


def test_kept_results_say_where_they_come_from():
    for name, results in kept().items():
        assert name == name.lower() and results.provenance["commit"] != "unknown"
        assert set(results.arms) == set(results.guarantees) and "none" in results.arms
        assert {len(v) for arm in results.arms.values() for v in arm.values()} == {results.protocol["models"]}


@pytest.mark.parametrize(("name", "asked", "wanted"), [
    ("digits", "auto", "cpu"), ("digits", "cuda", "cuda"), ("fashion_mnist", "auto", "cuda"), ("fashion_mnist", "cpu", "cpu"),
])
def test_digits_stay_on_the_cpu_and_everything_else_follows_the_gpu(store, monkeypatch, name, asked, wanted):
    class Told(Exception):
        pass

    def told(*_, device, **__):
        raise Told(farm.device(device).type)

    images = replace(data.load("digits", subset=240), name=name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(data, "load", lambda *_, **__: images)
    monkeypatch.setattr(protocol, "resolve", lambda precision, on: Precision.FLOAT32)  # asks the GPU what it can do
    monkeypatch.setattr(training, "train", told)
    setting = {"store": store, "device": asked, "progress": False}
    with pytest.raises(Told, match=f"^{wanted}$"):
        protocol.risk_score(SMALL, images, store=store, device=asked)
    monkeypatch.setattr(protocol, "risk_score", lambda *_, **__: np.arange(240.0))
    with pytest.raises(Told, match=f"^{wanted}$"):
        run(SMALL, arms=("none",), **setting)
    with pytest.raises(Told, match=f"^{wanted}$"):
        protocol.tune(SMALL, "none", (0.1,), **setting)


def test_an_executor_gives_the_same_results(tmp_path):
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from demem_lab.store import Store

    small = replace(SMALL, epochs=1, scoring_epochs=6)
    here = run(small, arms=("none", "drop"), store=Store(tmp_path / "a"), progress=False)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        there = run(small, arms=("none", "drop"), store=Store(tmp_path / "b"), progress=False, executor=pool)
    assert there.arms == here.arms and there.guarantees == here.guarantees


@pytest.mark.parametrize("change", [
    {"models": "6"}, {"subset": "40"}, {"subset": 40.5}, {"subset": -1}, {"epochs": "2"}, {"eps": "0.1"}, {"batch_size": "32"},
    {"lr": None}, {"delta": "x"}, {"lams": ("0.2",)}, {"lams": 0.2}, {"seed": "a"}, {"query_steps": 0}, {"scoring_epochs": 1.5},
    {"noise_multiplier": "1"}, {"attack_steps": "3"}, {"query_step": "1"}, {"fraction": "0.1"}, {"dp_lr": -1},
])
def test_every_number_of_a_protocol_is_checked_when_it_is_made(change):
    with pytest.raises(ValueError, match=f"{next(iter(change)).rstrip('s')}.* must be .*got "):
        replace(SMALL, **change)


@pytest.mark.parametrize(("call", "words"), [
    (lambda s, folder: run(40, store=s), r"protocol must be a Protocol, such as PROFILES\['smoke'\], got 40"),
    (lambda s, folder: run("smoke", store=s), "protocol must be a Protocol.*got 'smoke'"),
    (lambda s, folder: run(SMALL, store=s, save=folder), "save must name a file, and .* is a folder; give .*results.json"),
    (lambda s, folder: run(SMALL, store=s, arms="none"), r"arms must be a list of names.*got 'none'; write \('none',\)"),
    (lambda s, folder: run(SMALL, store="/here"), r"store must be a Store, such as Store\('runs/store'\), got '/here'"),
    (lambda s, folder: run(SMALL, store=s, executor=4), r"executor must be an Executor, such as farm.connect\(.*\), got 4"),
    (lambda s, folder: protocol.tune(SMALL, "zzz", (0.1,), store=s), "arm must be one of 'none', .*got 'zzz'"),
    (lambda s, folder: protocol.tune(SMALL, "none", 0.1, store=s), r"rates must be a list of learning rates, .*got 0.1"),
    (lambda s, folder: protocol.tune(SMALL, "none", ("0.1",), store=s), "a learning rate must be a number.*got '0.1'"),
    (lambda s, folder: protocol.tune(SMALL, "none", (0.1,), models=3, store=s), "even"),
    (lambda s, folder: protocol.tune(SMALL, "none", (0.1,), store="/here"), "store must be a Store"),
    (lambda s, folder: protocol.tune(40, "none", (0.1,), store=s), "protocol must be a Protocol"),
])
def test_bad_calls_end_before_anything_is_trained(tmp_path, store, monkeypatch, call, words):
    monkeypatch.setattr(training, "train", lambda *_, **__: pytest.fail("it trained"))
    with pytest.raises(ValueError, match=words):
        call(store, tmp_path)


def test_the_commit_is_this_codes_or_none(tmp_path, monkeypatch):
    def repository(folder, name):
        (folder / "demem_lab").mkdir(parents=True)
        code = folder / "demem_lab" / name
        code.write_text("1")
        for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one"]):
            subprocess.run(["git", *words], cwd=folder, check=True)
        return code

    code = repository(tmp_path / "own", "protocol.py")
    monkeypatch.setattr(protocol, "__file__", str(code))
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=code.parent, capture_output=True, text=True).stdout.strip()
    assert protocol._commit() == head
    code.write_text("2")
    assert protocol._commit() == head + "+"
    other = repository(tmp_path / "theirs", "x.py").parents[1] / "venv" / "demem_lab" / "protocol.py"
    for place in (other, tmp_path / "nowhere" / "demem_lab" / "protocol.py"):
        place.parent.mkdir(parents=True)
        monkeypatch.setattr(protocol, "__file__", str(place))
        assert protocol._commit().startswith("version ")
    monkeypatch.setattr(protocol, "__file__", str(code))
    monkeypatch.setenv("PATH", "")
    assert protocol._commit().startswith("version ")  # no git at all


def test_an_unknown_profile_is_one_sentence(monkeypatch):
    monkeypatch.setenv("DEMEM_PROFILE", "foo")
    with pytest.raises(ValueError, match="profile must be one of 'smoke', 'lesson', 'full', 'paper', got 'foo'"):
        protocol.profile()
    assert protocol.profile("smoke") == PROFILES["smoke"]


def test_provenance_is_that_of_the_machine_that_computed(store, monkeypatch):
    class Elsewhere(Executor):
        def submit(self, function, *given):
            future = Future()
            with monkeypatch.context() as there:
                there.setattr(platform, "processor", lambda: "the worker's processor")
                there.setattr(farm, "workers", lambda on="cpu": 77)
                future.set_result(function(*given))
            return future

    small = replace(SMALL, epochs=1, scoring_epochs=6)
    found = [run(small, arms=("none",), store=store, progress=False, executor=e).provenance for e in (Elsewhere(), None)]
    assert found[0]["processor"] == "the worker's processor" and found[0]["cores"] == 77
    assert found[1]["cores"] == farm.workers("cpu") and list(found[0]) == list(found[1])


def test_warm_up_comes_before_either_schedule():
    for decay_at in (0, 0.75):
        plain, warm = (replace(SMALL, decay_at=decay_at, warm_up=share).recipe().schedule for share in (0.0, 0.2))
        assert [warm(t, 20) for t in range(3, 20)] == [plain(t, 20) for t in range(3, 20)] and warm(0, 20) == plain(0, 20) / 4
    with pytest.raises(ValueError, match="warm_up"):
        replace(SMALL, warm_up=1.2)


def test_what_is_promised_is_computed_anew_by_another_accountant(done, monkeypatch):
    results, store, _ = done
    monkeypatch.setattr(protocol.queries, "outputs", lambda *a, **k: 1 / 0)
    assert run(SMALL, arms=("none",), store=store, progress=False).arms["none"] == results.arms["none"]
    monkeypatch.setattr(protocol, "installed", lambda package: f"another {package}")
    with pytest.raises(ZeroDivisionError):
        run(SMALL, arms=("none",), store=store, progress=False)
