"""What every panel is made of: named controls with a number box each, one figure, a read-out in words; and predictions.

An error in a callback appears in the read-out, not in a log that nobody sees. All of it works by keyboard and has a name for
screen readers, and a panel whose cell is run again stands where it stood.

>>> slider, row = number("noise multiplier", 0.0, 3.0, 1.0, step=0.05)
>>> slider.value
1.0
"""

from __future__ import annotations

import html
import os
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import anywidget
import ipywidgets as widgets
import plotly.graph_objects as go
from IPython.display import display

from demem_lab.validate import finite

# where the controls of each kind of panel stand in this session: a cell that is run again makes new controls
_positions: dict[tuple[str, str], object] = {}


class Names(anywidget.AnyWidget):
    """Shows nothing; gives the controls around it the names that ipywidgets leaves out, and figures the width they have.

    A slider's handle has a role and a value in the page but no name, and the number box beside it is called "=". Inside a box
    of class "demem-panel", handles are named by their slider's label, and boxes "... as a number". Keys pressed there are the
    controls' own: JupyterLab would take the arrows of a dropdown for a walk to the next cell.
    """

    _esm = """
    function name(root) {
        for (const control of root.querySelectorAll("select, input, button, .noUi-handle"))
            control.setAttribute("data-lm-suppress-shortcuts", "true");  // JupyterLab asks the focused element first
        for (const slider of root.querySelectorAll(".widget-slider")) {
            const label = slider.querySelector(".widget-label")?.innerText || slider.title;
            const row = slider.closest(".demem-control");
            slider.querySelectorAll(".noUi-handle").forEach(handle => handle.setAttribute("aria-label", label));
            row?.querySelectorAll("input[type=number]").forEach(box => box.setAttribute("aria-label", label + " as a number"));
        }
        for (const plot of root.querySelectorAll(".js-plotly-plot")) {
            plot.setAttribute("role", "img");
            plot.setAttribute("aria-label", "figure; the text above it says what it shows");
        }
    }
    const tried = new WeakMap();  // the width each figure was last asked to take
    function fit(root) {
        for (const plot of root.querySelectorAll(".js-plotly-plot")) {
            const drawn = plot.querySelector(".main-svg")?.clientWidth, room = plot.clientWidth;
            if (!drawn || !room || Math.abs(drawn - room) < 2 || tried.get(plot) === room) continue;
            tried.set(plot, room);
            window.dispatchEvent(new Event("resize"));
        }
    }
    export default {
        render({ el }) {
            let observer = null, sizes = null, ended = false;
            (function start() {
                if (ended) return;
                const root = el.closest(".demem-panel");
                if (!root) return void requestAnimationFrame(start);  // not in the page yet
                name(root);
                fit(root);
                observer = new MutationObserver(() => { name(root); fit(root); });
                observer.observe(root, { childList: true, subtree: true });
                sizes = new ResizeObserver(() => fit(root));
                sizes.observe(root);
            })();
            return () => { ended = true; observer?.disconnect(); sizes?.disconnect(); };
        }
    };
    """


class LiveFigure(go.FigureWidget):
    """A FigureWidget that is complete when the browser first hears of it.

    plotly's own announces itself empty and sends its data after that. On a busy machine the browser may draw in between, and
    such a figure stays empty (or at its first position): plotly's browser part does not draw data that come late. It follows
    the width of the page, too.
    """

    _complete = False

    def __init__(self, figure: go.Figure) -> None:
        super().__init__(figure)
        self._config = {**self._config, "responsive": True}  # else it keeps the width of the moment it was drawn in
        self._complete = True
        self.open()

    def open(self) -> None:
        """Announce the figure, once it has its data."""
        if self._complete:
            super().open()

    def catch_up(self) -> None:
        """Let views made from now on start with the present data: plotly gives them the first ones."""
        self._repr_mimebundle_()


class Panel:
    """Base of all panels: `controls` call `update`, and whatever goes wrong is shown in `readout`.

    Controls start where a panel of the same class and a control of the same name stood last in this session, if they can.
    """

    _held = False

    def __init__(self, controls: Sequence[widgets.Widget], boxes: Sequence[widgets.Widget], figure: go.Figure) -> None:
        self.figure, self.readout = figure, widgets.HTML()
        for control in controls:
            self._restore(control)
        self._changed(None)  # before the browser hears of the figure, so that it is drawn once
        self.figure = LiveFigure(self.figure)
        self.widget = named(widgets.VBox([*boxes, self.readout, self.figure]))
        for control in controls:
            control.observe(self._changed, names="value")

    def _restore(self, control: widgets.Widget) -> None:
        place = (type(self).__name__, control.description)
        if place in _positions and _can_stand_at(control, _positions[place]):
            control.value = _positions[place]
        control.observe(lambda change: _positions.update({place: change["new"]}), names="value")

    def update(self) -> str:
        """Bring the figure in line with the controls; returns the read-out as HTML."""
        raise NotImplementedError

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, controls move without drawing: for one that moves others, after which everything is drawn once."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    def _changed(self, _) -> None:
        if self._held:
            return
        with self.figure.batch_update():  # so that the words are sent first: drawing takes the browser a while
            try:
                text = self.update()
            except Exception as error:  # shown to the reader: a panel that silently keeps the old picture would be a lie
                text = f'<b style="color:#a31515">{html.escape(type(error).__name__)}: {html.escape(str(error))}</b>'
            self.readout.value = f'<div role="status" aria-live="polite" style="font-size:15px;line-height:1.5">{text}</div>'

    def _ipython_display_(self) -> None:
        self.figure.catch_up()
        display(self.widget)


class Prediction:
    """Commit to a number before the result is shown; afterwards both stand side by side. step: 1 where one counts.

    Where nobody is watching (DEMEM_HEADLESS=1) it answers itself with the middle of the range, and says so.
    """

    def __init__(self, question: str, *, low: float, high: float, unit: str = "", step: float | None = None) -> None:
        finite("low", low)
        finite("high", high, low=low)
        self.question, self.unit = question, unit
        self.headless = os.environ.get("DEMEM_HEADLESS") == "1"
        self.committed = False
        middle = (low + high) / 2 if step is None else low + step * ((high - low) / step // 2)
        self.slider, box = number("your guess", low, high, middle, step=step or (high - low) / 100)
        self.button = widgets.Button(description="commit", tooltip="lock this guess in", button_style="primary")
        self.button.on_click(self._commit)
        self.widget = named(
            widgets.VBox([widgets.HTML(f"<b>{html.escape(question)}</b>"), widgets.HBox([box, self.button])])
        )

    @property
    def value(self) -> float:
        """The guess as it stands."""
        return float(self.slider.value)

    def compare(self, truth: float) -> str:
        """One sentence with guess and truth."""
        how = "Nobody was asked, so the middle stands in" if self.headless else "You did not commit; the slider stood at"
        start = "You guessed" if self.committed else how
        off, away = abs(self.value - truth), " points" if self.unit == " %" else self.unit
        return f"{start}: {self.value:.3g}{self.unit}. Measured: {truth:.3g}{self.unit}, {off:.2g}{away} away."

    def _commit(self, _) -> None:
        self.committed, self.slider.disabled, self.button.disabled = True, True, True
        self.button.description = "committed"

    def _ipython_display_(self) -> None:
        if self.headless:
            print(f"{self.question} (nobody is watching: {self.value:.3g}{self.unit})")
        else:
            display(self.widget)


def say(text: str, width: int = 64) -> None:
    """Print `text` in lines of at most `width` characters, the later ones indented by four; only words that are longer stick out.

    JupyterLab breaks longer lines in the middle of words; 64 characters is what a window of 1000 pixels leaves beside its file
    browser. Numbers in brackets at the end of a long text get a line of their own.
    """
    head, mark, tail = text.rpartition(" (")
    numbers = mark and text.endswith(")") and re.match(r"[+-]?\d", tail)
    parts = [head, tail[:-1]] if numbers and len(text) > width else [text]
    for number, part in enumerate(parts):
        first = "    " if number else ""
        print(textwrap.fill(part, width, initial_indent=first, subsequent_indent="    ", break_long_words=False,
                            break_on_hyphens=False))


def named(box: widgets.Box) -> widgets.Box:
    """The same box, in which every control has a name for screen readers."""
    box.children = (*box.children, Names())
    box.add_class("demem-panel")
    return box


def number(name: str, low: float, high: float, value: float, *, step: float) -> tuple[widgets.FloatSlider, widgets.HBox]:
    """A slider for a number and the row that shows it, with a number box beside it; both hold the same value."""
    slider = widgets.FloatSlider(
        value=value, min=low, max=high, step=step, description=name, continuous_update=False, readout=False,
        style={"description_width": "130px"}, layout={"width": "460px"}, tooltip=name,
    )
    box = widgets.BoundedFloatText(
        value=value, min=low, max=high, step=step, description="=", tooltip=f"{name} as a number",
        style={"description_width": "12px"}, layout={"width": "130px"},
    )
    # browsers send 0.19799999999999995 for 0.198, which no box has room for
    widgets.link((slider, "value"), (box, "value"), transform=(lambda v: float(f"{v:.10g}"), lambda v: v))
    return slider, _row(slider, box)


def whole(name: str, low: int, high: int, value: int) -> tuple[widgets.IntSlider, widgets.HBox]:
    """The same for a whole number."""
    slider = widgets.IntSlider(
        value=value, min=low, max=high, description=name, continuous_update=False, readout=False,
        style={"description_width": "130px"}, layout={"width": "460px"}, tooltip=name,
    )
    box = widgets.BoundedIntText(
        value=value, min=low, max=high, description="=", tooltip=f"{name} as a number",
        style={"description_width": "12px"}, layout={"width": "130px"},
    )
    widgets.link((slider, "value"), (box, "value"))
    return slider, _row(slider, box)


def _row(slider: widgets.Widget, box: widgets.Widget) -> widgets.HBox:
    row = widgets.HBox([slider, box])
    row.add_class("demem-control")
    return row


def _can_stand_at(control: widgets.Widget, value: object) -> bool:
    if isinstance(control, (widgets.Dropdown, widgets.ToggleButtons, widgets.RadioButtons, widgets.Select)):
        return value in control.options or value in [option[-1] for option in control.options if isinstance(option, tuple)]
    if hasattr(control, "min"):
        return control.min <= value <= control.max
    return isinstance(value, type(control.value))
