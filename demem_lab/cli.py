"""demem-lab on the command line: run notebooks headless, or the whole tour.

    demem-lab run 05 --profile smoke -p noise_multiplier=1.0
    demem-lab tour
    demem-lab report outputs.npz --html audit.html
    demem-lab doctor
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from demem_lab import runner, site
from demem_lab.store import Store, write_whole

INTRO = (
    "Adversarial training makes a model withstand manipulated images. It may also make it remember more about the images "
    "it was trained on, and give that away. Privacy noise for everybody stops this, and costs everybody. DeMem (Luo & Li, "
    "2024, arXiv 2412.05767) treats only those at risk. The notebooks of demem_lab measure all of it; every number and "
    "figure below was computed when this page was made. Point at a figure for its numbers."
)
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.ENOTDIR)
INDEX_MB = 25.0

app = typer.Typer(help="Robust models leak: measure it, and protect those at risk.", no_args_is_help=True)


@app.command("run")
def run_command(
    notebooks: Annotated[list[str], typer.Argument(help="paths, or numbers such as 05")],
    profile: Annotated[str, typer.Option(help="smoke, lesson or full; for 08 also paper")] = "",
    p: Annotated[list[str] | None, typer.Option("-p", help="name=value, may be repeated")] = None,
    out: Annotated[Path, typer.Option(help="folder for the executed notebooks and index.html")] = Path("runs/run"),
    timeout: Annotated[int, typer.Option(help="seconds that one cell may take; 0: as long as it likes", min=0)] = 0,
) -> None:
    """Run notebooks headless with checked parameters; exit status 1 when a cell fails, 2 for a bad parameter."""
    given = {}  # first: of papermill's "-p name value" the value looks like a notebook
    for name, value in [*map(_pair, p or []), *([("profile", profile)] if profile else [])]:
        if given.setdefault(name, value) != value:
            _stop(f"{name} is given as {given[name]!r} and as {value!r}; give it once")
    paths = [found for name in notebooks for found in find(name)]
    asked = os.environ.get("DEMEM_PROFILE")
    for path in paths:
        _refuse_bad(lambda path=path: runner.check(path, given))
        if asked and "profile" not in given and "profile" in runner.parameters(path):
            _refuse_bad(lambda path=path: runner.check(path, {"profile": asked}), "the variable DEMEM_PROFILE: ")
        _refuse_bad(lambda path=path: runner.refuse_source(path, out / path.name))
    raise typer.Exit(run_all(paths, out, given, timeout=timeout))


@app.command()
def tour(
    profile: Annotated[str, typer.Option(help="smoke, lesson or full")] = "lesson",
    out: Annotated[Path, typer.Option(help="folder for notebooks, index.html and the table")] = Path("runs/tour"),
) -> None:
    """Run notebooks 00 to 05 in order; leaves them, one HTML page and a table of seconds and memory in OUT."""
    paths = [find(f"{number:02d}")[0] for number in range(6)]
    for path in paths:
        _refuse_bad(lambda path=path: runner.check(path, {"profile": profile}))
    raise typer.Exit(run_all(paths, out, {"profile": profile}, strict=True))


@app.command("doctor")
def doctor_command() -> None:
    """Say whether this machine is ready: one line a thing, with its fix; exit status 1 when something fails."""
    from demem_lab import doctor

    raise typer.Exit(doctor.main())


@app.command("report")
def report_command(
    files: Annotated[list[Path], typer.Argument(help="outputs of a model: .npz, .safetensors, .csv, .npy files or their folder")],
    html: Annotated[Path | None, typer.Option(help="write one HTML page here")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="write the numbers here")] = None,
    fpr: Annotated[list[float] | None, typer.Option(help="a false positive rate, may be repeated")] = None,
    guarantee: Annotated[str, typer.Option(help="what the training promised, in words, to stand in the report")] = "",
    independent_coins: Annotated[
        bool, typer.Option("--independent-coins", help="each sample was included by an independent fair coin: bound epsilon")
    ] = False,
    delta: Annotated[float, typer.Option(help="delta of the bound on epsilon")] = 1e-5,
    prior: Annotated[float, typer.Option(help="share of members among those asked about, for the precision")] = 0.5,
) -> None:
    """Audit outputs from files, without a notebook; exit status 2 for a file that cannot be believed."""
    from demem_lab import audit as auditing
    from demem_lab.files import read
    from demem_lab.report import page, to_json

    _refuse_targets(files, {"--html": html, "--json": json_out})
    arrays = [file for file in files if file.suffix.lower() == ".npy"]  # one model's arrays, a file each
    subjects = [file for file in files if file not in arrays] + ([arrays] if arrays else [])
    reports = []
    for subject in subjects:
        name = subject.name if isinstance(subject, Path) else subject[0].resolve().parent.name
        label = subject if isinstance(subject, Path) else " ".join(map(str, subject))
        try:
            made = auditing.audit(
                read(subject), fprs=tuple(fpr or auditing.FPRS), guarantee=guarantee or None, name=name,
                independent_coins=independent_coins, delta=delta, prior=prior,
            )
        except (ValueError, OSError) as error:
            _stop(f"{label}: {error}")
        except MemoryError:
            _stop(f"{label}: auditing takes more memory than there is; bring fewer samples or models")
        reports.append(made)
        print(f"{name}: {made.summary()}")
        if made.empirical:
            print(f"  {made.empirical['text']}")
        for text in made.warnings:
            print(f"  note: {text}")
        for what, why in made.skipped.items():
            print(f"  not done: {what}: {why}")
    for target, content in ((html, page), (json_out, to_json)):
        if target is not None:
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                write_whole(target, content(reports).encode())
            except OSError as error:
                _stop(f"{target} cannot be written: {error.strerror or error}")
            print(f"wrote {target}")


def find(name: str) -> list[Path]:
    """The notebooks meant by a path or a number. typer.Exit(2) with one sentence when there is none."""
    if Path(name).suffix == ".ipynb" and Path(name).is_file():
        return [Path(name)]
    if Path(name).is_absolute():
        _stop(f"no notebook {name!r}: there is no such file")
    roots = [Path.cwd(), Path.cwd().parent, Path(__file__).resolve().parents[1]]
    for root in roots:
        found = _matches(root / "notebooks", f"{name}_*.ipynb" if name.isdigit() else name)
        if found:
            return found
    _stop(f"no notebook {name!r}: give a path to an .ipynb file, or a number such as 05 from a checkout of the repository")


def _matches(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(path for path in folder.glob(pattern) if path.suffix == ".ipynb" and path.is_file())
    except (ValueError, IndexError):  # what glob says to "", "." and "**x"
        return []


def run_all(paths: Sequence[Path], out: Path, given: dict, *, strict: bool = False, timeout: int = 0) -> int:
    """Run every notebook, also after a failure; write index.html and the tables; 0 only when all went well.

    strict: memory, size and seconds over the tour's budget count as failures too, the seconds at the speed that this
    machine has right then; else they are only said. timeout: seconds for one cell, 0 for any number. Ctrl-C gives 130, after
    the report of the notebooks that were finished; a disk that takes no more gives 1.
    """
    kept = _places()
    _refuse_unwritable(out)
    results, interrupted = [], False
    os.environ.setdefault("DEMEM_PROFILE", str(given.get("profile", "lesson")))
    try:
        try:
            for number, path in enumerate(paths, 1):
                results.append(_run_one(path, out, given, f"[{number}/{len(paths)}] {path.name}", strict, timeout))
        except KeyboardInterrupt:
            interrupted = True
        status = _summed_up(results, paths, out, strict) if results else 0
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        what = f"{error.filename or out} cannot be written ({error.strerror or ' '.join(str(error).split())[:200]})"
        print(f"demem-lab: {what}; make room, or give another folder with --out: results are kept in {kept}", file=sys.stderr)
        return 1
    if interrupted:
        print(f"demem-lab: interrupted; what was computed is kept in {kept}, run again to go on", file=sys.stderr)
        return 130
    return status


def _run_one(path: Path, out: Path, given: dict, name: str, strict: bool, timeout: int) -> runner.Result:
    line = _Line(name)
    slow = _slowness() if strict else 1.0
    result = replace(runner.run(path, out / path.name, given, say=line, timeout=timeout), slowness=slow)
    line.end(
        f"{result.seconds:.0f} s, {result.peak_mb:.0f} MB, {result.reused} results reused, {result.computed} computed"
        + (f", FAILED in {result.error}" if result.error else "")
    )
    if result.error:
        print(f"demem-lab: {path.name} failed in {result.error}; see {result.executed}", file=sys.stderr)
    return result


def _summed_up(results: Sequence[runner.Result], paths: Sequence[Path], out: Path, strict: bool) -> int:
    """Write index.html and the tables, say what is over budget; the exit status."""
    folder = paths[0].resolve().parent
    if (folder / "images").is_dir():  # so that the executed notebooks show theirs
        shutil.copytree(folder / "images", out / "images", dirs_exist_ok=True)
    index = site.write(out / "index.html", results, title="Can a robust model keep a secret?", intro=INTRO, folder=folder)
    (out / "table.json").write_text(json.dumps([_plain(r) for r in results], indent=1), encoding="utf-8")
    (out / "table.md").write_text(_table(results), encoding="utf-8")
    seconds = sum(r.seconds for r in results)
    print(f"{len(results)} notebooks in {seconds:.0f} s; report: {index}")
    problems = [f"{r.notebook}: {what}" for r in results for what in r.over]
    if index.stat().st_size > INDEX_MB * 1e6:
        problems.append(f"index.html: {index.stat().st_size / 1e6:.1f} MB > {INDEX_MB} MB")
    for problem in problems:
        print(f"demem-lab: over budget: {problem}", file=sys.stderr)
    return 1 if (strict and problems) or any(r.error for r in results) else 0


class _Line:
    """Progress: one line rewritten on a terminal, else a line every ten seconds."""

    def __init__(self, name: str) -> None:
        self.name, self.live, self.last = name, sys.stdout.isatty(), 0.0

    def __call__(self, text: str) -> None:
        now = time.monotonic()
        if self.live:
            print(f"\r\x1b[K{self.name}: {text}", end="", flush=True)
        elif now - self.last > 10:
            print(f"{self.name}: {text}", flush=True)
            self.last = now

    def end(self, text: str) -> None:
        print(f"{chr(13) + chr(27) + '[K' if self.live else ''}{self.name}: {text}", flush=True)


def _table(results: Sequence[runner.Result]) -> str:
    lines = ["| notebook | seconds (budget) | peak memory, MB | size, MB | computed | reused |", "|---|---|---|---|---|---|"]
    for r in results:
        lines.append(
            f"| {r.notebook} | {r.seconds:.0f} ({r.budget_seconds}) | {r.peak_mb:.0f} ({r.memory_kind}) | {r.size_mb:.2f} "
            f"| {r.computed} | {r.reused} |"
        )
    return "\n".join([*lines, ""])


def _plain(result: runner.Result) -> dict:
    return {**asdict(result), "executed": str(result.executed), "over": result.over}


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        _stop(f"parameters are given as name=value, got {text!r}")
    return name, value


def _slowness() -> float:
    from demem_lab import estimate  # torch takes seconds to import, and only a tour needs it here

    return estimate.slowness()


def _places() -> Path:
    """Where results are kept. Folders named from here are named in full, since a kernel works in the notebook's folder."""
    for name in ("DEMEM_STORE", "DEMEM_DATA"):
        if os.environ.get(name):
            os.environ[name] = os.path.abspath(os.path.expanduser(os.environ[name]))
    try:
        return Store().root
    except PermissionError as error:
        _stop(str(error))


def _refuse_targets(files: Sequence[Path], targets: dict[str, Path | None]) -> None:
    """Before anything is audited: a report must not be written over its input, over the other report, or where a folder is."""
    read = {os.path.realpath(one) for file in files for one in (file.glob("*.npy") if file.is_dir() else [file])}
    written: dict[str, str] = {}
    for option, target in targets.items():
        if target is None:
            continue
        place = os.path.realpath(target)
        if target.is_dir():
            _stop(f"{option} {target} cannot be written, for it is a folder; give a file")
        if place in read:
            _stop(f"{option} {target} would overwrite the outputs that it reports on; give another file")
        if place in written:
            _stop(f"{written[place]} and {option} both name {target}; give each a file of its own")
        written[place] = option


def _refuse_unwritable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        _stop(f"{folder} cannot be written ({error.strerror}); give another folder with --out")


def _refuse_bad(check, before: str = "") -> None:
    try:
        check()
    except runner.ParameterError as error:
        _stop(f"{before}{error}")


def _stop(message: str) -> None:
    print(f"demem-lab: {message}", file=sys.stderr)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
