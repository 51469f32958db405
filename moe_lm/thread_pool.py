"""Several works at the same time on a CPU, each with one thread for its products."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from os import getpid

import torch

_MOST = 256
"""Threads of a process; each begins when it is first needed."""


def run_parallel(works: Sequence[Callable[[], object]]) -> None:
    """Run each work in a thread of its own, without autograd; a single one here, as it stands.

    Raises what the first of those that failed raised, when all have ended.
    """
    if len(works) == 1:
        works[0]()
        return
    pool, threads = _pool(getpid()), torch.get_num_threads()
    try:
        running = [pool.submit(work) for work in works]
        wait(running)
    finally:
        # Each thread has its own number, but one that begins later, anywhere, takes the last one set.
        torch.set_num_threads(threads)
    for work in running:
        work.result()


@cache
def _pool(_: int) -> ThreadPoolExecutor:
    """Return the threads of this process; a forked one has none of its parent's."""
    return ThreadPoolExecutor(_MOST, thread_name_prefix="works", initializer=_begin)


def _begin() -> None:
    torch.get_num_threads()  # at its first use, whenever that is, a thread takes the number last set anywhere
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
