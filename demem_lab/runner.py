"""Notebooks run headless: parameters checked first, progress shown, seconds and memory measured.

papermill does the executing. What it lets pass we refuse before anything runs: a parameter the notebook does not have, a
value of the wrong type or out of range. The notebook's own `parameters` cell is the contract: annotated literals, and a
comment that begins with the allowed values, `[low, high]` or `{a, b, c}`.

>>> result = run("notebooks/05_demem.ipynb", "runs/05.ipynb", {"profile": "smoke"})      # doctest: +SKIP
>>> result.seconds, result.peak_mb, result.error                                         # doctest: +SKIP
"""

from __future__ import annotations

import ast
import io
import json
import math
import os
import re
import sys
import tempfile
import threading
import time
import tokenize
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import psutil

MEMORY_MB = 1500
NOTEBOOK_MB = 2.0
SECONDS = {"05": 240, "06": 300}
DEFAULT_SECONDS = 120
SLACK = 1.5  # half as much again before a tour fails: timings vary from run to run


class ParameterError(ValueError):
    """A parameter that the notebook does not have, or a value it does not take."""


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell."""

    name: str
    type: str  # "int", "float", "str" or "bool"
    default: Any
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] = ()
    help: str = ""

    @property
    def is_path(self) -> bool:
        """Whether the value is a file or a folder: a text with no fixed choices whose name or comment says so."""
        words = re.search(r"\b(file|folder)\b", f"{self.name} {self.help}")
        return self.type == "str" and not self.choices and words is not None

    @property
    def allowed(self) -> str:
        """The allowed values in words."""
        if self.choices:
            return "{" + ", ".join(map(repr, self.choices)) + "}"
        return f"[{self.low:g}, {self.high:g}]" if self.low is not None else f"any {self.type}"

    def value(self, given: Any) -> Any:
        """`given` (a Python value, or text from a command line) as this parameter's type; ParameterError if it is not one."""
        value = self._converted(given)
        if isinstance(value, float) and not math.isfinite(value):
            raise ParameterError(f"{self.name} must be finite and in {self.allowed}, got {given!r}")
        if self.choices and value not in self.choices:
            raise ParameterError(f"{self.name} must be one of {self.allowed}, got {given!r}")
        if self.low is not None and not self.low <= value <= self.high:
            raise ParameterError(f"{self.name} must lie in {self.allowed}, got {given!r}")
        if self.is_path and value:  # meant from where the caller is; the kernel works in the notebook's folder
            return os.path.abspath(os.path.expanduser(value))
        return value

    def _converted(self, given: Any) -> Any:
        try:
            if self.type == "bool":
                return given if isinstance(given, bool) else {"true": True, "false": False}[str(given).lower()]
            if self.type == "int" and not isinstance(given, (bool, float)):
                return int(given)
            if self.type == "float" and not isinstance(given, bool):
                return float(given)
            if self.type == "str" and isinstance(given, str):
                return given
        except (ValueError, KeyError, TypeError):
            pass
        raise ParameterError(f"{self.name} must be of type {self.type}, got {given!r}; allowed: {self.allowed}")


def parameters(notebook: str | Path) -> dict[str, Parameter]:
    """The parameters a notebook takes, by name. ParameterError unless exactly one cell is tagged `parameters`."""
    path = Path(notebook)
    try:
        return _parameters(path)
    except (nbformat.ValidationError, AttributeError, TypeError, KeyError):  # JSON, but of something else
        raise ParameterError(f"{path.name} is no notebook of Jupyter's format 4; save it anew from JupyterLab") from None
    except (SyntaxError, ValueError, nbformat.reader.NotJSONError) as error:
        if isinstance(error, ParameterError):
            raise
        fix = "its parameters cell holds lines of the form 'name: type = literal'"
        raise ParameterError(f"{path.name} cannot be read: {error}; {fix}") from None
    except OSError as error:
        raise ParameterError(f"{path} cannot be read: {error.strerror}; give the path of an .ipynb file") from None


def _parameters(path: Path) -> dict[str, Parameter]:
    cells = [c for c in nbformat.read(path, as_version=4).cells if "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ParameterError(f"{path.name} has {len(cells)} cells tagged 'parameters'; it needs exactly one to be run headless")
    source = cells[0].source
    comments = _comments(source)
    found = {}
    for node in ast.parse(source).body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None):
            raise ParameterError(f"{path.name}: line {node.lineno} of the parameters cell is not 'name: type = literal'")
        default, comment = ast.literal_eval(node.value), comments.get(node.lineno, "")
        name = node.target.id
        found[name] = Parameter(name, ast.unparse(node.annotation), default, **_range(comment))
    return found


def check(notebook: str | Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given parameters with their right types. ParameterError, with the list of what there is, otherwise."""
    known = parameters(notebook)
    values, problems = {}, []
    for name, value in given.items():
        if name not in known:
            problems.append(f"{Path(notebook).name} has no parameter {name!r}")
            continue
        try:
            values[name] = known[name].value(value)
        except ParameterError as error:
            problems.append(str(error))
    if problems:
        raise ParameterError("\n".join([*problems, "", describe(known)]))
    return values


def refuse_source(notebook: str | Path, out: str | Path) -> None:
    """ParameterError when the executed notebook would be written over the notebook itself."""
    if os.path.exists(out) and os.path.samefile(notebook, out):
        raise ParameterError(f"the executed notebook would overwrite {notebook} itself; give another folder with --out")


def describe(known: Mapping[str, Parameter]) -> str:
    """A list of parameters for people: name, type, default, allowed values, help."""
    lines = [f"  {p.name}: {p.type} = {p.default!r}  {p.allowed}  {p.help}".rstrip() for p in known.values()]
    return "\n".join(["parameters:", *lines])


@dataclass(frozen=True)
class Result:
    """What running one notebook took and gave."""

    notebook: str
    executed: Path
    seconds: float
    peak_mb: float
    memory_kind: str  # "PSS" (shared pages counted once) or "RSS"
    size_mb: float
    computed: int  # results computed in this run
    reused: int  # results read from the store
    error: str = ""  # "cell 7: ValueError: ..." when a cell failed
    slowness: float = 1.0  # how much longer than on the reference machine training steps took here just then

    @property
    def budget_seconds(self) -> int:
        return SECONDS.get(self.notebook[:2], DEFAULT_SECONDS)

    @property
    def over(self) -> list[str]:
        """Budgets that make a tour fail: memory, size, and seconds beyond chance and the speed of the machine."""
        allowed = SLACK * self.budget_seconds * max(1.0, self.slowness)
        found = [f"memory {self.peak_mb:.0f} MB > {MEMORY_MB} MB"] if self.peak_mb > MEMORY_MB else []
        found += [f"size {self.size_mb:.1f} MB > {NOTEBOOK_MB} MB"] if self.size_mb > NOTEBOOK_MB else []
        if self.seconds > allowed:
            found.append(
                f"{self.seconds:.0f} s > {allowed:.0f} s ({SLACK:g} x {self.budget_seconds} s, on a machine that "
                f"takes {max(1.0, self.slowness):.1f} times as long as the reference)"
            )
        return found


def run(
    notebook: str | Path, out: str | Path, given: Mapping[str, Any] | None = None, *,
    say: Callable[[str], None] = lambda text: None, timeout: int = 0,
) -> Result:
    """Execute `notebook` into `out` with checked parameters. A failing cell is reported in the Result, not raised.

    timeout: seconds that one cell may take, 0 for any number; a cell that takes longer counts as failed.
    The kernel is the Python that runs this, works in the notebook's own folder, and knows by DEMEM_HEADLESS=1 that
    nobody is watching. `say` gets a line of progress whenever a cell starts.
    """
    import papermill as pm
    from nbclient.exceptions import CellTimeoutError
    from papermill.exceptions import PapermillExecutionError

    notebook, out = Path(notebook), Path(out)
    values = check(notebook, given or {})
    refuse_source(notebook, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    started, error = time.monotonic(), ""
    with _own_kernel() as kernel, _store_log() as accesses, _watching(out, say), _Memory() as memory:
        try:
            pm.execute_notebook(
                str(notebook), str(out), parameters=values, kernel_name=kernel, progress_bar=False, language="python",
                cwd=str(notebook.resolve().parent), autosave_cell_every=0, request_save_on_cell_execute=True,
                execution_timeout=timeout or None,
            )
        except PapermillExecutionError as failure:
            # the injected parameters and papermill's banner shift cells: exec_count is what the reader sees as [n]
            error = f"cell [{failure.exec_count}]: {failure.ename}: {failure.evalue}"
        except RuntimeError as failure:  # DeadKernelError: killed, most often for its memory; or it never came up
            error = f"{_cell(out)}{failure}; after {memory.peak_mb:.0f} MB"
        except CellTimeoutError:
            error = f"{_cell(out)}it took longer than {timeout} s"
        fresh = [line["fresh"] for line in accesses()]
    _strip_widget_state(out)
    return Result(
        notebook.name, out, time.monotonic() - started, memory.peak_mb, memory.kind, out.stat().st_size / 1e6,
        sum(fresh), len(fresh) - sum(fresh), error,
    )


@contextmanager
def _own_kernel():
    """A kernel specification for sys.executable, whatever 'python3' happens to mean on this machine."""
    name = "demem-lab-headless"
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder, "kernels", name)
        spec.mkdir(parents=True)
        # a kernel that is interrupted logs a traceback of its own as an error; what a cell raises is in the notebook
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=CRITICAL"]
        kernel = json.dumps({"argv": argv, "display_name": name, "language": "python"})
        spec.joinpath("kernel.json").write_text(kernel, encoding="utf-8")
        paths = os.pathsep.join(filter(None, [folder, os.environ.get("JUPYTER_PATH")]))
        threads = os.environ.get("OMP_NUM_THREADS", "1")
        with _environment(JUPYTER_PATH=paths, DEMEM_HEADLESS="1", OMP_NUM_THREADS=threads):
            yield name


@contextmanager
def _store_log():
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "store.jsonl")
        with _environment(DEMEM_STORE_LOG=str(log)):
            yield lambda: [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


@contextmanager
def _watching(out: Path, say: Callable[[str], None]):
    """Tell which cell is running: papermill saves the notebook whenever one starts, and we look at it."""
    stop, started = threading.Event(), time.monotonic()

    def look() -> None:
        last = False
        while not last:
            last = stop.wait(1.0)  # and once more when all is done
            try:
                cells = [c for c in json.loads(out.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
            except (OSError, ValueError):
                continue  # not written yet, or being written just now
            done = [c["metadata"].get("papermill", {}).get("status") for c in cells]
            current = next((i for i, status in enumerate(done, 1) if status == "running"), done.count("completed"))
            say(f"cell {current} of {len(cells)}, {time.monotonic() - started:.0f} s")

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class _Memory:
    """Peak memory of our child processes (the kernel and its workers), sampled twice a second."""

    def __init__(self) -> None:
        self.peak_mb, self.kind, self._stop = 0.0, "PSS", threading.Event()

    def __enter__(self):
        self._before = {p.pid for p in psutil.Process().children(recursive=True)}
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.5):
            total = 0
            for process in psutil.Process().children(recursive=True):
                if process.pid in self._before:
                    continue
                try:
                    info = process.memory_full_info()
                except psutil.Error:
                    continue  # it ended between listing and asking
                if not hasattr(info, "pss"):
                    self.kind = "RSS"
                total += getattr(info, "pss", info.rss)
            self.peak_mb = max(self.peak_mb, total / 1e6)


@contextmanager
def _environment(**values: str):
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, old in before.items():
            os.environ.pop(name) if old is None else os.environ.__setitem__(name, old)


def _cell(executed: Path) -> str:
    """'cell [7]: ' for the code cell that was started last; papermill's own status says "completed" for all in the end."""
    cells = [c for c in nbformat.read(executed, as_version=4).cells if c.cell_type == "code"]
    return f"cell [{sum(c.metadata.get('papermill', {}).get('start_time') is not None for c in cells)}]: "


def _strip_widget_state(path: Path) -> None:
    """A plotly FigureWidget keeps 5 MB of JavaScript in the notebook's metadata; nobody needs it there."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, path)


def _comments(source: str) -> dict[int, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ").strip() for t in tokens if t.type == tokenize.COMMENT}


def _range(comment: str) -> dict[str, Any]:
    match = re.match(r"(\[[^\]]*\]|\{[^}]*\})\s*(.*)", comment)
    if match is None:
        return {"help": comment}
    allowed, text = match.groups()
    if allowed.startswith("["):
        low, high = ast.literal_eval(allowed)
        return {"low": low, "high": high, "help": text}
    return {"choices": tuple(ast.literal_eval("[" + allowed[1:-1] + "]")), "help": text}
