"""Strictly balanced gating (Appendix F): in training every expert takes equally many tokens of the batch.

Shape suffixes: T tokens, E experts of a group.
"""

import torch
from torch import Tensor

from moe_lm.gate import Gate, Gating, TokenGroups
from moe_lm.gate.routing import batchwise_mask


class StrictlyBalanced(Gate):
    """G(x)_i = G_sigma(x)_i M(G_sigma(x))_i / sum_j G_sigma(x)_j M(G_sigma(x))_j, G_sigma(x) = Softmax(x W_g).

    In training M is the batchwise mask, which looks at all tokens of the call; in evaluation M is the threshold mask,
    G_sigma(x)_i > T_i, which looks at one token. A token may get more than k experts, fewer, or none. T is learned by
    the loss that `needs_loss` names, from two additive sums computed in training: `threshold_gap`,
    sum_j sum_i (M_threshold - M_batchwise)(G_sigma(x_j)_i - T_i), and `threshold_tokens`, the number of tokens.
    """

    needs_loss = "batchwise"
    differentiable_stats = Gate.differentiable_stats | {"threshold_gap"}
    non_causal_note = (
        "lets each expert take equally many tokens of the micro-batch; evaluation uses the learned thresholds"
    )

    def __init__(self, **sizes: int | None):
        super().__init__(**sizes)
        # The gate values of a new W_g are close to 1/n: no threshold has far to go, and the loss starts near 0.
        self.register_per_expert("threshold_E", 1 / self.num_experts, learned=True)

    def init_matrix_(self, weight: Tensor) -> None:
        """Draw small numbers; with zeros, all experts would take the same tokens.

        As the numbers are small, a token's experts have about equal weights at first.
        """
        weight.normal_(std=0.01)

    def choose(self, logit_TE: Tensor, groups: TokenGroups) -> Gating:
        """Give each expert equally many tokens or, in evaluation, the tokens above its threshold."""
        threshold_TE = groups.per_token(self.threshold_E.view(-1, self.num_experts))
        gate_TE = logit_TE.softmax(dim=1)
        mask_TE, sums = gate_TE > threshold_TE, {}
        if self.training:
            above_TE, mask_TE = mask_TE, batchwise_mask(gate_TE.detach(), self.k, groups)
            surplus_TE = above_TE.to(gate_TE.dtype) - mask_TE.to(gate_TE.dtype)
            sums["threshold_gap"] = (surplus_TE * (gate_TE - threshold_TE)).sum()
            sums["threshold_tokens"] = gate_TE.new_full((), len(gate_TE))
        return self.expert_choice(mask_TE, masked_softmax(logit_TE, mask_TE), logit_TE, groups, sums)


def masked_softmax(logit_TE: Tensor, mask_TE: Tensor) -> Tensor:
    """Return Softmax(logits) M / sum_j (Softmax(logits) M)_j where M = 1, also where Softmax(logits) underflows to 0.

    A row without any M = 1 keeps its whole softmax, which is never read; masked with -inf everywhere, it would be NaN.
    """
    left_out_TE = ~mask_TE & mask_TE.any(dim=1, keepdim=True)
    return logit_TE.masked_fill(left_out_TE, -torch.inf).softmax(dim=1)
