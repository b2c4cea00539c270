"""Outputs of anybody's model, read from a file without running anything in it.

>>> outputs = read("outputs.npz")                     # or .safetensors, .csv, .npy files                   # doctest: +SKIP
>>> outputs.logits.shape, outputs.membership.shape    # ([M, N, K], [M, N])                                  # doctest: +SKIP

The names of the arrays are fixed (see `outputs`). Nothing is unpickled, and nothing is read whose header asks for more
memory than there is.
"""

from __future__ import annotations

import io
import os
import re
import secrets
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from demem_lab import limits
from demem_lab.outputs import KNOWN, Outputs, listed, outputs_from_arrays
from demem_lab.validate import shown

PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib")
# Bytes that reading and auditing take at their peak, measured from 2 to 100 classes, for one model and for 16 to 64: an array
# as it is read, its table in the precision that it is kept in, copied as often as this, and scores a sample and model. What
# was measured lies between a half and all of the sum.
COPIES = {"one model": 2.5, "ensemble": 1.5}
SCORES = 80
AT_LEAST = 40_000_000  # blocks of rows, tables of rates
TABLE = re.compile(r"((non)?member_)?(adv_)?(logits|probs)")
LONGEST_HEADER = 10_000  # bytes; NumPy's own limit, checked before the header is read
DAMAGE = (
    zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError, SyntaxError, OSError, EOFError, ValueError, KeyError,
    TypeError, RuntimeError, OverflowError,
)  # what NumPy and zipfile raise over damaged files; NotImplementedError (an unknown compression) is a RuntimeError


def read(path: str | Path | Sequence[str | Path], *, finest_fpr: float | None = None) -> Outputs:
    """Read and check a file (.npz, .safetensors, .csv), several .npy files, or a folder of them; never unpickles.

    finest_fpr: the false positive rate that there must be samples enough for. Raises FileNotFoundError, or ValueError with
    one sentence that says what is wrong with the file and what to do.
    """
    paths = [Path(path)] if isinstance(path, (str, Path)) else [Path(one) for one in path]
    for one in paths:
        _believable(one)
    first = paths[0]
    if first.suffix.lower() == ".npy" or first.is_dir():
        arrays = _npys(paths)
    elif len(paths) > 1:
        raise ValueError(f"only .npy files are read together, got {listed(p.name for p in paths)}; read one after the other")
    else:
        readers = {".npz": _npz, ".safetensors": _safetensors, ".csv": _csv}
        if first.suffix.lower() not in readers:
            raise ValueError(f"{first.name} must end in {', '.join(readers)} or .npy, or be a folder of .npy files")
        arrays = readers[first.suffix.lower()](first)
    return outputs_from_arrays(arrays, source=listed(p.name for p in paths), finest_fpr=finest_fpr)


def of_anybody(subject, *, source: str = "arrays") -> Outputs:
    """`Outputs` from arrays by name, from the path of a file or folder, or as they are. ValueError for anything else."""
    if isinstance(subject, Outputs):
        return subject
    if isinstance(subject, (str, Path)):
        return read(subject)
    if not isinstance(subject, Mapping):
        raise ValueError(
            f"subject must be arrays by name, Outputs, the path of a file or a torch.nn.Module, got {shown(subject)}"
        )
    return outputs_from_arrays(subject, source=source)


def write(path: str | Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """Write arrays under their names to .npz or .safetensors, at once or not at all."""
    path, arrays = Path(path), {name: np.ascontiguousarray(a) for name, a in arrays.items()}
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"outputs are written as .npz or .safetensors, got {path.suffix or 'no suffix'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    # not by mkstemp, whose files are for their owner alone: here the umask decides
    fresh = path.with_name(f".{os.getpid()}-{secrets.token_hex(8)}{path.suffix}")
    try:
        if path.suffix == ".npz":
            np.savez_compressed(fresh, **arrays)
        else:
            from safetensors.numpy import save

            fresh.write_bytes(save(arrays))  # its save_file sets a mode of its own
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    return path


def _believable(path: Path) -> None:
    """FileNotFoundError or ValueError for what is not a file of arrays at all; looks at a few bytes only."""
    if path.is_dir():
        return
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if not path.is_file():
        raise ValueError(f"{path} is neither a file nor a folder; give a file of outputs")
    if path.suffix.lower() in PICKLES or _is_pickle(path):
        raise ValueError(
            f"{path.name} is a pickle (or looks like one), and loading a pickle can run code; save the arrays with numpy.savez "
            "or safetensors"
        )


def _is_pickle(path: Path) -> bool:
    """Pickles begin with byte 0x80; torch's checkpoints are archives around one."""
    with path.open("rb") as file:
        first = file.read(9)
    if first[:1] == b"\x80":
        # a safetensors file begins with the length of its header, which can have that byte too; then comes the header, in JSON
        return path.suffix.lower() != ".safetensors" or first[8:] != b"{"
    if zipfile.is_zipfile(path):
        with _readable(path, "an archive"), zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    return False


def _npys(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """Arrays named by their files; folders stand for the .npy files in them."""
    files = [file for path in paths for file in (sorted(path.glob("*.npy")) if path.is_dir() else [path])]
    if not files:
        raise ValueError(f"the folder {paths[0]} holds no .npy files; name them by array, for instance member_logits.npy")
    other = [file.name for file in files if file.suffix.lower() != ".npy"]
    if other:
        raise ValueError(f"only .npy files are read together, got {listed(other)} among them")
    if len({file.stem for file in files}) < len(files):
        raise ValueError(f"two files have the same name among {listed(file.name for file in files)}; the name says which array")
    if len(files) == 1 and files[0].stem not in KNOWN:
        raise ValueError(
            f"{files[0].name} holds one array, and its name does not say which; give member_logits.npy, member_labels.npy, ... "
            "together, or their folder"
        )
    with _readable(files[0], "an .npy file"):
        needed = 0
        for file in files:
            with file.open("rb") as opened:
                needed += _needed(file.stem, *_npy_header(opened)) if file.stem in KNOWN else 0
        _room(paths[0], needed)
        return {f.stem: np.load(f, allow_pickle=False) if f.stem in KNOWN else np.empty(0) for f in files}


def _npz(path: Path) -> dict[str, np.ndarray]:
    with _readable(path, "an .npz file"), zipfile.ZipFile(path) as archive:
        # only what has a meaning is unpacked: a name that nobody asked for could be a bomb
        names = {name.removesuffix(".npy"): name for name in archive.namelist()}
        wanted = {short: name for short, name in names.items() if short in KNOWN and name != short}
        _room(path, sum(_needed(short, *_npy_header(archive.open(name))) for short, name in wanted.items()))
        arrays = {short: np.lib.format.read_array(archive.open(name), allow_pickle=False) for short, name in wanted.items()}
    return {short: arrays.get(short, np.empty(0)) for short in names}


@contextmanager
def _readable(path: Path, kind: str) -> Iterator[None]:
    """Whatever a damaged NumPy file makes the readers say, as one sentence."""
    try:
        yield
    except _NoRoom:
        raise
    except DAMAGE as error:
        said = " ".join(str(error).split())[:200]
        if "object" in said.lower() or "pickle" in said.lower():
            said = f"{path.name} holds Python objects, a pickle in disguise, which can run code; save plain numbers"
        else:
            said = f"{path.name} is damaged or not {kind} ({said}); write it again"
        raise ValueError(said) from None


def _npy_header(file) -> tuple[tuple[int, ...], int]:
    """Shape and bytes an element of an array, from its header alone."""
    start = file.read(12)
    length = int.from_bytes(start[8:10] if start[6:7] == b"\x01" else start[8:12], "little")
    if length > LONGEST_HEADER:
        raise ValueError(f"a header of {length:,} bytes")
    header = io.BytesIO(start + file.read(length))
    version = np.lib.format.read_magic(header)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(header)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which is a pickle in disguise")
    if min(shape, default=0) < 0:
        raise ValueError(f"a shape of {list(shape)}")
    return shape, dtype.itemsize


def _needed(name: str, shape: Sequence[int], size: int) -> int:
    """How much memory an audit takes for the array of that name, shape and bytes an element."""
    elements = int(np.prod(shape, dtype=object))
    table = TABLE.fullmatch(name)
    if table is None:
        return 3 * elements * size  # equal rows of ids and inputs are looked for
    kept = 4 if size <= 4 and table[4] == "logits" else 8
    copies = COPIES["one model" if table[1] else "ensemble"]
    return int(elements * (size + copies * kept)) + SCORES * (elements // max(1, shape[-1] if shape else 1))


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as opened:
            names = list(opened.keys())
            slices = {name: opened.get_slice(name) for name in names if name in KNOWN}
            sizes = {name: int(re.sub(r"\D", "", part.get_dtype()) or 8) // 8 for name, part in slices.items()}
            _room(path, sum(_needed(name, part.get_shape(), sizes[name]) for name, part in slices.items()))
            return {name: opened.get_tensor(name) if name in KNOWN else np.empty(0) for name in names}
    except (SafetensorError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{path.name} is damaged or not a .safetensors file ({said}); write it again") from None
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path.name} holds numbers that NumPy has no type for ({error}); save float32 instead") from None


def _csv(path: Path) -> dict[str, np.ndarray]:
    """A row a sample: member (0 or 1), label, logit_0.. or prob_0.., optionally adv_logit_0.. or adv_prob_0.., id."""
    import pandas as pd

    with path.open("rb") as file:
        start = file.read(1 << 16)
    numbers = (start.count(b",") + start.count(b"\n")) * path.stat().st_size // max(1, len(start))
    _room(path, 40 * numbers)  # eight bytes each, and copied as in other files
    try:
        frame = pd.read_csv(path, skipinitialspace=True)
    except (ValueError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{path.name} cannot be read as a table of UTF-8 text with commas ({said})") from None
    if not {"member", "label"} <= set(frame.columns):
        raise ValueError(
            f"{path.name} needs the columns member (0 or 1) and label, separated by commas, found: {listed(frame.columns)}"
        )
    if frame.empty:
        raise ValueError(f"{path.name} has a header and no rows; write a row for each sample")
    if not frame["member"].isin((0, 1)).all():
        raise ValueError(f"the column member of {path.name} must hold only 0 and 1")
    for flag in (1, 0):
        if not (frame["member"] == flag).any():
            raise ValueError(f"the column member of {path.name} has no {flag}; give rows of members (1) and of non-members (0)")
    words = frame["label"][pd.to_numeric(frame["label"], errors="coerce").isna()]
    if len(words):
        raise ValueError(f"the column label of {path.name} must hold class numbers from 0, found {listed(words, most=3)}")
    arrays = {}
    for side, flag in (("member", 1), ("nonmember", 0)):
        part = frame[frame["member"] == flag]
        arrays[f"{side}_labels"] = pd.to_numeric(part["label"]).to_numpy(dtype=np.float64)
        if "id" in frame:
            arrays[f"{side}_ids"] = part["id"].astype(str).to_numpy(dtype=str)
        for kind, name in (("logit", "logits"), ("prob", "probs"), ("adv_logit", "adv_logits"), ("adv_prob", "adv_probs")):
            columns = [c for c in frame.columns if str(c).startswith(f"{kind}_")]
            wanted = [f"{kind}_{k}" for k in range(len(columns))]
            if set(columns) != set(wanted):
                last = f"{kind}_{len(columns) - 1}"
                raise ValueError(f"the columns {kind}_0 to {last} must be there without gaps, found {listed(columns)}")
            if columns:
                if not all(part[c].dtype.kind in "iuf" for c in wanted):
                    raise ValueError(f"the columns {kind}_... of {path.name} must hold numbers only")
                arrays[f"{side}_{name}"] = part[wanted].to_numpy(dtype=np.float64)
    return arrays


class _NoRoom(ValueError):
    """The arrays would not fit."""


def _room(path: Path, needed: int) -> None:
    """ValueError when an audit of the arrays would not fit in memory: better than being killed half way."""
    needed, found = needed + AT_LEAST, limits.memory()
    if found and needed > 0.8 * found[1]:
        raise _NoRoom(
            f"an audit of {path.name} takes about {needed / 1e9:.3g} GB of memory and {found[1] / 1e9:.3g} GB are free; bring "
            "fewer samples or models, or float32"
        )
