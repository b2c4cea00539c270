"""Many small models at once, against the ways people train shadow models today."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from harness import Row, judged, times, versus
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

from demem_lab import data, queries
from demem_lab.attacks import PGD
from demem_lab.data import Dataset
from demem_lab.models import MLP, OUT_GAIN, SmallCNN
from demem_lab.objectives import PGDAT, Natural
from demem_lab.optimizers import SGD
from demem_lab.sampling import Shuffled
from demem_lab.streams import model_seeds
from demem_lab.training import Recipe, train

EPS, STEPS, LR = 0.1, 5, 0.05


class Normalised(nn.Module):
    """Pixels as the first layer sees them."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x):
        return (x - self.mean) / self.std


def torch_model(spec: MLP | SmallCNN, shape: tuple[int, int, int]) -> nn.Sequential:
    """The same architecture from torch's own layers, which start where ours do."""
    if hasattr(spec, "torch_model"):
        return spec.torch_model()
    net = _layers(spec, shape)
    if (spec.mean, spec.std) != (0.0, 1.0):
        net.insert(0, Normalised(spec.mean, spec.std))
    for layer in net:
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    if isinstance(spec, SmallCNN):
        with torch.no_grad():
            net[-1].weight.mul_(OUT_GAIN)
    return net


def _layers(spec: MLP | SmallCNN, shape: tuple[int, int, int]) -> nn.Sequential:
    if isinstance(spec, MLP):
        sizes = (int(np.prod(shape)), *spec.hidden)
        hidden = [part for a, b in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], 10))
    w, small = spec.width, shape[1] <= 16
    parts, side = [], shape[1]
    for a, b, stride in ((shape[0], w, 1), (w, 2 * w, 2), (2 * w, 2 * w, 1 if small else 2)):
        parts += [nn.Conv2d(a, b, 3, stride, 1), nn.GroupNorm(4, b), nn.ReLU()]
        side = -(-side // stride)
    if not small:
        parts, side = [*parts, nn.AvgPool2d(2)], side // 2
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(2 * w * side * side, spec.hidden), nn.ReLU(), nn.Linear(spec.hidden, 10))


def twin_of(net, spec: MLP | SmallCNN, shape: tuple[int, int, int]) -> nn.Module:
    """torch's own layers with the weights of our network of one model."""
    twin = torch_model(spec, shape)
    ours = {name: p.detach()[0] for name, p in net.named_parameters()}
    layers = [m for m in twin.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.GroupNorm))]
    order = {"conv": [], "norm": [], "lin": []}
    for name in dict.fromkeys(n.rsplit(".", 1)[0] for n in ours):
        w = ours[f"{name}.weight"]
        order["conv" if w.ndim == 4 else "norm" if w.ndim == 1 else "lin"].append(name)
    for layer in layers:
        kind = {nn.Conv2d: "conv", nn.GroupNorm: "norm", nn.Linear: "lin"}[type(layer)]
        name = order[kind].pop(0)
        weight = ours[f"{name}.weight"]
        with torch.no_grad():
            layer.weight.copy_(weight.T if kind == "lin" else weight)
            layer.bias.copy_(ours[f"{name}.bias"])
    return twin


def attacked(net, x, y, steps: int = STEPS):
    """PGD as it stands in most training scripts: random start, sign steps, projection."""
    z = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(steps):
        z.requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(net(z), y, reduction="sum"), z)
        z = torch.min(torch.max(z.detach() + 2.5 * EPS / steps * slope.sign(), x - EPS), x + EPS).clamp(0, 1)
    return z


def loop(images: Dataset, members, spec, *, batch: int, epochs: int, attack: bool, rows=None) -> list[nn.Module]:
    """One model after the other, as in public LiRA code: permute, slice, forward, backward, step."""
    done = []
    for row in range(len(members)) if rows is None else rows:
        torch.manual_seed(row)
        net = torch_model(spec, images.shape)
        optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9)
        mine = members[row].nonzero()[:, 0]
        for _ in range(epochs):
            for part in mine[torch.randperm(len(mine))][: len(mine) // batch * batch].split(batch):
                x, y = images.x[part], images.y[part]
                x = attacked(net, x, y) if attack else x
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
        done.append(net)
    return done


def _one_process(job) -> list:
    torch.set_num_threads(1)
    images, members, spec, settings, rows = job
    return [n.state_dict() for n in loop(images, members, spec, rows=rows, **settings)]


def _with_two_threads(*job, **settings) -> None:
    torch.set_num_threads(2)
    try:
        loop(*job, **settings)
    finally:
        torch.set_num_threads(1)


def vmapped(images: Dataset, members, spec, *, batch: int, epochs: int, attack: bool):
    """torch.func: stacked parameters, vmap over models of the gradient of one model's loss; the trained models' logits."""
    models = len(members)
    nets = [torch_model(spec, images.shape) for _ in range(models)]
    parameters, buffers = stack_module_state(nets)
    base = torch_model(spec, images.shape).to("meta")

    def loss(p, b, x, y):
        return F.cross_entropy(functional_call(base, (p, b), (x,)), y)

    slope_x, slope_p = vmap(grad(loss, argnums=2)), vmap(grad(loss))
    momentum = {name: torch.zeros_like(p) for name, p in parameters.items()}
    size = int(members.sum(1).min())
    order = torch.stack([m.nonzero()[:size, 0] for m in members])
    for _ in range(epochs):
        order = order.gather(1, torch.rand(order.shape).argsort(1))
        for part in order[:, : size // batch * batch].split(batch, 1):
            x, y = images.x[part], images.y[part]
            z = x
            if attack:
                z = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
                for _ in range(STEPS):
                    slope = slope_x(parameters, buffers, z, y)
                    z = torch.min(torch.max(z + 2.5 * EPS / STEPS * slope.sign(), x - EPS), x + EPS).clamp(0, 1)
            slopes = slope_p(parameters, buffers, z, y)
            with torch.no_grad():
                for name, p in parameters.items():
                    momentum[name].mul_(0.9).add_(slopes[name])
                    p.sub_(LR * momentum[name])
    return vmap(lambda p, b: functional_call(base, (p, b), (images.x,)))(parameters, buffers)


def ours(images: Dataset, members, spec, *, batch: int, epochs: int, attack: bool, chunk: int | None = None):
    """The same job here."""
    recipe = Recipe(
        model=spec, objective=PGDAT(PGD(EPS, STEPS)) if attack else Natural(), optimizer=SGD(lr=LR), sampler=Shuffled(batch),
        schedule=_flat, epochs=epochs,
    )
    return train(images, members, recipe, seeds=model_seeds(0, len(members)), chunk=chunk)


def _flat(step: int, total: int) -> float:
    return 1.0


def same_accuracy(images: Dataset, members, spec, **settings) -> None:
    """Every way must train models that classify non-members equally well, within three points, or it is not the same job."""
    y, out = images.y.numpy(), ~members.numpy()

    def accuracy(logits: np.ndarray) -> float:
        return float((logits.argmax(-1) == y)[out].mean())

    nets = loop(images, members, spec, **settings)
    with torch.no_grad():
        found = {"loop": accuracy(torch.stack([net(images.x) for net in nets]).numpy())}
    found["ours"] = accuracy(queries.outputs(ours(images, members, spec, **settings), images))
    found["vmap"] = accuracy(vmapped(images, members, spec, **settings).detach().numpy())
    assert max(found.values()) - min(found.values()) < 0.03, f"not the same job: accuracy {found}"


def mlps(quick: bool) -> list[Row]:
    """64 MLPs on digits, naturally and by PGD-5."""
    images, spec, models = data.load(), MLP(), 8 if quick else 64
    members = data.member_masks(images.n, models, seed=0)
    for attack in (False, True):
        same_accuracy(images, members[:4], spec, batch=50, epochs=6 if quick else 8, attack=attack)
    rows = []
    for attack in (False, True):
        settings = {"batch": 50, "epochs": 1 if attack or quick else 2, "attack": attack}
        shape = f"{models} MLPs 64-128-128-10, digits, batch 50, {'PGD-5 AT' if attack else 'natural'}"
        few = members[: max(2, models // 8)]
        rows += versus(
            "shadow models", f"{shape}, 1 thread, CPU time",
            {
                "ours": lambda s=settings: ours(images, members, spec, **s),
                "sequential loop": lambda s=settings, few=few: loop(images, few, spec, **s),
                "torch.func vmap": lambda s=settings: vmapped(images, members, spec, **s),
            },
            scale={"sequential loop": models / len(few)}, rounds=3 if quick else 5,
            targets={"sequential loop": 2.5},  # of one core's work: 5 on two cores against a loop that uses one
            notes={"sequential loop": f"timed on {len(few)} models"},
        )
        with ProcessPoolExecutor(2) as pool:
            jobs = [(images, members, spec, settings, range(i, models, 2)) for i in range(2)]
            list(pool.map(_one_process, [(images, members, spec, settings, range(1))] * 2))  # started and warm
            rows += versus(
                "shadow models", f"{shape}, 2 processes against 2 threads, wall time",
                {
                    "ours": lambda s=settings: ours(images, members, spec, **s),
                    "one process a core": lambda pool=pool, jobs=jobs: list(pool.map(_one_process, jobs)),
                }, wall=True, rounds=2 if quick else 3,
            )
        rows += versus(
            "shadow models", f"{shape}, on two cores, wall time",
            {
                "ours": lambda s=settings: ours(images, members, spec, **s),
                "sequential loop, one thread": lambda s=settings, few=few: loop(images, few, spec, **s),
                "sequential loop, two threads": lambda s=settings, few=few: _with_two_threads(images, few, spec, **s),
            },
            wall=True, scale={f"sequential loop, {n}": models / len(few) for n in ("one thread", "two threads")},
            rounds=2 if quick else 5, targets={f"sequential loop, {n}": 5.0 for n in ("one thread", "two threads")},
            notes={f"sequential loop, {n}": f"timed on {len(few)} models" for n in ("one thread", "two threads")},
        )
    rows.append(share_of_products(images, members, spec, quick))
    return rows


def share_of_products(images: Dataset, members, spec: MLP, quick: bool) -> Row:
    """Share of our adversarial training that bare batched matrix products of the same shapes would take."""
    models, batch, steps = len(members), 50, int(members.sum(1).min()) // 50
    sizes = (64, *spec.hidden, 10)
    layers = [(torch.rand(models, batch, a), torch.rand(models, a, b)) for a, b in zip(sizes, sizes[1:], strict=False)]
    outs = [torch.rand(models, batch, w.shape[2]) for _, w in layers]

    def products() -> None:
        for _ in range(steps):
            for _ in range(STEPS):  # each attack step: forward, and back to the inputs
                for (a, w), d in zip(layers, outs, strict=True):
                    torch.bmm(a, w)
                    torch.bmm(d, w.mT)
            for number, ((a, w), d) in enumerate(zip(layers, outs, strict=True)):
                torch.bmm(a, w)
                torch.bmm(a.mT, d)
                if number:
                    torch.bmm(d, w.mT)

    found = times(
        {"ours": lambda: ours(images, members, spec, batch=50, epochs=1, attack=True), "products": products},
        rounds=3 if quick else 5,
    )
    shares = [p / o for p, o in zip(found["products"], found["ours"], strict=True)]
    shape = f"{models} MLPs, PGD-5 AT, batch 50"
    return judged("shadow models", shape, "bare batched products", shares, target=0.5, unit="share of our time")


def cnns(quick: bool) -> list[Row]:
    """32 small CNNs at three shapes."""
    rows, digits, spec = [], data.load(), SmallCNN()
    models = 4 if quick else 32
    if not quick:
        same_accuracy(digits, data.member_masks(digits.n, 4, seed=0), spec, batch=50, epochs=6, attack=False)
    for side, batch, target in ((8, 16, 2.5), (8, 64, 1.4), (28, 64, None)):
        images = digits
        if side != 8:
            big = F.interpolate(digits.x, size=(side, side), mode="bilinear").clamp(0, 1)
            images = Dataset("digits, enlarged", big, digits.y, digits.classes, digits.source, digits.eps)
        members = data.member_masks(images.n, models, seed=0)[:, :400]
        images = Dataset(images.name, images.x[:400], images.y[:400], images.classes, images.source, images.eps)
        settings = {"batch": batch, "epochs": 1, "attack": False}
        few = members[: max(2, models // 8)]
        ways = {
            "ours": lambda s=settings, i=images, m=members: ours(i, m, spec, **s),
            "sequential loop": lambda s=settings, i=images, m=few: loop(i, m, spec, **s),
        }
        if not quick or side == 8:
            ways["torch.func vmap"] = lambda s=settings, i=images, m=members: vmapped(i, m, spec, **s)
        rows += versus(
            "shadow models", f"{models} small CNNs, {side}x{side}, batch {batch}, natural, 1 thread, CPU time", ways,
            scale={"sequential loop": models / len(few)}, rounds=3 if quick else 5,
            targets={"sequential loop": target or 1.0, "torch.func vmap": 1.0},
            notes={"sequential loop": f"timed on {len(few)} models"},
        )
    return rows


def jobs(quick: bool) -> list[Row]:
    """All rows of this file."""
    return [*mlps(quick), *cnns(quick)]
