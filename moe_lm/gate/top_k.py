"""Top-k gating without noise, "token choice": every token takes its k likeliest experts (section 2.1, eq. 3 and 5).

Shape suffixes: T tokens, D width, E experts (of a group), K experts a token, G groups.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from moe_lm.errors import UserError
from moe_lm.gate import Gating, checked_k
from moe_lm.gate.routing import choice_sums, initial_matrix, numbered, product, token_choice


class TopK(nn.Module):
    """G(x) = Softmax(KeepTopK(x W_g, k)), the same in training and evaluation."""

    differentiable_stats: ClassVar[frozenset[str]] = frozenset({"importance_E", "probability_E", "log_z_squared"})
    required_stats: frozenset[str] | None = None

    def __init__(self, *, width: int, num_experts: int, k: int, num_groups: int | None = None):
        super().__init__()
        self.k, self.num_groups, self.num_experts = checked_k(k, num_experts), num_groups, num_experts
        if k == 1 < num_experts:
            raise UserError(
                "the gate top_k with one expert a token gives it the weight 1 and learns nothing from the text: "
                "model.k=2, or the gate switch for one expert a token"
            )
        self.gate_DE = initial_matrix(width, num_experts, num_groups)

    def forward(self, x_TD: Tensor, group_T: Tensor | None = None) -> Gating:
        """Assign each token to its k experts; float32 whatever the autocast type."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logit_TE = product(x_TD.to(self.gate_DE.dtype), self.gate_DE, group_T)
            top_TK, expert_TK = logit_TE.topk(self.k, dim=1)
            expert_TK = numbered(expert_TK, group_T, self.num_experts)
            sums = {}
            if self.training:
                sums = choice_sums(logit_TE, expert_TK, group_T, self.num_groups, self.required_stats)
            num_experts = self.num_experts * (self.num_groups or 1)
            return token_choice(expert_TK, top_TK.softmax(dim=1), num_experts, sums=sums)

    def operations_per_timestep(self) -> int:
        """One matrix."""
        return self.gate_DE.numel() // (self.num_groups or 1)
