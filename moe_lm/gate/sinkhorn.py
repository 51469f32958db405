"""Balanced assignment by optimal transport: Sinkhorn's iterations in training, greedy in evaluation.

The idea is that of BASE layers (Lewis et al. 2021, arXiv 2103.16716: assign tokens evenly in training, greedily when
tested) in its entropy-regularised form (S-BASE, Clark et al. 2022, arXiv 2202.01169), with the gate values of
Megatron's router.

Shape suffixes: T tokens, D width, E experts (of a group), K experts a token, G groups.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from moe_lm.errors import UserError
from moe_lm.gate import Gating, checked_k
from moe_lm.gate.routing import (
    initial_matrix,
    logit_sums,
    numbered,
    of_tokens,
    product,
    summed,
    token_choice,
    tokens_of_groups,
)


class Sinkhorn(nn.Module):
    """G(x)_i = sigmoid(x W_g)_i where k = 1, else Softmax(x W_g)_i, for the k experts chosen, else 0.

    Chosen are, in training, the k largest of the transport plan of exp(x W_g) that gives every token the mass 1/T and
    every expert 1/E; in evaluation, the k largest of x W_g.
    """

    differentiable_stats: ClassVar[frozenset[str]] = frozenset({"importance_E", "log_z_squared"})
    non_causal_note: ClassVar[str] = (
        "assigns all tokens of the micro-batch together, evenly; evaluation gives each its own likeliest experts"
    )
    required_stats: frozenset[str] | None = None

    def __init__(
        self,
        *,
        width: int,
        num_experts: int,
        k: int,
        tolerance: float,
        max_iterations: int,
        num_groups: int | None = None,
    ):
        super().__init__()
        self.k, self.num_groups, self.num_experts = checked_k(k, num_experts), num_groups, num_experts
        if not tolerance > 0 or max_iterations < 1:
            raise UserError(
                f"tolerance={tolerance} max_iterations={max_iterations} of the gate sinkhorn: "
                "must be positive and at least 1"
            )
        self.tolerance, self.max_iterations = tolerance, max_iterations
        self.gate_DE = initial_matrix(width, num_experts, num_groups)

    def forward(self, x_TD: Tensor, group_T: Tensor | None = None) -> Gating:
        """Assign each token to its k experts; float32 whatever the autocast type."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logit_TE = product(x_TD.to(self.gate_DE.dtype), self.gate_DE, group_T)
            gate_TE = logit_TE.sigmoid() if self.k == 1 else logit_TE.softmax(dim=1)
            preferred_TE = logit_TE.detach()
            if self.training:
                preferred_TE = transport_plan(
                    preferred_TE, self.tolerance, self.max_iterations, group_T, self.num_groups
                )
            expert_TK = preferred_TE.topk(self.k, dim=1).indices
            return token_choice(
                numbered(expert_TK, group_T, self.num_experts),
                gate_TE.gather(1, expert_TK),
                self.num_experts * (self.num_groups or 1),
                sums=logit_sums(logit_TE, self.required_stats) if self.training else {},
            )

    def operations_per_timestep(self) -> int:
        """One matrix; the transport plan is no product with the token."""
        return self.gate_DE.numel() // (self.num_groups or 1)


def transport_plan(
    logit_TE: Tensor,
    tolerance: float,
    max_iterations: int,
    group_T: Tensor | None = None,
    num_groups: int | None = None,
) -> Tensor:
    """Return d_0 K d_1 (T, E) with K = exp(logits), of each group by itself.

    In turn d_0 = (1/T) / (K d_1), so that every token has the mass 1/T, and d_1 = (1/E) / (K^T d_0), every expert
    1/E, from d_1 = 1, until the mean change of d_1 is below the tolerance.
    """
    num_tokens, num_experts = logit_TE.shape
    # A row's factor is made up for by d_0, and this one keeps exp from overflowing.
    kernel_TE = (logit_TE - logit_TE.amax(dim=1, keepdim=True)).exp()
    tokens_G1 = tokens_of_groups(num_tokens, group_T, num_groups).to(kernel_TE).unsqueeze(1)
    mass_T1 = of_tokens(1 / tokens_G1.clamp(min=1), group_T)
    least = torch.finfo(kernel_TE.dtype).tiny
    d1_GE = kernel_TE.new_ones(len(tokens_G1), num_experts)
    d0_T1, moving_G1 = mass_T1, tokens_G1 > 0
    for _ in range(max_iterations):
        d0_T1 = mass_T1 / (kernel_TE * of_tokens(d1_GE, group_T)).sum(dim=1, keepdim=True).clamp(min=least)
        new_GE = (1 / num_experts) / summed(kernel_TE * d0_T1, group_T, num_groups).clamp(min=least)
        change_G1 = (new_GE - d1_GE).abs().mean(dim=1, keepdim=True)
        d1_GE = torch.where(moving_G1, new_GE, d1_GE)
        moving_G1 = moving_G1 & (change_G1 >= tolerance)
        if not moving_G1.any():
            break
    return d0_T1 * kernel_TE * of_tokens(d1_GE, group_T)
