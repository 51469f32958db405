"""The exact softmax over the whole vocabulary.

Shape suffixes: T tokens, D width, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lm.cross_entropy import exact_nats, summed_nats
from moe_lm.mistake import Mistake


class FullSoftmax(nn.Module):
    """-log softmax(W h + b) of the target, never more than `max_logits` logits in memory."""

    def __init__(self, *, width: int, vocabulary_size: int, max_logits: int):
        super().__init__()
        if max_logits < 1:
            raise Mistake(f"softmax.max_logits={max_logits}: must be at least 1")
        self.max_logits = max_logits
        self.exact_in_training = True
        self.weight_VD = nn.Parameter(torch.empty(vocabulary_size, width))
        self.bias_V = nn.Parameter(torch.zeros(vocabulary_size))
        nn.init.normal_(self.weight_VD, std=width**-0.5)

    def forward(self, hidden_TD: Tensor, target_T: Tensor, seed: int) -> Tensor:  # noqa: ARG002
        """Return the summed nats; nothing is drawn."""
        if not torch.is_grad_enabled():
            return self.token_nats(hidden_TD, target_T).sum()
        true_TD, true_bias_T = F.embedding(target_T, self.weight_VD), self.bias_V.gather(0, target_T)
        true_T = (hidden_TD * true_TD).sum(dim=1) + true_bias_T
        return summed_nats(hidden_TD, self.weight_VD, self.bias_V, true_T, target_T, self.max_logits)

    def token_nats(self, hidden_TD: Tensor, target_T: Tensor) -> Tensor:
        """Return each token's exact nats."""
        return exact_nats(hidden_TD, self.weight_VD, self.bias_V, target_T, self.max_logits)

    def operations_per_timestep(self) -> int:
        """One product with every word's row."""
        return self.weight_VD.numel()
