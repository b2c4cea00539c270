"""Outputs of anybody's model, read from a file without running anything in it, and checked before they are believed.

>>> outputs = read("outputs.npz")                     # or .safetensors, .csv, a folder of .npy files       # doctest: +SKIP
>>> outputs.logits.shape, outputs.membership.shape    # ([M, N, K], [M, N])                                  # doctest: +SKIP

The names are fixed, so that other tools can write them. One model: `member_logits` or `member_probs` [n, K],
`member_labels` [n], the same with `nonmember_`, and on adversarial inputs `member_adv_logits` or `member_adv_probs` and the
same with `nonmember_`. An ensemble: `logits` or `probs` [M, N, K], `labels` [N], `membership` [M, N], `adv_logits` or
`adv_probs`. Optional for one model, to catch mistakes: `member_ids`, `member_inputs` and the same with `nonmember_`.
"""

from __future__ import annotations

import difflib
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from demem_lab.signals import logits_from_probabilities

SIDES = ("member", "nonmember")
SINGLE = tuple(f"{side}_{what}" for side in SIDES for what in (
    "logits", "probs", "labels", "adv_logits", "adv_probs", "ids", "inputs",
))
ENSEMBLE = ("logits", "probs", "labels", "membership", "adv_logits", "adv_probs")
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib")
MIN_FALSE_POSITIVES = 5


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


def read(path: str | Path, *, finest_fpr: float | None = None) -> Outputs:
    """Read and check a file (.npz, .safetensors, .csv) or a folder of .npy files; never unpickles.

    finest_fpr: the false positive rate that there must be samples enough for. Raises FileNotFoundError, or ValueError with
    one sentence that says what is wrong with the file and what to do.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if path.is_dir():
        arrays = {file.stem: _npy(file) for file in sorted(path.glob("*.npy"))}
        if not arrays:
            raise ValueError(f"the folder {path} holds no .npy files; name them by array, for instance member_logits.npy")
        return outputs_from_arrays(arrays, source=path.name, finest_fpr=finest_fpr)
    if path.suffix in PICKLES or _is_pickle(path):
        raise ValueError(
            f"{path.name} is a pickle (or looks like one), and loading a pickle can run code; save the arrays with numpy.savez "
            "or safetensors"
        )
    readers = {".npz": _npz, ".safetensors": _safetensors, ".csv": _csv}
    if path.suffix == ".npy":
        raise ValueError(f"{path.name} holds one array; put member_logits.npy, member_labels.npy, ... in a folder and give that")
    if path.suffix not in readers:
        raise ValueError(f"{path.name} must end in {', '.join(readers)}, or be a folder of .npy files")
    return outputs_from_arrays(readers[path.suffix](path), source=path.name, finest_fpr=finest_fpr)


def write(path: str | Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """Write arrays under their names to .npz or .safetensors, at once or not at all."""
    path, arrays = Path(path), {name: np.ascontiguousarray(a) for name, a in arrays.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    os.close(handle)
    if path.suffix == ".npz":
        np.savez_compressed(name, **arrays)
    elif path.suffix == ".safetensors":
        from safetensors.numpy import save_file

        save_file(arrays, name)
    else:
        os.unlink(name)
        raise ValueError(f"outputs are written as .npz or .safetensors, got {path.suffix or 'no suffix'}")
    os.replace(name, path)
    return path


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
            f"logits, labels, membership; found: {', '.join(sorted(arrays)) or 'nothing'}"
        )
    warnings = _unknown(arrays, SINGLE if single else ENSEMBLE)
    parts = _one_model(arrays, warnings) if single else _many_models(arrays)
    outputs = _checked(*parts, warnings, source)
    if finest_fpr is not None:
        smallest = int((~outputs.membership).sum(1).min())
        if finest_fpr * smallest < MIN_FALSE_POSITIVES:
            raise ValueError(
                f"a false positive rate of {finest_fpr:g} needs {int(np.ceil(MIN_FALSE_POSITIVES / finest_fpr)):,} non-members "
                f"of every model, got {smallest:,}, which resolve {MIN_FALSE_POSITIVES / smallest:.2g}; ask for a larger rate"
            )
    return outputs


def _one_model(arrays: Mapping[str, np.ndarray], warnings: list[str]):
    tables, labels = {"": [], "adv_": []}, []
    for side in SIDES:
        found = _table(arrays, f"{side}_", 2)
        if found is None or f"{side}_labels" not in arrays:
            there = ", ".join(sorted(arrays))
            raise ValueError(f"{side}_logits (or {side}_probs) and {side}_labels are needed, found: {there}")
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
        raise ValueError(f"an ensemble needs logits (or probs), labels and membership, found: {', '.join(sorted(arrays))}")
    table, probabilities = found
    membership = arrays["membership"]
    if membership.shape != table.shape[:2]:
        raise ValueError(f"membership must be [M, N] = {list(table.shape[:2])}, got {list(membership.shape)}")
    if not np.isin(membership, (0, 1)).all():
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
    return Outputs(logits, labels, membership, adv_logits, any(probabilities), tuple(warnings), source)


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
    if table.dtype not in (np.float32, np.float64):
        table = table.astype(np.float32 if table.dtype == np.float16 else np.float64)
    wrong = ~np.isfinite(table)
    if wrong.any():
        where = [int(i) for i in np.argwhere(wrong)[0]]
        count = int(wrong.sum())
        raise ValueError(f"{name} holds {count} values that are NaN or infinite, the first at {where}; remove or mend them")
    sums = table.sum(-1, dtype=np.float64)
    inside = table.min() >= -1e-6 and table.max() <= 1 + 1e-6
    if name.endswith("probs"):
        if not inside:
            raise ValueError(f"{name} must lie in [0, 1], got values from {table.min():g} to {table.max():g}; are these logits?")
        worst = np.unravel_index(np.abs(sums - 1).argmax(), sums.shape)
        if abs(sums[worst] - 1) > 1e-3:
            raise ValueError(f"the rows of {name} must sum to 1, row {[int(i) for i in worst]} sums to {sums[worst]:.4g}")
        return logits_from_probabilities(table), True
    if inside and np.abs(sums - 1).max() < 1e-4:
        raise ValueError(f"{name} look like probabilities (all in [0, 1], rows sum to 1); name them {name[:-6]}probs")
    return table, False


def _labels(name: str, labels: np.ndarray, n: int, classes: int) -> np.ndarray:
    if labels.ndim == 2 and labels.shape == (n, classes) and (labels.sum(1) == 1).all():
        raise ValueError(f"{name} are one-hot, {list(labels.shape)}; give class numbers: {name}.argmax(1)")
    if labels.shape != (n,):
        raise ValueError(f"{name} must have shape [{n}], one for each row of outputs, got {list(labels.shape)}")
    if labels.dtype.kind not in "iufb" or (labels != np.round(labels)).any():
        raise ValueError(f"{name} must be whole numbers, got {labels.dtype} such as {labels.ravel()[0]!r}")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"{name} must lie in 0..{classes - 1}, got values from {labels.min():g} to {labels.max():g}")
    return labels.astype(np.int64)


def _plain(name: str, a) -> np.ndarray:
    a = np.asarray(a.detach().cpu() if hasattr(a, "detach") else a)
    if a.dtype.kind == "O":
        raise ValueError(f"{name} is an array of Python objects, which is a pickle in disguise; save plain numbers")
    return a


def _unknown(arrays: Mapping[str, np.ndarray], known: tuple[str, ...]) -> list[str]:
    told = []
    for name in sorted(set(arrays) - set(known)):
        near = difflib.get_close_matches(name, known, 1)
        told.append(f"{name}" + (f" (did you mean {near[0]}?)" if near else ""))
    return [f"not used, because the names mean nothing here: {', '.join(told)}"] if told else []


def _shared(arrays: Mapping[str, np.ndarray], what: str, sizes: list[int]) -> int:
    sides = [arrays.get(f"{side}_{what}") for side in SIDES]
    if any(side is None for side in sides):
        return 0
    for side, values, size in zip(SIDES, sides, sizes, strict=True):
        if len(values) != size:
            raise ValueError(f"{side}_{what} must have {size} entries, one for each sample, got {len(values)}")
    if what == "inputs":
        return _equal_rows(*sides)
    return len(set(sides[0].tolist()) & set(sides[1].tolist()))


def _equal_rows(a: np.ndarray, b: np.ndarray) -> int:
    """How many rows of a are, byte for byte, a row of b."""
    others = {row.tobytes() for row in np.ascontiguousarray(b)}
    return sum(row.tobytes() in others for row in np.ascontiguousarray(a).astype(b.dtype, copy=False))


def _is_pickle(path: Path) -> bool:
    """Pickles begin with byte 0x80; torch's checkpoints are archives around one."""
    with path.open("rb") as file:
        first = file.read(2)
    if first[:1] == b"\x80":
        # a safetensors file begins with the length of its header, whose low byte can be 0x80: there, only 0x80 + protocol
        return path.suffix != ".safetensors" or first[1:] in (b"\x02", b"\x03", b"\x04", b"\x05")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    return False


def _npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            needed = sum(_npy_bytes(archive.open(name)) for name in archive.namelist() if name.endswith(".npy"))
        _room(path, needed)
        with np.load(path, allow_pickle=False) as loaded:
            return {name: loaded[name] for name in loaded.files}
    except (zipfile.BadZipFile, OSError, EOFError, KeyError) as error:
        raise ValueError(f"{path.name} is damaged or not an .npz file ({error}); write it again") from None
    except ValueError as error:
        raise _disguise(path, error) from None


def _npy(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            _room(path, _npy_bytes(file))
        return np.load(path, allow_pickle=False)
    except (OSError, EOFError) as error:
        raise ValueError(f"{path.name} is damaged or not an .npy file ({error}); write it again") from None
    except ValueError as error:
        raise _disguise(path, error) from None


def _npy_bytes(file) -> int:
    """How much memory the array needs, from its header alone."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which is a pickle in disguise")
    return int(np.prod(shape, dtype=object)) * dtype.itemsize


def _disguise(path: Path, error: ValueError) -> ValueError:
    if "object" in str(error).lower() or "pickle" in str(error).lower():
        return ValueError(f"{path.name} holds Python objects, a pickle in disguise, which can run code; save plain numbers")
    if "memory" in str(error):
        return error
    return ValueError(f"{path.name} is damaged or not a NumPy file ({error}); write it again")


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    _room(path, path.stat().st_size)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged or not a .safetensors file ({error}); write it again") from None
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path.name} holds numbers that NumPy has no type for ({error}); save float32 instead") from None


def _csv(path: Path) -> dict[str, np.ndarray]:
    """A row a sample: member (0 or 1), label, logit_0.. or prob_0.., optionally adv_logit_0.. or adv_prob_0.., id."""
    import pandas as pd

    _room(path, 3 * path.stat().st_size)
    try:
        frame = pd.read_csv(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path.name} cannot be read as a table ({error})") from None
    if not {"member", "label"} <= set(frame.columns):
        there = ", ".join(map(str, frame.columns[:8]))
        raise ValueError(f"{path.name} needs the columns member (0 or 1) and label, found: {there}")
    if not frame["member"].isin((0, 1)).all():
        raise ValueError(f"the column member of {path.name} must hold only 0 and 1")
    arrays = {}
    for side, flag in (("member", 1), ("nonmember", 0)):
        part = frame[frame["member"] == flag]
        arrays[f"{side}_labels"] = part["label"].to_numpy()
        if "id" in frame:
            arrays[f"{side}_ids"] = part["id"].astype(str).to_numpy(dtype=str)
        for kind, name in (("logit", "logits"), ("prob", "probs"), ("adv_logit", "adv_logits"), ("adv_prob", "adv_probs")):
            columns = [c for c in frame.columns if str(c).startswith(f"{kind}_")]
            wanted = [f"{kind}_{k}" for k in range(len(columns))]
            if set(columns) != set(wanted):
                last = f"{kind}_{len(columns) - 1}"
                raise ValueError(f"the columns {kind}_0 to {last} must be there without gaps, found {columns[:8]}")
            if columns:
                if not all(part[c].dtype.kind in "iuf" for c in wanted):
                    raise ValueError(f"the columns {kind}_... of {path.name} must hold numbers only")
                arrays[f"{side}_{name}"] = part[wanted].to_numpy(dtype=np.float64)
    return arrays


def _room(path: Path, needed: int) -> None:
    """ValueError when the arrays would not fit in memory: better than being killed half way."""
    room = _available()
    if needed > 0.8 * room:
        raise ValueError(
            f"{path.name} needs {needed / 1e9:.3g} GB of memory and {room / 1e9:.3g} GB are free; bring fewer samples or models, "
            "or float32"
        )


def _available() -> int:
    import psutil

    return psutil.virtual_memory().available
