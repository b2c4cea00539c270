"""Which objective goes with which mechanism, and what is promised then: found out by trying, not written down.

>>> print(page())                                        # the tables of METHODS.md                # doctest: +SKIP

Every pair really trains a few steps on a toy data set; a refusal is the sentence that the package itself gives.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch

from demem_lab.attacks import NFGSM, PGD, RSFGSM
from demem_lab.budgets import BudgetedDP
from demem_lab.data import Dataset, member_masks
from demem_lab.mechanisms import DPSGD, DownWeight, Drop, LossVariance, Mechanism, Plain, SelectiveDP
from demem_lab.models import MLP, ResNet18, Spec
from demem_lab.objectives import AWP, MART, PGDAT, TRADES, Natural, Objective
from demem_lab.remedies import ClassVariance, GradedRelease, RelaxLoss
from demem_lab.sampling import Poisson, Sampler, Shuffled
from demem_lab.training import Ensemble, Recipe, train

N = 24
_attack, _flags = PGD(0.1, 2), torch.arange(N) < 6

OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "Natural": Natural, "PGD-AT": lambda: PGDAT(_attack), "TRADES": lambda: TRADES(_attack), "MART": lambda: MART(_attack),
    "RS-FGSM": lambda: PGDAT(RSFGSM(0.1)), "N-FGSM": lambda: PGDAT(NFGSM(0.1)), "AWP": lambda: AWP(PGDAT(_attack)),
    "TRADES-AWP": lambda: AWP(TRADES(_attack), 0.005), "MART-AWP": lambda: AWP(MART(_attack), 0.005),
}
MECHANISMS: dict[str, Callable[[], Mechanism]] = {
    "Plain": Plain, "LossVariance": LossVariance, "ClassVariance (FAT)": ClassVariance, "RelaxLoss": lambda: RelaxLoss(5.0),
    "Drop": lambda: Drop(_flags), "DownWeight": lambda: DownWeight(_flags, 0.3),
    "GradedRelease": lambda: GradedRelease(torch.linspace(0, 1, N)), "SelectiveDP": lambda: SelectiveDP(1.0, 1.0, _flags),
    "SelectiveDP without noise": lambda: SelectiveDP(0.0, 1.0, _flags), "DPSGD": lambda: DPSGD(1.0),
    "BudgetedDP": lambda: BudgetedDP(1.0, 1.0, _flags, allowed=torch.arange(N) % 3 + 1),
}
_BATCH_NORM = ResNet18(width=4, norm="batch")
_PLAIN = (lambda: PGDAT(_attack), Plain, MLP((6,)), Poisson(4))
_SELECTIVE = MECHANISMS["SelectiveDP"]
SPECIAL: dict[str, tuple[Callable[[], Objective], Callable[[], Mechanism], Spec, Sampler]] = {
    "TRADES around N-FGSM": (lambda: TRADES(NFGSM(0.1)), *_PLAIN[1:]),
    "AWP around AWP": (lambda: AWP(AWP(Natural())), *_PLAIN[1:]),
    "batch normalisation with Poisson batches": (*_PLAIN[:2], _BATCH_NORM, Poisson(4)),
    "SelectiveDP with batch normalisation": (_PLAIN[0], _SELECTIVE, _BATCH_NORM, Shuffled(4)),
    "SelectiveDP with shuffled batches": (_PLAIN[0], _SELECTIVE, MLP((6,)), Shuffled(4)),
    "SelectiveDP of nobody": (_PLAIN[0], lambda: SelectiveDP(1.0, 1.0, _flags & False), MLP((6,)), Poisson(4)),
}


def table() -> pd.DataFrame:
    """A row for each mechanism, a column for each objective ("trains", or why not), and what the mechanism promises.

    RuntimeError if a promise came to depend on the objective: the table could then not be read by rows.
    """
    rows = {}
    for name, mechanism in MECHANISMS.items():
        row, promised = {}, set()
        for column, objective in OBJECTIVES.items():
            row[column], promise = attempt(objective, mechanism, MLP((6,)), Poisson(4))
            promised.add(promise)
        if len(promised) != 1:
            raise RuntimeError(f"what {name} promises depends on the objective: {sorted(promised)}")
        rows[name] = {**row, "guarantee": promised.pop()}
    return pd.DataFrame.from_dict(rows, orient="index")


def special_cases() -> pd.DataFrame:
    """Combinations that are refused, or train without their promise."""
    found = {name: attempt(*parts) for name, parts in SPECIAL.items()}
    return pd.DataFrame.from_dict(found, orient="index", columns=["outcome", "guarantee"])


def attempt(
    objective: Callable[[], Objective], mechanism: Callable[[], Mechanism], model: Spec, sampler: Sampler
) -> tuple[str, str]:
    """("trains", its guarantee), or ("refused: why", "") for a sentence that the package gives itself."""
    try:
        ensemble = _train(Recipe(model, objective(), mechanism(), sampler=sampler, epochs=1))
    except ValueError as why:
        return f"refused: {why}", ""
    start = model.build(models=2, shape=ensemble.shape, classes=ensemble.classes, seeds=ensemble.seeds).state()
    moved = any(not torch.equal(start[name], after) for name, after in ensemble.parameters.items())
    if not moved or not all(bool(torch.isfinite(p).all()) for p in ensemble.parameters.values()):
        return "FAILS: the weights did not move, or are not finite", ""
    return "trains", str(ensemble.guarantee(delta=1e-3))


def page() -> str:
    """Both tables as Markdown."""
    pairs, special = table(), special_cases()
    return (
        f"Each cell was trained: {N} toy images, {len(MECHANISMS)} mechanisms x {len(OBJECTIVES)} objectives. What a mechanism "
        "promises does not depend on the objective, because each sample's loss is its own (AWP's move, which is not, reads "
        "unprotected samples only; with everybody protected it moves nothing). The numbers are those of the toy.\n\n"
        f"{markdown(pairs.drop(columns='guarantee'), 'mechanism')}\n\n"
        f"{markdown(pairs[['guarantee']], 'mechanism')}\n\n"
        f"Combinations with a condition:\n\n{markdown(special, 'combination')}\n"
    )


def markdown(frame: pd.DataFrame, corner: str) -> str:
    """A data frame of texts as a Markdown table."""
    lines = [[corner, *map(str, frame.columns)], ["-"] * (len(frame.columns) + 1)]
    lines += [[str(name), *map(str, row)] for name, row in zip(frame.index, frame.to_numpy(), strict=True)]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def _train(recipe: Recipe) -> Ensemble:
    rng = np.random.default_rng(0)
    x = torch.as_tensor(rng.random((N, 1, 8, 8)), dtype=torch.float32)
    toy = Dataset("toy", x, torch.arange(N) % 4, tuple("abcd"), "random numbers", 0.1)
    return train(toy, member_masks(N, 2, seed=0), recipe, seeds=(0, 1), device="cpu")
