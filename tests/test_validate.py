import numpy as np
import pytest
import torch

from demem_lab import validate


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "x", None])
def test_finite_names_value_and_range(value):
    with pytest.raises(ValueError, match=r"noise must be .*>= 0.*" + str(value).strip("-")):
        validate.finite("noise", value, low=0)


def test_finite_and_integer_return_the_number():
    assert validate.finite("a", "2.5", low=0, high=3) == 2.5 and validate.integer("b", 3.0) == 3


@pytest.mark.parametrize("value", [2.5, True, 0, 11])
def test_integer_refuses(value):
    with pytest.raises(ValueError, match="k must be"):
        validate.integer("k", value, low=1, high=10)


def test_choice_lists_what_there_is():
    with pytest.raises(ValueError, match="'a', 'b', got 'c'"):
        validate.choice("letter", "c", ("a", "b"))


@pytest.mark.parametrize(("x", "words"), [
    (torch.rand(2, 3), "shape"), (torch.rand(0, 1, 4, 4), "shape"), (torch.full((1, 1, 2, 2), 1.01), "pixels"),
    (torch.full((1, 1, 2, 2), -0.01), "pixels"), (torch.full((1, 1, 2, 2), float("nan")), "pixels"),
    (torch.zeros(1, 1, 2, 2, dtype=torch.uint8), "divide 8-bit"), ("text", "shape"),
])
def test_images_refuses(x, words):
    with pytest.raises(ValueError, match=words):
        validate.images(x)


@pytest.mark.parametrize(("y", "words"), [
    (torch.tensor([0, 1, 3]), "0..2"), (torch.tensor([0, -1, 1]), "0..2"), (torch.tensor([0, 1]), "shape"),
    (torch.tensor([0.0, 1.0, 2.0]), "int64"),
])
def test_labels_refuses(y, words):
    with pytest.raises(ValueError, match=words):
        validate.labels(y, n=3, classes=3)


@pytest.mark.parametrize(("mask", "words"), [
    (torch.ones(2, 4, dtype=torch.bool), "shape"), (torch.ones(2, 5), "bool"),
    (torch.tensor([[True] * 5, [False] * 5]), r"models \[1\] have none"),
])
def test_member_mask_refuses(mask, words):
    with pytest.raises(ValueError, match=words):
        validate.member_mask(mask, n=5)


@pytest.mark.parametrize(("mask", "words"), [(np.ones(4, dtype=bool), "one entry"), (np.ones(5), "bool")])
def test_flags_refuses_wrong_length_and_type(mask, words):
    with pytest.raises(ValueError, match=words):
        validate.flags("protected", mask, n=5)


@pytest.mark.parametrize("value", [True, False])
def test_nobody_and_everybody_are_legal_flags(value):
    validate.flags("protected", np.full(5, value), n=5)
