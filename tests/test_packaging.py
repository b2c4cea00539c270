"""The house: one list of dependencies, modules that only look up, and nothing committed that should not be."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

import demem_lab
from demem_lab import budgets, experiment, protocol, recipe, remedies  # noqa: F401 - mechanisms show themselves when imported
from demem_lab.mechanisms import Mechanism
from demem_lab.objectives import _OneByOne

ROOT = Path(__file__).parents[1]
ORDER = """
validate
intervals
streams
bytecode
store
data
augment
precision
triton_norm
kernels
layers
replay
networks
folded
models
losses
attacks
objectives
accounting
guarantees
empirical
mechanisms
budgets
remedies
sampling
optimizers
live
recipe
state
farm
chunks
training
pairs
queries
canaries
signals
membership
leakage
outputs
limits
files
risk
tables
experiment
comparison
matched
sweep
results
protocol
estimate
plots
answers
sketches
views_risk
views_privacy
words_privacy
controls
panels_risk
panels_privacy
grading
solutions
mistakes_privacy
mistakes
checks
lessons
pages
doctor
runner
site
subject
report
audit
cli
""".split()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def tracked():
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in found.stdout.split("\n") if name and (ROOT / name).is_file()]


def names(requirements):
    return {re.split(r"[<>=!~\[ ;]", text)[0].lower().replace("_", "-"): text for text in requirements}


@pytest.mark.parametrize(("file", "extras"), [
    ("environment.yml", sorted(set(PROJECT["optional-dependencies"]) - {"bench", "test"})),
    ("binder/environment.yml", ["attacks"]),  # one core and 2 GB: nothing to spread work over
])
def test_environments_are_in_step_with_pyproject(file, extras):
    content = yaml.safe_load((ROOT / file).read_text())
    listed = []
    for entry in content["dependencies"]:
        listed += entry["pip"] if isinstance(entry, dict) else [entry]
    wanted = names(PROJECT["dependencies"] + [r for extra in extras for r in PROJECT["optional-dependencies"][extra]])
    packages = [str(e).replace("pytorch", "torch") for e in listed if not str(e).startswith(("-", "python>", "python="))]
    assert sorted(p for p in packages if p != "pip") == sorted(wanted.values())
    python = next(str(e) for e in listed if str(e).startswith("python"))
    assert re.search(r"3\.1[123]", python)


def test_binder_takes_the_cpu_wheels_and_installs_the_package():
    assert "--extra-index-url https://download.pytorch.org/whl/cpu" in (ROOT / "binder/environment.yml").read_text()
    assert "pip install --no-deps" in (ROOT / "binder/postBuild").read_text()
    assert (ROOT / "binder/start").read_text().rstrip().endswith('exec "$@"')
    for script in ("postBuild", "start"):
        assert (ROOT / "binder" / script).stat().st_mode & 0o111


def test_the_two_commands():
    make = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", make, re.M) for target in ("tour", "lab", "test", "clean"))
    assert (ROOT / ".ci/run").read_text().strip().endswith("exec make test")
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    runs = [s["run"] for j in workflow["jobs"].values() for s in j["steps"] if "run" in s]
    assert runs == ["make test"]


def table():
    """The modules in the order of README's table."""
    rows = re.findall(r"^\| (`.*?`) \|", (ROOT / "README.md").read_text().split("| module | what it holds |")[1], re.M)
    return [name.strip("` ") for row in rows for name in row.split(",")]


@pytest.mark.parametrize("order", [ORDER, table()], ids=["list", "README"])
def test_modules_import_only_those_above_them(order):
    modules = {p.stem for p in (ROOT / "demem_lab").glob("*.py")} - {"__init__"}
    assert modules == set(order) and len(order) == len(set(order))
    for place, name in enumerate(order):
        tree = ast.parse((ROOT / "demem_lab" / f"{name}.py").read_text())
        assert ast.get_docstring(tree), name
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "demem_lab":
                used = [node.module.split(".")[1]] if "." in node.module else [a.name for a in node.names]
                late = [u for u in used if u in order and order.index(u) >= place]
                assert not late, f"{name} imports {late}"


def test_every_public_name_is_described():
    missing = []
    for name in ORDER:
        tree = ast.parse((ROOT / "demem_lab" / f"{name}.py").read_text())
        for node in tree.body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                missing.append(f"{name}.{node.name}")
    assert missing == []


def test_modules_hold_one_idea_each():
    long = {p.name: n for p in (ROOT / "demem_lab").glob("*.py") if (n := len(p.read_text().splitlines())) > 360}
    assert long == {}


def test_results_are_kept_under_the_source_of_every_module_that_decides_them():
    """What training or the tables reach by imports, but for modules that change no number."""
    used = {}
    for name in ORDER:
        tree = ast.parse((ROOT / "demem_lab" / f"{name}.py").read_text())
        froms = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").split(".")[0] == "demem_lab"]
        used[name] = {m for n in froms for m in ([n.module.split(".")[1]] if "." in n.module else [a.name for a in n.names])}
    bystanders = {
        "validate",  # only refuses
        "bytecode", "store", "farm", "live", "chunks", "training",  # where and when, and who looks on
        "accounting", "guarantees",  # what is promised, not what is trained
    }

    def reached(*start):
        found, todo = set(), list(start)
        while todo:
            name = todo.pop()
            if name not in found | bystanders:
                found.add(name)
                todo += used[name]
        return found

    # mechanisms and objectives come in from outside, so that no import names them
    treatments = {c.__module__.rpartition(".")[2] for base in (Mechanism, _OneByOne) for c in everything_below(base)}
    trained = reached("state", *(treatments & set(ORDER)))
    assert trained == set(recipe.MODULES)
    assert set(experiment.MODULES) == trained | {"queries", "experiment"}
    assert set(protocol.MODULES) == trained | {"queries", "protocol", "accounting", "guarantees"}  # the promise is kept in words


def everything_below(base):
    """All classes derived from it."""
    return {c for below in base.__subclasses__() for c in (below, *everything_below(below))}


def test_what_is_committed():
    host = re.compile(r"https?://[^/\s\"')]*(?:pypi|simple|mirror|artifactory)[^\s\"')]*")
    here = re.compile(r"/(?:work|root|tmp/bash)/")
    for path in tracked():
        if path.suffix in (".png", ".svg", ".jpg"):
            continue
        text = path.read_text(errors="replace")
        if path.name != Path(__file__).name:
            assert not here.search(text), path
            assert not host.search(text), path
        if path.suffix == ".ipynb" and "tests" not in path.parts:
            notebook = nbformat.read(path, 4)
            assert "widgets" not in notebook.metadata and len(text) < 200_000
            assert all(not c.outputs and c.execution_count is None for c in notebook.cells if c.cell_type == "code"), path


def test_torch_is_the_only_heavy_thing_that_gpu_code_needs():
    """Training and measuring import without notebook packages, so that they run on a bare GPU machine."""
    script = (
        "import sys\n"
        "for name in ('ipywidgets', 'plotly', 'papermill', 'jupyterlab', 'IPython', 'typer', 'nbformat'):\n"
        "    sys.modules[name] = None\n"
        "import demem_lab.experiment, demem_lab.comparison, demem_lab.sweep\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_citation_and_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == demem_lab.__version__ and citation["license"] == PROJECT["license"] == "MIT"
    paper = citation["references"][0]
    assert "2412.05767" in str(paper) and [a["family-names"] for a in paper["authors"]] == ["Luo", "Li"]
    assert "MIT License" in (ROOT / "LICENSE").read_text()
