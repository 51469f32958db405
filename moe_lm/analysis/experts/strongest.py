"""The strongest contexts of every expert, kept while the text is read.

Shape suffixes: E experts, C contexts an expert, A assignments, N candidates.
"""

import numpy as np

UNITS = 1_000_000
"""Gate values are compared in millionths: what lies closer together is equal, so that rounding decides nothing."""


class Strongest:
    """For every expert the C distinct contexts of its largest gate values; of equal ones the earlier."""

    def __init__(self, num_experts: int, num_contexts: int):
        shape = num_experts, num_contexts
        self._unit_EC = np.full(shape, -1, np.int64)  # -1: none yet
        self._offset_EC = np.zeros(shape, np.int64)
        self._prefix_EC = np.zeros(shape, np.uint64)

    def add(self, expert_A: np.ndarray, gate_A: np.ndarray, offset_A: np.ndarray, prefix_A: np.ndarray) -> None:
        """Offer assignments: `offset_A` is their place in the text, `prefix_A` equal where the same words were read."""
        unit_A = np.rint(gate_A * UNITS).astype(np.int64)
        stays_A = unit_A >= self._unit_EC[expert_A, -1]  # no weaker than the weakest that is kept
        new = [x[stays_A] for x in (expert_A, unit_A, offset_A, prefix_A)]
        touched = np.unique(new[0])
        if not len(touched):
            return
        old = self._kept(touched)
        expert_N, unit_N, offset_N, prefix_N = (np.concatenate(parts) for parts in zip(old, new, strict=True))
        first = _firsts(expert_N, prefix_N, offset_N)
        expert_N, unit_N, offset_N, prefix_N = (x[first] for x in (expert_N, unit_N, offset_N, prefix_N))
        order = np.lexsort((offset_N, -unit_N, expert_N))
        place_N = ranks(expert_N[order])
        best = place_N < self._unit_EC.shape[1]
        order, column = order[best], place_N[best]
        self._unit_EC[touched] = -1
        for kept, value in ((self._unit_EC, unit_N), (self._offset_EC, offset_N), (self._prefix_EC, prefix_N)):
            kept[expert_N[order], column] = value[order]

    def of(self, expert: int) -> list[tuple[float, int]]:
        """Return the gate value and the place in the text of each context of an expert, the strongest first."""
        pairs = zip(self._unit_EC[expert].tolist(), self._offset_EC[expert].tolist(), strict=True)
        return [(unit / UNITS, offset) for unit, offset in pairs if unit >= 0]

    def _kept(self, experts: np.ndarray) -> list[np.ndarray]:
        """Return the contexts of these experts as lists of candidates."""
        unit = self._unit_EC[experts]
        there = unit >= 0
        expert = np.broadcast_to(experts[:, None], unit.shape)
        return [x[there] for x in (expert, unit, self._offset_EC[experts], self._prefix_EC[experts])]


def ranks(group_N: np.ndarray) -> np.ndarray:
    """Return the place of each entry in its group, from 0; equal groups stand together."""
    begins = np.flatnonzero(np.r_[True, group_N[1:] != group_N[:-1]]) if len(group_N) else np.empty(0, np.int64)
    sizes = np.diff(np.r_[begins, len(group_N)])
    return np.arange(len(group_N)) - np.repeat(begins, sizes)


def _firsts(expert_N: np.ndarray, prefix_N: np.ndarray, offset_N: np.ndarray) -> np.ndarray:
    """Return the indices of the earliest of what is the same context of the same expert."""
    order = np.lexsort((offset_N, prefix_N, expert_N))
    expert_N, prefix_N = expert_N[order], prefix_N[order]
    is_first = np.r_[True, (expert_N[1:] != expert_N[:-1]) | (prefix_N[1:] != prefix_N[:-1])]
    return order[is_first]
