"""What one arm at one seed leaves behind: the tables that all measuring reads.

Logits of all models on all samples, clean and attacked, with who was a member of which model. Scores and accuracies follow
from these; `experiment` makes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from demem_lab.accounting import NoGuarantee
from demem_lab.guarantees import Guarantee
from demem_lab.membership import lira
from demem_lab.signals import logit_margin


@dataclass(frozen=True)
class Run:
    """One arm at one seed: the tables that all measuring reads."""

    name: str
    seed: int
    y: np.ndarray  # int64 [N]
    members: np.ndarray  # bool [M, N]
    clean: np.ndarray  # logits [M, N, K]
    adversarial: np.ndarray  # logits [M, N, K] on each model's own adversarial examples
    robust: np.ndarray  # bool [M, N] right as it is and under every attack tried (point-wise worst case)
    guarantee: Guarantee  # what holds for every one of the models
    steps: int
    sampling_rate: float
    flagged: np.ndarray | None = None  # bool [N] who was treated
    trace: np.ndarray | None = None  # [M, epochs, N]
    gradient_norms: np.ndarray | None = None  # [M, N] on adversarial examples, kept with the trace
    fresh: bool = True  # False when it came from the store
    promises: tuple[Guarantee, ...] = ()  # each model's own; without them `guarantee` is that of all

    @property
    def models(self) -> int:
        """M."""
        return len(self.members)

    def part(self, rows: slice) -> Run:
        """Some of the models, as a run of its own."""
        promises = self.promises[rows]
        return replace(
            self, members=self.members[rows], clean=self.clean[rows], adversarial=self.adversarial[rows],
            robust=self.robust[rows], trace=None if self.trace is None else self.trace[rows],
            gradient_norms=None if self.gradient_norms is None else self.gradient_norms[rows],
            guarantee=weakest(promises) if promises else self.guarantee, promises=promises,
        )

    @cached_property
    def scores(self) -> dict[str, np.ndarray]:
        """LiRA scores [M, N] for the queries "clean", "adversarial" and "both"."""
        clean, moved = logit_margin(self.clean, self.y), logit_margin(self.adversarial, self.y)
        return {
            "clean": lira(clean, self.members), "adversarial": lira(moved, self.members),
            "both": lira(np.stack([clean, moved]), self.members),
        }

    @cached_property
    def right(self) -> dict[str, np.ndarray]:
        """bool [M, N]: classified correctly as it is ("clean"), and also under attack ("robust")."""
        return {"clean": self.clean.argmax(-1) == self.y, "robust": self.robust}


def weakest(promises: Sequence[Guarantee]) -> Guarantee:
    """What each of several models promises: the largest epsilon of theirs, or none where one has none or the sets differ in size.

    ValueError for no promises at all.
    """
    if not promises:
        raise ValueError("no models, so there is nothing to promise; give at least one guarantee")
    first, holding = promises[0], [p.holds for p in promises]
    if all(p == first for p in promises) or not any(holding):
        return first
    if not all(holding):
        model = holding.index(False)
        reason = str(promises[model]).removeprefix("no guarantee: ")
        return replace(promises[model], budget=NoGuarantee(f"models differ, and model {model} has none: {reason}"), protected=0)
    if len({p.protected for p in promises}) > 1:
        sizes = ", ".join(str(n) for n in sorted({p.protected for p in promises}))
        reason = f"models differ in how many they protect ({sizes}); each one's is in Run.promises"
        return replace(first, budget=NoGuarantee(reason), protected=0)
    return max(promises, key=lambda p: p.budget.epsilon)
