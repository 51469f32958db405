"""How sentences form micro-batches: global batches as a pure function of (data, seed, step).

A *pool* holds the sentences of many steps. They are drawn in a shuffled order, sorted by length and cut into
micro-batches of equal words, so that the sentences of a micro-batch need little padding. The micro-batches are then
shuffled, and each step takes the next few.

Shape suffix: N sentences of a pool, or of a split.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np

from moe_lm.data.batch import MicroBatch, collate, lengths
from moe_lm.data.prepared import Split
from moe_lm.errors import UserError
from moe_lm.resources import free_memory
from moe_lm.seeds import random_keys

POOL_STEPS = 128
"""Steps per pool: enough that the sentences of a micro-batch differ little in length."""


@dataclass(frozen=True)
class GlobalBatch(Sequence[MicroBatch]):
    """The micro-batches of one step, in order; each is collated when it is asked for."""

    split: Split
    start: int
    """Id of `<S>`."""
    indices: list[np.ndarray]
    """Indices of the sentences in each micro-batch."""
    prefetched: dict[int | None, MicroBatch] = field(default_factory=dict, compare=False, repr=False)
    """Micro-batches collated ahead, by number, with the dummy under None; each is returned once."""

    @cached_property
    def num_words(self) -> int:
        """Words of all micro-batches: the divisor of the summed nats."""
        return sum(int(self.split.words[indices].sum()) for indices in self.indices)

    @cached_property
    def num_tokens(self) -> int:
        """Targets of all micro-batches."""
        return sum(int(lengths(self.split, indices).sum()) for indices in self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> MicroBatch:
        return self.prefetched.pop(number, None) or collate(self.split, self.indices[number], self.start)

    def dummy(self) -> MicroBatch:
        """Return the shortest sentence of the first micro-batch, for a process that has no micro-batch of its own.

        Expert parallelism needs every process in each forward pass; the results of a dummy count for nothing.
        """
        return self.prefetched.pop(None, None) or dummy_batch(self.split, self.indices[0], self.start)


def dummy_batch(split: Split, indices: np.ndarray, start: int) -> MicroBatch:
    """Return the shortest of these sentences as a micro-batch."""
    return collate(split, indices[[int(lengths(split, indices).argmin())]], start)


def check_words(words: int, micro_words: int) -> None:
    """Raise `UserError` where a batch of `words` cannot be cut into micro-batches of `micro_words`."""
    if not 1 <= micro_words <= words:
        raise UserError(f"batch.words={words} batch.micro_words={micro_words}: need 1 <= micro_words <= words")


def _check_pool(words: int, sentences: int, micro_batches: int) -> None:
    """Raise `UserError` if the memory cannot hold the arrays that `_cut_pool` needs.

    Measured, they peak at 48 bytes per sentence; each micro-batch adds an array's header of about 100 bytes.
    """
    needed, free = 64 * sentences + 256 * micro_batches, free_memory()
    if free is not None and needed > free:
        raise UserError(
            f"batch.words={words}: the order of {POOL_STEPS} steps' sentences needs {needed / 2**30:,.0f} GiB of "
            f"memory, and {free / 2**30:,.1f} GiB are free; lower batch.words"
        )


class Batches:
    """The global batch of every step."""

    def __init__(self, split: Split, *, start: int, seed: int, words: int, micro_words: int):
        check_words(words, micro_words)
        self.split, self.start, self.seed = split, start, seed
        self.micro_batches_per_step = math.ceil(words / micro_words)
        mean_words = split.num_words / split.num_sentences
        self.sentences_per_pool = max(POOL_STEPS * self.micro_batches_per_step, round(POOL_STEPS * words / mean_words))
        _check_pool(words, self.sentences_per_pool, POOL_STEPS * self.micro_batches_per_step)
        self._epoch_order = lru_cache(maxsize=2)(self._draw_epoch_order)
        self._pool = lru_cache(maxsize=1)(self._cut_pool)

    def step(self, step: int) -> GlobalBatch:
        """Return the step's global batch: `batch.words` words, give or take a sentence in each micro-batch."""
        pool, step_in_pool = divmod(step, POOL_STEPS)
        first = step_in_pool * self.micro_batches_per_step
        return GlobalBatch(self.split, self.start, self._pool(pool)[first : first + self.micro_batches_per_step])

    def num_steps(self, words: int) -> int:
        """Return an estimate of the number of steps that read this many words; steps differ in length."""
        words_per_step = self.sentences_per_pool / POOL_STEPS * self.split.num_words / self.split.num_sentences
        return max(1, round(words / words_per_step))

    def epoch(self, step: int) -> float:
        """Return how many times the split has been read before this step."""
        return step / POOL_STEPS * self.sentences_per_pool / self.split.num_sentences

    def _cut_pool(self, pool: int) -> list[np.ndarray]:
        """Return the sentence indices of each micro-batch of a pool, in shuffled order."""
        sentence_N = self._stream(pool * self.sentences_per_pool, (pool + 1) * self.sentences_per_pool)
        length_N = lengths(self.split, sentence_N)
        order_N = np.argsort(length_N, kind="stable")
        sentence_N, length_N = sentence_N[order_N], length_N[order_N]
        num_micro_batches = POOL_STEPS * self.micro_batches_per_step
        # Cut where the cumulative length passes each micro-batch's equal share of the pool.
        total_N = np.cumsum(length_N)
        number = np.arange(1, num_micro_batches)
        cuts = np.searchsorted(total_N - length_N / 2, total_N[-1] / num_micro_batches * number)
        # Sentences longer than a micro-batch make cuts coincide: leave at least one sentence in each micro-batch.
        cuts = np.minimum(np.maximum.accumulate((cuts - number).clip(0)), len(sentence_N) - num_micro_batches) + number
        micro_batches = np.split(sentence_N, cuts)
        order = np.argsort(random_keys(num_micro_batches, "pool", self.seed, pool), kind="stable")
        return [micro_batches[i] for i in order]

    def _stream(self, first: int, last: int) -> np.ndarray:
        """Return sentences `first` to `last` - 1 of the endless sequence of epochs, each shuffled anew."""
        size, pieces = self.split.num_sentences, []
        for epoch in range(first // size, (last - 1) // size + 1):
            order = self._epoch_order(epoch)
            pieces.append(order[max(first - epoch * size, 0) : last - epoch * size])
        return np.concatenate(pieces)

    def _draw_epoch_order(self, epoch: int) -> np.ndarray:
        return np.argsort(random_keys(self.split.num_sentences, "epoch", self.seed, epoch), kind="stable")


class Prefetcher:
    """Returns the global batches of `Batches`; a thread collates the next step's batch while the current step runs."""

    def __init__(self, batches: Batches, assigned: Callable[[int], list[int | None]], *, pin_memory: bool):
        """`assigned(n)` returns which of a step's n micro-batches this process runs, None for the dummy.

        `pin_memory` spares a GPU from waiting for the CPU at the start of a step: micro-batches are copied to
        page-locked memory, and their distinct inputs are found in advance.
        """
        self.batches, self._assigned, self._pin_memory = batches, assigned, pin_memory
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next: tuple[int, Future[GlobalBatch]] | None = None

    def epoch(self, step: int) -> float:
        """Return how many times the training split has been read before this step."""
        return self.batches.epoch(step)

    def step(self, step: int) -> GlobalBatch:
        """Return the step's global batch, and start collating the next step's batch."""
        batch = self._prefetched(step) or self._collated(step)
        self._next = step + 1, self._thread.submit(self._collated, step + 1)
        return batch

    def _prefetched(self, step: int) -> GlobalBatch | None:
        """Return the thread's batch if it is for this step; wait for the thread anyway, as both use the same caches."""
        if self._next is None:
            return None
        number, future = self._next
        if number == step:
            return future.result()
        future.exception()
        return None

    def _collated(self, step: int) -> GlobalBatch:
        batch = self.batches.step(step)
        _ = batch.num_words, batch.num_tokens  # counted here, and cached
        for number in dict.fromkeys(self._assigned(len(batch))):
            micro = batch.dummy() if number is None else batch[number]
            if self._pin_memory:
                _ = micro.inputs.unique  # found here and kept
                micro = micro.pin_memory()
            batch.prefetched[number] = micro
        return batch


def iter_eval_batches(
    split: Split, *, start: int, max_sentences: int, max_words: int, limit: int | None = None
) -> Iterator[tuple[np.ndarray, MicroBatch]]:
    """Yield the split's first `limit` sentences (default: all) in micro-batches, in order of length, with indices."""
    for indices in iter_eval_indices(split, max_sentences=max_sentences, max_words=max_words, limit=limit):
        yield indices, collate(split, indices, start)


def iter_eval_indices(
    split: Split, *, max_sentences: int, max_words: int, limit: int | None = None
) -> Iterator[np.ndarray]:
    """Yield the sentence indices of each micro-batch of `iter_eval_batches`.

    A micro-batch has at most `max_sentences` sentences and, unless it is a single sentence, at most `max_words` tokens
    with padding.
    """
    count = split.num_sentences if limit is None else min(limit, split.num_sentences)
    length_N = lengths(split, np.arange(count))
    order_N = np.argsort(length_N, kind="stable")
    first = 0
    while first < count:
        candidates = order_N[first : first + min(max_sentences, max_words)]
        # Lengths ascend: n sentences, padded to the last one's length, take n times that length.
        padded = np.arange(1, len(candidates) + 1) * length_N[candidates]
        indices = candidates[: max(1, int(np.searchsorted(padded, max_words, side="right")))]
        yield indices
        first += len(indices)
