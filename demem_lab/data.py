"""Images, labels, and who is a member of which training set.

>>> digits = load()                                   # scikit-learn's scans of handwritten digits, no download
>>> digits.n, digits.shape
(1797, (1, 8, 8))
>>> member_masks(digits.n, 4, seed=0).sum(1).tolist()
[898, 899, 898, 899]

Other data sets come through torchvision, from a folder that you name (`root` or $DEMEM_DATA); nothing is downloaded
unless asked for.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from demem_lab.store import Store
from demem_lab.streams import key
from demem_lab.validate import choice, finite, images, integer, labels, shown


@dataclass(frozen=True)
class Dataset:
    """Images x float32 [N, C, H, W] in [0, 1], labels y int64 [N], and what is usual for them.

    Raises ValueError for pixels outside [0, 1] or NaN, wrong shapes, labels or eps out of range, or fewer than two classes.
    """

    name: str
    x: Tensor
    y: Tensor
    classes: tuple[str, ...]
    source: str
    eps: float  # usual Linf attack radius, in pixel units

    def __post_init__(self) -> None:
        for name, value in (("images", self.x), ("labels", self.y)):
            if not isinstance(value, Tensor):
                raise ValueError(f"{name} must be a torch tensor, got {type(value).__name__}; convert with torch.as_tensor")
        if self.x.device != self.y.device:
            raise ValueError(f"images are on {self.x.device} and labels on {self.y.device}; put both on one device, best the CPU")
        images(self.x)
        if self.x.dtype != torch.float32:
            raise ValueError(f"images must be float32, got {self.x.dtype}; convert with .float()")
        if not isinstance(self.classes, (tuple, list)):
            raise ValueError(f"classes must be a tuple of names, such as ('cat', 'dog'), got {shown(self.classes)}")
        finite("eps", self.eps, low=0, high=1, fix="it is the usual attack radius in pixel units of [0, 1], for instance 8/255")
        labels(self.y, n=len(self.x), classes=len(self.classes))
        present = len(self.y.unique())
        if present < 2:
            raise ValueError(f"a data set needs samples of at least 2 classes, got {present}; take a larger subset")

    @property
    def n(self) -> int:
        """Number of samples N."""
        return len(self.y)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return tuple(self.x.shape[1:])

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the content: pixels, labels, shape and number of classes."""
        content = hashlib.sha256(repr((tuple(self.x.shape), len(self.classes))).encode())
        content.update(self.x.cpu().contiguous().numpy().tobytes())
        content.update(self.y.cpu().contiguous().numpy().tobytes())
        return content.hexdigest()[:32]

    def subset(self, n: int, *, seed: int = 0) -> Dataset:
        """`n` samples drawn without replacement. ValueError when there are not that many."""
        integer("subset", n, low=2, high=self.n, fix=f"{self.name} has {self.n} samples")
        order = torch.randperm(self.n, generator=torch.Generator().manual_seed(key(seed, "subset")))[:n]
        return replace(self, x=self.x[order], y=self.y[order])


@dataclass(frozen=True)
class Deposited:
    """A data set that waits in a store, so that not every chunk has to carry its images to every worker."""

    store: Store
    fingerprint: str

    @classmethod
    def of(cls, dataset: Dataset, store: Store) -> Deposited:
        """Put a data set there, in 8 bits a pixel where that is exact."""
        kept = cls(store, dataset.fingerprint)
        if store.get("images", dataset.fingerprint) is None:
            small = (dataset.x * 255).round().to(torch.uint8)
            exact = torch.equal(small.float() / 255, dataset.x)
            meta = {"name": dataset.name, "classes": dataset.classes, "source": dataset.source, "eps": dataset.eps}
            store.put("images", dataset.fingerprint, {"x": small if exact else dataset.x, "y": dataset.y}, meta)
        return kept

    def load(self) -> Dataset:
        """The data set (the last one is remembered). FileNotFoundError where the store is not the one it was put in."""
        return _withdrawn(self.store.root, self.fingerprint)


@lru_cache(maxsize=1)
def _withdrawn(root: Path, fingerprint: str) -> Dataset:
    entry = Store(root).get("images", fingerprint)
    if entry is None:
        raise FileNotFoundError(
            f"a worker does not find the images in {root}: keep the store (DEMEM_STORE) on a file system that all machines "
            "share, or train without a store"
        )
    x, y = torch.from_numpy(entry.arrays["x"]), torch.from_numpy(entry.arrays["y"])
    x = x.float() / 255 if x.dtype == torch.uint8 else x
    return Dataset(entry.meta["name"], x, y, tuple(entry.meta["classes"]), entry.meta["source"], entry.meta["eps"])


@dataclass(frozen=True)
class _Known:
    loader: str  # class in torchvision.datasets
    files: str  # what torchvision calls its files, inside the folder
    eps: float
    source: str
    classes: tuple[str, ...] = tuple("0123456789")


_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
KNOWN = {
    "fashion_mnist": _Known("FashionMNIST", "FashionMNIST", 0.05, "Fashion-MNIST (Xiao et al. 2017)", _FASHION),
    "mnist": _Known("MNIST", "MNIST", 0.3, "MNIST (LeCun et al. 1998)"),
    "cifar10": _Known("CIFAR10", "cifar-10-batches-py", 8 / 255, "CIFAR-10 (Krizhevsky 2009)", _CIFAR10),
    "cifar100": _Known("CIFAR100", "cifar-100-python", 8 / 255, "CIFAR-100 (Krizhevsky 2009)", tuple(map(str, range(100)))),
    "svhn": _Known("SVHN", "{split}_32x32.mat", 8 / 255, "SVHN (Netzer et al. 2011)"),
}
NAMES = ("digits", *KNOWN)


def load(
    name: str = "digits", *, root: str | Path | None = None, download: bool = False, split: str = "train",
    subset: int | None = None, seed: int = 0,
) -> Dataset:
    """A data set by name: digits, fashion_mnist, mnist, cifar10, cifar100, svhn.

    root: where torchvision finds or puts the files (default $DEMEM_DATA). download: fetch what is missing. split: "train",
    "test", or "all", one after the other: the pool of 60,000 that DeMem's authors draw members from (digits have one part).
    subset: that many random samples, chosen by `seed`. Raises ValueError for an unknown name, FileNotFoundError with the fix
    when the files are not there or not whole.
    """
    choice("dataset", name, NAMES)
    choice("split", split, ("train", "test", "all"))
    loaded = _digits() if name == "digits" else _torchvision(name, root, download, split)
    return loaded if not subset else loaded.subset(subset, seed=seed)


def member_masks(n: int, models: int, *, seed: int, design: str = "balanced", p: float = 0.5) -> Tensor:
    """Who is in whose training set: bool [models, n].

    "balanced": rows 2j and 2j+1 are complementary halves (sizes differ by at most one), so every sample is in exactly
    half of the models; `models` must be even. "independent": every entry is a coin of probability p.
    Row pairs depend on `seed` and their number only: more models keep the first rows as they were.
    """
    integer("n", n, low=2)
    integer("models", models, low=1)
    choice("design", design, ("balanced", "independent"))
    finite("p", p, low=0, high=1)
    if design == "independent":
        rows = [torch.rand(n, generator=_generator(seed, "independent", m)) < p for m in range(models)]
        return torch.stack(rows)
    if models % 2 or p != 0.5:
        raise ValueError(f"balanced masks need an even number of models and p = 0.5, got {models} models and p = {p}")
    mask = torch.zeros(models, n, dtype=torch.bool)
    for pair in range(models // 2):
        order = torch.randperm(n, generator=_generator(seed, "balanced", pair))
        mask[2 * pair, order[: n // 2]] = True
        mask[2 * pair + 1, order[n // 2 :]] = True
    return mask


def mislabelled(dataset: Dataset, count: int, *, seed: int) -> tuple[Dataset, Tensor]:
    """The data set with `count` random samples given a uniformly drawn WRONG label, and their indices int64 [count].

    Such canaries are the most exposed samples one can plant: nothing but memory explains a model that knows them.
    """
    integer("count", count, low=0, high=dataset.n)
    generator = _generator(seed, "canaries", 0)
    index = torch.randperm(dataset.n, generator=generator)[:count]
    shift = torch.randint(1, len(dataset.classes), (count,), generator=generator)
    y = dataset.y.clone()
    y[index] = (y[index] + shift) % len(dataset.classes)
    return replace(dataset, y=y), index


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16
    source = "optical recognition of handwritten digits (Alpaydin & Kaynak 1998), as in scikit-learn"
    return Dataset("digits", x, torch.tensor(raw.target, dtype=torch.int64), tuple("0123456789"), source, 0.1)


def _torchvision(name: str, root: str | Path | None, download: bool, split: str) -> Dataset:
    import torchvision.datasets as known_sets
    from torchvision.datasets.utils import extract_archive

    if split == "all":
        first, second = (_torchvision(name, root, download, part) for part in ("train", "test"))
        return replace(first, x=torch.cat([first.x, second.x]), y=torch.cat([first.y, second.y]))
    known = KNOWN[name]
    if root is not None and not isinstance(root, (str, os.PathLike)):
        raise ValueError(f"root must be a folder, as text or a Path, got {shown(root)}")
    folder = os.path.expanduser(root or os.environ.get("DEMEM_DATA", ""))
    if not folder:
        raise FileNotFoundError(
            f"{name} needs a folder for its files: set DEMEM_DATA or pass root=... (in a notebook data_root), and "
            "download=True the first time"
        )
    loader = getattr(known_sets, known.loader)
    part = {"split": split} if name == "svhn" else {"train": split == "train"}
    try:
        for packed in Path(folder, known.loader, "raw").glob("*-ubyte.gz"):
            if not packed.with_suffix("").exists():  # torchvision unpacks only what it has just downloaded
                extract_archive(str(packed))
        raw = loader(str(folder), download=download, **part)
    except (RuntimeError, OSError, ValueError, EOFError, AssertionError, zlib.error) as error:  # a torn file fails anyhow
        if isinstance(error, PermissionError) or (Path(folder).exists() and not Path(folder).is_dir()):
            raise PermissionError(f"{name} cannot be read or written in {folder}; choose another folder as DEMEM_DATA") from None
        where = Path(folder, known.files.format(split=split))
        fix = f"load({name!r}, root=..., download=True) fetches it, or set DEMEM_DATA to where it is"
        if download:
            said = " ".join(str(error).split())[:200]
            what, fix = f"could not be downloaded to {folder} ({said})", _by_hand(loader, folder, split)
        elif where.is_file() or any(file.is_file() for file in where.rglob("*")):
            what = f"in {folder} is damaged or not whole"
            fix = f"delete {where}, then load({name!r}, root=..., download=True) fetches it again"
        else:
            what = f"is not in {folder}"
        raise FileNotFoundError(f"{name} {what}; {fix}") from None
    pixels = torch.as_tensor(raw.data)
    if name in ("cifar10", "cifar100"):
        pixels = pixels.permute(0, 3, 1, 2)
    elif pixels.ndim == 3:
        pixels = pixels[:, None]
    y = torch.as_tensor(raw.labels if name == "svhn" else raw.targets, dtype=torch.int64)
    return Dataset(name, pixels.float().contiguous() / 255, y, known.classes, known.source, known.eps)


def _by_hand(loader, folder: str, split: str) -> str:
    """What to fetch with another machine, and where to put it, when torchvision cannot download."""
    if hasattr(loader, "mirrors"):
        names, place = ", ".join(name for name, _ in loader.resources), Path(folder, loader.__name__, "raw")
        return f"on a machine with internet fetch {names} from {loader.mirrors[0]}, and put them into {place}"
    address = loader.split_list[split][0] if hasattr(loader, "split_list") else loader.url
    return f"on a machine with internet fetch {address}, put it into {folder} as it is, and load again as you did"


def _generator(seed: int, purpose: str, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(key(seed, f"mask.{purpose}", number))
