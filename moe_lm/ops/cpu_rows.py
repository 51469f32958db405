"""Passes over an expert's rows between its products, while they are in a core's cache: for CPUs, and float32.

On one thread each is one compiled loop (Numba), elsewhere some of torch's operators.

Shape suffixes: T tokens, D width, H expert hidden, R rows.
"""

import torch
from torch import Tensor

from moe_lm.ops.backend import by_numba

_HOT_BYTES = 1 << 19
"""Of hidden activations that several of torch's operators go over: within a core's own cache with their gradients."""


def gathered(x_TD: Tensor, token_R: Tensor, out_RD: Tensor) -> Tensor:
    """Fill `out_RD` with the rows of these tokens; return it."""
    return torch.index_select(x_TD, 0, token_R, out=out_RD)


def add_(y_TD: Tensor, token_R: Tensor, y_RD: Tensor, gate_R: Tensor | None = None) -> None:
    """Add rows to those of their tokens, weighted where there are gates; `y_RD` is used up."""
    if by_numba(y_RD):
        from moe_lm.ops import numba_rows  # slow to import, and not everywhere

        numba_rows.add_(y_TD, token_R, y_RD, gate_R)
        return
    y_TD.index_add_(0, token_R, y_RD if gate_R is None else y_RD.mul_(gate_R.unsqueeze(1)))


def hidden_gradient_(grad_RH: Tensor, h_RH: Tensor, gate_R: Tensor, grad_gate_R: Tensor) -> None:
    """Fill each gate's gradient, grad . h; make the hidden gradient gate * grad where h > 0, in its place."""
    if by_numba(h_RH):
        from moe_lm.ops import numba_rows

        numba_rows.hidden_gradient_(grad_RH, h_RH, gate_R, grad_gate_R)
        return
    rows = max(1, len(h_RH) if h_RH.is_cuda else _HOT_BYTES // (h_RH.shape[1] * h_RH.element_size()))
    for some in zip(*(x.split(rows) for x in (grad_RH, h_RH, gate_R.unsqueeze(1), grad_gate_R)), strict=True):
        grad, h, gate, grad_gate = some
        torch.linalg.vecdot(grad, h, out=grad_gate)
        torch.ops.aten.threshold_backward.grad_input(grad, h, 0, grad_input=grad).mul_(gate)
