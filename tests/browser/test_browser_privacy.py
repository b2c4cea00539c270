"""The Budget panel (04) and the DeMem panel (05) in JupyterLab: by keyboard alone, against Python's own numbers."""

import json
import re
import shutil
import sys
from pathlib import Path

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant

sys.path.insert(0, str(Path(__file__).parent))

from lab import browser_page, lab_server, open_and_run

from demem_lab.accounting import bound
from demem_lab.comparison import measure
from demem_lab.experiment import best_rate, profile
from demem_lab.mechanisms import DPSGD
from demem_lab.sweep import sweep, train_point

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "runs" / "browser"
pytestmark = pytest.mark.browser
TRACES = """panel => {
    const found = {};
    const list = a => a === undefined ? null : a.length === undefined ? a : Array.from(a);
    for (const t of panel.querySelector('.js-plotly-plot').data)
        found[t.name] = {x: list(t.x), y: list(t.y), rows: t.z ? t.z.length : 0};
    return found;
}"""
UNNAMED = """panel => Array.from(panel.querySelectorAll('button, input, [role=slider], select'))
    .filter(e => e.offsetParent !== null && !(e.getAttribute('aria-label') || e.textContent.trim()
        || (e.labels && e.labels.length && e.labels[0].textContent.trim())))
    .map(e => e.outerHTML.slice(0, 200))"""
EXECUTE = """async code => {
    const done = await window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({code}).done;
    return done.content.status;
}"""


class Shown:
    """A panel in the browser, and how to use it without a mouse."""

    def __init__(self, page):
        self.page = page
        page.set_default_timeout(180_000)  # generous: a busy machine is slow, not wrong
        boxed = page.locator(".widget-vbox").filter(has=page.locator(".js-plotly-plot .main-svg"))
        self.panel = boxed.filter(has=page.locator(".noUi-handle")).last
        self.panel.wait_for()
        self.sliders, self.boxes = self.panel.locator(".noUi-handle"), self.panel.locator("input[type=number]")
        self.names = [t.strip() for t in self.panel.locator(".widget-label").all_inner_texts()]

    def value(self, number):
        return float(self.boxes.nth(number).input_value())

    def press(self, number, key, times):
        before = self.boxes.nth(number).input_value()
        self.sliders.nth(number).focus()
        for _ in range(times):
            self.page.keyboard.press(key)
        box = self.boxes.nth(number).element_handle()
        self.page.wait_for_function("([el, old]) => el.value !== old", arg=[box, before])
        settled = None
        while settled != (settled := self.boxes.nth(number).input_value()):  # a busy machine is still counting key presses
            self.page.wait_for_timeout(1000)

    def type(self, number, value):
        self.boxes.nth(number).fill(str(value))
        self.boxes.nth(number).press("Enter")
        self.page.wait_for_timeout(700)

    def button(self, name):
        self.panel.get_by_role("button", name=name).focus()
        self.page.keyboard.press("Enter")

    def wait_for(self, text, timeout=180):
        self.page.wait_for_function(
            "([el, text]) => el.innerText.replace(/\\s+/g, ' ').includes(text)", timeout=1000 * timeout,
            arg=[self.panel.element_handle(), text],
        )

    def words(self):
        return re.sub(r"\s+", " ", self.panel.inner_text())

    def traces(self, name="", x=()):
        """What the figure shows, once its trace `name` stands at `x`: words arrive before a figure is drawn."""
        for _ in range(180):
            seen = self.page.evaluate(TRACES, self.panel.element_handle())
            if not name or name in seen and np.shape(seen[name]["x"]) == np.shape(x) and np.allclose(seen[name]["x"], x):
                break
            self.page.wait_for_timeout(1000)
        return seen

    def picture(self, name):
        PICTURES.mkdir(parents=True, exist_ok=True)
        self.panel.evaluate("panel => panel.scrollIntoView()")
        self.page.wait_for_timeout(500)
        self.page.screenshot(path=PICTURES / f"{name}.png")  # of the page: a panel that trains never stands still


def opened(tmp_path):
    shutil.copytree(ROOT / "notebooks", tmp_path / "root", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    return lab_server(tmp_path, DEMEM_PROFILE="smoke"), browser_page(tmp_path)


def test_the_budget_panel_of_notebook_04(tmp_path):
    server, browser = opened(tmp_path)
    with server as url, browser as (page, console, outside):
        assert open_and_run(page, url, "04_privacy_for_everyone.ipynb") == []
        lab = profile("smoke").experiment(progress=False).tuned()
        plain, axis, points = lab.run("none", seed=0), (0.0, 0.3, 1.0, 3.0), {}
        half, top = lab.flags(0, 0.5).numpy(), lab.flags(0, 0.1).numpy()
        groups = {"lowest half": ~half, "middle 40 %": half & ~top, "highest tenth": top}
        for sigma in axis:  # from the store: the notebook trained them
            run = lab.run("again", seed=0, mechanism=DPSGD(sigma), lr=best_rate(lab.tune_everybody(sigma)))
            points[sigma] = measure(run, groups, fpr=0.05)
        shown, members = Shown(page), lab.batch_size / plain.sampling_rate
        assert shown.sliders.count() == 4 == shown.boxes.count()
        assert {"noise multiplier", "batch size", "training steps", "delta: ten to the"} <= set(shown.names)
        assert page.evaluate(UNNAMED, shown.panel.element_handle()) == []

        def check():
            sigma, batch, steps, power = (shown.value(i) for i in range(4))
            once = dp.PoissonSampledDpEvent(batch / members, dp.GaussianDpEvent(sigma))
            wanted = RdpAccountant().compose(dp.SelfComposedDpEvent(once, int(steps))).get_epsilon(10**power)
            shown.wait_for(f"epsilon ≤ {bound(wanted)}")
            seen, place = shown.traces("your setting", [sigma]), min(range(4), key=lambda i: abs(axis[i] - sigma))
            assert np.allclose(seen["your setting"]["y"], wanted) and np.allclose(seen["your setting"]["x"], sigma)
            assert seen["nearest trained 1"]["x"] == [place, place]
            for name in groups:
                wanted = [points[s][name, "robust"] for s in axis]
                assert np.allclose(seen[f"robust, {name}"]["y"], 100 * np.array(wanted))
            assert np.allclose(seen["with privacy"]["y"], [100 * points[axis[place]][g, "robust"] for g in groups])
            return wanted

        check()
        shown.picture("04-budget")
        for slider, key, times in ((0, "ArrowRight", 8), (1, "ArrowLeft", 5), (2, "ArrowRight", 9), (3, "ArrowLeft", 3)):
            shown.press(slider, key, times)
            check()
        shown.type(0, 0.4)
        check()
        page.wait_for_function(f"panel => ({TRACES})(panel)['RDP (upper bound)'].x.length > 9", arg=shown.panel.element_handle())
        shown.button("tight epsilon (PLD)")
        shown.wait_for("(PLD, tight)")
        assert np.allclose(shown.traces("PLD (tight)", [0.4])["PLD (tight)"]["x"], 0.4)
        shown.picture("04-budget-moved")
        assert console == [] and outside == []


def test_the_demem_panel_of_notebook_05(tmp_path):
    server, browser = opened(tmp_path)
    with server as url, browser as (page, console, outside):
        assert open_and_run(page, url, "05_demem.ipynb") == []
        lab = profile("smoke").experiment(progress=False).tuned()
        plane = sweep(  # the same plane from the store: what the panel must show, computed by Python
            lab, noise_multipliers=(0.0, 0.1, 0.3, 1.0, 3.0), fractions=(0.0, 0.05, 0.1, 0.2, 1.0), seed=lab.seeds[0],
            lr_everybody=lab.rate_for_everybody,
        )
        shown = Shown(page)
        assert shown.sliders.count() == 2 == shown.boxes.count()
        assert {"noise multiplier", "risk threshold"} <= set(shown.names)
        assert page.evaluate(UNNAMED, shown.panel.element_handle()) == []

        def check(plane=plane):
            noise, threshold = shown.value(0), shown.value(1)
            wanted = plane.nearest(noise_multiplier=noise, risk_threshold=threshold)
            shown.wait_for(f"the {wanted['protected']} riskiest")
            seen = shown.traces("chosen", [100 * wanted["robust"]])
            assert np.allclose(seen["chosen"]["x"], 100 * wanted["robust"])
            assert np.allclose(seen["chosen"]["y"], 100 * wanted["leak"])
            assert wanted["guarantee"] in shown.words() and f"{100 * wanted['robust']:.1f} %" in shown.words()
            return int(wanted["protected"]), float(wanted["noise_multiplier"])

        seen = {check()}
        shown.picture("05-demem")
        for slider, key, times in ((1, "ArrowRight", 20), (0, "ArrowLeft", 12), (0, "End", 1), (1, "Home", 1)):
            shown.press(slider, key, times)
            seen.add(check())
        shown.type(1, 0.04)  # the number box works as well as the slider
        seen.add(check())
        assert len(seen) >= 3  # the panel really moved between points
        arms = {"none", "SelectiveDP", "drop", "down-weight", "random set", "clip everybody", "DP for everybody", "LossVariance"}
        assert arms | {"graded release", "early stopping", "weight decay"} <= set(shown.traces())

        shown.type(0, 0.75)
        noise, threshold = shown.value(0), shown.value(1)
        shown.button("train this point")
        shown.wait_for(f"noise multiplier 0.75, {int((plane.scores >= threshold).sum())} protected")
        fresh = "found in the store" not in shown.words()  # where the store was kept from an earlier run
        more = train_point(lab, plane, noise_multiplier=noise, risk_threshold=threshold)  # from the store
        assert check(more) == (int((plane.scores >= threshold).sum()), 0.75)
        traces = shown.traces()
        assert traces["trained here, one seed"]["x"] == traces["chosen"]["x"] and len(traces["training loss"]["y"]) == 3 * fresh
        shown.picture("05-demem-trained")

        assert page.evaluate(EXECUTE, "import dataclasses; panel.lab = dataclasses.replace(panel.lab, epochs=4000)") == "ok"
        shown.type(0, 2.2)
        shown.button("train this point")
        shown.wait_for("loss")  # the curve moves
        shown.press(1, "ArrowRight", 3)  # and the kernel still answers
        check(more)
        shown.picture("05-demem-training")
        shown.button("cancel")
        shown.wait_for("the chart is as it was")
        after = shown.traces()
        assert after["trained here, one seed"] == traces["trained here, one seed"]
        check(more)
        assert console == [] and outside == [], json.dumps([console, outside])
