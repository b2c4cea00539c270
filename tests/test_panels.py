"""Panels do what their labels say, name the nearest trained point, train nothing, and show their errors."""

import re

import numpy as np
import pandas as pd
import pytest

from demem_lab import panels, training, views
from demem_lab.controls import Prediction
from demem_lab.panels import NoisePanel, PlanePanel
from demem_lab.sweep import Plane


@pytest.fixture(autouse=True)
def nothing_is_trained(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a panel must not train")

    monkeypatch.setattr(training, "train", refuse)


def text(panel):
    return re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", panel.readout.value))


def point(sigma, fraction=1.0, n=24):
    rng = np.random.default_rng(int(10 * sigma + 100 * fraction))
    values = dict(zip(("accuracy", "robust", "leak", "leak, high risk", "leak, rest", "robust, high risk", "robust, rest"),
                      rng.random(7), strict=True))
    place = {"noise_multiplier": sigma, "fraction": fraction, "protected": round(fraction * n)}
    return place | values | {"guarantee": f"promise {sigma:g}/{fraction:g}"}


@pytest.fixture
def plane():
    scores = np.linspace(0, 1, 24)
    rows = [point(0.0, 0.0)] + [point(s, f) for s in (0.0, 1.0, 3.0) for f in (0.25, 1.0)]
    return Plane(pd.DataFrame(rows), scores, seed=0, models=4, fpr=0.1)


def test_noise_panel_shows_the_nearest_trained_point():
    points = [point(s) for s in (0.0, 0.3, 1.0, 3.0)]
    panel = NoisePanel(points)
    for asked, trained in ((0.0, 0), (0.2, 1), (0.6, 1), (0.7, 2), (1.0, 2), (2.4, 3), (3.0, 3)):
        panel.noise.value = asked
        assert f"promise {points[trained]['noise_multiplier']:g}/1" in text(panel)
        assert f"{100 * points[trained]['robust']:.1f} %" in text(panel)
        assert all(shape.x0 == trained for shape in panel.figure.layout.shapes)
        exact = points[trained]["noise_multiplier"] == asked
        assert ("nearest trained point" in text(panel)) != exact


def test_the_figure_holds_the_points_values():
    points = [point(s) for s in (0.0, 1.0, 3.0)]
    points[1]["leak, high risk"] = None
    panel = NoisePanel(points)
    by_name = {trace.name: trace for trace in panel.figure.data}
    assert list(by_name["robust"].y) == [100 * p["robust"] for p in points]
    assert by_name["leak, high risk"].y[1] is None
    panel.noise.value = 1.0
    assert "not resolved" in text(panel)


def test_plane_panel_moves_marks_and_pictures(plane, tiny):
    panel = PlanePanel(plane, tiny)
    for sigma, threshold in ((0.0, 0.8), (0.9, 0.7), (2.5, -1.0), (1.0, 2.0), (3.0, 0.9)):
        panel.noise.value, panel.threshold.value = sigma, threshold
        wanted = plane.nearest(noise_multiplier=panel.noise.value, risk_threshold=panel.threshold.value)
        assert wanted["guarantee"] in text(panel) and f"the {int(wanted['protected'])} riskiest" in text(panel)
        chosen = next(t for t in panel.figure.data if t.name == "chosen")
        assert chosen.x[0] == pytest.approx(100 * wanted["robust"]) and chosen.y[0] == pytest.approx(100 * wanted["leak"])
        mark = next(t for t in panel.figure.data if t.name == "map mark")
        assert mark.x[0] == f"{wanted['fraction']:.0%}" and mark.y[0] == f"{wanted['noise_multiplier']:g}"
        assert np.array_equal(panel.figure.data[-1].z, views.protected_picture(panels.protected_images(plane, tiny, wanted)).z)
    panel.noise.value, panel.threshold.value = 3.0, 10.0
    assert "Nobody is protected" in text(panel)


def test_protected_images_are_the_riskiest_in_order(plane, tiny):
    for fraction, count in ((0.0, 0), (0.25, 6), (1.0, 24)):
        images = panels.protected_images(plane, tiny, point(1.0, fraction))
        assert np.array_equal(images, tiny.x[24 - count :].numpy())


def test_controls_can_be_used_by_keyboard_and_named(plane, tiny):
    panel = PlanePanel(plane, tiny)
    for slider, name in ((panel.noise, "noise multiplier"), (panel.threshold, "risk threshold")):
        assert slider.description == name and slider.tooltip == name and not slider.continuous_update
    box = panel.widget.children[0].children[1]
    box.value = 3.0
    assert panel.noise.value == 3.0 and "aria-live" in panel.readout.value


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


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_positions_that_do_not_exist(value, plane):
    with pytest.raises(ValueError, match="noise_multiplier"):
        panels.nearest_point([point(1.0)], value)
    with pytest.raises(ValueError, match="noise_multiplier"):
        plane.nearest(noise_multiplier=value, risk_threshold=0.5)
