"""Attack panel, Leak panel, Risk gallery: moved by their controls, compared with numbers computed apart."""

import re

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from plotly.callbacks import InputDeviceState, Points
from test_answers import ensemble
from torch import nn

from demem_lab import controls, data, training
from demem_lab.attacks import FGSM, PGD, predictions
from demem_lab.leakage import evaluate, roc
from demem_lab.membership import lira, rmia
from demem_lab.panels_risk import AttackPanel, LeakPanel, RiskGallery
from demem_lab.signals import confidence, cross_entropy, logit_margin


@pytest.fixture(autouse=True)
def fresh_session_without_training(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a panel must not train")

    monkeypatch.setattr(training, "train", refuse)
    monkeypatch.setattr(controls, "_positions", {})


@pytest.fixture
def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


@pytest.fixture
def runs():
    return {"first": ensemble(1, n=120), "second": ensemble(2, n=120)}


@pytest.fixture
def dataset():
    x = torch.rand(120, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return data.Dataset("made", x, torch.tensor(ensemble(1, n=120).y), ("a", "b", "c"), "made", 0.1)


def text(panel):
    return re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", panel.readout.value))


def trace(panel, name):
    return next(t for t in panel.figure.data if t.name == name)


def drawn(panel, monkeypatch):
    """Counts how often a panel draws from here on."""
    count = []
    update = type(panel).update
    monkeypatch.setattr(type(panel), "update", lambda self: count.append(1) or update(self))
    return count


def test_attack_panel_shows_the_attack_on_any_torch_module(tiny, net):
    panel = AttackPanel(net, tiny, rows=[3, 5, 7])
    panel.show.value = panel.show.options[0]
    panel.image.value, panel.eps.value, panel.steps.value = 2, 0.2, 7
    x, y = tiny.x[7:8], tiny.y[7:8]
    eps = panel.eps.value
    moved = PGD(eps, 7, random_start=False)(net, x, y)
    with torch.no_grad():
        after = net(moved).softmax(-1)[0].numpy()
    assert np.allclose(panel.figure.data[2].z, moved[0, 0], atol=1e-3)
    change = (moved - x)[0, 0].numpy()
    assert np.allclose(panel.figure.data[1].z, 0.5 + change / (2 * np.abs(change).max()), atol=1e-3)
    lines = [t for t in panel.figure.data if t.type == "scatter"]
    ends = {t.name.removesuffix(" (right)"): t.y[-1] for t in lines}
    assert ends == pytest.approx({name: after[k] for k, name in enumerate(tiny.classes)}, abs=1e-6)
    assert all(list(t.x) == list(range(8)) for t in lines) and lines[0].name == f"{tiny.classes[int(y)]} (right)"
    assert f"{tiny.classes[int(after.argmax())]} ({after.max():.0%})" in text(panel)
    assert f"{1 / (2 * np.abs(change).max()):.3g} times" in panel.figure.layout.annotations[1].text
    panel.eps.value = 0.0
    assert np.allclose(panel.figure.data[0].z, panel.figure.data[2].z) and "none" in panel.figure.layout.annotations[1].text


def test_attack_panel_takes_other_attacks(tiny, net):
    panel = AttackPanel(net, tiny)
    panel.attack.value = "FGSM"
    x, y = tiny.x[panel.row][None], tiny.y[panel.row][None]
    moved = FGSM(panel.eps.value)(net, x, y)
    assert np.allclose(panel.figure.data[2].z, moved[0, 0], atol=1e-3) and "whatever the slider says" in text(panel)
    panel.attack.value = "PGD, L2"
    moved = PGD(panel.eps.value * 4, 10, norm="l2", random_start=False)(net, x, y)
    assert np.allclose(panel.figure.data[2].z, moved[0, 0], atol=1e-3) and f"{panel.eps.value * 4:.3g}" in text(panel)
    panel.attack.value = "none"
    assert "No attack" in text(panel)


def test_attack_panel_narrows_down_and_draws_once(tiny, net, monkeypatch):
    panel = AttackPanel(net, tiny)
    assert panel.show.value.startswith("fooled") and "fooled" in text(panel) and "not fooled" not in text(panel)
    panel.show.value = panel.show.options[0]
    assert panel.show.value == "all (24)"
    count = drawn(panel, monkeypatch)
    right = (predictions(net, tiny.x) == tiny.y).numpy()
    stands = (predictions(net, PGD(0.1, 10, random_start=False)(net, tiny.x, tiny.y)) == tiny.y).numpy()
    panel.image.value = 23
    for label, wanted in (
        ("fooled", right & ~stands), ("withstands", right & stands), ("wrong", ~right), ("class b", tiny.y.numpy() == 1),
    ):
        found = [option for option in panel.show.options if option.startswith(label)]
        assert bool(found) == bool(wanted.any())
        if found:
            before = len(count)
            panel.show.value = found[0]
            assert len(count) == before + 1
            assert list(panel.groups[found[0]]) == list(np.flatnonzero(wanted)) and found[0].endswith(f"({wanted.sum()})")
            assert panel.image.max == wanted.sum() - 1 and f"Image {panel.row}," in text(panel)
            assert panel.widget.children[1].children[1].max == panel.image.max


def test_attack_panel_shows_its_errors_and_refuses_what_does_not_fit(tiny, net):
    panel = AttackPanel(net, tiny)
    panel.show.value = panel.show.options[0]

    def broken(*_, **__):
        raise RuntimeError("planted <failure>")

    panel.net.forward = broken
    panel.image.value = 4
    assert "RuntimeError: planted &lt;failure&gt;" in panel.readout.value
    del panel.net.forward
    panel.image.value = 5
    assert "planted" not in panel.readout.value
    with pytest.raises(ValueError, match="labels"):
        AttackPanel(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), tiny, rows=[2, 5])


def test_colour_images_have_colour(net):
    x = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    colour = data.Dataset("colour", x, torch.arange(6) % 3, ("a", "b", "c"), "made", 0.05)
    panel = AttackPanel(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), colour)
    panel.show.value, panel.image.value = "all (6)", 3
    assert np.array_equal(panel.figure.data[0].z, (x[3].permute(1, 2, 0) * 255).round().byte().numpy())


def test_leak_panel_shows_the_target_and_the_threshold(runs):
    panel = LeakPanel(runs)
    panel.model.value, panel.query.value, panel.target.value, panel.share.value = "second", "clean images", 3, 20.0
    for attack, scores in (
        ("LiRA", lira(logit_margin(runs["second"].clean, runs["second"].y), runs["second"].members)),
        ("RMIA (reads the confidence)", rmia(confidence(runs["second"].clean, runs["second"].y), runs["second"].members)),
        ("one threshold for all", logit_margin(runs["second"].clean, runs["second"].y)),
    ):
        panel.attack.value = attack
        s, member = scores[3], runs["second"].members[3]
        threshold = sorted(s)[-24]
        found, false = (s >= threshold)[member].mean(), (s >= threshold)[~member].mean()
        point = trace(panel, "at the threshold")
        assert (point.x[0], point.y[0]) == pytest.approx((max(false, 0.5 / (~member).sum()), found))
        assert trace(panel, "members").y.sum() == member.sum() and trace(panel, "non-members").y.sum() == -(~member).sum()
        at = np.clip(threshold, *np.quantile(s, [0.005, 0.995]))
        assert trace(panel, "threshold").x == pytest.approx((at, at))
        curve = trace(panel, "ROC")
        assert np.allclose(curve.y, np.maximum(roc(s, member)[1], 0.5 / (~member).sum()))
        strict = evaluate(s[None], member[None], fprs=(panel.fpr,)).tpr[0, 0]
        assert trace(panel, "found at few false").x[1] == pytest.approx(strict)
        assert f"Members hit: {found:.1%}" in text(panel) and f"{strict:.1%}" in text(panel)
    assert list(trace(panel, "best accuracy").y) == ["first", "second"]


def test_leak_panel_draws_once_and_remembers_scores(runs, monkeypatch):
    panel = LeakPanel(runs)
    count = drawn(panel, monkeypatch)
    panel.attack.value = "one threshold a class"
    assert len(count) == 1
    monkeypatch.setattr("demem_lab.answers.membership_scores", lambda *_, **__: pytest.fail("asked for again"))
    for share in (0.0, 0.5, 50.0, 100.0):
        panel.share.value = share
    panel.target.value = 2
    assert len(count) == 6 and "Members hit: 100.0%" in text(panel)
    panel.share.value = 0.0
    assert "fewer than 5" in text(panel)


def test_gallery_follows_score_threshold_and_sample(dataset, runs, monkeypatch):
    run = runs["first"]
    cheap = {"loss": cross_entropy(run.adversarial, run.y).mean(0), "random": np.random.default_rng(0).random(120)}
    panel = RiskGallery(dataset, [run], cheap)
    score = panel.risks.scores["memorization"]
    assert panel.sample.value == score.argmax() and panel.rank.value == 1
    count = drawn(panel, monkeypatch)
    panel.by.value = "loss"
    assert len(count) == 1 and panel.rank.value == 1 + (cheap["loss"] > cheap["loss"][score.argmax()]).sum()
    panel.rank.value = 5
    assert len(count) == 2 and panel.sample.value == np.argsort(-cheap["loss"])[4]
    panel.sample.value = 77
    assert len(count) == 3 and panel.rank.value == 1 + (cheap["loss"] > cheap["loss"][77]).sum()
    place = 1 + (cheap["loss"] > cheap["loss"][77]).sum()
    assert f"Sample 77 , label {dataset.classes[run.y[77]]} , rank {place}," in text(panel)
    panel.share.value = 25.0
    above = set(trace(panel, "at or above").customdata[:, 0].astype(int))
    assert above == set(np.argsort(-cheap["loss"])[:30]) and "30 of 120" in text(panel)
    lined = trace(panel, "threshold")
    assert lined.x == pytest.approx([np.sort(cheap["loss"])[-30]] * 2)
    ring = trace(panel, "chosen sample")
    assert (ring.x[0], ring.y[0]) == pytest.approx((cheap["loss"][77], score[77]))
    p = confidence(run.adversarial, run.y)[:, 77]
    assert np.allclose(trace(panel, "trained on it").x, p[run.members[:, 77]])
    assert np.allclose(trace(panel, "did not").x, p[~run.members[:, 77]])
    assert f"memorization {score[77]:.2f} ±" in text(panel)
    pictures = [t for t in panel.figure.data if t.type == "heatmap"]
    assert np.allclose(pictures[1].z, dataset.x[77, 0], atol=1e-3)
    assert np.allclose(pictures[0].z[:4, :4], dataset.x[int(cheap["loss"].argmax()), 0], atol=1e-3)
    panel.cheap.value = "random"
    assert trace(panel, "threshold").x == (None, None) and panel.figure.layout.xaxis2.title.text == "random"


def test_a_click_on_a_point_or_picture_chooses_the_sample(dataset, runs):
    panel = RiskGallery(dataset, [runs["first"]], {"random": np.random.default_rng(0).random(120)})
    for name in ("all samples", "pictures"):
        clicked = trace(panel, name)
        wanted = int(clicked.customdata[7][0])
        clicked._dispatch_on_click(Points(point_inds=[7], trace_name=name), InputDeviceState())
        assert panel.sample.value == wanted and f"Sample {wanted} ," in text(panel)


def test_cells_run_again_stand_where_they_stood(dataset, runs, tiny, net):
    panel = RiskGallery(dataset, [runs["first"]], {"random": np.arange(120.0)})
    panel.by.value, panel.share.value, panel.sample.value = "random", 30.0, 12
    again = RiskGallery(dataset, [runs["first"]], {"random": np.arange(120.0)})
    assert (again.by.value, again.share.value, again.sample.value, again.rank.value) == ("random", 30.0, 12, 108)
    assert again.readout.value == panel.readout.value
    panel = AttackPanel(net, tiny)
    panel.show.value, panel.image.value = panel.show.options[-1], 4
    again = AttackPanel(net, tiny)
    assert (again.show.value, again.image.value, again.row) == (panel.show.value, 4, panel.row)
    panel = LeakPanel(runs)
    panel.model.value, panel.signal.value = "second", "loss"
    assert LeakPanel(runs).readout.value == panel.readout.value


def test_all_figures_can_be_read_from_the_last_row(dataset, runs, tiny, net):
    made = (
        AttackPanel(net, tiny), LeakPanel(runs), RiskGallery(dataset, [runs["first"]], {"random": np.arange(120.0)}),
    )
    for panel in made:
        layout = panel.figure.layout
        assert layout.font.size >= 14 and all(note.font.size >= 14 for note in layout.annotations)
        assert panel.figure is panel.widget.children[-2] and isinstance(panel.figure, go.FigureWidget)
