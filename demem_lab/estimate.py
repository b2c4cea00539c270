"""What a notebook will use on this machine and about how long it takes, said before it starts.

>>> print(status(profile("lesson").experiment(), "05"))                                  # doctest: +SKIP
05: about 4 minutes on this machine, as busy as it is now (if the notebooks before it have run), about 25 seconds when kept
3 seeds x 16 models on 1797 images of digits; CPU, 2 workers; 212 results of these images kept

Nothing is guessed. The seconds of the last tour on two cores are known (`MEASURED`), and so is how long plain
adversarial training took there; a probe of a second trains a few steps of the same kind here, with this notebook's data,
network and number of models, and the ratio of the two carries the tour's seconds over.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace

import torch

from demem_lab import data, farm, protocol, training
from demem_lab.data import Dataset
from demem_lab.experiment import Experiment, profile
from demem_lab.protocol import Protocol
from demem_lab.store import Store
from demem_lab.streams import model_seeds
from demem_lab.training import Recipe

LESSON_IMAGES = 1797  # digits

# profile lesson, two CPU cores, November 2026: seconds of each notebook with nothing kept but the earlier ones' results, and
# with all its results kept
MEASURED = {
    "00": (25, 15), "01": (40, 11), "02": (61, 10), "03": (65, 13), "04": (97, 12), "05": (205, 24), "06": (271, 18),
    "07": (15, 11), "08": (55, 9),
}
BUILT_ON_EARLIER = ("03", "04", "05", "06", "07")  # these read arms of 02 and later ones from the store
STEP = 0.0115  # seconds of one step of the lesson's 16 models, on the same two cores
PLAN_STEP = 0.0125  # the same for the models of the lesson's protocol, notebook 08
PROBE_SECONDS = 1.0
PART = 8  # of a batch, to see first whether a step takes long


def status(lab: Experiment, notebook: str = "", chosen: str | None = None) -> str:
    """What notebook number `notebook` will use with the settings of `lab`, and about how long it takes, in two lines.

    chosen: the profile as the parameters cell names it; of "smoke" a third line says that its numbers mean nothing.
    """
    what = (
        f"{len(lab.seeds)} seeds x {lab.models} models on {lab.dataset.n} images of {lab.dataset.name}; {uses(lab.device)}; "
        f"{_kept(lab.store, lab.dataset)}"
    )
    what += _warning(chosen)
    return _lines(notebook, seconds(lab, notebook), what) if notebook in MEASURED else what


def plan_status(
    plan: Protocol, notebook: str, dataset: Dataset, *, store: Store | None = None, device: str = "auto",
    chosen: str | None = None, elsewhere: str = "",
) -> str:
    """`status` of a notebook that runs a protocol (08): all its treatments, on `dataset`.

    elsewhere: the scheduler whose workers compute; nothing is tried on this machine then, and no time is estimated.
    """
    device, treatments = farm.suited(device, dataset.name), len(protocol.arms_of(plan))
    what = (
        f"{treatments} treatments x {plan.models} models ({plan.model}) on {dataset.n} images of {dataset.name}; "
        f"{f'the workers of {elsewhere}' if elsewhere else uses(device)}; {_kept(store or Store(), dataset)}"
    )
    if elsewhere:
        return f"{notebook}: how long depends on the workers\n{what}{_warning(chosen)}"
    return _lines(notebook, plan_seconds(plan, notebook, dataset, device=device), what + _warning(chosen))


def seconds(lab: Experiment, notebook: str) -> tuple[float, float]:
    """About how long a notebook of `MEASURED` takes here: with the earlier notebooks' results only, and with its own."""
    lesson = profile("lesson")
    there = STEP * _steps(lesson.epochs, LESSON_IMAGES, lesson.batch_size) * lesson.seeds
    here = step_seconds(lab) * _steps(lab.epochs, lab.dataset.n, lab.batch_size) * len(lab.seeds)
    return _carried(notebook, here / there)


def plan_seconds(plan: Protocol, notebook: str, dataset: Dataset, *, device: str = "auto") -> tuple[float, float]:
    """`seconds` of a notebook that runs a protocol. Plain training decides; what asking costs is taken to grow with it."""
    lesson = protocol.PROFILES["lesson"]

    def work(plan: Protocol, images: int) -> float:
        return _steps(plan.epochs, images, plan.batch_size) * len(protocol.arms_of(plan))

    step = _step_seconds(_Probe(dataset, plan.recipe(), plan.models, device))
    return _carried(notebook, step * work(plan, dataset.n) / (PLAN_STEP * work(lesson, LESSON_IMAGES)))


def step_seconds(lab: Experiment, limit: float = PROBE_SECONDS) -> float:
    """Seconds of one step of plain adversarial training of all models of one seed here, measured in about `limit` seconds."""
    return _step_seconds(_Probe(lab.dataset, lab.recipe(), lab.models, lab.device), limit)


def slowness() -> float:
    """How many times longer than on the tour's two cores the lesson's training steps take on this machine's CPU."""
    return step_seconds(profile("lesson").experiment(device="cpu", progress=False)) / STEP


def uses(device: str) -> str:
    """The device in words, and why it is not the GPU where there is one."""
    on = farm.device(device)
    if on.type == "cuda":
        return f"GPU {torch.cuda.get_device_name(on)}"
    spare = "; the GPU is left alone" if torch.cuda.is_available() else ""
    return f"CPU, {_count(farm.workers(on), 'worker')}{spare}"


def spell(seconds: float) -> str:
    """'5 seconds', '40 seconds', '3 minutes', '2 hours', '40 days': no more digits than an estimate has."""
    if seconds < 57.5:
        return f"{max(5, 5 * round(seconds / 5))} seconds"
    minutes, hours = max(1, round(seconds / 60)), round(seconds / 3600)
    if hours < 72:
        return _count(minutes, "minute") if minutes < 100 else _count(hours, "hour")
    return f"{float(f'{seconds / 86_400:.2g}'):,.0f} days"


@dataclass(frozen=True)
class _Probe:
    """What is trained for a moment, past the store."""

    dataset: Dataset
    recipe: Recipe
    models: int
    device: str

    def seconds(self, models: int, steps: int, *, part: int = 1) -> float:
        """Of training some of the models from nothing, with as many in a chunk as every worker can get; a `part`th of a batch."""
        batch = -(-self.recipe.sampler.batch_size // part)
        few = self.dataset.subset(min(self.dataset.n, 64 * batch))  # a step costs the same, and few steps are many epochs
        recipe = replace(self.recipe, sampler=replace(self.recipe.sampler, batch_size=batch))
        recipe = replace(recipe, epochs=steps / max(1, round(few.n / 2 / batch)))
        chunk = -(-models // farm.workers(farm.device(self.device)))
        members, seeds = data.member_masks(few.n, self.models, seed=0)[:models], model_seeds(0, models)
        begun = time.perf_counter()
        training.train(few, members, recipe, seeds=seeds, device=self.device, chunk=chunk)
        return time.perf_counter() - begun


def _step_seconds(probe: _Probe, limit: float = PROBE_SECONDS) -> float:
    """Where one step of all models would take longer than the limit, one model a worker is timed and scaled up."""
    few = min(probe.models, farm.workers(farm.device(probe.device)))
    probe.seconds(few, 1, part=PART)  # the first step of a process warms up
    rough = PART * probe.seconds(few, 1, part=PART)
    if rough > 5 * limit:  # hours or days are to come: nobody waits a minute to learn how many
        return rough * probe.models / few
    one = (probe.seconds(few, 3) - probe.seconds(few, 1)) / 2
    models = probe.models if one * probe.models / few < limit / 2 else few
    begun = probe.seconds(models, 1)
    steps = max(1, min(40, int(limit / 2 / begun)))
    return max(probe.seconds(models, 1 + steps) - begun, 1e-9) / steps * probe.models / models


def _steps(epochs: float, images: int, batch_size: int) -> float:
    return epochs * images / 2 / batch_size


def _carried(notebook: str, ratio: float) -> tuple[float, float]:
    first, again = MEASURED[notebook]
    return again + max(0.0, first - again) * ratio, again


def _lines(notebook: str, took: tuple[float, float], what: str) -> str:
    first, again = map(spell, took)
    if first == again:
        return f"{notebook}: about {first} on this machine\n{what}"
    earlier = " (if the notebooks before it have run)" if notebook in BUILT_ON_EARLIER else ""
    return f"{notebook}: about {first} on this machine, as busy as it is now{earlier}, about {again} when kept\n{what}"


def _warning(chosen: str | None) -> str:
    if chosen is None or (chosen or os.environ.get("DEMEM_PROFILE")) != "smoke":
        return ""
    return "\nprofile smoke tests the code: numbers and verdicts below mean nothing"


def _kept(store: Store, dataset: Dataset) -> str:
    return f"{_count(store.count(dataset.fingerprint), 'result')} of these images kept"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
