"""What a balance loss is: a penalty on how unevenly a gate serves its experts."""

from typing import Protocol

from torch import Tensor

from moe_lm.gate import Gating
from moe_lm.mistake import Mistake


class BalanceLoss(Protocol):
    """A scalar from a gating's global statistics; the objective multiplies it by `weight`."""

    weight: float
    teaches: bool = False
    """Whether it is there for gates that name it as their `needs_loss`, and idle without one."""

    def __call__(self, gating: Gating) -> Tensor:
        """Return the unweighted loss; reads additive statistics only, never single assignments."""
        ...


def checked_weight(weight: float) -> float:
    """Return the weight; raises `Mistake` for one that would reward imbalance."""
    if not weight >= 0:
        raise Mistake(f"balance weight {weight}: must be at least 0")
    return weight


def squared_coefficient_of_variation(x_E: Tensor) -> Tensor:
    """CV(x)^2: population variance over squared mean; the epsilon keeps a batch without tokens at 0."""
    return x_E.var(correction=0) / (x_E.mean().square() + 1e-10)
