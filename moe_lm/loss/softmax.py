"""The output layer: from hidden states and target words to nats, over sampled words or the whole vocabulary.

Shape suffixes: T tokens, D width, V vocabulary, S sampled words.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lm.ops.cross_entropy import candidate_nats, token_nats
from moe_lm.ops.init import init_words_
from moe_lm.ops.sparse_rows import RowSparseModule, RowSparseParameter, UniqueIndices, copy_to_device, take_rows

_CHUNK_LOGITS_CPU, _CHUNK_LOGITS_GPU = 1 << 24, 1 << 28
"""Logits in memory at a time by default: a CPU is no faster with more, a GPU waits for the host with fewer."""


class Softmax(RowSparseModule):
    """A softmax over the vocabulary with at most `chunk_logits` logits in memory; exact in evaluation mode.

    `chunk_logits=None` chooses a number that suits the device. The module holds only the rows of the words in `held`,
    by default of all words.
    """

    parameter_group = "vocabulary"
    exact_in_training: bool
    """Whether nats are over the whole vocabulary in training too."""

    def __init__(self, width: int, vocabulary_size: int, chunk_logits: int | None, held: range | None):
        super().__init__()
        if chunk_logits is not None and chunk_logits < 1:
            raise ValueError(f"softmax.chunk_logits={chunk_logits}: must be at least 1, or null")
        self.width, self.vocabulary_size, self._chunk_logits = width, vocabulary_size, chunk_logits
        self.held = range(vocabulary_size) if held is None else held
        self.weight_VD = RowSparseParameter(torch.empty(len(self.held), width))
        self.bias_V = RowSparseParameter(torch.zeros(len(self.held)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the rows from a normal distribution of variance 1/width; the bias is 0."""
        init_words_(self.weight_VD, self.width**-0.5, self.held)
        nn.init.zeros_(self.bias_V)

    def forward(self, hidden_TD: Tensor, targets: UniqueIndices, seed: int) -> Tensor:
        """Return the summed nats of the targets (float64 scalar); `seed` fixes all random draws."""
        raise NotImplementedError

    @property
    def chunk_logits(self) -> int:
        """Logits of a chunk on the device that holds the weights."""
        return self.chunk_logits_on(gpu=self.weight_VD.is_cuda)

    def chunk_logits_on(self, *, gpu: bool) -> int:
        """Return the logits of a chunk on a GPU or on a CPU."""
        if self._chunk_logits is not None:
            return self._chunk_logits
        return _CHUNK_LOGITS_GPU if gpu else _CHUNK_LOGITS_CPU

    def token_nats(self, hidden_TD: Tensor, target_T: Tensor) -> Tensor:
        """Return the exact nats of each token (float64, T), without gradients."""
        return token_nats(hidden_TD, self.weight_VD, self.bias_V, target_T, self.chunk_logits)

    def operations_per_timestep(self) -> int:
        """Return the multiply-adds per token of the forward pass in training, which ops/timestep excludes."""
        raise NotImplementedError


class FullSoftmax(Softmax):
    """-log softmax(W h + b) of the target over the whole vocabulary."""

    exact_in_training = True

    def __init__(self, *, width: int, vocabulary_size: int, chunk_logits: int | None, held: range | None = None):
        super().__init__(width, vocabulary_size, chunk_logits, held)

    def forward(self, hidden_TD: Tensor, targets: UniqueIndices, seed: int) -> Tensor:  # noqa: ARG002
        """Return the summed nats; nothing is drawn."""
        target_T = targets.row_T
        if not torch.is_grad_enabled():
            return self.token_nats(hidden_TD, target_T).sum()
        true_TD, true_bias_T = F.embedding(target_T, self.weight_VD), self.bias_V.gather(0, target_T)
        true_T = (hidden_TD * true_TD).sum(dim=1) + true_bias_T
        return candidate_nats(hidden_TD, self.weight_VD, self.bias_V, true_T, target_T, self.chunk_logits)

    def operations_per_timestep(self) -> int:
        """Return the multiply-adds of one product with the row of every word."""
        return self.vocabulary_size * self.width


class SampledSoftmax(Softmax):
    """In training, a softmax over the target and `num_sampled` words drawn log-uniformly (Jozefowicz et al. 2016).

    The sampled words are distinct, and shared by all tokens of the batch. Every logit is lowered by the log of its
    word's expected count among the sampled words, and a sampled word that is the target itself is left out. The softmax
    is exact for vocabularies of at most `num_sampled` words.
    """

    def __init__(
        self,
        *,
        width: int,
        vocabulary_size: int,
        num_sampled: int,
        chunk_logits: int | None,
        held: range | None = None,
    ):
        super().__init__(width, vocabulary_size, chunk_logits, held)
        if num_sampled < 1:
            raise ValueError(f"softmax.num_sampled={num_sampled}: must be at least 1")
        self.num_sampled, self.exact_in_training = num_sampled, num_sampled >= vocabulary_size

    def forward(self, hidden_TD: Tensor, targets: UniqueIndices, seed: int) -> Tensor:
        """Return the summed nats; equal seeds draw equal words."""
        target_T, size = targets.row_T, self.vocabulary_size
        if not self.training:
            return self.token_nats(hidden_TD, target_T).sum()
        if self.exact_in_training:
            sampled_S, num_tries = torch.arange(size), None
        else:
            sampled_S, num_tries = draw_distinct(self.num_sampled, size, seed)
        candidate_S = copy_to_device(sampled_S, target_T.device)
        # Candidates and targets share one gather, because the gradient of each may be a whole (V, D) matrix.
        words = UniqueIndices(torch.cat([candidate_S, target_T]), targets.preceded_by(sampled_S))
        rows, bias = self.rows_of(words)
        if num_tries is not None:
            bias = bias - _log_expected_count(words.row_T, num_tries, size).to(bias.dtype)
        num_candidates = len(candidate_S)
        true_T = (hidden_TD * rows[num_candidates:]).sum(dim=1) + bias[num_candidates:]
        hit_T = _find(candidate_S, target_T)
        return candidate_nats(hidden_TD, rows[:num_candidates], bias[:num_candidates], true_T, hit_T, self.chunk_logits)

    def rows_of(self, words: UniqueIndices) -> tuple[Tensor, Tensor]:
        """Return the weight rows and the biases of these words."""
        return take_rows(self.weight_VD, words), take_rows(self.bias_V, words)

    def operations_per_timestep(self) -> int:
        """Return the multiply-adds of the products with the sampled rows and the target's row."""
        num_rows = self.num_sampled + 1 if self.num_sampled < self.vocabulary_size else self.vocabulary_size
        return num_rows * self.width


def draw_distinct(count: int, size: int, seed: int) -> tuple[Tensor, int]:
    """Draw ids with P(i) = log((i+2)/(i+1)) / log(size+1) until `count` < size are distinct.

    Return the distinct ids, ascending (int64), and the number of draws it took.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = np.empty(0, dtype=np.int64)
    first_seen = distinct = drawn
    while len(first_seen) < count:
        uniform = torch.rand(max(2 * count, len(drawn)), generator=generator, dtype=torch.float64)
        ids = (uniform * math.log(size + 1)).exp().long().sub_(1).clamp_(0, size - 1)
        drawn = np.concatenate([drawn, ids.numpy()])
        distinct, first_seen = _first_positions(drawn)
    num_tries = int(np.sort(first_seen)[count - 1]) + 1
    return torch.from_numpy(distinct[first_seen < num_tries]), num_tries


def _first_positions(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct ids, ascending, and the position of each one's first occurrence.

    One sort of id and position takes a third of the time of `np.unique`.
    """
    bits = len(ids).bit_length()
    ascending = np.sort((ids << bits) | np.arange(len(ids)))
    sorted_ids = ascending >> bits
    is_first = np.diff(sorted_ids, prepend=-1) != 0
    return sorted_ids[is_first], ascending[is_first] & ((1 << bits) - 1)


def _log_expected_count(word: Tensor, num_tries: int, size: int) -> Tensor:
    """Return the log of the chance that a word is among the words drawn, 1 - (1 - P(word))^tries (float64)."""
    word = word.double()
    probability = torch.log1p(1 / (word + 1)) / math.log(size + 1)
    return torch.log(-torch.expm1(num_tries * torch.log1p(-probability)))


def _find(ascending_S: Tensor, value_T: Tensor) -> Tensor:
    """Return the position of each value in the ascending list, -1 where the list lacks it."""
    place_T = torch.searchsorted(ascending_S, value_T).clamp_(max=len(ascending_S) - 1)
    return torch.where(ascending_S.index_select(0, place_T) == value_T, place_T, -1)
