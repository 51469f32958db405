"""Experts that take m tokens each while no token has more than b: entropy-regularised transport (Dykstra's algorithm).

An option of Expert Choice (Zhou et al. 2022, arXiv 2202.09368, section 3.3).

Shape suffixes: T tokens, E experts of a group, G groups.
"""

import torch
from torch import Tensor

from moe_lm.gate import TokenGroups
from moe_lm.gate.routing import batchwise_mask, equal_share, log_sums

_TOLERANCE = 1e-4
"""Largest change of the log of an expert's sum at which the projections have converged."""


def capped_choice(
    score_TE: Tensor,
    per_token: float,
    max_experts: int,
    groups: TokenGroups,
    *,
    entropy_weight: float,
    max_iterations: int,
) -> Tensor:
    """Return which expert takes which token (bool, T by E): by the plan, m tokens per expert and b experts per token.

    As the plan holds fractions, an expert's m largest entries can give a token more than b experts. Such a token keeps
    its b largest, and the experts that lose it take their next best tokens with room, if need be after other tokens
    have changed experts. Every expert gets m tokens; a token has more than b experts only if no choice could avoid it.
    """
    plan_TE = transport_plan(
        score_TE, per_token, max_experts, groups, entropy_weight=entropy_weight, max_iterations=max_iterations
    )
    mask_TE = batchwise_mask(plan_TE, per_token, groups)
    full_T1 = torch.zeros_like(mask_TE[:, :1])
    while True:
        over_T1 = mask_TE.sum(dim=1, keepdim=True) > max_experts
        if not (over_T1 & ~full_T1).any():
            return _relieved(mask_TE, plan_TE, max_experts, groups) if over_T1.any() else mask_TE
        kept_TE = at_most(plan_TE, mask_TE, max_experts)
        full_T1 = kept_TE.sum(dim=1, keepdim=True) >= max_experts
        # An expert keeps the tokens that keep it; full tokens come last, and are taken only where no other is left.
        wish_TE = torch.where(full_T1, plan_TE - 2, plan_TE).masked_fill(kept_TE, torch.inf)
        mask_TE = batchwise_mask(wish_TE, per_token, groups)


def at_most(value_TE: Tensor, mask_TE: Tensor, count: int) -> Tensor:
    """Return the mask with only each token's `count` experts of largest value left; of equal ones, the first stay."""
    if count >= mask_TE.shape[1]:
        return mask_TE
    value_TE = value_TE.masked_fill(~mask_TE, -torch.inf)
    order_TE = value_TE.argsort(dim=1, descending=True, stable=True)[:, :count]
    return mask_TE & torch.zeros_like(mask_TE).scatter(1, order_TE, True)


def _relieved(mask_TE: Tensor, plan_TE: Tensor, max_experts: int, groups: TokenGroups) -> Tensor:
    """Take experts from tokens that have too many, along chains that end at a token with room.

    The loop over tokens is short: once experts have taken their next best tokens, few tokens have too many experts.
    """
    device, mask_TE, plan_TE = mask_TE.device, mask_TE.cpu().clone(), plan_TE.cpu()
    sizes = groups.sizes().long().tolist()
    for mask, plan in zip(mask_TE.split(sizes), plan_TE.split(sizes), strict=True):  # views of each group's tokens
        for token in (mask.sum(dim=1) > max_experts).nonzero().squeeze(1).tolist():
            while mask[token].sum() > max_experts and _relieve_(mask, plan, max_experts, token):
                pass
    return mask_TE.to(device)


def _relieve_(mask_TE: Tensor, plan_TE: Tensor, max_experts: int, token: int) -> bool:
    """Take one expert from a token, in place, along a chain of experts; return whether there is such a chain.

    Each expert of the chain takes over a token of the next expert, and the last takes a token with room. The search is
    breadth first, so the chain is a shortest one. Without a chain, no choice of experts could relieve the token.
    """
    room_T1 = mask_TE.sum(dim=1, keepdim=True) < max_experts
    queue = [expert for expert in plan_TE[token].argsort().tolist() if mask_TE[token, expert]]
    gives_up = dict.fromkeys(queue, (token, None))  # expert: the token it gives up, and the expert that takes it
    for expert in queue:
        other_T = ~mask_TE[:, expert]
        with_room_T = other_T & room_T1.squeeze(1)
        if with_room_T.any():
            taken = int(plan_TE[:, expert].masked_fill(~with_room_T, -torch.inf).argmax())
            while expert is not None:
                mask_TE[taken, expert] = True
                taken, follower = gives_up[expert]
                mask_TE[taken, expert] = False
                expert = follower
            return True
        for next_ in (mask_TE & other_T.unsqueeze(1)).any(dim=0).nonzero().squeeze(1).tolist():
            if next_ not in gives_up:
                gain_T = plan_TE[:, expert] - plan_TE[:, next_]
                gives_up[next_] = (int(gain_T.masked_fill(~(other_T & mask_TE[:, next_]), -torch.inf).argmax()), expert)
                queue.append(next_)
    return False


def transport_plan(
    score_TE: Tensor,
    per_token: float,
    max_experts: int,
    groups: TokenGroups,
    *,
    entropy_weight: float,
    max_iterations: int,
) -> Tensor:
    """Return the A (T, E) that maximises <S, A> + entropy_weight * H(A) with H(A) = -sum A log A.

    Every expert's sum is m, every token's sum is at most b, and 0 <= A <= 1. Starting from exp(S / entropy_weight), A
    is projected in turn on these three sets by Bregman projections, in logs; the two sets of inequalities have
    Dykstra's corrections. Each group stops separately, once its experts' sums have converged.
    """
    log_TE = score_TE / entropy_weight
    size_G1 = groups.sizes().to(score_TE.device).unsqueeze(1)
    share_G1 = equal_share(per_token, groups).to(score_TE).clamp(min=1).log().unsqueeze(1)
    log_cap = torch.tensor(float(max_experts)).log().item()
    cap_T1, one_TE = torch.zeros_like(log_TE[:, :1]), torch.zeros_like(log_TE)
    active_G1 = size_G1 > 0
    for _ in range(max_iterations):
        # Each expert's sum: an equality needs no correction.
        off_GE = share_G1 - log_sums(log_TE, groups)
        # Each token's sum, after adding back what this set took away before.
        new_TE = log_TE + groups.per_token(off_GE) + cap_T1
        new_cap_T1 = (new_TE.logsumexp(dim=1, keepdim=True) - log_cap).clamp(min=0)
        # Each entry.
        new_TE = new_TE - new_cap_T1 + one_TE
        new_one_TE = new_TE.clamp(min=0)
        active_T1 = groups.per_token(active_G1)
        log_TE = torch.where(active_T1, new_TE - new_one_TE, log_TE)
        cap_T1, one_TE = torch.where(active_T1, new_cap_T1, cap_T1), torch.where(active_T1, new_one_TE, one_TE)
        active_G1 = active_G1 & (off_GE.abs().amax(dim=1, keepdim=True) > _TOLERANCE)
        if not active_G1.any():
            break
    return log_TE.exp()
