"""The load loss (Appendix A, eq. 8-11)."""

from typing import ClassVar

from torch import Tensor

from moe_lm.gate import Gating
from moe_lm.loss.balance import checked_weight, squared_coefficient_of_variation


class Load:
    """CV(Load(X))^2: experts should receive equal numbers of tokens."""

    stat: ClassVar[str] = "load_E"

    def __init__(self, *, weight: float):
        self.weight = checked_weight(weight)

    def __call__(self, gating: Gating) -> Tensor:
        """Return the squared coefficient of variation of the load."""
        return squared_coefficient_of_variation(gating.load_E)
