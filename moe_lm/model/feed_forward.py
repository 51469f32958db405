"""The dense layer that replaces the mixture in MoE-1-Wide and MoE-1-Deep (Appendix C.1).

Shape suffixes: T tokens, D width.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from moe_lm.data.batch import PaddedLayout
from moe_lm.model import Layer
from moe_lm.model.init import init_uniform_


class FeedForward(Layer):
    """A single expert without a gate: `num_hidden` ReLU layers of `hidden` units, no biases, sigmoid on top."""

    def __init__(self, *, width: int, hidden: int, num_hidden: int):
        super().__init__()
        if min(width, hidden, num_hidden) < 1:
            raise ValueError(f"feed_forward: width={width} hidden={hidden} num_hidden={num_hidden} must be at least 1")
        sizes = [width, *[hidden] * num_hidden, width]
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(a, b)) for a, b in pairwise(sizes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights, each with the variance that keeps the activations' scale."""
        for weight in self.weights[:-1]:
            init_uniform_(weight, math.sqrt(2 / weight.shape[0]))
        init_uniform_(self.weights[-1], math.sqrt(1 / self.weights[-1].shape[0]))

    def forward(self, x_TD: Tensor, layout: PaddedLayout) -> tuple[Tensor, None]:  # noqa: ARG002
        """Return sigmoid(ReLU(... ReLU(x W_1) ...) W_last)."""
        for weight in self.weights[:-1]:
            x_TD = (x_TD @ weight).relu()
        return (x_TD @ self.weights[-1]).sigmoid(), None

    def operations_per_timestep(self) -> int:
        """Return the multiply-adds of one product per matrix."""
        return sum(weight.numel() for weight in self.weights)
