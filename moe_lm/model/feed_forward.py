"""The dense layer that replaces the mixture in MoE-1-Wide and MoE-1-Deep (Appendix C.1).

Shape suffixes: T tokens, D width.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from moe_lm.data.batch import PaddedLayout
from moe_lm.model import Layer, checked_init_scale, output_activation_of
from moe_lm.ops.init import init_uniform_


class FeedForward(Layer):
    """A single expert without a gate: `num_hidden` ReLU layers of `hidden` units without biases.

    `output_activation` is on top, and the last matrix begins at `output_init_scale` times its usual deviation.
    """

    parameter_group = "feed_forward"

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        num_hidden: int,
        output_activation: str = "sigmoid",
        output_init_scale: float = 1.0,
    ):
        super().__init__()
        if min(width, hidden, num_hidden) < 1:
            raise ValueError(f"feed_forward: width={width} hidden={hidden} num_hidden={num_hidden} must be at least 1")
        sizes = [width, *[hidden] * num_hidden, width]
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(a, b)) for a, b in pairwise(sizes))
        self.output_init_scale = checked_init_scale(output_init_scale)
        self.output_activation = output_activation_of(output_activation)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights, each with the variance that keeps the activations' scale, the last one scaled."""
        for weight in self.weights[:-1]:
            init_uniform_(weight, math.sqrt(2 / weight.shape[0]))
        init_uniform_(self.weights[-1], self.output_init_scale * math.sqrt(1 / self.weights[-1].shape[0]))

    def forward(self, x_TD: Tensor, layout: PaddedLayout) -> tuple[Tensor, None]:  # noqa: ARG002
        """Return f(ReLU(... ReLU(x W_1) ...) W_last) with f the output activation."""
        for weight in self.weights[:-1]:
            x_TD = (x_TD @ weight).relu()
        return self.output_activation(x_TD @ self.weights[-1]), None

    def operations_per_timestep(self) -> int:
        """Return the multiply-adds of one product per matrix."""
        return sum(weight.numel() for weight in self.weights)
