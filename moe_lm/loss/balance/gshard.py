"""GShard's balance loss (Lepikhin et al. 2020, arXiv 2006.16668, Algorithm 1)."""

from typing import ClassVar

from torch import Tensor

from moe_lm.gate import Gating
from moe_lm.loss.balance import checked_weight, matched_shares


class GShard:
    """E sum_i f_i P_i: f_i expert i's share of the first choices alone, P_i its mean probability.

    E^2 times what Algorithm 1 prints, (1/E) sum_e (c_e/S) m_e, as in the authors' code: so its value is 1 where all
    are equal and its weight means the same for any number of experts. Only P carries a gradient.
    """

    stat: ClassVar[str] = "probability_E"

    def __init__(self, *, weight: float):
        self.weight = checked_weight(weight)

    def __call__(self, gating: Gating) -> Tensor:
        """Return the loss of the batch; of a gate that leaves no probabilities 0."""
        return matched_shares(gating, "first_choice_E")
