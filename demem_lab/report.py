"""What an audit found: plain data that can be saved, drawn, printed and read without Python.

>>> report = AuditReport.load("audit.json")                                                     # doctest: +SKIP
>>> Path("audit.html").write_text(report.to_html())                                             # doctest: +SKIP
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from demem_lab import pages, plots
from demem_lab.leakage import Interval
from demem_lab.outputs import listed
from demem_lab.store import write_whole

FORMAT = 3
GUESSING = {"size": 13, "color": plots.GREY, "symbol": "diamond-open", "line": {"width": 2}}
LUCKIEST = "written by an older version, which judged them by the attack that found most, so by luck; audit the outputs again"
OLDER = (  # why the groups of a report in format 2 are not read
    "written by an older version, whose groups showed a leak where there was none: no share accused, and risk scored on the "
    "attack's own references; audit the outputs again"
)


@dataclass(frozen=True)
class AuditReport:
    """All that was measured, as plain data; `attacks[name][query]` holds what one attack achieved."""

    name: str
    attacks: dict[str, dict[str, dict]]
    utility: dict[str, float]
    robustness: dict[str, float]
    groups: list[dict]
    canaries: dict
    reliable: dict  # who is found whichever model is the target
    guarantee: str
    empirical: dict
    skipped: dict[str, str]  # what was not done, and why
    curves: dict[str, dict[str, list[float]]]
    obtained: dict
    warnings: list[str] = field(default_factory=list)

    @property
    def headline(self) -> tuple[str, str, float]:
        """(attack, query, FPR) that found most members at the finest false positive rate that the data resolve.

        A rate that no attack comes near, because too many scores are equal, is passed over for a coarser one; where none comes
        near any, it is the attack whose one threshold is right most often.
        """
        every = [(name, query, entry) for name, queries in self.attacks.items() for query, entry in queries.items()]
        found = [
            (float(rate), -entry["tpr_at_fpr"][rate]["estimate"], name, query)
            for name, query, entry in every for rate in entry["tpr_at_fpr"] if not _out_of_reach(entry, rate)
        ]
        if found:
            fpr, _, name, query = min(found)
            return name, query, fpr
        name, query, entry = max(every, key=lambda one: one[2]["balanced_accuracy_held_out"])
        return name, query, max(map(float, entry["tpr_at_fpr"]))

    def summary(self) -> str:
        """The strongest attack in three sentences."""
        name, query, fpr = self.headline
        entry = self.attacks[name][query]
        rate, accused = entry["tpr_at_fpr"][f"{fpr:g}"], entry.get("accused_at_fpr", {}).get(f"{fpr:g}", fpr)
        held = entry["balanced_accuracy_held_out"]
        return (
            f"the strongest attack here ({name}, {query} queries) finds {rate['estimate']:.1%} of the members "
            f"({rate['low']:.1%} to {rate['high']:.1%}) while it accuses {_percent(accused)} of the non-members; guessing would "
            f"find {_percent(accused)} of the members, too. One threshold for all, chosen on other samples, is right for "
            f"{_percent(held)} of them (members and non-members weighing the same; guessing: 50 %). "
            f"It is the best of {sum(map(len, self.attacks.values()))} tried, and stronger ones may exist."
        )

    def to_frame(self) -> pd.DataFrame:
        """One row an attack and query; precision is at the prior that the report was asked for."""
        rows = {}
        for name, queries in self.attacks.items():
            for query, entry in queries.items():
                row = {
                    "AUC": entry["auc"],
                    "balanced accuracy, optimistic": entry["balanced_accuracy"],
                    "held-out threshold": entry["balanced_accuracy_held_out"],
                    "held out, by class": entry["balanced_accuracy_by_class_held_out"],
                }
                for fpr, rate in entry["tpr_at_fpr"].items():
                    place = f"{_percent(float(fpr))} FPR"
                    row |= {f"TPR at {place}": rate["estimate"], f"low at {place}": rate["low"], f"high at {place}": rate["high"]}
                    row[f"precision at {place}"] = entry["precision_at_prior"][fpr]
                rows[name, query] = row
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["attack", "query"])

    def figures(self) -> dict:
        """{title: plotly figure}: the ROCs, the attacks side by side, and who is found by group."""
        made = {}
        for query in dict.fromkeys(key.split(" / ")[1] for key in self.curves):
            chosen = {
                key.split(" / ")[0]: (np.array(c["fpr"]), np.array(c["tpr"]))
                for key, c in self.curves.items() if key.split(" / ")[1] == query
            }
            title = f"Members found against non-members accused: {query} queries"
            made[f"ROC, {query} queries"] = plots.roc_curves(chosen, title=title)
        fpr = self.headline[2]
        rows = {f"{n}, {q}": _interval(e["tpr_at_fpr"][f"{fpr:g}"]) for n, qs in self.attacks.items() for q, e in qs.items()}
        figure = plots.forest(
            rows, axis=f"members found at {_percent(fpr)} false positives, %", rates=True,
            title="All attacks<br>grey: guessing, the non-members accused",
        )
        # not a line at the rate: each non-member is judged by the others' threshold, and ties may keep that far away
        told = {f"{n}, {q}": e.get("accused_at_fpr", {}).get(f"{fpr:g}") for n, qs in self.attacks.items() for q, e in qs.items()}
        made["attacks"] = figure.add_scatter(
            x=[100 * share for share in told.values() if share is not None],
            y=[attack for attack, share in told.items() if share is not None],
            mode="markers", showlegend=False, marker=GUESSING, hovertemplate="%{y}: %{x:.2f} accused<extra></extra>",
        )
        for kind in dict.fromkeys(row["kind"] for row in self.groups):
            rows = [row for row in self.groups if row["kind"] == kind and row["found"] is not None]
            if rows:
                made[f"by {kind}"] = _found_by_group(rows, kind, fpr)
        return made

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, allow_nan=False)

    def save(self, path: str | Path) -> Path:
        """Write the JSON; returns the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, self.to_json().encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> AuditReport:
        """Read what `save` wrote, in format 2 without its groups (`skipped` says so). ValueError for another file."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if "reports" in content:
                names = listed(content["reports"])
                raise ValueError(f'it holds several, under the key "reports": {names}; write each with a --json of its own')
            found = content.pop("format")
            if found == 2:
                content["groups"], content["skipped"]["who is found, by group"] = [], OLDER
            elif found != FORMAT:
                raise ValueError(f"format {found!r}")
            if content.get("canaries") and "attack" not in content["canaries"]:
                content["canaries"], content["skipped"]["canaries"] = {}, LUCKIEST
            return cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not an audit report of this version of demem_lab ({error})") from None

    def to_html(self) -> str:
        """One page that needs no network: figures to hover over, tables, and every condition in words; prints well."""
        return page([self])


def page(reports: Sequence[AuditReport]) -> str:
    """Several reports as one HTML page."""
    title = reports[0].name if len(reports) == 1 else f"{len(reports)} audits"
    body = "".join(_section(report, f"r{number}") for number, report in enumerate(reports))
    return pages.page(f"Audit: {title}", body)


def to_json(reports: Sequence[AuditReport]) -> str:
    """One report as it is, several under "reports" by name; equal names are numbered."""
    if len(reports) == 1:
        return reports[0].to_json()
    named: dict[str, dict] = {}
    for report in reports:
        name, number = report.name, 1
        while name in named:
            number += 1
            name = f"{report.name} ({number})"
        named[name] = json.loads(report.to_json())
    return json.dumps({"reports": named}, indent=1)


def _out_of_reach(entry: Mapping, rate: str) -> bool:
    """Whether ties keep the threshold for this rate far from it."""
    return entry.get("accused_at_fpr", {}).get(rate, float(rate)) < float(rate) / 2


def _percent(share: float) -> str:
    """Small rates in full: 0.0001 is 0.01 %, not 0.0 %."""
    return f"{100 * share:.3g} %"


def _interval(rate: Mapping[str, float]) -> Interval:
    return Interval(rate["estimate"], rate["low"], rate["high"], 0)


def _found_by_group(rows: Sequence[Mapping], kind: str, fpr: float):
    """Members found in each group of a kind, and what guessing finds there: its own non-members accused, which differs."""
    order = "tenth 10 is most at risk; " if rows[-1]["group"] == "tenth 10" else ""
    figure = plots.forest(
        {row["group"]: Interval(row["found"], row["low"], row["high"], row["members"]) for row in rows},
        axis=f"members found by {rows[0]['attack']}, {rows[0]['query']} queries, at {_percent(fpr)} false positives, %",
        title=f"Who is found, by {kind}<br>{order}grey: guessing, the group's own non-members accused",
    )
    rows = [row for row in rows if row["accused"] is not None]
    guessed = [Interval(row["accused"], row["accused_low"], row["accused_high"], 0) for row in rows]
    return figure.add_scatter(
        x=[100 * one.mean for one in guessed], y=[row["group"] for row in rows], mode="markers", showlegend=False,
        marker=GUESSING,
        error_x=plots.bars(guessed) | {"color": plots.GREY},
        hovertemplate="%{y}: %{x:.1f} (+%{error_x.array:.1f} / -%{error_x.arrayminus:.1f}) accused<extra></extra>",
    )


def _section(report: AuditReport, anchor: str) -> str:
    """The report in HTML, without the page around it."""
    parts, obtained = [f"<h2>{pages.escaped(report.name)}</h2>"], report.obtained
    parts.append(pages.paragraph(
        f"{obtained['models']} model(s), {obtained['samples']:,} samples, {obtained['classes']} classes; {obtained['created']}."
    ))
    parts.append(pages.paragraph(report.summary()[0].upper() + report.summary()[1:]))
    if report.reliable:
        parts.append(pages.paragraph(_reliably(report.reliable)))
    parts.append(pages.paragraph(f"Guarantee: {report.guarantee}. {report.empirical.get('text', '')}"))
    parts += [f"<p><strong>Note.</strong> {pages.escaped(text)}</p>" for text in report.warnings]
    use = {**report.utility, **{f"robust: {k}": v for k, v in report.robustness.items()}}
    parts.append("<h3>Utility and robustness</h3>" + pages.table(pd.DataFrame({"share": use})))
    parts.append("<h3>Attacks</h3>" + pages.table(_attacks(report)) + pages.paragraph(
        f"Members found (TPR), with 95 % intervals ({obtained['intervals']}). "
        "The optimistic balanced accuracy chooses its threshold on the scores that it judges (Song & Mittal 2021); the next two "
        "columns choose it on the other half of the samples, once for all and once "
        f"for each class. Precision: the share of members among those accused, if {_percent(obtained['prior'])} of all are."
    ))
    if report.canaries:
        found = report.canaries.items()
        shown = {what: "-" if v is None else f"{v:.3f}" if isinstance(v, float) else f"{v}" for what, v in found}
        parts.append("<h3>Canaries</h3>" + pages.table(pd.DataFrame({"value": shown})))
    parts.append("<h3>Pictures</h3>")
    parts += [pages.figure(figure, f"{anchor}-{number}") for number, figure in enumerate(report.figures().values())]
    if report.groups:
        first = report.groups[0]
        parts.append("<h3>By group</h3>" + pages.table(_groups(report)) + pages.paragraph(
            f"By {first['attack']}, {first['query']} queries: an attack fixed beforehand, since the best of many found some by "
            f"luck. One global threshold ({_percent(first['fpr'])} false positives) accuses some groups more than others, "
            "members or not. Accused: the share of the group's own non-members, each judged by the others' threshold. Guessing "
            "finds as many; only what is found beyond that is given away by membership. The AUC sets members against the group's "
            "own non-members. Limits pool the samples of all targets, take the threshold as given and are too narrow where "
            "targets share samples."
        ))
    if report.skipped:
        parts.append("<h3>Not done</h3>" + pages.table(pd.DataFrame({"why": report.skipped})))
    parts.append("<h3>How it was obtained</h3>" + pages.table(pd.DataFrame({"value": {k: str(v) for k, v in obtained.items()}})))
    return f'<section id="{anchor}">{"".join(parts)}</section>'


def _reliably(found: Mapping) -> str:
    if "by_chance" not in found:
        return "Who is attacked reliably was counted by an attack chosen by its luck: write the report anew."
    few, many = found["targets_with_the_sample"]
    return (
        f"{_percent(found['fraction'])} of the samples are attacked reliably, at {_percent(found['fpr'])} false positives "
        f"({found['attack']}, {found['query']} queries): at least {found['share_of_targets']:.0%} of the "
        f"{few if few == many else f'{few} to {many}'} targets that trained on them give them away, and hardly any other "
        f"accuses them. By chance it would be {_percent(found['by_chance'])}, were all samples equally likely to be accused; "
        f"{_percent(found['never_found'])} are given away by no target."
    )


def _attacks(report: AuditReport) -> pd.DataFrame:
    """The table for reading: rates with their limits in one cell, which does not break."""
    frame, finest = report.to_frame(), f"{_percent(report.headline[2])} FPR"
    shown = frame.iloc[:, :4].copy()
    for column in [c for c in frame.columns if c.startswith("TPR at ")]:
        sides = (frame[column.replace("TPR", side, 1)] for side in ("TPR", "low", "high"))
        shown[f"{column}, %"] = [_cell(*rate) for rate in zip(*sides, strict=True)]
    shown[f"precision at {finest}"] = frame[f"precision at {finest}"]
    return shown.reset_index()


def _groups(report: AuditReport) -> pd.DataFrame:
    """The groups for reading: found and accused side by side."""
    return pd.DataFrame([
        {
            "kind": row["kind"], "group": row["group"], "members": row["members"],
            "found, %": _cell(row["found"], row["low"], row["high"]),
            "accused, %": _cell(row["accused"], row["accused_low"], row["accused_high"]), "AUC": row["auc"],
        }
        for row in report.groups
    ])


def _cell(rate: float | None, low: float | None, high: float | None) -> str:
    """A share and its limits in per cent, in one cell that does not break; a dash for what could not be measured."""
    return "-" if rate is None else f"{100 * rate:.1f}\xa0({100 * low:.1f}\u2013\u2060{100 * high:.1f})"
