"""The language model: embedding, a stack of layers with residual sums, softmax (Appendix C.1).

Shape suffixes: T tokens, D width, V vocabulary.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lm.data.micro_batch import MicroBatch
from moe_lm.errors import UserError
from moe_lm.gate import Gating
from moe_lm.loss.softmax import Softmax
from moe_lm.model import Layer
from moe_lm.model.init import initialize_words_
from moe_lm.ops.sparse_rows import UniqueIndices
from moe_lm.parallel.context import SINGLE_PROCESS, ParallelContext
from moe_lm.parallel.group import shard_rows
from moe_lm.parallel.vocab_parallel import vocab_parallel_rows


class LanguageModel(nn.Module):
    """x_1 = Drop(Emb); x_{i+1} = x_i + Drop(layer_i(x_i)); the last x goes to the softmax."""

    def __init__(
        self,
        *,
        width: int,
        vocabulary_size: int,
        dropout: float,
        layers: Mapping[str, Layer],
        softmax: Callable[..., Softmax],
        parallel: ParallelContext = SINGLE_PROCESS,
    ):
        super().__init__()
        if not 0 <= dropout < 1:
            raise UserError(f"model.dropout={dropout}: must be at least 0 and below 1")
        self.dropout = dropout
        self.share = shard_rows(vocabulary_size, parallel.vocabulary)
        """Which rows of the embedding are here."""
        self.embedding_VD = nn.Parameter(torch.empty(self.share.size, width))
        initialize_words_(self.embedding_VD, width**-0.5, self.share.rows)
        self.layers = nn.ModuleDict(layers)
        self.softmax = softmax(width=width, vocabulary_size=vocabulary_size, parallel=parallel)

    def forward(self, batch: MicroBatch, seed: int = 0) -> tuple[Tensor, dict[str, Gating]]:
        """Return the summed nats of the micro-batch (float64) and each gated layer's decision by name."""
        hidden_TD, gatings = self.hidden(batch)
        _, host_target_T = batch.on_host
        return self.softmax(hidden_TD, batch.target_T, seed, host_target_T), gatings

    def hidden(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Gating]]:
        """Return the last layer's states and the gatings."""
        gatings = {}
        host_input_T, _ = batch.on_host
        x_TD = vocab_parallel_rows(
            self.embedding_VD, UniqueIndices(batch.input_T, host_input_T, batch.found_rows), self.share
        )
        x_TD = self._dropped(x_TD)
        for name, layer in self.layers.items():
            y_TD, gating = layer(x_TD, batch.sentences)
            x_TD = x_TD + self._dropped(y_TD)
            if gating is not None:
                gatings[name] = gating
        return x_TD, gatings

    def _dropped(self, x_TD: Tensor) -> Tensor:
        if x_TD.is_cuda or not self.training or self.dropout == 0:
            return F.dropout(x_TD, self.dropout, self.training)
        # On a CPU torch's draws of yes or no take twice as long as its uniform numbers, for which 16 bits are too few.
        kept_TD = torch.rand_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32)).ge_(self.dropout)
        return x_TD * kept_TD.mul_(1 / (1 - self.dropout)).to(x_TD.dtype)

    def adapt(self, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Let each gated layer's gates move what no gradient moves, by its statistics of the global batch."""
        for name, values in statistics.items():
            self.layers[name].adapt(values)

    def token_nats(self, batch: MicroBatch) -> Tensor:
        """Return each predicted token's exact nats (float64, T)."""
        return self.softmax.token_nats(self.hidden(batch)[0], batch.target_T)
