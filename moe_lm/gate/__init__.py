"""What a gate is: it sends tokens to experts and says how much each expert's answer counts.

Shape suffixes: T tokens, D width, E experts, K experts a token, A assignments, G groups of experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from moe_lm.mistake import Mistake


@dataclass(frozen=True)
class Gating:
    """A gate's decision: a flat list of assignments, ascending by expert and then by token."""

    token_A: Tensor
    """int64: which token."""
    expert_A: Tensor
    """int64: which expert."""
    gate_A: Tensor
    """float32: the weight of this expert's answer, G(x)_i."""
    num_tokens: int
    importance_E: Tensor
    """Sum of the gate values each expert received (eq. 6)."""
    load_E: Tensor
    """Assignments each expert received: the smooth estimate (eq. 10) or, without noise, their number."""
    num_asked: int
    """Assignments that the gate asked for."""
    num_dropped: int = 0
    """Assignments lost to a capacity limit; `num_asked` - `num_dropped` are in the list."""
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    """Further additive statistics that balance losses may read, by name."""

    @property
    def num_experts(self) -> int:
        """Number of experts, E."""
        return self.importance_E.numel()

    def statistics(self) -> dict[str, Tensor]:
        """Return everything that balance losses read, as sums: additive over tokens and over processes."""
        return {"importance_E": self.importance_E, "load_E": self.load_E, **self.sums}

    def with_statistics(self, values: Mapping[str, Tensor]) -> "Gating":
        """Return the gating with other statistics in the place of its own, as of a larger batch."""
        sums = {name: values[name] for name in self.sums}
        return replace(self, importance_E=values["importance_E"], load_E=values["load_E"], sums=sums)


class Gate(Protocol):
    """A gating network, G(x), or, made with `num_groups`, one for each group of experts (Appendix B)."""

    num_experts: int
    """Experts to choose among, with groups those of one group."""
    needs_loss: str | None = None
    """Name of the balance loss without which the gate would not learn what it needs at evaluation."""

    def __call__(self, x_TD: Tensor, group_T: Tensor | None = None) -> Gating:
        """Assign each token to experts.

        With groups, row t is offered the experts of its group alone; `group_T` (int64) ascends, and expert j of
        group g has the number g * num_experts + j.
        """
        ...

    def operations_per_timestep(self) -> int:
        """Multiply-adds a token costs in the gate's matrices, with groups those of one group."""
        ...


def checked_k(k: int, num_experts: int) -> int:
    """Return k; raises `Mistake` where there are not as many experts."""
    if not 1 <= k <= num_experts:
        raise Mistake(
            f"model.k={k} experts a token of model.num_experts={num_experts}: "
            "k must be at least 1 and at most num_experts"
        )
    return k
