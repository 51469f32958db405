"""Sentences side by side: tokens without padding, and the rectangle that an LSTM needs.

Shape suffixes: L timesteps, B sentences, T tokens, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sentences:
    """Where the tokens of a micro-batch stand in the padded (L, B) rectangle of its sentences."""

    num_steps: int
    num_sentences: int
    position_T: Tensor | None
    """int64, ascending: index into the flattened rectangle; None where nothing is padded."""

    def pad(self, x_TD: Tensor) -> Tensor:
        """Return x_LBD with zeros in the padding."""
        if self.position_T is not None:
            x_TD = _Place.apply(x_TD, self.position_T, self.num_steps * self.num_sentences)
        return x_TD.view(self.num_steps, self.num_sentences, -1)

    def unpad(self, x_LBD: Tensor) -> Tensor:
        """Return x_TD, the tokens alone."""
        x_TD = x_LBD.reshape(self.num_steps * self.num_sentences, -1)
        return x_TD if self.position_T is None else _Take.apply(x_TD, self.position_T)


class _Place(torch.autograd.Function):
    """Rows to distinct positions among zeros. Autograd's own backward would add where copying does."""

    @staticmethod
    def forward(ctx, x_TD, position_T, num_rows):
        ctx.save_for_backward(position_T)
        return x_TD.new_zeros(num_rows, x_TD.shape[1]).index_copy_(0, position_T, x_TD)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Take(torch.autograd.Function):
    """Rows from distinct positions; the reverse of `_Place`."""

    @staticmethod
    def forward(ctx, x, position_T):
        ctx.save_for_backward(position_T)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, position_T)

    @staticmethod
    def backward(ctx, grad_TD):
        (position_T,) = ctx.saved_tensors
        return grad_TD.new_zeros(ctx.num_rows, grad_TD.shape[1]).index_copy_(0, position_T, grad_TD), None
