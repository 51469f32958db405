"""The loss that teaches a strictly balanced gate its thresholds (Appendix F)."""

from typing import ClassVar

from torch import Tensor

from moe_lm.gate import Gating
from moe_lm.loss.balance import checked_weight


class Batchwise:
    """L_batchwise(X, T, m) = sum_j sum_i (M_threshold - M_batchwise)(X_ji - T_i), masks constant, over |X|.

    The paper gives the sum over tokens, and no weight. A mean stands beside the mean nats a word, whatever the batch;
    at weight 1 the two are added as if both were sums over tokens. In a hierarchy it is the mean over the decisions of
    both levels.
    """

    stat: ClassVar[str] = "threshold_gap"

    def __init__(self, *, weight: float):
        self.weight = checked_weight(weight)

    def __call__(self, gating: Gating) -> Tensor:
        """Return the loss a token; of a gate without thresholds 0."""
        if "threshold_gap" not in gating.sums:
            return gating.importance_E.new_zeros(())
        return gating.sums["threshold_gap"] / gating.sums["threshold_tokens"].clamp(min=1)
