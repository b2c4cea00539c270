"""Flame graphs of the two steps that training consists of, by py-spy (`pip install py-spy`; it may need root).

    python benchmarks/flame.py            # writes results/flame_attack.svg and results/flame_private.svg

A step is repeated for ten seconds while py-spy looks on a hundred times a second. Each row of boxes calls the row below
it; a wide box is where the time goes. Hover over a box for its name and share.
"""

from __future__ import annotations

import html
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from growth import state_of
from harness import RESULTS
from private_steps import Case

from demem_lab.mechanisms import SelectiveDP
from demem_lab.models import MLP, SmallCNN

SECONDS, WIDTH, ROW, LEAST = 10, 1200, 18, 0.004
Tree = dict  # frame -> [samples, Tree of the frames it calls]


def record(name: str, title: str, step: Callable[[], object]) -> Path:
    """Repeat `step` while py-spy watches this process, and draw what it saw."""
    for _ in range(3):
        step()
    with tempfile.TemporaryDirectory() as folder:
        stacks = Path(folder) / "stacks.txt"
        command = ["py-spy", "record", "--pid", str(os.getpid()), "--duration", str(SECONDS), "--function", "--format", "raw"]
        with subprocess.Popen([*command, "--output", str(stacks)]) as watcher:
            while watcher.poll() is None:
                step()
        if watcher.returncode:
            sys.exit(f"py-spy ended with {watcher.returncode}; it must be allowed to look into this process (as root)")
        page = RESULTS / f"{name}.svg"
        page.write_text(drawn(tree_of(stacks.read_text().splitlines()), title))
    return page


def tree_of(lines: list[str]) -> Tree:
    """The calls below `record` in lines of 'frame;frame;frame samples'."""
    tree: Tree = {}
    for line in lines:
        stack, samples = line.rsplit(" ", 1)
        frames = stack.split(";")
        place = tree
        for frame in frames[1 + next((i for i, f in enumerate(frames) if f.startswith("record ")), -1):]:
            node = place.setdefault(frame, [0, {}])
            node[0] += int(samples)
            place = node[1]
    return tree


def drawn(tree: Tree, title: str) -> str:
    """The tree as boxes, the called below their callers."""
    total, boxes, depth = sum(node[0] for node in tree.values()), [], 0

    def draw(place: Tree, left: float, row: int) -> None:
        nonlocal depth
        for frame, (samples, called) in sorted(place.items(), key=lambda item: -item[1][0]):
            width = samples / total
            if width > LEAST:
                depth = max(depth, row)
                text = html.escape(frame)
                room = int(width * WIDTH / 6.5)
                shown = html.escape(frame.split(" (")[0][: max(0, room - 1)]) if room > 4 else ""
                color = "#56B4E9" if "demem_lab" in frame else "#E69F00" if "torch" in frame else "#bbbbbb"
                x, y = left * WIDTH, (row + 1) * ROW
                boxes.append(
                    f'<g><title>{text}: {width:.1%}</title><rect x="{x:.1f}" y="{y}" width="{width * WIDTH:.1f}" '
                    f'height="{ROW - 1}" fill="{color}"/><text x="{x + 3:.1f}" y="{y + 13}">{shown}</text></g>'
                )
                draw(called, left, row + 1)
            left += width

    draw(tree, 0.0, 0)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {(depth + 2) * ROW}" font-family="sans-serif" '
        f'font-size="11"><text x="3" y="13" font-weight="bold">{html.escape(title)}</text>\n' + "\n".join(boxes) + "\n</svg>\n"
    )


def main() -> None:
    """Both graphs."""
    if shutil.which("py-spy") is None:
        sys.exit("py-spy is not there; pip install py-spy")
    torch.set_num_threads(1)
    record("flame_attack", "PGD-3 adversarial training step of 48 MLPs, batch 50", state_of(48, MLP()).advance)
    case, few = Case(SmallCNN(width=32, hidden=128), 28, 128), torch.arange(128) < 12
    title = "SelectiveDP step of a small CNN of width 32, 28x28, batch 128, a tenth protected"
    record("flame_private", title, lambda: case.step(SelectiveDP(1.0, 1.0, few)))


if __name__ == "__main__":
    main()
