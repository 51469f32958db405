"""Sampled softmax: importance sampling over shared log-uniform negatives (Jozefowicz et al. 2016).

Shape suffixes: T tokens, D width, V vocabulary, S sampled words.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from moe_lm.errors import UserError
from moe_lm.loss.softmax.chunked import ChunkedSoftmax
from moe_lm.model.init import initialize_words_
from moe_lm.ops.cross_entropy import summed_nats
from moe_lm.ops.sparse_rows import UniqueIndices, sent
from moe_lm.parallel.context import SINGLE_PROCESS, ParallelContext
from moe_lm.parallel.group import shard_rows
from moe_lm.parallel.vocab_parallel import vocab_parallel_nats, vocab_parallel_rows


class SampledSoftmax(ChunkedSoftmax):
    """In training the target against `num_sampled` distinct words; exact in eval mode, or for V <= num_sampled.

    Every logit is lowered by the log of its word's expected count among the sampled; a sampled word that is
    the target itself is left out.
    """

    def __init__(
        self,
        *,
        width: int,
        vocabulary_size: int,
        num_sampled: int,
        max_logits: int | None,
        parallel: ParallelContext = SINGLE_PROCESS,
    ):
        super().__init__(max_logits)
        if num_sampled < 1:
            raise UserError(f"softmax.num_sampled={num_sampled}: must be at least 1")
        self.num_sampled = num_sampled
        self.exact_in_training = num_sampled >= vocabulary_size
        self.share = shard_rows(vocabulary_size, parallel.vocabulary)
        """Which rows are here."""
        self.weight_VD = nn.Parameter(torch.empty(self.share.size, width))
        self.bias_V = nn.Parameter(torch.zeros(self.share.size))
        initialize_words_(self.weight_VD, width**-0.5, self.share.rows)

    def forward(self, hidden_TD: Tensor, target_T: Tensor, seed: int, host_T: Tensor | None = None) -> Tensor:
        """Return the summed nats; equal seeds draw equal words."""
        if not self.training:
            return self.token_nats(hidden_TD, target_T).sum()
        size = self.share.total
        if self.num_sampled >= size:
            drawn_S, num_tries = torch.arange(size), None
        else:
            drawn_S, num_tries = draw_distinct(self.num_sampled, size, seed)
        candidate_S = sent(drawn_S, target_T.device)
        # One gather for both: its gradient may be a whole (V, D) matrix.
        word = torch.cat([candidate_S, target_T])
        distinct = UniqueIndices(word, None if host_T is None else torch.cat([drawn_S, host_T]))
        rows, bias = (vocab_parallel_rows(matrix, distinct, self.share) for matrix in (self.weight_VD, self.bias_V))
        if num_tries is not None:
            bias = bias - _log_expected_count(word, num_tries, size).to(bias.dtype)
        num_candidates = len(candidate_S)
        true_T = (hidden_TD * rows[num_candidates:]).sum(dim=1) + bias[num_candidates:]
        hit_T = _find(candidate_S, target_T)
        return summed_nats(hidden_TD, rows[:num_candidates], bias[:num_candidates], true_T, hit_T, self.max_logits)

    def token_nats(self, hidden_TD: Tensor, target_T: Tensor) -> Tensor:
        """Return each token's exact nats."""
        return vocab_parallel_nats(hidden_TD, self.weight_VD, self.bias_V, target_T, self.max_logits, self.share)

    def operations_per_timestep(self) -> int:
        """Products with the sampled rows and the target's."""
        size, width = self.share.total, self.weight_VD.shape[1]
        return (self.num_sampled + 1 if self.num_sampled < size else size) * width


def draw_distinct(count: int, size: int, seed: int) -> tuple[Tensor, int]:
    """Draw ids with P(i) = log((i+2)/(i+1)) / log(size+1) until `count` < size are distinct.

    Returns the distinct ids, ascending (int64), and the number of draws it took.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = np.empty(0, dtype=np.int64)
    first_seen = distinct = drawn
    while len(first_seen) < count:
        uniform = torch.rand(max(2 * count, len(drawn)), generator=generator, dtype=torch.float64)
        ids = (uniform * math.log(size + 1)).exp().long().sub_(1).clamp_(0, size - 1)
        drawn = np.concatenate([drawn, ids.numpy()])
        distinct, first_seen = _first_places(drawn)
    num_tries = int(np.sort(first_seen)[count - 1]) + 1
    return torch.from_numpy(distinct[first_seen < num_tries]), num_tries


def _first_places(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct ids, ascending, and where each is first: `np.unique` in a third of its time."""
    bits = len(ids).bit_length()
    ascending = np.sort((ids << bits) | np.arange(len(ids)))  # by id, then by place
    sorted_ids = ascending >> bits
    is_first = np.diff(sorted_ids, prepend=-1) != 0
    return sorted_ids[is_first], ascending[is_first] & ((1 << bits) - 1)


def _log_expected_count(word: Tensor, num_tries: int, size: int) -> Tensor:
    """Log of the chance that a word is among the distinct ones: 1 - (1 - P(word))^tries; float64."""
    word = word.double()
    probability = torch.log1p(1 / (word + 1)) / math.log(size + 1)
    return torch.log(-torch.expm1(num_tries * torch.log1p(-probability)))


def _find(ascending_S: Tensor, value_T: Tensor) -> Tensor:
    """Return where each value stands in the ascending list, -1 where it does not."""
    place_T = torch.searchsorted(ascending_S, value_T).clamp_(max=len(ascending_S) - 1)
    return torch.where(ascending_S.index_select(0, place_T) == value_T, place_T, -1)
