"""A thread pool for CPU work, each of whose threads multiplies with one thread."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from os import getpid

import torch

_MAX_THREADS = 256
"""Threads of a process; each starts when it is first needed."""


def run_parallel(tasks: Sequence[Callable[[], object]]) -> None:
    """Run each task in a thread of its own, without autograd; a single task runs in the calling thread, as it is.

    Waits until all have ended, then raises the first exception in the order of the tasks.
    """
    if len(tasks) == 1:
        tasks[0]()
        return
    pool, threads = _pool(getpid()), torch.get_num_threads()
    try:
        futures = [pool.submit(task) for task in tasks]
        wait(futures)
    finally:
        # Each thread has its own number, but a thread that starts later, anywhere, takes the number last set.
        torch.set_num_threads(threads)
    for future in futures:
        future.result()


@cache
def _pool(_: int) -> ThreadPoolExecutor:
    """Return the pool of this process; a forked process has none of its parent's threads."""
    return ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="tasks", initializer=_start_thread)


def _start_thread() -> None:
    torch.get_num_threads()  # the first use in a thread, whenever it is, sets the number last set anywhere
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
