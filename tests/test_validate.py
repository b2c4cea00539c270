import numpy as np
import pytest
import torch

from demem_lab import validate
from demem_lab.attacks import PGD
from demem_lab.data import load
from demem_lab.mechanisms import SelectiveDP
from demem_lab.recipe import Recipe
from demem_lab.sampling import Poisson


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "x", None])
def test_finite_names_value_and_range(value):
    with pytest.raises(ValueError, match=r"noise must be .*>= 0.*" + str(value).strip("-")):
        validate.finite("noise", value, low=0)


def test_finite_and_integer_return_the_number():
    assert validate.finite("a", 2.5, low=0, high=3) == 2.5 and validate.integer("b", 3) == 3
    for value in (np.int64(3), np.uint8(3), torch.tensor(3)):
        assert validate.integer("b", value) == 3 and type(validate.integer("b", value)) is int


@pytest.mark.parametrize("value", [10.0, np.float64(10), np.float32(10), torch.tensor(10.0)])
def test_a_whole_number_is_not_a_float_with_which_callers_would_go_on(value):
    with pytest.raises(ValueError, match="k must be a whole number, got .*10.*; write 10$"):
        validate.integer("k", value, low=1, fix="take fewer")


@pytest.mark.parametrize("value", ["2", "2.5", b"2", True, False])
@pytest.mark.parametrize("kind", [validate.finite, validate.integer])
def test_text_and_truth_values_are_no_numbers(kind, value):
    with pytest.raises(ValueError, match=f"noise must be a (whole )?number.*got {value!r}"):
        kind("noise", value, low=0)


@pytest.mark.parametrize("make", [
    lambda: PGD("0.1"), lambda: SelectiveDP("1.0"), lambda: load(subset="50"), lambda: Poisson("4"), lambda: Recipe(epochs="3"),
])
def test_settings_in_quotes_are_refused_where_they_are_given(make):
    with pytest.raises(ValueError, match="must be a number.*got '"):
        make()


@pytest.mark.parametrize("value", [10**400, -(10**400)], ids=["huge", "minus huge"])
def test_numbers_beyond_floating_point_are_refused_like_the_rest(value):
    with pytest.raises(ValueError, match="noise must be"):
        validate.finite("noise", value, low=0)


@pytest.mark.parametrize("value", [2.5, True, 0, 11, float("nan")])
def test_integer_refuses(value):
    with pytest.raises(ValueError, match=f"k must be .*got {value}; take fewer"):
        validate.integer("k", value, low=1, high=10, fix="take fewer")


@pytest.mark.parametrize(("value", "low", "high"), [(0.0, 0, 1), (1.0, 0, 1), (-5, None, 0)])
def test_bounds_belong_to_the_range(value, low, high):
    assert validate.finite("a", value, low=low, high=high) == value
    with pytest.raises(ValueError, match=f"<= {high}.*got {high + 1e-6}"):
        validate.finite("a", high + 1e-6, low=low, high=high)


def test_choice_lists_what_there_is():
    with pytest.raises(ValueError, match="'a', 'b', got 'c'"):
        validate.choice("letter", "c", ("a", "b"))


@pytest.mark.parametrize(("x", "words"), [
    (torch.rand(2, 3), "shape"), (torch.rand(0, 1, 4, 4), "shape"), (torch.full((1, 1, 2, 2), 1.01), r"\[0, 1\].*1.01"),
    (torch.full((1, 1, 2, 2), -0.01), r"\[0, 1\].*-0.01"), (torch.full((1, 1, 2, 2), float("nan")), r"\[0, 1\].*nan"),
    (torch.tensor([[[[0.5, float("nan")]]]]), "nan"), (torch.full((1, 1, 2, 2), float("inf")), "inf"),
    (torch.zeros(1, 1, 2, 2, dtype=torch.uint8), "divide 8-bit"), ("text", "shape"),
])
def test_images_refuses(x, words):
    with pytest.raises(ValueError, match=words):
        validate.images(x)


@pytest.mark.parametrize(("y", "words"), [
    (torch.tensor([0, 1, 3]), "0..2.*from 0 to 3"), (torch.tensor([0, -1, 1]), "0..2.*from -1 to 1"),
    (torch.tensor([0, 1]), r"shape \[3\].*got \[2\]"), ([0, 1, 2], "got list"),
    (torch.tensor([0.0, 1.0, 2.0]), "int64"),
])
def test_labels_refuses(y, words):
    with pytest.raises(ValueError, match=words):
        validate.labels(y, n=3, classes=3)


@pytest.mark.parametrize(("mask", "words"), [
    (torch.ones(2, 4, dtype=torch.bool), r"\[2, 5\].*got \[2, 4\]"), (torch.ones(2, 5), "bool.*float32"),
    (torch.ones(3, 5, dtype=torch.bool), r"\[2, 5\].*got \[3, 5\]"), (torch.ones(5, dtype=torch.bool), "shape"),
    (torch.tensor([[True] * 5, [False] * 5]), r"models \[1\] have none"),
])
def test_member_mask_refuses(mask, words):
    with pytest.raises(ValueError, match=words):
        validate.member_mask(mask, n=5, models=2)


@pytest.mark.parametrize(("mask", "words"), [(np.ones(4, dtype=bool), "one entry"), (np.ones(5), "bool")])
def test_flags_refuses_wrong_length_and_type(mask, words):
    with pytest.raises(ValueError, match=words):
        validate.flags("protected", mask, n=5)


@pytest.mark.parametrize("value", [True, False])
def test_nobody_and_everybody_are_legal_flags(value):
    assert validate.flags("protected", np.full(5, value), n=5) is None  # no complaint
