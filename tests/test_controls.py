"""What panels are made of: names for all, positions that last, errors that are seen."""

import ipywidgets as widgets
import plotly.graph_objects as go
import pytest

from demem_lab import controls
from demem_lab.controls import Names, Panel, Prediction, number, say, whole


class Made(Panel):
    def __init__(self, high=10.0, options=("a", "b")):
        self.amount, first = number("amount", 0.0, high, 1.0, step=0.5)
        self.count, second = whole("count", 0, 5, 2)
        self.kind = widgets.Dropdown(options=options, description="kind")
        super().__init__((self.amount, self.count, self.kind), (first, second, self.kind), go.Figure(go.Scatter(x=[0], y=[0])))

    def update(self):
        if self.amount.value == 7.0:
            raise ValueError("seven <is> refused")
        self.figure.data[0].y = [self.amount.value]
        return f"{self.kind.value} {self.count.value} {self.amount.value:g}"


class Other(Made):
    """Another kind of panel with controls of the same names."""


@pytest.fixture(autouse=True)
def fresh_session(monkeypatch):
    monkeypatch.setattr(controls, "_positions", {})


def test_the_cell_run_again_stands_where_it_stood():
    first = Made()
    first.amount.value, first.count.value, first.kind.value = 4.5, 3, "b"
    again = Made()
    assert (again.amount.value, again.count.value, again.kind.value) == (4.5, 3, "b")
    assert again.figure.data[0].y == (4.5,) and "b 3 4.5" in again.readout.value
    assert Other().amount.value == 1.0


def test_a_position_that_is_no_longer_there_is_not_forced():
    first = Made()
    first.amount.value, first.kind.value = 9.0, "b"
    again = Made(high=5.0, options=("a", "c"))
    assert (again.amount.value, again.kind.value) == (1.0, "a")


def test_options_with_labels_are_restored_by_value():
    pairs = [("first", 1), ("second", 2)]
    Made(options=pairs).kind.value = 2
    assert Made(options=pairs).kind.value == 2


def test_slider_and_box_hold_the_same_value():
    panel = Made()
    slider, box = panel.widget.children[0].children
    box.value = 3.5
    assert slider.value == 3.5 and panel.figure.data[0].y == (3.5,)
    assert "demem-control" in panel.widget.children[0]._dom_classes


def test_an_error_is_seen_and_gone_when_it_is_over():
    panel = Made()
    panel.amount.value = 7.0
    assert "seven &lt;is&gt; refused" in panel.readout.value and "<is>" not in panel.readout.value
    panel.amount.value = 6.0
    assert "refused" not in panel.readout.value and 'role="status"' in panel.readout.value


def test_every_panel_and_prediction_is_named():
    for box in (Made().widget, controls.Prediction("How many?", low=0, high=1).widget):
        assert isinstance(box.children[-1], Names) and "demem-panel" in box._dom_classes


def test_a_prediction_waits_for_people_and_not_for_machines(monkeypatch, capsys):
    monkeypatch.setenv("DEMEM_HEADLESS", "1")
    alone = Prediction("How many?", low=0, high=10, unit=" %")
    alone._ipython_display_()
    assert "nobody is watching: 5 %" in capsys.readouterr().out and "Nobody was asked" in alone.compare(7.0)
    monkeypatch.delenv("DEMEM_HEADLESS")
    asked = Prediction("How many?", low=0, high=10)
    assert "did not commit" in asked.compare(7.0)
    asked.slider.value = 6.0
    asked.button.click()
    assert asked.committed and asked.slider.disabled and "You guessed: 6. Measured: 7, 1 away" in asked.compare(7.0)
    with pytest.raises(ValueError, match="high"):
        Prediction("?", low=1, high=0)


def test_a_number_box_shows_what_was_meant():
    slider, row = number("risk threshold", -1.0, 1.0, 0.5, step=0.003)
    slider.value = 0.19799999999999995
    assert row.children[1].value == 0.198 and abs(slider.value - 0.198) < 1e-12
    row.children[1].value = 0.123456789
    assert slider.value == 0.123456789


def test_per_cent_are_points_apart():
    said = Prediction("How many?", low=0, high=10, unit=" %").compare(6.5)
    assert "Measured: 6.5 %, 1.5 points away" in said


def test_where_one_counts_the_guess_is_a_whole_number():
    guess = Prediction("How many of five?", low=0, high=5, step=1)
    assert guess.slider.step == 1 and guess.value == 2
    assert Prediction("How many?", low=0, high=5).value == 2.5


def test_the_browser_hears_of_the_figure_with_its_data(monkeypatch):
    first = Made()
    first.amount.value = 4.5
    announced = []
    opened = go.FigureWidget.open
    monkeypatch.setattr(go.FigureWidget, "open", lambda self: announced.append(self.get_state()["_widget_data"]) or opened(self))
    Made()
    assert len(announced) == 1 and list(announced[0][0]["y"]) == [4.5]  # once, complete, and where it stood


def test_a_view_made_later_starts_where_the_panel_stands(monkeypatch):
    monkeypatch.setattr(controls, "display", lambda _: None)
    panel = Made()
    panel.amount.value = 6.5
    panel._ipython_display_()
    assert list(panel.figure.get_state()["_widget_data"][0]["y"]) == [6.5]


def test_a_control_may_move_others_and_draw_once():
    panel = Made()
    drawn = []
    panel.update = lambda: drawn.append(panel.amount.value) or ""
    with panel.held():
        panel.amount.value, panel.count.value = 2.0, 4
    assert drawn == []
    panel.amount.value = 3.0
    assert drawn == [3.0]


def test_long_lines_break_between_words_and_numbers_stay_together(capsys):
    say("HOLDS: short (+1.0 points, 3 seeds)")
    assert capsys.readouterr().out == "HOLDS: short (+1.0 points, 3 seeds)\n"
    claim = "HOLDS: a claim that leaves no room (at all) for its own numbers"
    say(f"{claim} (+1.0 points, 95 % interval +0.5 to +1.5, 3 seeds)")
    assert capsys.readouterr().out == f"{claim}\n    +1.0 points, 95 % interval +0.5 to +1.5, 3 seeds\n"
    say(f"lowers the leak of {'PGD-AT (digits), ' * 5}TRADES (fashion_mnist)")
    assert "TRADES (fashion_mnist)\n" in capsys.readouterr().out.replace("\n    ", " ")  # a name, not numbers
    say(f"note: {'word ' * 40}x")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 2 and max(map(len, lines)) <= 64 and all(line.startswith("    word") for line in lines[1:])
    assert " ".join(line.strip() for line in lines) == f"note: {'word ' * 40}x"


def test_the_words_are_sent_before_the_figure(monkeypatch):
    panel, sent = Made(), []
    panel.readout.observe(lambda change: sent.append("words"), names="value")
    monkeypatch.setattr(panel.figure, "_send_update_msg", lambda *_, **__: sent.append("figure"))
    panel.amount.value = 5.0
    assert sent == ["words", "figure"]
