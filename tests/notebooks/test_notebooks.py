"""All notebooks run, headless and cell by cell; the contract notebook never changes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from demem_lab import runner, site

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0[0-8]_*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Every notebook executed at `smoke`, in order, sharing one store."""
    out = tmp_path_factory.mktemp("executed")
    return {path.stem: runner.run(path, out / path.name, {"profile": "smoke"}) for path in NOTEBOOKS}


def test_there_are_nine():
    assert [name[:2] for name in NAMES] == ["00", "01", "02", "03", "04", "05", "06", "07", "08"]


@pytest.mark.parametrize("name", NAMES)
def test_runs_headless_with_every_cell_really_executed(executed, name):
    result = executed[name]
    assert result.error == "" and not result.over
    cells = [c for c in nbformat.read(result.executed, 4).cells if c.cell_type == "code" and c.source.strip()]
    assert len(cells) > 8 and all(c.execution_count for c in cells)
    printed = "".join(o.text for c in cells for o in c.outputs if o.output_type == "stream" and o.name == "stdout")
    assert 2 <= printed.count("not solved yet") <= 4
    assert result.executed.stat().st_size < 3e6
    figures = [o for c in cells for o in c.outputs if "application/vnd.plotly.v1+json" in o.get("data", {})]
    assert figures, "every notebook leaves a static figure"


def test_later_notebooks_read_the_rows_of_earlier_ones(executed):
    assert executed["03_who_is_at_risk"].reused >= 3 and executed["05_demem"].reused > executed["05_demem"].computed


def test_one_page_holds_all_of_it(executed, tmp_path):
    page = site.write(tmp_path / "index.html", list(executed.values()), title="all", intro="all").read_text()
    figures = sum(
        "application/vnd.plotly.v1+json" in o.get("data", {})
        for r in executed.values() for c in nbformat.read(r.executed, 4).cells if c.cell_type == "code" for o in c.outputs
    )
    assert figures > 15 and len(re.findall(r'<div id="figure-', page)) == figures


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_every_notebook_is_built_alike(path):
    cells = nbformat.read(path, 4).cells
    assert cells[0].source.startswith("# ") and "?" in cells[0].source.splitlines()[0] and "**Time:**" in cells[0].source
    assert "google.colab" in cells[1].source and cells[2].metadata["tags"] == ["parameters"]
    prose = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    for word in ("## A prediction", "## Exercises", "<summary>Hint</summary>", "**Shown:**", "**How sure:**", "**Not shown:**"):
        assert word in prose
    code = [c.source for c in cells if c.cell_type == "code"]
    assert any(s.startswith("assert ") for s in code) and max(len(s.splitlines()) for s in code) <= 20
    assert max(len(line) for s in code for line in s.splitlines()) <= 120  # longer lines are cut off in JupyterLab
    for parameter in runner.parameters(path).values():
        assert parameter.help or parameter.choices or parameter.low is not None
        if parameter.type in ("int", "float"):
            assert parameter.low is not None


def pytest_on_notebooks(*arguments):
    environment = os.environ | {"DEMEM_PROFILE": "smoke", "DEMEM_HEADLESS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


def test_nbval_runs_every_notebook_cell_by_cell(executed):
    found = pytest_on_notebooks("--nbval-lax", "--nbval-cell-timeout=300", *NOTEBOOKS)
    assert found.returncode == 0, found.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", found.stdout)[1]) > 80


def test_the_contract_notebook_gives_exactly_what_it_gave():
    found = pytest_on_notebooks("--nbval", Path(__file__).with_name("contract.ipynb"))
    assert found.returncode == 0, found.stdout[-3000:]
