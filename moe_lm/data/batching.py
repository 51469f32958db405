"""Token ids to batches: which sentences make which micro-batch, as a pure function of (data, seed, step).

A *pool* is the text of many steps. Its sentences, shuffled, are sorted by length and cut into micro-batches
of equal words, so that a micro-batch holds like lengths and little padding; the micro-batches are then
shuffled, and each step takes the next few. Nothing here knows how many processes there are.

Shape suffix: N sentences of a pool.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np

from moe_lm.data.micro_batch import MicroBatch, idle, lengths, micro_batch
from moe_lm.data.prepared import Split
from moe_lm.errors import UserError
from moe_lm.seeds import random_keys

POOL_STEPS = 128
"""Steps a pool serves: enough that a micro-batch's sentences differ little in length."""


@dataclass(frozen=True)
class GlobalBatch(Sequence[MicroBatch]):
    """The micro-batches of one step, in order; each is laid out when it is asked for."""

    split: Split
    start: int
    cuts: list[np.ndarray]
    """The sentences of each micro-batch."""
    ready: dict[int | None, MicroBatch] = field(default_factory=dict, compare=False, repr=False)
    """Micro-batches that were laid out ahead, by number, the idle one as None; each is handed out once."""

    @cached_property
    def num_words(self) -> int:
        """Words of all micro-batches: what nats are divided by."""
        return sum(int(self.split.words[indices].sum()) for indices in self.cuts)

    @cached_property
    def num_tokens(self) -> int:
        """Predicted tokens of all micro-batches."""
        return sum(int(lengths(self.split, indices).sum()) for indices in self.cuts)

    def __len__(self) -> int:
        return len(self.cuts)

    def __getitem__(self, number: int) -> MicroBatch:
        laid_out = self.ready.pop(number, None)
        return micro_batch(self.split, self.cuts[number], self.start) if laid_out is None else laid_out

    def idle(self) -> MicroBatch:
        """Return the first micro-batch's shortest sentence, for a process without a micro-batch.

        It must go through the model beside the others, because experts wait for all processes; its result counts for
        nothing.
        """
        laid_out = self.ready.pop(None, None)
        return idle(self.split, self.cuts[0], self.start) if laid_out is None else laid_out


def check_words(words: int, micro_words: int) -> None:
    """Raise `UserError` for a batch of so many words that cannot be cut into micro-batches of so many."""
    if not 1 <= micro_words <= words:
        raise UserError(f"batch.words={words} batch.micro_words={micro_words}: need 1 <= micro_words <= words")


class Batches:
    """The global batch of every step: an ordered list of micro-batches."""

    def __init__(self, split: Split, *, start: int, seed: int, words: int, micro_words: int):
        check_words(words, micro_words)
        self.split, self.start, self.seed = split, start, seed
        self.micro_batches_per_step = math.ceil(words / micro_words)
        mean_words = split.num_words / split.num_sentences
        self.sentences_per_pool = max(POOL_STEPS * self.micro_batches_per_step, round(POOL_STEPS * words / mean_words))
        self._order_of_epoch = lru_cache(maxsize=2)(self._draw_order)
        self._cuts_of_pool = lru_cache(maxsize=1)(self._cut_pool)

    def step(self, step: int) -> "GlobalBatch":
        """Return step's micro-batches: `batch.words` words in all, up to a sentence more or less in each."""
        pool, place = divmod(step, POOL_STEPS)
        first = place * self.micro_batches_per_step
        chosen = self._cuts_of_pool(pool)[first : first + self.micro_batches_per_step]
        return GlobalBatch(self.split, self.start, chosen)

    def epoch(self, step: int) -> float:
        """Return how many times the training split has been read before this step."""
        return step / POOL_STEPS * self.sentences_per_pool / self.split.num_sentences

    def _cut_pool(self, pool: int) -> list[np.ndarray]:
        sentence_N = self._stream(pool * self.sentences_per_pool, (pool + 1) * self.sentences_per_pool)
        length_N = lengths(self.split, sentence_N)
        by_length_N = np.argsort(length_N, kind="stable")
        num_micro_batches = POOL_STEPS * self.micro_batches_per_step
        # Cut where the words so far pass each micro-batch's equal share of the pool.
        total_N = np.cumsum(length_N[by_length_N])
        share = total_N[-1] / num_micro_batches
        cuts = np.searchsorted(total_N - length_N[by_length_N] / 2, share * np.arange(1, num_micro_batches))
        # Where sentences are long for a micro-batch a cut may repeat: leave at least one sentence in each part.
        before = np.arange(1, num_micro_batches)
        most = len(sentence_N) - num_micro_batches
        cuts = np.minimum(np.maximum.accumulate((cuts - before).clip(0)), most) + before
        parts = np.split(sentence_N[by_length_N], cuts)
        order = np.argsort(random_keys(num_micro_batches, "pool", self.seed, pool), kind="stable")
        return [parts[i] for i in order]

    def _stream(self, first: int, last: int) -> np.ndarray:
        """Sentences first..last-1 of the endless sequence of epochs, each in an order of its own."""
        size, pieces = self.split.num_sentences, []
        for epoch in range(first // size, (last - 1) // size + 1):
            order = self._order_of_epoch(epoch)
            pieces.append(order[max(first - epoch * size, 0) : last - epoch * size])
        return np.concatenate(pieces)

    def _draw_order(self, epoch: int) -> np.ndarray:
        return np.argsort(random_keys(self.split.num_sentences, "epoch", self.seed, epoch), kind="stable")


def iter_eval_batches(
    split: Split, *, start: int, max_sentences: int, max_words: int, limit: int | None = None
) -> Iterator[tuple[np.ndarray, MicroBatch]]:
    """Yield every sentence of a split once (or of its first `limit`), by length, with their indices."""
    for chosen in iter_eval_cuts(split, max_sentences=max_sentences, max_words=max_words, limit=limit):
        yield chosen, micro_batch(split, chosen, start)


def iter_eval_cuts(
    split: Split, *, max_sentences: int, max_words: int, limit: int | None = None
) -> Iterator[np.ndarray]:
    """Yield the indices of each micro-batch of `iter_eval_batches`.

    It holds at most `max_sentences` sentences and, padded, `max_words` tokens or one sentence.
    """
    count = split.num_sentences if limit is None else min(limit, split.num_sentences)
    length_N = lengths(split, np.arange(count))
    by_length_N = np.argsort(length_N, kind="stable")
    first = 0
    while first < count:
        candidates = by_length_N[first : first + min(max_sentences, max_words)]
        # Sorted: the last sentence is the longest, so the rectangle of n sentences is n times its length.
        padded = np.arange(1, len(candidates) + 1) * length_N[candidates]
        chosen = candidates[: max(1, int(np.searchsorted(padded, max_words, side="right")))]
        yield chosen
        first += len(chosen)
