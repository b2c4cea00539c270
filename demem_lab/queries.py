"""What trained models answer: the tables that all measuring reads.

>>> clean = outputs(ensemble, digits)                                # logits [M, N, K]              # doctest: +SKIP
>>> moved = outputs(ensemble, digits, attack=PGD(0.1, 10))           # on each model's own examples  # doctest: +SKIP
"""

from __future__ import annotations

import threading
from concurrent.futures import Executor
from dataclasses import dataclass, replace

import numpy as np
import torch

from demem_lab import farm
from demem_lab.attacks import PGD, Loss, cross_entropy, frozen
from demem_lab.data import Dataset, Deposited
from demem_lab.store import Store
from demem_lab.streams import Streams
from demem_lab.training import Ensemble, Recipe
from demem_lab.validate import integer

LARGE = 1_000_000  # parameters of a model


def outputs(
    ensemble: Ensemble, dataset: Dataset, *, attack: PGD | None = None, loss: Loss = cross_entropy,
    device: str = "auto", block: int = 300, only: np.ndarray | None = None, executor: Executor | None = None,
    store: Store | None = None, stop: threading.Event | None = None, chunk: int | None = None,
) -> np.ndarray:
    """Logits [M, N, K] float32 of every model on every sample, clean or on that model's own adversarial examples.

    `loss` is what the attack increases. The one table that all measuring reads. Attacks run at full strength, no sample is
    dropped early. A random start, if the attack has one, comes from each model's own stream. only: bool [M, N], the samples
    each model is asked about (default all); the other rows are NaN. block: samples asked about at once. executor: as in
    `train`; store: where its workers read the images, which every chunk carries otherwise. Models that do not fit into memory
    together are asked one after the other; MemoryError when one does not. stop: once set (by another thread),
    KeyboardInterrupt. chunk: models asked at once (default: up to 16; large ones one by one on a GPU).
    """
    on = farm.device(device) if executor is None else farm.device_of(executor, device)
    per_chunk = 16 if executor is not None else min(16, -(-ensemble.models // farm.workers(on)))  # more only costs memory here
    if on.type == "cuda" and sum(t[0].numel() for t in ensemble.parameters.values()) >= LARGE:
        per_chunk = 1  # channels last and own kernels, which models side by side do not have
    per_chunk = per_chunk if chunk is None else integer("chunk", chunk, low=1)
    questions = []
    images = dataset
    if executor is not None and store is not None:
        images = Deposited.of(dataset, Store(store.root.absolute()))
    for first in range(0, ensemble.models, per_chunk):
        rows = list(range(first, min(first + per_chunk, ensemble.models)))
        asked = np.ones((len(rows), dataset.n), dtype=bool) if only is None else np.asarray(only, dtype=bool)[rows]
        # settings, losses and traces do not change an answer, and need not travel
        few = replace(ensemble.part(rows), recipe=Recipe(model=ensemble.recipe.model), trace=None)
        questions.append(_Question(few, images, attack, loss, on, block, asked))
    how = {"at_once": farm.workers(on), "executor": executor, "stop": stop, "fix": "ask another one"}
    return np.concatenate(farm.run(_answer, questions, **how))


@dataclass(frozen=True)
class _Question:
    ensemble: Ensemble
    dataset: Dataset | Deposited
    attack: PGD | None
    loss: Loss
    device: torch.device
    block: int
    asked: np.ndarray  # bool [M, N]


def _answer(question: _Question, stop) -> np.ndarray:
    farm.ready(question.device)
    try:
        return _logits(question, stop)
    except torch.OutOfMemoryError:
        models = question.ensemble.models
    if models == 1:
        raise MemoryError(
            f"the memory of {question.device} does not hold one model that is asked about {question.block} samples; "
            "take a smaller block or model, or free the device"
        )
    farm.free(question.device)
    halves = list(range(models // 2)), list(range(models // 2, models))
    return np.concatenate([
        _answer(replace(question, ensemble=question.ensemble.part(rows), asked=question.asked[rows]), stop) for rows in halves
    ])


@torch.no_grad()
def _logits(question: _Question, stop) -> np.ndarray:
    ensemble, dataset, on, asked = question.ensemble, question.dataset, question.device, question.asked
    dataset = dataset.load() if isinstance(dataset, Deposited) else dataset
    net = ensemble.network(device=on)
    if net.replays is not None:
        net.replays.exact = bool(asked.all())  # else blocks have many sizes
    out = np.full((ensemble.models, dataset.n, ensemble.classes), np.nan, dtype=np.float32)
    for start in range(0, dataset.n, question.block):
        if stop is not None and stop.is_set():
            raise KeyboardInterrupt
        wanted = asked[:, start : start + question.block]
        most = int(wanted.sum(1).max())  # models share one forward pass, so all are asked about as many as the busiest
        if not most:
            continue
        index = start + np.argsort(~wanted, axis=1, kind="stable")[:, :most]
        x, y = (t[torch.from_numpy(index).flatten()].to(on) for t in (dataset.x, dataset.y))
        if question.attack is not None:
            rng = Streams(ensemble.seeds, "query", start, device=on)
            x = question.attack(net, x, y, rng=rng, loss=question.loss)
        with frozen(net), torch.no_grad():
            logits = net(x).unflatten(0, (ensemble.models, -1)).float().cpu().numpy()
        np.put_along_axis(out, index[..., None], logits, axis=1)
    out[~asked] = np.nan
    return out


def gradient_norms(
    ensemble: Ensemble, dataset: Dataset, *, attack: PGD | None = None, device: str = "auto", block: int = 300
) -> np.ndarray:
    """[M, N] L2 norm of every sample's own gradient of the cross-entropy, at the trained weights, clean or attacked."""
    on, out = farm.device(device), []
    net = ensemble.network(device=on)
    for start in range(0, dataset.n, block):
        x, y = (t[start : start + block].to(on) for t in (dataset.x, dataset.y))
        x, y = x.repeat(ensemble.models, 1, 1, 1), y.repeat(ensemble.models)
        if attack is not None:
            x = attack(net, x, y, rng=Streams(ensemble.seeds, "query", start, device=on))
        with net.recording():
            loss = cross_entropy(net(x), y).sum()
            layers = [layer for layer in net.layers if layer.calls]
            deltas = iter(torch.autograd.grad(loss, [seen for layer in layers for _, seen in layer.calls]))
            squares = sum(layer.sample_norms([next(deltas) for _ in layer.calls]) for layer in layers)
        out.append(squares.clamp_min(0).sqrt().cpu())
    return torch.cat(out, 1).numpy()
