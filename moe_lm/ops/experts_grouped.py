"""The weighted sum of experts (eq. 1) by grouped GEMM inside one autograd node: for GPUs under autocast.

No launch per expert and no wait for the counts. As in the loop for CPUs, neither the experts' inputs nor their answers
are kept for the backward pass.

Shape suffixes: T tokens, D width, H expert hidden, E experts, A assignments.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lm.ops.grouped_gemm import grouped_by
from moe_lm.ops.token_rows import Places, gathered, hidden_gradient_, places, summed_by_token


def experts_grouped(
    x_TD: Tensor,
    token_A: Tensor,
    gate_A: Tensor,
    ends_E: Tensor,
    w1_EDH: Tensor,
    w2_EHD: Tensor,
    dtype: torch.dtype,
    *,
    recompute: bool = False,
) -> Tensor:
    """Return y_TD, of each token the sum over its assignments of gate * ReLU(x W1) W2, zeros where there are none.

    Assignments are sorted by expert, those of expert e end at `ends_E[e]`. Products take `dtype`, sums are float32 or
    wider. `recompute` makes the hidden activations anew in the backward pass, and what is cast to `dtype`, of which
    nothing stays from step to step.
    """
    return _GroupedMixture.apply(x_TD, token_A, gate_A, ends_E, w1_EDH, w2_EHD, dtype, recompute)


class _GroupedMixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, token_A, gate_A, ends_E, w1_EDH, w2_EHD, dtype, recompute):
        of_tokens = places(token_A, len(x_TD))
        by = ctx.by = grouped_by(ends_E, len(token_A), dtype, sparing=recompute)
        x, w1, w2 = x_TD.to(dtype), by.cast(w1_EDH), by.cast(w2_EHD)
        h_AH = by.products(x, token_A, w1, relu=True)
        y_AD = by.products(h_AH, None, w2)
        kept = (x_TD, None, None, None) if recompute else (x, w1, w2, h_AH)
        ctx.save_for_backward(token_A, gate_A, *of_tokens, w1_EDH, w2_EHD, *kept)
        ctx.dtype, ctx.of_x = dtype, x_TD.dtype
        return summed_by_token(y_AD, token_A, of_tokens, gate_A).to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD):
        token_A, gate_A, order_A, ends_T, w1_EDH, w2_EHD, x_TD, w1, w2, h_AH = ctx.saved_tensors
        by = ctx.by
        x_TD, grad_TD = x_TD.to(ctx.dtype), grad_TD.to(ctx.dtype)
        w1, w2 = (by.cast(w1_EDH), by.cast(w2_EHD)) if w1 is None else (w1, w2)
        if h_AH is None:
            h_AH = by.products(x_TD, token_A, w1, relu=True)
        grad_h_AH = by.products(grad_TD, token_A, w2.mT)
        del w2  # where it was recomputed, a copy: of billions of parameters each counts
        grad_gate_A = hidden_gradient_(grad_h_AH, h_AH, gate_A)
        grad_x_AD = by.products(grad_h_AH, None, w1.mT)
        del w1
        grad_x_TD = summed_by_token(grad_x_AD, token_A, Places(order_A, ends_T)).to(ctx.of_x)
        del grad_x_AD
        grad_w1_EDH = by.outer_products(x_TD, token_A, grad_h_AH, w1_EDH)
        del grad_h_AH
        grad_w2_EHD = by.outer_products(h_AH, None, gathered(grad_TD, token_A, gate_A), w2_EHD)
        return grad_x_TD, None, grad_gate_A.to(gate_A.dtype), None, grad_w1_EDH, grad_w2_EHD, None, None
