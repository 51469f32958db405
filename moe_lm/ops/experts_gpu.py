"""Experts by grouped GEMM, for GPUs under autocast.

There is no launch per expert, and the host does not wait to learn how many rows an expert has. `moe_mlp` is one
autograd node, which keeps neither expert inputs nor expert outputs for the backward pass.

Shape suffixes: T tokens, D width, H expert hidden, E experts, A assignments.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from moe_lm.ops.grouped_gemm import ExpertRows, cast_weights, differentiable_grouped_mm, grouped_mm, grouped_outer
from moe_lm.ops.operation import operation, triton_runs
from moe_lm.ops.routing import segment_ends
from moe_lm.ops.token_dispatch import RowOrder, gather_weighted, row_order, sum_by_token


def moe_mlp(
    x_TD: Tensor,
    token_A: Tensor,
    expert_A: Tensor,
    gate_A: Tensor,
    w1_EDH: Tensor,
    w2_EHD: Tensor,
    *,
    recompute: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute `moe_lm.ops.experts.moe_mlp` with products in `dtype` (default: autocast's) and sums in float32.

    `recompute` also casts x and the matrices again in the backward pass instead of keeping the cast tensors.
    """
    dtype = dtype or torch.get_autocast_dtype("cuda")
    rows = ExpertRows(segment_ends(expert_A, len(w1_EDH)), len(token_A))
    return _MoEMLP.apply(x_TD, token_A, gate_A, rows, w1_EDH, w2_EHD, dtype, recompute)


def grouped_mlp(
    x_AD: Tensor,
    expert_A: Tensor,
    w1_EDH: Tensor,
    w2_EHD: Tensor,
    *,
    recompute: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute `moe_lm.ops.experts.grouped_mlp` with products in `dtype` (default: autocast's).

    `recompute` keeps only the arguments for the backward pass, neither h_AH nor cast tensors.
    """
    arguments = x_AD, expert_A, w1_EDH, w2_EHD, dtype or torch.get_autocast_dtype("cuda")
    if recompute:
        return checkpoint(_two_products, *arguments, use_reentrant=False, preserve_rng_state=False)
    return _two_products(*arguments)


def _two_products(x_AD: Tensor, expert_A: Tensor, w1_EDH: Tensor, w2_EHD: Tensor, dtype: torch.dtype) -> Tensor:
    rows = ExpertRows(segment_ends(expert_A, len(w1_EDH)), len(x_AD))
    h_AH = differentiable_grouped_mm(x_AD.to(dtype), w1_EDH, rows).relu()
    return differentiable_grouped_mm(h_AH, w2_EHD, rows).to(x_AD.dtype)


class _MoEMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, token_A, gate_A, rows, w1_EDH, w2_EHD, dtype, recompute):
        order = row_order(token_A, len(x_TD))
        x, w1, w2 = x_TD.to(dtype), cast_weights(w1_EDH, dtype), cast_weights(w2_EHD, dtype)
        h_AH = grouped_mm(x, token_A, w1, rows, relu=True)
        y_AD = grouped_mm(h_AH, None, w2, rows)
        kept = (x_TD, None, None, None) if recompute else (x, w1, w2, h_AH)
        ctx.save_for_backward(token_A, gate_A, *order, w1_EDH, w2_EHD, *kept)
        ctx.rows, ctx.dtype, ctx.x_dtype = rows, dtype, x_TD.dtype
        return sum_by_token(y_AD, token_A, order, gate_A).to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD):
        token_A, gate_A, order_A, ends_T, w1_EDH, w2_EHD, x_TD, w1, w2, h_AH = ctx.saved_tensors
        rows, dtype = ctx.rows, ctx.dtype
        x_TD, grad_TD = x_TD.to(dtype), grad_TD.to(dtype)
        if w1 is None:
            w1, w2 = cast_weights(w1_EDH, dtype), cast_weights(w2_EHD, dtype)
            h_AH = grouped_mm(x_TD, token_A, w1, rows, relu=True)
        grad_h_AH = grouped_mm(grad_TD, token_A, w2.mT, rows)
        del w2  # a recomputed copy is freed here: with billions of parameters each copy counts
        grad_gate_A = hidden_gradient_(grad_h_AH, h_AH, gate_A)
        grad_x_AD = grouped_mm(grad_h_AH, None, w1.mT, rows)
        del w1
        grad_x_TD = sum_by_token(grad_x_AD, token_A, RowOrder(order_A, ends_T)).to(ctx.x_dtype)
        del grad_x_AD
        grad_w1_EDH = grouped_outer(x_TD, token_A, grad_h_AH, rows, w1_EDH.dtype)
        del grad_h_AH
        grad_AD = gather_weighted(grad_TD, token_A, gate_A)
        grad_w2_EHD = grouped_outer(h_AH, None, grad_AD, rows, w2_EHD.dtype)
        return grad_x_TD, None, grad_gate_A.to(gate_A.dtype), None, grad_w1_EDH, grad_w2_EHD, None, None


@operation
def hidden_gradient_(grad_AH: Tensor, h_AH: Tensor, gate_A: Tensor) -> Tensor:
    """Return each gate's gradient, grad . h, and replace grad by gate * grad where h > 0, else by 0."""
    grad_gate_A = (grad_AH.to(gate_A.dtype) * h_AH).sum(dim=1)
    grad_AH.copy_(torch.where(h_AH > 0, grad_AH * gate_A.unsqueeze(1), 0))
    return grad_gate_A


hidden_gradient_.register("moe_lm.ops.triton.rows:hidden_gradient_", when=lambda grad_AH, *_: triton_runs(grad_AH))
