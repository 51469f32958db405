"""Triton kernels over rows: gathers and sums, in float32 whatever the rows' type, without atomic additions.

Shape suffixes: T tokens, D width, H expert hidden, A assignments, U segments, M pieces of segments.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_BLOCK = 1024
"""Columns that one program holds at a time."""

_PIECE = 64
"""Rows that one program adds up where a sum may have thousands."""


def gather_weighted(x_TD: Tensor, token_A: Tensor, gate_A: Tensor) -> Tensor:
    """Return gate * x of every assignment's token, in the type of x."""
    width = x_TD.shape[1]
    out_AD = x_TD.new_empty(len(token_A), width)
    block = block_of(width)
    if out_AD.numel():
        grid = len(token_A), triton.cdiv(width, block)
        _gather[grid](*_contiguous(x_TD, token_A, gate_A), out_AD, width, BLOCK=block)
    return out_AD


def sum_by_token(
    y_AD: Tensor, _token_A: Tensor | None, order: tuple[Tensor, Tensor], gate_A: Tensor | None = None
) -> Tensor:
    """Return the sum of each token's rows in float32; the rows of token t end at `ends_T[t]` in `order_A`."""
    order_A, ends_T = order
    num_tokens, width = len(ends_T), y_AD.shape[1]
    out_TD = y_AD.new_empty(num_tokens, width, dtype=torch.float32)
    block = block_of(width)
    if out_TD.numel():
        rows = _contiguous(y_AD, y_AD if gate_A is None else gate_A, order_A, ends_T)  # without gates, y is not read
        grid = num_tokens, triton.cdiv(width, block)
        _sum[grid](*rows, out_TD, width, WEIGHTED=gate_A is not None, BLOCK=block)
    return out_TD


def sum_segments(y_AD: Tensor, order_A: Tensor, ends_U: Tensor) -> Tensor:
    """Return the sum of each segment's rows in two passes, as a segment (a frequent word's) may have thousands.

    A program sums one piece of a segment; another program sums the pieces. Atomic additions to one row would wait for
    one another.
    """
    if not len(ends_U):
        return y_AD.new_empty(0, y_AD.shape[1], dtype=torch.float32)
    segment_M, first_M, last_U = split_segments(ends_U, len(order_A), _PIECE)
    end_M = torch.minimum(first_M + _PIECE, ends_U.index_select(0, segment_M.clamp(max=len(ends_U) - 1)))
    sum_MD = sum_by_token(y_AD, None, (order_A, end_M))
    return sum_by_token(sum_MD, None, (torch.arange(len(end_M), device=end_M.device), last_U))


def sum_scalars(x_A: Tensor, ends_R: Tensor) -> Tensor:
    """Return the sum of each segment's numbers; the numbers of segment r end at `ends_R[r]`."""
    out_R = x_A.new_empty(len(ends_R))
    if len(ends_R):
        _sum_scalars[(len(ends_R),)](*_contiguous(x_A, ends_R), out_R, BLOCK=_MAX_BLOCK)
    return out_R


def split_segments(ends_U: Tensor, num_rows: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut segments of rows, segment u ending at `ends_U[u]`, into pieces of `size` rows; a last piece may have fewer.

    Return each piece's segment and first row (M), and where the pieces of each segment end (U). The host does not know
    how many pieces there are, so M is the largest possible number: unused pieces come last, with segment U.
    """
    starts_U = torch.cat([ends_U.new_zeros(1), ends_U[:-1]])
    pieces_U = (ends_U - starts_U + size - 1) // size
    last_U = pieces_U.cumsum(dim=0)
    piece_M = torch.arange(num_rows // size + min(len(ends_U), num_rows), device=ends_U.device)
    segment_M = torch.searchsorted(last_U, piece_M, right=True)
    offset_U = starts_U - (last_U - pieces_U) * size
    return segment_M, offset_U.index_select(0, segment_M.clamp(max=len(ends_U) - 1)) + piece_M * size, last_U


def hidden_gradient_(grad_AH: Tensor, h_AH: Tensor, gate_A: Tensor) -> Tensor:
    """Return grad . h of each row in float32, and replace grad by gate * grad where h > 0, else by 0."""
    grad_gate_A = gate_A.new_empty(len(gate_A), dtype=torch.float32)
    if len(gate_A):
        hidden = h_AH.shape[1]
        assert grad_AH.is_contiguous()  # it is changed in place
        rows = _contiguous(h_AH, gate_A)
        _mask_and_dot[(len(gate_A),)](grad_AH, *rows, grad_gate_A, hidden, BLOCK=block_of(hidden))
    return grad_gate_A


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors without gaps, as the kernels read them."""
    return [tensor.contiguous() for tensor in tensors]


def block_of(width: int) -> int:
    """Return how many columns of a row of this width a program holds at a time."""
    return min(_MAX_BLOCK, triton.next_power_of_2(width))


@triton.jit
def _gather(x, token, gate, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # rows times width may pass 2^31
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + tl.load(token + row) * width + column, mask=inside, other=0.0).to(tl.float32)
    value *= tl.load(gate + row).to(tl.float32)
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum(y, gate, order, ends, out, width, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    first = tl.load(ends + token - 1, mask=token > 0, other=0)
    last = tl.load(ends + token)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for place in range(first, last):
        row = tl.load(order + place)
        value = tl.load(y + row * width + column, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(gate + row).to(tl.float32)
        total += value
    tl.store(out + token * width + column, total, mask=inside)


@triton.jit
def _sum_scalars(x, ends, out, BLOCK: tl.constexpr):
    run = tl.program_id(0)
    first = tl.load(ends + run - 1, mask=run > 0, other=0)
    last = tl.load(ends + run)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(first, last, BLOCK):
        place = start + tl.arange(0, BLOCK)
        total += tl.load(x + place, mask=place < last, other=0.0)
    tl.store(out + run, tl.sum(total, axis=0))


@triton.jit
def _mask_and_dot(grad, h, gate, grad_gate, hidden, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(gate + row).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, hidden, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < hidden
        at = row * hidden + column
        slope = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
        total += slope * value
        tl.store(grad + at, tl.where(value > 0, weight * slope, 0.0).to(grad.dtype.element_ty), mask=inside)
    tl.store(grad_gate + row, tl.sum(total, axis=0))
