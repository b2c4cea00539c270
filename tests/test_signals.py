"""Signals against plain loops in high precision, also where probabilities round to 0 and 1."""

import math
import tracemalloc
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from demem_lab import signals as sg

getcontext().prec = 60
ROWS = {
    "random": np.random.default_rng(0).normal(0, 3, (20, 5)),
    "ties": np.zeros((3, 4)),
    "two tops": np.array([[5.0, 5.0, -1.0]]),
    "extreme": np.array([[800.0, 0.0, -5.0], [-900.0, 3.0, 3.0], [40.0, 0.0, 0.0], [0.0, 40.0, 39.0]]),
    "two classes": np.array([[0.3, -0.2], [60.0, -60.0], [-60.0, 60.0]]),
    "many classes": np.random.default_rng(1).normal(0, 5, (4, 100)),
}


def exact(row, label):
    """Everything about one row, with 60 digits."""
    z = [Decimal(float(v)) for v in row]
    top = max(z)
    e = [(v - top).exp() for v in z]
    total = sum(e)
    p = [v / total for v in e]
    rest = [(total - v) / total for v in e]  # 1 - p, without cancellation in 60 digits

    def xlog(a, b):
        return Decimal(0) if a == 0 or b == 0 else a * b.ln()

    others = [k for k in range(len(z)) if k != label]
    return {
        "cross_entropy": float(-(z[label] - top - total.ln())),
        "confidence": float(p[label]),
        "logit_margin": float(z[label] - top - sum(e[k] for k in others).ln()) if any(e[k] > 0 for k in others) else math.inf,
        "entropy": float(-sum(xlog(v, v) for v in p)),
        "modified_entropy": float(-xlog(rest[label], p[label]) - sum(xlog(p[k], rest[k]) for k in others)),
    }


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", ["cross_entropy", "confidence", "logit_margin", "entropy", "modified_entropy"])
def test_signals_have_the_exact_value(kind, name):
    z = ROWS[kind]
    y = np.arange(len(z)) % z.shape[1]
    found = getattr(sg, name)(z[None], y)[0]
    wanted = [exact(row, label)[name] for row, label in zip(z, y, strict=True)]
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-14) and np.isfinite(found).all()


LOGITS = arrays(np.float64, (6, 4), elements=st.floats(-200, 200))


@given(LOGITS, st.integers(0, 3), st.floats(-500, 500))
@settings(max_examples=60, deadline=None)
def test_a_constant_changes_nothing_and_neither_does_the_order_of_the_other_classes(z, label, shift):
    y = np.full(6, label)
    others = [k for k in range(4) if k != label]
    shuffled = z.copy()
    shuffled[:, others] = z[:, others[::-1]]
    for name, signal in sg.SIGNALS.items():
        value = signal(z, y)
        assert np.allclose(signal(z + shift, y), value, atol=1e-9, rtol=1e-9), name
        assert np.allclose(signal(shuffled, y), value, atol=1e-9), name
    assert (0 <= sg.entropy(z)).all() and (sg.entropy(z) <= np.log(4) + 1e-9).all()


def test_modified_entropy_knows_the_label():
    y = np.array([0])
    right, wrong = sg.modified_entropy(np.array([[60.0, 0.0]]), y)[0], sg.modified_entropy(np.array([[0.0, 60.0]]), y)[0]
    assert right == pytest.approx(0, abs=1e-20) and wrong > 100
    assert sg.entropy(np.array([[0.0, 60.0]]))[0] == pytest.approx(0, abs=1e-20)  # the plain one does not
    margins = np.linspace(-30, 30, 200)
    found = sg.modified_entropy(np.stack([margins, 0 * margins], 1), np.zeros(200, dtype=int))
    assert (np.diff(found) < 0).all()


def test_shapes_and_kinds_of_input_agree():
    z, y = np.random.default_rng(2).normal(size=(2, 3, 7, 4)), np.arange(7) % 4
    for name, signal in sg.SIGNALS.items():
        whole = signal(z, y)
        assert whole.shape == (2, 3, 7) and whole.dtype == np.float64, name
        assert np.array_equal(whole[1], signal(z[1], y)) and np.array_equal(whole[1, 2], signal(z[1, 2], y)), name
        assert np.allclose(signal(torch.tensor(z[0]), torch.tensor(y)), whole[0]), name
        assert np.allclose(signal(z.astype(np.float32), y), whole, atol=1e-5), name


def test_label_robustness_counts_the_tables_that_are_right():
    z = np.array([[[3.0, 0.0], [0.0, 3.0]], [[0.0, 3.0], [0.0, 3.0]]])  # [M, N, K]
    y = np.array([0, 1])
    assert sg.label_robustness([z[:1], z[1:]], y).tolist() == [[0.5, 1.0]]
    with pytest.raises(ValueError, match="at least one"):
        sg.label_robustness([], y)


def test_probabilities_serve_as_logits():
    p = np.array([[1e-12, 1 - 1e-12], [0.3, 0.7], [0.0, 1.0], [1.0, 0.0]])
    z = sg.logits_from_probabilities(p)
    y = np.zeros(4, dtype=int)
    assert np.isfinite(z).all() and sg.confidence(z, y) == pytest.approx(p[:, 0], abs=1e-9)
    for signal in (*sg.SIGNALS.values(), sg.logit_margin):
        assert np.isfinite(signal(z, y)).all()
    assert sg.logit_margin(z, y)[1] == pytest.approx(np.log(0.3 / 0.7))


@pytest.mark.parametrize(
    "call",
    [
        lambda: sg.confidence(np.zeros(3), np.zeros(3, dtype=int)),
        lambda: sg.confidence(np.zeros((3, 1)), np.zeros(3, dtype=int)),
        lambda: sg.confidence(np.zeros((3, 2)), np.zeros(4, dtype=int)),
        lambda: sg.logit_margin(np.zeros((2, 3, 2)), np.zeros(2, dtype=int)),
    ],
)
def test_bad_shapes(call):
    with pytest.raises(ValueError, match="must be"):
        call()


@pytest.mark.parametrize("name", ["cross_entropy", "confidence", "logit_margin", "modified_entropy", "label_robustness"])
@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_that_is_no_class_ends_in_one_sentence(name, label):
    z, y = np.random.default_rng(0).normal(size=(2, 5, 4)), np.array([0, 1, label, 3, 0])
    with pytest.raises(ValueError, match=f"labels must lie in 0..3 for logits of 4 classes, got values from {min(label, 0)} to"):
        getattr(sg, name)([z] if name == "label_robustness" else z, y)


def test_labels_of_any_whole_type_are_read_alike():
    z, y = np.random.default_rng(0).normal(size=(2, 5, 4)), np.array([0, 1, 2, 3, 0])
    wanted = sg.confidence(z, y)
    for kind in (np.uint8, np.int32):
        assert (sg.confidence(z, y.astype(kind)) == wanted).all()
    assert (sg.confidence(torch.tensor(z), torch.tensor(y)) == wanted).all()


@pytest.mark.parametrize("rows", [1, 2, 40, 41, 1003])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_blocks_of_rows_change_no_bit(monkeypatch, rows, kind):
    rng = np.random.default_rng(0)
    z, y = (30 * rng.normal(size=(2, rows, 11))).astype(kind), rng.integers(0, 11, rows)
    found = {}
    for block in (10**9, 220):
        monkeypatch.setattr(sg, "BLOCK", block)
        found[block] = [signal(z, y) for signal in (*sg.SIGNALS.values(), sg.logit_margin)]
    assert all(np.array_equal(a, b) for a, b in zip(found[220], found[10**9], strict=True))


def test_signals_need_no_more_than_a_part_of_the_table():
    z, y = np.random.default_rng(0).normal(size=(300_000, 20)).astype(np.float32), np.zeros(300_000, dtype=int)
    for signal in (*sg.SIGNALS.values(), sg.logit_margin, lambda z, y: sg.label_robustness([z], y)):
        tracemalloc.start()
        signal(z, y)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < 1.5 * z.nbytes
    tracemalloc.start()
    sg.logits_from_probabilities(z)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2.1 * z.nbytes  # the result itself, in float64
