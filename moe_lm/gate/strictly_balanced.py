"""Strictly balanced gating (Appendix F): in training every expert takes equally many tokens of the batch.

Shape suffixes: T tokens, D width, E experts (of a group), A assignments, G groups.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from moe_lm.gate import Gating, checked_k
from moe_lm.gate.routing import batchwise_mask, expert_choice, logit_sums, of_tokens, product


class StrictlyBalanced(nn.Module):
    """G(x)_i = G_sigma(x)_i M(G_sigma(x))_i / sum_j G_sigma(x)_j M(G_sigma(x))_j, G_sigma(x) = Softmax(x W_g).

    M is the batchwise mask in training, which looks at all tokens of the call, and the threshold mask in
    evaluation, G_sigma(x)_i > T_i, which looks at one. A token may get more than k experts, fewer, or none. Learning
    T takes the loss `needs_loss`; it reads two additive sums, left in training only: `threshold_gap`,
    sum_j sum_i (M_threshold - M_batchwise)(G_sigma(x_j)_i - T_i), and `threshold_tokens`, the number of tokens.
    """

    needs_loss: ClassVar[str] = "batchwise"
    differentiable_stats: ClassVar[frozenset[str]] = frozenset({"importance_E", "log_z_squared", "threshold_gap"})
    non_causal_note: ClassVar[str] = (
        "lets each expert take equally many tokens of the micro-batch; evaluation goes by learned thresholds"
    )
    required_stats: frozenset[str] | None = None

    def __init__(self, *, width: int, num_experts: int, k: int, num_groups: int | None = None):
        super().__init__()
        self.k, self.num_groups, self.num_experts = checked_k(k, num_experts), num_groups, num_experts
        groups = () if num_groups is None else (num_groups,)
        # Not zero, as no noise tells the experts apart: of equal gate values all would take the same tokens. Small,
        # so that at first a token's experts count about equally.
        self.gate_DE = nn.Parameter(torch.empty(*groups, width, num_experts).normal_(std=0.01))
        # Where the gate values of such a W_g lie: no threshold has far to go, and the loss starts near 0.
        self.threshold_E = nn.Parameter(torch.full(((num_groups or 1) * num_experts,), 1 / num_experts))

    def forward(self, x_TD: Tensor, group_T: Tensor | None = None) -> Gating:
        """Assign tokens to experts; float32 whatever the autocast type."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return self._gating(x_TD.to(self.gate_DE.dtype), group_T)

    def operations_per_timestep(self) -> int:
        """One matrix; the thresholds only compare."""
        return self.gate_DE.numel() // (self.num_groups or 1)

    def _gating(self, x_TD: Tensor, group_T: Tensor | None) -> Gating:
        logit_TE = product(x_TD, self.gate_DE, group_T)
        threshold_TE = of_tokens(self.threshold_E.view(-1, self.num_experts), group_T)
        gate_TE = logit_TE.softmax(dim=1)
        mask_TE, sums = gate_TE > threshold_TE, {}
        if self.training:
            above_TE, mask_TE = mask_TE, batchwise_mask(gate_TE.detach(), self.k, group_T)
            surplus_TE = above_TE.to(gate_TE.dtype) - mask_TE.to(gate_TE.dtype)
            sums = logit_sums(logit_TE, self.required_stats) | {
                "threshold_gap": (surplus_TE * (gate_TE - threshold_TE)).sum(),
                "threshold_tokens": gate_TE.new_full((), x_TD.shape[0]),
            }
        return expert_choice(mask_TE, masked_softmax(logit_TE, mask_TE), group_T, self.num_groups, sums)


def masked_softmax(logit_TE: Tensor, mask_TE: Tensor) -> Tensor:
    """Softmax(logits) M / sum_j (Softmax(logits) M)_j where M = 1, also where Softmax(logits) underflows to 0.

    A row without any M = 1 keeps the whole softmax, as none of it is read: of -inf alone it would be NaN.
    """
    left_out_TE = ~mask_TE & mask_TE.any(dim=1, keepdim=True)
    return logit_TE.masked_fill(left_out_TE, -torch.inf).softmax(dim=1)
