"""The weighted sum of experts (eq. 1) by grouped GEMM inside one autograd node: for GPUs under autocast.

No launch per expert and no wait for the counts. As in the loop for CPUs, neither the experts' inputs nor their answers
are kept for the backward pass.

Shape suffixes: T tokens, D width, H expert hidden, E experts, A assignments.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe_lm.fused_rows import Places, gathered, hidden_gradient_, places, summed_by_token


def grouped_mixture(
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
    wider. `recompute` makes the hidden activations anew in the backward pass, and what is cast to `dtype`.
    """
    return _GroupedMixture.apply(x_TD, token_A, gate_A, ends_E.to(torch.int32), w1_EDH, w2_EHD, dtype, recompute)


class _GroupedMixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, token_A, gate_A, ends_E, w1_EDH, w2_EHD, dtype, recompute):
        of_tokens = places(token_A, len(x_TD))
        x, w1, w2 = (tensor.to(dtype) for tensor in (x_TD, w1_EDH, w2_EHD))
        h_AH = F.grouped_mm(gathered(x, token_A), w1, offs=ends_E).relu_()
        y_AD = F.grouped_mm(h_AH, w2, offs=ends_E)
        kept = (x_TD, w1_EDH, w2_EHD, None) if recompute else (x, w1, w2, h_AH)
        ctx.save_for_backward(token_A, gate_A, ends_E, *of_tokens, *kept)
        ctx.dtype, ctx.types = dtype, (x_TD.dtype, w1_EDH.dtype, w2_EHD.dtype)
        return summed_by_token(y_AD, token_A, of_tokens, gate_A).to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD):
        token_A, gate_A, ends_E, order_A, ends_T, *kept, h_AH = ctx.saved_tensors
        x_TD, w1_EDH, w2_EHD, grad_TD = (tensor.to(ctx.dtype) for tensor in (*kept, grad_TD))
        x_AD = gathered(x_TD, token_A)
        if h_AH is None:
            h_AH = F.grouped_mm(x_AD, w1_EDH, offs=ends_E).relu_()
        grad_h_AH = F.grouped_mm(gathered(grad_TD, token_A), w2_EHD.mT, offs=ends_E)
        grad_gate_A = hidden_gradient_(grad_h_AH, h_AH, gate_A)
        grad_w2_EHD = F.grouped_mm(h_AH.t(), gathered(grad_TD, token_A, gate_A), offs=ends_E)
        grad_w1_EDH = F.grouped_mm(x_AD.t(), grad_h_AH, offs=ends_E)
        grad_x_AD = F.grouped_mm(grad_h_AH, w1_EDH.mT, offs=ends_E)
        grad_x_TD = summed_by_token(grad_x_AD, token_A, Places(order_A, ends_T))
        grads = zip((grad_x_TD, grad_w1_EDH, grad_w2_EHD), ctx.types, strict=True)
        grad_x_TD, grad_w1_EDH, grad_w2_EHD = (grad.to(kind) for grad, kind in grads)
        return grad_x_TD, None, grad_gate_A.to(gate_A.dtype), None, grad_w1_EDH, grad_w2_EHD, None, None
