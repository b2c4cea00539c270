"""Files from strangers: what is right comes through unchanged, what is wrong ends in one clear sentence, nothing is run."""

import os
import pickle
import struct
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from demem_lab import files
from demem_lab.files import outputs_from_arrays, read, write


def single(n=30, m=20, k=3, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "member_logits": rng.normal(size=(n, k)),
        "member_labels": rng.integers(0, k, n),
        "nonmember_logits": rng.normal(size=(m, k)),
        "nonmember_labels": rng.integers(0, k, m),
    }


def ensemble(models=4, n=12, k=3, seed=0):
    rng = np.random.default_rng(seed)
    membership = rng.random((models, n)) < 0.5
    membership[:, 0], membership[:, 1] = True, False
    return {
        "logits": rng.normal(size=(models, n, k)).astype(np.float32),
        "labels": rng.integers(0, k, n),
        "membership": membership,
    }


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


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


def test_an_ensemble_keeps_its_precision_and_takes_numbers_for_flags(tmp_path):
    arrays = ensemble()
    found = read(write(tmp_path / "e.npz", arrays))
    assert found.logits.dtype == np.float32 and np.array_equal(found.logits, arrays["logits"]) and found.models == 4
    numbers = outputs_from_arrays(arrays | {"membership": arrays["membership"].astype(int)})
    assert np.array_equal(numbers.membership, arrays["membership"]) and numbers.membership.dtype == bool
    assert outputs_from_arrays(arrays | {"logits": arrays["logits"].astype(np.float16)}).logits.dtype == np.float32
    assert outputs_from_arrays({name: torch.as_tensor(a) for name, a in arrays.items()}).n == 12


def test_probabilities_are_taken_and_their_loss_is_said():
    arrays = single()
    probs = {name.replace("logits", "probs"): softmax(a) if "logits" in name else a for name, a in arrays.items()}
    found = outputs_from_arrays(probs)
    assert found.from_probabilities and "save logits" in found.warnings[0]
    assert np.allclose(softmax(found.logits[0]), np.concatenate([probs["member_probs"], probs["nonmember_probs"]]))
    certain = probs | {"member_probs": np.eye(3)[np.zeros(30, dtype=int)]}
    assert np.isfinite(outputs_from_arrays(certain).logits).all()
    assert outputs_from_arrays(arrays | {"member_logits": np.log(softmax(arrays["member_logits"]))}).n == 50  # log p are logits


def test_equal_outputs_and_unknown_names_only_warn():
    arrays = single()
    arrays["nonmember_logits"][:3] = arrays["member_logits"][:3]
    assert "3 members have exactly the outputs" in outputs_from_arrays(arrays).warnings[0]
    assert "membr_ids (did you mean member_ids?)" in outputs_from_arrays(single() | {"membr_ids": np.arange(30)}).warnings[0]


def change(**arrays):
    return lambda: outputs_from_arrays(single() | arrays)


def without(name):
    return lambda: outputs_from_arrays({k: v for k, v in single().items() if k != name})


def group(**arrays):
    return lambda: outputs_from_arrays(ensemble() | arrays)


def spoiled(value):
    z = single()["member_logits"]
    z[4, 1] = value
    return z


X = np.arange(50 * 4).reshape(50, 4)
WRONG = {
    "equal ids": (
        change(member_ids=np.arange(30), nonmember_ids=np.arange(29, 49)),
        "1 of the members and non-members have equal ids",
    ),
    "equal inputs": (
        change(member_inputs=X[:30], nonmember_inputs=X[28:48]),
        "2 of the members and non-members have equal inputs",
    ),
    "ids too short": (change(member_ids=np.arange(3), nonmember_ids=np.arange(20)), "30 entries"),
    "one-hot": (change(member_labels=np.eye(3)[np.zeros(30, dtype=int)]), r"one-hot.*argmax\(1\)"),
    "label too large": (change(member_labels=np.full(30, 3)), r"lie in 0\.\.2"),
    "label negative": (change(nonmember_labels=np.full(20, -1)), r"lie in 0\.\.2"),
    "label not whole": (change(member_labels=np.full(30, 0.5)), "whole numbers"),
    "label text": (change(member_labels=np.array(["a"] * 30)), "whole numbers"),
    "labels too short": (change(member_labels=np.zeros(3, dtype=int)), r"shape \[30\]"),
    "sums": (
        lambda: outputs_from_arrays(
            {
                "member_probs": np.full((30, 3), 0.3),
                "member_labels": np.zeros(30, dtype=int),
                "nonmember_probs": np.full((20, 3), 1 / 3),
                "nonmember_labels": np.zeros(20, dtype=int),
            }
        ),
        "sum to 1, row .* sums to 0.9",
    ),
    "probs outside": (
        lambda: outputs_from_arrays(
            {
                "member_probs": np.array([[1.5, -0.5]]),
                "member_labels": np.zeros(1, dtype=int),
                "nonmember_probs": np.array([[0.5, 0.5]]),
                "nonmember_labels": np.zeros(1, dtype=int),
            }
        ),
        r"lie in \[0, 1\]",
    ),
    "probs called logits": (change(member_logits=softmax(single()["member_logits"])), "name them member_probs"),
    "both": (change(member_probs=np.full((30, 3), 1 / 3)), "either member_logits or member_probs"),
    "NaN": (change(member_logits=spoiled(np.nan)), r"1 values that are NaN or infinite, the first at \[4, 1\]"),
    "infinite": (change(member_logits=spoiled(-np.inf)), "NaN or infinite"),
    "classes": (change(nonmember_logits=np.zeros((20, 4))), "same number of classes, got 3 and 4"),
    "one class": (change(member_logits=np.zeros((30, 1)), nonmember_logits=np.zeros((20, 1))), "at least 2 classes"),
    "axes": (change(member_logits=np.zeros((30, 3, 1))), r"shape \[n, K\]"),
    "empty": (change(member_logits=np.zeros((0, 3)), member_labels=np.zeros(0, dtype=int)), "empty axis"),
    "missing labels": (without("nonmember_labels"), "nonmember_labels are needed"),
    "missing members": (without("member_logits"), "member_logits"),
    "nothing": (lambda: outputs_from_arrays({"what": np.zeros(3)}), "needed: member_logits.*found: what"),
    "both kinds": (lambda: outputs_from_arrays(single() | ensemble()), "at once"),
    "one adversarial side": (change(member_adv_logits=np.zeros((30, 3))), "members AND non-members"),
    "adversarial shape": (
        change(member_adv_logits=np.zeros((30, 4)), nonmember_adv_logits=np.zeros((20, 4))),
        "shaped like member",
    ),
    "objects": (change(member_ids=np.array([{}] * 30)), "pickle in disguise"),
    "membership shape": (group(membership=np.ones((4, 3), dtype=bool)), r"\[M, N\] = \[4, 12\]"),
    "membership values": (group(membership=np.full((4, 12), 2)), "only True and False"),
    "no non-member": (group(membership=np.ones((4, 12), dtype=bool)), "one member and one non-member"),
    "ensemble without logits": (
        lambda: outputs_from_arrays({k: v for k, v in ensemble().items() if k != "logits"}),
        "an ensemble needs",
    ),
    "ensemble adversarial": (group(adv_logits=np.zeros((4, 12, 2))), "shaped like logits"),
    "too few": (lambda: outputs_from_arrays(single(), finest_fpr=0.01), "needs 500 non-members .* got 20, which resolve 0.25"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arrays_meet_one_clear_sentence(name):
    call, words = WRONG[name]
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


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
    with pytest.raises(ValueError, match="in a folder"):
        read(tmp_path / "a.npy")
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
        ("member,label,logit_0,logit_2\n1,0,1,2\n", "without gaps"),
        ("member,label,logit_0,logit_1\n2,0,1,2\n", "only 0 and 1"),
        ("member,label,logit_0,logit_1\n1,0,x,2\n0,0,1,2\n", "numbers only"),
        ("", "cannot be read"),
    ],
)
def test_tables_that_are_not(tmp_path, text, words):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=words):
        read(tmp_path / "a.csv")


def test_files_larger_than_memory_are_refused_before_they_are_read(tmp_path, monkeypatch):
    paths = [write(tmp_path / f"a{suffix}", single()) for suffix in (".npz", ".safetensors")]
    np.save(tmp_path / "member_logits.npy", np.zeros((200, 3)))
    (tmp_path / "a.csv").write_text("member,label,logit_0,logit_1\n1,0,1,2\n" * 50)
    # a small file whose header claims an enormous array
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 3), }\n"
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as archive:
        archive.writestr("member_logits.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    with pytest.raises(ValueError, match="24000 GB|2.4e.04 GB"):
        read(tmp_path / "bomb.npz")
    monkeypatch.setattr(files, "_available", lambda: 1000)
    for path in (*paths, tmp_path, tmp_path / "a.csv"):
        with pytest.raises(ValueError, match="GB of memory and 1e-06 GB are free"):
            read(path)
