"""A chunk of models between two steps of training: what a step does, and what a checkpoint holds.

A step depends on the weights, the seeds and the number of the step only. So it can be done again, from a checkpoint, with
fewer models at once, or after something went wrong in its middle, and gives the same.
"""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import torch
from torch import Tensor

from demem_lab.attacks import frozen, image_slope
from demem_lab.live import Moment
from demem_lab.mechanisms import Batch, LossVariance, Mechanism, SelectiveDP
from demem_lab.objectives import in_two_parts
from demem_lab.precision import Precision, Scaler
from demem_lab.recipe import Job, check_losses
from demem_lab.sampling import Poisson, kept_only
from demem_lab.streams import Streams


class State:
    """A chunk of models between two steps; `consistent` says whether it may be kept."""

    def __init__(self, job: Job) -> None:
        self.job, self.device, self.models = job, job.device, len(job.members)
        self.x = job.dataset.x.to(job.device, job.dtype)
        self.y = job.dataset.y.to(job.device)
        self.members = job.members.to(job.device)
        self.mechanism = job.recipe.mechanism.on(job.device)
        self.net = job.recipe.model.build(
            models=self.models, shape=job.dataset.shape, classes=len(job.dataset.classes), seeds=job.seeds
        ).to(job.device, job.dtype)
        self.net.train()
        self.statistics: list[Tensor] = []
        self.net.arranged_for(job.device)
        if self.net.replays is not None:
            # with batch normalisation rows see each other, and may not be padded; else it is not needed where none ever leaves
            changing = self.mechanism.shrinks or isinstance(job.recipe.sampler, Poisson)
            self.net.replays.exact = self.net.has_batch_norm or not changing
        if job.compiled:
            self._compile()
        self.net.compute_in(job.recipe.precision.dtype)
        self.scaler = Scaler(self.net) if job.recipe.precision is Precision.FLOAT16 else None
        self.optimizer = job.recipe.optimizer.start(list(self.net.parameters()))
        self.draw = job.recipe.sampler.start(self.members, job.seeds, job.sampling_rate, job.steps_per_epoch)
        self.loss_sum = torch.zeros(self.models, job.epochs, dtype=torch.float64, device=job.device)
        self.loss_count = torch.zeros_like(self.loss_sum)
        self.trace = None
        if job.trace:
            self.trace = torch.full((self.models, job.epochs, job.dataset.n), float("nan"), device=job.device)
        self.step, self.consistent = 0, True

    def _compile(self) -> None:
        net, x, y = self.net, self.x[:2].repeat(self.models, 1, 1, 1), self.y[:2].repeat(self.models)

        def trial() -> None:
            # per-sample norms read what every layer meets, which a fused pass hides: then only attacks are fused
            if self.mechanism.per_sample:
                with frozen(net):
                    image_slope(net, x, y)
            else:
                torch.autograd.grad(net(x).sum(), list(net.parameters()))

        self._remember()
        net.compile_body(trial)
        self._put_back()

    def advance(self) -> None:
        """One step of all models."""
        job, t = self.job, self.step
        index, valid = self.draw(t)
        kept = self.mechanism.takes_part(self._batch(index, valid))
        # who has left costs nothing; batch normalisation must not even see who does not count
        if not torch.equal(kept, valid) or (self.net.has_batch_norm and not bool(valid.all())):
            index, valid = kept_only(index, kept)
        batch = self._batch(index, valid)
        if self.net.has_batch_norm and not bool(valid.any()):  # the padding is somebody's image: it must not be normalised by
            losses, gradients = torch.zeros_like(index, dtype=self.x.dtype), [torch.zeros_like(p) for p in self.net.parameters()]
            gradients = self.mechanism.noised(gradients, batch) if self.mechanism.per_sample else gradients
        else:
            losses, gradients = self._repeatable(batch)
        while self.scaler is not None and not self.scaler.accepts(gradients):
            self._put_back()
            losses, gradients = self._repeatable(batch)
        self.consistent = False
        self.optimizer.apply(gradients, job.recipe.schedule(t, job.steps))
        self._note(losses.view_as(valid), index, valid, t // job.steps_per_epoch)
        self.step, self.consistent = t + 1, True

    def _batch(self, index: Tensor, valid: Tensor) -> Batch:
        job, t = self.job, self.step
        noise = Streams(job.seeds, "noise", t, device=self.device)
        return Batch(
            index, valid, float(job.recipe.sampler.batch_size), t, job.steps, noise, epoch=t // job.steps_per_epoch
        )

    def _repeatable(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """What `_gradients` gives; `_put_back`, and it can be had again from the same streams."""
        self._remember()
        while True:
            try:
                return self._gradients(batch)
            except BaseException as error:
                self._put_back()
                short = isinstance(error, torch.OutOfMemoryError)
                if not (short and self.consistent and self.net.replays is not None and self.net.replays.holding):
                    # whatever ran out of memory was thrown at one place, and all that was moved has been put back
                    self.consistent |= short
                    raise
            self.net.replays.release()  # not above: the error's traceback holds what the failed pass had taken

    def _remember(self) -> None:
        """Keep the running statistics, for `_put_back`."""
        buffers = list(self.net.buffers())
        if not self.statistics:
            self.statistics = [torch.empty_like(b) for b in buffers]
        if buffers:
            torch._foreach_copy_(self.statistics, buffers)

    def _put_back(self) -> None:
        """Undo what a forward pass does to running statistics: a step that is done again must not move them twice."""
        if self.statistics:
            torch._foreach_copy_(list(self.net.buffers()), self.statistics)

    def _gradients(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Adversarial cross-entropies [M*B], and the mechanism's update."""
        job, flat, t = self.job, batch.index.flatten(), batch.step
        objective, mechanism = job.recipe.objective, self.mechanism
        streams = {"counts": batch.valid.sum(1).tolist(), "device": self.device}
        x, y = self.x[flat], self.y[flat]
        if job.recipe.augment is not None:
            x = job.recipe.augment(x, rng=Streams(job.seeds, "augment", t, **streams))
        rng = Streams(job.seeds, "attack", t, **streams)
        if self.net.replays is not None and recordable(objective, mechanism):
            with torch.enable_grad():
                return self._recorded(batch, x, y, rng)
        whole = {}
        if getattr(objective, "shifts_weights", False):
            whole["counts"] = (mechanism.counted(batch) * mechanism.weights(batch)).flatten()
        self.consistent = not whole  # an interruption must not keep weights that were moved for a moment
        with torch.enable_grad(), self.net.recording(mechanism.per_sample):  # whatever the caller's mode is
            seen = objective(self.net, x, y, flat, rng=rng, **whole)
            check_losses(objective, seen, len(flat))
            try:
                return seen.adversarial_ce.detach(), mechanism.update(self.net, seen, batch)
            finally:
                if seen.undo is not None:
                    seen.undo()

    def _recorded(self, batch: Batch, x: Tensor, y: Tensor, rng: Streams) -> tuple[Tensor, list[Tensor]]:
        """The same in parts: what depends on the step, and the pass there and back, which depends on its inputs alone."""
        net, objective, mechanism, models = self.net, self.job.recipe.objective, self.mechanism, self.models
        moved, index = objective.move(net, x, y, rng), batch.index.flatten()
        rows = x, moved, y, index, mechanism.takes_part(batch).flatten()
        if not mechanism.per_sample:
            def plain(x, moved, y, index, valid, weights):
                seen = objective.losses(net, x, moved, y, index)
                there = replace(batch, valid=valid.view(models, -1))
                gradients = mechanism.descend(net, seen, there, weights.view(models, -1).to(seen.loss.dtype))
                return seen.adversarial_ce.detach(), net.replays.in_place(gradients)

            return net.replays.play("training pass", (), net, (*rows, mechanism.weights(batch).flatten()), (), plain)

        def private(x, moved, y, index, valid, clipped, few=None):
            with net.recording():
                seen = objective.losses(net, x, moved, y, index)
                sums = mechanism.sums(net, seen, valid.view(models, -1), clipped.view(models, -1), few)
            return seen.adversarial_ce.detach(), net.replays.in_place(sums)

        clipped = mechanism.clipped(batch)
        few = mechanism.few(net, clipped)
        others = () if few is None else (few,)
        losses, sums = net.replays.play("training pass", (), net, (*rows, clipped.flatten()), others, private)
        return losses, mechanism.noised(sums, batch)

    def _note(self, losses: Tensor, index: Tensor, valid: Tensor, epoch: int) -> None:
        self.loss_sum[:, epoch] += torch.where(valid, losses, 0).sum(1)
        self.loss_count[:, epoch] += valid.sum(1)
        if self.trace is not None:
            model, place = valid.nonzero(as_tuple=True)
            self.trace[model, epoch, index[model, place]] = losses[model, place].to(self.trace.dtype)

    def moment(self, label: str, rows: list[int], models: int) -> Moment:
        """What there is to see of it between two steps."""
        last = max(0, self.step - 1) // self.job.steps_per_epoch
        ends = self.step > 0 and (self.step % self.job.steps_per_epoch == 0 or self.step == self.job.steps)
        losses = self.loss_sum[:, last] / self.loss_count[:, last]
        return Moment(label, tuple(rows), models, self.step, self.job.steps, last + ends, ends, self.net, self.members, losses)

    def arrays(self) -> dict[str, np.ndarray]:
        """What `restore` needs, on the CPU."""
        kept = {f"net/{name}": tensor for name, tensor in self.net.state().items()}
        kept |= {f"opt/{name}": tensor for name, tensor in self.optimizer.state().items()}
        kept |= {"step": torch.tensor(self.step), "loss_sum": self.loss_sum, "loss_count": self.loss_count}
        if self.trace is not None:
            kept["trace"] = self.trace
        if self.scaler is not None:
            kept["scaler"] = self.scaler.state()
        return {name: tensor.detach().cpu().numpy() for name, tensor in kept.items()}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Back to where `arrays` were taken."""
        tensors = {name: torch.from_numpy(np.array(array)).to(self.device) for name, array in arrays.items()}
        self.net.load_state_dict({name[4:]: t for name, t in tensors.items() if name.startswith("net/")})
        self.optimizer.load({name[4:]: t for name, t in tensors.items() if name.startswith("opt/")})
        self.step = int(tensors["step"])
        self.loss_sum, self.loss_count = tensors["loss_sum"], tensors["loss_count"]
        if self.trace is not None:
            self.trace = tensors["trace"]
        if self.scaler is not None:
            self.scaler.load(tensors["scaler"].cpu())

    def result(self) -> dict[str, np.ndarray]:
        """What is kept of trained models."""
        kept = {f"net/{name}": tensor.numpy() for name, tensor in self.net.state().items()}
        kept["losses"] = (self.loss_sum / self.loss_count).cpu().numpy()
        if self.trace is not None:
            kept["trace"] = self.trace.cpu().numpy()
        return kept


def recordable(objective, mechanism: Mechanism) -> bool:
    """Whether the pass of a step depends on images, labels and a number for each row alone."""
    kind = type(mechanism)
    penalty = kind.penalty in (Mechanism.penalty, LossVariance.penalty)  # others may read the step, or wait for the card
    plain = penalty and kind.update is Mechanism.update and kind.descend is Mechanism.descend
    private = all(getattr(kind, name, None) is getattr(SelectiveDP, name) for name in ("update", "sums", "_factors"))
    for_each = any(isinstance(getattr(mechanism, f.name), (tuple, list)) for f in fields(mechanism))  # fetched from the CPU
    return in_two_parts(objective) and (plain or private) and not for_each


def cut(arrays: dict[str, np.ndarray], rows: list[int], models: int) -> dict[str, np.ndarray]:
    """The part of State.arrays() of `models` models that belongs to some of them."""
    shared = ("step", "scaler")
    return {
        name: a[rows] if name not in shared and a.ndim and len(a) == models else a for name, a in arrays.items()
    }
