"""The exercises in the notebooks, written from `solutions`: stubs with the task in them, and what "Solution" unfolds.

After a change of a solution:

    python -m demem_lab.lessons notebooks/*.ipynb

An exercise is a text cell with a folded solution, followed by a code cell that ends in `_ = checks.check_...(name)`. Only
the stub's `def` and the solution's code are rewritten; prose, imports and cell ids stay as they are.

>>> print(stub(solutions.cost))
def cost(attack_steps):
    \"\"\"Passes an image that a step of PGD training costs; a forward or a backward is one.\"\"\"
    raise NotImplementedError
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from demem_lab import solutions

CHECKED = re.compile(r"^_ = checks\.(check_\w+)\((\w+)\)$", re.M)
_SOLUTION = re.compile(r"(<summary>Solution</summary>\n\n```python\n).*?(\n```)", re.S)


def stub(solution: Callable) -> str:
    """Signature and docstring of a solution, and a body that says it is missing."""
    source = inspect.getsource(solution)
    docstring = ast.parse(source).body[0].body[0]
    return "\n".join([*source.splitlines()[: docstring.end_lineno], "    raise NotImplementedError"])


def shown(solution: Callable) -> str:
    """The source of a solution with the imports it needs, so that it works wherever it is pasted."""
    source = inspect.getsource(solution).rstrip()
    imports = []
    for line in inspect.getsource(solutions).splitlines():
        name = line.split()[-1] if line.startswith(("import ", "from ")) else ""
        if name and re.search(rf"\b{name}\.", source):
            imports.append(line)
    return "\n".join([*imports, "", "", source] if imports else [source])


def exercises(cells: Sequence[dict]) -> Iterator[tuple[dict, dict, str, str]]:
    """(text cell, code cell, name of the check, name of the function) for every exercise of a notebook."""
    for text, code in zip(cells, cells[1:], strict=False):
        for check, name in CHECKED.findall("".join(code["source"])):
            yield text, code, check, name


def refreshed(notebook: dict) -> dict:
    """The notebook with stubs and solutions as `solutions` has them. ValueError for an exercise without its folded solution."""
    notebook = json.loads(json.dumps(notebook))
    for text, code, _, name in exercises(notebook["cells"]):
        solution = getattr(solutions, name)
        prose, folds = _SOLUTION.subn(lambda m, s=solution: m[1] + shown(s) + m[2], "".join(text["source"]))
        if folds != 1:
            raise ValueError(f"the cell before {name!r} must fold exactly one solution as python code, got {folds}")
        text["source"] = prose.splitlines(keepends=True)
        lines = "".join(code["source"]).splitlines()
        (place,) = [node for node in ast.parse("\n".join(lines)).body if getattr(node, "name", None) == name]
        lines[place.lineno - 1 : place.end_lineno] = stub(solution).splitlines()
        code["source"] = "\n".join(lines).splitlines(keepends=True)
    return notebook


def main(paths: Sequence[str]) -> None:
    """Rewrites the notebooks at `paths` where they are out of date, and says which."""
    for path in map(Path, paths):
        before = path.read_text(encoding="utf-8")
        after = json.dumps(refreshed(json.loads(before)), indent=1, ensure_ascii=False) + "\n"
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"{path}: exercises rewritten")


if __name__ == "__main__":
    main(sys.argv[1:])
