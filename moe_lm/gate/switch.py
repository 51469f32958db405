"""Switch routing: one expert a token, weighed by its probability (Fedus et al. 2021, arXiv 2101.03961, section 2).

Shape suffixes: T tokens, D width, E experts (of a group), G groups.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from moe_lm.errors import UserError
from moe_lm.gate import Gating, checked_k
from moe_lm.gate.routing import (
    choice_sums,
    initial_matrix,
    numbered,
    places,
    product,
    token_choice,
    within_capacity,
)


class Switch(nn.Module):
    """G(x)_i = p_i(x) for i = argmax p(x), else 0, with p = Softmax(x W_g): not renormalised, so that W_g learns.

    In training W_g reads x times U(1 - jitter, 1 + jitter), and an expert takes at most capacity_factor * tokens /
    experts tokens of the call, in their order; what overflows is dropped and counted. Evaluation has neither: nobody's
    prediction depends on who else is in the batch.
    """

    only_k: ClassVar[int] = 1
    differentiable_stats: ClassVar[frozenset[str]] = frozenset({"importance_E", "probability_E", "log_z_squared"})
    non_causal_note: ClassVar[str] = (
        "drops what exceeds an expert's capacity, by the tokens before it; evaluation has no capacity"
    )
    required_stats: frozenset[str] | None = None

    def __init__(
        self,
        *,
        width: int,
        num_experts: int,
        k: int,
        capacity_factor: float,
        jitter: float,
        num_groups: int | None = None,
    ):
        super().__init__()
        self.k, self.num_groups, self.num_experts = checked_k(k, num_experts, 1, "switch"), num_groups, num_experts
        if not capacity_factor > 0:
            raise UserError(f"capacity_factor={capacity_factor} of the gate switch: must be positive")
        if not 0 <= jitter < 1:
            raise UserError(f"jitter={jitter} of the gate switch: must be at least 0 and below 1")
        self.capacity_factor, self.jitter = capacity_factor, jitter
        self.gate_DE = initial_matrix(width, num_experts, num_groups)

    def forward(self, x_TD: Tensor, group_T: Tensor | None = None) -> Gating:
        """Assign each token to its expert; float32 whatever the autocast type."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return self._gating(x_TD.to(self.gate_DE.dtype), group_T)

    def operations_per_timestep(self) -> int:
        """One matrix."""
        return self.gate_DE.numel() // (self.num_groups or 1)

    def _gating(self, x_TD: Tensor, group_T: Tensor | None) -> Gating:
        if self.training and self.jitter > 0:
            x_TD = x_TD * (1 - self.jitter + 2 * self.jitter * torch.rand_like(x_TD))
        logit_TE = product(x_TD, self.gate_DE, group_T)
        probability_TE = logit_TE.softmax(dim=1)
        gate_T1, expert_T1 = probability_TE.max(dim=1, keepdim=True)
        expert_T1, kept_T1, sums = numbered(expert_T1, group_T, self.num_experts), None, {}
        if self.training:
            sums = choice_sums(logit_TE, expert_T1, group_T, self.num_groups, self.required_stats, probability_TE)
            place_T1 = places(expert_T1.squeeze(1)).unsqueeze(1)
            kept_T1 = within_capacity(place_T1, self.capacity_factor, self.num_experts, group_T, self.num_groups)
        return token_choice(expert_T1, gate_T1, self.num_experts * (self.num_groups or 1), kept_TK=kept_T1, sums=sums)
