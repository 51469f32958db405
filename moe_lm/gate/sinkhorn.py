"""Balanced assignment by optimal transport: Sinkhorn's iterations in training, greedy choices in evaluation.

The idea is that of BASE layers (Lewis et al. 2021, arXiv 2103.16716: assign tokens evenly in training, greedily at test
time) in its entropy-regularised form (S-BASE, Clark et al. 2022, arXiv 2202.01169), with the gate values of Megatron's
router.

Shape suffixes: T tokens, E experts of a group, K experts a token, G groups.
"""

import torch
from torch import Tensor

from moe_lm.gate import Gate, Gating, TokenGroups


class Sinkhorn(Gate):
    """G(x)_i = sigmoid(x W_g)_i if k = 1, else Softmax(x W_g)_i, for the k chosen experts, and 0 for all others.

    In training a token chooses the experts with its k largest entries in the transport plan of exp(x W_g), in which
    every token has the mass 1/T and every expert the mass 1/E; in evaluation, with the k largest entries of x W_g.
    """

    non_causal_note = (
        "assigns all tokens of the micro-batch together, evenly; evaluation gives each token its likeliest experts"
    )

    def __init__(self, *, tolerance: float, max_iterations: int, **sizes: int | None):
        super().__init__(**sizes)
        if not tolerance > 0 or max_iterations < 1:
            raise ValueError(
                f"tolerance={tolerance} max_iterations={max_iterations} of the gate sinkhorn: "
                "must be positive and at least 1"
            )
        self.tolerance, self.max_iterations = tolerance, max_iterations

    def choose(self, logit_TE: Tensor, groups: TokenGroups) -> Gating:
        """Send each token to the experts with the k largest entries of its plan or, in evaluation, of its logits."""
        gate_TE = logit_TE.sigmoid() if self.k == 1 else logit_TE.softmax(dim=1)
        score_TE = logit_TE.detach()
        if self.training:
            score_TE = transport_plan(score_TE, groups, self.tolerance, self.max_iterations)
        expert_TK = score_TE.topk(self.k, dim=1).indices
        return self.token_choice(expert_TK, gate_TE.gather(1, expert_TK), logit_TE, groups)


def transport_plan(logit_TE: Tensor, groups: TokenGroups, tolerance: float, max_iterations: int) -> Tensor:
    """Return d_0 K d_1 (T, E) with K = exp(logits), for each group separately.

    From d_1 = 1, alternates d_0 = (1/T) / (K d_1), which gives every token the mass 1/T, and d_1 = (1/E) / (K^T d_0),
    which gives every expert the mass 1/E, until the mean change of d_1 is below the tolerance.
    """
    num_experts = logit_TE.shape[1]
    # Dividing a row by its largest entry changes d_0 only, and keeps exp from overflowing.
    kernel_TE = (logit_TE - logit_TE.amax(dim=1, keepdim=True)).exp()
    size_G1 = groups.sizes().to(kernel_TE).unsqueeze(1)
    mass_T1 = groups.per_token(1 / size_G1.clamp(min=1))
    least = torch.finfo(kernel_TE.dtype).tiny
    d1_GE = kernel_TE.new_ones(len(size_G1), num_experts)
    d0_T1, active_G1 = mass_T1, size_G1 > 0
    for _ in range(max_iterations):
        d0_T1 = mass_T1 / (kernel_TE * groups.per_token(d1_GE)).sum(dim=1, keepdim=True).clamp(min=least)
        new_GE = (1 / num_experts) / groups.sum(kernel_TE * d0_T1).clamp(min=least)
        change_G1 = (new_GE - d1_GE).abs().mean(dim=1, keepdim=True)
        d1_GE = torch.where(active_G1, new_GE, d1_GE)
        active_G1 = active_G1 & (change_G1 >= tolerance)
        if not active_G1.any():
            break
    return d0_T1 * kernel_TE * groups.per_token(d1_GE)
