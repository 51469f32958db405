"""Read a split once in evaluation mode and tally, per gated layer, which tokens are routed to which expert.

Memory grows with the combinations that occur, never with tokens times experts or words times experts.

Shape suffixes: T tokens, A assignments, E experts, G groups, C contexts, V vocabulary, B sentences, N entries.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from moe_lm.data.batch import MicroBatch
from moe_lm.data.batching import iter_eval_batches
from moe_lm.data.prepared import Split
from moe_lm.errors import UserError
from moe_lm.gate import Gating

MAX_PENDING = 1 << 20
"""Number of entries that `SparseCounts` collects before it merges them, as each merge sorts everything."""
GATE_RESOLUTION = 1_000_000
"""Gate values are compared as multiples of 1/1,000,000, so that rounding errors decide nothing."""


class SparseCounts:
    """Counts of int64 keys; memory grows with the distinct keys."""

    def __init__(self):
        self._key_N, self._count_N = np.empty(0, np.int64), np.empty(0, np.int64)
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_pending = 0

    def add(self, keys: np.ndarray) -> None:
        """Increment the count of each key once per occurrence."""
        part = np.unique(keys, return_counts=True)
        self._pending.append(part)
        self._num_pending += len(part[0])
        if self._num_pending > max(MAX_PENDING, len(self._key_N)):
            self._merge()

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the distinct keys in ascending order and their counts."""
        self._merge()
        return self._key_N, self._count_N

    def _merge(self) -> None:
        if not self._pending:
            return
        keys, counts = zip((self._key_N, self._count_N), *self._pending, strict=True)
        self._key_N, place_N = np.unique(np.concatenate(keys), return_inverse=True)
        self._count_N = np.zeros(len(self._key_N), np.int64)
        np.add.at(self._count_N, place_N, np.concatenate(counts))
        self._pending, self._num_pending = [], 0


class StrongestContexts:
    """The C distinct contexts with the largest gate values of every expert; among equal values the earlier wins."""

    def __init__(self, num_experts: int, num_contexts: int):
        shape = num_experts, num_contexts
        self._unit_EC = np.full(shape, -1, np.int64)  # gate value in units of the resolution; -1: empty
        self._offset_EC = np.zeros(shape, np.int64)
        self._prefix_EC = np.zeros(shape, np.uint64)

    def add(self, expert_A: np.ndarray, gate_A: np.ndarray, offset_A: np.ndarray, prefix_A: np.ndarray) -> None:
        """Add assignments as candidates; contexts of an expert are distinct if their `prefix_A` differ."""
        unit_A = np.rint(gate_A * GATE_RESOLUTION).astype(np.int64)
        candidate_A = unit_A >= self._unit_EC[expert_A, -1]
        new = [x[candidate_A] for x in (expert_A, unit_A, offset_A, prefix_A)]
        touched = np.unique(new[0])
        if not len(touched):
            return
        parts = zip(self._contexts_of(touched), new, strict=True)
        expert_N, unit_N, offset_N, prefix_N = (np.concatenate(part) for part in parts)
        order = np.lexsort((offset_N, prefix_N, expert_N))
        order = order[is_first(expert_N[order], prefix_N[order])]  # the earliest of equal contexts
        expert_N, unit_N, offset_N, prefix_N = (x[order] for x in (expert_N, unit_N, offset_N, prefix_N))
        order = np.lexsort((offset_N, -unit_N, expert_N))
        column_N = ranks(expert_N[order])
        kept_N = column_N < self._unit_EC.shape[1]
        order, column_N = order[kept_N], column_N[kept_N]
        self._unit_EC[touched] = -1
        for array, value_N in ((self._unit_EC, unit_N), (self._offset_EC, offset_N), (self._prefix_EC, prefix_N)):
            array[expert_N[order], column_N] = value_N[order]

    def of(self, expert: int) -> list[tuple[float, int]]:
        """Return the gate value and offset of each of an expert's contexts, largest gate value first."""
        pairs = zip(self._unit_EC[expert].tolist(), self._offset_EC[expert].tolist(), strict=True)
        return [(unit / GATE_RESOLUTION, offset) for unit, offset in pairs if unit >= 0]

    def _contexts_of(self, experts: np.ndarray) -> list[np.ndarray]:
        unit = self._unit_EC[experts]
        present = unit >= 0
        expert = np.broadcast_to(experts[:, None], unit.shape)
        return [x[present] for x in (expert, unit, self._offset_EC[experts], self._prefix_EC[experts])]


def is_first(*column_N: np.ndarray) -> np.ndarray:
    """Return whether each entry of sorted columns differs from the entry before it."""
    changed = np.logical_or.reduce([x[1:] != x[:-1] for x in column_N])
    return np.r_[np.ones(min(1, len(column_N[0])), bool), changed]


def ranks(group_N: np.ndarray) -> np.ndarray:
    """Return the index of each entry within its group, for groups that are contiguous."""
    begins = np.flatnonzero(is_first(group_N))
    sizes = np.diff(np.r_[begins, len(group_N)])
    return np.arange(len(group_N)) - np.repeat(begins, sizes)


@dataclass(frozen=True)
class InputTokens:
    """The input tokens of a micro-batch."""

    word_T: np.ndarray
    """Ids in the vocabulary."""
    offset_T: np.ndarray
    """Offset in the split's tokens of the token that each input predicts."""
    prefix_T: np.ndarray
    """uint64 hash of the sentence up to and including each input token."""


class Tally:
    """Running counts of one gated layer."""

    def __init__(self, *, num_experts: int, num_groups: int | None, vocabulary_size: int, num_contexts: int):
        self.num_experts, self.num_groups, self.vocabulary_size = num_experts, num_groups, vocabulary_size
        self.tokens = self.routed = self.shared = self.most_experts = 0
        """Numbers of tokens, of tokens with an expert and of tokens with several, and the most experts of any token."""
        self.entropy = 0.0
        """Sum of the entropies of the routed tokens' gate values, in bits."""
        self.load_E = np.zeros(num_experts, np.int64)
        self.importance_E = np.zeros(num_experts)
        self.entropy_E = np.zeros(num_experts)
        """Sum of the entropies of each expert's tokens."""
        self.tokens_G = np.zeros(num_groups or 0, np.int64)
        """Tokens routed to at least one expert of each group."""
        self.words, self.pairs = SparseCounts(), SparseCounts()
        """Keys: expert * vocabulary_size + word, and expert * num_experts + higher expert."""
        self.strongest = StrongestContexts(num_experts, num_contexts)

    def add(self, gating: Gating, tokens: InputTokens) -> None:
        """Count a micro-batch; raises `UserError` for gate values that are not finite."""
        token_A, expert_A = gating.token_A.cpu().numpy(), gating.expert_A.cpu().numpy()
        gate_A = gating.gate_A.detach().double().cpu().numpy()
        if not np.isfinite(gate_A).all():
            raise UserError("a gate value is not finite: the training diverged; choose another checkpoint")
        experts_T = np.bincount(token_A, minlength=gating.num_tokens)
        entropy_T = entropies(token_A, gate_A, gating.num_tokens)
        self.tokens += gating.num_tokens
        self.routed += int((experts_T > 0).sum())
        self.shared += int((experts_T > 1).sum())
        self.most_experts = max(self.most_experts, int(experts_T.max(initial=0)))
        self.entropy += float(entropy_T.sum())
        self.load_E += np.bincount(expert_A, minlength=self.num_experts)
        self.importance_E += np.bincount(expert_A, gate_A, minlength=self.num_experts)
        self.entropy_E += np.bincount(expert_A, entropy_T[token_A], minlength=self.num_experts)
        self.words.add(expert_A * self.vocabulary_size + tokens.word_T[token_A])
        self.strongest.add(expert_A, gate_A, tokens.offset_T[token_A], tokens.prefix_T[token_A])
        order = np.argsort(token_A, kind="stable")  # by token, then by expert, as gatings are sorted by expert
        self._add_pairs(token_A[order], expert_A[order])
        if self.num_groups:
            group_A = expert_A // (self.num_experts // self.num_groups)
            distinct = np.unique(token_A * self.num_groups + group_A)
            self.tokens_G += np.bincount(distinct % self.num_groups, minlength=self.num_groups)

    def _add_pairs(self, token_A: np.ndarray, expert_A: np.ndarray) -> None:
        """Count all pairs of a token's experts, first those at distance 1 in the sorted list, then 2, and so on."""
        first, distance = np.arange(len(token_A)), 0
        while len(first):
            distance += 1
            first = first[first + distance < len(token_A)]
            first = first[token_A[first] == token_A[first + distance]]
            self.pairs.add(expert_A[first] * self.num_experts + expert_A[first + distance])


def entropies(token_A: np.ndarray, gate_A: np.ndarray, num_tokens: int) -> np.ndarray:
    """Return the entropy of each token's gate values normalised to sum 1, in bits; 0 for unrouted tokens."""
    # With p = g / s, -sum p log p is log s - (sum g log g) / s; a gate value of 0 adds nothing.
    positive_A = np.where(gate_A > 0, gate_A, 1.0)
    sum_T = np.bincount(token_A, gate_A, minlength=num_tokens)
    product_T = np.bincount(token_A, gate_A * np.log2(positive_A), minlength=num_tokens)
    safe_T = np.where(sum_T > 0, sum_T, 1.0)
    return np.where(sum_T > 0, np.maximum(np.log2(safe_T) - product_T / safe_T, 0.0), 0.0)


@dataclass(frozen=True)
class Reading:
    """Counts of one pass over a text."""

    sentences: int
    words: int
    count_V: np.ndarray
    """Occurrences of each token as an input."""
    tallies: dict[str, Tally]
    """Tally of each gated layer, by its name, in the model's order."""

    @property
    def tokens(self) -> int:
        """Number of input tokens."""
        return int(self.count_V.sum())


@torch.no_grad()
def gated_layers(model: nn.Module, start: int) -> dict[str, int]:
    """Return the number of experts of each gated layer by its name, found by a forward pass over one token."""
    split = Split(tokens=np.array([start]), starts=np.array([0, 1]), words=np.array([1]))
    [(_, batch)] = iter_eval_batches(split, start=start, max_sentences=1, max_words=1)
    _, gatings = model.hidden(batch.to(model.device))
    return {name: gating.num_experts for name, gating in gatings.items()}


def first_sentences(split: Split, max_words: int | None) -> int:
    """Return how many sentences from the start it takes to reach `max_words` words (None: all sentences).

    Raises `UserError` for a split without sentences.
    """
    if split.num_sentences == 0:
        raise UserError("the split holds no sentence: choose another")
    if max_words is None:
        return split.num_sentences
    total_N = np.cumsum(split.words, dtype=np.int64)
    return min(int(np.searchsorted(total_N, max_words)) + 1, split.num_sentences)


@torch.no_grad()
def read(
    model: nn.Module,
    split: Split,
    *,
    start: int,
    sentences: int,
    num_contexts: int,
    max_sentences: int,
    max_words: int,
    on_progress: Callable[[int], object] = int,
) -> Reading:
    """Tally the first `sentences` sentences of a split; the batch size does not change the result.

    Leaves the model in eval mode and its layers in float64: with float32 rounding, the batch size would occasionally
    change a token's experts.
    """
    model.eval()
    model.layers.double()
    model.embedding.weight_VD.data = model.embedding.weight_VD.data.double()
    size, device = model.embedding.weight_VD.shape[0], model.device
    tallies = {
        name: Tally(
            num_experts=num_experts,
            num_groups=getattr(model.layers[name], "num_groups", None),
            vocabulary_size=size,
            num_contexts=num_contexts,
        )
        for name, num_experts in gated_layers(model, start).items()
    }
    count_V, words = np.zeros(size, np.int64), 0
    batches = iter_eval_batches(split, start=start, max_sentences=max_sentences, max_words=max_words, limit=sentences)
    for chosen, batch in batches:
        _, gatings = model.hidden(batch.to(device))
        tokens = input_tokens(batch, split.starts[chosen])
        np.add.at(count_V, tokens.word_T, 1)
        for name, gating in gatings.items():
            tallies[name].add(gating, tokens)
        words += batch.num_words
        on_progress(batch.num_words)
    return Reading(sentences, words, count_V, tallies)


def input_tokens(batch: MicroBatch, start_B: np.ndarray) -> InputTokens:
    """Locate a micro-batch's input tokens in the split, where its sentences begin at `start_B`."""
    layout, sentence_T = batch.layout, batch.layout.sentence_T.numpy()
    index_T = np.arange(len(sentence_T)) if layout.index_T is None else layout.index_T.numpy()
    step_T = index_T // layout.num_sentences
    word_T = batch.input_T.numpy()
    return InputTokens(word_T, np.asarray(start_B)[sentence_T] + step_T, hash_prefixes(word_T, step_T, sentence_T))


def hash_prefixes(word_T: np.ndarray, step_T: np.ndarray, sentence_T: np.ndarray) -> np.ndarray:
    """Return a 64-bit hash of the sentence up to each token: the sum, modulo 2^64, of hashes of (word, step)."""
    with np.errstate(over="ignore"):
        part_T = _mix_bits(_mix_bits(word_T.astype(np.uint64)) + step_T.astype(np.uint64))
        order = np.lexsort((step_T, sentence_T))
        total_T = np.cumsum(part_T[order], dtype=np.uint64)
        begins = np.flatnonzero(step_T[order] == 0)
        sizes = np.diff(np.r_[begins, len(order)])
        before_T = np.r_[np.zeros(1, np.uint64), total_T][begins].repeat(sizes)
        prefix_T = np.empty_like(part_T)
        prefix_T[order] = total_T - before_T
    return prefix_T


def _mix_bits(x: np.ndarray) -> np.ndarray:
    """Return hashes of 64-bit numbers, computed by the finaliser of SplitMix64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
