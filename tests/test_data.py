import gzip
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits

from demem_lab import data
from demem_lab.data import Dataset, Deposited, load, member_masks, mislabelled
from demem_lab.store import Store


def test_digits_are_scikit_learns():
    raw, ours = load_digits(), load()
    assert ours.n == 1797 and ours.shape == (1, 8, 8) and len(ours.classes) == 10 and ours.eps == 0.1
    assert np.allclose(ours.x[:, 0].numpy(), raw.images / 16) and np.array_equal(ours.y.numpy(), raw.target)
    assert ours.fingerprint == load().fingerprint != ours.subset(100).fingerprint


def test_subset_is_without_replacement_and_keyed_by_seed():
    digits = load()
    a, b, c = digits.subset(300, seed=1), digits.subset(300, seed=1), digits.subset(300, seed=2)
    assert a.n == 300 and torch.equal(a.x, b.x) and not torch.equal(a.x, c.x)
    assert sorted(map(bytes, digits.subset(1797).x.numpy())) == sorted(map(bytes, digits.x.numpy()))


@pytest.mark.parametrize("n", [10, 11])
@pytest.mark.parametrize("models", [2, 6])
def test_balanced_masks_are_twins(n, models):
    mask = member_masks(n, models, seed=3)
    assert mask.shape == (models, n) and torch.equal(mask[0::2], ~mask[1::2])
    assert (mask.sum(0) == models // 2).all() and mask.sum(1).max() - mask.sum(1).min() <= 1


def test_masks_depend_on_seed_and_not_on_how_many():
    assert torch.equal(member_masks(50, 8, seed=1)[:4], member_masks(50, 4, seed=1))
    assert not torch.equal(member_masks(50, 4, seed=1), member_masks(50, 4, seed=2))
    halves = torch.stack([member_masks(40, 2, seed=s)[0] for s in range(400)]).double().mean(0)
    assert abs(halves - 0.5).max() < 5 * 0.5 / 20  # nobody is preferred


def test_independent_masks_are_fair_coins():
    mask = member_masks(500, 40, seed=0, design="independent", p=0.3)
    assert stats.binomtest(int(mask.sum()), mask.numel(), 0.3).pvalue > 1e-4
    assert abs(np.corrcoef(mask.numpy())[np.triu_indices(40, 1)]).max() < 5 / np.sqrt(500)


def test_canaries_always_have_a_wrong_label_uniformly():
    digits = load()
    changed, index = mislabelled(digits, 900, seed=0)
    assert len(index.unique()) == 900 and (changed.y[index] != digits.y[index]).all()
    untouched = torch.ones(digits.n, dtype=torch.bool).index_fill(0, index, False)
    assert torch.equal(changed.y[untouched], digits.y[untouched]) and torch.equal(changed.x, digits.x)
    shift = (changed.y[index] - digits.y[index]) % 10
    assert stats.chisquare(torch.bincount(shift, minlength=10)[1:].numpy()).pvalue > 1e-4


@pytest.mark.parametrize("name", ["digits", "bytes"])
def test_a_deposited_data_set_comes_back_the_same(store, name):
    digits = load(subset=50)
    given = digits if name == "digits" else replace(digits, x=(digits.x * 15).byte().float() / 255)
    found = pickle.loads(pickle.dumps(Deposited.of(given, store))).load()
    assert torch.equal(found.x, given.x) and torch.equal(found.y, given.y) and found.fingerprint == given.fingerprint
    assert (found.name, found.classes, found.eps, found.source) == (given.name, given.classes, given.eps, given.source)
    kept = store.get("images", given.fingerprint).arrays["x"].dtype
    assert kept == (np.uint8 if name == "bytes" else np.float32)  # sixteenths are no multiples of 1/255


def test_a_store_that_a_worker_does_not_share_is_one_sentence(store, tmp_path):
    deposited = Deposited.of(load(subset=50), store)
    with pytest.raises(FileNotFoundError, match="a worker does not find the images in .*file system that all machines share"):
        replace(deposited, store=Store(tmp_path / "elsewhere")).load()


def test_images_and_labels_live_on_one_device():
    with pytest.raises(ValueError, match="images are on meta and labels on cpu; put both on one device"):
        Dataset("made", X.to("meta"), Y, ("a", "b"), "made", 0.1)


X, Y = torch.rand(6, 1, 4, 4), torch.tensor([0, 1, 0, 1, 0, 1])


@pytest.mark.parametrize(("x", "y", "words"), [
    (X + 0.5, Y, "pixels"), (X.clone().fill_(float("nan")), Y, "pixels"), (X[0], Y, "shape"), (X, Y[:5], "shape"),
    (X, Y + 1, "0..1"), (X, Y * 0, "at least 2 classes"), (X[:0], Y[:0], "shape"), ((X * 255).byte(), Y, "floating point"),
    (X.numpy(), Y, "images must be a torch tensor, got ndarray; convert with torch.as_tensor"),
    (X, Y.numpy(), "labels must be a torch tensor, got ndarray"), ([[0.5]], Y, "images must be a torch tensor, got list"),
    (X.double(), Y, r"images must be float32, got torch.float64; convert with .float\(\)"),
    (X.half(), Y, "images must be float32"),
])
def test_a_dataset_checks_itself(x, y, words):
    with pytest.raises(ValueError, match=words):
        Dataset("made", x, y, ("a", "b"), "made", 0.1)


@pytest.mark.parametrize(("call", "kind", "words"), [
    (lambda p: load("imagenet"), ValueError, "'digits', 'fashion_mnist'"), (lambda p: load(split="half"), ValueError, "split"),
    (lambda p: load(subset=1798), ValueError, "1797 samples"), (lambda p: load(subset=1), ValueError, "subset"),
    (lambda p: load("cifar10"), FileNotFoundError, "set DEMEM_DATA"),
    (lambda p: load("cifar10", root=p), FileNotFoundError, "download=True"),
    (lambda p: load("cifar10", root=3), ValueError, "root must be a folder, as text or a Path, got 3"),
    (lambda p: load("mnist", root=p / "file"), PermissionError, "choose another folder"),
    (lambda p: load("mnist", root="/proc/nothing", download=True), (PermissionError, FileNotFoundError), "mnist"),
    (lambda p: member_masks(10, 3, seed=0), ValueError, "even number of models"),
    (lambda p: member_masks(10, 4, seed=0, p=0.3), ValueError, "p = 0.5"),
    (lambda p: member_masks(10, 4, seed=0, design="other"), ValueError, "design"),
    (lambda p: mislabelled(load(), 1798, seed=0), ValueError, "count"),
])
def test_bad_input(call, kind, words, tmp_path, monkeypatch):
    monkeypatch.delenv("DEMEM_DATA", raising=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(kind, match=words):
        call(tmp_path)


@pytest.mark.parametrize(("name", "words"), [
    ("fashion_mnist", "fetch train-images-idx3-ubyte.gz, .* from http.*, and put them into {}/FashionMNIST/raw"),
    ("cifar10", "fetch https.*cifar-10-python.tar.gz, put it into {} as it is, and load again"),
    ("svhn", "fetch http.*train_32x32.mat, put it into {} as it is"),
])
def test_without_internet_one_is_told_what_to_fetch_and_where_to_put_it(tmp_path, monkeypatch, name, words):
    def unreachable(*_, **__):
        raise OSError("<urlopen error\n no route>")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(FileNotFoundError, match=words.format(tmp_path)) as caught:
        load(name, root=tmp_path, download=True)
    assert "\n" not in str(caught.value) and "download=True" not in str(caught.value)


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes([0, 0, 8, array.ndim]) + b"".join(int(s).to_bytes(4, "big") for s in array.shape)
    path.write_bytes(head + array.astype(np.uint8).tobytes())


@pytest.mark.parametrize("packed", [False, True])
def test_fashion_mnist_files_are_read_from_torchvisions_layout(tmp_path, packed):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (30, 28, 28)), np.arange(30) % 10
    folder = tmp_path / "FashionMNIST" / "raw"
    for part in ("train", "t10k"):
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            write_idx(folder / name, array)
            if packed:  # as downloaded; torchvision unpacks only while it downloads
                (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
                (folder / name).unlink()
    found = load("fashion_mnist", root=tmp_path)
    assert np.allclose(found.x[:, 0].numpy() * 255, images, atol=1e-4) and np.array_equal(found.y.numpy(), labels)
    assert found.classes[0] == "T-shirt" and found.eps == 0.05


def fashion_files(folder, train=30, test=20):
    rng = np.random.default_rng(0)
    for part, n in (("train", train), ("t10k", test)):
        write_idx(folder / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (n, 28, 28)))
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(n) % 10)


def test_all_is_train_and_then_test(tmp_path):
    fashion_files(tmp_path / "FashionMNIST" / "raw")
    train, test, everything = (load("fashion_mnist", root=tmp_path, split=s) for s in ("train", "test", "all"))
    assert (train.n, test.n, everything.n) == (30, 20, 50)
    assert torch.equal(everything.x, torch.cat([train.x, test.x])) and torch.equal(everything.y[30:], test.y)
    assert load("fashion_mnist", root=tmp_path, split="all", subset=40).n == 40
    assert load(split="all").fingerprint == load().fingerprint


@pytest.mark.parametrize("torn", ["short", "empty", "missing", "gz", "gz content"])
def test_a_half_downloaded_data_set_is_one_sentence(tmp_path, torn):
    folder = tmp_path / "FashionMNIST" / "raw"
    fashion_files(folder)
    file = folder / "train-images-idx3-ubyte"
    content = file.read_bytes()
    if torn == "missing":
        file.unlink()
    elif torn.startswith("gz"):
        file.unlink()
        packed = gzip.compress(content)
        (folder / f"{file.name}.gz").write_bytes(packed[: len(packed) // 2] if torn == "gz" else b"not gzip")
    else:
        file.write_bytes(content[: len(content) // 2] if torn == "short" else b"")
    for _ in range(2):  # unpacking half an archive leaves half a file behind, which must not be taken for a whole one
        with pytest.raises(FileNotFoundError, match="fashion_mnist in .* is damaged or not whole; delete .*FashionMNIST, then"):
            load("fashion_mnist", root=tmp_path)


@pytest.mark.parametrize(("name", "file"), [("cifar10", "cifar-10-batches-py/data_batch_1"), ("svhn", "train_32x32.mat")])
def test_half_of_an_archive_is_noticed_by_its_checksum(tmp_path, name, file):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half of it")
    with pytest.raises(FileNotFoundError, match=f"{name} in .* is damaged or not whole"):
        load(name, root=tmp_path)


@pytest.mark.parametrize(("name", "n", "shape"), [("cifar10", 50_000, (3, 32, 32)), ("fashion_mnist", 60_000, (1, 28, 28))])
def test_real_files(name, n, shape):
    root = os.environ.get("DEMEM_DATA", "")
    folder = {"cifar10": "cifar-10-batches-py", "fashion_mnist": "FashionMNIST"}[name]
    if not root or not (Path(root) / folder).exists():
        pytest.skip(f"set DEMEM_DATA to a folder with {folder}")
    found = load(name, root=root)
    assert (found.n, found.shape) == (n, shape) and (torch.bincount(found.y) == n // 10).all()
    assert 0.1 < float(found.x.mean()) < 0.6 and len(data.KNOWN[name].classes) == 10


def test_the_fingerprint_sees_shapes_and_the_number_of_classes():
    made = Dataset("made", X, Y, ("a", "b"), "made", 0.1)
    assert made.fingerprint == Dataset("other name", X.clone(), Y, ("a", "b"), "made", 0.2).fingerprint
    assert made.fingerprint != Dataset("made", X.reshape(6, 1, 2, 8), Y, ("a", "b"), "made", 0.1).fingerprint
    assert made.fingerprint != Dataset("made", X, Y, ("a", "b", "c"), "made", 0.1).fingerprint


@pytest.mark.parametrize("change", [lambda x, y: (x.flip(0), y), lambda x, y: (x, 1 - y), lambda x, y: (x[:5], y[:5])])
def test_the_fingerprint_sees_every_pixel_and_label(change):
    x, y = change(X, Y)
    one, other = Dataset("made", X, Y, ("a", "b"), "m", 0.1), Dataset("made", x, y, ("a", "b"), "m", 0.1)
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize(("change", "words"), [
    ({"classes": 3}, r"classes must be a tuple of names, such as \('cat', 'dog'\), got 3"),
    ({"classes": "ab"}, "classes must be"), ({"classes": None}, "classes must be"),
    ({"eps": -1}, "eps must be .*got -1; it is the usual attack radius"),
    ({"eps": None}, "eps must be a number.*got None"), ({"eps": 8}, "eps must be .*<= 1, got 8"),
])
def test_what_a_data_set_says_of_itself_is_checked(change, words):
    with pytest.raises(ValueError, match=words):
        replace(load(subset=20), **change)


@pytest.mark.parametrize("call", [
    lambda: load(subset=10.0), lambda: mislabelled(load(subset=20), 10.0, seed=0), lambda: member_masks(10.0, 4, seed=0),
    lambda: member_masks(20, 10.0, seed=0),
])
def test_ten_is_not_ten_point_nought(call):
    with pytest.raises(ValueError, match="must be a whole number, got 10.0; write 10"):
        call()
