"""The panels of notebooks 01 to 03 in JupyterLab: every control by keyboard, every number against Python's own."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from lab import browser_page, lab_server, open_and_run

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "runs" / "browser"
pytestmark = pytest.mark.browser
TRACES = """panel => {
    const numbers = a => a === undefined ? null : a.length === undefined ? a
        : Array.from(a, v => v !== null && v.length !== undefined && typeof v !== 'string' ? numbers(v) : v);
    const plot = panel.querySelector('.js-plotly-plot');
    return plot.data.map(t => ({name: t.name || null, type: t.type, x: numbers(t.x), y: numbers(t.y), z: numbers(t.z)}));
}"""
UNNAMED = """panel => Array.from(panel.querySelectorAll('button, input, select, [role=slider]'))
    .filter(e => e.offsetParent !== null && !(e.getAttribute('aria-label') || e.textContent.trim() && e.tagName === 'BUTTON'
        || (e.labels && e.labels.length && e.labels[0].textContent.trim())))
    .map(e => e.outerHTML.slice(0, 200))"""
# what the kernel's own panel says that the figure must show, computed by `answer()` and drawn by `views_risk`, not by the page
ASK = """
import json as _json, numpy as _np
def _numbers(a):
    return None if a is None else _np.asarray(a).tolist()
from demem_lab import views_risk as _views
def _asked():
    kind = type(panel).__name__
    if kind == "AttackPanel":
        path = panel.answer()
        return {"position": [panel.row, panel.attack.value, panel.eps.value, panel.steps.value],
                "clean": path.images[0].tolist(), "moved": path.images[-1].tolist(), "p": path.probabilities.tolist()}
    if kind == "LeakPanel":
        leaks = panel.answer(); a = leaks[panel.model.value]
        return {"position": [panel.model.value, panel.query.value, panel.signal.value, panel.attack.value,
                             panel.target.value, panel.share.value],
                "members": a.members.tolist(), "non_members": a.non_members.tolist(),
                "found": a.found.mean, "false": a.false.mean, "least": 0.5 / a.false.n,
                "honest": [b.found_at_fpr.mean for b in leaks.values()],
                "best": [b.best_accuracy.mean for b in leaks.values()], "roc": [c.tolist() for c in a.curve]}
    cut, r, i = panel.answer(), panel.risks, panel.sample.value
    return {"position": [panel.by.value, panel.cheap.value, panel.share.value, panel.rank.value, i],
            "above": cut.count, "inside": r.p[r.member[:, i], i].tolist(), "outside": r.p[~r.member[:, i], i].tolist(),
            "at": [float(r.scores[panel.cheap.value][i]), float(r.scores["memorization"][i])],
            "image": panel.images[i].tolist()}
print(_json.dumps(_asked()))
"""
EXECUTE = """async code => {
    const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
    const request = kernel.requestExecute({code, store_history: false});
    let said = '';
    request.onIOPub = m => { if (m.header.msg_type === 'stream') said += m.content.text;
                             if (m.header.msg_type === 'error') said += m.content.traceback.join('\\n'); };
    await request.done;
    return said;
}"""
RERUN = """async id => {
    const notebook = window.jupyterapp.shell.currentWidget.content;
    notebook.activeCellIndex = notebook.widgets.findIndex(cell => cell.model.id === id);
    await window.jupyterapp.commands.execute('notebook:run-cell');
}"""


class Shown:
    """The panel of one cell, used without a mouse."""

    def __init__(self, page, first):
        self.page = page
        boxed = page.locator(".demem-panel").filter(has=page.locator(".js-plotly-plot .main-svg"))
        self.panel = boxed.filter(has=page.get_by_label(first, exact=True)).last
        self.panel.wait_for(timeout=60_000)
        self.panel.locator(".noUi-handle").first.wait_for()

    def both(self):
        """What the kernel's panel answers at its position, and what the page shows."""
        asked = json.loads(self.page.evaluate(EXECUTE, ASK))
        self.page.wait_for_timeout(300)
        return asked, self.panel.evaluate(TRACES)

    def slide(self, name, key, times=1):
        self.panel.get_by_role("slider", name=name, exact=True).focus()
        for _ in range(times):
            self.page.keyboard.press(key)

    def type(self, name, value):
        box = self.panel.get_by_role("spinbutton", name=name, exact=True)
        box.focus()
        box.press("Control+a")
        self.page.keyboard.type(str(value))
        self.page.keyboard.press("Enter")

    def choose(self, name, key, times=1):
        self.panel.get_by_role("combobox", name=name, exact=True).focus()
        for _ in range(times):
            self.page.keyboard.press(key)

    def words(self):
        return re.sub(r"\s+", " ", self.panel.get_by_role("status").inner_text())

    def picture(self, name):
        PICTURES.mkdir(parents=True, exist_ok=True)
        self.panel.scroll_into_view_if_needed()
        self.page.wait_for_timeout(300)
        self.panel.screenshot(path=PICTURES / f"{name}.png")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", folder / "root", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    with lab_server(folder, DEMEM_PROFILE="smoke") as url:
        yield url


def settled(shown, check, *, other_than=None, after="", tries=20):
    """The position at which the page shows what the kernel answers: a few messages may still be on their way."""
    for left in reversed(range(tries)):
        try:
            position = check()
            assert position != other_than, f"{after} did not move anything"
            return position
        except AssertionError:
            if not left:
                raise
            shown.page.wait_for_timeout(500)


def walk(shown, check, moves):
    """Move every control of a panel; each move must change the position, and the figure must follow."""
    seen = settled(shown, check)
    for control, how in moves:
        how()
        seen = settled(shown, check, other_than=seen, after=control)
    assert shown.panel.evaluate(UNNAMED) == []
    drawn, room = (shown.panel.locator(place).first.bounding_box()["width"] for place in (".main-svg", ".js-plotly-plot"))
    assert abs(drawn - room) < 2  # the figure fills the page
    covered = {control for control, _ in moves}
    for role in ("slider", "spinbutton", "combobox"):
        for element in shown.panel.get_by_role(role).all():
            name = element.get_attribute("aria-label") or element.evaluate("e => e.labels[0].textContent.trim()")
            assert name in covered, f"the test never moved {name!r}"


def named(trace_list, name):
    found = [t for t in trace_list if t["name"] == name]
    assert found, f"the page does not show {name!r} (yet)"
    return found[0]


def drawn_image(z):
    z = np.array(z)
    return z[None] if z.ndim == 2 else z.transpose(2, 0, 1) / 255


def test_the_attack_panel_of_notebook_01(server, tmp_path):
    with browser_page(tmp_path) as (page, console, outside):
        assert open_and_run(page, server, "01_adversarial_training.ipynb") == []
        shown = Shown(page, "attack radius eps")

        def check():
            asked, traces = shown.both()
            pictures = [t for t in traces if t["type"] in ("heatmap", "image")]
            assert len(pictures) == 3
            assert np.allclose(drawn_image(pictures[0]["z"]), asked["clean"], atol=3e-3)
            assert np.allclose(drawn_image(pictures[2]["z"]), asked["moved"], atol=3e-3)
            p = np.array(asked["p"])
            lines = [t for t in traces if t["type"] == "scatter"]
            assert np.allclose(np.sum([t["y"] for t in lines], axis=0), 1)
            for t in lines[:-1]:
                assert np.allclose(t["y"], p[:, int(t["name"].split(" ")[0])])  # the classes are digits
            assert f"Image {asked['position'][0]}," in shown.words() and f"({p[-1].max():.0%})" in shown.words()
            return asked["position"]

        settled(shown, check)
        shown.picture("attack")
        walk(shown, check, [
            ("image", lambda: shown.slide("image", "ArrowRight", 3)),
            ("image as a number", lambda: shown.type("image as a number", 1)),
            ("attack radius eps", lambda: shown.slide("attack radius eps", "ArrowLeft", 4)),
            ("attack radius eps as a number", lambda: shown.type("attack radius eps as a number", 0.2)),
            ("steps", lambda: shown.slide("steps", "ArrowRight", 2)),
            ("steps as a number", lambda: shown.type("steps as a number", 4)),
            ("attack", lambda: shown.choose("attack", "ArrowDown")), ("attack", lambda: shown.choose("attack", "ArrowDown")),
            ("attack", lambda: shown.choose("attack", "ArrowDown")), ("attack", lambda: shown.choose("attack", "Home")),
            ("images", lambda: shown.choose("images", "End")),
        ])
        shown.picture("attack-moved")
        before = settled(shown, check)
        page.evaluate(RERUN, "cell-16")
        again = Shown(page, "attack radius eps")
        assert settled(again, check) == before
        assert console == [] and outside == []


def test_the_leak_panel_of_notebook_02(server, tmp_path):
    with browser_page(tmp_path) as (page, console, outside):
        assert open_and_run(page, server, "02_robust_models_leak.ipynb") == []
        shown = Shown(page, "accuse the top, %")

        def check():
            asked, traces = shown.both()
            assert named(traces, "members")["y"] == asked["members"]
            assert named(traces, "non-members")["y"] == [-count for count in asked["non_members"]]
            point = named(traces, "at the threshold")
            wanted = [max(asked["false"], asked["least"]), max(asked["found"], asked["least"])]
            assert np.allclose([point["x"][0], point["y"][0]], wanted)
            curve = named(traces, "ROC")
            assert np.allclose([curve["x"], curve["y"]], np.maximum(asked["roc"], asked["least"]))
            assert np.allclose(named(traces, "found at few false")["x"], asked["honest"])
            assert np.allclose(named(traces, "best accuracy")["x"], asked["best"])
            assert f"Members hit: {asked['found']:.1%}" in shown.words()
            return asked["position"]

        settled(shown, check)
        shown.picture("leak")
        walk(shown, check, [
            ("accuse the top, %", lambda: shown.slide("accuse the top, %", "ArrowRight", 6)),
            ("accuse the top, % as a number", lambda: shown.type("accuse the top, % as a number", 1.5)),
            ("target", lambda: shown.slide("target", "ArrowRight")),
            ("target as a number", lambda: shown.type("target as a number", 0)),
            *[("attack", lambda: shown.choose("attack", "ArrowDown"))] * 4,
            *[("signal", lambda: shown.choose("signal", "ArrowUp"))] * 4,
            ("asked about", lambda: shown.choose("asked about", "ArrowDown")),
            ("model", lambda: shown.choose("model", "ArrowDown")), ("model", lambda: shown.choose("model", "ArrowDown")),
        ])
        shown.picture("leak-moved")
        before = settled(shown, check)
        page.evaluate(RERUN, "panel-leak-show")
        again = Shown(page, "accuse the top, %")
        assert settled(again, check) == before
        assert console == [] and outside == []


def test_the_gallery_of_notebook_03(server, tmp_path):
    with browser_page(tmp_path) as (page, console, outside):
        assert open_and_run(page, server, "03_who_is_at_risk.ipynb") == []
        shown = Shown(page, "threshold: top, %")

        def check():
            asked, traces = shown.both()
            ring = named(traces, "chosen sample")
            assert np.allclose([ring["x"][0], ring["y"][0]], asked["at"])
            assert len(named(traces, "at or above")["x"]) == asked["above"]
            assert np.allclose(named(traces, "trained on it")["x"], asked["inside"])
            assert np.allclose(named(traces, "did not")["x"], asked["outside"])
            alone = [t for t in traces if t["type"] in ("heatmap", "image")][1]
            assert np.allclose(drawn_image(alone["z"]), asked["image"], atol=3e-3)
            assert f"rank {asked['position'][3]:,}," in shown.words()
            assert f"Sample {asked['position'][-1]}," in shown.words() and f"{asked['above']} of" in shown.words()
            return asked["position"]

        settled(shown, check)
        shown.picture("gallery")
        walk(shown, check, [
            ("threshold: top, %", lambda: shown.slide("threshold: top, %", "ArrowRight", 6)),
            ("threshold: top, % as a number", lambda: shown.type("threshold: top, % as a number", 25)),
            ("rank, 1 = riskiest", lambda: shown.slide("rank, 1 = riskiest", "ArrowRight", 2)),
            ("rank, 1 = riskiest as a number", lambda: shown.type("rank, 1 = riskiest as a number", 30)),
            ("sample", lambda: shown.type("sample", 123)),
            *[("cheap score", lambda: shown.choose("cheap score", "ArrowDown"))] * 2,
            *[("sort by", lambda: shown.choose("sort by", "ArrowDown"))] * 3,
        ])
        shown.picture("gallery-moved")
        before = settled(shown, check)
        spot = shown.panel.locator(".scatterlayer .trace .points path.point").nth(20).bounding_box()
        page.mouse.click(spot["x"] + spot["width"] / 2, spot["y"] + spot["height"] / 2)
        after = settled(shown, check, other_than=before, after="a click")
        assert after[-1] != before[-1]
        page.evaluate(RERUN, "panel-risk-show")
        again = Shown(page, "threshold: top, %")
        assert settled(again, check) == after
        assert console == [] and outside == []
