"""What a balance loss is: a penalty on how unevenly a gate serves its experts."""

from typing import Protocol

from torch import Tensor

from moe_lm.errors import UserError
from moe_lm.gate import Gating


class BalanceLoss(Protocol):
    """A scalar from a gating's global statistics; the objective multiplies it by `weight`."""

    weight: float
    stat: str
    """Name of the statistic through which its gradient reaches a gate: one that such a gate `differentiable_stats`."""

    def __call__(self, gating: Gating) -> Tensor:
        """Return the unweighted loss; reads additive statistics only, never single assignments."""
        ...


def checked_weight(weight: float) -> float:
    """Return the weight; raises `UserError` for one that would reward imbalance."""
    if not weight >= 0:
        raise UserError(f"balance weight {weight}: must be at least 0")
    return weight


def squared_coefficient_of_variation(x_E: Tensor) -> Tensor:
    """CV(x)^2: population variance over squared mean; the epsilon keeps a batch without tokens at 0."""
    return x_E.var(correction=0) / (x_E.mean().square() + 1e-10)


def matched_shares(gating: Gating, counted: str) -> Tensor:
    """E sum_i f_i P_i: f of the counts by that name, P the mean probability; 0 of a gate that leaves neither."""
    sums = gating.sums
    if counted not in sums or "probability_E" not in sums:
        return gating.importance_E.new_zeros(())
    count_E, probability_E = sums[counted], sums["probability_E"]
    share_E = count_E / count_E.sum().clamp(min=1)
    # Probabilities sum to 1 a token, so this is the number of tokens: a constant.
    num_tokens = probability_E.detach().sum().clamp(min=1e-10)
    return gating.num_experts * (share_E * probability_E).sum() / num_tokens
