"""Arrays from strangers: what is right comes through unchanged, what is wrong ends in one clear sentence."""

import numpy as np
import pytest
import torch

from demem_lab.outputs import listed, outputs_from_arrays


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


def test_an_ensemble_keeps_its_precision_and_takes_numbers_for_flags():
    arrays = ensemble()
    found = outputs_from_arrays(arrays)
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
    "ids of two axes": (change(member_ids=np.zeros((30, 2)), nonmember_ids=np.zeros(20)), r"30 entries.*\[30, 2\]"),
    "ids without an axis": (change(member_ids=np.array(1), nonmember_ids=np.zeros(20)), "30 entries"),
    "inputs without an axis": (change(member_inputs=np.array(1.0), nonmember_inputs=np.zeros((20, 4))), "30 entries"),
    "ids as numbers and as text": (
        change(member_ids=np.arange(30), nonmember_ids=np.arange(29, 49).astype(str)),
        "1 of the members and non-members have equal ids",
    ),
    "label NaN": (change(member_labels=np.full(30, np.nan)), "whole numbers, got nan"),
    "label infinite": (change(member_labels=np.full(30, np.inf)), r"lie in 0\.\.2"),
    "text": (change(member_logits=np.full((30, 3), "1.0")), "must hold numbers, got <U3"),
    "complex": (change(member_logits=np.ones((30, 3)) + 1j), "must hold numbers, got complex128"),
    "dates": (change(member_logits=np.zeros((30, 3), "datetime64[s]")), "must hold numbers"),
    "records": (change(member_logits=np.zeros((30, 3), [("a", "f4")])), "must hold numbers"),
    "flags": (change(member_logits=np.zeros((30, 3), dtype=bool)), "must hold numbers, got bool"),
    "beyond all logits": (change(member_logits=np.full((30, 3), 1e200)), "within 1e.100 of 0"),
    "probs in half precision called logits": (
        change(member_logits=softmax(single()["member_logits"]).astype(np.float16)), "name them member_probs",
    ),
    "membership text": (group(membership=np.full((4, 12), "True")), "only True and False"),
    "names to obey": (lambda: outputs_from_arrays({"\x1b[2Jboo": np.zeros(3)}), r"found: \?\[2Jboo$"),
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


def test_only_equal_inputs_are_equal():
    x = np.random.default_rng(0).random((30, 4))
    other = {"nonmember_inputs": np.zeros((20, 4), dtype=np.uint8)}  # cut to whole numbers, all of x would be 0 as well
    assert not outputs_from_arrays(single() | {"member_inputs": x} | other).warnings
    assert not outputs_from_arrays(single() | {"member_inputs": x, "nonmember_inputs": np.zeros((20, 5))}).warnings
    with pytest.raises(ValueError, match="20 of the members"):
        outputs_from_arrays(single() | {"member_inputs": x.astype(np.float32), "nonmember_inputs": x[:20].astype(np.float32)})


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.longdouble, np.int8, np.int64])
def test_every_kind_of_number_is_taken(kind):
    arrays = {name: (a * 10).astype(kind) if "logits" in name else a.astype(np.int8) for name, a in single().items()}
    found = outputs_from_arrays(arrays)
    assert found.logits.dtype in (np.float32, np.float64) and found.labels.dtype == np.int64
    assert np.array_equal(found.logits[0, :30], arrays["member_logits"].astype(np.float64))


def test_long_lists_of_names_are_cut_short():
    assert listed(f"a{i}" for i in range(1000)) == "a0, a1, a2, a3, a4, a5, a6, a7 and 992 more"
    assert len(listed(["x" * 1000])) == 60 and listed([]) == "nothing"


def fitted(models, n, k, accuracy_in, accuracy_out, seed=0):
    """Outputs that are right with these probabilities on members and on others."""
    rng = np.random.default_rng(seed)
    membership, labels = rng.random((models, n)) < 0.5, rng.integers(0, k, n)
    membership[:, 0], membership[:, 1] = True, False
    right = rng.random((models, n)) < np.where(membership, accuracy_in, accuracy_out)
    answer = np.where(right, labels, (labels + 1) % k)
    return {"logits": rng.normal(size=(models, n, k)) + 9 * np.eye(k)[answer], "labels": labels, "membership": membership}


def test_what_looks_like_a_mistake_is_said():
    arrays = fitted(4, 1000, 5, 0.95, 0.80)
    assert not outputs_from_arrays(arrays).warnings
    twice = arrays["logits"].copy()
    twice[3] = twice[1]
    assert outputs_from_arrays(arrays | {"logits": twice}).warnings == (
        "models 1 and 3 have identical outputs; was one file written twice?",
    )
    (inverted,) = outputs_from_arrays(arrays | {"membership": ~arrays["membership"]}).warnings
    assert inverted.startswith("members are less accurate than non-members by 1") and inverted.endswith("is membership inverted?")
    dull = arrays["logits"].copy()
    dull[2, :, 4] = 50
    assert outputs_from_arrays(arrays | {"logits": dull}).warnings == ("model 2 gives one answer to everything, class 4",)


@pytest.mark.parametrize("seed", range(20))
def test_few_honest_samples_look_like_no_mistake(seed):
    for models, n, k in ((1, 12, 2), (4, 12, 3), (1, 60, 2), (8, 300, 10), (16, 2000, 4)):
        assert not outputs_from_arrays(fitted(models, n, k, 0.7, 0.7, seed)).warnings
        assert not outputs_from_arrays(fitted(models, n, k, 0.71, 0.72, seed)).warnings
    rare = fitted(2, 1000, 2, 0.9, 0.9, seed)
    rare["labels"] = (np.arange(1000) % 20 == 0).astype(int)
    rare["logits"] = np.random.default_rng(seed).normal(size=(2, 1000, 2)) + np.array([20, 0])  # one class is nearly all there is
    assert not outputs_from_arrays(rare).warnings


def test_bfloat16_is_taken_and_a_mask_is_not_lost():
    arrays = single()
    half = torch.tensor(arrays["member_logits"]).bfloat16()
    found = outputs_from_arrays(arrays | {"member_logits": half}).logits[0, :30]
    assert np.array_equal(found, half.double().numpy())
    masked = np.ma.masked_array(arrays["member_logits"], mask=np.arange(90).reshape(30, 3) == 4)
    with pytest.raises(ValueError, match="member_logits is a masked array, and its mask would be lost; leave out its 1 masked"):
        outputs_from_arrays(arrays | {"member_logits": masked})
    assert outputs_from_arrays(arrays | {"member_logits": np.ma.masked_array(arrays["member_logits"])}).n == 50
    with pytest.raises(ValueError, match="member_logits is no array of numbers, with rows of one length"):
        outputs_from_arrays(arrays | {"member_logits": [[1.0, 2.0, 3.0], [1.0]]})
