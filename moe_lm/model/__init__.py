"""The contract of a layer of the language model: tokens in, tokens out, and its gate's decision if it has one.

Shape suffixes: T tokens, D width.
"""

import math
from collections.abc import Mapping

from torch import Tensor, nn

from moe_lm.data.batch import PaddedLayout
from moe_lm.gate import Gate, Gating

_OUTPUT_ACTIVATIONS = {"sigmoid": nn.Sigmoid, "none": nn.Identity}


def output_activation_of(name: str) -> nn.Module:
    """Return the activation on top of a mixture or dense layer: the paper's sigmoid (Appendix C.1), or none."""
    if name not in _OUTPUT_ACTIVATIONS:
        raise ValueError(f"model.output_activation={name}: choose {' or '.join(_OUTPUT_ACTIVATIONS)}")
    return _OUTPUT_ACTIVATIONS[name]()


def checked_init_scale(scale: float) -> float:
    """Return the factor of the initial deviation of a layer's last matrix; raises ValueError if it is no factor."""
    if not 0 <= scale < math.inf:
        raise ValueError(f"model.output_init_scale={scale}: must be at least 0 and finite")
    return scale


class Layer(nn.Module):
    """One layer of the stack; the model adds dropout and the residual sum around it."""

    token_share: float = 1.0
    """Mean fraction of the batch's tokens that reach one of the layer's experts; a submodule may declare its own."""

    def forward(self, x_TD: Tensor, layout: PaddedLayout) -> tuple[Tensor, Gating | None]:
        """Return y_TD and the gating, or None for a layer without a gate."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw all parameters and reset all buffers, in an order that never changes: a seed fixes the weights."""
        raise NotImplementedError

    def operations_per_timestep(self) -> int:
        """Return the multiply-adds per token of the forward pass, the paper's ops/timestep."""
        raise NotImplementedError

    def gates(self) -> dict[str, Gate]:
        """Return the layer's gates by attribute name."""
        return {}

    @property
    def differentiable_stats(self) -> frozenset[str]:
        """Names of the gating statistics through which a balance loss's gradient reaches a gate."""
        return frozenset()

    def adapt(self, statistics: Mapping[str, Tensor]) -> None:
        """After an update, let the gates change buffers (biases, thresholds) by the global batch's statistics."""
