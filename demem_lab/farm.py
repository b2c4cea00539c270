"""Many chunks of models over the cores at hand, or over any `concurrent.futures` executor.

On a CPU each worker computes with one thread and several chunks run side by side: threads that share one small matrix
product get in each other's way, models side by side do not. Workers are threads of this process by default (the heavy
work is outside Python's lock, and no second copy of torch is needed); pass an executor to go further.

>>> run(lambda chunk, stop: sum(chunk), [[1, 2], [3]])
[3, 3]
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from typing import Any

import torch

from demem_lab.validate import integer

# mallopt: blocks below 32 MB (older versions take no more) come from the heap, which grows by 64 MB and shrinks past 1 GB
MALLOC_OPTIONS = ((-3, 32 << 20), (-1, 1 << 30), (-2, 64 << 20))


def device(name: str = "auto") -> torch.device:
    """The device to compute on: "auto" takes a CUDA GPU where there is one, else the CPU."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def workers(on: torch.device | str = "cpu") -> int:
    """How many chunks to run at once: one a core on a CPU ($DEMEM_WORKERS overrides), one on a GPU."""
    if torch.device(on).type != "cpu":
        return 1
    asked = os.environ.get("DEMEM_WORKERS")
    if asked:
        return integer("DEMEM_WORKERS", asked, low=1)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_thread_each(on: torch.device | str = "cpu") -> None:
    """Let every worker compute with a single thread, in memory it keeps; called before any chunk is started."""
    if torch.device(on).type == "cpu":
        torch.set_num_threads(1)
        _keep_freed_memory()


def run(
    function: Callable[[Any, threading.Event], Any], chunks: Sequence[Any], *, executor: Executor | None = None,
    at_once: int | None = None, stop: threading.Event | None = None,
) -> list[Any]:
    """`function(chunk, stop)` for every chunk; results in the order of `chunks`.

    `stop` is set when the user interrupts (or by whoever passed it in, from another thread): a function that watches it
    can save its state before it returns. An exception in one chunk stops the others in the same way and is raised here.
    With an `executor` of processes or machines `stop` cannot be shared, and None is passed instead.
    """
    chunks = list(chunks)
    if executor is not None:
        return [future.result() for future in [executor.submit(function, chunk, None) for chunk in chunks]]
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


def _keep_freed_memory() -> None:
    """Let glibc keep what a training step frees for the next one, instead of asking the system for the same pages again.

    Without it steps of changing size fault the same pages in again and again: 1.1 to 1.3 x the CPU time for MLPs, 1.0 to
    1.2 x for a small CNN (benchmarks/levers.py). `run` gives the memory back when the chunks are done.
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
