"""What a notebook will use on this machine and about how long it takes, said before it starts.

>>> print(status(profile("lesson").experiment(), "05"))                                  # doctest: +SKIP
05: about 4 minutes on this machine the first time, about 15 seconds when its results are kept
3 seeds x 16 models on 1797 images of digits; CPU, 2 workers; 212 results of these images kept

Nothing is guessed. The seconds of the last tour on two cores are known (`MEASURED`), and so is how long plain
adversarial training took there; a probe of a second trains a few steps of the same kind here, with this notebook's data,
network and number of models, and the ratio of the two carries the tour's seconds over.
"""

from __future__ import annotations

import time

import torch

from demem_lab import farm, training
from demem_lab.experiment import Experiment, profile
from demem_lab.streams import model_seeds

# `make tour`, profile lesson, two CPU cores, November 2026: seconds with nothing kept but the earlier notebooks' results
MEASURED = {"00": 25, "01": 32, "02": 54, "03": 56, "04": 95, "05": 179}
KEPT = 77 / 6  # seconds of one of these notebooks when all its results are kept
STEP = 0.0115  # seconds of one step of the lesson's 16 models, on the same two cores
DIGITS = 1797  # images of the lesson
PROBE_SECONDS = 1.0


def status(lab: Experiment, notebook: str = "") -> str:
    """What notebook number `notebook` will use with the settings of `lab`, and about how long it takes, in two lines."""
    kept = lab.store.count(lab.dataset.fingerprint)
    what = (
        f"{len(lab.seeds)} seeds x {lab.models} models on {lab.dataset.n} images of {lab.dataset.name}; {uses(lab)}; "
        f"{_count(kept, 'result')} of these images kept"
    )
    if notebook not in MEASURED:
        return what
    first, again = map(spell, seconds(lab, notebook))
    later = f" the first time, about {again} when its results are kept" if first != again else ""
    return f"{notebook}: about {first} on this machine{later}\n{what}"


def seconds(lab: Experiment, notebook: str) -> tuple[float, float]:
    """About how long a notebook of `MEASURED` takes here: with the earlier notebooks' results only, and with its own."""
    lesson = profile("lesson")
    there = STEP * lesson.epochs * DIGITS / 2 / lesson.batch_size * lesson.seeds
    here = step_seconds(lab) * lab.epochs * lab.dataset.n / 2 / lab.batch_size * len(lab.seeds)
    return KEPT + max(0.0, MEASURED[notebook] - KEPT) * here / there, KEPT


def step_seconds(lab: Experiment, limit: float = PROBE_SECONDS) -> float:
    """Seconds of one step of plain adversarial training of all models of one seed here, measured in about `limit` seconds.

    Where one step of all models would take longer than that, one model a worker is timed and scaled up.
    """
    on = farm.device(lab.device)
    few = min(lab.models, farm.workers(on))
    _train(lab, few, 1)  # the first step of a process warms up
    one = (_train(lab, few, 3) - _train(lab, few, 1)) / 2
    models = lab.models if one * lab.models / few < limit / 2 else few
    begun = _train(lab, models, 1)
    steps = max(1, min(40, int(limit / 2 / begun)))
    return max(_train(lab, models, 1 + steps) - begun, 1e-9) / steps * lab.models / models


def slowness() -> float:
    """How many times longer than on the tour's two cores the lesson's training steps take on this machine's CPU."""
    return step_seconds(profile("lesson").experiment(device="cpu", progress=False)) / STEP


def uses(lab: Experiment) -> str:
    """The device in words, and why it is not the GPU where there is one."""
    on = farm.device(lab.device)
    if on.type == "cuda":
        return f"GPU {torch.cuda.get_device_name(on)}"
    spare = "; the GPU is left alone" if torch.cuda.is_available() else ""
    return f"CPU, {_count(farm.workers(on), 'worker')}{spare}"


def spell(seconds: float) -> str:
    """'5 seconds', '40 seconds', '3 minutes', '2 hours': no more digits than an estimate has."""
    if seconds < 57.5:
        return f"{max(5, 5 * round(seconds / 5))} seconds"
    minutes = max(1, round(seconds / 60))
    return _count(minutes, "minute") if minutes < 100 else _count(round(minutes / 60), "hour")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _train(lab: Experiment, models: int, steps: int) -> float:
    """Seconds of training from nothing, past the store, with as many models in a chunk as every worker can get."""
    members = lab.members(0, lab.models)[:models]
    recipe = lab.recipe(epochs=steps / max(1, round(lab.dataset.n / 2 / lab.batch_size)))
    chunk = -(-models // farm.workers(farm.device(lab.device)))
    begun = time.perf_counter()
    training.train(lab.dataset, members, recipe, seeds=model_seeds(0, models), device=lab.device, chunk=chunk)
    return time.perf_counter() - begun
