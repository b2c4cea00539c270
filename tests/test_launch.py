"""Every way in: badges and install lines from one address, Binder's scripts, and the headless runs of a real notebook."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

import badges
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\((https://(?:mybinder\.org|colab\.research\.google\.com)[^)]*)\)")


@pytest.mark.parametrize("file", [*badges.NOTEBOOKS, ROOT / "README.md", ROOT / "CITATION.cff"], ids=lambda p: p.name)
def test_badges_install_lines_and_citation_come_from_the_one_address(file):
    assert badges.stamped(file) == file.read_text(encoding="utf-8"), "run: python tests/badges.py"


@pytest.mark.parametrize("file", [*badges.NOTEBOOKS, ROOT / "README.md"], ids=lambda p: p.name)
def test_badges_open_files_that_are_there_on_the_right_branch(file):
    text = nbformat.read(file, 4).cells[0].source if file.suffix == ".ipynb" else file.read_text()
    binder, colab = LINK.findall(text)
    owner = urlparse(badges.ADDRESS).path
    wanted = file if file.suffix == ".ipynb" else ROOT / "notebooks" / "00_start_here.ipynb"
    parsed = urlparse(binder)
    assert parsed.path == f"/v2/gh{owner}/{badges.BRANCH}"
    assert ROOT / unquote(parsed.query).removeprefix("urlpath=lab/tree/") == wanted
    assert colab == f"https://colab.research.google.com/github{owner}/blob/{badges.BRANCH}/{wanted.relative_to(ROOT)}"
    for picture in re.findall(r"\[!\[[^]]*\]\(([^)]*)\)", text):
        assert (file.parent / picture).is_file()


def test_no_other_address_of_ours_is_written_anywhere():
    allowed = badges.ADDRESS.removeprefix("https://github.com/")
    name = allowed.split("/")[1]
    for file in [*badges.NOTEBOOKS, *ROOT.glob("*.*"), *ROOT.glob("binder/*"), *ROOT.glob("demem_lab/*.py")]:
        if file.is_file():
            for found in re.findall(rf"[\w.-]+/{name}(?=[/@\"\s)]|$)", file.read_text(errors="replace")):
                assert found in (allowed, f"pkg/{name}"), (file, found)


def test_a_new_address_reaches_every_place(monkeypatch):
    monkeypatch.setattr(badges, "ADDRESS", "https://github.com/some/fork")
    monkeypatch.setattr(badges, "BRANCH", "v9")
    for file in (*badges.NOTEBOOKS, ROOT / "README.md"):
        text = badges.stamped(file)
        assert "gh/some/fork/v9?" in text and "github/some/fork/blob/v9/" in text and "demem-lab/demem_lab" not in text
        if file.suffix == ".ipynb":
            assert "git+https://github.com/some/fork@v9" in "".join(json.loads(text)["cells"][1]["source"])


def test_the_install_line_asks_for_extras_that_exist():
    assert badges.EXTRAS in badges.PROJECT["project"]["optional-dependencies"]


@pytest.mark.parametrize("file", badges.NOTEBOOKS[:8], ids=lambda p: p.stem)  # 08 shows a table of its own
def test_every_notebook_says_what_it_will_use_before_it_computes(file):
    cells = [c.source for c in nbformat.read(file, 4).cells if c.cell_type == "code"]
    first = next(i for i, source in enumerate(cells) if "experiment.profile(profile)" in source)
    lines = cells[first].splitlines()
    assert "from demem_lab.estimate import status" in "\n".join(cells[:first])
    if file.name.startswith("06"):  # two laboratories: it speaks of the first
        said = lines.index('print(status(found[0], "06", profile))')
        assert not any(".tuned()" in line for line in lines[:said])
        return
    said = lines.index(f'print(status(lab, "{file.name[:2]}", profile))')
    assert lines[said - 1] == ")"
    assert not any("lab." in line for line in "\n".join([*cells[2:first], *lines[:said]]).splitlines() if "import" not in line)


def start(*command, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("DEMEM_", "OMP_", "MKL_", "OPENBLAS_"))}
    environment = clean | environment
    done = subprocess.run([ROOT / "binder/start", *command], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_binder_starts_with_one_thread_and_a_store_that_is_part_of_the_image(tmp_path):
    script = "import os; from demem_lab import farm, store; print(farm.workers('cpu'), os.environ['OMP_NUM_THREADS'])"
    found = start(sys.executable, "-c", script + "; print(store.Store().root)", HOME=str(tmp_path))
    assert found.split() == ["1", "1", str(tmp_path / ".demem-store")]


def test_binder_computes_ahead_for_every_lesson_and_through_start():
    script = (ROOT / "binder" / "postBuild").read_text()
    numbers = re.search(r"DEMEM_WARM:-([\d ]+)", script)[1].split()
    assert set(numbers) == {f"{n:02d}" for n in range(len(badges.NOTEBOOKS))}
    assert re.search(r"binder/start timeout .*\\\n\s+demem-lab run .* \|\| ", script), "a slow builder must not fail the image"
    for name in ("start", "postBuild"):
        subprocess.run(["bash", "-n", ROOT / "binder" / name], check=True)


@pytest.mark.slow
def test_what_postbuild_computes_is_not_computed_again(tmp_path):
    """As Binder does it, in small: notebook 00 at `smoke`, without the installation."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "demem-lab"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m demem_lab.cli "$@"\n')
    command.chmod(0o755)
    script = "\n".join(line for line in (ROOT / "binder/postBuild").read_text().splitlines() if "pip install" not in line)
    environment = {"HOME": str(tmp_path), "DEMEM_PROFILE": "smoke", "DEMEM_WARM": "00", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    clean = {k: v for k, v in os.environ.items() if k != "DEMEM_STORE"}
    subprocess.run(["bash", "-c", script], env=clean | environment, check=True, cwd=ROOT, capture_output=True)
    start("demem-lab", "run", "00", "--out", str(tmp_path / "again"), **environment)
    row = json.loads((tmp_path / "again" / "table.json").read_text())[0]
    assert row["error"] == "" and row["computed"] == 0 and row["reused"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("command", [
    "-m papermill 00_start_here.ipynb {out} -p profile smoke -k python3",
    "-m nbconvert --to notebook --execute 00_start_here.ipynb --output {out}",
], ids=["papermill", "nbconvert"])
def test_the_plain_tools_run_a_notebook_too(tmp_path, command):
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    out = tmp_path / "out.ipynb"
    environment = os.environ | {"DEMEM_PROFILE": "smoke", "PYTHONPATH": str(ROOT)}
    arguments = [part.format(out=out) for part in command.split()]
    where = tmp_path / "notebooks"
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=where)
    assert done.returncode == 0, done.stderr[-2000:]
    cells = [c for c in nbformat.read(out, 4).cells if c.cell_type == "code"]
    printed = "".join(o.text for c in cells for o in c.outputs if o.output_type == "stream")
    assert "about" in printed and "SelectiveDP: right under attack" in printed
