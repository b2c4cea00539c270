import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import numpy as np
import pytest
from typer.testing import CliRunner

from demem_lab import cli, runner
from demem_lab.audit import audit
from demem_lab.files import write as write_outputs
from demem_lab.report import AuditReport

command = CliRunner()
PARAMETERS = 'profile: str = ""  # {"", "smoke"} which\nn: int = 3  # [1, 10] how many'


@pytest.fixture(autouse=True)
def no_profile(monkeypatch):
    monkeypatch.setenv("DEMEM_PROFILE", "")  # so that what a command sets is undone
    monkeypatch.delenv("DEMEM_PROFILE")


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


def test_the_source_is_not_overwritten(tmp_path):
    path = write(tmp_path / "a.ipynb", "print(n)")
    before = path.read_bytes()
    result = call("run", path, "--out", tmp_path)
    assert result.exit_code == 2 and "would overwrite" in result.output and "--out" in result.output
    assert path.read_bytes() == before and not (tmp_path / "index.html").exists()


@pytest.mark.parametrize("arguments", [("-p", "profile=", "--profile", "smoke"), ("-p", "n=1", "-p", "n=2")])
def test_two_values_for_one_parameter_are_refused(tmp_path, arguments):
    result = call("run", write(tmp_path / "a.ipynb", "1"), *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "give it once" in result.output and not (tmp_path / "out").exists()


def test_the_variable_for_the_profile_is_checked_like_the_option(tmp_path, monkeypatch):
    monkeypatch.setenv("DEMEM_PROFILE", "huge")
    path = write(tmp_path / "a.ipynb", "1")
    result = call("run", path, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "DEMEM_PROFILE" in result.output and "'smoke'" in result.output
    assert call("run", path, "--profile", "smoke", "--out", tmp_path / "out").exit_code == 0


def test_paths_are_meant_from_where_the_command_is_given(tmp_path, monkeypatch):
    for folder in ("in", "here"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("DEMEM_STORE", "kept")
    monkeypatch.setenv("DEMEM_DATA", "pictures")
    told = 'import os\nfrom demem_lab.store import Store\nprint(Store().root, os.environ["DEMEM_DATA"])'
    path = write(tmp_path / "in" / "a.ipynb", told)
    assert call("run", path, "--out", "out").exit_code == 0
    cells = nbformat.read(tmp_path / "here" / "out" / "a.ipynb", 4).cells
    assert cells[-1].outputs[0].text == f"{tmp_path}/here/kept {tmp_path}/here/pictures\n"


def test_a_store_that_is_a_file_is_said_first(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("DEMEM_STORE", str(tmp_path / "file"))
    result = call("run", write(tmp_path / "a.ipynb", "1"), "--out", tmp_path / "out")
    assert result.exit_code == 2 and f"cannot be kept in {tmp_path / 'file'} (it is a file); set DEMEM_STORE" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["papermill.execute_notebook", "demem_lab.runner._strip_widget_state", "shutil.copytree"])
def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch, place):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    path = write(tmp_path / "a.ipynb", "1")
    (tmp_path / "images").mkdir()
    monkeypatch.setattr(place, full)
    result = call("run", path, "--out", tmp_path / "out")
    assert result.exit_code == 1 and "cannot be written (No space left on device); make room" in result.output
    assert "Traceback" not in result.output and isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("content", ["{}", '{"cells": 3}', '{"nbformat": 4, "nbformat_minor": 5}', "[]"])
def test_a_broken_notebook_is_one_sentence(tmp_path, content):
    (tmp_path / "a.ipynb").write_text(content)
    result = call("run", tmp_path / "a.ipynb", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "a.ipynb" in result.output and isinstance(result.exception, SystemExit)


def test_ctrl_c_leaves_a_report_of_what_is_finished(tmp_path):
    paths = [write(tmp_path / "a.ipynb", "print(n)"), write(tmp_path / "b.ipynb", "import time; time.sleep(60)")]
    run = subprocess.Popen(
        [sys.executable, "-m", "demem_lab.cli", "run", *map(str, paths), "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests that run in the background ignore it
    )
    while run.poll() is None and not in_its_last_cell(tmp_path / "out" / "b.ipynb"):
        time.sleep(0.2)
    os.killpg(run.pid, signal.SIGINT)
    said, noise = run.communicate(timeout=60)
    assert run.returncode == 130 and noise.startswith("demem-lab: interrupted; what was computed is kept in "), noise
    assert noise.endswith(", run again to go on\n") and noise.count("\n") == 1 and "1 notebooks in" in said
    assert (tmp_path / "out" / "index.html").is_file()
    assert [row["notebook"] for row in json.loads((tmp_path / "out" / "table.json").read_text())] == ["a.ipynb"]


def in_its_last_cell(path):
    try:
        return json.loads(path.read_text())["cells"][-1]["metadata"].get("papermill", {}).get("status") == "running"
    except (OSError, ValueError):
        return False  # not written yet, or being written just now


def outputs(n=600, seed=0):
    rng, arrays = np.random.default_rng(seed), {}
    for side in ("member", "nonmember"):
        arrays |= {f"{side}_logits": rng.normal(size=(n, 3)), f"{side}_labels": rng.integers(0, 3, n)}
    return arrays


@pytest.mark.parametrize(("arguments", "words"), [
    (("x.npz", "--html", "x.npz"), "--html x.npz would overwrite the outputs that it reports on"),
    (("x.npz", "--json", "./here/../x.npz"), "would overwrite the outputs"), (("x.npz", "--html", "link.npz"), "would overwrite"),
    (("folder", "--json", "folder/member_logits.npy"), "would overwrite the outputs"),
    (("x.npz", "--html", "a", "--json", "./a"), "--html and --json both name a"),
    (("x.npz", "--html", "here"), "--html here cannot be written, for it is a folder"),
])
def test_a_report_is_not_written_over_its_input_or_the_other(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "folder").mkdir()
    for name, a in outputs().items():
        np.save(tmp_path / "folder" / f"{name}.npy", a)
    path = write_outputs(tmp_path / "x.npz", outputs())
    (tmp_path / "link.npz").symlink_to(path)
    before = path.read_bytes()
    result = call("report", *arguments)
    assert result.exit_code == 2 and words in result.output and "strongest" not in result.output  # said before the audit
    assert path.read_bytes() == before and not (tmp_path / "a").exists()


def test_a_full_disk_leaves_the_old_report(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = write_outputs(tmp_path / "x.npz", outputs())
    report = audit(outputs(), fprs=(0.1,))
    for target in ("a.html", "a.json"):
        (tmp_path / target).write_text("old")
    before = sorted(file.name for file in tmp_path.iterdir())
    monkeypatch.setattr(os, "fsync", full)
    result = call("report", path, "--html", tmp_path / "a.html", "--fpr", 0.1)
    assert result.exit_code == 2 and "a.html cannot be written: No space left on device" in result.output
    with pytest.raises(OSError, match="No space left"):
        report.save(tmp_path / "a.json")
    assert sorted(file.name for file in tmp_path.iterdir()) == before
    assert {(tmp_path / target).read_text() for target in ("a.html", "a.json")} == {"old"}


def test_what_a_report_assumes_can_be_said(tmp_path):
    path = write_outputs(tmp_path / "x.npz", outputs())
    result = call("report", path, "--fpr", 0.1)
    assert "independent_coins=True, on the command line --independent-coins" in result.output
    options = ("--independent-coins", "--delta", 1e-3, "--prior", 0.1)
    result = call("report", path, "--fpr", 0.1, *options, "--json", tmp_path / "a.json")
    report = AuditReport.load(tmp_path / "a.json")
    assert report.empirical["delta"] == 1e-3 and report.obtained["prior"] == 0.1 and "independent_coins" not in result.output
    assert f"\n  {report.empirical['text']}\n" in result.output and "epsilon" in report.empirical["text"]
    for option in ("--delta", "--prior"):
        result = call("report", path, "--fpr", 0.1, "--independent-coins", option, 2)
        assert result.exit_code == 2 and option[2:] in result.output and "got 2.0" in result.output, result.output


def test_several_reports_in_one_file_are_named(tmp_path):
    paths = [write_outputs(tmp_path / f"{name}.npz", outputs()) for name in "ab"]
    assert call("report", *paths, "--fpr", 0.1, "--json", tmp_path / "both.json").exit_code == 0
    with pytest.raises(ValueError, match='several, under the key "reports": a.npz, b.npz; write each with a --json of its own'):
        AuditReport.load(tmp_path / "both.json")
