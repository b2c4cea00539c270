"""What anybody's model answered, as arrays by fixed names, checked before it is believed.

>>> outputs = outputs_from_arrays({"logits": z, "labels": y, "membership": member})                     # doctest: +SKIP
>>> outputs.logits.shape, outputs.membership.shape    # ([M, N, K], [M, N])                             # doctest: +SKIP

The names are fixed, so that other tools can write them. One model: `member_logits` or `member_probs` [n, K],
`member_labels` [n], the same with `nonmember_`, and on adversarial inputs `member_adv_logits` or `member_adv_probs` and the
same with `nonmember_`. An ensemble: `logits` or `probs` [M, N, K], `labels` [N], `membership` [M, N], `adv_logits` or
`adv_probs`. Optional for one model, to catch mistakes: `member_ids`, `member_inputs` and the same with `nonmember_`.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from demem_lab.signals import logits_from_probabilities, plain

SIDES = ("member", "nonmember")
SINGLE = tuple(f"{side}_{what}" for side in SIDES for what in (
    "logits", "probs", "labels", "adv_logits", "adv_probs", "ids", "inputs",
))
ENSEMBLE = ("logits", "probs", "labels", "membership", "adv_logits", "adv_probs")
KNOWN = frozenset(SINGLE + ENSEMBLE)
ROUNDING = 1e-3  # how far from 1 a row of probabilities may sum; float16 takes half of it
MANY, MOSTLY = 50, 0.8  # samples, and the share of the most frequent class, from which one answer to all is odd
INVERTED = 0.02  # by how much members may be less accurate than non-members before it is odd, chance aside
LARGEST = 1e100  # differences of larger logits overflow, and no network says such a thing


@dataclass(frozen=True)
class Outputs:
    """Outputs of M models on N samples, checked."""

    logits: np.ndarray  # [M, N, K] float32 or float64; log-probabilities where the file had probabilities
    labels: np.ndarray  # int64 [N]
    membership: np.ndarray  # bool [M, N]
    adv_logits: np.ndarray | None = None  # [M, N, K] on adversarial inputs
    from_probabilities: bool = False
    warnings: tuple[str, ...] = ()
    source: str = "arrays"

    @property
    def models(self) -> int:
        """M."""
        return len(self.membership)

    @property
    def n(self) -> int:
        """N."""
        return len(self.labels)

    @property
    def classes(self) -> int:
        """K."""
        return self.logits.shape[-1]


def outputs_from_arrays(
    arrays: Mapping[str, np.ndarray], *, source: str = "arrays", finest_fpr: float | None = None
) -> Outputs:
    """Check arrays by name and bring them into one form. ValueError with one sentence for whatever does not fit."""
    arrays = {name: _plain(name, a) for name, a in arrays.items()}
    single, ensemble = {"member_labels", "member_logits", "member_probs"} & set(arrays), {"membership"} & set(arrays)
    if single and ensemble:
        raise ValueError("the arrays are of one model (member_...) and of an ensemble (membership) at once; give one kind")
    if not single and not ensemble:
        raise ValueError(
            f"needed: member_logits, member_labels, nonmember_logits, nonmember_labels (or ..._probs), or for an ensemble "
            f"logits, labels, membership; found: {listed(sorted(arrays))}"
        )
    warnings = _unknown(arrays, SINGLE if single else ENSEMBLE)
    parts = _one_model(arrays, warnings) if single else _many_models(arrays)
    outputs = _checked(*parts, warnings, source)
    if finest_fpr is not None:
        from demem_lab.leakage import MIN_FALSE_POSITIVES  # brings pandas and scipy; a file is looked at without them

        smallest = int((~outputs.membership).sum(1).min())
        if finest_fpr * smallest < MIN_FALSE_POSITIVES:
            raise ValueError(
                f"a false positive rate of {finest_fpr:g} needs {int(np.ceil(MIN_FALSE_POSITIVES / finest_fpr)):,} non-members "
                f"of every model, got {smallest:,}, which resolve {MIN_FALSE_POSITIVES / smallest:.2g}; ask for a larger rate"
            )
    return outputs


def utility(outputs: Outputs) -> dict[str, float]:
    """Clean accuracy of members and non-members, and the gap between them."""
    right, member = outputs.logits.argmax(-1) == outputs.labels, outputs.membership
    inside, outside = float(right[member].mean()), float(right[~member].mean())
    return {"accuracy, non-members": outside, "accuracy, members": inside, "gap": inside - outside}


def robust_on(outputs: Outputs) -> dict[str, float]:
    """Accuracy on clean AND on the adversarial inputs that came with them, if any did."""
    if outputs.adv_logits is None:
        return {}
    both = (outputs.logits.argmax(-1) == outputs.labels) & (outputs.adv_logits.argmax(-1) == outputs.labels)
    return {
        "non-members, clean and on the adversarial inputs given": float(both[~outputs.membership].mean()),
        "members, clean and on the adversarial inputs given": float(both[outputs.membership].mean()),
    }


def _one_model(arrays: Mapping[str, np.ndarray], warnings: list[str]):
    tables, labels = {"": [], "adv_": []}, []
    for side in SIDES:
        found = _table(arrays, f"{side}_", 2)
        if found is None or f"{side}_labels" not in arrays:
            raise ValueError(
                f"{side}_logits (or {side}_probs) and {side}_labels are needed, found: {listed(sorted(arrays))}"
            )
        tables[""].append(found)
        labels.append(_labels(f"{side}_labels", arrays[f"{side}_labels"], *found[0].shape))
        moved = _table(arrays, f"{side}_adv_", 2)
        if moved is not None:
            if moved[0].shape != found[0].shape:
                raise ValueError(f"{side}_adv must be shaped like {side}, {list(found[0].shape)}, got {list(moved[0].shape)}")
            tables["adv_"].append(moved)
    if len(tables["adv_"]) == 1:
        raise ValueError("outputs on adversarial inputs are needed for members AND non-members, or for neither")
    if tables[""][0][0].shape[1] != tables[""][1][0].shape[1]:
        raise ValueError(
            f"members and non-members must have the same number of classes, got {tables[''][0][0].shape[1]} and "
            f"{tables[''][1][0].shape[1]}"
        )
    for what in ("ids", "inputs"):
        shared = _shared(arrays, what, [len(part) for part in labels])
        if shared:
            raise ValueError(
                f"{shared} of the members and non-members have equal {what}: a sample cannot be both; remove it from one side"
            )
    same = _equal_rows(*(table for table, _ in tables[""]))
    if same:
        warnings.append(f"{same} members have exactly the outputs of some non-member; check that no sample is on both sides")
    sizes = [len(part) for part in labels]
    membership = (np.arange(sum(sizes)) < sizes[0])[None]
    joined = {kind: np.concatenate([t for t, _ in parts])[None] if parts else None for kind, parts in tables.items()}
    probabilities = [p for parts in tables.values() for _, p in parts]
    return joined[""], np.concatenate(labels), membership, joined["adv_"], probabilities


def _many_models(arrays: Mapping[str, np.ndarray]):
    found = _table(arrays, "", 3)
    if found is None or "labels" not in arrays:
        raise ValueError(f"an ensemble needs logits (or probs), labels and membership, found: {listed(sorted(arrays))}")
    table, probabilities = found
    membership = arrays["membership"]
    if membership.shape != table.shape[:2]:
        raise ValueError(f"membership must be [M, N] = {list(table.shape[:2])}, got {list(membership.shape)}")
    if membership.dtype.kind not in "biuf" or not np.isin(membership, (0, 1)).all():
        raise ValueError("membership must hold only True and False (or 1 and 0)")
    moved = _table(arrays, "adv_", 3)
    if moved is not None and moved[0].shape != table.shape:
        raise ValueError(f"adv_logits must be shaped like logits, {list(table.shape)}, got {list(moved[0].shape)}")
    labels = _labels("labels", arrays["labels"], *table.shape[1:])
    kinds = [probabilities] + ([] if moved is None else [moved[1]])
    return table, labels, membership.astype(bool), None if moved is None else moved[0], kinds


def _checked(logits, labels, membership, adv_logits, probabilities: list[bool], warnings: list[str], source: str) -> Outputs:
    rows = membership.sum(1)
    if (rows == 0).any() or (rows == membership.shape[1]).any():
        bad = np.flatnonzero((rows == 0) | (rows == membership.shape[1]))[:5].tolist()
        raise ValueError(f"every model needs at least one member and one non-member, models {bad} do not have both")
    if any(probabilities):
        warnings.append(
            "computed from probabilities: confidences that rounded to 1 (in float32, all within 6e-8 of it) look alike, and "
            "those under 1e-15 are cut; save logits where you can"
        )
    warnings += _suspicions(logits, labels, membership)
    return Outputs(logits, labels, membership, adv_logits, any(probabilities), tuple(warnings), source)


def _suspicions(logits: np.ndarray, labels: np.ndarray, membership: np.ndarray) -> list[str]:
    """What is legal and looks like a mistake; never said where chance in few samples would look like it."""
    answers, twice = logits.argmax(-1), []
    first: dict[bytes, int] = {}
    for number, table in enumerate(logits):
        same = first.setdefault(hashlib.sha256(np.ascontiguousarray(table)).digest(), number)
        if same != number:
            twice.append(f"models {same} and {number} have identical outputs; was one file written twice?")
    told = twice[:5]
    often = np.bincount(labels).max() / len(labels)
    if len(labels) >= MANY and often < MOSTLY:  # a model may well call everything by a class that nearly everything has
        dull = np.flatnonzero((answers == answers[:, :1]).all(1))
        told += [f"model {number} gives one answer to everything, class {answers[number, 0]}" for number in dull[:5]]
    right = answers == labels
    inside, outside = (float((right & side).sum() / side.sum()) for side in (membership, ~membership))
    # one model's samples, though there may be more models: their mistakes are on the same samples
    size = min(membership.sum(1).min(), (~membership).sum(1).min())
    chance = np.sqrt(2 * right.mean() * (1 - right.mean()) / size)
    if outside - inside > max(INVERTED, 4 * chance):
        told.append(
            f"members are less accurate than non-members by {100 * (outside - inside):.1f} percentage points: is membership "
            "inverted?"
        )
    return told


def _table(arrays: Mapping[str, np.ndarray], prefix: str, axes: int) -> tuple[np.ndarray, bool] | None:
    """(logits, whether they were probabilities) under `prefix`logits or `prefix`probs; None when neither is there."""
    names = [name for name in (f"{prefix}logits", f"{prefix}probs") if name in arrays]
    if not names:
        return None
    if len(names) == 2:
        raise ValueError(f"give either {names[0]} or {names[1]}, not both")
    name, table = names[0], arrays[names[0]]
    if table.ndim != axes or 0 in table.shape or table.shape[-1] < 2:
        wanted = "[n, K]" if axes == 2 else "[M, N, K]"
        raise ValueError(f"{name} must have shape {wanted} with no empty axis and at least 2 classes, got {list(table.shape)}")
    if table.dtype.kind not in "iuf":
        raise ValueError(f"{name} must hold numbers, got {table.dtype}; save float32 or float64")
    if table.dtype not in (np.float32, np.float64):
        table = table.astype(np.float32 if table.dtype == np.float16 else np.float64)
    wrong = ~np.isfinite(table)
    if wrong.any():
        where = [int(i) for i in np.argwhere(wrong)[0]]
        count = int(wrong.sum())
        raise ValueError(f"{name} holds {count} values that are NaN or infinite, the first at {where}; remove or mend them")
    low, high = float(table.min()), float(table.max())
    if max(-low, high) > LARGEST:
        raise ValueError(f"{name} must lie within {LARGEST:g} of 0, got values from {low:g} to {high:g}; these are no logits")
    sums = table.sum(-1, dtype=np.float64)
    inside = low >= -1e-6 and high <= 1 + 1e-6
    if name.endswith("probs"):
        if not inside:
            raise ValueError(f"{name} must lie in [0, 1], got values from {low:g} to {high:g}; are these logits?")
        worst = np.unravel_index(np.abs(sums - 1).argmax(), sums.shape)
        if abs(sums[worst] - 1) > ROUNDING:
            raise ValueError(f"the rows of {name} must sum to 1, row {[int(i) for i in worst]} sums to {sums[worst]:.4g}")
        return logits_from_probabilities(table), True
    if inside and np.abs(sums - 1).max() < ROUNDING:
        raise ValueError(f"{name} look like probabilities (all in [0, 1], rows sum to 1); name them {name[:-6]}probs")
    return table, False


def _labels(name: str, labels: np.ndarray, n: int, classes: int) -> np.ndarray:
    if labels.ndim == 2 and labels.shape == (n, classes) and (labels.sum(1) == 1).all():
        raise ValueError(f"{name} are one-hot, {list(labels.shape)}; give class numbers: {name}.argmax(1)")
    if labels.shape != (n,):
        raise ValueError(f"{name} must have shape [{n}], one for each row of outputs, got {list(labels.shape)}")
    if labels.dtype.kind not in "iufb":
        raise ValueError(f"{name} must be whole numbers, got {labels.dtype} such as {listed(labels[:1])}")
    broken = labels != np.round(labels)  # also where a label is NaN
    if broken.any():
        raise ValueError(f"{name} must be whole numbers, got {labels[broken][0]:g}; give the number of the class, from 0")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"{name} must lie in 0..{classes - 1}, got values from {labels.min():g} to {labels.max():g}")
    return labels.astype(np.int64)


def _plain(name: str, a) -> np.ndarray:
    if np.ma.is_masked(a):
        raise ValueError(f"{name} is a masked array, and its mask would be lost; leave out its {a.mask.sum()} masked entries")
    try:
        a = plain(a)
    except (ValueError, TypeError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{name} is no array of numbers, with rows of one length ({said}); give a NumPy array") from None
    if a.dtype.kind == "O":
        raise ValueError(f"{name} is an array of Python objects, which is a pickle in disguise; save plain numbers")
    return a


def _unknown(arrays: Mapping[str, np.ndarray], known: tuple[str, ...]) -> list[str]:
    told = []
    for name in sorted(set(arrays) - set(known)):
        near = difflib.get_close_matches(name, known, 1)
        told.append(name + (f" (did you mean {near[0]}?)" if near else ""))
    return [f"not used, because the names mean nothing here: {listed(told)}"] if told else []


def _shared(arrays: Mapping[str, np.ndarray], what: str, sizes: list[int]) -> int:
    sides = [arrays.get(f"{side}_{what}") for side in SIDES]
    if any(side is None for side in sides):
        return 0
    for side, values, size in zip(SIDES, sides, sizes, strict=True):
        if values.shape[:1] != (size,) or (what == "ids" and values.ndim != 1):
            raise ValueError(f"{side}_{what} must have {size} entries, one for each sample, got shape {list(values.shape)}")
    if what == "ids" and sides[0].dtype.kind != sides[1].dtype.kind:
        sides = [side.astype(str) for side in sides]  # 7 and "7" are one person
    return _equal_rows(*sides)


def _equal_rows(a: np.ndarray, b: np.ndarray) -> int:
    """How many rows of a are, byte for byte in their common type, a row of b."""
    if a.shape[1:] != b.shape[1:]:
        return 0
    common = np.result_type(a, b)
    a, b = (np.ascontiguousarray(side.astype(common, copy=False)) for side in (a, b))
    others = {row.tobytes() for row in b}
    return sum(row.tobytes() in others for row in a)


def listed(names: Iterable, *, most: int = 8) -> str:
    """Names from a stranger's file as one short line, without characters that a terminal would obey."""
    names = [str(name) for name in names]
    shown = ", ".join("".join(c if c.isprintable() else "?" for c in name)[:60] for name in names[:most])
    return (shown + (f" and {len(names) - most:,} more" if len(names) > most else "")) or "nothing"
