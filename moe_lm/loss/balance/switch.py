"""The Switch Transformer's balance loss (Fedus et al. 2021, arXiv 2101.03961, eq. 4-6)."""

from typing import ClassVar

from torch import Tensor

from moe_lm.gate import Gating
from moe_lm.loss.balance import checked_weight, matched_shares


class Switch:
    """E sum_i f_i P_i: f_i expert i's share of all choices before any capacity, P_i its mean probability.

    Only P carries a gradient. 1 where all are equal, which is the least for equal f and P.
    """

    stat: ClassVar[str] = "probability_E"

    def __init__(self, *, weight: float):
        self.weight = checked_weight(weight)

    def __call__(self, gating: Gating) -> Tensor:
        """Return the loss of the batch; of a gate that leaves no probabilities 0."""
        return matched_shares(gating, "requested_E")
