"""What gates have in common: logits, choices of tokens or of experts, capacity, and the sums that losses read.

Shape suffixes: T tokens, D width, E experts (of a group, or of all), K experts a token, A assignments, G groups.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moe_lm.gate import Gating
from moe_lm.ops.grouped_linear import grouped_product
from moe_lm.ops.segments import segment_sizes, segment_sum, stable_sort_below


def initial_matrix(width: int, num_experts: int, num_groups: int | None) -> nn.Parameter:
    """Return W_g as the Switch Transformer draws it: truncated normal of variance 0.1 / width.

    Not zero, as no noise tells the experts apart at first: all tokens would choose the same ones.
    """
    groups = () if num_groups is None else (num_groups,)
    deviation = math.sqrt(0.1 / width)
    weight = torch.empty(*groups, width, num_experts)
    return nn.Parameter(nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation))


def product(x_TD: Tensor, weight: Tensor, group_T: Tensor | None) -> Tensor:
    """Return the logits x W, of each token with the matrix of its group."""
    return x_TD @ weight if group_T is None else grouped_product(x_TD, weight, group_T)


def numbered(expert_TK: Tensor, group_T: Tensor | None, num_experts: int) -> Tensor:
    """Return the experts' numbers among all groups': expert j of group g is g * num_experts + j."""
    return expert_TK if group_T is None else expert_TK + (group_T * num_experts).unsqueeze(1)


def tokens_of_groups(num_tokens: int, group_T: Tensor | None, num_groups: int | None) -> Tensor:
    """Return how many tokens each group has (float64, G); without groups all are one."""
    if group_T is None:
        return torch.tensor([num_tokens], dtype=torch.float64)
    return segment_sizes(group_T, num_groups).double()


def summed(x_TE: Tensor, group_T: Tensor | None, num_groups: int | None) -> Tensor:
    """Return the sums over each group's tokens (G, E); without groups all are one."""
    return x_TE.sum(dim=0, keepdim=True) if group_T is None else segment_sum(x_TE, group_T, num_groups)


def of_tokens(x_GE: Tensor, group_T: Tensor | None) -> Tensor:
    """Return each token's row of its group; without groups the one row, for all."""
    return x_GE if group_T is None else x_GE.index_select(0, group_T)


def token_choice(
    expert_TK: Tensor,
    gate_TK: Tensor,
    num_experts: int,
    *,
    kept_TK: Tensor | None = None,
    load_E: Tensor | None = None,
    sums: Mapping[str, Tensor] | None = None,
) -> Gating:
    """Return the gating of tokens that each chose K of all `num_experts` experts, without those not `kept_TK`."""
    num_tokens, k = expert_TK.shape
    expert_A, order_A = stable_sort_below(expert_TK.reshape(-1), num_experts)
    if kept_TK is not None:
        place_A = kept_TK.reshape(-1).index_select(0, order_A).nonzero().squeeze(1)
        expert_A, order_A = expert_A.index_select(0, place_A), order_A.index_select(0, place_A)
    gate_A = gate_TK.reshape(-1).index_select(0, order_A)
    return Gating(
        token_A=order_A // k,
        expert_A=expert_A,
        gate_A=gate_A,
        num_tokens=num_tokens,
        importance_E=segment_sum(gate_A, expert_A, num_experts),
        load_E=segment_sizes(expert_A, num_experts).to(gate_A.dtype) if load_E is None else load_E,
        num_requested=num_tokens * k,
        num_dropped=num_tokens * k - expert_A.numel(),
        sums=sums or {},
    )


def expert_choice(
    mask_TE: Tensor,
    gate_TE: Tensor,
    group_T: Tensor | None,
    num_groups: int | None,
    sums: Mapping[str, Tensor] | None = None,
) -> Gating:
    """Return the gating of experts that take the tokens where `mask_TE`, each at its gate value."""
    num_tokens, num_experts = mask_TE.shape
    column_A, token_A = mask_TE.t().nonzero(as_tuple=True)
    expert_A = column_A
    if group_T is not None:
        expert_A, order_A = (group_T.index_select(0, token_A) * num_experts + column_A).sort(stable=True)
        column_A, token_A = column_A.index_select(0, order_A), token_A.index_select(0, order_A)
    gate_A = gate_TE.reshape(-1).index_select(0, token_A * num_experts + column_A)
    every = num_experts * (num_groups or 1)
    return Gating(
        token_A=token_A,
        expert_A=expert_A,
        gate_A=gate_A,
        num_tokens=num_tokens,
        importance_E=segment_sum(gate_A, expert_A, every),
        load_E=segment_sizes(expert_A, every).to(gate_A.dtype),
        num_requested=token_A.numel(),
        sums=sums or {},
    )


def logit_sums(logit_TE: Tensor, required_stats: frozenset[str] | None) -> dict[str, Tensor]:
    """Return what the z-loss reads, where it is required_stats."""
    if required_stats is not None and "log_z_squared" not in required_stats:
        return {}
    log_z_squared = logit_TE.logsumexp(dim=1).square().sum()
    return {"log_z_squared": log_z_squared, "num_tokens": logit_TE.new_full((), logit_TE.shape[0])}


def choice_sums(
    logit_TE: Tensor,
    expert_TK: Tensor,
    group_T: Tensor | None,
    num_groups: int | None,
    required_stats: frozenset[str] | None,
    probability_TE: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return what balance losses want of tokens that chose: choices before any capacity, probabilities, logits.

    The probabilities are the softmax of the logits where not given. Making them costs as much memory as the logits.
    """
    sums = logit_sums(logit_TE, required_stats)
    if required_stats is not None and "probability_E" not in required_stats:
        return sums
    probability_TE = logit_TE.softmax(dim=1) if probability_TE is None else probability_TE
    zeros_E = probability_TE.new_zeros(probability_TE.shape[1] * (num_groups or 1))
    ones_TK = torch.ones_like(expert_TK, dtype=zeros_E.dtype)
    return sums | {
        "requested_E": zeros_E.index_add(0, expert_TK.reshape(-1), ones_TK.reshape(-1)),
        "first_choice_E": zeros_E.index_add(0, expert_TK[:, 0], ones_TK[:, 0]),
        "probability_E": summed(probability_TE, group_T, num_groups).reshape(-1),
    }


def places(expert_A: Tensor) -> Tensor:
    """Return the place of each assignment in its expert's queue, from 0, in the order of the list."""
    sorted_A, order_A = expert_A.sort(stable=True)
    first_A = torch.searchsorted(sorted_A, sorted_A)
    every_A = torch.arange(len(expert_A), device=expert_A.device)
    return torch.empty_like(every_A).scatter(0, order_A, every_A - first_A)


def within_capacity(
    place_TK: Tensor, factor: float, num_experts: int, group_T: Tensor | None, num_groups: int | None
) -> Tensor:
    """Return which places in experts' queues there are: factor * K * tokens / experts upwards, at least 1."""
    num_tokens, k = place_TK.shape
    tokens_G1 = tokens_of_groups(num_tokens, group_T, num_groups).to(place_TK.device).unsqueeze(1)
    most_G1 = (factor * k * tokens_G1 / num_experts).ceil().clamp(min=1).long()
    return place_TK < of_tokens(most_G1, group_T)


def equal_share(per_token: float, num_experts: int, tokens_G: Tensor) -> Tensor:
    """Return m = per_token * tokens / experts to the nearest whole number (a half upwards), from 1 to all tokens."""
    return (per_token * tokens_G / num_experts + 0.5).floor().clamp(min=1).minimum(tokens_G).long()


def batchwise_mask(x_TE: Tensor, k: float, group_T: Tensor | None = None) -> Tensor:
    """M_batchwise: each expert takes the m tokens, of its group's, with the largest x; of equal ones the earlier.

    m = k|X|/n of the |X| tokens and n experts to the nearest whole number (a half upwards), at least 1. So a token
    gets k experts on average, or more where there are fewer than n/k tokens.
    """
    x_ET = x_TE.t().contiguous()
    return (_top_m(x_ET, k) if group_T is None else _top_m_of_groups(x_ET, k, group_T)).t()


def _top_m(x_ET: Tensor, k: float) -> Tensor:
    num_experts, num_tokens = x_ET.shape
    m = int(equal_share(k, num_experts, tokens_of_groups(num_tokens, None, None)))
    # Not the indices: which of equal values topk takes is not promised. (It takes a tenth of a sort's time.)
    least_E1 = x_ET.topk(m, dim=1).values[:, -1:]
    above_ET, equal_ET = x_ET > least_E1, x_ET == least_E1
    left_E1 = m - above_ET.sum(dim=1, keepdim=True)
    return above_ET | (equal_ET & (equal_ET.cumsum(dim=1) <= left_E1))


def _top_m_of_groups(x_ET: Tensor, k: float, group_T: Tensor) -> Tensor:
    """Sorts by value and then, stably, by group: place t of every expert's row then belongs to group_T[t]."""
    num_experts, num_tokens = x_ET.shape
    order_ET = x_ET.argsort(dim=1, descending=True, stable=True)
    by_group_ET = group_T.expand_as(order_ET).gather(1, order_ET).argsort(dim=1, stable=True)
    order_ET = order_ET.gather(1, by_group_ET)
    start_T, end_T = torch.searchsorted(group_T, group_T), torch.searchsorted(group_T, group_T, right=True)
    rank_T = torch.arange(num_tokens, device=group_T.device) - start_T
    taken_T = rank_T < equal_share(k, num_experts, (end_T - start_T).double())
    return torch.zeros_like(x_ET, dtype=torch.bool).scatter(1, order_ET, taken_T.expand_as(order_ET))
