"""Everything that is measured about speed and memory, in one run: `make bench`, or `make bench-quick` for the short form.

    python benchmarks/run.py [--quick] [--only growth,levers]

Results go to results/bench.json and bench.md (quick: bench-quick). The exit status is 1 when a memory limit is broken.
"""

from __future__ import annotations

import argparse
import importlib
import time

import torch
from growth import MEMORY_LIMIT
from harness import table, write

FILES = ("shadow_models", "private_steps", "attacking", "measures", "whole", "growth", "levers", "gpu")


def main() -> int:
    """Run the chosen files' jobs in turn and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer models and rounds, under three minutes")
    parser.add_argument("--only", default=",".join(FILES), help=f"some of {', '.join(FILES)}")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    begun, rows = time.monotonic(), []
    for name in chosen.only.split(","):
        started = time.monotonic()
        found = importlib.import_module(name).jobs(chosen.quick)
        print(f"\n{name}, {time.monotonic() - started:.0f} s\n{table(found)}", flush=True)
        rows += found
        # after each part, so that a run that is cut off keeps what it has
        page = write("bench-quick" if chosen.quick else "bench", rows, time.monotonic() - begun)
    broken = [row for row in rows if row.job == MEMORY_LIMIT and not row.met]
    for row in broken:
        print(f"over its memory limit: {row.shape}: {row.note}, at most {row.peer}")
    print(f"{len(rows)} rows in {(time.monotonic() - begun) / 60:.1f} minutes: {page.relative_to(page.parents[2])}")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
