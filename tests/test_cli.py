import json
import subprocess
import sys

import nbformat
import pytest
from typer.testing import CliRunner

from demem_lab import cli, runner

command = CliRunner()
PARAMETERS = 'profile: str = ""  # {"", "smoke"} which\nn: int = 3  # [1, 10] how many'


def write(path, *cells):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in (PARAMETERS, *cells)])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, path)
    return path


def call(*arguments):
    return command.invoke(cli.app, [str(a) for a in arguments])


def test_a_good_run_leaves_notebook_report_and_table(tmp_path):
    path = write(tmp_path / "a.ipynb", "print(n)")
    result = call("run", path, "-p", "n=5", "--profile", "smoke", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "a.ipynb").exists() and (tmp_path / "out" / "index.html").exists()
    row = json.loads((tmp_path / "out" / "table.json").read_text())[0]
    assert row["error"] == "" and row["seconds"] > 0 and row["peak_mb"] > 0
    assert "| a.ipynb |" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize(("arguments", "words"), [
    (("-p", "m=5"), ("no parameter 'm'", "parameters:", "n: int = 3")), (("-p", "n=11"), ("[1, 10]", "got '11'")),
    (("-p", "n"), ("name=value",)), (("-p", "n", "5"), ("name=value", "'n'")), (("--profile", "huge"), ("'smoke'",)),
])
def test_bad_parameters_stop_before_anything_runs(tmp_path, arguments, words):
    path = write(tmp_path / "a.ipynb", "print(n)")
    result = call("run", path, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2 and all(word in result.output for word in words) and not (tmp_path / "out").exists()


def test_a_failing_cell_gives_status_1_and_the_rest_still_runs(tmp_path):
    bad, good = write(tmp_path / "bad.ipynb", "1 / 0"), write(tmp_path / "good.ipynb", "print('fine')")
    done = subprocess.run(
        [sys.executable, "-m", "demem_lab.cli", "run", str(bad), str(good), "--out", str(tmp_path / "out")],
        capture_output=True, text=True,
    )
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and "good.ipynb" in done.stdout
    assert "ZeroDivisionError" in (tmp_path / "out" / "index.html").read_text()


def test_over_budget_fails_a_tour_and_is_only_said_otherwise(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "a.ipynb", "import time; time.sleep(1)")
    monkeypatch.setattr(runner, "MEMORY_MB", 1)
    monkeypatch.setattr(cli, "_slowness", lambda: 1.0)
    assert cli.run_all([path], tmp_path / "out", {}, strict=True) == 1
    assert "over budget: a.ipynb: memory" in capsys.readouterr().err
    assert cli.run_all([path], tmp_path / "out", {}) == 0 and "over budget" in capsys.readouterr().err


def test_notebooks_by_number_and_unknown_ones(tmp_path):
    assert [p.name for p in cli.find("05")] == ["05_demem.ipynb"]
    result = call("run", "77")
    assert result.exit_code == 2 and "no notebook '77'" in result.output
    assert call("run", tmp_path / "missing.ipynb").exit_code == 2


def test_seconds_are_judged_at_the_speed_of_the_machine(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "a.ipynb", "import time; time.sleep(1)")
    monkeypatch.setattr(runner, "DEFAULT_SECONDS", 0.5)
    monkeypatch.setattr(cli, "_slowness", lambda: 1.0)
    assert cli.run_all([path], tmp_path / "out", {}, strict=True) == 1 and " s > 1 s (" in capsys.readouterr().err
    monkeypatch.setattr(cli, "_slowness", lambda: 100.0)
    assert cli.run_all([path], tmp_path / "out", {}, strict=True) == 0
    assert json.loads((tmp_path / "out" / "table.json").read_text())[0]["slowness"] == 100


def test_a_folder_that_cannot_be_written_is_said_first(tmp_path):
    (tmp_path / "file").write_text("x")
    result = call("run", write(tmp_path / "a.ipynb", "1"), "--out", tmp_path / "file" / "out")
    assert result.exit_code == 2 and "--out" in result.output and "Traceback" not in result.output


def test_a_cell_may_be_given_a_time_limit(tmp_path):
    result = call("run", write(tmp_path / "a.ipynb", "import time; time.sleep(60)"), "--timeout", 1, "--out", tmp_path / "out")
    assert result.exit_code == 1 and "longer than 1 s" in result.output


def test_help_names_the_commands():
    result = call("--help")
    assert result.exit_code == 0 and "run" in result.output and "tour" in result.output


@pytest.mark.parametrize("name", ["../..", ".", "", "images", "**", "**x", "../README.md", "/", "x.ipynb"])
def test_what_is_no_notebook_is_one_sentence(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.ipynb").mkdir()
    result = call("run", name, "--out", tmp_path / "out")
    assert result.exit_code == 2 and f"no notebook {name!r}" in result.output and "Traceback" not in result.output
