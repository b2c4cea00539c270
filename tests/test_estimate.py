"""What a notebook is said to take: carried over from the tour by a measured ratio, never made up."""

import re
from dataclasses import replace

import pytest

from demem_lab import estimate, protocol
from demem_lab.estimate import LESSON_IMAGES, MEASURED, PLAN_STEP, STEP, seconds, spell, status, step_seconds
from demem_lab.experiment import profile
from demem_lab.store import Store


@pytest.fixture
def lab(tmp_path):
    return replace(profile("smoke").experiment(progress=False), store=Store(tmp_path / "store"))


def test_the_reference_machine_gets_the_reference_seconds(monkeypatch):
    lesson = profile("lesson").experiment(progress=False)
    assert lesson.dataset.n == LESSON_IMAGES
    monkeypatch.setattr(estimate, "step_seconds", lambda lab: STEP)
    for notebook, measured in MEASURED.items():
        assert seconds(lesson, notebook) == pytest.approx(measured)
    first, again = MEASURED["05"]
    monkeypatch.setattr(estimate, "step_seconds", lambda lab: 2 * STEP)
    assert seconds(lesson, "05") == pytest.approx((again + 2 * (first - again), again))
    twice = replace(lesson, epochs=2 * lesson.epochs, seeds=(*lesson.seeds, 7, 8, 9))
    assert seconds(twice, "05") == pytest.approx((again + 8 * (first - again), again))


def test_a_protocol_on_the_reference_machine_gets_the_reference_seconds(monkeypatch):
    plan = protocol.PROFILES["lesson"]
    images = plan.load()
    assert images.n == LESSON_IMAGES
    monkeypatch.setattr(estimate, "_step_seconds", lambda probe: PLAN_STEP * probe.models / plan.models)
    first, again = MEASURED["08"]
    assert estimate.plan_seconds(plan, "08", images) == pytest.approx((first, again))
    # four times the models, half the epochs, one treatment less
    other = replace(plan, models=4 * plan.models, epochs=plan.epochs / 2, lams=(0.2,))
    arms = len(protocol.arms_of(plan))
    wanted = again + 4 / 2 * (arms - 1) / arms * (first - again)
    assert estimate.plan_seconds(other, "08", images) == pytest.approx((wanted, again))


def test_a_protocols_lines_say_what_is_used(tmp_path, monkeypatch):
    plan, store = protocol.PROFILES["smoke"], Store(tmp_path / "store")
    with monkeypatch.context() as elsewhere:  # the workers' times are not this machine's
        elsewhere.setattr(estimate, "_step_seconds", lambda *_: pytest.fail("something was tried here"))
        there = estimate.plan_status(plan, "08", plan.load(), store=store, device="cuda", elsewhere="tcp://node:8786")
    assert "depends on the workers" in there and "the workers of tcp://node:8786; " in there
    first, second = estimate.plan_status(plan, "08", plan.load(), store=store).splitlines()
    assert re.fullmatch(r"08: about .* on this machine.*", first) and store.count() == 0
    assert second.startswith("7 treatments x 6 models (mlp) on 300 images of digits; CPU, ") and "; 0 results" in second


@pytest.mark.parametrize(("models", "cost"), [(4, 0.01), (64, 0.001), (4, 0.0001)])
def test_what_a_training_costs_before_its_first_step_is_not_counted(lab, monkeypatch, models, cost):
    trained = []

    def train(probe, models, steps, part=1):
        trained.append((models, steps))
        return 0.05 + cost * models * steps

    monkeypatch.setattr(estimate._Probe, "seconds", train)
    assert step_seconds(replace(lab, models=models)) == pytest.approx(cost * models)
    assert trained[-1][0] == models and trained[-1][1] > 1


@pytest.mark.parametrize("cost", [0.4, 2.0, 50.0])
def test_slow_steps_are_timed_on_few_models_and_slower_ones_on_few_images(lab, monkeypatch, cost):
    spent = []

    def train(probe, models, steps, part=1):
        spent.append(cost * models * steps / part)
        return spent[-1]

    monkeypatch.setattr(estimate._Probe, "seconds", train)
    monkeypatch.setattr(estimate.farm, "workers", lambda device: 2)
    assert step_seconds(replace(lab, models=64)) == pytest.approx(64 * cost)
    assert max(spent) < 64 * cost and sum(spent) < 30  # not 50 x 2 seconds for a single step


def test_the_probe_runs_and_leaves_the_store_alone(lab):
    assert 0 < step_seconds(lab, 0.05) < 60 and lab.store.count() == 0


@pytest.mark.parametrize("times", [0.5, 1.0, 3.0])
def test_slowness_is_the_lessons_step_against_the_tours(monkeypatch, times):
    asked = []
    monkeypatch.setattr(estimate, "step_seconds", lambda lab: asked.append(lab) or times * STEP)
    assert estimate.slowness() == pytest.approx(times)
    assert (asked[0].device, asked[0].dataset.name) == ("cpu", "digits")


def test_the_lines_say_what_is_used_and_what_is_kept(lab, monkeypatch):
    monkeypatch.setattr(estimate, "step_seconds", lambda lab: 100 * STEP)
    lab.store.put("tables", {"data": lab.dataset.fingerprint}, {"x": [1.0]})
    lab.store.put("tables", {"data": "other"}, {"x": [1.0]})
    first, second = status(lab, "05").splitlines()
    said = r"as busy as it is now \(if the notebooks before it have run\)"
    assert re.fullmatch(rf"05: about .* on this machine, {said}, about 25 seconds when kept", first)
    alone = status(lab, "00").splitlines()[0]  # nothing comes before it
    assert ", as busy as it is now, about 15 seconds when kept" in alone and "before" not in alone
    assert "2 seeds x 4 models on 300 images of digits; CPU, " in second and "; 1 result of these images kept" in second
    assert "about" not in status(lab, "99") and "about" not in status(lab)  # not measured, so nothing is said
    monkeypatch.setattr(estimate, "step_seconds", lambda lab: 0.0)
    assert status(lab, "05").splitlines()[0] == "05: about 25 seconds on this machine"


def test_of_profile_smoke_it_is_said_that_its_numbers_mean_nothing(lab, monkeypatch):
    monkeypatch.setattr(estimate, "step_seconds", lambda lab: STEP)
    monkeypatch.setattr(estimate, "_step_seconds", lambda probe: PLAN_STEP)
    monkeypatch.delenv("DEMEM_PROFILE", raising=False)
    words = "profile smoke tests the code: numbers and verdicts below mean nothing"
    plan = protocol.PROFILES["smoke"]
    for name, said in (("smoke", True), ("lesson", False), ("", False)):
        assert (status(lab, "05", name).splitlines()[-1] == words) == said
        assert (estimate.plan_status(plan, "08", plan.load(), chosen=name).splitlines()[-1] == words) == said
    monkeypatch.setenv("DEMEM_PROFILE", "smoke")  # as the tour and the tests choose it
    assert status(lab, "05", "").splitlines()[-1] == words and words not in status(lab, "05", "lesson")


def test_a_gpu_that_is_left_alone_is_mentioned(lab, monkeypatch):
    monkeypatch.setattr(estimate.torch.cuda, "is_available", lambda: True)
    assert estimate.uses(lab.device).endswith("the GPU is left alone")
    monkeypatch.setattr(estimate.torch.cuda, "get_device_name", lambda on: "Test 4000")
    assert estimate.uses("cuda") == "GPU Test 4000"


@pytest.mark.parametrize(("seconds", "words"), [
    (0.1, "5 seconds"), (12, "10 seconds"), (13, "15 seconds"), (57, "55 seconds"), (58, "1 minute"), (89, "1 minute"),
    (91, "2 minutes"), (3600, "60 minutes"), (7200, "2 hours"),
    (71 * 3600, "71 hours"), (72 * 3600, "3 days"), (40 * 86400, "40 days"), (11_144 * 86400, "11,000 days"),
])
def test_no_more_digits_than_an_estimate_has(seconds, words):
    assert spell(seconds) == words
