"""Many chunks of models over the cores at hand, or over any `concurrent.futures` executor.

On a CPU each worker computes with one thread and several chunks run side by side: threads that share one small matrix
product get in each other's way, models side by side do not. Workers are threads of this process by default (the heavy
work is outside Python's lock, and no second copy of torch is needed); pass an executor to go further.

>>> run(lambda chunk, stop: sum(chunk), [[1, 2], [3]])
[3, 3]

Beyond one machine Dask is the tested engine, one chunk on each GPU at a time: start its workers with
`dask worker SCHEDULER --resources GPU=1`, and pass `connect(SCHEDULER)`. A worker that is killed costs its own chunk, which
Dask gives to another one.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from typing import Any

import torch

from demem_lab.replay import one_at_a_time
from demem_lab.store import Store
from demem_lab.validate import instance, integer, shown

# mallopt: blocks below 32 MB (older versions take no more) come from the heap, which grows by 64 MB and shrinks past 1 GB
MALLOC_OPTIONS = ((-3, 32 << 20), (-1, 1 << 30), (-2, 64 << 20))


def device(name: str | torch.device = "auto") -> torch.device:
    """The device to compute on: "auto" takes a CUDA GPU where there is one, else the CPU.

    ValueError for a GPU that is not there, and for other kinds of devices: Apple's, for instance, have no float64.
    """
    there = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if there else "cpu")
    on = _named(name)
    if on.type == "cuda" and not there:
        raise ValueError(f"device {str(name)!r} is asked for, and there is no GPU that torch can use; take 'auto' or 'cpu'")
    return on


def _named(name: str | torch.device) -> torch.device:
    try:
        on = torch.device(name)
    except (RuntimeError, TypeError):
        on = None
    if on is None or on.type not in ("cpu", "cuda"):
        asked = str(name) if isinstance(name, torch.device) else name
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda' (or 'cuda:1', the second of several), got {asked!r}")
    return on


def suited(name: str, dataset: str) -> str:
    """The device for a data set, by name: digits turn "auto" into the CPU, also where a GPU is; all else stays as asked."""
    # a step on 8x8 images takes less time than telling a GPU to do it
    return "cpu" if name == "auto" and dataset == "digits" else name


def connect(address: str, *, seconds: float = 10) -> Executor:
    """The workers of the Dask scheduler at `address`, as an executor; where any offers a GPU, only those, a chunk on each.

    `with connect(address) as executor:` (or executor.shutdown()) closes the connection at its end. Raises ValueError for what
    is no address, ImportError without Dask, ConnectionError where no scheduler answers or it has no workers, each with the fix.
    """
    if not isinstance(address, str) or not address.strip():  # of None, Dask would start a cluster on this machine
        raise ValueError(f"address must be a scheduler's, such as 'tcp://NODE:8786', got {shown(address)}")
    try:
        from dask.distributed import Client
        from distributed.cfexecutor import ClientExecutor
    except ImportError:
        raise ImportError("a Dask scheduler takes Dask on this side, too: pip install 'demem-lab[cluster]'") from None
    client = None
    try:
        client = Client(address, timeout=seconds, set_as_default=False)
        client.wait_for_workers(1, timeout=seconds)
    except (OSError, TimeoutError, ValueError) as error:
        if client is not None:
            client.close()
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fix = "start `dask scheduler`, and `dask worker ADDRESS` on each machine, and give the address that the scheduler prints"
        raise ConnectionError(f"no scheduler with workers answers at {address!r} within {seconds:g} s ({first}); {fix}") from None
    offered = client.run_on_scheduler(lambda dask_scheduler: [w.resources for w in dask_scheduler.workers.values()])

    class Connected(ClientExecutor):
        """Dask's executor leaves a client to whoever made it, and nobody else has this one."""

        def shutdown(self, wait=True, **how):
            super().shutdown(wait=wait, **how)
            client.close()

    return Connected(client, resources={"GPU": 1} if any("GPU" in resources for resources in offered) else {})


def check(executor: Executor | None, store: Store | None) -> None:
    """ValueError unless these are what they are called, or None."""
    if executor is not None:
        example = "client.get_executor()" if hasattr(executor, "get_executor") else "farm.connect('tcp://NODE:8786')"
        instance("executor", executor, Executor, having="submit", example=example)
    if store is not None:
        instance("store", store, Store, example="Store('runs/store')")


def device_of(executor: Executor, name: str = "auto") -> torch.device:
    """The device that the workers of an executor compute on; "auto" asks one of them."""
    return _named(name) if name != "auto" else torch.device(run(_kind_of_device, [None], executor=executor)[0])


def _kind_of_device(_, stop) -> str:
    return device().type


def ready(on: torch.device) -> None:
    """On a worker: RuntimeError unless it has that device; then let it compute as workers do."""
    if on.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            "a worker has no GPU, but the run is for cuda: give it workers of one kind (with Dask, "
            "client.get_executor(resources={'GPU': 1}) picks those that have one), or device='cpu'"
        )
    one_thread_each(on)


_deterministic = threading.Lock()
_asked = [0]


@contextmanager
def deterministic(on: bool = True):
    """Inside, only algorithms that give the same bits every time (torch.use_deterministic_algorithms), in all threads."""
    if not on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses without; read when it starts
    with _deterministic:
        _asked[0] += 1
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        with _deterministic:
            _asked[0] -= 1
            if not _asked[0]:
                torch.use_deterministic_algorithms(False)


def workers(on: torch.device | str = "cpu") -> int:
    """How many chunks to run at once: one a core on a CPU ($DEMEM_WORKERS overrides), one on a GPU."""
    if torch.device(on).type != "cpu":
        return 1
    asked = os.environ.get("DEMEM_WORKERS")
    if asked:
        number = int(asked) if asked.strip().isdecimal() else asked  # `integer` says what is wrong with anything else
        return integer("DEMEM_WORKERS", number, low=1, fix="unset it, or export DEMEM_WORKERS=1 or more")
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_thread_each(on: torch.device | str = "cpu") -> None:
    """Let every worker compute with a single thread, in memory it keeps; called before any chunk is started.

    It stays so for the rest of the process: torch keeps this number for the process and for each thread, so that one run
    that put it back would speed up or slow down another that is not over. torch.set_num_threads(n) puts it back.
    """
    if torch.device(on).type == "cpu":
        torch.set_num_threads(1)
        _keep_freed_memory()


def free(on: torch.device) -> None:
    """Give a device's memory back after it ran out."""
    gc.collect()
    if on.type == "cuda":
        with one_at_a_time:  # not while another thread records (`replay`)
            torch.cuda.empty_cache()


def run(
    function: Callable[[Any, threading.Event], Any], chunks: Sequence[Any], *, executor: Executor | None = None,
    at_once: int | None = None, stop: threading.Event | None = None,
    done: Callable[[int, Any], None] = lambda number, result: None, fix: str = "start another one",
) -> list[Any]:
    """`function(chunk, stop)` for every chunk; results in the order of `chunks`.

    `stop` is set when the user interrupts (or by whoever passed it in, from another thread): a function that watches it
    can save its state before it returns. An exception in one chunk stops the others in the same way and is raised here.
    With an `executor` of processes or machines `stop` cannot be shared, and None is passed instead; once it is set, nobody
    waits for the chunks any longer and KeyboardInterrupt is raised. `done(number, result)` is called here for every chunk
    that comes back. ExecutorDied, which ends in `fix`, when the executor stops working.
    """
    chunks = list(chunks)
    if executor is not None:
        return _over(executor, function, chunks, stop, done, fix)
    stop = threading.Event() if stop is None else stop
    at_once = workers() if at_once is None else at_once
    if at_once == 1 or len(chunks) == 1:
        try:
            return [function(chunk, stop) for chunk in chunks]
        finally:
            _give_back_memory()
    pool = ThreadPoolExecutor(max_workers=at_once, thread_name_prefix="demem")
    futures = [pool.submit(function, chunk, stop) for chunk in chunks]
    try:
        for future in as_completed(futures):
            future.result()
    except BaseException:  # KeyboardInterrupt too: let the chunks save what they have, then go on failing
        stop.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        _give_back_memory()
    return [future.result() for future in futures]


class ExecutorDied(RuntimeError):
    """An executor stopped working before all chunks were done."""


def _over(executor: Executor, function, chunks: list, stop, done, fix: str) -> list[Any]:
    futures, results = {}, {}
    try:
        for number, chunk in enumerate(chunks):
            futures[_submitted(executor, function, chunk)] = number
        waiting = set(futures)
        while waiting:
            if stop is not None and stop.is_set():
                raise KeyboardInterrupt
            came, waiting = wait(waiting, timeout=None if stop is None else 0.2, return_when=FIRST_COMPLETED)
            for future in came:
                results[futures[future]] = future.result()
                done(futures[future], results[futures[future]])
    except BaseException as error:
        for future, number in futures.items():
            if not future.cancel() and number not in results and future.done() and future.exception() is None:
                results[number] = future.result()  # it came back together with the bad news
                done(number, results[number])
        # Dask raises its own errors, for instance KilledWorker when a chunk has taken several workers down with it
        if isinstance(error, (BrokenExecutor, CancelledError)) or type(error).__module__.split(".")[0] == "distributed":
            reason = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0].rstrip(": .")[:200]
            far = f"after {len(results)} of {len(chunks)} chunks"
            raise ExecutorDied(f"the executor stopped working {far} ({reason}); {fix}") from error
        raise
    return [results[number] for number in range(len(chunks))]


def _submitted(executor: Executor, function, chunk):
    try:
        return executor.submit(function, chunk, None)
    except RuntimeError as error:  # what executors raise that were shut down
        raise BrokenExecutor(str(error)) from error


def _keep_freed_memory() -> None:
    """Let glibc keep what a training step frees for the next one, instead of asking the system for the same pages again.

    Without it steps of changing size fault the same pages in again and again: 1.1 to 1.3 x the CPU time for MLPs,
    1.1 x for a small CNN (benchmarks/levers.py). `run` gives the memory back when the chunks are done.
    """
    if sys.platform == "linux":
        try:
            for option, size in MALLOC_OPTIONS:
                ctypes.CDLL("libc.so.6").mallopt(option, size)
        except (OSError, AttributeError):
            return  # another C library


def _give_back_memory() -> None:
    """Return freed memory to the system: glibc keeps what threads once used, half a gigabyte after a large sweep."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):
            return  # another C library, which does not hoard
