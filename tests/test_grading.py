"""Grading: what counts as solved, as a stub, as wrong and as the learner's own error; and how a mistake is recognised."""

import random

import numpy as np
import pytest
import torch

from demem_lab.checks import EXERCISES
from demem_lab.grading import Case, Exercise, WrongAnswer, case

ALL = pytest.mark.parametrize("check", EXERCISES.values(), ids=EXERCISES)


def double(x):
    return 2 * x


TOY = Exercise(
    double, lambda: [case("x = 0", 0.0), case("x = 2", 2.0), case("x = 3", 3.0)], "twice x",
    {"this is 4 whatever x": lambda x: 4.0, "this is the square": lambda x: x * x, "a third more": lambda x: x * x + (x == 3)},
)


@pytest.mark.parametrize(("f", "words"), [
    (lambda x: x * x, "x = 3: expected 6, got 9; hint: this is the square"),  # right at 0 and 2, wrong at 3
    (lambda x: 4.0, "x = 0: expected 0, got 4; hint: this is 4 whatever x"),
    (lambda x: x * x + (x == 3), "x = 3: expected 6, got 10; hint: a third more"),
    (lambda x: 2 * x + (x == 3) * 3 - (x == 2), "x = 2: expected 4, got 3; hint: twice x"),  # no planted mistake
    (lambda x: x * x if x else 1.0, "x = 0: expected 0, got 1; hint: twice x"),  # a square only later
    (lambda x: 9.0 if x == 3 else 2 * x, "x = 3: expected 6, got 9; hint: this is the square"),
    (lambda x: [2 * x], "x = 0: expected shape [], got [1]; hint: twice x"),
    (lambda x: None, "x = 0: expected an answer, got None; hint: does the function return its result?"),
])
def test_what_is_wrong_is_told_in_the_words_of_the_mistake_that_explains_it(f, words):
    with pytest.raises(WrongAnswer) as caught:
        TOY(f)
    assert str(caught.value) == words


def test_a_mistake_must_be_right_where_the_learner_was():
    """At x = 3 "9 whatever x" answers alike, but it would have failed before."""
    toy = Exercise(double, TOY.cases, "twice x", {"9 whatever x": lambda x: 9.0})
    with pytest.raises(WrongAnswer, match="hint: twice x"):
        toy(lambda x: 9.0 if x == 3 else 2 * x)


def test_words_tolerances_and_hints_of_a_case():
    cases = [Case("sign", lambda f: "up" if f(1) > 0 else "down", wanted="up", hint="turn it"),
             Case("about", lambda f: f(1), wanted=2.0, tolerance=0.1)]
    toy = Exercise(double, lambda: cases, "twice x", {})
    assert toy(lambda x: 2.1 * x)
    with pytest.raises(WrongAnswer, match="sign: expected up, got down; hint: turn it"):
        toy(lambda x: -x)
    with pytest.raises(WrongAnswer, match=r"about: expected 2, got 2.5; hint: twice x"):
        toy(lambda x: 2.5 * x)


def test_not_a_number_can_be_the_right_answer():
    assert Exercise(lambda x: x * np.nan, lambda: [case("x = 1", 1.0)], "", {})(lambda x: np.nan)


def test_every_asking_gets_its_own_copies():
    seen = []

    def spoils(x):
        seen.append(x.copy())
        x += 1
        return 2 * (x - 1)

    toy = Exercise(double, lambda: 2 * [case("x", one)], "twice x", {})
    one = np.ones(3)
    assert toy(spoils) and (np.array(seen) == 1).all() and (one == 1).all()


@ALL
def test_a_stub_is_not_solved_yet(check, capsys):
    def stub(*_):
        raise NotImplementedError

    def stub_with_a_text(*_):
        raise NotImplementedError("write me")

    for f in (stub, stub_with_a_text, lambda *_: stub()):
        assert check(f) is False
        assert capsys.readouterr().out == f"not solved yet: fill in {check.name}\n"


@ALL
@pytest.mark.parametrize("kind", [ZeroDivisionError, AssertionError, KeyboardInterrupt])
def test_other_errors_are_the_learners_own(check, kind, capsys):
    own = kind("mine")

    def broken(*_):
        raise own

    with pytest.raises(kind) as caught:
        check(broken)
    assert caught.value is own and not isinstance(own, WrongAnswer)
    assert capsys.readouterr().out == ""


def test_an_error_of_the_learners_says_what_was_asked():
    with pytest.raises(ZeroDivisionError) as caught:
        TOY(lambda x: 1 / 0 if x == 3 else 2 * x)
    assert caught.value.__notes__ == ["while asked: x = 3"]


def test_a_mistake_that_cannot_answer_explains_nothing():
    """Asked for a gradient, say, by a number; neither at this question nor at an earlier one is that the learner's affair."""
    for early in (0, 3):
        def breaks(x, early=early):
            return 1 / 0 if x == early else 2 * x

        def asks_for_an_item(x, early=early):
            return (2.0 if x == early else 2 * x).item() if x in (early, 3) else 2 * x

        mistakes = {"breaks": breaks, "asks": asks_for_an_item, "this is the square": lambda x: x * x}
        toy = Exercise(double, TOY.cases, "twice x", mistakes)
        with pytest.raises(WrongAnswer, match="x = 3: expected 6, got 9; hint: this is the square"):
            toy(lambda x: x * x)


def test_what_to_return_is_the_questions_to_say():
    toy = Exercise(double, lambda: [case("x = 1", 1, form="two numbers")], "twice x", {})
    with pytest.raises(WrongAnswer, match="x = 1: expected numbers, got tuple; hint: return two numbers"):
        toy(lambda x: (np.ones(3), np.ones(2)))


@ALL
def test_a_wrong_dtype_is_a_bug_and_not_an_empty_stub(check, capsys):
    """Torch reports some of them as NotImplementedError, and not by a `raise` statement."""
    with pytest.raises(NotImplementedError, match="not implemented for 'Bool'"):
        check(lambda *_: torch.tensor([True]).median())
    assert capsys.readouterr().out == ""


@ALL
@pytest.mark.parametrize(("value", "words"), [
    (None, "return its result"), ("text", "expected numbers, got str"), ({}, "expected numbers, got dict"),
    ([[1], [2, 3]], "expected numbers, got list"), (np.zeros((2, 2, 2, 2, 2)), "got [2, 2, 2, 2, 2]"), (np.nan, "got"),
])
def test_nonsense_is_a_wrong_answer(check, value, words):
    with pytest.raises(WrongAnswer) as caught:
        check(lambda *_: value)
    assert words in str(caught.value)


@ALL
def test_the_global_random_state_is_left_alone_and_does_not_matter(check):
    def restless(*arguments):
        _ = torch.manual_seed(0), torch.rand(3), np.random.seed(0)
        return check.solution(*arguments)

    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), np.random.get_state()[2], random.getstate()

    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = state()
        assert check(restless) and check(check.solution)
        assert state() == before


def test_the_state_comes_back_after_a_wrong_answer_too():
    before = torch.get_rng_state(), np.random.get_state()[1]
    with pytest.raises(WrongAnswer):
        TOY(lambda *_: np.random.rand() + torch.rand(()).item() + 5)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


def test_a_notebook_shows_what_is_wrong_and_not_where_the_check_found_it(capsys):
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell.instance()
    shell.user_ns |= {"TOY": TOY}
    shell.run_cell("TOY(lambda x: x * x)")
    said = capsys.readouterr().out
    assert "not right yet: x = 3: expected 6, got 9\nhint: this is the square" in said and "Traceback" not in said
    shell.run_cell("TOY(lambda x: 1 / 0 if x else x)")  # the learner's own error stays whole
    assert "ZeroDivisionError" in capsys.readouterr().out
