"""Does adversarial training here reach what the literature reports? ResNet-18 on all of CIFAR-10, judged by PGD-20.

    DEMEM_DATA=... python benchmarks/literature.py [EPOCHS BATCH LR WARM_UP]   # needs a GPU; results/literature.md and .json

PGD-10 training with batch normalisation, eps 8/255, crop and flip; the judge is PGD-20 with steps of 2/255 from a random
start, in float32, on all 10,000 test images. Rice, Wong & Kolter 2020 (arXiv 2002.11569) and Pang et al. 2021 (arXiv
2010.00467) report 50 to 53 % at the best epoch of 100 to 200, in batches of 128: 40,000 steps and more.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from harness import RESULTS, provenance

from demem_lab import data
from demem_lab.attacks import PGD, robust_accuracy
from demem_lab.augment import usual
from demem_lab.live import Watch
from demem_lab.models import ResNet18
from demem_lab.objectives import PGDAT
from demem_lab.optimizers import SGD, HalfFlat, WarmUp
from demem_lab.precision import Precision
from demem_lab.sampling import Shuffled
from demem_lab.streams import Streams
from demem_lab.training import Recipe, train

EPS, LOOKED_AT = 8 / 255, 6  # how many of the last epochs are judged


def main(epochs: int = 30, batch: int = 256, lr: float = 0.1, warm_up: float = 0.1) -> None:
    """Train, judge the last epochs, and write the page. warm_up: share of the steps in which the rate rises to `lr`."""
    images, test = data.load("cifar10", split="train"), data.load("cifar10", split="test")
    recipe = Recipe(
        ResNet18(norm="batch"), PGDAT(PGD(EPS, 10, 2 / 255)), optimizer=SGD(lr=lr, weight_decay=5e-4),
        sampler=Shuffled(batch), schedule=WarmUp(HalfFlat(0.7), warm_up), epochs=epochs, augment=usual("cifar10"),
        precision=Precision.AUTO,
    )
    kept, losses = {}, []

    def look(moment) -> None:
        if moment.ends_epoch:
            losses.append(float(moment.losses[0]))
            print(f"epoch {moment.epoch}: adversarial loss {losses[-1]:.3f}, {time.monotonic() - begun:.0f} s", flush=True)
            if moment.epoch > epochs - LOOKED_AT:
                kept[moment.epoch] = {name: t.detach().clone() for name, t in moment.net.state_dict().items()}

    begun = time.monotonic()
    everybody = torch.ones(1, images.n, dtype=torch.bool)
    found = train(images, everybody, recipe, seeds=(0,), device="cuda", watch=Watch(look))
    seconds = time.monotonic() - begun
    net, judge, epochs_judged = found.network(device="cuda"), PGD(EPS, 20, 2 / 255), []
    for epoch, weights in kept.items():
        net.load_state_dict(weights)
        clean, robust = 0.0, 0.0
        for start in range(0, test.n, 1000):
            x, y = (t[start : start + 1000].cuda() for t in (test.x, test.y))
            with torch.no_grad():
                clean += float((net(x).argmax(1) == y).double().mean()) * len(y) / test.n
            rng = Streams((1,), "judge", start, device=torch.device("cuda"))
            robust += robust_accuracy(net, x, y, [judge], rng=rng) * len(y) / test.n
        epochs_judged.append({"epoch": epoch, "clean accuracy": clean, "PGD-20 accuracy": robust})
        print(epochs_judged[-1], flush=True)
    best = max(epochs_judged, key=lambda row: row["PGD-20 accuracy"])
    images_a_second = images.n * epochs / seconds
    page = {
        "provenance": provenance(time.monotonic() - begun), "epochs": epochs, "steps": found.steps, "batch": batch, "lr": lr,
        "warm-up": warm_up, "seconds of training": round(seconds, 1),
        "images a second": round(images_a_second), "losses": [round(loss, 4) for loss in losses], "judged": epochs_judged,
    }
    (RESULTS / "literature.json").write_text(json.dumps(page, indent=1) + "\n")
    where = ", ".join(f"{name} {value}" for name, value in page["provenance"].items())
    lines = ["| epoch | clean accuracy | PGD-20 accuracy |", "|---|---|---|"]
    lines += [f"| {r['epoch']} | {r['clean accuracy']:.1%} | {r['PGD-20 accuracy']:.1%} |" for r in epochs_judged]
    said = (
        f"{epochs} epochs ({found.steps:,} steps of {batch}, rate {lr:g}, warm-up {warm_up:g}) in {seconds / 60:.1f} minutes "
        f"({images_a_second:,.0f} images a second); best of the last epochs: "
        f"{best['PGD-20 accuracy']:.1%} under PGD-20 in epoch {best['epoch']}."
    )
    (RESULTS / "literature.md").write_text("\n".join([where, "", said, "", *lines]) + "\n")
    print(said)


if __name__ == "__main__":
    main(*(kind(given) for kind, given in zip((int, int, float, float), sys.argv[1:], strict=False)))
