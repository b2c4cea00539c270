"""Pictures of the live panels for README and the tour's page: notebooks/images/panel-NN.png, each under 100 kB.

    python tests/browser/pictures.py --profile lesson          # every notebook that has a panel; or name some: 01 05

Needs chromium and the test extra. It opens real notebooks in JupyterLab and waits until their cells have run, which takes
as long as the notebooks take; run `make tour` before, and the results are there already.
"""

import argparse
import io
import re
import shutil
import sys
import tempfile
from pathlib import Path

from lab import browser_page, lab_server, open_and_run
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PANEL = ".jp-OutputArea-output .widget-vbox:has(.js-plotly-plot .main-svg)"
WIDTH, LARGEST = 1000, 100_000


def main() -> int:
    """Take the pictures; 1 when a notebook fails or a panel does not appear."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("numbers", nargs="*", help="notebooks, such as 05; by default all with a panel")
    arguments.add_argument("--profile", default="lesson")
    arguments.add_argument("--out", type=Path, default=ROOT / "notebooks" / "images")
    given = arguments.parse_args()
    files = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    files = [file for file in files if re.search(r"(Panel|Gallery)\(", file.read_text())]
    chosen = [file for file in files if not given.numbers or file.name[:2] in given.numbers]
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shutil.copytree(ROOT / "notebooks", folder / "root", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        with lab_server(folder, DEMEM_PROFILE=given.profile) as url, browser_page(folder) as (page, _, _):
            page.set_viewport_size({"width": 1400, "height": 2000})  # a panel must fit, or it is cut off
            for file in chosen:
                errors = open_and_run(page, url, file.name, timeout=900)
                target = given.out / f"panel-{file.name[:2]}.png"
                if errors:
                    print(f"{file.name}: {errors}", file=sys.stderr)
                    failed = 1
                else:
                    print(f"{target.name}: {picture(page, target)} bytes")
    return failed


def picture(page, target: Path) -> int:
    """Save the panel that `page` shows, in as few colours as keep it small; the size in bytes."""
    panel = page.locator(PANEL).first
    panel.scroll_into_view_if_needed(timeout=60_000)
    page.wait_for_timeout(1500)
    shot = Image.open(io.BytesIO(panel.screenshot())).convert("RGB")
    if shot.width > WIDTH:
        shot = shot.resize((WIDTH, round(shot.height * WIDTH / shot.width)), Image.Resampling.LANCZOS)
    target.parent.mkdir(parents=True, exist_ok=True)
    for colours in (128, 64, 32):
        shot.quantize(colours).save(target, optimize=True)
        if target.stat().st_size < LARGEST:
            return target.stat().st_size
    raise ValueError(f"{target.name} has {target.stat().st_size} bytes, more than {LARGEST}; make the panel smaller")


if __name__ == "__main__":
    sys.exit(main())
