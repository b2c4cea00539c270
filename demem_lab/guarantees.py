"""What a trained model promises whom, on which conditions, in words that can stand alone.

>>> print(Guarantee(NoGuarantee("Plain adds no calibrated noise"), 0, 100, "fixed", ()))
no guarantee: Plain adds no calibrated noise
"""

from __future__ import annotations

from dataclasses import dataclass

from demem_lab.accounting import Budget, NoGuarantee, bound


@dataclass(frozen=True)
class Guarantee:
    """What is promised to each single protected sample by ONE released model, and on which conditions.

    Of ONE: models of the same seed, as all arms and points of a comparison are here, share noise and coins, and two of them
    together promise nothing (the noise of one can be subtracted from the other); with seeds of their own their budgets add up.
    The noise comes from a seed, so that results can be repeated; who knows the seed can subtract it, so a real release draws
    it at random and keeps it secret. That sums are rounded to floating point is not accounted for (Mironov 2012); the
    sentence says so where there are unprotected samples, as these share sums with the protected and nothing bounds them:
    one gradient of 2^24 clipping bounds makes float32's steps longer than the noise.
    """

    budget: Budget | NoGuarantee
    protected: int  # how many samples it holds for
    n: int
    selection: str  # how the protected set came about: "fixed", "public" or "from_data"
    not_accounted: tuple[str, ...] = ("the number of members (it sets rate and steps)", "learning rates tuned on the same data")
    budgets: str = "fixed"  # how each sample's own budget came about, in the same words; one budget for all is fixed

    @property
    def holds(self) -> bool:
        """Whether there is any (epsilon, delta) to speak of."""
        return isinstance(self.budget, Budget) and self.protected > 0

    def __str__(self) -> str:
        if not self.holds:
            reason = self.budget.reason if isinstance(self.budget, NoGuarantee) else "nobody is protected"
            return f"no guarantee: {reason}"
        b = self.budget
        who = "all samples" if self.protected == self.n else f"the {self.protected:,} protected of {self.n:,} samples"
        text = (
            f"({bound(b.epsilon)}, {bound(b.delta)})-DP for each single one of {who} (add/remove, {b.accountant})"
            f"{'' if self.protected == self.n else '; none for the other samples'}"
        )
        # also where a set chosen from the data covers everybody: that it does is something that the data decided
        given = ["the set"] * (self.selection == "from_data") + ["the budgets"] * (self.budgets == "from_data")
        if given:
            text += f"; given {' and '.join(given)}; end to end: none"
        if b.delta * self.n >= 1:
            text += f"; delta is not below 1/{self.n:,}: publishing one sample at random would pass"
        rounding = ("rounding to floating point",) if self.protected < self.n else ()
        return f"{text}; not accounted: {', '.join((*self.not_accounted, *rounding))}"
