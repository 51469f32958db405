"""Each expert takes m tokens and no token has more than b experts: entropy-regularised, by Dykstra's projections.

Zhou et al. 2022, section 3.3. Shape suffixes: T tokens, E experts (of a group), G groups.
"""

import torch
from torch import Tensor

from moe_lm.gate.routing import batchwise_mask, equal_share, of_tokens, summed, tokens_of_groups

_SETTLED = 1e-4
"""Largest change of the logarithm of an expert's sum, at which the projections have arrived."""


def entropic_choice(
    score_TE: Tensor,
    per_token: float,
    max_experts: int,
    *,
    entropy_weight: float,
    max_iterations: int,
    group_T: Tensor | None = None,
    num_groups: int | None = None,
) -> Tensor:
    """Return who takes whom (bool, T by E): of each expert the m largest of the plan A, at most b of a token.

    Taking the m largest of A can leave tokens with more than b, as A is not whole: such a token keeps the b largest,
    and the experts that lose it take their next best among tokens with room, if need be by way of tokens that change
    hands. Every expert gets its m; a token has more than b only where no choice could spare it.
    """
    plan_TE = transport_plan(
        score_TE,
        per_token,
        max_experts,
        entropy_weight=entropy_weight,
        max_iterations=max_iterations,
        group_T=group_T,
        num_groups=num_groups,
    )
    mask_TE = batchwise_mask(plan_TE, per_token, group_T)
    closed_T1 = torch.zeros_like(mask_TE[:, :1])
    while True:
        count_T1 = mask_TE.sum(dim=1, keepdim=True)
        newly_T1 = (count_T1 > max_experts) & ~closed_T1
        if not newly_T1.any():
            return mask_TE if (count_T1 <= max_experts).all() else _relieved(mask_TE, plan_TE, max_experts, group_T)
        held_TE = at_most(plan_TE, mask_TE, max_experts)
        closed_T1 = held_TE.sum(dim=1, keepdim=True) >= max_experts
        # Who has a token keeps it; a token that is full comes last, and is taken only where no other is left.
        wish_TE = torch.where(closed_T1, plan_TE - 2, plan_TE).masked_fill(held_TE, torch.inf)
        mask_TE = batchwise_mask(wish_TE, per_token, group_T)


def _relieved(mask_TE: Tensor, plan_TE: Tensor, max_experts: int, group_T: Tensor | None) -> Tensor:
    """Move experts away from tokens with too many, along chains that end at a token with room.

    A loop over those tokens alone: of thousands there are a few, as the rest has found its place.
    """
    device, mask_TE, plan_TE = mask_TE.device, mask_TE.cpu().clone(), plan_TE.cpu()
    for token in (mask_TE.sum(dim=1) > max_experts).nonzero().squeeze(1).tolist():
        first, last = 0, len(mask_TE)
        if group_T is not None:
            of_group = (group_T == group_T[token]).nonzero()
            first, last = int(of_group[0]), int(of_group[-1]) + 1
        mask, plan = mask_TE[first:last], plan_TE[first:last]
        while mask[token - first].sum() > max_experts and _relieve(mask, plan, max_experts, token - first):
            pass
    return mask_TE.to(device)


def _relieve(mask_TE: Tensor, plan_TE: Tensor, max_experts: int, token: int) -> bool:
    """Take one expert from a token, in place: it takes another token, whose expert takes another, to one with room.

    Breadth first, so by the shortest chain; False where there is none: then every choice has such a token.
    """
    has_room_T = mask_TE.sum(dim=1) < max_experts
    queue = [expert for expert in plan_TE[token].argsort().tolist() if mask_TE[token, expert]]
    gives_up = dict.fromkeys(queue, (token, None))  # expert: the token it gives up, and who takes that
    for expert in queue:
        other_T = ~mask_TE[:, expert]
        if (other_T & has_room_T).any():
            taken = int(plan_TE[:, expert].masked_fill(~(other_T & has_room_T), -torch.inf).argmax())
            while expert is not None:
                mask_TE[taken, expert] = True
                taken, follower = gives_up[expert]
                mask_TE[taken, expert] = False
                expert = follower
            return True
        for next_ in (mask_TE & other_T.unsqueeze(1)).any(dim=0).nonzero().squeeze(1).tolist():
            if next_ not in gives_up:
                gain_T = (plan_TE[:, expert] - plan_TE[:, next_]).masked_fill(
                    ~(other_T & mask_TE[:, next_]), -torch.inf
                )
                gives_up[next_] = (int(gain_T.argmax()), expert)
                queue.append(next_)
    return False


def at_most(value_TE: Tensor, mask_TE: Tensor, count: int) -> Tensor:
    """Return the mask with the `count` experts of largest value alone for each token; of equal ones the first."""
    if count >= mask_TE.shape[1]:
        return mask_TE
    value_TE = value_TE.masked_fill(~mask_TE, -torch.inf)
    order_TE = value_TE.argsort(dim=1, descending=True, stable=True)[:, :count]
    return mask_TE & torch.zeros_like(mask_TE).scatter(1, order_TE, True)


def transport_plan(
    score_TE: Tensor,
    per_token: float,
    max_experts: int,
    *,
    entropy_weight: float,
    max_iterations: int,
    group_T: Tensor | None = None,
    num_groups: int | None = None,
) -> Tensor:
    """Return A (T, E), the largest <S, A> + entropy_weight * H(A) with H(A) = -sum A log A.

    Every expert's sum is m, every token's at most b, and 0 <= A <= 1. From exp(S / entropy_weight), Bregman
    projections on the three sets in turn, in logarithms; the two sets of inequalities have Dykstra's corrections.
    Each group stops by itself, once its experts' sums stand still.
    """
    log_TE = score_TE / entropy_weight
    tokens_G = tokens_of_groups(len(score_TE), group_T, num_groups).to(score_TE.device)
    share_G1 = equal_share(per_token, score_TE.shape[1], tokens_G).to(score_TE).clamp(min=1).log().unsqueeze(1)
    most = torch.tensor(float(max_experts)).log().item()
    of_cap_T1, of_one_TE = torch.zeros_like(log_TE[:, :1]), torch.zeros_like(log_TE)
    moving_G1 = (tokens_G > 0).unsqueeze(1)
    for _ in range(max_iterations):
        # Sums of each expert: an equality needs no correction.
        off_GE = share_G1 - _log_sums(log_TE, group_T, num_groups)
        new_TE = log_TE + of_tokens(off_GE, group_T)
        # Sums of each token, corrected by what this set took away before.
        new_TE = new_TE + of_cap_T1
        cap_T1 = (new_TE.logsumexp(dim=1, keepdim=True) - most).clamp(min=0)
        # Single entries.
        new_TE = new_TE - cap_T1 + of_one_TE
        one_TE = new_TE.clamp(min=0)
        moving_T1 = of_tokens(moving_G1, group_T)
        log_TE = torch.where(moving_T1, new_TE - one_TE, log_TE)
        of_cap_T1, of_one_TE = torch.where(moving_T1, cap_T1, of_cap_T1), torch.where(moving_T1, one_TE, of_one_TE)
        moving_G1 = moving_G1 & (off_GE.abs().amax(dim=1, keepdim=True) > _SETTLED)
        if not moving_G1.any():
            break
    return log_TE.exp()


def _log_sums(log_TE: Tensor, group_T: Tensor | None, num_groups: int | None) -> Tensor:
    """Return the logarithm of the sum of exp over each group's tokens (G, E); 0 for a group without any."""
    if group_T is None:
        return log_TE.logsumexp(dim=0, keepdim=True) if len(log_TE) else log_TE.new_zeros(1, log_TE.shape[1])
    index_TE = group_T.unsqueeze(1).expand_as(log_TE)
    largest_GE = log_TE.new_full((num_groups, log_TE.shape[1]), -torch.inf)
    largest_GE = largest_GE.scatter_reduce(0, index_TE, log_TE, "amax")
    largest_GE = torch.where(largest_GE.isfinite(), largest_GE, 0)
    sum_GE = summed((log_TE - of_tokens(largest_GE, group_T)).exp(), group_T, num_groups)
    return torch.where(sum_GE > 0, sum_GE.clamp(min=torch.finfo(sum_GE.dtype).tiny).log() + largest_GE, 0)
