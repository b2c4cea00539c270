import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest

from demem_lab import farm


def double(chunk, stop):
    return [2 * c for c in chunk]


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


def test_one_failure_stops_the_others_and_is_raised():
    started, stopped = threading.Event(), threading.Event()

    def work(chunk, stop):
        if chunk == 0:
            started.wait(10)
            raise RuntimeError("planted")
        started.set()
        if stop.wait(10):
            stopped.set()

    with pytest.raises(RuntimeError, match="planted"):
        farm.run(work, [0, 1], at_once=2)
    assert stopped.is_set()


def test_workers_can_be_set_and_nonsense_is_refused(monkeypatch):
    monkeypatch.setenv("DEMEM_WORKERS", "3")
    assert farm.workers() == 3 and farm.workers("cuda") == 1
    monkeypatch.setenv("DEMEM_WORKERS", "many")
    with pytest.raises(ValueError, match="DEMEM_WORKERS"):
        farm.workers()
    monkeypatch.delenv("DEMEM_WORKERS")
    assert farm.workers() >= 1


def test_device_auto_and_by_name():
    assert farm.device("cpu").type == "cpu" and farm.device().type in ("cpu", "cuda")
