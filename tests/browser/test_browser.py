"""What a learner sees: the panel of notebook 05 in JupyterLab, and the report without a network."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from lab import browser_page, lab_server, open_and_run

from demem_lab import runner, site
from demem_lab.experiment import profile
from demem_lab.sweep import sweep

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.browser
CHOSEN = """() => {
    for (const plot of document.querySelectorAll('.js-plotly-plot')) {
        const trace = plot.data.find(t => t.name === 'chosen');
        if (trace && plot.closest('.jupyter-widgets, .widget-vbox, .lm-Panel.jp-OutputArea-output')) {
            const map = plot.data.find(t => t.name === 'map mark');
            const pictures = plot.data[plot.data.length - 1];
            return {x: Array.from(trace.x), y: Array.from(trace.y), map: [map.x[0], map.y[0]], rows: pictures.z.length};
        }
    }
    return null;
}"""


def test_the_sliders_of_notebook_05_show_the_trained_plane(tmp_path):
    shutil.copytree(ROOT / "notebooks", tmp_path / "root", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    lab = profile("smoke").experiment(progress=False).tuned()
    with lab_server(tmp_path, DEMEM_PROFILE="smoke") as url, browser_page(tmp_path) as (page, console, outside):
        assert open_and_run(page, url, "05_demem.ipynb") == []
        # the same plane from the store: what the panel must show, computed by Python
        plane = sweep(
            lab, noise_multipliers=(0.0, 0.1, 0.3, 1.0, 3.0), fractions=(0.0, 0.05, 0.1, 0.2, 1.0), seed=lab.seeds[0],
            lr_everybody=lab.rate_for_everybody,
        )
        boxed = page.locator(".widget-vbox").filter(has=page.locator(".js-plotly-plot .main-svg"))
        panel = boxed.filter(has=page.locator(".noUi-handle")).last
        panel.wait_for(timeout=60_000)
        readout = panel.locator("[role=status]")
        sliders = panel.locator(".noUi-handle")
        boxes = panel.locator("input[type=number]")
        assert sliders.count() == 2 and boxes.count() == 2
        labels = panel.locator(".widget-label").all_inner_texts()
        assert "noise multiplier" in labels and "risk threshold" in labels

        def check():
            noise, threshold = (float(boxes.nth(i).input_value()) for i in (0, 1))
            wanted = plane.nearest(noise_multiplier=noise, risk_threshold=threshold)
            who = f"the {wanted['protected']} riskiest"
            page.wait_for_function("([el, text]) => el.innerText.includes(text)", arg=[readout.element_handle(), who])
            shown = page.evaluate(CHOSEN)
            assert np.allclose(shown["x"], 100 * wanted["robust"]) and np.allclose(shown["y"], 100 * wanted["leak"])
            assert shown["map"] == [f"{wanted['fraction']:.0%}", f"{wanted['noise_multiplier']:g}"]
            words = re.sub(r"\s+", " ", readout.inner_text())
            assert wanted["guarantee"] in words and f"{100 * wanted['robust']:.1f} %" in words
            return int(wanted["protected"]), float(wanted["noise_multiplier"])

        seen = {check()}
        for slider, key, presses in ((1, "ArrowRight", 40), (0, "ArrowLeft", 12), (0, "End", 1), (1, "Home", 1)):
            before = boxes.nth(slider).input_value()
            sliders.nth(slider).focus()
            for _ in range(presses):
                page.keyboard.press(key)
            page.wait_for_function("([el, old]) => el.value !== old", arg=[boxes.nth(slider).element_handle(), before])
            page.wait_for_timeout(600)
            seen.add(check())
        boxes.nth(1).fill("0.05")  # the number box works as well as the slider
        boxes.nth(1).press("Enter")
        page.wait_for_timeout(600)
        seen.add(check())
        assert len(seen) >= 3  # the panel really moved between points
        assert console == [] and outside == []


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
