"""What every panel is made of: named controls with a number box each, one figure, a read-out in words; and predictions.

An error in a callback appears in the read-out, not in a log that nobody sees.

>>> slider, row = number("noise multiplier", 0.0, 3.0, 1.0, step=0.05)
>>> slider.value
1.0
"""

from __future__ import annotations

import html
import os
from collections.abc import Sequence

import ipywidgets as widgets
import plotly.graph_objects as go
from IPython.display import display

from demem_lab.validate import finite


class Panel:
    """Base of all panels: `controls` call `update`, and whatever goes wrong is shown in `readout`."""

    def __init__(self, controls: Sequence[widgets.Widget], boxes: Sequence[widgets.Widget], figure: go.Figure) -> None:
        self.figure = go.FigureWidget(figure)
        self.readout = widgets.HTML()
        self.widget = widgets.VBox([*boxes, self.readout, self.figure])
        for control in controls:
            control.observe(self._changed, names="value")
        self._changed(None)

    def update(self) -> str:
        """Bring the figure in line with the controls; returns the read-out as HTML."""
        raise NotImplementedError

    def _changed(self, _) -> None:
        try:
            text = self.update()
        except Exception as error:  # shown to the reader: a panel that silently keeps the old picture would be a lie
            text = f'<b style="color:#a31515">{html.escape(type(error).__name__)}: {html.escape(str(error))}</b>'
        self.readout.value = f'<div role="status" aria-live="polite">{text}</div>'

    def _ipython_display_(self) -> None:
        display(self.widget)


class Prediction:
    """Commit to a number before the result is shown; afterwards both stand side by side.

    Where nobody is watching (DEMEM_HEADLESS=1) it answers itself with the middle of the range, and says so.
    """

    def __init__(self, question: str, *, low: float, high: float, unit: str = "") -> None:
        finite("low", low)
        finite("high", high, low=low)
        self.question, self.unit = question, unit
        self.headless = os.environ.get("DEMEM_HEADLESS") == "1"
        self.committed = False
        self.slider, box = number("your guess", low, high, (low + high) / 2, step=(high - low) / 100)
        self.button = widgets.Button(description="commit", tooltip="lock this guess in", button_style="primary")
        self.button.on_click(self._commit)
        self.widget = widgets.VBox([widgets.HTML(f"<b>{html.escape(question)}</b>"), widgets.HBox([box, self.button])])

    @property
    def value(self) -> float:
        """The guess as it stands."""
        return float(self.slider.value)

    def compare(self, truth: float) -> str:
        """One sentence with guess and truth."""
        how = "Nobody was asked, so the middle stands in" if self.headless else "You did not commit; the slider stood at"
        start = "You guessed" if self.committed else how
        off = abs(self.value - truth)
        return f"{start}: {self.value:.3g}{self.unit}. Measured: {truth:.3g}{self.unit}, {off:.2g}{self.unit} away."

    def _commit(self, _) -> None:
        self.committed, self.slider.disabled, self.button.disabled = True, True, True
        self.button.description = "committed"

    def _ipython_display_(self) -> None:
        if self.headless:
            print(f"{self.question} (nobody is watching: {self.value:.3g}{self.unit})")
        else:
            display(self.widget)


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
    widgets.link((slider, "value"), (box, "value"))
    return slider, widgets.HBox([slider, box])


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
    return slider, widgets.HBox([slider, box])
