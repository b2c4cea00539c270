"""Results kept by what they were computed from: the same question is never computed twice, a changed one always is.

>>> import tempfile
>>> store = Store(tempfile.mkdtemp())
>>> entry = store.compute("sum", {"a": 1, "b": 2}, lambda: {"total": np.array(3)})
>>> int(entry.arrays["total"]), entry.fresh
(3, True)
>>> store.compute("sum", {"a": 1, "b": 2}, lambda: {"total": np.array(3)}).fresh
False

An entry is a safetensors file with the arrays and a JSON file with the configuration and a digest. Both are written
beside their place and moved into it, data first, so that a killed process leaves no half of an entry. A damaged entry is
noticed by its digest, reported, and computed anew. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import secrets
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from demem_lab.bytecode import code_of

PATIENCE = 2.0  # seconds of silent waiting for another process
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # what file systems without locks answer


class StoreWarning(UserWarning):
    """An entry could not be read and will be computed again."""


class StoreError(OSError):
    """An entry could not be written, in one sentence: disk full, read-only or without locks. What was kept before is unharmed."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """Arrays of one result, what they were computed from, and whether that happened just now."""

    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]
    fresh: bool
    path: Path


class Store:
    """A folder of results: the argument, else $DEMEM_STORE, else the user's cache folder.

    Several processes and threads may share it. Raises PermissionError when the folder cannot be written.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        if root is None:
            from platformdirs import user_cache_dir

            root = os.environ.get("DEMEM_STORE") or user_cache_dir("demem_lab")
        self.root = Path(root).expanduser()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            why = "it is a file" if self.root.is_file() else error.strerror
            raise PermissionError(
                f"results cannot be kept in {self.root} ({why}); set DEMEM_STORE to a folder you can write to"
            ) from None

    def key(self, kind: str, config: Any, *, modules: Sequence[str] = ()) -> str:
        """Digest of kind, configuration, and the source of the demem_lab `modules` that compute it."""
        text = json.dumps([kind, canonical(config), code_version(tuple(modules))], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:40]

    def get(self, kind: str, config: Any, *, modules: Sequence[str] = ()) -> Entry | None:
        """The entry, or None when there is none (or a damaged one, with a StoreWarning)."""
        return self._read(self._place(kind, config, modules))

    def put(
        self, kind: str, config: Any, arrays: Mapping[str, Any], meta: Mapping[str, Any] | None = None, *,
        modules: Sequence[str] = (), fresh: bool = True,
    ) -> Entry:
        """Keep `arrays` (NumPy, or anything np.asarray takes) under their configuration. StoreError when they cannot be."""
        from safetensors.numpy import save

        place = self._place(kind, config, modules)
        arrays = {name: np.ascontiguousarray(a).reshape(np.shape(a)) for name, a in arrays.items()}
        content = save(arrays)
        digest = hashlib.sha256(content).hexdigest()
        # the data file carries its digest in its name: a reader never meets the JSON of one write and the data of another
        data = place.with_name(f"{place.name}.{digest[:12]}.safetensors")
        full = {
            **(meta or {}), "config": canonical(config), "kind": kind, "versions": _versions(), "created": time.time(),
            "data": data.name, "sha256": digest,
        }
        with self._writing():
            place.parent.mkdir(parents=True, exist_ok=True)
            there = data.exists()
            try:
                write_whole(data, content)
                write_whole(place.with_suffix(".json"), json.dumps(full).encode())
            except BaseException:
                if not there:  # nobody would ever read it, and a full disk needs the space
                    data.unlink(missing_ok=True)
                raise
        for old in place.parent.glob(f"{place.name}.*.safetensors"):
            if old != data:
                old.unlink(missing_ok=True)
        return Entry(arrays, full, fresh, data)

    def compute(self, kind: str, config: Any, function: Callable[[], Any], *, modules: Sequence[str] = ()) -> Entry:
        """The kept entry, or function() -> arrays, or (arrays, meta), kept. Computed once, whoever else is asking."""
        place = self._place(kind, config, modules)
        began = time.monotonic()
        entry = self._read(place)
        if entry is None:
            lock = FileLock(str(place) + ".lock")  # the operating system's: a killed process gives it back
            with self._writing():
                place.parent.mkdir(parents=True, exist_ok=True)
                _wait_for(lock)
            try:
                entry = self._read(place)
                if entry is None:
                    made = function()
                    arrays, meta = made if isinstance(made, tuple) else (made, {})
                    seconds = time.monotonic() - began
                    entry = self.put(kind, config, arrays, {"seconds": seconds, **meta}, modules=modules)
            finally:
                lock.release()
        _log(kind, place.name, entry.fresh, time.monotonic() - began)
        return entry

    def drop(self, kind: str, config: Any, *, modules: Sequence[str] = ()) -> None:
        """Forget an entry; nothing happens when there is none."""
        place = self._place(kind, config, modules)
        for file in place.parent.glob(f"{place.name}.*"):
            if file.suffix != ".lock":
                file.unlink(missing_ok=True)

    def entries(self) -> list[dict[str, Any]]:
        """What is kept: kind, key, megabytes of arrays, created (seconds since 1970), a row for each entry."""
        rows = []
        for file in sorted(self._sidecars()):
            entry = self._read(file.with_suffix(""))
            if entry is not None:
                size = sum(a.nbytes for a in entry.arrays.values()) / 1e6  # its file may be gone by now
                rows.append({"kind": file.parent.name, "key": file.stem, "MB": size, "created": entry.meta["created"]})
        return rows

    def count(self, text: str = "") -> int:
        """How many entries have `text` (a fingerprint, say) in their configuration; reads no arrays."""
        found = 0
        for file in self._sidecars():
            try:
                found += text.encode() in file.read_bytes()  # bytes: a damaged one need not be text
            except OSError:
                pass  # another process took it away after it was listed
        return found

    def _sidecars(self) -> Iterator[Path]:
        return (file for file in self.root.glob("*/*.json") if not file.name.startswith("."))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What the disk refuses, in one sentence that names the folder and the fix."""
        try:
            yield
        except StoreError:
            raise
        except OSError as error:
            free = shutil.disk_usage(self.root).free / 1e6 if self.root.exists() else 0.0
            raise StoreError(
                f"a result could not be kept in {self.root} ({error.strerror or error}; {free:.0f} MB are free there); make room "
                "or set DEMEM_STORE to another folder, and run again: what was kept before is unharmed and not computed anew"
            ) from None

    def _place(self, kind: str, config: Any, modules: Sequence[str]) -> Path:
        return self.root / kind / self.key(kind, config, modules=modules)

    def _read(self, place: Path) -> Entry | None:
        from safetensors.numpy import load

        sidecar = place.with_suffix(".json")
        if not sidecar.exists():
            return None
        try:
            meta = json.loads(sidecar.read_bytes())
            path = sidecar.with_name(meta["data"])
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != meta["sha256"]:
                raise ValueError("its content does not have the digest it was written with")
            return Entry(load(content), meta, False, path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"damaged result {sidecar} is computed again: {error}", StoreWarning, stacklevel=3)
            return None


def canonical(config: Any) -> Any:
    """A JSON-able form that is equal exactly for equal configurations. TypeError for what has no such form."""
    if isinstance(config, np.generic):  # first: np.float64 is a float, and would be spelled differently
        return canonical(config.item())
    if config is None or isinstance(config, (bool, str, int)):
        return config
    if isinstance(config, float):
        if math.isnan(config):
            raise ValueError("NaN cannot be part of a configuration: it is not equal to itself")
        return {"float": repr(config)}
    if isinstance(config, Enum):
        return [type(config).__name__, config.name]
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {f.name: canonical(getattr(config, f.name)) for f in dataclasses.fields(config)}
        code = code_of(type(config))  # this package's own classes are among the `modules`
        return {"class": type(config).__name__, **({"code": code} if code else {}), **fields}
    if isinstance(config, Mapping):
        return {"mapping": sorted(([canonical(k), canonical(v)] for k, v in config.items()), key=json.dumps)}
    if isinstance(config, (list, tuple)):
        return [canonical(value) for value in config]
    if isinstance(config, Path):
        return str(config)
    if hasattr(config, "detach"):  # a torch tensor; torch itself is not needed here
        config = config.detach().cpu().numpy()
    if isinstance(config, np.ndarray):
        content = hashlib.sha256(np.ascontiguousarray(config).tobytes()).hexdigest()
        return {"sha256": content, "shape": list(config.shape), "dtype": str(config.dtype)}
    raise TypeError(f"{type(config).__name__} cannot be part of a configuration; use numbers, text, arrays or dataclasses")


@lru_cache
def code_version(modules: tuple[str, ...]) -> str:
    """Digest of the source of these demem_lab modules and of torch's version."""
    folder = Path(__file__).parent
    parts = [(folder / f"{name}.py").read_bytes() for name in modules]
    return hashlib.sha256(b"".join([*parts, installed("torch").encode()])).hexdigest()[:16]


def installed(package: str) -> str:
    """The version of a package that is installed, or "none"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _wait_for(lock: FileLock) -> None:
    """Hold the lock; who waits for long is told once for what. StoreError where the file system has no locks."""
    try:
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            print(f"somebody else computes this; waiting ({lock.lock_file})", flush=True)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
            raise
        folder = Path(lock.lock_file).parents[1]
        raise StoreError(f"{folder} is on a file system that has no locks; choose another folder with DEMEM_STORE") from None


def _versions() -> dict[str, str]:
    return {"torch": installed("torch"), "numpy": np.__version__}


def write_whole(path: Path, content: bytes) -> None:
    """Write a file at once or not at all: beside its place, then moved into it. OSError when the disk refuses."""
    if path.exists() and not path.is_file():  # a pipe or a terminal, of which there is no whole; a folder is refused
        path.write_bytes(content)
        return
    path = Path(os.path.realpath(path))  # a link stays one
    # not by mkstemp, whose files are for their owner alone: in a store that several people share the umask decides
    name = path.with_name(f".{os.getpid()}-{threading.get_ident()}-{secrets.token_hex(8)}")
    file = open(name, "xb")
    try:
        with file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _log(kind: str, key: str, fresh: bool, seconds: float) -> None:
    """One line for whoever runs this notebook and wants to tell what was computed and what was reused."""
    log = os.environ.get("DEMEM_STORE_LOG")
    if log:
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "key": key, "fresh": fresh, "seconds": round(seconds, 3)}) + "\n")
