"""The next step's micro-batches, laid out by a thread while this step is computed."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from moe_lm.data.batching import Batches, GlobalBatch


class Prefetcher:
    """Hands out what `Batches` does, one step ahead: a GPU need not wait for the sorting and laying out of text."""

    def __init__(self, batches: Batches, turns: Callable[[int], list[int | None]], *, pinned: bool):
        """`turns` says which of a step's micro-batches are this process's.

        `pinned` ones lie where a GPU can read, with their distinct inputs found: else it would wait for the host at
        the beginning of each step.
        """
        self._batches, self._turns, self._pinned = batches, turns, pinned
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next: tuple[int, Future[GlobalBatch]] | None = None

    def step(self, step: int) -> GlobalBatch:
        """Return the step's batch, and begin with the next step's."""
        batch = self._taken(step)
        if batch is None:
            batch = self._laid_out(step)
        self._next = step + 1, self._thread.submit(self._laid_out, step + 1)
        return batch

    def _taken(self, step: int) -> GlobalBatch | None:
        """Return what the thread has made, if it is of this step; wait for it in any case, as both read one cache."""
        if self._next is None:
            return None
        number, coming = self._next
        if number == step:
            return coming.result()
        coming.exception()
        return None

    def _laid_out(self, step: int) -> GlobalBatch:
        batch = self._batches.step(step)
        _ = batch.num_words, batch.num_tokens  # counted once, and kept
        for number in dict.fromkeys(self._turns(len(batch))):
            micro = batch.idle() if number is None else batch[number]
            batch.ready[number] = micro.with_rows().pinned() if self._pinned else micro
        return batch
