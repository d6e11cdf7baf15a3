"""Several processes work at a list of tasks: one that dies loses its own task, a stop loses nothing."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any


def each(function: Callable, tasks: Mapping[str, tuple], jobs: int) -> Iterator[tuple[str, Any]]:
    """Call a function for each task, several at once, and yield results as they come.

    Where the function raises, or this process is interrupted, the tasks under way are sent SIGTERM
    and no other begins.

    Args:
        function: what to call, of the top level of a module.
        tasks: its arguments, by name.
        jobs: tasks at once, each in a process with its share of the CPU's cores; 1: in this process.

    Yields:
        The name of a task, and what the function returned; None if its process was killed from
        outside, as where memory runs out.
    """
    if jobs <= 1:
        for name, arguments in tasks.items():
            yield name, function(*arguments)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # Each worker is a pool of its own with one task at a time. One pool of several would keep a task
    # in stock, begin it after a stop, and lose all tasks where one process dies.
    idle = [_worker(threads) for _ in range(jobs)]
    waiting = list(tasks.items())
    running: dict[Future, tuple[str, ProcessPoolExecutor]] = {}
    try:
        while waiting or running:
            while waiting and idle:
                (name, arguments), pool = waiting.pop(0), idle.pop()
                running[pool.submit(function, *arguments)] = name, pool
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, pool = running.pop(future)
                idle.append(pool)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    idle[-1] = _worker(threads)
                    result = None
                yield name, result
    finally:
        if running:
            for child in multiprocessing.active_children():
                child.terminate()  # a training writes a checkpoint first
        for pool in [*idle, *(pool for _, pool in running.values())]:
            pool.shutdown()


def _worker(threads: int) -> ProcessPoolExecutor:
    """Return a pool of one process. Spawned, not forked: torch's threads do not live through a fork."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _share, (threads,))


def _share(threads: int) -> None:
    """Take no more than this process's share of the cores."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before NumPy and torch are imported
    import torch

    torch.set_num_threads(threads)  # where they were
