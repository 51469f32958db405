"""Dispatch of tokens to rows, one for each assignment to an expert, and sums that combine rows to tokens.

With 300,000 tokens, four experts per token and rows of 512 and 1,024 numbers, every further pass over the rows reads or
writes gigabytes. On a GPU each operation is therefore a single Triton kernel.

Shape suffixes: T tokens, D width, A assignments.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lm.ops.operation import operation, triton_runs
from moe_lm.ops.routing import segment_ends, stable_sort_below


@operation
def dispatch(x_TD: Tensor, token_A: Tensor) -> Tensor:
    """Return x_AD, the token of every assignment; differentiable in x."""
    return x_TD.index_select(0, token_A)


def combine(y_AD: Tensor, token_A: Tensor, gate_A: Tensor, num_tokens: int) -> Tensor:
    """Return y_TD, the sum over a token's assignments of gate * y (eq. 1); a token without any gets zeros.

    Differentiable in y and the gates.
    """
    return _Combine.apply(y_AD, gate_A, token_A, num_tokens)


class RowOrder(NamedTuple):
    """Rows sorted by the token, or other number, that each belongs to."""

    order_A: Tensor
    """The rows' places, ascending by token (int64)."""
    ends_T: Tensor
    """The end of each token's rows in `order_A` (int64)."""


def row_order(token_A: Tensor, num_tokens: int) -> RowOrder:
    """Return the rows sorted by token; a token's rows stay in order."""
    sorted_A, order_A = stable_sort_below(token_A, num_tokens)
    return RowOrder(order_A, segment_ends(sorted_A, num_tokens))


@operation
def gather_weighted(x_TD: Tensor, token_A: Tensor, gate_A: Tensor) -> Tensor:
    """Return gate * x of every assignment's token, in the type of x. Not differentiable."""
    return (x_TD.index_select(0, token_A) * gate_A.unsqueeze(1)).to(x_TD.dtype)


@operation
def sum_by_token(y_AD: Tensor, token_A: Tensor, order: RowOrder, gate_A: Tensor | None = None) -> Tensor:
    """Return the sum of each token's rows, weighted if there are gates. Not differentiable.

    `order` is `row_order(token_A, T)`. Sums are float32, or of the type of y if that is wider.
    """
    wide_AD = y_AD if gate_A is None else y_AD * gate_A.unsqueeze(1)
    wide_AD = wide_AD.to(torch.promote_types(y_AD.dtype, torch.float32))
    return wide_AD.new_zeros(len(order.ends_T), y_AD.shape[1]).index_add_(0, token_A, wide_AD)


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
        return sum_by_token(grad_AD, token_A, row_order(token_A, ctx.num_tokens)), None


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


dispatch.register(_Dispatch.apply, when=lambda x_TD, _: triton_runs(x_TD) and x_TD.dtype == torch.float32)
gather_weighted.register("moe_lm.ops.triton.rows:gather_weighted", when=lambda x_TD, *_: triton_runs(x_TD))
sum_by_token.register("moe_lm.ops.triton.rows:sum_by_token", when=lambda y_AD, *_: triton_runs(y_AD))
