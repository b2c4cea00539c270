"""Chunks over executors: the results of one process bit for bit, and whoever dies costs little and says so.

Dask's workers are real processes here; one small cluster serves all tests.
"""

import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from demem_lab import farm
from demem_lab.attacks import PGD
from demem_lab.data import member_masks
from demem_lab.mechanisms import SelectiveDP
from demem_lab.models import MLP
from demem_lab.objectives import PGDAT
from demem_lab.optimizers import SGD
from demem_lab.precision import Precision
from demem_lab.queries import outputs
from demem_lab.sampling import Poisson
from demem_lab.state import State
from demem_lab.training import Recipe, train

distributed = pytest.importorskip("distributed")
MEMBERS, SEEDS = member_masks(24, 6, seed=0), range(6)
RECIPE = Recipe(
    model=MLP((6,)), objective=PGDAT(PGD(0.1, 2)), sampler=Poisson(4), epochs=4,
    optimizer=SGD(lr=(0.1, 0.2, 0.1, 0.1, 0.05, 0.1)),
    mechanism=SelectiveDP((0.5, 1.0, 2.0, 1.0, 0.0, 1.0), 0.5, torch.arange(24) < 9),
)
SETTING = {"seeds": SEEDS, "chunk": 2, "trace": True}
LONG = replace(RECIPE, epochs=100)  # 300 steps: seconds enough to kill somebody in


@pytest.fixture(scope="module")
def cluster():
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None, resources={"GPU": 1},
    ) as running:
        yield running


@pytest.fixture
def client(cluster):
    with distributed.Client(cluster) as connected:
        connected.wait_for_workers(2, timeout=120)
        yield connected


@pytest.fixture
def executor(client):
    return client.get_executor(resources={"GPU": 1})


def test_connecting_takes_the_workers_that_have_a_gpu(cluster):
    assert farm.run(lambda chunk, stop: chunk + 1, [1, 2], executor=farm.connect(cluster.scheduler_address)) == [2, 3]
    assert farm.connect(cluster.scheduler_address)._kwargs["resources"] == {"GPU": 1}
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as plain:
        assert farm.connect(plain.scheduler_address)._kwargs["resources"] == {}
        before = clients(plain)
        for _ in range(3):
            with farm.connect(plain.scheduler_address) as executor:
                assert farm.run(lambda chunk, stop: chunk, [1], executor=executor) == [1]
        executor.shutdown()  # twice does no harm
        until(lambda: clients(plain) <= before)


def clients(cluster):
    return len(cluster.scheduler.clients)


def test_a_client_is_no_executor(client, tiny):
    with pytest.raises(ValueError, match=r"executor must be an Executor, such as client.get_executor\(\), got <Client"):
        train(tiny, MEMBERS, RECIPE, **SETTING, executor=client)


def test_no_scheduler_and_no_dask_are_one_sentence_each(monkeypatch):
    for address in ("tcp://127.0.0.1:1", "nonsense://here"):
        with pytest.raises(ConnectionError, match=f"no scheduler with workers answers at '{address}' within 1 s .*dask worker"):
            farm.connect(address, seconds=1)
    monkeypatch.setitem(sys.modules, "dask.distributed", None)
    with pytest.raises(ImportError, match=r"pip install 'demem-lab\[cluster\]'"):
        farm.connect("tcp://127.0.0.1:1")


def same(a, b):
    equal = all(torch.equal(a.parameters[n], t) for n, t in b.parameters.items())
    return equal and np.array_equal(a.trace, b.trace, equal_nan=True)


@pytest.mark.parametrize("kept", [False, True])
def test_dask_gives_what_one_process_gives_bit_for_bit(tiny, executor, store, kept, capsys):
    here = train(tiny, MEMBERS, RECIPE, **SETTING)
    there = train(tiny, MEMBERS, RECIPE, **SETTING, executor=executor, store=store if kept else None, progress=True, label="far")
    assert same(here, there) and np.array_equal(here.losses, there.losses) and "far" in capsys.readouterr().out
    if kept:
        assert [e["kind"] for e in store.entries()] == ["ensemble", "images"]
        assert not train(tiny, MEMBERS, RECIPE, **SETTING, store=store).fresh  # where it was computed is not part of the question


def test_queries_over_dask_too(tiny, executor, store):
    ensemble, attack = train(tiny, MEMBERS, RECIPE, **SETTING), PGD(0.1, 3)
    only = np.random.default_rng(0).random((6, 24)) < 0.7
    for setting in ({}, {"attack": attack, "store": store}, {"attack": attack, "only": only}):
        here, there = outputs(ensemble, tiny, **setting), outputs(ensemble, tiny, **setting, executor=executor)
        assert np.allclose(here, there, atol=1e-5, equal_nan=True)


def pid_and_times(chunk, stop):
    start = time.time()
    time.sleep(0.3)
    return os.getpid(), start, time.time()


def test_one_chunk_a_gpu_at_a_time(executor):
    """Each worker has two threads and one GPU (a resource in name only): chunks of one worker do not overlap."""
    found = farm.run(pid_and_times, range(6), executor=executor)
    assert len({pid for pid, _, _ in found}) == 2
    for worker in {pid for pid, _, _ in found}:
        spans = sorted((start, end) for pid, start, end in found if pid == worker)
        assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def in_background(function):
    outcome = []

    def run():
        try:
            outcome.append(function())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


def count_starts(chunk, stop):
    """Everybody writes down that they have begun, and where; chunk 0 waits there, the first time, until it is killed."""
    number, folder = chunk
    path = os.path.join(folder, f"{number}.starts")
    first = not os.path.exists(path)
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(600 if number == 0 and first else 0.05)
    return number


def test_a_killed_worker_costs_its_own_chunk_only(executor, tmp_path):
    thread, outcome = in_background(lambda: farm.run(count_starts, [(n, str(tmp_path)) for n in range(6)], executor=executor))

    def starts(n):
        file = tmp_path / f"{n}.starts"
        return file.read_text().split() if file.exists() else []

    until(lambda: starts(0) and any(starts(n) for n in range(1, 6)))
    os.kill(int(starts(0)[0]), signal.SIGKILL)
    thread.join(120)
    assert outcome == [list(range(6))]
    assert len(starts(0)) == 2 and starts(0)[0] != starts(0)[1] and all(len(starts(n)) == 1 for n in range(1, 6))


def test_a_worker_killed_in_training_is_replaced_and_the_run_goes_on_from_its_checkpoint(tiny, client, executor, store):
    here = train(tiny, MEMBERS, LONG, **SETTING)
    pids = client.run(os.getpid)  # asked while they are idle: one that is busy may answer late
    thread, outcome = in_background(
        lambda: train(tiny, MEMBERS, LONG, **SETTING, executor=executor, store=store, checkpoint_seconds=0.05)
    )
    until(lambda: list(store.root.glob("checkpoint/*.json")))
    busy = next(address for address, tasks in client.processing().items() if tasks)
    os.kill(pids[busy], signal.SIGKILL)
    thread.join(180)
    assert same(here, outcome[0])


def test_an_executor_that_dies_is_one_sentence_and_what_is_done_is_kept(tiny, cluster, store):
    other = distributed.Client(cluster)
    thread, outcome = in_background(
        lambda: train(tiny, MEMBERS, LONG, **SETTING, executor=other.get_executor(), store=store, checkpoint_seconds=0.05)
    )
    until(lambda: list(store.root.glob("checkpoint/*.json")))
    other.close()
    thread.join(60)
    assert isinstance(outcome[0], farm.ExecutorDied) and "\n" not in str(outcome[0])
    assert str(outcome[0]).startswith("the executor stopped working after ") and str(outcome[0]).endswith(f"kept in {store.root}")
    assert list(store.root.glob("ch*/*.json"))


def test_an_executor_that_was_shut_down_is_one_sentence(tiny):
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    with pytest.raises(farm.ExecutorDied, match="cannot schedule new futures after shutdown.*; start another one"):
        train(tiny, MEMBERS, RECIPE, **SETTING, executor=pool)


def test_dead_after_some_chunks_alive_again_only_the_rest_is_done(tiny, store, monkeypatch):
    here = train(tiny, MEMBERS, RECIPE, **SETTING)

    class Dying(ThreadPoolExecutor):
        count = 0

        def submit(self, function, chunk, stop):
            if function.__name__ != "train_elsewhere":
                return super().submit(function, chunk, stop)
            Dying.count += 1
            if Dying.count == 3:
                until(lambda: len(list(store.root.glob("chunk/*.json"))) == 2)
                raise RuntimeError("cannot schedule new futures after shutdown")
            return super().submit(function, chunk, stop)

    with Dying(1) as pool, pytest.raises(farm.ExecutorDied):
        train(tiny, MEMBERS, RECIPE, **SETTING, store=store, executor=pool)
    steps, real = [], State.advance
    monkeypatch.setattr(State, "advance", lambda s: (steps.append(s.job.seeds), real(s))[1])
    with ThreadPoolExecutor(1) as pool:
        assert same(here, train(tiny, MEMBERS, RECIPE, **SETTING, store=store, executor=pool))
    assert set(steps) == {(4, 5)} and len(steps) == 12


def test_chunks_are_measured_by_a_worker_when_nothing_is_said(tiny):
    with ThreadPoolExecutor(1) as pool:
        found = train(tiny, MEMBERS, RECIPE, seeds=SEEDS, dtype=torch.float64, executor=pool)
    here = train(tiny, MEMBERS, RECIPE, seeds=SEEDS, dtype=torch.float64, chunk=6)
    assert all((found.parameters[n] - t).abs().max() < 1e-8 for n, t in here.parameters.items())


def test_an_error_of_a_chunk_is_not_a_dead_executor(tiny, executor):
    wrong = replace(RECIPE, model=MLP((6,), mean="grey"))
    with pytest.raises(TypeError):
        train(tiny, MEMBERS, wrong, **SETTING, executor=executor)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the workers have a GPU")
def test_workers_without_the_asked_device_are_one_sentence(tiny, executor):
    for precision in (Precision.FLOAT32, Precision.AUTO):
        with pytest.raises(RuntimeError, match="a worker has no GPU, but the run is for cuda: give it workers of one kind"):
            train(tiny, MEMBERS, replace(RECIPE, precision=precision), **SETTING, executor=executor, device="cuda")
    assert farm.device_of(executor).type == "cpu"


def test_queries_that_do_not_fit_are_asked_in_halves(tiny, monkeypatch):
    ensemble = train(tiny, MEMBERS, RECIPE, **SETTING)
    monkeypatch.setenv("DEMEM_WORKERS", "1")
    whole = outputs(ensemble, tiny, attack=PGD(0.1, 2))
    real = PGD.__call__

    def limited(attack, net, *given, **named):
        if net.models > 2:
            raise torch.OutOfMemoryError("planted")
        return real(attack, net, *given, **named)

    monkeypatch.setattr(PGD, "__call__", limited)
    assert np.allclose(outputs(ensemble, tiny, attack=PGD(0.1, 2)), whole, atol=1e-5)
    monkeypatch.setattr(PGD, "__call__", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("planted")))
    with pytest.raises(MemoryError, match="one model that is asked about 300 samples; take a smaller block"):
        outputs(ensemble, tiny, attack=PGD(0.1, 2))
