"""Every planted wrong answer is caught by its check, and told in its own words."""

import re

import pytest

from demem_lab.checks import EXERCISES
from demem_lab.grading import WrongAnswer
from demem_lab.mistakes import MISTAKES

PLANTED = [pytest.param(check, says, id=f"{check.name}: {says}") for check in EXERCISES.values() for says in check.mistakes]


@pytest.mark.filterwarnings("ignore::RuntimeWarning", r"ignore:var\(\):UserWarning")
@pytest.mark.parametrize(("check", "says"), PLANTED)
def test_a_planted_mistake_is_told_in_its_own_words(check, says, capsys):
    with pytest.raises(WrongAnswer) as caught:
        check(check.mistakes[says])
    assert re.fullmatch(rf"[^\n]+: expected [^\n]+, got [^\n]+; hint: {re.escape(says)}", str(caught.value))
    assert capsys.readouterr().out == ""


def test_every_exercise_has_mistakes_and_none_is_left_over():
    assert set(MISTAKES) == {check.name for check in EXERCISES.values()}
    assert min(map(len, MISTAKES.values())) >= 3


@pytest.mark.parametrize(("name", "words"), [
    ("fgsm", "sign of the gradient"), ("project", "projection is missing"), ("clip", "clip before averaging"),
    ("noisy_mean", "noise is scaled wrongly"), ("shadow_split", "members in the shadow split"),
    ("held_out", "chosen on the scores that are judged"),
])
def test_the_classics_are_planted(name, words):
    assert any(words in says for says in MISTAKES[name])


def test_words_explain_and_do_not_repeat():
    for planted in MISTAKES.values():
        assert all(len(says.split()) >= 4 and "\n" not in says and not says.endswith(".") for says in planted)
