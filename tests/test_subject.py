"""A stranger's torch model: asked twice, it answers the same."""

import numpy as np
import pytest
import torch
from torch import nn

from demem_lab.attacks import NFGSM, PGD
from demem_lab.subject import ask, load_weights


@pytest.fixture
def asked():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    sides = [(torch.rand(300, 1, 4, 4), torch.randint(0, 3, (300,))) for _ in range(2)]

    def ask_with(**how):
        return ask(net, members=sides[0], non_members=sides[1], device="cpu", **how)

    return ask_with


@pytest.mark.parametrize("attack", [PGD(0.1, 2), PGD(0.1, 2, restarts=2), PGD(0.1, 1, norm="l2"), NFGSM(0.1)])
def test_a_random_start_is_the_same_one_every_time(asked, attack):
    before = torch.get_rng_state()
    found = [asked(attack=attack) for _ in range(2)]
    for name in ("member_adv_logits", "nonmember_adv_logits"):
        assert np.array_equal(found[0].arrays[name], found[1].arrays[name])
    assert found[0].graded is None or np.array_equal(found[0].graded, found[1].graded)
    assert found[0].robustness == found[1].robustness and torch.equal(before, torch.get_rng_state())


def test_batches_do_not_share_their_random_numbers(asked):
    drawn = []

    class Told(PGD):
        def _random_offset(self, x, rng):
            drawn.append(super()._random_offset(x, rng))
            return drawn[-1]

    asked(attack=Told(0.1, 1))
    assert not torch.equal(drawn[0][:44], drawn[4][:44])  # the query of the first batch, of the second (after three radii)


def test_an_attack_of_ones_own_needs_no_generator(asked):
    found = asked(attack=lambda net, x, y: (x + 0.1).clamp(0, 1))
    assert found.arrays["member_adv_logits"].shape == (300, 3)


@pytest.mark.parametrize("attack", [PGD, "pgd", 0.1])
def test_what_is_no_attack_is_one_sentence(asked, attack):
    with pytest.raises(ValueError, match=r"attack must be an object such as PGD\(0.03\), got "):
        asked(attack=attack)


X, Y = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3


class Answers(nn.Module):
    """A network whose answer is wrapped in something."""

    def __init__(self, wrap=lambda z: z):
        super().__init__()
        self.net, self.wrap = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), wrap

    def forward(self, x):
        return self.wrap(self.net(x))


PAIRS = torch.utils.data.TensorDataset(X, Y)


@pytest.mark.parametrize(("net", "members", "words"), [
    (Answers(), (2 * X - 1, Y), r"must lie in \[0, 1\], got values from -0.99.*Sequential\(Normalize\(mean, std\), net\)"),
    (Answers(), (X * float("nan"), Y), "got values from nan to nan; rescale or remove"),
    (Answers(), (X[:0], Y[:0]), "no empty axis"),
    (Answers(), (X.flatten(1), Y), r"got \[20, 16\]; .* give arrays of outputs instead"),
    (Answers(), PAIRS, r"members must be a pair of arrays \(images, labels\), got .*TensorDataset.*; of a Dataset take"),
    (Answers(), torch.utils.data.DataLoader(PAIRS), r"pair of arrays .*DataLoader.*torch.stack"),
    (Answers(), (None, None), "a model alone cannot be audited"), (Answers(), X, "pair of arrays"),
    (Answers(), (X, Y, Y), "pair of arrays"), (Answers(), ([[1.0], [1.0, 2.0]], Y), "which these are not"),
    (Answers(), ((255 * X).byte(), Y), "divide 8-bit pixels by 255"),
    (Answers(), (X, Y.float()), "labels must be int64"), (Answers(), (X, Y[:5]), r"labels must have shape \[20\]"),
    (Answers(), (X[:, :, :3], Y), r"does not answer images of shape \[1, 3, 4\]: .*shapes cannot be multiplied"),
    (Answers(lambda z: (z, z)), (X, Y), r"must return a tensor of logits \[B, K\], got a tuple; wrap it"),
    (Answers(lambda z: {"logits": z}), (X, Y), r"got a dict; wrap it"),
    (Answers(lambda z: z[:, 0]), (X, Y), r"at least 2 classes, got \[1\] for one image"),
    (Answers(lambda z: z[:, :1]), (X, Y), r"at least 2 classes, got \[1, 1\]"),
])
def test_what_does_not_fit_a_model_is_one_sentence(net, members, words):
    with pytest.raises(ValueError, match=words) as caught:
        ask(net, members=members, non_members=(X, Y), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float16])
def test_images_and_networks_of_any_precision(kind):
    net = Answers().to(kind)
    found = [ask(net, members=(x, y), non_members=(X, Y), eps=0.1, device="cpu") for x, y in (
        (X, Y), (X.double(), Y.int()), (X.numpy(), Y.numpy().astype(np.uint8)), (X.double().tolist(), Y.tolist()),
    )]
    for one in found:
        assert one.arrays["member_logits"].dtype == one.arrays["member_inputs"].dtype == np.float32
        assert all(np.array_equal(one.arrays[name], found[0].arrays[name]) for name in found[0].arrays)
    assert all(p.dtype == kind and p.requires_grad for p in net.parameters()) and net.training
    moved = found[0].arrays["member_adv_logits"]
    plain = ask(net.float(), members=(X, Y), non_members=(X, Y), eps=0.1, device="cpu").arrays["member_adv_logits"]
    assert np.allclose(moved, plain, atol=0.05)  # the attack itself is not in half precision


@pytest.mark.parametrize("wrap", [
    lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model_state_dict": s, "epoch": 3}, lambda s: {"model": s},
    lambda s: {f"module.{k}": v for k, v in s.items()}, lambda s: {"model": {f"_orig_mod.{k}": v for k, v in s.items()}},
])
def test_checkpoints_as_others_write_them(tmp_path, wrap):
    one, two = Answers(), Answers()
    torch.save(wrap(one.state_dict()), tmp_path / "w.pt")
    load_weights(two, tmp_path / "w.pt")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize(("content", "words"), [
    (nn.Linear(2, 2), r"it holds a whole model or other objects.*save net.state_dict\(\)"),
    ([1, 2], "it holds a list"), (b"nonsense", "damaged or no checkpoint"), (b"", "EOFError"),
    ({"net.1.weight": torch.zeros(3, 16), "a": torch.zeros(1)}, "missing: net.1.bias; unexpected: a"),
    ({"net.1.weight": torch.zeros(3, 9), "net.1.bias": torch.zeros(3)}, r"another shape: net.1.weight \[3, 9\] for \[3, 16\]\)"),
])
def test_weights_that_do_not_fit_say_why(tmp_path, content, words):
    path = tmp_path / "w.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=words) as caught:
        load_weights(Answers(), path)
    assert str(caught.value).isprintable() and "does not hold weights for this network" in str(caught.value)


class InPlace(nn.Module):
    """Normalises the images where they lie, as many a training script does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.apart = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), False

    def forward(self, x):
        return self.net((x - 0.5) / 0.25 if self.apart else x.sub_(0.5).div_(0.25))


@pytest.mark.parametrize("how", [
    {}, {"eps": 0.1}, {"attack": NFGSM(0.1)}, {"attack": lambda net, x, y: x.add_(0.1).clamp_(0, 1)},
])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_nobodys_images_are_changed_in_place(how, kind):
    x, y, net = X.clone(), Y.clone(), InPlace().to(kind)
    arrays = X.numpy().copy(), Y.numpy()
    found = ask(net, members=(x, y), non_members=arrays, device="cpu", **how)
    assert torch.equal(x, X) and np.array_equal(arrays[0], X.numpy()) and np.array_equal(found.arrays["member_inputs"], X.numpy())
    assert not net._forward_pre_hooks
    net.apart = True
    wanted = ask(net, members=(x, y), non_members=arrays, device="cpu", **how)
    assert found.arrays.keys() == wanted.arrays.keys()
    assert all(np.allclose(found.arrays[name], a, atol=1e-6) for name, a in wanted.arrays.items())


class Cut(Answers):
    """A network whose answers do not hang on its images, for torch."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        if self.how == "detach":
            return self.net(x.detach())
        if self.how == "in place":
            y = x.exp()
            return self.net(y) + self.net(y.mul_(2))
        with torch.no_grad() if self.how == "no_grad" else torch.inference_mode():
            return self.net(x)


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "detach", "in place"])
@pytest.mark.parametrize("attacked", [{"eps": 0.1}, {"attack": PGD(0.1, 1)}, {"attack": NFGSM(0.1)}])
def test_a_network_without_a_slope_is_one_sentence_where_it_needs_one(how, attacked):
    net = Cut(how)
    with pytest.raises(ValueError, match=r"needs the gradient of the answers at .*take torch.no_grad\(\), detach") as caught:
        ask(net, members=(X, Y), non_members=(X, Y), device="cpu", **attacked)
    assert "\n" not in str(caught.value) and not net._forward_pre_hooks
    for fine in ({}, {"attack": lambda net, x, y: (x + 0.1).clamp(0, 1)}):
        assert ask(net, members=(X, Y), non_members=(X, Y), device="cpu", **fine).arrays["member_logits"].shape == (20, 3)


def test_a_softmax_at_the_end_is_to_be_left_out():
    with pytest.raises(ValueError, match="answers with probabilities .*leave out the softmax at its end"):
        ask(Answers(lambda z: z.softmax(-1)), members=(X, Y), non_members=(X, Y), device="cpu")
    assert ask(Answers(lambda z: z.log_softmax(-1)), members=(X, Y), non_members=(X, Y), device="cpu").graded is None


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_scripted_networks_are_asked_as_well():
    net = torch.jit.trace(InPlace(), X[:2].clone())
    x = X.clone()
    ask(net, members=(x, Y), non_members=(x, Y), eps=0.1, device="cpu")
    assert torch.equal(x, X)
