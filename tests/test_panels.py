"""Panels do what their labels say, train nothing, and show their errors."""

import re

import numpy as np
import pytest
import torch

from demem_lab import training
from demem_lab.attacks import PGD
from demem_lab.controls import Prediction
from demem_lab.models import MLP
from demem_lab.panels import AttackPanel


@pytest.fixture(autouse=True)
def nothing_is_trained(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a panel must not train")

    monkeypatch.setattr(training, "train", refuse)


def text(panel):
    return re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", panel.readout.value))


def test_attack_panel_shows_what_the_attack_does(tiny):
    net = MLP((8,)).build(models=1, shape=tiny.shape, classes=3, seeds=(0,))
    panel = AttackPanel(net, tiny, rows=[3, 5, 7])
    panel.image.value, panel.eps.value, panel.steps.value = 2, 0.2, 7
    x, y = tiny.x[7:8], tiny.y[7:8]
    eps = panel.eps.value
    moved = PGD(eps, 7, random_start=False)(net, x, y)
    with torch.no_grad():
        after = net(moved).softmax(-1)[0].numpy()
    assert np.allclose(panel.figure.data[1].z, moved[0, 0], atol=1e-3)
    assert np.allclose(panel.figure.data[4].y, after, atol=1e-6)
    assert tiny.classes[int(after.argmax())] in text(panel)
    panel.eps.value = 0.0
    assert np.allclose(panel.figure.data[0].z, panel.figure.data[1].z)


def test_an_error_in_a_callback_is_shown(tiny):
    net = MLP((8,)).build(models=1, shape=tiny.shape, classes=3, seeds=(0,))
    panel = AttackPanel(net, tiny)

    def broken(*_, **__):
        raise RuntimeError("planted <failure>")

    panel.net.forward = broken
    panel.image.value = 4
    assert "RuntimeError: planted &lt;failure&gt;" in panel.readout.value
    del panel.net.forward
    panel.image.value = 5
    assert "planted" not in panel.readout.value


def test_a_prediction_waits_for_people_and_not_for_machines(monkeypatch, capsys):
    monkeypatch.setenv("DEMEM_HEADLESS", "1")
    alone = Prediction("How many?", low=0, high=10, unit=" %")
    alone._ipython_display_()
    assert "nobody is watching: 5 %" in capsys.readouterr().out and "Nobody was asked" in alone.compare(7.0)
    monkeypatch.delenv("DEMEM_HEADLESS")
    asked = Prediction("How many?", low=0, high=10)
    assert "did not commit" in asked.compare(7.0)
    asked.slider.value = 6.0
    asked.button.click()
    assert asked.committed and asked.slider.disabled and "You guessed: 6. Measured: 7, 1 away" in asked.compare(7.0)
    with pytest.raises(ValueError, match="high"):
        Prediction("?", low=1, high=0)
