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

FORMAT = 1


@dataclass(frozen=True)
class AuditReport:
    """All that was measured, as plain data; `attacks[name][query]` holds what one attack achieved."""

    name: str
    attacks: dict[str, dict[str, dict]]
    utility: dict[str, float]
    robustness: dict[str, float]
    groups: list[dict]
    canaries: dict
    guarantee: str
    empirical: dict
    skipped: dict[str, str]  # what was not done, and why
    curves: dict[str, dict[str, list[float]]]
    obtained: dict
    warnings: list[str] = field(default_factory=list)

    @property
    def headline(self) -> tuple[str, str, float]:
        """(attack, query, FPR) that found most members at the finest false positive rate that the data resolve."""
        found = [
            (float(rate), -entry["tpr_at_fpr"][rate]["estimate"], name, query)
            for name, queries in self.attacks.items() for query, entry in queries.items() for rate in entry["tpr_at_fpr"]
        ]
        fpr, _, name, query = min(found)
        return name, query, fpr

    def summary(self) -> str:
        """The strongest attack in one sentence."""
        name, query, fpr = self.headline
        rate = self.attacks[name][query]["tpr_at_fpr"][f"{fpr:g}"]
        return (
            f"the strongest attack here ({name}, {query} queries) finds {rate['estimate']:.1%} of the members "
            f"({rate['low']:.1%} to {rate['high']:.1%}) while it accuses {fpr:.1%} of the non-members; guessing would find "
            f"{fpr:.1%}. It is the best of {sum(map(len, self.attacks.values()))} tried, and stronger ones may exist."
        )

    def to_frame(self) -> pd.DataFrame:
        """One row an attack and query."""
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
                    row[f"TPR at {float(fpr):.1%} FPR"] = rate["estimate"]
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
        made["attacks"] = plots.forest(
            rows, axis=f"members found at {fpr:.1%} false positives, %", reference=fpr, title="All attacks; dotted: guessing"
        )
        for kind in dict.fromkeys(row["kind"] for row in self.groups):
            rows = {row["group"]: Interval(row["found"], row["low"], row["high"], row["members"]) for row in self.groups
                    if row["kind"] == kind and row["found"] is not None}
            if rows:
                made[f"by {kind}"] = plots.forest(
                    rows, axis=f"members found at {fpr:.1%} false positives (one global threshold), %", reference=fpr,
                    title=f"Who is found, by {kind}",
                )
        return made

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, allow_nan=False)

    def save(self, path: str | Path) -> Path:
        """Write the JSON; returns the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> AuditReport:
        """Read what `save` wrote. ValueError for another file."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            found = content.pop("format")
            if found != FORMAT:
                raise ValueError(f"format {found!r}")
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


def _interval(rate: Mapping[str, float]) -> Interval:
    return Interval(rate["estimate"], rate["low"], rate["high"], 0)


def _section(report: AuditReport, anchor: str) -> str:
    """The report in HTML, without the page around it."""
    parts, obtained = [f"<h2>{pages.escaped(report.name)}</h2>"], report.obtained
    parts.append(pages.paragraph(
        f"{obtained['models']} model(s), {obtained['samples']:,} samples, {obtained['classes']} classes; {obtained['created']}."
    ))
    parts.append(pages.paragraph(report.summary()[0].upper() + report.summary()[1:]))
    parts.append(pages.paragraph(f"Guarantee: {report.guarantee}. {report.empirical.get('text', '')}"))
    parts += [f"<p><strong>Note.</strong> {pages.escaped(text)}</p>" for text in report.warnings]
    use = {**report.utility, **{f"robust: {k}": v for k, v in report.robustness.items()}}
    parts.append("<h3>Utility and robustness</h3>" + pages.table(pd.DataFrame({"share": use})))
    parts.append("<h3>Attacks</h3>" + pages.table(report.to_frame().reset_index()) + pages.paragraph(
        "The optimistic balanced accuracy chooses its threshold on the scores that it judges (Song & Mittal 2021); the next two "
        "columns choose it on the other half of the samples, once for all and once for each class."
    ))
    if report.canaries:
        parts.append("<h3>Canaries</h3>" + pages.table(pd.DataFrame({"value": report.canaries})))
    parts.append("<h3>Pictures</h3>")
    parts += [pages.figure(figure, f"{anchor}-{number}") for number, figure in enumerate(report.figures().values())]
    if report.groups:
        parts.append("<h3>By group</h3>" + pages.table(pd.DataFrame(report.groups)))
    if report.skipped:
        parts.append("<h3>Not done</h3>" + pages.table(pd.DataFrame({"why": report.skipped})))
    parts.append("<h3>How it was obtained</h3>" + pages.table(pd.DataFrame({"value": {k: str(v) for k, v in obtained.items()}})))
    return f'<section id="{anchor}">{"".join(parts)}</section>'
