"""GShard's top-2 gating: capacity, and a second expert by chance (Lepikhin et al. 2020, arXiv 2006.16668, Algorithm 1).

Shape suffixes: T tokens, D width, E experts (of a group), K = 2 experts a token, G groups.
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


class GShard(nn.Module):
    """G(x) = g_1 / (g_1 + g_2) and g_2 / (g_1 + g_2) for the two largest of g = Softmax(x W_g), else 0.

    In training an expert takes at most capacity_factor * 2 * tokens / experts assignments of the call: first choices
    in the order of the tokens, then second choices in the same order, each of those only where 2 g_2 / (g_1 + g_2) >
    U(0, 1). One that is left out counts as dropped, and the other keeps its weight. In evaluation all are kept.
    """

    only_k: ClassVar[int] = 2
    differentiable_stats: ClassVar[frozenset[str]] = frozenset({"importance_E", "probability_E", "log_z_squared"})
    non_causal_note: ClassVar[str] = (
        "drops what exceeds an expert's capacity, second choices after everybody's first; evaluation has no capacity"
    )
    required_stats: frozenset[str] | None = None

    def __init__(self, *, width: int, num_experts: int, k: int, capacity_factor: float, num_groups: int | None = None):
        super().__init__()
        self.k, self.num_groups, self.num_experts = checked_k(k, num_experts, 2, "gshard"), num_groups, num_experts
        if not capacity_factor > 0:
            raise UserError(f"capacity_factor={capacity_factor} of the gate gshard: must be positive")
        self.capacity_factor = capacity_factor
        self.gate_DE = initial_matrix(width, num_experts, num_groups)

    def forward(self, x_TD: Tensor, group_T: Tensor | None = None) -> Gating:
        """Assign each token to its experts; float32 whatever the autocast type."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return self._gating(x_TD.to(self.gate_DE.dtype), group_T)

    def operations_per_timestep(self) -> int:
        """One matrix."""
        return self.gate_DE.numel() // (self.num_groups or 1)

    def _gating(self, x_TD: Tensor, group_T: Tensor | None) -> Gating:
        logit_TE = product(x_TD, self.gate_DE, group_T)
        top_TK, expert_TK = logit_TE.topk(self.k, dim=1)
        gate_TK = top_TK.softmax(dim=1)  # the two largest of a softmax, renormalised
        expert_TK, kept_TK, sums = numbered(expert_TK, group_T, self.num_experts), None, {}
        if self.training:
            sums = choice_sums(logit_TE, expert_TK, group_T, self.num_groups, self.required_stats)
            kept_TK = self._kept(gate_TK.detach(), expert_TK, group_T)
        return token_choice(expert_TK, gate_TK, self.num_experts * (self.num_groups or 1), kept_TK=kept_TK, sums=sums)

    def _kept(self, gate_TK: Tensor, expert_TK: Tensor, group_T: Tensor | None) -> Tensor:
        """Return which assignments find a place; a second choice that the draw leaves out takes none."""
        num_tokens, k = expert_TK.shape
        drawn_TK = torch.ones_like(expert_TK, dtype=torch.bool)
        if k == 2:
            drawn_TK[:, 1] = 2 * gate_TK[:, 1] > torch.rand_like(gate_TK[:, 1])
        # All first choices, then all second ones, each in the order of the tokens; who is not drawn stands elsewhere.
        nowhere = self.num_experts * (self.num_groups or 1)
        expert_KT = torch.where(drawn_TK, expert_TK, nowhere).t()
        place_TK = places(expert_KT.reshape(-1)).view(k, num_tokens).t()
        kept_TK = within_capacity(place_TK, self.capacity_factor, self.num_experts, group_T, self.num_groups)
        return drawn_TK & kept_TK
