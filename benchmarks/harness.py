"""Two or more ways to do one job, timed in turn, and what came out of it as a ratio with its spread.

A job times its ways in interleaved rounds, so that what the machine does beside us hits all of them alike. README.md says
which jobs first show that the ways agree. CPU time, one thread, so that a busy machine changes little; `wall=True`
where several processes are the point.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One comparison: how many times as long the peer takes as ours (or what `unit` says), and whether that is the target."""

    job: str
    shape: str  # data, model, batch, threads
    peer: str
    ratio: float
    low: float  # quartiles over rounds, pair by pair
    high: float
    rounds: int
    target: str = ""
    met: bool | None = None
    note: str = ""
    unit: str = "peer / ours"


def times(
    ways: Mapping[str, Callable[[], object]], *, rounds: int = 5, wall: bool = False, warm: bool = True
) -> dict[str, list[float]]:
    """Seconds of each way in each of the interleaved rounds; with `warm`, after one round that does not count."""
    clock = time.perf_counter if wall else time.process_time
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + warm):
        for name, way in ways.items():
            begun = clock()
            way()
            if number >= warm:
                found[name].append(clock() - begun)
    return found


def versus(
    job: str, shape: str, ways: Mapping[str, Callable[[], object]], *, ours: str = "ours", rounds: int = 5, wall: bool = False,
    targets: Mapping[str, float] | None = None, notes: Mapping[str, str] | None = None, scale: Mapping[str, float] | None = None,
    at_most: bool = False,
) -> list[Row]:
    """A row for each way but ours. targets: the least ratio asked for (with `at_most`: the largest of ours / peer).

    scale: where a way did only part of the job, how many times as long the whole takes.
    """
    found = times(ways, rounds=rounds, wall=wall)
    rows = []
    for name in ways:
        if name == ours:
            continue
        factor = (scale or {}).get(name, 1.0) / (scale or {}).get(ours, 1.0)
        pairs = [factor * p / o for p, o in zip(found[name], found[ours], strict=True)]
        pairs = [1 / r for r in pairs] if at_most else pairs
        rows.append(judged(
            job, shape, name, pairs, target=(targets or {}).get(name), at_most=at_most, note=(notes or {}).get(name, ""),
            unit="ours / peer" if at_most else "peer / ours",
        ))
    return rows


def judged(
    job: str, shape: str, peer: str, values: list[float], *, target: float | None = None, at_most: bool = False, note: str = "",
    unit: str = "peer / ours",
) -> Row:
    """A row of the rounds' values: their median, their quartiles, and the verdict on the median."""
    middle = statistics.median(values)
    low, high = np.percentile(values, [25, 75])
    met = None if target is None else middle <= target if at_most else middle >= target
    asked = "" if target is None else f"{'<=' if at_most else '>='} {target:g}"
    return Row(job, shape, peer, middle, float(low), float(high), len(values), asked, met, note, unit)


def provenance(seconds: float) -> dict:
    """Machine, versions, commit and date of a run."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":")[1].strip() if names else processor
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": processor, "capability": torch.backends.cpu.get_cpu_capability(), "GPU": card, "torch": torch.__version__,
        "numpy": np.__version__, "python": platform.python_version(), "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"), "minutes": round(seconds / 60, 1),
    }


def write(name: str, rows: list[Row], seconds: float) -> Path:
    """The rows as NAME.json and as a table NAME.md under results/."""
    RESULTS.mkdir(exist_ok=True)
    where = provenance(seconds)
    (RESULTS / f"{name}.json").write_text(json.dumps({"provenance": where, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
    page = RESULTS / f"{name}.md"
    page.write_text(f"{', '.join(f'{k} {v}' for k, v in where.items())}\n\n{table(rows)}\n")
    return page


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| job | shape | peer | ratio (quartiles) | of what | target | met |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        met = {None: "", True: "yes", False: "no"}[r.met]
        note = f" ({r.note})" if r.note else ""
        lines.append(
            f"| {r.job} | {r.shape} | {r.peer}{note} | {r.ratio:.3g} ({r.low:.3g} to {r.high:.3g}, {r.rounds} rounds) "
            f"| {r.unit} | {r.target} | {met} |"
        )
    return "\n".join(lines)
