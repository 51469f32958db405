"""The exact softmax over the whole vocabulary.

Shape suffixes: T tokens, D width, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lm.loss.softmax.chunked import ChunkedSoftmax
from moe_lm.model.init import initialize_words_
from moe_lm.ops.cross_entropy import summed_nats
from moe_lm.parallel.context import SINGLE_PROCESS, ParallelContext
from moe_lm.parallel.group import shard_rows
from moe_lm.parallel.vocab_parallel import vocab_parallel_nats, vocab_parallel_summed_nats


class FullSoftmax(ChunkedSoftmax):
    """-log softmax(W h + b) of the target, never more than `max_logits` logits in memory."""

    def __init__(
        self, *, width: int, vocabulary_size: int, max_logits: int | None, parallel: ParallelContext = SINGLE_PROCESS
    ):
        super().__init__(max_logits)
        self.exact_in_training = True
        self.share = shard_rows(vocabulary_size, parallel.vocabulary)
        """Which rows are here."""
        self.weight_VD = nn.Parameter(torch.empty(self.share.size, width))
        self.bias_V = nn.Parameter(torch.zeros(self.share.size))
        initialize_words_(self.weight_VD, width**-0.5, self.share.rows)

    def forward(self, hidden_TD: Tensor, target_T: Tensor, seed: int, host_T: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Return the summed nats; nothing is drawn."""
        if not torch.is_grad_enabled():
            return self.token_nats(hidden_TD, target_T).sum()
        if self.share.group.size > 1:
            rows = (self.weight_VD, self.bias_V, target_T, self.max_logits, self.share)
            return vocab_parallel_summed_nats(hidden_TD, *rows)
        true_TD, true_bias_T = F.embedding(target_T, self.weight_VD), self.bias_V.gather(0, target_T)
        true_T = (hidden_TD * true_TD).sum(dim=1) + true_bias_T
        return summed_nats(hidden_TD, self.weight_VD, self.bias_V, true_T, target_T, self.max_logits)

    def token_nats(self, hidden_TD: Tensor, target_T: Tensor) -> Tensor:
        """Return each token's exact nats."""
        return vocab_parallel_nats(hidden_TD, self.weight_VD, self.bias_V, target_T, self.max_logits, self.share)

    def operations_per_timestep(self) -> int:
        """One product with every word's row."""
        return self.share.total * self.weight_VD.shape[1]
