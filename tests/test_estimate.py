"""What a notebook is said to take: carried over from the tour by a measured ratio, never made up."""

import re
from dataclasses import replace

import pytest

from demem_lab import estimate
from demem_lab.estimate import DIGITS, KEPT, MEASURED, STEP, seconds, spell, status, step_seconds
from demem_lab.experiment import profile
from demem_lab.store import Store


@pytest.fixture
def lab(tmp_path):
    return replace(profile("smoke").experiment(progress=False), store=Store(tmp_path / "store"))


def test_the_reference_machine_gets_the_reference_seconds(tmp_path, monkeypatch):
    lesson = profile("lesson").experiment(progress=False)
    assert lesson.dataset.n == DIGITS
    monkeypatch.setattr(estimate, "step_seconds", lambda lab: STEP)
    for notebook, measured in MEASURED.items():
        first, again = seconds(lesson, notebook)
        assert first == pytest.approx(max(measured, KEPT)) and again == KEPT
    monkeypatch.setattr(estimate, "step_seconds", lambda lab: 2 * STEP)
    assert seconds(lesson, "05")[0] == pytest.approx(KEPT + 2 * (MEASURED["05"] - KEPT))
    twice = replace(lesson, epochs=2 * lesson.epochs, seeds=(*lesson.seeds, 7, 8, 9))
    assert seconds(twice, "05")[0] == pytest.approx(KEPT + 8 * (MEASURED["05"] - KEPT))


@pytest.mark.parametrize(("models", "cost"), [(4, 0.01), (64, 0.001), (4, 0.0001)])
def test_what_a_training_costs_before_its_first_step_is_not_counted(lab, monkeypatch, models, cost):
    trained = []

    def train(lab, models, steps):
        trained.append((models, steps))
        return 0.05 + cost * models * steps

    monkeypatch.setattr(estimate, "_train", train)
    assert step_seconds(replace(lab, models=models)) == pytest.approx(cost * models)
    assert trained[-1][0] == models and trained[-1][1] > 1


def test_slow_steps_are_timed_on_few_models(lab, monkeypatch):
    trained = []

    def train(lab, models, steps):
        trained.append(models)
        return 2.0 * models * (1 + steps)

    monkeypatch.setattr(estimate, "_train", train)
    assert step_seconds(replace(lab, models=64)) == pytest.approx(128) and max(trained) < 64


def test_the_probe_runs_and_leaves_the_store_alone(lab):
    assert 0 < step_seconds(lab, 0.05) < 60 and lab.store.count() == 0
    assert estimate.slowness() > 0


def test_the_lines_say_what_is_used_and_what_is_kept(lab, monkeypatch):
    monkeypatch.setattr(estimate, "step_seconds", lambda lab: 100 * STEP)
    lab.store.put("tables", {"data": lab.dataset.fingerprint}, {"x": [1.0]})
    lab.store.put("tables", {"data": "other"}, {"x": [1.0]})
    first, second = status(lab, "05").splitlines()
    assert re.fullmatch(r"05: about .* on this machine the first time, about 15 seconds when its results are kept", first)
    assert "2 seeds x 4 models on 300 images of digits; CPU, " in second and "; 1 result of these images kept" in second
    assert "about" not in status(lab, "99") and "about" not in status(lab)  # not measured, so nothing is said
    monkeypatch.setattr(estimate, "step_seconds", lambda lab: 0.0)
    assert status(lab, "05").splitlines()[0] == "05: about 15 seconds on this machine"


def test_a_gpu_that_is_left_alone_is_mentioned(lab, monkeypatch):
    monkeypatch.setattr(estimate.torch.cuda, "is_available", lambda: True)
    assert estimate.uses(lab).endswith("the GPU is left alone")
    monkeypatch.setattr(estimate.torch.cuda, "get_device_name", lambda on: "Test 4000")
    assert estimate.uses(replace(lab, device="cuda")) == "GPU Test 4000"


@pytest.mark.parametrize(("seconds", "words"), [
    (0.1, "5 seconds"), (12, "10 seconds"), (13, "15 seconds"), (57, "55 seconds"), (58, "1 minute"), (89, "1 minute"),
    (91, "2 minutes"), (3600, "60 minutes"), (7200, "2 hours"),
])
def test_no_more_digits_than_an_estimate_has(seconds, words):
    assert spell(seconds) == words
