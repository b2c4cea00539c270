"""Whole jobs: the plane behind the sliders, a slider's answer, imports, a kernel's first figure, the tour's notebooks."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import nbformat
from harness import Row, judged
from nbclient import NotebookClient

from demem_lab import queries, training
from demem_lab.experiment import profile
from demem_lab.mechanisms import SelectiveDP
from demem_lab.panels_privacy import DeMemPanel
from demem_lab.runner import DEFAULT_SECONDS, MEMORY_MB, SECONDS
from demem_lab.store import Store
from demem_lab.streams import model_seeds
from demem_lab.sweep import sweep

ROOT = Path(__file__).parent.parent
PLANE_SECONDS, ANSWER_SECONDS, IMPORT_SECONDS = 90, 0.2, 2.0


def share(job: str, shape: str, limit: str, seconds: list[float], allowed: float, note: str = "") -> Row:
    """A row of seconds as a share of what is allowed."""
    return judged(
        job, shape, limit, [s / allowed for s in seconds], target=1.0, at_most=True, unit="share of the limit", note=note
    )


def plane(quick: bool) -> list[Row]:
    """25 settings x 8 models with attack, audit and guarantee, and how long its panel takes to answer."""
    with tempfile.TemporaryDirectory() as folder:
        lab = profile("smoke" if quick else "lesson").experiment(progress=False)
        lab = replace(lab, store=Store(Path(folder)))
        noises, fractions = (0.0, 0.1, 0.3, 1.0, 3.0), (0.05, 0.1, 0.2, 0.5, 1.0)
        models = 4 if quick else 8
        lab.risk(0)  # the ensembles that say who is at risk are there before anybody sweeps
        few = 2  # one after the other, each trained and queried alone
        members = lab.members(0, few)
        recipe = lab.recipe(mechanism=SelectiveDP(1.0, 1.0, lab.flags(0, 0.1)))

        def by_loop() -> float:
            begun = time.process_time()
            ensemble = training.train(lab.dataset, members, recipe, seeds=model_seeds(0, few), chunk=1)
            for attack in (None, lab.query):
                queries.outputs(ensemble, lab.dataset, attack=attack)
            return (time.process_time() - begun) * 25 * models / few

        alone = [by_loop()]
        begun, cpu = time.perf_counter(), time.process_time()
        trained = sweep(lab, noise_multipliers=noises, fractions=fractions, seed=0, models=models)
        took, cpu = time.perf_counter() - begun, time.process_time() - cpu
        alone.append(by_loop())  # before and after, so that neither met another machine
        shape = f"25 settings x {models} models, {lab.dataset.n} digits, all cores"
        rows = [] if quick else [share("plane with audit", shape, f"{PLANE_SECONDS} s", [took], PLANE_SECONDS, "wall time")]
        note = f"timed on {few} models before and after, CPU time; without the audit, so the ratio is a lower bound"
        rows.append(judged("plane with audit", shape, "a loop over models", [a / cpu for a in alone], note=note))
        panel = DeMemPanel(lab, trained)
        answers = []
        for place in range(12):
            begun = time.process_time()
            panel.noise.value = 0.5 + 0.2 * place
            answers.append(time.process_time() - begun)
        assert "Error" not in panel.readout.value, panel.readout.value
        where = "DeMem panel, 25 points, the kernel's part, CPU time"
        rows.append(share("a slider answers", where, f"{ANSWER_SECONDS} s", answers, ANSWER_SECONDS))
    return rows


def imports(quick: bool) -> list[Row]:
    """Import times in fresh processes, and whether torch came along."""
    rows = []
    modules = ("demem_lab", "demem_lab.cli", "demem_lab.leakage", "demem_lab.training", "demem_lab.audit")
    for module in modules[: 2 if quick else None]:
        script = (
            f"import sys, time; begun = time.process_time(); import {module}; "
            "print(time.process_time() - begun, 'torch' in sys.modules)"
        )
        seconds = []
        for _ in range(1 if quick else 5):
            told = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
            took, torch_came = told.stdout.split()
            seconds.append(float(took))
        note = "with torch" if torch_came == "True" else "without torch"
        rows.append(share("import", f"{module}, CPU time", f"{IMPORT_SECONDS:g} s", seconds, IMPORT_SECONDS, note))
    return rows


def first_figure(quick: bool) -> list[Row]:
    """From a kernel's start to notebook 00's first figure, against a kernel that only imports torch and plotly."""
    ratios = []
    for _ in range(1 if quick else 3):
        notebook = nbformat.read(ROOT / "notebooks" / "00_start_here.ipynb", 4)
        for cell in notebook.cells:
            if "parameters" in cell.metadata.get("tags", []):
                cell.source = cell.source.replace('profile: str = ""', 'profile: str = "smoke"')
        bare = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import torch, plotly.graph_objects")])
        ratios.append(_until_a_figure(notebook) / _until_a_figure(bare))
    return [judged(
        "kernel start to first figure", "notebook 00, smoke, wall time", "a kernel that imports torch and plotly", ratios,
        unit="ours / peer",
    )]


def _until_a_figure(notebook) -> float:
    place = {"metadata": {"path": str(ROOT / "notebooks")}}
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place)
    begun = time.perf_counter()
    with client.setup_kernel():
        for number, cell in enumerate(notebook.cells):
            if cell.cell_type == "code":
                client.execute_cell(cell, number)
                if any("plotly" in kind for output in cell.outputs for kind in output.get("data", {})):
                    break
    return time.perf_counter() - begun


def tour(quick: bool) -> list[Row]:
    """Seconds and memory of each notebook of the last `make tour`, as shares of their budgets; nothing where there was none."""
    table = ROOT / "runs" / "tour" / "table.json"
    if not table.exists():
        return []
    rows = []
    for entry in json.loads(table.read_text()):
        kind = "cold" if entry["computed"] else "warm"
        shape = f"{entry['notebook']}, {kind} ({entry['computed']} computed, {entry['reused']} reused)"
        slow = SECONDS.get(entry["notebook"][:2], DEFAULT_SECONDS)
        note = f"the machine {entry['slowness']:.2f} times as slow as the one they are for"
        rows.append(share("tour, time", shape, f"{slow} s", [entry["seconds"]], slow, note))
        rows.append(share("tour, memory", shape, f"{MEMORY_MB} MB", [entry["peak_mb"]], MEMORY_MB))
    return rows


def jobs(quick: bool) -> list[Row]:
    """All rows of this file."""
    return [*imports(quick), *first_figure(quick), *plane(quick), *tour(quick)]
