"""Files from strangers: what is right comes through unchanged, what is wrong ends in one clear sentence, nothing is run."""

import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_outputs import single

from demem_lab import files
from demem_lab.audit import audit
from demem_lab.files import read, write
from demem_lab.outputs import outputs_from_arrays


@given(st.integers(0, 1000), st.sampled_from([".npz", ".safetensors", "folder", ".csv"]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_what_is_written_is_read(tmp_path_factory, seed, suffix, adversarial):
    folder, arrays = tmp_path_factory.mktemp("files"), single(seed=seed)
    if adversarial:
        arrays |= {f"{side}_adv_logits": arrays[f"{side}_logits"] - 1 for side in ("member", "nonmember")}
    if suffix == "folder":
        path = folder
        for name, a in arrays.items():
            np.save(folder / f"{name}.npy", a)
    elif suffix == ".csv":
        path, rows = folder / "a.csv", []
        for side, flag in (("member", 1), ("nonmember", 0)):
            for i, z in enumerate(arrays[f"{side}_logits"]):
                row = {
                    "member": flag,
                    "label": arrays[f"{side}_labels"][i],
                    **{f"logit_{k}": repr(float(v)) for k, v in enumerate(z)},
                }
                if adversarial:
                    row |= {f"adv_logit_{k}": repr(float(v)) for k, v in enumerate(arrays[f"{side}_adv_logits"][i])}
                rows.append(row)
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        path = write(folder / f"a{suffix}", arrays)
    found, direct = read(path), outputs_from_arrays(arrays)
    for field in ("logits", "labels", "membership", "adv_logits"):
        a, b = getattr(found, field), getattr(direct, field)
        assert (a is None and b is None) or np.allclose(a, b, atol=1e-12)
    assert found.models == 1 and found.n == 50 and found.classes == 3 and (found.adv_logits is not None) == adversarial
    assert found.membership[0].tolist() == [True] * 30 + [False] * 20 and not found.warnings


class Payload:
    def __reduce__(self):
        return os.system, (f"touch {Payload.marker}",)


def disguised(folder):
    """Files that run code when they are unpickled, under every name they could come by."""
    Payload.marker = folder / "ran"
    for name in ("a.pkl", "a.pt", "a.npz", "a.npy", "a.safetensors", "a.csv"):
        (folder / name).write_bytes(pickle.dumps(Payload()))
        yield folder / name
    torch.save(Payload(), folder / "torch.npz")
    yield folder / "torch.npz"
    np.savez(folder / "objects.npz", **{"member_logits": np.array([Payload()], dtype=object)})
    yield folder / "objects.npz"
    (folder / "inside").mkdir()
    np.save(folder / "inside" / "member_logits.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    yield folder / "inside"


def test_pickles_are_refused_unread(tmp_path):
    for path in disguised(tmp_path):
        with pytest.raises(ValueError, match="pickle"):
            read(path)
    assert not (tmp_path / "ran").exists()


def test_damaged_and_unknown_files(tmp_path):
    for suffix in (".npz", ".safetensors"):
        path = write(tmp_path / f"a{suffix}", single())
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(ValueError, match="damaged or not"):
            read(path)
        path.write_bytes(b"nonsense")
        with pytest.raises(ValueError, match="damaged or not"):
            read(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        read(tmp_path / "none.npz")
    (tmp_path / "a.xlsx").write_bytes(b"x")
    with pytest.raises(ValueError, match="must end in"):
        read(tmp_path / "a.xlsx")
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(ValueError, match="does not say which"):
        read(tmp_path / "a.npy")
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        read(tmp_path / "pipe.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no .npy files"):
        read(tmp_path / "empty")
    with pytest.raises(ValueError, match="written as"):
        write(tmp_path / "a.csv", single())
    assert not list(tmp_path.glob("tmp*"))  # nothing half-written is left


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "columns member"),
        ("member,label,logit_0,logit_2\n1,0,1,2\n0,0,1,2\n", "without gaps"),
        ("member,label,logit_0,logit_1\n2,0,1,2\n", "only 0 and 1"),
        ("member,label,logit_0,logit_1\n1,0,x,2\n0,0,1,2\n", "numbers only"),
        ("", "cannot be read"),
        ("member,label,logit_0,logit_1\n1,0,1,2\n", "column member of a.csv has no 0; give rows of members"),
        ("member,label,logit_0,logit_1\n0,0,1,2\n", "has no 1"),
        ("member,label,logit_0,logit_1\n", "no rows"),
        ("member,label,logit_0,logit_1\n1,cat,1,2\n0,0,1,2\n", "class numbers from 0, found cat"),
        ("member,label,logit_0,logit_1\n1,,1,2\n0,0,1,2\n", "class numbers from 0, found nan"),
        ("member,label,logit_0,logit_1\n1,99999999999999999999,1,2\n0,0,1,2\n", r"lie in 0\.\.1"),
        ("member;label;logit_0;logit_1\n1;0;1;2\n", "separated by commas, found: member;label"),
        ("member,label,logit_0,logit_1\n1,0,1,2,3,4,5,6\n1,0,1,2,3,4,5,6,7,8,9\n", "cannot be read"),
    ],
)
def test_tables_that_are_not(tmp_path, text, words):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        read(tmp_path / "a.csv")
    assert str(caught.value).isprintable()


def test_files_larger_than_memory_are_refused_before_they_are_read(tmp_path, monkeypatch):
    paths = [write(tmp_path / f"a{suffix}", single()) for suffix in (".npz", ".safetensors")]
    np.save(tmp_path / "member_logits.npy", np.zeros((200, 3)))
    (tmp_path / "a.csv").write_text("member,label,logit_0,logit_1\n1,0,1,2\n" * 50)
    # a small file whose header claims an enormous array
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 3), }\n"
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as archive:
        archive.writestr("member_logits.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    with pytest.raises(ValueError, match=r"takes about 1.64e\+05 GB of memory"):
        read(tmp_path / "bomb.npz")
    monkeypatch.setattr(files.limits, "memory", lambda: (2000, 1000))
    for path in (*paths, tmp_path, tmp_path / "a.csv"):
        with pytest.raises(ValueError, match="GB of memory and 1e-06 GB are free"):
            read(path)


@pytest.mark.parametrize("number", ["1", "-0.123456789012"])
def test_a_table_asks_room_for_its_numbers_however_long_they_are(tmp_path, monkeypatch, number):
    asked = []
    monkeypatch.setattr(files, "_room", lambda path, needed: asked.append(needed))
    rows = [f"{side},0,{number},{number}" for side in (0, 1)] * 20_000
    (tmp_path / "a.csv").write_text("\n".join(["member,label,logit_0,logit_1", *rows]) + "\n")
    read(tmp_path / "a.csv")
    assert asked[0] == pytest.approx(40 * 4 * len(rows), rel=0.01)


TABLE = "member,label,logit_0,logit_1\n1,0,0.5,2\n1,1,1,0\n0,0,3,1.5\n0,1,1,4\n"


@pytest.mark.parametrize("text", [
    TABLE.encode("utf-8-sig"), TABLE.replace("\n", "\r\n").encode(), TABLE.replace(",", ", ").encode(),
    TABLE.replace("\n1,", "\nTrue,").replace("\n0,", "\nFalse,").encode(),
    TABLE.replace("logit_1\n", "logit_1,comment\n").replace("2\n", "2,a\n", 1).encode(),
])
def test_tables_as_other_programs_write_them(tmp_path, text):
    (tmp_path / "a.CSV").write_bytes(text)
    found = read(tmp_path / "a.CSV")
    assert found.logits[0].tolist() == [[0.5, 2], [1, 0], [3, 1.5], [1, 4]] and found.labels.tolist() == [0, 1, 0, 1]
    assert found.membership[0].tolist() == [True, True, False, False]


def test_npy_files_may_be_given_one_by_one(tmp_path):
    for name, a in single().items():
        np.save(tmp_path / f"{name}.npy", a)
    found = read([tmp_path / f"{name}.npy" for name in single()])
    assert np.array_equal(found.logits, read(tmp_path).logits) and found.models == 1
    write(tmp_path / "a.npz", single())
    (tmp_path / "b").mkdir()
    np.save(tmp_path / "b" / "member_logits.npy", np.zeros(3))
    for paths, words in (
        ((tmp_path / "a.npz", tmp_path / "a.npz"), "only .npy files are read together"),
        ((tmp_path / "member_logits.npy", tmp_path / "a.npz"), "only .npy files are read together"),
        ((tmp_path / "member_logits.npy", tmp_path / "b"), "two files have the same name"),
    ):
        with pytest.raises(ValueError, match=words):
            read(paths)


def test_what_has_no_meaning_is_not_unpacked(tmp_path, monkeypatch):
    """An archive that is small on the disk and huge when it is unpacked, under a name that nobody asked for."""
    write(tmp_path / "a.npz", single())
    with zipfile.ZipFile(tmp_path / "a.npz", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.bin", bytes(50_000_000))
        archive.writestr("bomb.npy", bytes(50_000_000))
    tracemalloc.start()
    found = read(tmp_path / "a.npz")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.n == 50 and most < 5_000_000 and "bomb" in found.warnings[0]


def test_a_long_header_is_not_read(tmp_path):
    (tmp_path / "member_logits.npy").write_bytes(b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b" " * 100)
    with pytest.raises(ValueError, match="a header of 2,147,483,648 bytes"):
        read(tmp_path)


def test_a_header_of_any_length_is_no_pickle(tmp_path):
    """A safetensors file begins with the length of its header: 640 is written as a pickle begins."""
    for filler in range(1, 600):
        path = write(tmp_path / "a.safetensors", single() | {"x" * filler: np.zeros(1)})
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    else:
        raise AssertionError("no header of 640 bytes was made")
    assert read(path).n == 50


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors", "a.csv", "member_logits.npy"])
def test_damage_anywhere_ends_in_one_sentence_or_is_harmless(tmp_path, name):
    if name == "a.csv":
        (tmp_path / name).write_text(TABLE)
    elif name.endswith(".npy"):
        for key, a in single().items():
            np.save(tmp_path / f"{key}.npy", a)
    else:
        write(tmp_path / name, single())
    good, rng = (tmp_path / name).read_bytes(), np.random.default_rng(0)
    refused = 0
    for trial in range(150):
        broken = bytearray(good)
        if trial % 3 == 0:
            del broken[rng.integers(0, len(good)) :]
        elif trial % 3 == 1:
            broken[rng.integers(0, min(len(good), 300))] = rng.integers(0, 256)
        else:
            at = rng.integers(0, len(good))
            broken[at:at] = rng.bytes(5)
        (tmp_path / name).write_bytes(bytes(broken))
        try:
            read(tmp_path if name.endswith(".npy") else tmp_path / name)
        except ValueError as error:
            assert str(error).isprintable() and len(str(error)) < 600
            refused += 1
    assert refused > 20


CLASSES, N = 50, 20_000


@pytest.mark.parametrize("kind", ["logits", "probs"])
def test_an_audit_takes_no_more_than_was_asked_for(tmp_path, monkeypatch, kind):
    rng, arrays = np.random.default_rng(0), {}
    for side in ("member", "nonmember"):
        z = rng.normal(size=(N, CLASSES))
        arrays[f"{side}_{kind}"] = (z if kind == "logits" else np.exp(z) / np.exp(z).sum(-1, keepdims=True)).astype(np.float32)
        arrays[f"{side}_labels"] = rng.integers(0, CLASSES, N)
    paths, asked = [write(tmp_path / f"a{suffix}", arrays) for suffix in (".npz", ".safetensors")], []
    monkeypatch.setattr(files, "_room", lambda path, needed: asked.append(needed))
    audit(read(paths[0]), fprs=(0.1,))  # loads what is loaded late
    del arrays, z
    for path in paths:
        tracemalloc.start()
        audit(read(path), fprs=(0.1,))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 0.4 * asked[-1] < most < asked[-1]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_written_outputs_can_be_read_by_whom_the_umask_lets(tmp_path, suffix, mask, mode):
    path = tmp_path / f"o{suffix}"
    written = "files.write(sys.argv[1], {'a': numpy.ones(2)})"
    script = f"import os, sys, numpy; from demem_lab import files; os.umask({mask}); {written}"
    subprocess.run([sys.executable, "-c", script, str(path)], check=True)
    assert path.stat().st_mode & 0o777 == mode and [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_wrong_suffix_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="written as .npz or .safetensors, got .txt"):
        write(tmp_path / "o.txt", {"a": np.zeros(2)})
    assert not list(tmp_path.iterdir())
