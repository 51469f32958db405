"""The router z-loss (Zoph et al. 2022, ST-MoE, arXiv 2202.08906, eq. 5)."""

from typing import ClassVar

from torch import Tensor

from moe_lm.gate import Gating
from moe_lm.loss.balance import checked_weight


class ZLoss:
    """(1/T) sum_t (log sum_i exp(logit_ti))^2: keeps the gate's logits small.

    In a hierarchy it is the mean over the decisions of both levels.
    """

    stat: ClassVar[str] = "log_z_squared"

    def __init__(self, *, weight: float):
        self.weight = checked_weight(weight)

    def __call__(self, gating: Gating) -> Tensor:
        """Return the loss a token; of a gate that leaves no logits 0."""
        if "log_z_squared" not in gating.sums:
            return gating.importance_E.new_zeros(())
        return gating.sums["log_z_squared"] / gating.sums["num_tokens"].clamp(min=1)
