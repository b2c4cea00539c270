import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
import torch

from demem_lab import farm


def double(chunk, stop):
    return [2 * c for c in chunk]


@pytest.mark.parametrize("address", [None, 8786, "", " ", b"tcp://here:1", ["tcp://here:1"]])
def test_what_is_no_address_is_one_sentence(address):
    with pytest.raises(ValueError, match="address must be a scheduler's, such as 'tcp://NODE:8786', got "):
        farm.connect(address, seconds=1)


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_results_come_in_order(at_once):
    def slow(chunk, stop):
        time.sleep(0.02 * (4 - chunk))
        return chunk

    assert farm.run(slow, range(5), at_once=at_once) == list(range(5))


def test_any_executor_will_do():
    with ThreadPoolExecutor(2) as threads, ProcessPoolExecutor(1) as processes:
        for executor in (threads, processes):
            assert farm.run(double, [[1], [2, 3]], executor=executor) == [[2], [4, 6]]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_one_failure_stops_the_others_and_is_raised(error):
    started, stopped = threading.Event(), threading.Event()

    def work(chunk, stop):
        if chunk == 0:
            started.wait(10)
            raise error("planted")
        started.set()
        if stop.wait(10):
            stopped.set()

    with pytest.raises(error, match="planted"):
        farm.run(work, [0, 1], at_once=2)
    assert stopped.is_set()


@pytest.mark.parametrize("at_once", [1, 2])
def test_little_is_started_after_a_failure(at_once):
    seen = []

    def work(chunk, stop):
        seen.append(chunk)
        if chunk == 0:
            raise RuntimeError("planted")
        stop.wait(10)

    with pytest.raises(RuntimeError, match="planted"):
        farm.run(work, range(50), at_once=at_once)
    assert len(seen) <= 5


def test_no_chunks_no_results():
    assert farm.run(double, [], at_once=2) == [] == farm.run(double, [], at_once=1)


def fail(chunk, stop):
    raise RuntimeError(f"planted in {chunk}, {stop}")


def test_an_executors_failure_is_raised():
    with ThreadPoolExecutor(2) as threads, pytest.raises(RuntimeError, match="planted in 1, None"):
        farm.run(fail, [1, 2], executor=threads)


def test_workers_can_be_set_and_nonsense_is_refused(monkeypatch):
    monkeypatch.setenv("DEMEM_WORKERS", "3")
    assert farm.workers() == 3 and farm.workers("cuda") == 1
    for nonsense in ("many", "0", "-2", "1.5", "nan"):
        monkeypatch.setenv("DEMEM_WORKERS", nonsense)
        with pytest.raises(ValueError, match=f"DEMEM_WORKERS must be .*{nonsense}"):
            farm.workers()
    monkeypatch.delenv("DEMEM_WORKERS")
    assert farm.workers() >= 1


def test_device_auto_and_by_name():
    assert farm.device("cpu").type == "cpu" and farm.device().type in ("cpu", "cuda")


def die_at_chunk_2(chunk, stop):
    if chunk == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return chunk


def test_a_pool_of_processes_that_loses_one_is_dead():
    done, processes = [], ProcessPoolExecutor(1)
    with pytest.raises(farm.ExecutorDied, match=r"after 2 of 5 chunks \(BrokenProcessPool: .*\); start another one"):
        farm.run(die_at_chunk_2, range(5), executor=processes, done=lambda number, result: done.append((number, result)))
    assert sorted(done) == [(0, 0), (1, 1)]  # in whatever order they were noticed
    with pytest.raises(farm.ExecutorDied, match="after 0 of 1 chunks"):
        farm.run(die_at_chunk_2, [0], executor=processes)
    processes.shutdown()


@pytest.mark.parametrize("name", ["mps", "xpu", "meta", "tpu", "non sense", "cuda:x", "", None, 1.5, torch.device("meta")])
def test_only_a_cpu_or_a_cuda_gpu_is_computed_on(name):
    for resolved in (farm.device, lambda asked: farm.device_of(None, asked)):
        with pytest.raises(ValueError, match=r"^device must be 'auto', 'cpu' or 'cuda' \(or 'cuda:1', the second of several\), "):
            resolved(name)


def test_a_gpu_that_is_not_there_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:1", torch.device("cuda")):
        with pytest.raises(ValueError, match="no GPU that torch can use; take 'auto' or 'cpu'"):
            farm.device(name)
        assert farm.device_of(None, name).type == "cuda"  # the workers may have what this machine has not
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert farm.device("cuda:1") == torch.device("cuda", 1)
