"""Switch routing: one expert a token, weighted by its probability (Fedus et al. 2021, arXiv 2101.03961, section 2).

Shape suffixes: T tokens, D width, E experts of a group.
"""

import torch
from torch import Tensor

from moe_lm.gate import Gate, Gating, TokenGroups
from moe_lm.gate.routing import within_capacity


class Switch(Gate):
    """G(x)_i = p_i(x) for i = argmax p(x), else 0, with p = Softmax(x W_g): not renormalised, so that W_g learns.

    In training W_g reads x times U(1 - jitter, 1 + jitter), and an expert takes at most capacity_factor * tokens /
    experts tokens of the call, in their order; further tokens are dropped and counted. Evaluation has neither jitter
    nor capacity, so that no prediction depends on the rest of the batch.
    """

    only_k = 1
    differentiable_stats = Gate.differentiable_stats | {"probability_E"}
    non_causal_note = "drops a token if earlier ones have filled its expert's capacity; evaluation drops none"

    def __init__(self, *, capacity_factor: float, jitter: float, **sizes: int | None):
        super().__init__(**sizes)
        if not capacity_factor > 0:
            raise ValueError(f"capacity_factor={capacity_factor} of the gate switch: must be positive")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter={jitter} of the gate switch: must be at least 0 and below 1")
        self.capacity_factor, self.jitter = capacity_factor, jitter

    def logits(self, x_TD: Tensor, groups: TokenGroups) -> Tensor:
        """Return x W_g, where x has jitter in training."""
        if self.training and self.jitter > 0:
            x_TD = x_TD * (1 - self.jitter + 2 * self.jitter * torch.rand_like(x_TD))
        return super().logits(x_TD, groups)

    def choose(self, logit_TE: Tensor, groups: TokenGroups) -> Gating:
        """Send each token to its likeliest expert, in training within capacity."""
        probability_TE = logit_TE.softmax(dim=1)
        gate_T1, expert_T1 = probability_TE.max(dim=1, keepdim=True)
        kept_T1 = within_capacity(expert_T1, self.capacity_factor, groups) if self.training else None
        return self.token_choice(expert_T1, gate_T1, logit_TE, groups, probability_TE=probability_TE, kept_TK=kept_T1)
