"""Passes over rows between grouped products: in one kernel on a GPU (Triton), elsewhere in torch's operators.

Of 300,000 tokens with four experts each, rows of 512 and 1,024 numbers, every pass that torch would add reads or writes
gigabytes.

Shape suffixes: T tokens, D width, H expert hidden, A assignments.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_lm.ops.backend import by_triton
from moe_lm.ops.segments import segment_ends, stable_sort_below


class Places(NamedTuple):
    """Where each token's rows are among the assignments."""

    order_A: Tensor
    """int64: the assignments, by token."""
    ends_T: Tensor
    """int64: where in `order_A` each token's end."""


def places(token_A: Tensor, num_tokens: int) -> Places:
    """Return the places of all tokens' rows."""
    sorted_A, order_A = stable_sort_below(token_A, num_tokens)
    return Places(order_A, segment_ends(sorted_A, num_tokens))


def gathered(x_TD: Tensor, token_A: Tensor, gate_A: Tensor | None = None) -> Tensor:
    """Return the rows of these tokens, weighted where there are gates, in the type of x."""
    if gate_A is None:
        return x_TD.index_select(0, token_A)
    if by_triton(x_TD):
        from moe_lm.ops import triton_rows  # Triton is not everywhere, and slow to import

        return triton_rows.gathered(x_TD, token_A, gate_A)
    return (x_TD.index_select(0, token_A) * gate_A.unsqueeze(1)).to(x_TD.dtype)


def summed_by_token(y_AD: Tensor, token_A: Tensor, places: Places, gate_A: Tensor | None = None) -> Tensor:
    """Return the sum of each token's rows, weighted where there are gates (float32, or y's type if that is wider)."""
    if by_triton(y_AD):
        from moe_lm.ops.triton import rows as triton_rows

        return triton_rows.summed_by_token(y_AD, *places, gate_A)
    wide_AD = y_AD if gate_A is None else y_AD * gate_A.unsqueeze(1)
    wide_AD = wide_AD.to(torch.promote_types(y_AD.dtype, torch.float32))
    return wide_AD.new_zeros(len(places.ends_T), y_AD.shape[1]).index_add_(0, token_A, wide_AD)


def hidden_gradient_(grad_AH: Tensor, h_AH: Tensor, gate_A: Tensor) -> Tensor:
    """Return each row's grad . h, the gradient of its gate; make the gradient gate * grad where h > 0, in its place."""
    if by_triton(grad_AH):
        from moe_lm.ops.triton import rows as triton_rows

        return triton_rows.hidden_gradient_(grad_AH, h_AH, gate_A)
    grad_gate_A = (grad_AH.to(gate_A.dtype) * h_AH).sum(dim=1)
    grad_AH.copy_(torch.where(h_AH > 0, grad_AH * gate_A.unsqueeze(1), 0))
    return grad_gate_A
