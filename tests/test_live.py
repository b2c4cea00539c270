"""Whoever watches changes nothing, sees what really happens, and can stop it; what was stopped goes on where it was."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from demem_lab import farm
from demem_lab.attacks import PGD
from demem_lab.data import member_masks
from demem_lab.live import Background, Curve, Watch
from demem_lab.models import MLP
from demem_lab.objectives import PGDAT
from demem_lab.sampling import Poisson
from demem_lab.training import Recipe, train

ATTACK = PGD(0.1, 2)
LOOK = replace(ATTACK, random_start=False)
SEEDS = (1, 2, 3, 4)


@pytest.fixture
def job(tiny):
    recipe = Recipe(model=MLP((8,)), objective=PGDAT(ATTACK), sampler=Poisson(4), epochs=3)
    return tiny, member_masks(tiny.n, 4, seed=0), recipe


def same(a, b):
    return all(torch.equal(a.parameters[name], b.parameters[name]) for name in a.parameters)


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_a_watched_training_ends_with_exactly_the_same_weights(job, chunk):
    dataset, members, recipe = job
    curve = Curve(dataset, attack=LOOK)
    watched = train(dataset, members, recipe, seeds=SEEDS, chunk=chunk, watch=Watch(curve.add), label="watched")
    assert same(watched, train(dataset, members, recipe, seeds=SEEDS, chunk=chunk))
    found = curve.points()
    assert found["epoch"] == [1, 2, 3] and curve.progress == 1 and curve.label == "watched"
    assert np.allclose(found["loss"], watched.losses.mean(0))


def test_the_curves_last_point_is_the_trained_models_robust_accuracy_on_unseen_samples(job):
    dataset, members, recipe = job
    curve = Curve(dataset, attack=LOOK)
    trained = train(dataset, members, recipe, seeds=SEEDS, watch=Watch(curve.add), chunk=2)
    right = []
    for model in range(4):  # one by one
        net = trained.network([model])
        rows = (~members[model]).nonzero().flatten()
        moved = LOOK(net, dataset.x[rows], dataset.y[rows])
        right.append((net(moved).argmax(-1) == dataset.y[rows]).float().mean().item())
    assert curve.points()["robust"][-1] == pytest.approx(np.mean(right), abs=1e-6)


def test_stopping_keeps_the_place_and_nothing_else(job, store):
    dataset, members, recipe = job
    seen = []

    def stop_soon(moment):
        seen.append(moment.step)
        if len(seen) == 4:
            watch.stop.set()

    watch = Watch(stop_soon)
    with pytest.raises(KeyboardInterrupt):
        train(dataset, members, recipe, seeds=SEEDS, chunk=4, store=store, watch=watch)
    assert seen == [1, 2, 3, 4]
    assert {row["kind"] for row in store.entries()} == {"checkpoint"}
    curve = Curve(dataset, attack=LOOK)
    resumed = train(dataset, members, recipe, seeds=SEEDS, chunk=4, store=store, watch=Watch(curve.add))
    assert curve.points()["epoch"] == [2, 3]  # step 4 of 9 was in the second epoch
    assert same(resumed, train(dataset, members, recipe, seeds=SEEDS, chunk=4))
    assert {row["kind"] for row in store.entries()} == {"ensemble"}


def test_a_shared_stop_reaches_every_chunk():
    stop, begun = threading.Event(), threading.Barrier(3)

    def work(chunk, given):
        assert given is stop
        begun.wait(5)
        assert given.wait(5)
        raise KeyboardInterrupt

    helper = threading.Thread(target=lambda: (begun.wait(5), stop.set()))
    helper.start()
    with pytest.raises(KeyboardInterrupt):
        farm.run(work, [1, 2], at_once=2, stop=stop)
    helper.join()


def test_a_background_task_says_how_it_ended():
    def forever(watch):
        watch.stop.wait(10)
        raise KeyboardInterrupt

    told = []
    done = Background(lambda watch: 7, on_change=lambda job: told.append(job.outcome))
    done.join(5)
    assert (done.outcome, done.result, done.running, told) == ("done", 7, False, ["done"])
    stopped = Background(forever)
    assert stopped.running
    stopped.cancel()
    stopped.join(5)
    assert stopped.outcome == "cancelled" and stopped.result is None
    failed = Background(lambda watch: 1 / 0)
    failed.join(5)
    assert failed.outcome == "failed" and isinstance(failed.error, ZeroDivisionError)


def test_a_new_label_starts_a_new_curve(job):
    dataset, members, recipe = job
    curve = Curve(dataset, attack=LOOK, samples=3)
    for label, epochs in (("first", 2), ("second", 1)):
        train(dataset, members, replace(recipe, epochs=epochs), seeds=SEEDS, watch=Watch(curve.add), label=label)
        assert curve.label == label and curve.points()["epoch"] == list(range(1, epochs + 1))
    with pytest.raises(ValueError, match="samples"):
        Curve(dataset, attack=LOOK, samples=0)
