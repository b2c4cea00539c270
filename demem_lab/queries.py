"""What trained models answer: the tables that all measuring reads.

>>> clean = outputs(ensemble, digits)                                # logits [M, N, K]              # doctest: +SKIP
>>> moved = outputs(ensemble, digits, attack=PGD(0.1, 10))           # on each model's own examples  # doctest: +SKIP
"""

from __future__ import annotations

import threading

import numpy as np
import torch

from demem_lab import farm
from demem_lab.attacks import PGD, Loss, cross_entropy, frozen
from demem_lab.data import Dataset
from demem_lab.streams import Streams
from demem_lab.training import Ensemble


@torch.no_grad()
def outputs(
    ensemble: Ensemble, dataset: Dataset, *, attack: PGD | None = None, loss: Loss = cross_entropy,
    device: str = "auto", block: int = 300, only: np.ndarray | None = None, stop: threading.Event | None = None,
) -> np.ndarray:
    """Logits [M, N, K] float32 of every model on every sample, clean or on that model's own adversarial examples.

    `loss` is what the attack increases. The one table that all measuring reads. Attacks run at full strength, no sample is
    dropped early. A random start, if the attack has one, comes from each model's own stream. only: bool [M, N], the samples
    each model is asked about (default all); the other rows are NaN. stop: once set (by another thread), KeyboardInterrupt.
    """
    on = farm.device(device)
    farm.one_thread_each(on)
    per_chunk = min(16, -(-ensemble.models // farm.workers(on)))  # more at once only costs memory here
    chunks = [list(range(i, min(i + per_chunk, ensemble.models))) for i in range(0, ensemble.models, per_chunk)]

    def query(rows: list[int], stop) -> np.ndarray:
        net = ensemble.network(rows, on)
        out = np.full((len(rows), dataset.n, ensemble.classes), np.nan, dtype=np.float32)
        asked = np.ones((len(rows), dataset.n), dtype=bool) if only is None else np.asarray(only, dtype=bool)[rows]
        for start in range(0, dataset.n, block):
            if stop is not None and stop.is_set():
                raise KeyboardInterrupt
            wanted = asked[:, start : start + block]
            most = int(wanted.sum(1).max())  # models share one forward pass, so all are asked about as many as the busiest
            if not most:
                continue
            index = start + np.argsort(~wanted, axis=1, kind="stable")[:, :most]
            x, y = (t[torch.from_numpy(index).flatten()].to(on) for t in (dataset.x, dataset.y))
            if attack is not None:
                rng = Streams(tuple(ensemble.seeds[r] for r in rows), "query", start, device=on)
                x = attack(net, x, y, rng=rng, loss=loss)
            with frozen(net), torch.no_grad():
                logits = net(x).unflatten(0, (len(rows), -1)).float().cpu().numpy()
            np.put_along_axis(out, index[..., None], logits, axis=1)
        out[~asked] = np.nan
        return out

    return np.concatenate(farm.run(query, chunks, at_once=farm.workers(on), stop=stop))


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
