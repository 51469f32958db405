"""What a gate is: it sends tokens to experts and says how much each expert's answer counts.

Shape suffixes: T tokens, D width, E experts, K experts a token, A assignments.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Gating:
    """A gate's decision: a flat list of assignments, ascending by expert and then by token.

    `importance_E`, `load_E` and every entry of `sums` are additive over tokens and over processes.
    """

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
    """Further statistics that balance losses may read, by name."""

    @property
    def num_experts(self) -> int:
        """Number of experts, E."""
        return self.importance_E.numel()


class Gate(Protocol):
    """A gating network, G(x)."""

    def __call__(self, x_TD: Tensor) -> Gating:
        """Assign each token to experts."""
        ...

    def operations_per_timestep(self) -> int:
        """Multiply-adds a token costs in the gate's matrices."""
        ...
