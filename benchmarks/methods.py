"""Writes METHODS.md: which pairs train, what each method's definition is, and what the contest found.

    python benchmarks/methods.py

The pairs are tried, the contest's numbers are read from benchmarks/results; nothing is typed in.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd

from demem_lab import pairs
from demem_lab.comparison import Comparison, spell
from demem_lab.leakage import Interval
from demem_lab.matched import at_matched
from demem_lab.results import Results, kept

HERE = Path(__file__).parent
GROUPS = ("at risk", "rest", "surfaced")
INTRO = """# Methods

Written by `python benchmarks/methods.py`; a test fails when it no longer says what the code does.

## Which pairs train

"""
DEFINITIONS = """
## Definitions, and where we depart from them

Each is compared in `tests/test_objectives.py` and `tests/test_remedies.py` with a separate computation from its definition,
to 1e-5 or better (attacks included).

"""
DEPARTURES = {  # method -> its source, and where this package departs from it, with the reason
    "PGD-AT": ("Madry et al. 2018, equation 2.1", "the attack sees the model in evaluation mode, as in MART's public code"),
    "RS-FGSM": ("Wong, Rice & Kolter 2020", "the slope is taken in evaluation mode, there in training mode"),
    "N-FGSM": ("de Jorge et al. 2022, and their public code", "the slope is taken in evaluation mode, there in training mode"),
    "TRADES": (
        "Zhang et al. 2019, equation 5",
        "the attack's start is clamped to [0, 1], because networks are promised pixels; KL from logits, so that a probability "
        "that rounds to 0 has a slope (else NaN)",
    ),
    "MART": (
        "Wang et al. 2020, equation 11",
        "1.0001 in the second logarithm, as in the public code; the attack starts at random in the ball, as in the paper",
    ),
    "AWP": (
        "Wu, Xia & Wang 2020, equations 8 to 10",
        "the move reads unprotected samples only, for the guarantee; weight decay acts on the weights put back; no warm-up",
    ),
    "RelaxLoss": (
        "Chen, Yu & Fritz 2022, algorithm 1, and their public code",
        "the mean adversarial cross-entropy is compared with alpha, whatever the objective's own loss is",
    ),
    "ClassVariance": (
        "FAT: Ma, Wang & Liu 2022",
        "variance over the classes in the batch; the public code fills up to 100 classes with zeros, which punishes the level",
    ),
    "BudgetedDP": ("Feldman & Zrnic 2021", "charged at the clipping bound, see below"),
}
CHARGING = """

**Charging.** `BudgetedDP` charges every protected sample at every step, drawn or not, with the Renyi divergence of one step
of the Poisson-subsampled Gaussian mechanism at the clipping bound. The filter is then a limit on steps known in advance: it
reads nothing but the budget, so leaving says nothing about the batches. Charging min(C, the sample's own gradient norm)
instead would let samples with small gradients stay longer, but takes the norm of everybody still in at every step, drawn or
not: at a sampling rate of 5 % that is twenty times the work. Summing the norms of the drawn alone gives an estimate and no
guarantee, because the charge would depend on the coin that the amplification rests on. Neither is built. Budgets chosen from
risk scores are information about the data: `spent` is for the owner of the data and not for display.

"""
CONTEST = """## The contest: graded release against its rivals

What leaks at the same robust accuracy? "found" is the true positive rate at {fpr:g} % false positives of LiRA (each image's
variance mixed with everybody's) with shadow models trained with the same treatment, by the one of clean and adversarial
queries that finds more beyond the accused; "informed" the largest of that and of attackers who also know everybody's risk
and, where another score decides who leaves when, that score too (both queries together; thresholds by tenth of the score; a
logistic regression on all of it, fitted on the shadow models). "at risk" is the tenth that was riskiest before, "surfaced"
the tenth that is riskiest under the treatment. "matched" is found (or informed) minus that of the untreated method, weakened
by fewer epochs or weight decay to the same robust accuracy: negative is better than the weakenings tried. The controls, in
brackets, are judged by the other controls: what is called better there is how much a finer grid of them would still find. The
frontier's points are chosen on means over the same seeds. All in per cent with 95 % t-intervals over seeds; with so many rows
some interval misses the truth, so read patterns. Seeds share the images, and each takes its risk scores from the others.
"robust" is the worst case of PGD-10 on the cross-entropy and on the margin. `benchmarks/contest.py` makes the files.

The names of the arms: "release k=4" lets a sample take part in the fraction 1 - r^4 of training, r its rank by risk from 0 to
1 (k is notebook 05's `r**k`, and 06 calls it `power`). "cheap score": ranked by the early losses of ONE model, not by the
ensemble's score. "own trace": each model ranks by its own losses in the first fifth of training, in which nobody leaves.
"umin .2": the riskiest, too, stay for a fifth of training. "random order": the same fractions, dealt out at random. "clip":
each gradient is cut to length 1. "clean for 10%": the riskiest tenth is trained on its clean images, without an attack.
"down-weight 20% x .3": the losses of the riskiest fifth count .3. "budgets": noise for everybody, and a privacy budget for
each, the smallest for the riskiest.

"""
KEPT = """## The authors' protocol, kept runs

Notebook 08 shows the same files. LiRA takes one variance for all images here. "found" at 1 % false positives, the stronger of
clean and adversarial queries; "at risk" the tenth with the highest mean loss over ONE short run on everybody. The
threshold is one for all, so "accused" says how many NON-members at risk lie beyond it: only what is found beyond that gives
membership away. In per cent, 95 % t-intervals over the models as targets, which share their data. "robust": withstands PGD on
the cross-entropy and on the margin, without a random start, with the steps that each run names; adversarial queries are made
with the same steps.

"""


def whole_page(tables: str) -> str:
    """METHODS.md, with the tables of `pairs.page`."""
    files = sorted((HERE / "results").glob("contest_*.json"))
    sources = pd.DataFrame.from_dict(DEPARTURES, orient="index", columns=["source", "where we depart, and why"])
    parts = [INTRO, tables, DEFINITIONS, pairs.markdown(sources, "method"), CHARGING]
    found = [loaded(file) for file in files]
    if found:
        parts.append(CONTEST.format(fpr=100 * found[0][1].fpr))
        parts += [section(raw, report) for raw, report in found]
    runs = kept()
    if runs:
        parts.append(KEPT)
        parts += [kept_section(name, results) for name, results in runs.items()]
    return "".join(parts).rstrip() + "\n"


def kept_section(name: str, results: Results) -> str:
    """One kept run of the authors' protocol: its settings and a row a treatment."""
    s, p, rows = results.protocol, results.provenance, {}
    note = f" Note: {p['note']}." if "note" in p else ""
    for arm in results.arms:
        cells = {"accuracy": "clean accuracy", "robust": "robust accuracy"}
        for attack in ("LiRA", "RMIA"):
            cells[f"{attack}: found"] = f"{attack}: found at 1 %"
            cells[f"{attack}: at risk"] = f"{attack}: found at 1 %, at risk"
            cells[f"{attack}: accused, at risk"] = f"{attack}: accused at 1 %, at risk"
            cells[f"{attack}: rest"] = f"{attack}: found at 1 %, rest"
        rows[arm] = {column: spell(results.interval(arm, metric)) for column, metric in cells.items()}
        rows[arm]["guarantee"] = results.guarantees[arm]
    return (
        f"### {name}\n\n{s['images']:,} images of {s['dataset']}, {s['model']}, {s['objective']} with eps {255 * s['eps']:g}/255 "
        f"in {s['attack_steps']} step(s), judged by PGD-{s['query_steps']}, {s['epochs']:g} epochs, batches of "
        f"{s['batch_size']}, learning rate {s['lr']:g} (DP "
        f"for everybody {s['dp_lr']:g}), noise multiplier {s['noise_multiplier']:g}, {s['fraction']:.0%} treated, {s['models']} "
        f"models a treatment; {p['device']}, commit {p['commit']}, {p['date']}, torch {p['torch']}.{note}\n\n"
        f"{pairs.markdown(pd.DataFrame.from_dict(rows, orient='index'), 'treatment')}\n\n"
    )


def loaded(file: Path) -> tuple[dict, Comparison]:
    """A results file of the contest, and its numbers as a comparison."""
    raw, rows = json.loads(file.read_text()), []
    for arm, metrics in raw["arms"].items():
        for label, values in metrics.items():
            metric, _, group = label.rpartition(", ")
            metric, group = (metric, group) if group in GROUPS else (label, "all")
            rows += [(arm, seed, group, metric, v) for seed, v in zip(raw["setting"]["seeds"], values, strict=True)]
    frame = pd.DataFrame(rows, columns=["arm", "seed", "group", "metric", "value"])
    return raw, Comparison(frame, raw["setting"]["fpr"], raw["guarantees"])


def section(raw: dict, report: Comparison) -> str:
    """One setting: a table with a row an arm, and who is better than mere weakening."""
    s, p, rows, kinds = raw["setting"], raw["provenance"], {}, {"better": [], "worse": [], "undecided": [], "null": []}
    for arm in report.arms:
        cells = {
            "accuracy": spell(report.interval(arm, "accuracy")), "robust": spell(report.interval(arm, "robust")),
            "found": spell(report.interval(arm, "leak")), "informed": spell(report.interval(arm, "leak, schedule known")),
        }
        for group in ("at risk", "surfaced"):
            cells[f"found, {group}"] = spell(report.interval(arm, "leak", group))
        for column, metric in (("matched", "leak"), ("matched, informed", "leak, schedule known")):
            gap = at_matched(report, arm, [control for control in raw["controls"] if control != arm], metric=metric)
            cells[column] = "less robust than the frontier" if gap is None else signed(gap)
            if metric == "leak" or gap is None or gap.low is None:
                continue
            if arm not in raw["controls"]:
                kinds["better" if gap.high < 0 else "worse" if gap.low > 0 else "undecided"].append(arm)
            elif gap.high < 0:
                kinds["null"].append(arm)
        rows[f"({arm})" if arm in raw["controls"] else arm] = cells
    scored = raw["rank correlation of the cheap score"]
    title = f"{s['data set']}, {s['model'].split('(')[0]}, {s['objective'].split('(')[0]}"
    inner = ", TRADES" if s["objective"].startswith("AWP") and "TRADES" in s["objective"] else ""
    return (
        f"### {title}{inner}\n\n{s['images']} images, `{s['model']}`, `{s['objective']}`, {s['epochs']:g} epochs, batches of "
        f"{s['batch_size']}, learning rate {s['lr']:g}, {len(s['seeds'])} seeds x {s['models a seed']} models; commit "
        f"{p['commit']}, {p['date']}, torch {p['torch']}, {p['cpu_seconds']} CPU seconds. The cheap score (early loss of ONE "
        f"model) has a rank correlation of {min(scored):.2f} to {max(scored):.2f} with the ensemble's. Controls in brackets.\n\n"
        f"{pairs.markdown(pd.DataFrame.from_dict(rows, orient='index'), 'arm')}\n\n"
        f"Against the informed attacker, better than mere weakening: {'; '.join(kinds['better']) or 'none'}. "
        f"Worse: {'; '.join(kinds['worse']) or 'none'}. Not decided: {'; '.join(kinds['undecided']) or 'none'}. "
        f"Of the controls, judged by the others, better: {'; '.join(kinds['null']) or 'none'}."
        f"{' Not run: ' + '; '.join(raw['not run']) + '.' if raw['not run'] else ''}{promises(raw['guarantees'])}\n\n"
    )


def promises(guarantees: dict[str, str]) -> str:
    """What the noisy arms of a contest promise, all others nothing; files name no budgets that were chosen from the data."""
    epsilons = {arm: re.match(r"\((\S+), \S+\)-DP", text) for arm, text in guarantees.items()}
    noisy = [f"{arm}: {found[1]}" for arm, found in epsilons.items() if found]
    if not noisy:
        return " No arm here promises anything."
    return (
        f" Epsilon of the noisy arms (where risk scores chose whom to treat, given that choice): {'; '.join(noisy)}. "
        "Such numbers protect nobody by themselves; the other arms promise nothing."
    )


def signed(gap: Interval) -> str:
    """'-1.2 ± 0.5' in per cent."""
    return f"{'+' if gap.mean > 0 else ''}{spell(gap)}"


if __name__ == "__main__":
    (HERE.parent / "METHODS.md").write_text(whole_page(pairs.page()))
