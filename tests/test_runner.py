"""The contract of the parameters cell, and tiny notebooks really executed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from demem_lab import runner
from demem_lab.runner import Parameter, ParameterError, Result, check, describe, parameters, run

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
CELL = """\
profile: str = ""  # {"", "smoke", "full"} how much
noise: float = 1.0  # [0, 100] noise std
count: int = 3  # [0, 10]
plane: bool = True  # {True, False} train it
note: str = "a # b"  # free text
free: float = 0.5
"""


def notebook(path, *cells, tagged=(CELL,), metadata=None):
    """A notebook with parameters cells and code cells."""
    first = [v4.new_code_cell(source, metadata={"tags": ["parameters"]}) for source in tagged]
    made = v4.new_notebook(cells=[v4.new_markdown_cell("# A question?"), *first, *map(v4.new_code_cell, cells)])
    kernel = {"name": "python3", "display_name": "p", "language": "python"}
    made.metadata.update({"kernelspec": kernel} | (metadata or {}))
    nbformat.write(made, path)
    return path


@pytest.fixture
def tiny(tmp_path):
    return notebook(tmp_path / "tiny.ipynb")


def test_a_parameters_cell_is_read(tiny):
    found = parameters(tiny)
    assert found["profile"] == Parameter("profile", "str", "", choices=("", "smoke", "full"), help="how much")
    assert found["noise"] == Parameter("noise", "float", 1.0, low=0, high=100, help="noise std")
    assert found["count"] == Parameter("count", "int", 3, low=0, high=10)
    assert found["plane"].choices == (True, False)
    assert (found["note"].default, found["note"].help) == ("a # b", "free text")
    assert found["free"].allowed == "any float" and found["free"].help == ""


@pytest.mark.parametrize(("name", "given", "value"), [
    ("noise", "2", 2.0), ("noise", 2, 2.0), ("noise", "1e1", 10.0), ("noise", 100, 100.0), ("count", "10", 10),
    ("count", 0, 0), ("plane", "false", False), ("plane", "True", True), ("plane", True, True), ("note", "1", "1"),
    ("profile", "smoke", "smoke"), ("profile", "", ""), ("note", "", ""), ("free", "-1e30", -1e30),
])
def test_values_get_their_type(tiny, name, given, value):
    found = check(tiny, {name: given})[name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(("name", "given", "words"), [
    ("noise", "loud", r"type float.*\[0, 100\]"), ("noise", -0.1, r"\[0, 100\]"),
    ("noise", "101", r"\[0, 100\], got '101'"), ("noise", "nan", "finite"), ("noise", float("inf"), "finite"),
    ("noise", True, "type float"), ("noise", None, "float"),
    ("count", "2.5", "type int"), ("count", 2.0, "type int"), ("count", True, "type int"), ("count", 11, r"\[0, 10\]"),
    ("plane", "yes", "type bool"), ("plane", 1, "type bool"), ("profile", "Smoke", "'', 'smoke', 'full'"),
    ("note", 1, "type str"), ("free", "nan", "finite"), ("nois", 1, "has no parameter 'nois'"),
])
def test_what_does_not_fit_is_refused_with_the_list(tiny, name, given, words):
    with pytest.raises(ParameterError, match=words) as caught:
        check(tiny, {name: given})
    for line in describe(parameters(tiny)).splitlines():
        assert line in str(caught.value)


def test_all_problems_are_told_at_once(tiny):
    with pytest.raises(ParameterError) as caught:
        check(tiny, {"noise": -1, "count": "x", "wrong": 1, "plane": True})
    assert all(word in str(caught.value) for word in ("noise must", "count must", "'wrong'"))
    assert "plane must" not in str(caught.value)


@pytest.mark.parametrize(("tagged", "words"), [
    ((), "0 cells tagged"), ((CELL, "x: int = 1"), "2 cells tagged"), (("x = 1",), "line 1.*'name: type = literal'"),
    (("x: int = 1\nimport os",), "line 2"), (("x: int",), "line 1"),
])
def test_notebooks_without_a_contract_are_refused(tmp_path, tagged, words):
    path = notebook(tmp_path / "n.ipynb", tagged=tagged)
    for call in (lambda: parameters(path), lambda: run(path, tmp_path / "out.ipynb")):
        with pytest.raises(ParameterError, match=words):
            call()
    assert not (tmp_path / "out.ipynb").exists()


@pytest.mark.parametrize("source", ["%matplotlib inline", "x: int = 3 * 4", "x: int = 1  # [0, inf] words", None])
def test_unreadable_contracts_are_refused_in_one_sentence(tmp_path, source):
    path = notebook(tmp_path / "n.ipynb", tagged=(source or "",))
    if source is None:
        path.write_text("not a notebook")
    with pytest.raises(ParameterError, match="n.ipynb"):
        parameters(path)


WORK = """\
import os, numpy as np
from demem_lab.store import Store
store = Store()
for key in (1, 2, 1, 1):
    store.compute("test", key, lambda: {"x": np.zeros(2)})
print(profile, noise, count, plane, note, os.environ["DEMEM_HEADLESS"], os.getcwd())
"""


def printed(path):
    cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    return "".join(o.text for c in cells for o in c.outputs if o.output_type == "stream" and o.name == "stdout")


def test_a_notebook_is_executed_and_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("DEMEM_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("DEMEM_HEADLESS", raising=False)
    widgets = {"widgets": {"application/vnd.jupyter.widget-state+json": {"state": {"x": "y" * 1000}}}}
    (tmp_path / "in").mkdir()
    source = notebook(tmp_path / "in" / "05_made.ipynb", WORK, metadata=widgets)
    before, said = source.read_bytes(), []
    out = tmp_path / "deep" / "er" / "out.ipynb"
    result = run(source, out, {"noise": "2.5", "plane": "false", "note": 'it\'s "x"'}, say=said.append)
    assert result.error == "" and not result.over and result.notebook == "05_made.ipynb" and result.executed == out
    assert printed(out) == f" 2.5 3 False it's \"x\" 1 {tmp_path / 'in'}\n"
    assert (result.computed, result.reused) == (2, 2)
    assert result.seconds > 0 and 10 < result.peak_mb < 3000 and result.size_mb == out.stat().st_size / 1e6
    assert "widgets" not in nbformat.read(out, 4).metadata and source.read_bytes() == before
    assert said and all(line.startswith("cell ") and " of 3, " in line for line in said)
    assert "DEMEM_HEADLESS" not in os.environ and "DEMEM_STORE_LOG" not in os.environ
    again = run(source, out)
    assert (again.computed, again.reused) == (0, 4) and "True a # b 1" in printed(out)


def test_a_failing_cell_is_reported_and_the_rest_kept(tmp_path):
    source = notebook(tmp_path / "n.ipynb", "print('before')", "raise KeyError('planted')", "print('after')")
    result = run(source, tmp_path / "out.ipynb")
    assert result.error == "cell [3]: KeyError: 'planted'"  # [1] is the parameters cell
    assert printed(result.executed) == "before\n"
    outputs = [o for c in nbformat.read(result.executed, 4).cells for o in c.get("outputs", [])]
    assert [o.ename for o in outputs if o.output_type == "error"] == ["KeyError"]


def test_a_kernel_that_dies_is_reported_too(tmp_path):
    source = notebook(tmp_path / "n.ipynb", "print('before')", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "1")
    result = run(source, tmp_path / "out.ipynb")
    assert result.error.startswith("cell [3]: Kernel died") and " MB" in result.error and printed(result.executed) == "before\n"


def test_a_cell_that_hangs_is_stopped_when_asked(tmp_path):
    source = notebook(tmp_path / "n.ipynb", "print('before')", "import time; time.sleep(60)", "print('after')")
    result = run(source, tmp_path / "out.ipynb", timeout=1)
    assert result.error == "cell [3]: it took longer than 1 s" and result.seconds < 30
    assert printed(result.executed) == "before\n"


def test_a_kernel_that_never_starts_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(runner.sys, "executable", "/bin/false")
    result = run(notebook(tmp_path / "n.ipynb", "1"), tmp_path / "out.ipynb")
    assert "ernel" in result.error and result.computed == 0


def test_plain_papermill_works_too(tmp_path):
    source, out = notebook(tmp_path / "n.ipynb", "print(noise * 2, note)"), tmp_path / "out.ipynb"
    command = [sys.executable, "-m", "papermill", str(source), str(out), "-p", "noise", "4.0", "-k", "python3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert printed(out) == "8.0 a # b\n"


@pytest.mark.parametrize(("seconds", "peak", "size", "slowness", "over"), [
    (359, 1499, 1.9, 1.0, []), (1, 1501, 1.9, 1.0, ["memory 1501 MB > 1500 MB"]), (1, 10, 2.1, 1.0, ["size 2.1 MB > 2.0 MB"]),
    (361, 10, 1, 1.0, ["361 s > 360 s (1.5 x 240 s, on a machine that takes 1.0 times as long as the reference)"]),
    (361, 10, 1, 0.5, ["361 s > 360 s (1.5 x 240 s, on a machine that takes 1.0 times as long as the reference)"]),
    (719, 10, 1, 2.0, []),
    (721, 10, 1, 2.0, ["721 s > 720 s (1.5 x 240 s, on a machine that takes 2.0 times as long as the reference)"]),
])
def test_budgets_of_memory_size_and_seconds(tmp_path, seconds, peak, size, slowness, over):
    result = Result("05_x.ipynb", tmp_path, seconds, peak, "PSS", size, 0, 0, slowness=slowness)
    assert result.over == over and result.budget_seconds == 240
    assert Result("04_x.ipynb", tmp_path, 1.0, peak, "PSS", size, 0, 0).budget_seconds == 120


def test_the_kernel_is_the_python_that_runs_this(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    with runner._own_kernel() as name:
        first, second = os.environ["JUPYTER_PATH"].split(os.pathsep)
        spec = json.loads(open(f"{first}/kernels/{name}/kernel.json").read())
        assert spec["argv"][0] == sys.executable and second == str(tmp_path)
    assert os.environ["JUPYTER_PATH"] == str(tmp_path)


@pytest.mark.parametrize("name", ["", "none.ipynb"])
def test_a_folder_or_nothing_is_no_notebook(tmp_path, name):
    with pytest.raises(ParameterError, match="cannot be read: .*give the path of an .ipynb file"):
        parameters(tmp_path / name)


def test_notebooks_are_utf8_whatever_the_locale(tmp_path):
    cell = {"cell_type": "code", "metadata": {"papermill": {"status": "running"}}, "source": "# a ≤ b, naïve"}
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": [cell]}, ensure_ascii=False), encoding="utf-8")
    script = (
        "import sys, locale; from pathlib import Path; from demem_lab import runner\n"
        "assert 'utf' not in locale.getpreferredencoding(False).lower()\n"
        "with runner._watching(Path(sys.argv[1]), print): pass\n"
    )
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "n.ipynb")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "cell 1 of 1" in done.stdout, done.stderr


@pytest.mark.parametrize(("line", "is_path"), [
    ('file: str = ""  # your outputs: .npz; empty: ours', True), ('folder: str = ""', True),
    ('save: str = ""  # file for it', True), ('data_root: str = ""  # folder with the files', True),
    ('note: str = ""  # words', False), ("file: int = 1", False),
    ('file: str = ""  # {"", "a"} which', False), ('profile: str = ""  # the profile\'s', False),
])
def test_paths_are_taken_from_where_the_caller_is(tmp_path, monkeypatch, line, is_path):
    path = notebook(tmp_path / "n.ipynb", tagged=(line,))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    (parameter,) = parameters(path).values()
    assert parameter.is_path == is_path
    if is_path:
        for given, wanted in (("a.npz", tmp_path / "a.npz"), ("", ""), ("/b/c", "/b/c"), ("~/a", "/home/me/a")):
            assert check(path, {parameter.name: given}) == {parameter.name: str(wanted)}


def test_the_notebooks_paths_are_known():
    found = {p.name for path in NOTEBOOKS for p in parameters(path).values() if p.is_path}
    assert found == {"data_root", "file", "folder", "save"}


def test_a_notebook_is_not_executed_into_itself(tiny):
    before = tiny.read_bytes()
    with pytest.raises(ParameterError, match="would overwrite .*tiny.ipynb itself"):
        run(tiny, tiny.parent / "." / tiny.name)
    assert tiny.read_bytes() == before
