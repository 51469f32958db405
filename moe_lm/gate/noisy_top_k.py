"""Noisy top-k gating (section 2.1, eq. 3-5) with the smooth load estimator (Appendix A, eq. 8-10).

Shape suffixes: T tokens, D width, E experts (of a group), K experts a token, A = T*K assignments, G groups.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from moe_lm.errors import UserError
from moe_lm.gate import Gating, checked_k
from moe_lm.gate.routing import choice_sums, numbered, product, summed, token_choice
from moe_lm.ops.noisy_top_k import noisy_choice


class NoisyTopK(nn.Module):
    """G(x) = Softmax(KeepTopK(x W_g + eps * (Softplus(x W_noise) + noise_epsilon), k)), noise in training only."""

    differentiable_stats: ClassVar[frozenset[str]] = frozenset(
        {"importance_E", "load_E", "probability_E", "log_z_squared"}
    )
    required_stats: frozenset[str] | None = None

    def __init__(self, *, width: int, num_experts: int, k: int, noise_epsilon: float, num_groups: int | None = None):
        super().__init__()
        if not noise_epsilon > 0:
            raise UserError(f"gate.noise_epsilon={noise_epsilon}: must be positive")
        self.k, self.num_groups, self.num_experts = checked_k(k, num_experts), num_groups, num_experts
        self.noise_epsilon = noise_epsilon
        # Both start at zero, so that every expert is equally likely at first (Appendix A).
        groups = () if num_groups is None else (num_groups,)
        self.gate_DE = nn.Parameter(torch.zeros(*groups, width, num_experts))
        self.noise_DE = nn.Parameter(torch.zeros(*groups, width, num_experts))

    def forward(self, x_TD: Tensor, group_T: Tensor | None = None) -> Gating:
        """Assign each token to its k experts; float32 whatever the autocast type."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return self._gating(x_TD.to(self.gate_DE.dtype), group_T)

    def operations_per_timestep(self) -> int:
        """Both matrices: the paper's ops/timestep counts W_noise too."""
        return (self.gate_DE.numel() + self.noise_DE.numel()) // (self.num_groups or 1)

    def _gating(self, x_TD: Tensor, group_T: Tensor | None) -> Gating:
        load_E, num_experts = None, self.num_experts * (self.num_groups or 1)
        if not self.training:
            top_TK, expert_TK = product(x_TD, self.gate_DE, group_T).topk(self.k, dim=1)
            expert_TK = numbered(expert_TK, group_T, self.num_experts)
            return token_choice(expert_TK, top_TK.softmax(dim=1), num_experts)
        # One product for both matrices: a wide one is faster than two narrow ones.
        logit_TF = product(x_TD, torch.cat([self.gate_DE, self.noise_DE], dim=-1), group_T)
        draw_TE = torch.randn_like(logit_TF[:, : self.num_experts])
        top_TN, expert_TN, noisy_TE, chance_TE = noisy_choice(logit_TF, draw_TE, self.noise_epsilon, self.k)
        expert_TK = numbered(expert_TN[:, : self.k], group_T, self.num_experts)
        sums = choice_sums(noisy_TE, expert_TK, group_T, self.num_groups, self.required_stats)
        if chance_TE is not None:
            load_E = summed(chance_TE, group_T, self.num_groups).reshape(-1)
        return token_choice(expert_TK, top_TN[:, : self.k].softmax(dim=1), num_experts, load_E=load_E, sums=sums)
