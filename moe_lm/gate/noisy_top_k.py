"""Noisy top-k gating (section 2.1, eq. 3-5) with the smooth load estimator (Appendix A, eq. 8-10).

Shape suffixes: T tokens, E experts of a group, F = E or, in training, 2 E, K experts a token, N = min(K + 1, E).
"""

import torch
from torch import Tensor

from moe_lm.gate import Gate, Gating, TokenGroups
from moe_lm.ops.routing import noisy_top_k


class NoisyTopK(Gate):
    """G(x) = Softmax(KeepTopK(x W_g + eps * (Softplus(x W_noise) + noise_epsilon), k)), noise in training only."""

    has_noise = True
    differentiable_stats = Gate.differentiable_stats | {"load_E", "probability_E"}

    def __init__(self, *, noise_epsilon: float, **sizes: int | None):
        super().__init__(**sizes)
        if not noise_epsilon > 0:
            raise ValueError(f"gate.noise_epsilon={noise_epsilon}: must be positive")
        self.noise_epsilon = noise_epsilon

    def init_matrix_(self, weight: Tensor) -> None:
        """Set a gate matrix to zero, so that every expert is equally likely at first (Appendix A)."""
        weight.zero_()

    def choose(self, logit_TF: Tensor, groups: TokenGroups) -> Gating:
        """Send each token to the experts of its k largest logits, in training with noise added."""
        if not self.training:
            top_TK, expert_TK = logit_TF.topk(self.k, dim=1)
            return self.token_choice(expert_TK, top_TK.softmax(dim=1), logit_TF, groups)
        draw_TE = torch.randn_like(logit_TF[:, : self.num_experts])
        top_TN, expert_TN, noisy_TE, chance_TE = noisy_top_k(logit_TF, draw_TE, self.noise_epsilon, self.k)
        return self.token_choice(
            expert_TN[:, : self.k],
            top_TN[:, : self.k].softmax(dim=1),
            noisy_TE,
            groups,
            load_E=None if chance_TE is None else groups.sum(chance_TE).reshape(-1),
        )
