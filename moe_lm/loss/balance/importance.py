"""The importance loss (section 4, eq. 6-7)."""

from typing import ClassVar

from torch import Tensor

from moe_lm.gate import Gating
from moe_lm.loss.balance import checked_weight, squared_coefficient_of_variation


class Importance:
    """CV(Importance(X))^2: experts should receive equal sums of gate values."""

    stat: ClassVar[str] = "importance_E"

    def __init__(self, *, weight: float):
        self.weight = checked_weight(weight)

    def __call__(self, gating: Gating) -> Tensor:
        """Return the squared coefficient of variation of the importance."""
        return squared_coefficient_of_variation(gating.importance_E)
