"""What this process may use: memory and cores of the machine, or of the container that it runs in.

>>> memory()                                                # (total, free) in bytes; None where nobody says     # doctest: +SKIP
(2147483648, 1900000000)

Containers are limited by control groups, which lie in each other: the narrowest counts. Needs nothing but Python, since
`doctor` asks before anything is known to be installed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

NO_LIMIT = 1 << 60  # control groups of version 1 say "none" as a number larger than any memory
MEMORY = (("memory.max", "memory.current", "inactive_file"),
          ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))  # version 2 and version 1


def groups(root: Path = Path("/")) -> list[Path]:
    """The control groups that this process is in, the innermost first; version 2 and version 1."""
    top, found = root / "sys/fs/cgroup", []
    listing = root / "proc/self/cgroup"
    for line in listing.read_text().splitlines() if listing.exists() else []:
        _, kinds, path = line.split(":", 2)
        base = top / kinds if kinds else top
        inner = base / path.lstrip("/")
        found += [inner, *(parent for parent in inner.parents if parent.is_relative_to(base))]
    return [folder for folder in dict.fromkeys([*found, top, top / "memory", top / "cpu"]) if folder.is_dir()]


def memory(
    root: Path = Path("/"), environ: Mapping[str, str] = os.environ, machine: tuple[int, int] | None = None
) -> tuple[int, int] | None:
    """(total, free) bytes: the least of the machine, its control groups and JupyterHub's MEM_LIMIT; None if none is known.

    machine: (total, available) bytes; by default as the system says.
    """
    limits = [found for found in [machine or _machine()] if found]
    for folder in groups(root):
        for limit, used, cache in MEMORY:
            most = _number(folder / limit)
            if most and most < NO_LIMIT:
                # files in the page cache count as used, and are given up when memory is asked for
                taken = (_number(folder / used) or 0) - _cached(folder / "memory.stat", cache)
                limits.append((most, min(most, max(0, most - taken))))
    if environ.get("MEM_LIMIT", "").isdigit() and int(environ["MEM_LIMIT"]):
        limits.append((int(environ["MEM_LIMIT"]), int(environ["MEM_LIMIT"])))
    return tuple(min(numbers) for numbers in zip(*limits, strict=True)) if limits else None


def quota(root: Path = Path("/")) -> float | None:
    """Cores that the control groups allow; None for all."""
    return min(filter(None, map(_cores, groups(root))), default=None)


def _cores(folder: Path) -> float | None:
    if (folder / "cpu.max").is_file():
        most, period = (folder / "cpu.max").read_text().split()
        return None if most == "max" else int(most) / int(period)
    most, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return most / period if most and period and most > 0 else None


def _number(file: Path) -> int | None:
    """The number in a control group's file; None where there is no such file, or no limit ("max")."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _cached(stat: Path, name: str) -> int:
    try:
        return int(dict(line.split() for line in stat.read_text().splitlines()).get(name, 0))
    except (OSError, ValueError):
        return 0


def _machine() -> tuple[int, int] | None:
    try:
        import psutil
    except ImportError:
        return None
    facts = psutil.virtual_memory()
    return facts.total, facts.available
