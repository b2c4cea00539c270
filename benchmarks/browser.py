"""How long a live panel takes to answer a key on one of its sliders, by wall clock, in a real JupyterLab in a real browser.

    python benchmarks/browser.py [01 05 ...] [--profile smoke] [--moves 10]

The clock runs in the page: from the key press until the read-out has other words AND the figure was drawn anew, whichever
comes last. So it holds the way to the kernel and back, the answer, and the drawing. Needs chromium and the test extra. The
notebooks are run first; at `lesson` that takes minutes unless `make tour` has filled the store. Target: 200 ms.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from harness import Row, judged, table, write

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 200  # milliseconds
PANELS = {"01": "attack", "02": "leak", "03": "gallery", "04": "budget", "05": "DeMem"}
PANEL = ".demem-panel:has(.js-plotly-plot .main-svg)"
WATCH = """panel => {
    const words = () => Array.from(panel.querySelectorAll('[role=status]'), e => e.innerText).join(' ');
    const t = window.answered = {};
    panel.addEventListener('keydown', event => {
        if (!event.key.startsWith('Arrow')) return;
        Object.assign(t, {key: performance.now(), words: null, figure: null, last: null, before: words()});
    }, true);
    const told = () => { if (t.key && !t.words && words() !== t.before) t.words = performance.now(); };
    new MutationObserver(told).observe(panel, {subtree: true, childList: true, characterData: true});
    panel.querySelector('.js-plotly-plot').on('plotly_afterplot', () => { t.figure ||= performance.now(); });
}"""


def answers(page, moves: int) -> dict[str, list[float]]:
    """{slider: milliseconds of each move} of the panel that the page shows."""
    panel = page.locator(PANEL).last
    panel.scroll_into_view_if_needed(timeout=60_000)
    page.wait_for_timeout(2000)  # until everything that came with the notebook is drawn
    panel.evaluate(WATCH)
    found = {}
    for handle in panel.get_by_role("slider").all():
        times = found.setdefault(handle.get_attribute("aria-label"), [])
        for _ in range(moves):
            now, most = (float(handle.get_attribute(f"aria-value{which}")) for which in ("now", "max"))
            handle.focus()
            page.keyboard.press("ArrowLeft" if now >= most else "ArrowRight")
            page.wait_for_function("() => window.answered.words && window.answered.figure", timeout=20_000)
            times.append(page.evaluate("() => Math.max(answered.words, answered.figure) - answered.key"))
            page.wait_for_timeout(300)  # what a panel draws later, in the background, is not the next answer
    return found


def measured(numbers: list[str], profile: str, moves: int) -> list[Row]:
    """A row for each slider of the panels of these notebooks."""
    sys.path.insert(0, str(ROOT / "tests" / "browser"))
    from lab import browser_page, lab_server, open_and_run

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shutil.copytree(ROOT / "notebooks", folder / "root", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with lab_server(folder, DEMEM_PROFILE=profile, PYTHONPATH=path) as url, browser_page(folder) as (page, _, _):
            for number in numbers:
                file = next((folder / "root").glob(f"{number}_*.ipynb"))
                errors = open_and_run(page, url, file.name, timeout=1200)
                if errors:
                    raise RuntimeError(f"{file.name}: {errors}")
                for slider, times in answers(page, moves).items():
                    rows.append(judged(
                        "a slider's answer", f"{number} {PANELS[number]}: {slider}, {profile}", "key to words and figure", times,
                        target=LIMIT, at_most=True, unit="ms", note=f"worst {max(times):.0f}",
                    ))
    return rows


def jobs(quick: bool) -> list[Row]:
    """The rows for `run.py`; none, and why, where there is no browser."""
    try:
        import pytest
        from playwright import sync_api  # noqa: F401 - is it there?
    except ImportError as error:
        print(f"browser: left out, {error}")
        return []
    try:
        return measured(list(PANELS), "smoke" if quick else "lesson", 5 if quick else 10)
    except pytest.skip.Exception as reason:
        print(f"browser: left out, {reason}")
        return []


def main() -> int:
    """Measure the chosen panels; 1 when the median answer of a slider is over the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", choices=[[], *PANELS], help="notebooks, such as 05; by default all with a panel")
    parser.add_argument("--profile", default="lesson")
    parser.add_argument("--moves", type=int, default=10, help="of each slider")
    parser.add_argument("--keep", action="store_true", help="write results/browser.json and browser.md")
    given = parser.parse_args()
    begun = time.monotonic()
    rows = measured(given.numbers or list(PANELS), given.profile, given.moves)
    print(table(rows))
    if given.keep:
        write("browser", rows, time.monotonic() - begun)
    return 1 if any(not row.met for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
