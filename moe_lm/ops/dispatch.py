"""Tokens to experts and back: the rows of each expert side by side, and their gate-weighted sum (eq. 1).

Shape suffixes: T tokens, D width, A assignments.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lm.gate import Gating
from moe_lm.ops.backend import by_triton
from moe_lm.ops.token_rows import places, summed_by_token


def dispatch(x_TD: Tensor, gating: Gating) -> Tensor:
    """Return x_AD, the token of every assignment; contiguous rows per expert, as `gating` is sorted."""
    if by_triton(x_TD) and x_TD.dtype == torch.float32:
        return _Dispatch.apply(x_TD, gating.token_A)
    return x_TD.index_select(0, gating.token_A)


def combine(y_AD: Tensor, gating: Gating) -> Tensor:
    """Return y_TD = sum over a token's assignments of G(x)_i E_i(x) (eq. 1); a token without any gets zeros."""
    return _Combine.apply(y_AD, gating.gate_A, gating.token_A, gating.num_tokens)


class _Dispatch(torch.autograd.Function):
    """A gather whose gradient is summed a token at a time, not by a GPU's atomic additions."""

    @staticmethod
    def forward(ctx, x_TD, token_A):
        ctx.save_for_backward(token_A)
        ctx.num_tokens = len(x_TD)
        return x_TD.index_select(0, token_A)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_AD):
        (token_A,) = ctx.saved_tensors
        return summed_by_token(grad_AD, token_A, places(token_A, ctx.num_tokens)), None


class _Combine(torch.autograd.Function):
    """The weighted sum, keeping only its inputs for backward: the products gate * y are never stored."""

    @staticmethod
    def forward(ctx, y_AD, gate_A, token_A, num_tokens):
        ctx.save_for_backward(y_AD, gate_A, token_A)
        weighted_AD = y_AD * gate_A.unsqueeze(1)
        return weighted_AD.new_zeros(num_tokens, y_AD.shape[1]).index_add_(0, token_A, weighted_AD)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD):
        y_AD, gate_A, token_A = ctx.saved_tensors
        grad_AD = grad_TD.index_select(0, token_A)
        grad_gate_A = (grad_AD * y_AD).sum(dim=1)
        return (grad_AD * gate_A.unsqueeze(1)).to(y_AD.dtype), grad_gate_A.to(gate_A.dtype), None, None
