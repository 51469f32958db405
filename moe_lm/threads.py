"""Several works at the same time on a CPU, each with one thread for its products."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from os import getpid

import torch


def at_once(works: Sequence[Callable[[], object]]) -> None:
    """Run each work in a thread of its own, without autograd; a single one here, as it stands.

    Raises what the first of those that failed raised, when all have ended.
    """
    if len(works) == 1:
        works[0]()
        return
    running = [_pool(len(works), getpid()).submit(work) for work in works]
    wait(running)
    for work in running:
        work.result()


@cache
def _pool(size: int, _: int) -> ThreadPoolExecutor:
    """Return threads of this process (a forked one has none of its parent's) that use one thread each."""
    pool, threads = ThreadPoolExecutor(size, thread_name_prefix="products"), torch.get_num_threads()
    all_here = threading.Barrier(size + 1)
    for _ in range(size):
        pool.submit(_begin, all_here)
    all_here.wait()
    torch.set_num_threads(threads)  # each thread has its own number, but one begun later takes the last one set
    return pool


def _begin(all_here: threading.Barrier) -> None:
    torch.get_num_threads()  # at its first use, whenever that is, a thread takes the number last set anywhere
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    all_here.wait()
