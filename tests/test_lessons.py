"""What the notebooks print of the exercises is what `solutions` holds, and it works where it stands."""

import ast
import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from demem_lab import checks, lessons, solutions
from demem_lab.controls import say

PATHS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
NOTEBOOKS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in PATHS}
FOUND = [
    pytest.param(text, code, check, name, id=f"{stem}-{name}")
    for stem, notebook in NOTEBOOKS.items()
    for text, code, check, name in lessons.exercises(notebook["cells"])
]
EACH = pytest.mark.parametrize(("text", "code", "check", "name"), FOUND)


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_the_notebook_prints_what_the_package_trusts(stem):
    """If this fails: python -m demem_lab.lessons notebooks/*.ipynb"""
    assert lessons.refreshed(NOTEBOOKS[stem]) == NOTEBOOKS[stem]


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_two_to_four_exercises(stem):
    assert 2 <= len(list(lessons.exercises(NOTEBOOKS[stem]["cells"]))) <= 4


@EACH
def test_the_stub_runs_and_the_solution_pasted_over_it_passes(text, code, check, name, capsys):
    exec("".join(code["source"]), {})
    assert capsys.readouterr().out == f"not solved yet: fill in {name}\n"
    (solution,) = re.findall(r"```python\n(.*?)```", "".join(text["source"]), re.S)
    exec(f"{solution}\n_ = checks.{check}({name})", {"checks": checks})
    assert capsys.readouterr().out == f"passed: {name} is right on all inputs\n"


@EACH
def test_the_cell_of_an_exercise_stands_alone(text, code, check, name, capsys):
    """In a fresh kernel, with nothing of the notebook run, and nothing but the function's body written."""
    stub = "".join(code["source"])
    body = inspect.getsource(getattr(solutions, name)).rstrip()
    assert lessons.stub(getattr(solutions, name)) in stub
    exec(stub, {})
    exec(stub.replace(lessons.stub(getattr(solutions, name)), body), {})
    words = [f"not solved yet: fill in {name}", f"passed: {name} is right on all inputs"]
    assert capsys.readouterr().out.splitlines() == words


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_no_cell_takes_a_parameters_name_for_something_else(stem):
    """Else the cell that reads the parameters fails when it is run again."""
    code = [c for c in NOTEBOOKS[stem]["cells"] if c["cell_type"] == "code" and "%pip" not in "".join(c["source"])]
    place = next(i for i, c in enumerate(code) if "parameters" in c["metadata"].get("tags", ()))
    first, *rest = (ast.parse("".join(c["source"])) for c in code[place:])
    parameters = {node.target.id for node in first.body}
    stored = {n.id for tree in rest for top in tree.body if not isinstance(top, (ast.FunctionDef, ast.ClassDef))
              for n in ast.walk(top) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    assert len(parameters) > 9 and not parameters & stored


@EACH
def test_minutes_difficulty_a_task_and_hints(text, code, check, name):
    prose = "".join(text["source"])
    heading = re.findall(r"^### Exercise (\d) \((easy|medium|hard), (\d+) minutes\): .+$", prose, re.M)
    assert len(heading) == 1 and 5 <= int(heading[0][2]) <= 20
    assert f"`{name}(" in prose.split("<details>")[0]
    hints = re.findall(r"<details><summary>Hint</summary>\n\n(.+?)\n\n</details>", prose, re.S)
    assert hints and all(len(hint.split()) >= 5 for hint in hints)
    assert prose.index("Hint</summary>") < prose.index("Solution</summary>")


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_exercises_are_numbered(stem):
    prose = "\n".join("".join(text["source"]) for text, *_ in lessons.exercises(NOTEBOOKS[stem]["cells"]))
    assert re.findall(r"### Exercise (\d)", prose) == [str(n + 1) for n in range(prose.count("### Exercise"))]


def test_a_stub_is_signature_and_task():
    found = lessons.stub(solutions.held_out)
    assert found.splitlines()[0] == "def held_out(scores, member, new_scores, new_member):"
    assert found.count('"""') == 2 and found.endswith("    raise NotImplementedError") and "accuracy(cut" not in found


def test_code_in_the_notebooks_is_not_cut_off():
    """JupyterLab shows about 95 columns at 1280 pixels."""
    for check in checks.EXERCISES.values():
        assert max(map(len, lessons.shown(check.solution).splitlines())) <= 95, check.name


def test_what_is_shown_brings_its_imports():
    assert lessons.shown(solutions.interval).startswith("import numpy as np\nfrom scipy import stats\n\n\ndef interval(")
    assert lessons.shown(solutions.cost).startswith("def cost(")


def test_a_change_of_a_solution_is_noticed_and_written(tmp_path, monkeypatch, capsys):
    path = tmp_path / PATHS[0].name
    path.write_bytes(PATHS[0].read_bytes())
    lessons.main([str(path)])
    assert capsys.readouterr().out == "" and path.read_bytes() == PATHS[0].read_bytes()
    monkeypatch.setattr(solutions, "interval", solutions.gap)
    lessons.main([str(path)])
    assert "exercises rewritten" in capsys.readouterr().out
    changed = json.loads(path.read_text(encoding="utf-8"))
    assert [c["id"] for c in changed["cells"]] == [c["id"] for c in NOTEBOOKS[path.stem]["cells"]]
    assert sum(a != b for a, b in zip(changed["cells"], NOTEBOOKS[path.stem]["cells"], strict=True)) == 2


def test_an_exercise_without_its_solution_is_refused():
    cells = [{"source": ["### Exercise 1"]}, {"source": ["def gap(a):\n", "    pass\n", "_ = checks.check_gap(gap)"]}]
    with pytest.raises(ValueError, match="'gap' must fold exactly one solution"):
        lessons.refreshed({"cells": cells})


PAGES = [PATHS[0].with_name("glossary.md"), PATHS[0].with_name("teaching.md"), *PATHS]


def prose_of(path):
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    return "\n".join("".join(c["source"]) for c in NOTEBOOKS[path.stem]["cells"] if c["cell_type"] == "markdown")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_sections_that_are_there(path):
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", prose_of(path)):
        file, _, section = target.partition("#")
        place = path.parent / file
        assert place.is_file(), f"{path.name}: {target}"
        if section:
            titles = re.findall(r"^#+ (.+)$", place.read_text(encoding="utf-8"), re.M)
            assert section in {title.lower().replace(" ", "-") for title in titles}, target


def test_the_teachers_page_points_at_exercises_and_headings_that_are_there():
    text = prose_of(PAGES[1])
    names = {name for notebook in NOTEBOOKS.values() for *_, name in lessons.exercises(notebook["cells"])}
    rows = re.findall(r"^\| \d, \d+ minutes \|(.+)\|$", text, re.M)
    mentioned = {name for row in rows for name in re.findall(r"`(\w+)`", row)} - {"noise_multiplier"}
    assert len(rows) == 4 and mentioned and mentioned <= names
    headings = "\n".join(line for path in PATHS for line in prose_of(path).splitlines() if line.startswith("#"))
    for pointer in re.findall(r"(?<!\*)\*([A-Z][^*]+)\*(?!\*)", text):
        assert pointer in headings, pointer


def test_the_two_epsilons_are_kept_apart():
    """The radius is never called epsilon, in prose or code."""
    glossary = prose_of(PAGES[0])
    assert "attack radius" in glossary and "privacy budget" in glossary
    assert glossary.index("attack radius") < glossary.index("## Robustness")
    wrong = re.compile(r"radius `?epsilon|epsilon`? (?:is|=) ?(?:the )?(?:attack )?radius|epsilon.ball", re.I)
    for path in PAGES:
        assert not wrong.search(prose_of(path)), path.name


def test_pages_are_reachable():
    front = (PATHS[0].parents[1] / "README.md").read_text(encoding="utf-8")
    for page in PAGES[:2]:
        assert f"notebooks/{page.name}" in front and f"({page.name})" in prose_of(PATHS[0])


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_prose_is_no_wall_of_text(path):
    for cell in NOTEBOOKS[path.stem]["cells"]:
        if cell["cell_type"] == "markdown":
            for paragraph in "".join(cell["source"]).split("\n\n"):
                if not paragraph.startswith(("|", "[![", "```")):
                    assert len(paragraph) <= 900, (cell["id"], len(paragraph))


def minutes_of(stem):
    """(to read, for all exercises, for each exercise) of a notebook, as its first cell and its exercises say."""
    first = "".join(NOTEBOOKS[stem]["cells"][0]["source"])
    said = re.search(r"^\*\*Time:\*\* (\d+) minutes.*?, and another (\d+) for the exercises;", first, re.M)
    each = {
        name: int(re.search(r"^### Exercise .*?, (\d+) minutes\)", "".join(text["source"]), re.M)[1])
        for text, _, _, name in lessons.exercises(NOTEBOOKS[stem]["cells"])
    }
    assert said
    return int(said[1]), int(said[2]), each


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_the_first_cell_says_how_long_the_exercises_take(stem):
    reading, exercises, each = minutes_of(stem)
    assert exercises == sum(each.values())
    start, front = prose_of(PATHS[0]), (PATHS[0].parents[1] / "README.md").read_text(encoding="utf-8")
    for table, folder in ((start, ""), (front, "notebooks/")):
        row = next(line for line in table.splitlines() if line.startswith(f"| [{stem[:2]}]({folder}{stem}.ipynb)"))
        assert int(row.split("|")[3]) == reading


def test_the_blocks_of_the_lab_are_the_notebooks_and_the_exercises_that_must_be_done():
    rows = re.findall(r"^\| \d, (\d+) minutes \| ([\d, ]+) \|([^|]+)\|", prose_of(PAGES[1]), re.M)
    assert len(rows) == 4
    for said, numbers, must in rows:
        found = [minutes_of(next(s for s in NOTEBOOKS if s.startswith(n))) for n in numbers.split(", ")]
        each = {name: time for *_, exercises in found for name, time in exercises.items()}
        assert int(said) == sum(reading for reading, *_ in found) + sum(each[name] for name in re.findall(r"`(\w+)`", must))


@pytest.mark.parametrize(("stem", "following"), list(zip(NOTEBOOKS, [*NOTEBOOKS][1:], strict=False)))
def test_a_notebook_ends_with_the_way_to_the_next(stem, following):
    last = "".join(NOTEBOOKS[stem]["cells"][-1]["source"]).split("\n\n")[-1]
    assert f"({following}.ipynb)" in last


def test_a_note_on_a_kept_run_is_printed_with_it(capsys):
    cells = ["".join(c["source"]) for c in NOTEBOOKS["08_full_scale"]["cells"] if c["cell_type"] == "code"]
    (cell,) = [c for c in cells if "elsewhere = kept()" in c]
    settings = {"images": 9, "dataset": "digits", "model": "mlp", "models": 2, "eps": 0.1, "attack_steps": 3, "epochs": 1}
    where = {"device": "cpu", "torch": "2", "commit": "c", "date": "today"}
    for notes in ({}, {"note": "A word. " * 30}):
        found = {"run": SimpleNamespace(protocol=settings, provenance=where | notes)}
        exec(cell, {"kept": lambda found=found: found, "say": say, "look_at": "kept", "images": None, "here": None})
        lines = capsys.readouterr().out.splitlines()
        noted = [line for line in lines if "A word." in line]
        assert bool(noted) == bool(notes) and all(line.startswith("  ") and len(line) <= 64 for line in noted)
