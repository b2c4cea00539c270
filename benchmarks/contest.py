"""Graded release against its rivals: what leaks at the same robust accuracy?

    python benchmarks/contest.py digits_mlp [--seeds 3] [--models 8]      # settings: see SETTINGS

Writes benchmarks/results/contest_<setting>.json: every metric of every arm, a value a seed, with where it came from. Every
arm is attacked by models trained with it ("leak"), and by attackers who also know everybody's risk and, where another score
decides who leaves when, that score ("leak, schedule known": the strongest of LiRA, LiRA with both queries, thresholds by tenth
of the score, and a logistic regression on all of that fitted on the shadow models). "surfaced" is the tenth with the highest
risk under the treatment.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression

import demem_lab
from demem_lab import experiment, risk, training
from demem_lab.budgets import BudgetedDP, graded_budgets, steps_within
from demem_lab.comparison import Comparison, finest_fpr, measure
from demem_lab.experiment import Experiment, Run
from demem_lab.leakage import evaluate
from demem_lab.matched import at_matched
from demem_lab.mechanisms import DPSGD, DownWeight, Drop, LossVariance, SelectiveDP
from demem_lab.membership import by_class, lira, twins
from demem_lab.models import SmallCNN
from demem_lab.objectives import AWP, PGDAT, TRADES, PerSample
from demem_lab.remedies import ClassVariance, ClippedRelease, GradedRelease, RelaxLoss, release_schedule
from demem_lab.sampling import Shuffled
from demem_lab.signals import logit_margin
from demem_lab.streams import key, model_seeds

HERE = Path(__file__).parent
SETTINGS = {  # data set, architecture, objective, all arms or the main ones
    "digits_mlp": ("digits", "mlp", "PGD-AT", True), "digits_mlp_trades": ("digits", "mlp", "TRADES", False),
    "digits_mlp_awp": ("digits", "mlp", "AWP", False), "digits_cnn": ("digits", "cnn", "PGD-AT", False),
    "fashion_mlp": ("fashion_mnist", "mlp", "PGD-AT", False),
}
SHORTER = (0.15, 0.3, 0.5, 0.7)
DECAYS = (3e-3, 6e-3, 1e-2, 2e-2)  # a hole between them would be a frontier that a mere weakening beats


@dataclass(frozen=True)
class CleanForSome:
    """`inner`, but flagged samples are trained on their clean images: nothing adversarial is learned about them."""

    inner: PGDAT
    flagged: torch.Tensor

    row_by_row = True

    def __call__(self, net, x, y, index, *, rng, counts=None) -> PerSample:
        moved = self.inner.move(net, x, y, rng)
        moved = torch.where(self.flagged[index][:, None, None, None], x, moved)
        return self.inner.losses(net, x, moved, y, index)


class Contest:
    """The arms of one setting."""

    def __init__(self, lab: Experiment, objective) -> None:
        self.lab, self.objective = lab, objective
        self.cheap = self._cheap_score()
        self.schedules: dict[tuple[str, int], np.ndarray] = {}  # (arm, seed) -> what decides there, where the risk does not

    def _cheap_score(self) -> np.ndarray:
        """Early loss [N] of ONE model trained on everybody for a third of the epochs: what scoring may cost."""
        lab, epochs = self.lab, max(5, round(self.lab.epochs / 3))
        recipe = lab.recipe(objective=self.objective, epochs=epochs)
        recipe = replace(recipe, sampler=Shuffled(lab.batch_size))  # Poisson batches may leave somebody unseen
        everybody = torch.ones(1, lab.dataset.n, dtype=torch.bool)
        seed = (key(999, "scoring") % 2**31,)
        run = training.train(lab.dataset, everybody, recipe, seeds=seed, store=lab.store, trace=True, device=lab.device)
        return risk.early_loss(run.trace, epochs=epochs)

    def arm(self, name: str, mechanism=None, **changes) -> list[Run]:
        """Everybody is treated alike."""
        return self.lab.arm(name, objective=self.objective, mechanism=mechanism, **changes)

    def chosen(self, name: str, how, choose, *, score=None, **changes) -> list[Run]:
        """how(choose(seed)): flags, or a schedule, for each seed. `score`, if not the risk, is what `choose` was made from."""
        if score is not None:
            self.schedules |= {(name, seed): score(seed) for seed in self.lab.seeds}
        return self.lab.treat(name, how, choose=choose, objective=self.objective, **changes)

    def score(self, seed: int) -> np.ndarray:
        """The expensive risk score [N]: from the other seeds' plain models under PGD-AT."""
        return self.lab.risk(seed).score

    def flags(self, fraction: float):
        """seed -> bool [N], the riskiest."""
        return lambda seed: torch.as_tensor(risk.protected_set(self.score(seed), fraction=fraction).mask)

    def until(self, power: float, floor: float = 0.0, score=None):
        """seed -> float [N], when each sample leaves."""
        find = score or self.score
        return lambda seed: release_schedule(find(seed), power=power, floor=floor)

    def own_trace(self, name: str, power: float, share: float) -> list[Run]:
        """Each model releases by its own losses in the first `share` of training; nobody has left until then.

        Trained twice: up to that point both runs are the same, number for number, so the first one's trace is what the
        second would have seen.
        """
        lab, runs = self.lab, []
        epochs = max(1, round(share * lab.epochs))
        for seed in lab.seeds:
            first = training.train(
                lab.dataset, lab.members(seed), lab.recipe(objective=self.objective), seeds=model_seeds(seed, lab.models),
                store=lab.store, trace=True, device=lab.device,
            )
            until = torch.ones(lab.models, lab.dataset.n, dtype=torch.float64)
            for m, trace in enumerate(first.trace[:, :epochs]):
                drawn = ~np.isnan(trace).all(0)
                own = release_schedule(np.nanmean(trace[:, drawn], 0), power=power, floor=epochs / lab.epochs)
                until[m, torch.as_tensor(drawn)] = own
            self.schedules[name, seed] = expected_leave(until.numpy(), lab.members(seed).numpy())
            runs.append(lab.run(name, seed=seed, mechanism=GradedRelease(until), objective=self.objective, flagged=until))
        return runs

    def clean_for(self, name: str, fraction: float, until=None) -> list[Run]:
        """The riskiest see clean images only."""
        runs = []
        for seed in self.lab.seeds:
            objective = CleanForSome(self.objective, self.flags(fraction)(seed))
            mechanism = None if until is None else GradedRelease(until(seed))
            runs.append(self.lab.run(name, seed=seed, objective=objective, mechanism=mechanism))
        return runs

    def budgets(self, name: str, noise: float, lr: float) -> list[Run]:
        """Noise for everybody and a budget each, the smallest for the riskiest: release with a promise, given the budgets."""
        lab = self.lab
        plain = lab.run("none", seed=lab.seeds[0])
        settings = {"noise_multiplier": noise, "sampling_rate": plain.sampling_rate, "delta": lab.delta, "most": plain.steps}
        whole = DPSGD(noise).guarantee(
            sampling_rate=plain.sampling_rate, steps=plain.steps, delta=lab.delta, n=lab.dataset.n
        ).budget.epsilon

        def allowed(seed: int) -> torch.Tensor:
            return steps_within(graded_budgets(self.score(seed), largest=whole, smallest=0.0), **settings)

        return self.chosen(name, lambda a: BudgetedDP(noise, 1.0, None, allowed=a), allowed, lr=lr)

    def controls(self) -> dict[str, list[Run]]:
        """The method itself, weakened: what every treatment has to beat."""
        out = {"none": self.arm("none")}
        for share in SHORTER:
            name = f"{share:.0%} of the epochs"
            out[name] = self.arm(name, epochs=share * self.lab.epochs)
        for decay in DECAYS:
            name = f"weight decay {decay:g}"
            out[name] = self.arm(name, weight_decay=decay)
        return out

    def main(self) -> dict[str, list[Run]]:
        """The arms of every setting."""
        lab, release, out = self.lab, GradedRelease, {}
        for power in (4, 8):
            name = f"release k={power}"
            out[name] = self.chosen(name, release, self.until(power))
        name, cheap = "release k=4, cheap score", lambda seed: self.cheap
        out[name] = self.chosen(name, release, self.until(4, score=cheap), score=cheap)
        out["release k=4, own trace"] = self.own_trace("release k=4, own trace", 4, 0.2)
        for fraction in (0.1, 0.2):
            name = f"drop {fraction:.0%}"
            out[name] = self.chosen(name, Drop, self.flags(fraction))
        if not isinstance(self.objective, AWP):  # its perturbation comes from those who are not clipped: nobody
            clip = lab.rate_for_everybody(0.0)
            out["clip everybody"] = self.arm("clip everybody", DPSGD(0.0), lr=clip)
            for power in (4, 8):
                name = f"release k={power} + clip everybody"
                out[name] = self.chosen(name, ClippedRelease, self.until(power), lr=clip)
        return out

    def more(self) -> dict[str, list[Run]]:
        """The arms of the widest setting."""
        lab, out = self.lab, {}
        for name, until in (("release k=2", self.until(2)), ("release k=4, umin .2", self.until(4, 0.2))):
            out[name] = self.chosen(name, GradedRelease, until)
        out["LossVariance .2"] = self.arm("LossVariance .2", LossVariance(0.2))
        shuffled = lambda seed: np.random.default_rng(seed).permutation(self.score(seed))  # noqa: E731
        name = "release k=4, random order"
        out[name] = self.chosen(name, GradedRelease, self.until(4, score=shuffled), score=shuffled)
        out["down-weight 20% x .3"] = self.chosen("down-weight 20% x .3", lambda f: DownWeight(f, 0.3), self.flags(0.2))
        for noise in (0.1, 0.3):
            name = f"SelectiveDP 20%, noise {noise:g}"
            out[name] = self.chosen(name, lambda f, n=noise: SelectiveDP(n, 1.0, f), self.flags(0.2))
        noisy = lab.rate_for_everybody(0.3)
        out["DP everybody, noise .3"] = self.arm("DP everybody, noise .3", DPSGD(0.3), lr=noisy)
        out["budgets, noise .3"] = self.budgets("budgets, noise .3", 0.3, noisy)
        out["LossVariance .6"] = self.arm("LossVariance .6", LossVariance(0.6))
        for alpha in (0.3, 0.6):
            out[f"RelaxLoss {alpha:g}"] = self.arm(f"RelaxLoss {alpha:g}", RelaxLoss(alpha))
        out["ClassVariance .2"] = self.arm("ClassVariance .2", ClassVariance(0.2))
        out["clean for 10%"] = self.clean_for("clean for 10%", 0.1)
        out["release k=4 + clean for 10%"] = self.clean_for("release k=4 + clean for 10%", 0.1, self.until(4))
        steps = lab.run("none", seed=lab.seeds[0]).steps

        def leave(power: float):
            return lambda seed: torch.ceil(self.until(power)(seed) * steps).long()

        noise = 0.05
        rate = lab.rate_for_everybody(noise)
        name = "release k=4 + clip + noise .05"
        out[name] = self.chosen(name, lambda a: BudgetedDP(noise, 1.0, None, allowed=a), leave(4), lr=rate)
        name = "release k=8 + LossVariance .6"
        out[name] = self.chosen(name, lambda u: ReleasedVariance(u, 0.6), self.until(8))
        return out


@dataclass(frozen=True)
class ReleasedVariance(GradedRelease):
    """Graded release and the variance penalty on those who are still there."""

    lam: float = 0.6

    def penalty(self, per_sample, batch):
        """LossVariance's; rows that have left are not valid any more."""
        return LossVariance(self.lam).penalty(per_sample, batch)


def expected_leave(until: np.ndarray, members: np.ndarray) -> np.ndarray:
    """When each sample leaves [M, N] by the models that an attacker of each target has of his own: neither it nor its twin.

    until [M, N], members [M, N]. A model's own schedule is not for him: it says who was drawn. 1 where nobody of his had it.
    """
    other, out = twins(members), np.ones(until.shape)
    for m in range(len(until)):
        own = [k for k in range(len(until)) if k not in (m, other[m])]
        count = members[own].sum(0)
        np.divide((until[own] * members[own]).sum(0), count, out=out[m], where=count > 0)
    return out


def informed(run: Run, when: np.ndarray, fpr: float) -> dict[str, float]:
    """True positive rate [1] of attackers who know `when`: each sample's risk, or leave time, [N], or [M, N] by target.

    What is fitted on the shadow models reads scores of theirs in which the target has no part: as one of their references,
    filed under its members, it would tell who these are.
    """
    members, scores = run.members, run.scores
    found = {"both queries": evaluate(scores["both"], members, fprs=(fpr,)).tpr_at(fpr)}
    margins = {"clean": logit_margin(run.clean, run.y), "adversarial": logit_margin(run.adversarial, run.y)}
    margins["both"] = np.stack(list(margins.values()))
    other, knowing = twins(members), {name: np.zeros(members.shape) for name in ("clean", "adversarial", "learned")}
    for m, row in enumerate(np.broadcast_to(when, members.shape)):
        tenth, shadows = risk.deciles(row), [k for k in range(run.models) if k not in (m, other[m])]
        table = {
            query: np.concatenate([scores[query][[m]], lira(margin[..., shadows, :], members[shadows])])
            for query, margin in margins.items()
        }
        for query in ("clean", "adversarial"):
            knowing[query][m] = by_class(table[query], tenth, members[[m, *shadows]])[0]
        columns = np.stack(list(table.values()), -1)
        columns = np.sign(columns) * np.log1p(np.abs(columns))  # log ratios have long tails
        one_hot = np.eye(10)[tenth]
        own, *rows = [
            np.concatenate([c, one_hot, (one_hot[:, :, None] * c[:, None, :]).reshape(len(c), -1)], 1) for c in columns
        ]
        fitted = LogisticRegression(max_iter=300).fit(np.concatenate(rows), members[shadows].ravel())
        knowing["learned"][m] = fitted.decision_function(own)
    for name, attack in knowing.items():
        named = name if name == "learned" else f"by leave time, {name}"
        found[named] = evaluate(attack, members, fprs=(fpr,)).tpr_at(fpr)
    return found


def measured(contest: Contest, arms: dict[str, list[Run]]) -> Comparison:
    """Every arm, with the groups at risk before and under its treatment."""
    lab, rows, promises = contest.lab, [], {}
    fpr = finest_fpr(int((~lab.members(lab.seeds[0])).sum(1).min()))
    for name, runs in arms.items():
        for run in runs:
            score = contest.score(run.seed)
            top = risk.protected_set(score, fraction=0.1).mask
            surfaced = risk.protected_set(lab.risk(run.seed, runs).score, fraction=0.1).mask
            found = measure(run, {"at risk": top, "rest": ~top, "surfaced": surfaced}, fpr=fpr)
            knowing = informed(run, score, fpr)
            if (name, run.seed) in contest.schedules:
                schedule = informed(run, contest.schedules[name, run.seed], fpr)
                knowing |= {f"{attack} of its schedule": rate for attack, rate in schedule.items()}
            found |= {("all", f"leak, {attack}"): rate for attack, rate in knowing.items()}
            found["all", "leak, schedule known"] = max(found["all", "leak"], *knowing.values())
            rows += [(name, run.seed, group, metric, value) for (group, metric), value in found.items()]
            promises[name] = str(run.guarantee)
    return Comparison(pd.DataFrame(rows, columns=["arm", "seed", "group", "metric", "value"]), fpr, promises)


def main() -> None:
    """Run one setting and write its file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--profile", default="lesson")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    chosen = parser.parse_args()
    dataset, model, method, wide = SETTINGS[chosen.setting]
    start = time.process_time()
    lab = experiment.profile(chosen.profile).experiment(
        dataset=dataset, seeds=chosen.seeds, models=chosen.models, device="cpu", progress=False
    )
    lab = replace(lab, model=SmallCNN() if model == "cnn" else lab.model, tuning_models=4).tuned()
    objective = {"PGD-AT": PGDAT(lab.attack), "TRADES": TRADES(lab.attack), "AWP": AWP(PGDAT(lab.attack))}[method]
    contest = Contest(lab, objective)
    controls = contest.controls()
    arms = controls | contest.main() | (contest.more() if wide else {})
    report = measured(contest, arms)
    values: dict[str, dict[str, list[float]]] = {}
    for (arm, metric, group), part in report.rows.groupby(["arm", "metric", "group"], sort=False):
        label = metric if group == "all" else f"{metric}, {group}"
        values.setdefault(arm, {})[label] = [round(v, 5) for v in part.sort_values("seed")["value"]]
    found = {
        "setting": {
            "data set": lab.dataset.name, "images": lab.dataset.n, "model": repr(lab.model), "objective": repr(objective),
            "eps": lab.eps, "epochs": lab.epochs, "lr": lab.lr, "batch_size": lab.batch_size, "seeds": list(lab.seeds),
            "models a seed": lab.models, "fpr": report.fpr, "delta": lab.delta, "attack_steps": lab.attack_steps,
            "query_steps": lab.query_steps,
        },
        "controls": list(controls), "arms": {arm: values[arm] for arm in arms}, "not run": [], "guarantees": report.guarantees,
        "rank correlation of the cheap score": [
            round(risk.rank_correlation(contest.cheap, contest.score(seed)).mean, 3) for seed in lab.seeds
        ],
        "provenance": {
            "demem_lab": demem_lab.__version__, "torch": torch.__version__, "numpy": np.__version__,
            "python": platform.python_version(), "commit": _commit(), "date": datetime.now(UTC).date().isoformat(),
            "cpu_seconds": round(time.process_time() - start + resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime),
        },
    }
    chosen.out.mkdir(exist_ok=True)
    (chosen.out / f"contest_{chosen.setting}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    for arm in arms:
        gain = at_matched(report, arm, list(controls))
        print(f"{arm:35s} robust {report.mean(arm, 'robust'):.3f} leak {report.mean(arm, 'leak'):.4f} matched {gain}")


def _commit() -> str:
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
