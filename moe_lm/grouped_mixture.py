"""The weighted sum of experts (eq. 1) by grouped GEMM inside one autograd node: for GPUs under autocast.

No launch per expert and, up to 1,023 experts, no wait for the counts. As in the loop for CPUs, neither the experts'
inputs nor their answers are kept for the backward pass.

Shape suffixes: T tokens, D width, H expert hidden, E experts, A assignments.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe_lm.fused_rows import Places, gathered, hidden_gradient_, places, summed_by_token

_MOST_GROUPS = 1023
"""Of one grouped product: torch's for Hopper takes fewer than 1,024."""

Parts = list[tuple[slice, slice]]
"""Experts and their rows, of products that are made apart."""


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


def parts_of(ends_E: Tensor, num_rows: int) -> Parts:
    """Return what one grouped product can take; of very many experts the host waits for where their parts end."""
    num_experts = len(ends_E)
    if num_experts <= _MOST_GROUPS:
        return [(slice(0, num_experts), slice(0, num_rows))]
    num_parts = -(-num_experts // _MOST_GROUPS)  # of 1,024 experts not one part of 1,023 and one of 1
    firsts = [part * num_experts // num_parts for part in range(num_parts)]
    lasts = [*firsts[1:], num_experts]
    stops = ends_E[[last - 1 for last in lasts]].tolist()
    experts, rows = map(slice, firsts, lasts), map(slice, [0, *stops[:-1]], stops)
    return list(zip(experts, rows, strict=True))


def grouped(x_AD: Tensor, weight_EDH: Tensor, ends_E: Tensor, parts: Parts) -> Tensor:
    """Return each row times the matrix of its expert (A, H); differentiable."""
    made = [
        F.grouped_mm(x_AD[rows], weight_EDH[experts], offs=_offsets(ends_E[experts], rows.start))
        for experts, rows in parts
        if rows.stop > rows.start or len(parts) == 1
    ]
    if not made:
        return x_AD.new_empty(0, weight_EDH.shape[2])
    return made[0] if len(made) == 1 else torch.cat(made)


def _offsets(ends_E: Tensor, start: int) -> Tensor:
    return ends_E - start if start else ends_E


def _outer(x_AD: Tensor, grad_AH: Tensor, ends_E: Tensor, parts: Parts, dtype: torch.dtype) -> Tensor:
    """Return each expert's x^T grad (E, D, H) in this type, so that of many experts never all are in two types."""
    if len(parts) == 1:
        return F.grouped_mm(x_AD.t(), grad_AH, offs=ends_E).to(dtype)
    made_EDH = x_AD.new_empty(len(ends_E), x_AD.shape[1], grad_AH.shape[1], dtype=dtype)
    for experts, rows in parts:
        if rows.stop > rows.start:
            ends = _offsets(ends_E[experts], rows.start)
            made_EDH[experts] = F.grouped_mm(x_AD[rows].t(), grad_AH[rows], offs=ends)
        else:
            made_EDH[experts] = 0
    return made_EDH


class _GroupedMixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, token_A, gate_A, ends_E, w1_EDH, w2_EHD, dtype, recompute):
        of_tokens = places(token_A, len(x_TD))
        x, w1, w2 = (tensor.to(dtype) for tensor in (x_TD, w1_EDH, w2_EHD))
        ctx.parts = parts_of(ends_E, len(token_A))
        h_AH = grouped(gathered(x, token_A), w1, ends_E, ctx.parts).relu_()
        y_AD = grouped(h_AH, w2, ends_E, ctx.parts)
        kept = (x_TD, w1_EDH, w2_EHD, None) if recompute else (x, w1, w2, h_AH)
        ctx.save_for_backward(token_A, gate_A, ends_E, *of_tokens, *kept)
        ctx.dtype, ctx.types = dtype, (x_TD.dtype, w1_EDH.dtype, w2_EHD.dtype)
        return summed_by_token(y_AD, token_A, of_tokens, gate_A).to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD):
        token_A, gate_A, ends_E, order_A, ends_T, *kept, h_AH = ctx.saved_tensors
        x_TD, w1_EDH, w2_EHD, grad_TD = (tensor.to(ctx.dtype) for tensor in (*kept, grad_TD))
        of_x, of_w1, of_w2 = ctx.types
        x_AD = gathered(x_TD, token_A)
        if h_AH is None:
            h_AH = grouped(x_AD, w1_EDH, ends_E, ctx.parts).relu_()
        grad_h_AH = grouped(gathered(grad_TD, token_A), w2_EHD.mT, ends_E, ctx.parts)
        del w2_EHD  # where it was recomputed, a copy: of billions of parameters each counts
        grad_gate_A = hidden_gradient_(grad_h_AH, h_AH, gate_A)
        grad_x_AD = grouped(grad_h_AH, w1_EDH.mT, ends_E, ctx.parts)
        del w1_EDH
        grad_x_TD = summed_by_token(grad_x_AD, token_A, Places(order_A, ends_T)).to(of_x)
        del grad_x_AD
        grad_w1_EDH = _outer(x_AD, grad_h_AH, ends_E, ctx.parts, of_w1)
        del x_AD, grad_h_AH
        grad_w2_EHD = _outer(h_AH, gathered(grad_TD, token_A, gate_A), ends_E, ctx.parts, of_w2)
        return grad_x_TD, None, grad_gate_A.to(gate_A.dtype), None, grad_w1_EDH, grad_w2_EHD, None, None
