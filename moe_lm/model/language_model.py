"""The language model: embedding, a stack of layers with residual sums, softmax (Appendix C.1).

Shape suffixes: T tokens, D width, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lm.data.batch import MicroBatch
from moe_lm.gate import Gating
from moe_lm.loss.softmax import Softmax
from moe_lm.model import Layer
from moe_lm.ops.init import init_words_
from moe_lm.ops.sparse_rows import RowSparseModule, RowSparseParameter, UniqueIndices, take_rows


class Embedding(RowSparseModule):
    """Embedding rows by word id; the optimizer may ask for the gradient of only the rows that a step touches."""

    parameter_group = "vocabulary"

    def __init__(self, *, vocabulary_size: int, width: int, held: range | None = None):
        """The module holds only the rows of the words in `held`, by default of all words."""
        super().__init__()
        self.held = range(vocabulary_size) if held is None else held
        self.weight_VD = RowSparseParameter(torch.empty(len(self.held), width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw from a normal distribution of variance 1/width."""
        init_words_(self.weight_VD, self.weight_VD.shape[1] ** -0.5, self.held)

    def forward(self, words: UniqueIndices) -> Tensor:
        """Return the rows of these words (T, D)."""
        return take_rows(self.weight_VD, words)


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
    ):
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"model.dropout={dropout}: must be at least 0 and below 1")
        self.width, self.vocabulary_size, self.dropout = width, vocabulary_size, dropout
        self.embedding = Embedding(vocabulary_size=vocabulary_size, width=width)
        self.layers = nn.ModuleDict(layers)
        self.softmax = softmax(width=width, vocabulary_size=vocabulary_size)

    @property
    def device(self) -> torch.device:
        """Return the device of the parameters."""
        return self.embedding.weight_VD.device

    def reset_parameters(self) -> None:
        """Draw all parameters and reset all buffers; torch's seed fixes the weights."""
        for module in (*self.layers.values(), self.embedding, self.softmax):
            module.reset_parameters()

    def forward(self, batch: MicroBatch, seed: int = 0) -> tuple[Tensor, dict[str, Gating]]:
        """Return the summed nats of the micro-batch (float64) and the gating of each gated layer by name."""
        hidden_TD, gatings = self.hidden(batch)
        return self.softmax(hidden_TD, batch.targets, seed), gatings

    def hidden(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Gating]]:
        """Return the last layer's outputs (T, D) and the gatings."""
        gatings = {}
        x_TD, layout = self._dropout(self.embedding(batch.inputs)), replace(batch.layout, input_T=batch.inputs.row_T)
        for name, layer in self.layers.items():
            y_TD, gating = layer(x_TD, layout)
            x_TD = x_TD + self._dropout(y_TD)
            if gating is not None:
                gatings[name] = gating
        return x_TD, gatings

    def token_nats(self, batch: MicroBatch) -> Tensor:
        """Return the exact nats of each predicted token (float64, T)."""
        return self.softmax.token_nats(self.hidden(batch)[0], batch.target_T)

    def _dropout(self, x_TD: Tensor) -> Tensor:
        if x_TD.is_cuda or not self.training or self.dropout == 0:
            return F.dropout(x_TD, self.dropout, self.training)
        # On a CPU torch's Bernoulli draws take twice as long as uniform draws, which need more than 16 bits.
        kept_TD = torch.rand_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32)).ge_(self.dropout)
        return x_TD * kept_TD.mul_(1 / (1 - self.dropout)).to(x_TD.dtype)
