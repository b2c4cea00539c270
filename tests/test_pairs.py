"""Every pair trains or is refused in a sentence, and the page in the repository says what the code does today."""

import runpy
from pathlib import Path

import pandas as pd
import pytest

from demem_lab import pairs
from demem_lab.mechanisms import Plain
from demem_lab.models import MLP
from demem_lab.objectives import Natural
from demem_lab.sampling import Poisson

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def page():
    return pairs.page()


def test_the_page_is_what_the_code_says(page):
    assert page in (ROOT / "METHODS.md").read_text(encoding="utf-8"), "run: python benchmarks/methods.py"


def test_the_contest_on_the_page_is_what_the_results_say(page):
    written = runpy.run_path(str(ROOT / "benchmarks/methods.py"))["whole_page"](page)
    assert written == (ROOT / "METHODS.md").read_text(encoding="utf-8"), "run: python benchmarks/methods.py"


def test_the_readme_counts_the_contests_as_they_came_out():
    code = runpy.run_path(str(ROOT / "benchmarks/methods.py"))
    better: dict[str, list[bool]] = {}
    for file in sorted((ROOT / "benchmarks/results").glob("contest_*.json")):
        raw, report = code["loaded"](file)
        for arm in report.arms:
            gap = code["at_matched"](report, arm, raw["controls"], metric="leak, schedule known")
            better.setdefault(arm, []).append(gap is not None and gap.high < 0)
    counts = {arm: (sum(won), len(won)) for arm, won in better.items()}
    # "in two of five with k=4, in none with k=8, in one by one cheap run; clipped, in three of four (k=4) and in two (k=8)"
    assert counts["release k=8"] == (0, 5) and counts["release k=4"] == (2, 5)
    assert counts["release k=4 + clip everybody"] == (3, 4) and counts["release k=8 + clip everybody"] == (2, 4)
    assert counts["release k=4, cheap score"] == (1, 5)


def test_nothing_fails_without_a_reason(page):
    assert "FAILS" not in page and page.count("| trains") > 99 and page.count("refused: ") == 3


def test_a_refusal_is_the_packages_own_sentence():
    def refused():
        raise ValueError("because")

    assert pairs.attempt(refused, Plain, MLP((4,)), Poisson(4)) == ("refused: because", "")


def test_a_pair_whose_weights_stay_is_no_pair():
    class Frozen(Plain):
        def update(self, net, per_sample, batch):
            return [0 * p.detach() for p in net.parameters()]

    assert pairs.attempt(Natural, Frozen, MLP((4,)), Poisson(4))[0].startswith("FAILS")


def test_only_one_promise_a_row(monkeypatch):
    monkeypatch.setattr(pairs, "attempt", lambda objective, *_: ("trains", type(objective()).__name__))
    with pytest.raises(RuntimeError, match="depends on the objective"):
        pairs.table()


def test_bars_do_not_break_a_table():
    frame = pd.DataFrame({"a": ["x|y"]}, index=["r"])
    assert pairs.markdown(frame, "c") == "| c | a |\n| - | - |\n| r | x/y |"
