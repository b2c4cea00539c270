"""How an exercise is graded: the learner's function and the trusted one are asked the same questions.

>>> double = Exercise(lambda x: 2 * x, lambda: [case("x = 3", 3)], "twice x", {"this is the square": lambda x: x * x})
>>> double(lambda x: x + x)
passed: <lambda> is right on all inputs
True
>>> double(lambda x: x * x)
Traceback (most recent call last):
    ...
demem_lab.grading.WrongAnswer: x = 3: expected 6, got 9; hint: this is the square

A stub that raises NotImplementedError is "not solved yet" (False), so notebooks run headless. A wrong answer raises
WrongAnswer: the input, what was expected, what came back, and what is wrong, in words. The words belong to a planted
wrong function that answers as the learner's does: right where that was right, and just as wrong where it was not.
Every other error is the learner's own and passes through.
"""

from __future__ import annotations

import copy
import dis
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch


class WrongAnswer(AssertionError):
    """The function answers, but not correctly."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback, of which nothing but the last line is the learner's business."""
        answer, mark, hint = str(self).partition("; hint: ")
        parts = [f"not right yet: {answer}", f"hint: {hint}"] if mark else [str(self)]
        return [textwrap.fill(part, 90, subsequent_indent="    ", break_long_words=False) for part in parts]


@dataclass(frozen=True)
class Case:
    """One question. `ask(f)` puts it to any function; the answer is numbers, or a word where no number says it."""

    name: str
    ask: Callable[[Callable], object]
    wanted: object = None  # None: what the solution answers
    tolerance: float = 1e-5  # absolute and relative
    hint: str = ""  # instead of the exercise's, where the question is about one thing
    form: str = "an array or a number"  # what to return, told to whoever returns no numbers


def case(name: str, *arguments, **about) -> Case:
    """The question `f(*arguments)`; each asking gets copies, so that working in place spoils nothing. about: as in Case."""
    return Case(name, lambda f: call(f, *arguments), **about)


def call(f: Callable, *arguments):
    """f of copies of the arguments; a generator stays itself."""
    return f(*(a if isinstance(a, torch.Generator) else copy.deepcopy(a) for a in arguments))


@dataclass(frozen=True)
class Exercise:
    """A solution, the questions, a hint for any wrong answer, and planted wrong functions by what is wrong with them."""

    solution: Callable
    cases: Callable[[], Sequence[Case]]
    hint: str
    mistakes: Mapping[str, Callable]

    @property
    def name(self) -> str:
        """What the learner's function is called."""
        return self.solution.__name__

    def __call__(self, f: Callable) -> bool:
        """True if f is right on every case, False for a stub; WrongAnswer otherwise. The global random state is kept."""
        state = np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                self._compare(f)
        except NotImplementedError as error:
            if not _is_stub(error):
                raise
            print(f"not solved yet: fill in {self.name}")
            return False
        finally:
            np.random.set_state(state)
        print(f"passed: {self.name} is right on all inputs")
        return True

    def _compare(self, f: Callable) -> None:
        passed: list[tuple[Case, object]] = []
        for question in self.cases():
            wanted = question.ask(self.solution) if question.wanted is None else question.wanted
            found = _asked(question, f)
            if found is None:
                raise WrongAnswer(f"{question.name}: expected an answer, got None; hint: does the function return its result?")
            text = _difference(question, found, wanted)
            if text:
                raise WrongAnswer(f"{question.name}: {text}; hint: {self._what_is_wrong(question, found, passed)}")
            passed.append((question, wanted))

    def _what_is_wrong(self, question: Case, found, passed: Sequence[tuple[Case, object]]) -> str:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # mistakes divide by zero on purpose; the learner's own warnings are shown
            for says, mistake in self.mistakes.items():
                if all(_answers(q, mistake, value) for q, value in ((question, found), *passed)):
                    return says
        return question.hint or self.hint


def _asked(question: Case, f: Callable):
    """The learner's answer; an error of the learner's own says at which question it came."""
    try:
        return question.ask(f)
    except Exception as error:
        error.add_note(f"while asked: {question.name}")
        raise


def _answers(question: Case, mistake: Callable, value) -> bool:
    """Whether a planted mistake answers `value`. Some cannot answer: a number has no gradient to be asked for."""
    try:
        answer = question.ask(mistake)
        return answer is not None and not _difference(question, value, answer)
    except (ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError, ValueError, WrongAnswer):
        return False


def _difference(question: Case, found, wanted) -> str:
    """What to tell about `found`, empty if it is `wanted`."""
    if isinstance(wanted, str):
        return "" if found == wanted else f"expected {wanted}, got {found}"
    a, b = (as_array(value, question.name, question.form) for value in (found, wanted))
    if a.shape != b.shape:
        return f"expected shape {list(b.shape)}, got {list(a.shape)}"
    if np.allclose(a, b, rtol=question.tolerance, atol=question.tolerance, equal_nan=True):
        return ""
    worst = np.unravel_index(np.argmax(np.nan_to_num(np.abs(a - b), nan=np.inf)), b.shape)
    at = f" at entry {[int(i) for i in worst]}" if worst else ""
    return f"expected {b[worst]:.5g}{at}, got {a[worst]:.5g}"


def as_array(value, name: str, form: str = Case.form) -> np.ndarray:
    """An answer to the question of that name as NumPy numbers, from torch or NumPy. WrongAnswer where there are none."""
    try:
        return np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value, dtype=np.float64)
    except (TypeError, ValueError):
        raise WrongAnswer(f"{name}: expected numbers, got {type(value).__name__}; hint: return {form}") from None


def _is_stub(error: NotImplementedError) -> bool:
    """Whether a `raise` statement raised it: torch uses the same type for a wrong dtype, a bug that must be shown."""
    last = error.__traceback__
    while last.tb_next:
        last = last.tb_next
    return dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
