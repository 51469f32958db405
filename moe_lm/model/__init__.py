"""What a layer is: tokens in, tokens out, and what its gate decided if it has one.

Shape suffixes: T tokens, D width.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from moe_lm.data.sentences import Sentences
from moe_lm.gate import Gating


class Layer(Protocol):
    """One layer of the stack; dropout and the residual sum around it are the model's."""

    def __call__(self, x_TD: Tensor, sentences: Sentences) -> tuple[Tensor, Gating | None]:
        """Return y_TD and the gating, or None for a layer without a gate."""
        ...

    def operations_per_timestep(self) -> int:
        """Multiply-adds a token costs in the forward pass, as the paper's ops/timestep."""
        ...

    differentiable_stats: frozenset[str]
    """Of a layer with a gate: the statistics through which a balance loss's gradient reaches it."""

    def adapt(self, statistics: Mapping[str, Tensor]) -> None:
        """Of a layer with a gate: let its gates move what no gradient moves, by the global batch's statistics."""
