"""Counts of few among very many things: only what occurs takes memory."""

import numpy as np

MOST_WAITING = 1 << 20
"""Entries that are gathered before they are added to the rest: sorting all of it at every batch would be slow."""


class SparseCounts:
    """How often each key (int64) was added."""

    def __init__(self):
        self._key_N, self._count_N = np.empty(0, np.int64), np.empty(0, np.int64)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_waiting = 0

    def add(self, keys: np.ndarray) -> None:
        """Count each of these once more."""
        part = np.unique(keys, return_counts=True)
        self._waiting.append(part)
        self._num_waiting += len(part[0])
        if self._num_waiting > max(MOST_WAITING, len(self._key_N)):
            self._merge()

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the distinct keys, ascending, and their counts."""
        self._merge()
        return self._key_N, self._count_N

    def _merge(self) -> None:
        if not self._waiting:
            return
        keys, counts = zip((self._key_N, self._count_N), *self._waiting, strict=True)
        self._key_N, place_N = np.unique(np.concatenate(keys), return_inverse=True)
        count_N = np.zeros(len(self._key_N), np.int64)
        np.add.at(count_N, place_N, np.concatenate(counts))
        self._count_N, self._waiting, self._num_waiting = count_N, [], 0
