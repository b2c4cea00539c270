"""What a reader sees: the report without a network."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from lab import browser_page

from demem_lab import runner, site

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.browser


def test_the_report_needs_no_network_and_shows_every_figure(tmp_path):
    result = runner.run(ROOT / "notebooks" / "00_start_here.ipynb", tmp_path / "00.ipynb", {"profile": "smoke"})
    page_file = site.write(tmp_path / "index.html", [result], title="report", intro="intro")
    with browser_page(tmp_path) as (page, console, outside):
        page.context.set_offline(True)
        page.goto(page_file.as_uri())
        figures = page.locator("div[id^=figure-]")
        assert figures.count() >= 2
        for i in range(figures.count()):
            figures.nth(i).scroll_into_view_if_needed()  # it is drawn when it comes near
            figures.nth(i).locator(".main-svg").first.wait_for(timeout=20_000)
        last = figures.nth(figures.count() - 1)
        last.scroll_into_view_if_needed()
        box = last.locator(".scatterlayer .trace").first.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_selector(".hoverlayer .hovertext", timeout=10_000)
        assert console == [] and outside == []
