"""A thread pool for CPU work, in which torch uses a single thread within each task."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from os import getpid

import torch

_MAX_THREADS = 256
"""Maximum number of threads in a process; each starts when it is first needed."""


def run_parallel(tasks: Sequence[Callable[[], object]]) -> None:
    """Run each task in a thread of its own, without autograd; a single task runs unchanged in the calling thread.

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
        # torch keeps a number of threads for each thread, but a new thread, here or elsewhere, takes the number that
        # was last set, which is the 1 of `_start_thread`.
        torch.set_num_threads(threads)
    for future in futures:
        future.result()


@cache
def _pool(_: int) -> ThreadPoolExecutor:
    """Return the pool of this process; a forked process has none of its parent's threads."""
    return ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="tasks", initializer=_start_thread)


def _start_thread() -> None:
    torch.get_num_threads()  # the first call in a thread takes the number last set anywhere: make it before setting 1
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
