"""What several gates' equations have in common: capacity, and choices that experts make over a batch.

Shape suffixes: T tokens, E experts of a group, K experts a token, A assignments, G groups.
"""

import torch
from torch import Tensor

from moe_lm.gate import TokenGroups


def within_capacity(
    expert_TK: Tensor, capacity_factor: float, groups: TokenGroups, queued_TK: Tensor | None = None
) -> Tensor:
    """Return which assignments find a place with their expert.

    An expert has capacity_factor * K * tokens / experts places, rounded up, at least 1. All first choices come before
    any second one, each in the order of the tokens. Assignments where `queued_TK` is false take no place.
    """
    num_tokens, k = expert_TK.shape
    numbers_TK = groups.expert_numbers(expert_TK)
    if queued_TK is not None:
        numbers_TK = numbers_TK.masked_fill(~queued_TK, -1)  # they form a queue of their own
    place_TK = _places(numbers_TK.t().reshape(-1)).view(k, num_tokens).t()
    size_G1 = groups.sizes().to(place_TK.device).unsqueeze(1)
    capacity_G1 = (capacity_factor * k * size_G1 / groups.num_experts).ceil().clamp(min=1).long()
    kept_TK = place_TK < groups.per_token(capacity_G1)
    return kept_TK if queued_TK is None else queued_TK & kept_TK


def _places(expert_A: Tensor) -> Tensor:
    """Return the place of each assignment in its expert's queue, from 0, in the order of the list."""
    sorted_A, order_A = expert_A.sort(stable=True)
    first_A = torch.searchsorted(sorted_A, sorted_A)
    every_A = torch.arange(len(expert_A), device=expert_A.device)
    return torch.empty_like(every_A).scatter(0, order_A, every_A - first_A)


def equal_share(per_token: float, groups: TokenGroups) -> Tensor:
    """Return each group's m (int64, G): the number of tokens per expert if all experts have equally many.

    m = per_token * tokens / experts to the nearest whole number (a half upwards), at least 1 and at most all tokens.
    """
    size_G = groups.sizes()
    return (per_token * size_G / groups.num_experts + 0.5).floor().clamp(min=1).minimum(size_G).long()


def batchwise_mask(x_TE: Tensor, per_token: float, groups: TokenGroups) -> Tensor:
    """Return M_batchwise (T, E): each expert takes its group's m tokens with the largest x, the earlier of equal ones.

    m is `equal_share`, so a token gets `per_token` experts on average, or more where tokens are few.
    """
    x_ET, m_G = x_TE.t().contiguous(), equal_share(per_token, groups)
    return (_top_m(x_ET, int(m_G)) if groups.group_T is None else _top_m_of_groups(x_ET, m_G, groups)).t()


def _top_m(x_ET: Tensor, m: int) -> Tensor:
    # Tokens are compared with the m-th largest value, because topk does not promise which of several equal values it
    # returns. This takes a tenth of the time of a sort.
    least_E1 = x_ET.topk(m, dim=1).values[:, -1:]
    above_ET, equal_ET = x_ET > least_E1, x_ET == least_E1
    left_E1 = m - above_ET.sum(dim=1, keepdim=True)
    return above_ET | (equal_ET & (equal_ET.cumsum(dim=1) <= left_E1))


def _top_m_of_groups(x_ET: Tensor, m_G: Tensor, groups: TokenGroups) -> Tensor:
    """Sort by value and then, stably, by group: place t of every expert's row then belongs to group_T[t]."""
    group_T = groups.group_T
    order_ET = x_ET.argsort(dim=1, descending=True, stable=True)
    by_group_ET = group_T.expand_as(order_ET).gather(1, order_ET).argsort(dim=1, stable=True)
    order_ET = order_ET.gather(1, by_group_ET)
    rank_T = torch.arange(len(group_T), device=group_T.device) - torch.searchsorted(group_T, group_T)
    taken_T = rank_T < groups.per_token(m_G)
    return torch.zeros_like(x_ET, dtype=torch.bool).scatter(1, order_ET, taken_T.expand_as(order_ET))


def log_sums(log_TE: Tensor, groups: TokenGroups) -> Tensor:
    """Return the log of the sum of exp over each group's tokens (G, E); 0 for a group without any."""
    if groups.group_T is None:
        return log_TE.logsumexp(dim=0, keepdim=True) if len(log_TE) else log_TE.new_zeros(1, log_TE.shape[1])
    index_TE = groups.group_T.unsqueeze(1).expand_as(log_TE)
    largest_GE = log_TE.new_full((groups.num_groups, log_TE.shape[1]), -torch.inf)
    largest_GE = largest_GE.scatter_reduce(0, index_TE, log_TE, "amax")
    largest_GE = torch.where(largest_GE.isfinite(), largest_GE, 0)
    sum_GE = groups.sum((log_TE - groups.per_token(largest_GE)).exp())
    return torch.where(sum_GE > 0, sum_GE.clamp(min=torch.finfo(sum_GE.dtype).tiny).log() + largest_GE, 0)
