"""Is this machine ready? One line for each thing the notebooks need, and the fix for what is not there.

>>> print(report(checkup()))                                                             # doctest: +SKIP
ok    Python      3.12.4
ok    packages    23 at the versions asked for, torch 2.9.1
ok    GPU         none; lessons do not need one, profile full is slow without
warn  memory      1.9 GB, 0.9 GB of it free
                  fix: close other notebooks (Kernel > Shut Down All Kernels)
...

`python -m demem_lab.doctor` works when so little is installed that `demem-lab doctor` cannot start: this module needs
nothing but Python until the packages are known to be there. Every check takes what it judges as arguments.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from demem_lab import limits

PYTHON = (3, 11)
PEAK_GB = 1.1  # notebook 05, kernel and workers, as measured by the tour
FREE_GB = 1.0  # the lessons' results take about half of it
EXTENSIONS = ("@jupyter-widgets/jupyterlab-manager", "anywidget", "jupyterlab-plotly")
FOLDERS = {
    "fashion_mnist": "FashionMNIST/raw", "mnist": "MNIST/raw", "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python", "svhn": "train_32x32.mat",
}  # where torchvision keeps them


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    state: str  # "ok", "warn" (something will be slower or missing) or "fail" (notebooks will not run)
    text: str
    fix: str = ""


def checkup() -> list[Check]:
    """Everything about this machine, in the order in which one would repair it."""
    required, extras = requirements()
    found = [python(), packages(required, version)]
    if any(check.state == "fail" for check in found):
        return [*found, memory(), cores()]  # the rest asks packages that may be missing
    return [
        *found, *(extra(name, names, version) for name, names in extras.items()), gpu(), memory(), cores(), profile(), data(),
        store(), widgets(), kernel(),
    ]


def report(checks: Sequence[Check]) -> str:
    """The checks as text for people."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.state:<4}  {check.name:<{width}}  {check.text}")
        if check.fix:
            lines.append(f"{'':<6}{'':<{width}}  fix: {check.fix}")
    return "\n".join(lines)


def python(have: tuple[int, ...] = tuple(sys.version_info[:3])) -> Check:
    """The version of Python."""
    text = ".".join(map(str, have))
    if have[:2] < PYTHON:
        wanted = ".".join(map(str, PYTHON))
        return Check("Python", "fail", f"{text} is older than {wanted}", f"install Python {wanted} or newer, `make PYTHON=...`")
    return Check("Python", "ok", text)


def requirements() -> tuple[list[str], dict[str, list[str]]]:
    """What the installed package needs ("torch>=2.6"), and the extras that a notebook uses; empty if not installed."""
    try:
        lines = importlib.metadata.requires("demem_lab") or []
    except importlib.metadata.PackageNotFoundError:
        return [], {}
    required, extras = [], {}
    for line in lines:
        name, _, condition = line.partition(";")
        belongs = re.search(r"extra == ['\"](.*?)['\"]", condition)
        if belongs is None:
            required.append(name.strip())
        elif belongs[1] == "attacks":  # the others are for developers, and for whoever has a cluster
            extras.setdefault(belongs[1], []).append(name.strip())
    return required, extras


def version(name: str) -> str | None:
    """The installed version of a package; None when it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def packages(required: Sequence[str], version: Callable[[str], str | None]) -> Check:
    """All required packages, with the one command that brings what is missing or old."""
    if not required:
        fix = f'in the checkout: {sys.executable} -m pip install -e ".[attacks]"'
        return Check("packages", "fail", "demem_lab is not installed in this Python", fix)
    problems, install = _missing(required, version)
    if problems:
        return Check("packages", "fail", ", ".join(problems), f"{sys.executable} -m pip install --upgrade {install}")
    return Check("packages", "ok", f"{len(required)} at the versions asked for, torch {version('torch')}")


def extra(name: str, required: Sequence[str], version: Callable[[str], str | None]) -> Check:
    """An optional group of packages."""
    problems, install = _missing(required, version)
    if problems:
        what = {"attacks": "; notebook 01 then goes without AutoAttack"}.get(name, "")
        fix = f"{sys.executable} -m pip install --upgrade {install}"
        return Check(f"extra: {name}", "warn", ", ".join(problems) + what, fix)
    return Check(f"extra: {name}", "ok", ", ".join(f"{_name(r)} {version(_name(r))}" for r in required))


def gpu() -> Check:
    """What torch sees, with what it says when a GPU is there but cannot be used."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of another CUDA version
        fix = f"{sys.executable} -m pip install --force-reinstall torch"
        return Check("GPU", "fail", f"torch cannot be imported: {error}", fix)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        there = torch.cuda.is_available()
    if there:
        facts = torch.cuda.get_device_properties(0)
        half = "bf16" if facts.major >= 8 else "no bf16 (fp16 instead)"
        text = f"{facts.name}, {facts.total_memory / 1e9:.0f} GB, compute capability {facts.major}.{facts.minor}, {half}"
        return Check("GPU", "ok", f"{text}; digits stay on the CPU")
    if said:
        fix = "update the driver, or install the torch build that fits it (pytorch.org/get-started)"
        return Check("GPU", "warn", f"cannot be used: {str(said[0].message).splitlines()[0]}", fix)
    return Check("GPU", "ok", "none; lessons do not need one, profile full is slow without")


def memory(
    root: Path = Path("/"), environ: Mapping[str, str] = os.environ, machine: tuple[int, int] | None = None
) -> Check:
    """Memory of this machine or container (control groups and JupyterHub's MEM_LIMIT count), and how much is free.

    machine: (total, available) bytes; by default as the system says.
    """
    found = limits.memory(root, environ, machine)
    if found is None:
        return Check("memory", "warn", "unknown here", f"make sure that {PEAK_GB} GB are free")
    total, free = (number / 1e9 for number in found)
    text = f"{total:.1f} GB, {free:.1f} GB of it free"
    if total < PEAK_GB:
        return Check("memory", "fail", f"{text}; notebook 05 needs {PEAK_GB} GB", "use a larger machine, or DEMEM_PROFILE=smoke")
    if free < PEAK_GB:
        fix = "close other notebooks (Kernel > Shut Down All Kernels)"
        return Check("memory", "warn", f"{text}; notebook 05 needs {PEAK_GB} GB", fix)
    return Check("memory", "ok", text)


def cores(root: Path = Path("/"), environ: Mapping[str, str] = os.environ, seen: int | None = None) -> Check:
    """Cores that may be used, and how many workers the training will start on them."""
    if seen is None:
        seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = environ.get("DEMEM_WORKERS", "")
    if asked and not (asked.isdigit() and int(asked)):
        return Check("cores", "fail", f"DEMEM_WORKERS is {asked!r}, not a number of at least 1", "unset DEMEM_WORKERS")
    workers = int(asked or seen)
    ours = min(seen, limits.quota(root) or seen)
    text = f"{ours:g} of {seen} may be used, {workers} workers, OMP_NUM_THREADS={environ.get('OMP_NUM_THREADS', 'not set')}"
    if workers > math.ceil(ours):
        return Check("cores", "warn", f"{text}; they get in each other's way", f"export DEMEM_WORKERS={math.ceil(ours)}")
    return Check("cores", "ok", text)


def profile(asked: str | None = None) -> Check:
    """Which profile the notebooks take when nothing else is said."""
    from demem_lab import experiment, protocol

    asked = os.environ.get("DEMEM_PROFILE", "") if asked is None else asked
    if not asked:
        return Check("profile", "ok", "lesson; DEMEM_PROFILE is not set")
    if asked in experiment.PROFILES:
        return Check("profile", "ok", f"{asked}, by DEMEM_PROFILE")
    fix = f"export DEMEM_PROFILE={' or '.join(experiment.PROFILES)}, or unset it"
    if asked in protocol.PROFILES:
        return Check("profile", "warn", f"DEMEM_PROFILE={asked} is for notebook 08 alone; the others refuse it", fix)
    return Check("profile", "fail", f"DEMEM_PROFILE={asked} is no profile", fix)


def data(root: str | None = None) -> Check:
    """Which data sets are there, besides the digits that come with scikit-learn."""
    root = os.path.expanduser(os.environ.get("DEMEM_DATA", "") if root is None else root)
    if not root:
        return Check("data", "ok", "digits (built in); DEMEM_DATA is not set, so no others")
    if not Path(root).is_dir():
        return Check("data", "warn", f"DEMEM_DATA={root} is no folder; only digits are there", f"mkdir -p {root}, or unset it")
    if not os.path.isabs(root):
        return _relative("data", "DEMEM_DATA", root)
    found = [name for name, place in FOLDERS.items() if Path(root, place).exists()]
    return Check("data", "ok", f"digits (built in), {', '.join(found) or 'nothing else'} in {root}")


def store(root: str | Path | None = None) -> Check:
    """Where results are kept, whether that can be written, how much is there, and how much still fits."""
    from demem_lab.store import Store

    asked = os.environ.get("DEMEM_STORE", "")
    if root is None and asked and not os.path.isabs(os.path.expanduser(asked)):
        return _relative("store", "DEMEM_STORE", asked)
    try:
        kept = Store(root)
    except PermissionError as error:
        return Check("store", "fail", str(error).partition("; ")[0], "export DEMEM_STORE=a folder you can write to")
    size = sum(map(_size, kept.root.glob("*/*"))) / 1e6
    free = shutil.disk_usage(kept.root).free / 1e9
    text = f"{kept.root}: {kept.count()} results, {size:.0f} MB; {free:.1f} GB free"
    if free < FREE_GB:
        return Check("store", "warn", text, f"make room, or export DEMEM_STORE=a folder on a disk with {FREE_GB:g} GB")
    return Check("store", "ok", text)


def widgets(folders: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> Check:
    """Whether a live panel can be made here, and whether JupyterLab has what shows it."""
    import plotly.graph_objects as go
    from jupyter_core.paths import jupyter_path

    names = ("ipywidgets", "anywidget", "plotly")
    text = ", ".join(f"{name} {version(name)}" for name in names)
    again = f"{sys.executable} -m pip install --force-reinstall --no-deps {' '.join(names)} jupyterlab_widgets"
    try:
        go.FigureWidget()
    except Exception as error:  # whatever it is, it is what the learner would meet
        return Check("widgets", "fail", f"{text}; a panel cannot be made: {error}", again)
    if "COLAB_RELEASE_TAG" in environ:
        return Check("widgets", "ok", f"{text}; Colab shows them with its own manager")
    places = jupyter_path("labextensions") if folders is None else folders
    missing = [name for name in EXTENSIONS if not any(Path(place, name).is_dir() for place in places)]
    if missing:
        return Check("widgets", "fail", f"{text}; JupyterLab lacks {', '.join(missing)}, so panels stay empty", again)
    return Check("widgets", "ok", f"{text}, with their JupyterLab extensions")


def kernel() -> Check:
    """Whether the notebooks' kernel, python3, is the Python that has this package."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    fix = f"{sys.executable} -m ipykernel install --sys-prefix"
    try:
        runs = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except NoSuchKernel:
        return Check("kernel", "fail", "there is no kernel named python3", fix)
    same = not os.path.isabs(runs) or Path(runs).parent == Path(sys.executable).parent  # a bare name is found beside us
    if not same:
        return Check("kernel", "warn", f"python3 is {runs}, not this Python; a notebook may not find demem_lab", fix)
    return Check("kernel", "ok", f"python3 is {sys.executable}")


def _relative(name: str, variable: str, value: str) -> Check:
    text = f"{variable}={value} is another folder for every notebook, each of which takes it from where it lies"
    return Check(name, "warn", text, f"export {variable}={os.path.abspath(value)}")


def _missing(required: Sequence[str], version: Callable[[str], str | None]) -> tuple[list[str], str]:
    problems, install = [], []
    for line in required:
        floor, have = re.search(r">=\s*([\d.]+)", line), version(_name(line))
        if have is None:
            problems.append(f"{_name(line)} is missing")
        elif floor and _numbers(have) < _numbers(floor[1]):
            problems.append(f"{_name(line)} {have} is older than {floor[1]}")
        else:
            continue
        install.append(f'"{line}"')
    return problems, " ".join(install)


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=!~ ;]", requirement)[0]


def _numbers(text: str) -> tuple[int, ...]:
    numbers = [int(part) for part in re.match(r"[\d.]*", text)[0].split(".") if part]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size if file.is_file() else 0
    except OSError:  # another process took it away after it was listed
        return 0


def main() -> int:
    """Print the report; 1 when something fails, else 0."""
    checks = checkup()
    print(report(checks))
    return int(any(check.state == "fail" for check in checks))


if __name__ == "__main__":
    sys.exit(main())
