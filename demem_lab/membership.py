"""Who was in the training set? Attacks that turn signals into scores, on plain arrays.

The simplest attack is a signal itself, as a score with one threshold for all (confidence, loss, entropy, ...: `signals`).
The others calibrate it: every model of an ensemble serves as the target in turn, the others are the attacker's shadow
models. Nothing here knows how a model was trained, so anybody's outputs can be audited.

>>> phi = logit_margin(logits, y)                       # [M, N] from logits [M, N, K]          # doctest: +SKIP
>>> leakage = evaluate(lira(phi, member), member)       # member bool [M, N]                    # doctest: +SKIP

Leave one out: the references of a target exclude the target AND its complementary twin (the model trained on exactly the
other samples). Keeping the twin would give every member one out-reference more than it gives non-members, which is
enough to make non-members look like members. Where every sample trained exactly half of the models, but no model has a
twin (the design of the public LiRA code), the models are paired anew for each sample, which does the same.
Sources: LiRA (Carlini et al. 2022), RMIA (Zarifzadeh et al. 2024), thresholds by class (Song & Mittal 2021).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from demem_lab.validate import choice, finite

PRIOR_DEGREES = 8.0  # how many observations the pooled variance counts for in the shrunk variance
VARIANCE_FLOOR = 1e-6
ROUNDING = 1e-12
ONE = 1e-6  # how far above 1 a softmax in float32 may round
COLUMNS = 4096


def twins(member: np.ndarray) -> np.ndarray:
    """int [M]: the row that is the exact complement of each row, -1 where there is none.

    Twins come in pairs: where several rows are alike, each has one twin at most, and is the twin of that one.
    """
    member = np.asarray(member, dtype=bool)
    found, waiting = np.full(len(member), -1), {}
    for m, row in enumerate(member):
        same = waiting.get((~row).tobytes())
        if same:
            found[m] = same.pop(0)
            found[found[m]] = m
        else:
            waiting.setdefault(row.tobytes(), []).append(m)
    return found


def pairing(member: np.ndarray) -> np.ndarray | None:
    """int [M, N]: an order of the models for each sample in which the 2k-th trained on it and the one after it did not.

    Only where every sample trained exactly half of the models and nobody has a twin, else None. A member would have one
    in-reference fewer than a non-member; leaving out one model of the other side as well makes them alike again.
    """
    member = np.asarray(member, dtype=bool)
    if len(member) % 2 or (member.sum(0) * 2 != len(member)).any() or (twins(member) >= 0).any():
        return None
    inside, outside = (np.argsort(~who, axis=0, kind="stable")[: len(member) // 2] for who in (member, ~member))
    return np.stack([inside, outside], 1).reshape(member.shape)


def _in_pairs(attack, order: np.ndarray, member: np.ndarray, *signals: np.ndarray) -> np.ndarray:
    """Scores [M, N] of an attack on rows that are ordered anew for each sample, so that they come in twins."""
    moved = (np.take_along_axis(signal, order[None], 1) for signal in signals)
    scores = np.empty(member.shape)
    np.put_along_axis(scores, order, attack(*moved, np.take_along_axis(member, order, 0)), 0)
    return scores


def missing_references(member: np.ndarray, who: np.ndarray, side: str) -> str:
    """Why some sample lacks a reference in `who` [M, N]; empty when none does."""
    if pairing(member) is not None:
        member = np.arange(len(member))[:, None] % 2 == 0  # as they stand once paired
        who = member if side == "with" else ~member
    models, other = len(member), twins(member)
    if models < 3:
        return f"they need shadow models: outputs of several models trained on known parts of the data, got {models}"
    count = who.sum(0) - who
    has = other >= 0
    count[has] -= who[other[has]]
    if count.min() < 1:
        return f"some sample has no other model {side} it, beside the target and its twin; train 4 in complementary halves"
    return ""


def lira(
    signal: np.ndarray, member: np.ndarray, *, variance: str = "shrunk", online: bool = True, leave_twin_out: bool = True,
    references: np.ndarray | None = None,
) -> np.ndarray:
    """Likelihood-ratio attack: scores [M, N], higher = more likely a member.

    signal: [M, N], or [Q, M, N] for several queries a sample, whose log ratios are added. variance: of each sample's own
    references ("per_sample"), of all samples together ("pooled"), or the own one shrunk towards the pooled one
    ("shrunk": (own sum of squares + 8 pooled) / (own degrees of freedom + 8), the mean of an inverse-gamma posterior).
    Two things differ from the public LiRA code: its fixed variance is the spread of all in- (or out-) signals of all
    samples, differences between samples included, ours the mean spread within a sample; and it takes medians, ours means.
    online: log N(signal; in) - log N(signal; out); offline: one-sided z = (signal - mean out) / std out.
    references: the shadow models' signals, shaped like signal and trained on the same member lists, where they are not the
    targets themselves: the naive attacker, whose shadow models lack the defence. It exists to show how far that misleads.
    leave_twin_out=False is wrong for balanced designs and exists to show how wrong.
    Raises ValueError when there are too few models for the variance asked for.
    """
    choice("variance", variance, ("shrunk", "per_sample", "pooled"))
    signal, member = _checked(signal, member)
    shadows = signal if references is None else _checked(references, member)[0]
    if shadows.shape != signal.shape:
        raise ValueError(f"references must be shaped like the signal, {list(signal.shape)}, got {list(shadows.shape)}")
    order = pairing(member) if leave_twin_out else None
    if order is not None:
        return _in_pairs(
            lambda x, z, who: lira(x, who, variance=variance, online=online, references=z), order, member, signal, shadows
        )
    other = twins(member) if leave_twin_out else np.full(len(member), -1)
    total = np.zeros(member.shape)
    for query, shadow in zip(signal, shadows, strict=True):
        inside, outside = _moments(shadow, member, other), _moments(shadow, ~member, other)
        for name, m in (("in", inside), ("out", outside)):
            needed = 2 if variance == "per_sample" else 1
            if m.count.min() < needed and (online or name == "out"):
                raise ValueError(
                    f"variance={variance!r} needs {needed} {name}-references for every sample and target, got "
                    f"{int(m.count.min())}; train at least {2 * needed + 2} models in complementary halves"
                )
        # one reference each: no spread to estimate, and with equal ones its size drops out
        spread = variance == "per_sample" or (outside.free.any() and (not online or inside.free.any()))
        for part in _parts(member.shape[1]):
            x, a, b = query[:, part], inside.columns(part), outside.columns(part)
            v_in, v_out = (_variances(a, variance), _variances(b, variance)) if spread else (1.0, 1.0)
            if online:
                total[:, part] += _log_normal(x, a.mean, v_in) - _log_normal(x, b.mean, v_out)
            else:
                total[:, part] += (x - b.mean) / np.sqrt(v_out)
    return total


def rmia(
    p: np.ndarray, member: np.ndarray, *, gamma: float = 1.0, offline_a: float | None = None,
    population: np.ndarray | None = None,
) -> np.ndarray:
    """Robust membership inference: scores [M, N] from confidences p_y [M, N] (or [Q, M, N], averaged).

    ratio(x) = p(x | target) / p(x), where p(x) is the mean over in- and out-references, or, offline,
    ((1 + a) p_out + 1 - a) / 2 with a = `offline_a`. With a `population` (bool [N]) the score is the fraction of it whose
    ratio, times gamma, x's ratio reaches. Without one it is the ratio itself, which orders one target's samples alike.
    In the paper several queries vote, here their confidences are averaged; p is the plain softmax of the label.
    Raises ValueError where a p is no probability, or a sample lacks an out-reference (or an in-reference, unless offline).
    """
    finite("gamma", gamma, low=0)
    signal, member = _checked(p, member)
    if signal.min() < 0 or signal.max() > 1 + ONE:
        raise ValueError(
            f"p must lie in [0, 1], got values from {signal.min():g} to {signal.max():g}; RMIA reads probabilities of the label, "
            "signals.confidence(logits, y), not logits or margins"
        )
    if offline_a is not None:
        finite("offline_a", offline_a, low=0, high=1)
    order = pairing(member)
    ratio = _ratio(signal.mean(0), member, offline_a) if order is None else _in_pairs(
        lambda x, who: _ratio(x[0], who, offline_a), order, member, signal.mean(0, keepdims=True)
    )
    if population is None:
        return ratio
    population = np.asarray(population, dtype=bool)
    if population.shape != ratio.shape[1:] or not population.any():
        raise ValueError(f"the population must be bool [{ratio.shape[1]}] and not empty, got shape {list(population.shape)}")
    # LR(x, z) = ratio(x) / ratio(z) >= gamma, counted by one sort instead of comparing all pairs; equal ratios stay equal
    # though their references were averaged in another order
    reach, count = (1 + ROUNDING) / max(gamma, 1e-300), np.empty(ratio.shape)
    for r, row in zip(ratio, count, strict=True):
        order = np.argsort(r)
        row[order] = np.searchsorted(r[order][population[order]], reach * r[order], side="right")
    return count / population.sum()


def _ratio(p: np.ndarray, member: np.ndarray, offline_a: float | None) -> np.ndarray:
    """[M, N] what each target says of each sample, over what its references say."""
    other = twins(member)
    outside = _moments(p, ~member, other)
    if outside.count.min() < 1:
        raise ValueError("RMIA needs an out-reference for every sample and target; train at least 4 models")
    if offline_a is None:
        inside = _moments(p, member, other)
        if inside.count.min() < 1:
            raise ValueError(
                "RMIA needs an in-reference for every sample and target; train at least 4 models in complementary halves, or "
                "give offline_a (0.3 in the paper for CIFAR-10)"
            )
        mean = (inside.mean + outside.mean) / 2
    else:
        mean = ((1 + offline_a) * outside.mean + 1 - offline_a) / 2
    return p / np.maximum(mean, 1e-300)


def by_class(signal: np.ndarray, y: np.ndarray, member: np.ndarray) -> np.ndarray:
    """One threshold for each class, chosen on the shadow models: scores [M, N] from a signal [M, N] and labels [N].

    The score is the share of the target's out-references OF THE SAME CLASS that lie below the sample's signal (ties count
    half), so that one threshold on it is one threshold for each class on the signal, with the same false positive rate in
    all of them. Source: Song & Mittal 2021, section 3.2. Raises ValueError when a class has no out-reference.
    """
    signal, member = _checked(signal, member)
    signal, y, other, out = signal[0], np.asarray(y), twins(member), np.zeros(member.shape)
    if y.shape != member.shape[1:]:
        raise ValueError(f"labels must be [N] = [{member.shape[1]}], got {list(y.shape)}")
    for label in np.unique(y):
        at = np.flatnonzero(y == label)
        values, outside = signal[:, at], ~member[:, at]
        everyone = np.sort(values[outside])
        own = [np.sort(v[o]) for v, o in zip(values, outside, strict=True)]
        for m, x in enumerate(values):
            left_out = [own[m]] + ([own[other[m]]] if other[m] >= 0 else [])
            size = len(everyone) - sum(map(len, left_out))
            if size < 1:
                raise ValueError(f"class {label} has no out-reference for model {m}; train more models, or merge classes")
            order = np.argsort(x)  # neighbours in order are neighbours in memory: several times faster
            out[m, at[order]] = (_midrank(everyone, x[order]) - sum(_midrank(part, x[order]) for part in left_out)) / size
    return out


def treated_inference(signal: np.ndarray, references: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Who of the members was treated (protected, dropped)? Scores [M, N], NaN for non-members; higher = more likely.

    signal [M, N] of the defended models, references [M, N] of undefended models with the same member lists. A treated member
    looks less like a member than undefended models would have made it: the score is how many standard deviations less. A
    protected set that was chosen from the data is itself something to hide; this measures how badly it is hidden.
    """
    signal, member = _checked(signal, member)
    shadows = _checked(references, member)[0]
    inside = _moments(shadows[0], member, twins(member))
    if inside.count.min() < 1:
        raise ValueError("an in-reference is needed for every sample and target; train at least 4 models in complementary halves")
    spread = np.sqrt(_variances(inside, "shrunk")) if inside.free.any() else 1.0  # one reference each has no spread
    return np.where(member, (inside.mean - signal[0]) / spread, np.nan)


@dataclass(frozen=True)
class _Moments:
    count: np.ndarray  # [M, N] references
    mean: np.ndarray
    squares: np.ndarray  # sum of squared deviations from the mean
    free: np.ndarray  # [M, 1] degrees of freedom of all samples together
    pooled: np.ndarray  # [M, 1] variance over all samples, from that target's references only

    def columns(self, part: slice) -> _Moments:
        """The same for some of the samples."""
        return replace(self, count=self.count[:, part], mean=self.mean[:, part], squares=self.squares[:, part])


def _parts(n: int) -> list[slice]:
    """Columns a few at a time: what a step reads and writes stays in the processor's cache."""
    return [slice(start, start + COLUMNS) for start in range(0, n, COLUMNS)]


def _moments(signal: np.ndarray, who: np.ndarray, other: np.ndarray) -> _Moments:
    """Moments of the references in `who`, for every target: of all models before it and all after it, joined.

    Nothing is subtracted from a total, so one model with huge outputs spoils no reference but its own (Chan et al. 1979).
    """
    blocks = [[m] if t < 0 else [m, t] for m, t in enumerate(other) if t < 0 or m < t]
    found = tuple(np.empty(signal.shape) for _ in range(3))
    free = squares = np.zeros((len(signal), 1))
    for part in _parts(signal.shape[1]):
        values, present = signal[:, part], who[:, part]
        rows = tuple(array[:, part] for array in found)
        for order in (blocks, blocks[::-1]):
            seen = (0.0, *(np.zeros(values.shape[1]) for _ in range(2)))
            for first, *twin in order:
                together = seen if order is blocks else _joined(tuple(row[first] for row in rows), seen)
                for row, value in zip(rows, together, strict=True):
                    row[[first, *twin]] = value
                if twin:  # exactly one of twins has seen a sample
                    seen = _added(seen, np.where(present[first], values[first], values[twin[0]]), 1.0)
                else:
                    seen = _added(seen, values[first], present[first].astype(np.float64))
        free = free + np.maximum(rows[0] - 1, 0).sum(1, keepdims=True)
        squares = squares + rows[2].sum(1, keepdims=True)
    return _Moments(*found, free, squares / np.maximum(free, 1))


def _joined(a: tuple[np.ndarray, ...], b: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """(count, mean, sum of squared deviations) of two sets together."""
    (n, mean, squares), (k, its_mean, its_squares) = a, b
    total = n + k
    share, gap = k / np.maximum(total, 1), its_mean - mean
    return total, mean + gap * share, squares + its_squares + gap * gap * n * share


def _added(a: tuple[np.ndarray, ...], value: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, ...]:
    """The same when one value joins where `present` is 1 (Welford 1962)."""
    n, mean, squares = a
    total, gap = n + present, value - mean
    moved = mean + gap * (present / np.maximum(total, 1))
    return total, moved, squares + gap * present * (value - moved)  # in this order: a huge absent value is 0, not inf * 0


def _variances(m: _Moments, kind: str) -> np.ndarray:
    if kind == "per_sample":
        return np.maximum(m.squares / np.maximum(m.count, 1), VARIANCE_FLOOR)
    if kind == "pooled":
        return np.maximum(np.broadcast_to(m.pooled, m.squares.shape), VARIANCE_FLOOR)
    free = np.maximum(m.count - 1, 0)
    return np.maximum((m.squares + PRIOR_DEGREES * m.pooled) / (free + PRIOR_DEGREES), VARIANCE_FLOOR)


def _log_normal(x: np.ndarray, mean: np.ndarray, variance) -> np.ndarray:
    return -((x - mean) ** 2) / (2 * variance) - np.log(variance) / 2


def _checked(signal: np.ndarray, member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    signal, member = _array(signal), np.asarray(member, dtype=bool)
    signal = signal[None] if signal.ndim == 2 else signal
    if signal.ndim != 3 or signal.shape[1:] != member.shape:
        raise ValueError(f"signal must be [M, N] or [Q, M, N] with member [M, N], got {signal.shape} and {member.shape}")
    if not signal.size:
        shape = list(signal.shape[-2:])
        raise ValueError(f"an attack needs at least one model and one sample, got {shape}; check how they were chosen")
    if not np.isfinite(signal).all():
        raise ValueError("the signal must be finite; compute it from logits with logit_margin")
    return signal, member


def _array(x) -> np.ndarray:
    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x, dtype=np.float64)


def _midrank(ordered: np.ndarray, x: np.ndarray) -> np.ndarray:
    """How many of `ordered` lie below x, ties counted half."""
    return (np.searchsorted(ordered, x, side="left") + np.searchsorted(ordered, x, side="right")) / 2
