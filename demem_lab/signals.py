"""What an attacker reads from a model's outputs: one number for each sample, in float64.

>>> z, y = np.array([[[4.0, 0.0, 0.0], [0.0, 0.0, 9.0]]]), np.array([0, 0])       # logits [M=1, N=2, K=3], labels [N]
>>> confidence(z, y).round(3).tolist()
[[0.965, 0.0]]

Every function takes logits [..., N, K] and labels [N] and returns [..., N]. They are computed from logits because a
confidence that rounds to 1 has lost what an attack lives on; `logits_from_probabilities` is for those who have nothing
else. `SIGNALS` holds them turned so that higher always means "more likely a member".
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from demem_lab.validate import finite

SMALLEST = 1e-15
BLOCK = 1 << 18  # numbers at once: temporaries in float64 would else be fifteen times the table


def cross_entropy(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """-log p_y, the loss."""
    return _by_block(lambda z, y: -_pick(_log_softmax(z), y), logits, y)


def confidence(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """p_y, the probability given to the right label (Yeom et al. 2018)."""
    return np.exp(-cross_entropy(logits, y))


def logit_margin(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """log p_y - log(1 - p_y), LiRA's signal, straight from the logits: exact where p_y rounds to 0 or 1."""

    def margin(z: np.ndarray, y: np.ndarray) -> np.ndarray:
        z = z.copy()
        right = _pick(z, y)
        np.put_along_axis(z, _index(z, y), -np.inf, axis=-1)
        return right - _logsumexp(z)

    return _by_block(margin, logits, y)


def entropy(logits: np.ndarray, y: np.ndarray | None = None) -> np.ndarray:
    """-sum_k p_k log p_k: how undecided the model is. Labels are not needed (`y` is there for the common form)."""

    def of(z: np.ndarray, _) -> np.ndarray:
        log_p = _log_softmax(z)
        return -(np.exp(log_p) * log_p).sum(-1)

    return _by_block(of, logits)


def modified_entropy(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """-(1 - p_y) log p_y - sum_{k != y} p_k log(1 - p_k): an entropy that knows the label (Song & Mittal 2021, eq. 7)."""

    def of(z: np.ndarray, y: np.ndarray) -> np.ndarray:
        log_p = _log_softmax(z)
        log_rest = _log_one_minus(z, log_p)
        terms = np.exp(log_p) * log_rest
        at = _index(z, y)
        np.put_along_axis(terms, at, np.take_along_axis(np.exp(log_rest) * log_p, at, -1), axis=-1)
        return -terms.sum(-1)

    return _by_block(of, logits, y)


def label_robustness(tables: list[np.ndarray], y: np.ndarray) -> np.ndarray:
    """How many of the tables [..., N, K] have the right label on top, as a fraction: the label-only signal.

    Give the clean table and the ones under attack, as many radii as there are: who withstands more is more likely a member
    (Choquette-Choo et al. 2021; Song, Shokri & Mittal 2019). No confidence is read.
    """
    if not len(tables):
        raise ValueError("label robustness needs at least one table of logits, got none")
    return np.mean([(z := plain(table)).argmax(-1) == _labels(z, y) for table in tables], axis=0)


def margin_from_probability(p: np.ndarray, *, smallest: float = SMALLEST) -> np.ndarray:
    """`logit_margin` from probabilities p_y, when there is nothing else. Values are cut to [smallest, 1 - smallest], so
    that everything beyond about 34.5 looks alike: use logits where you can."""
    p = np.clip(_array(p), smallest, 1 - smallest)
    return np.log(p) - np.log1p(-p)


def logits_from_probabilities(p: np.ndarray, *, smallest: float = SMALLEST) -> np.ndarray:
    """Log-probabilities [..., K], which serve as logits. Probabilities below `smallest` are cut, and what rounded to 1 when
    it was written (in float32, all within 6e-8) cannot be told apart again."""
    finite("smallest", smallest, low=1e-300, high=0.5)
    p = np.clip(plain(p), smallest, 1.0, dtype=np.float64)
    return np.log(p, out=p)  # in place: a table of its size is enough


Signal = Callable[[np.ndarray, np.ndarray], np.ndarray]
SIGNALS: dict[str, Signal] = {
    "confidence": confidence,
    "loss": lambda z, y: -cross_entropy(z, y),
    "entropy": lambda z, y: -entropy(z, y),
    "modified_entropy": lambda z, y: -modified_entropy(z, y),
}


def _log_one_minus(z: np.ndarray, log_p: np.ndarray) -> np.ndarray:
    """log(1 - p_k) for all k. Only the largest p can be near 1, and for that one the others are summed instead."""
    top = log_p.argmax(-1)[..., None]
    # the top one is set to 0.5 first: 1 - p would cancel for it, and it is replaced below
    shielded = log_p.copy()
    np.put_along_axis(shielded, top, np.log(0.5), axis=-1)
    out = np.log1p(-np.exp(np.minimum(shielded, np.log(0.5))))
    others = z.copy()
    np.put_along_axis(others, top, -np.inf, axis=-1)
    np.put_along_axis(out, top, (_logsumexp(others) - _logsumexp(z))[..., None], axis=-1)
    return out


def _by_block(function: Signal, logits: np.ndarray, y: np.ndarray | None = None) -> np.ndarray:
    """One model after the other, and of each a block of rows: a table in float64, and its temporaries, would be many times
    its size. The blocks are alike in size, so that none is a single row, whose classes NumPy sums in another order."""
    logits = plain(logits)
    if logits.ndim < 2 or logits.shape[-1] < 2:
        raise ValueError(f"logits must be [..., N, K] with K at least 2 classes, got shape {list(logits.shape)}")
    y = None if y is None else _labels(logits, y)
    flat = logits.reshape(-1, *logits.shape[-2:])
    out = np.empty(flat.shape[:-1])
    rows = max(4, BLOCK // flat.shape[-1])
    edges = np.linspace(0, flat.shape[1], -(-flat.shape[1] // rows) + 1).astype(int)
    for model, of in zip(flat, out, strict=True):
        for first, last in zip(edges, edges[1:], strict=False):
            # class by class in memory: sums over few classes are several times faster when they run along the samples
            z = model[first:last].astype(np.float64, order="F")
            of[first:last] = function(z, None if y is None else y[first:last])
    return out.reshape(logits.shape[:-1])


def _logsumexp(z: np.ndarray) -> np.ndarray:
    """log sum_k exp z_k, [..., N]; -inf where all are -inf."""
    top = z.max(-1)
    with np.errstate(divide="ignore"):  # the log of 0, where every other class has probability 0
        return np.log(np.exp(z - np.where(np.isfinite(top), top, 0)[..., None]).sum(-1)) + np.where(np.isfinite(top), top, 0)


def _log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1)[..., None]
    return z - np.log(np.exp(z).sum(-1))[..., None]


def _labels(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Labels [N] that fit logits [..., N, K]: -1 would silently be the last class."""
    y = np.asarray(y.detach().cpu() if hasattr(y, "detach") else y)
    if y.shape != z.shape[-2:-1]:
        raise ValueError(f"labels must be [N] for logits [..., N, K], got {list(y.shape)} and {list(z.shape)}")
    classes = z.shape[-1]
    if y.size and (y.min() < 0 or y.max() >= classes):
        raise ValueError(
            f"labels must lie in 0..{classes - 1} for logits of {classes} classes, got values from {y.min()} to {y.max()}; "
            "number the classes from 0"
        )
    return y


def _index(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    y = _labels(z, y)
    return np.broadcast_to(y[..., None], (*z.shape[:-1], 1))


def _pick(table: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.take_along_axis(table, _index(table, y), axis=-1)[..., 0]


def plain(x) -> np.ndarray:
    """A tensor on any device, or whatever NumPy takes, as a NumPy array; bfloat16, which NumPy does not have, as float32."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = x.float() if str(x.dtype) == "torch.bfloat16" else x
    return np.asarray(x)


def _array(x) -> np.ndarray:
    return plain(x).astype(np.float64, copy=False)
