"""Triton kernels of `moe_lm.ops.adam`.

For 4,096 experts PyTorch's operators would launch fifteen kernels for each 16 MiB of matrices: thousands of launches,
which take the host a tenth of a second.

Shape suffixes: M matrices (experts), R rows, C columns, P parts of rows or columns; U touched rows, V rows, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_lm.ops.adam import factored_roots
from moe_lm.ops.triton.rows import block_of

_ROWS, _PART = 8, 64
"""Rows that a program holds at a time, and in total; partial sums take a 64th of the gradient's memory."""


def square_means(g_MRC: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared gradient's means over columns (M, R) and over rows (M, C), without atomic additions."""
    matrices, rows, columns = g_MRC.shape
    block, parts = block_of(columns), triton.cdiv(rows, _PART)
    grid = matrices * parts, triton.cdiv(columns, block)
    row_sum_MPR = g_MRC.new_empty(matrices, grid[1], rows)
    column_sum_MPC = g_MRC.new_empty(matrices, parts, columns)
    sizes = {"ROWS": _ROWS, "PART": _PART, "BLOCK": block}
    _square[grid](g_MRC.contiguous(), row_sum_MPR, column_sum_MPC, rows, columns, parts, **sizes)
    return row_sum_MPR.sum(dim=1).div_(columns), column_sum_MPC.sum(dim=1).div_(rows)


def factored_adam_(
    w_MRC: Tensor,
    g_MRC: Tensor,
    row_MR: Tensor,
    column_MC: Tensor,
    known_means: tuple[Tensor, Tensor] | None = None,
    *,
    step: float,
    lr: float,
    beta2: float,
    epsilon: float,
    scale: float,
) -> None:
    """Update weights and averages in place, without temporaries of the matrices' size."""
    new_means = square_means(g_MRC) if known_means is None else known_means
    for mean, new in zip((row_MR, column_MC), new_means, strict=True):
        mean.lerp_(new * scale**2, 1 - beta2)
    roots = factored_roots(row_MR, column_MC, 1 - beta2**step)
    matrices, rows, columns = w_MRC.shape
    block, parts = block_of(columns), triton.cdiv(rows, _ROWS)
    assert w_MRC.is_contiguous()  # the kernel changes it in place
    read = [tensor.contiguous() for tensor in (g_MRC, *roots)]
    grid = matrices * parts, triton.cdiv(columns, block)
    _divide[grid](w_MRC, *read, scale, lr, epsilon, rows, columns, parts, ROWS=_ROWS, BLOCK=block)
    torch.autograd.graph.increment_version(w_MRC)


def lazy_adam_(
    matrix_VD: Tensor,
    moment_VD: Tensor,
    row_U: Tensor,
    grad_UD: Tensor,
    decay_U: Tensor,
    *,
    correction: float,
    lr: float,
    beta2: float,
    epsilon: float,
    scale: float,
) -> None:
    """Update the touched rows and their second moments in place; all other rows stay as they are."""
    width = matrix_VD.shape[1]
    block = block_of(width)
    assert matrix_VD.is_contiguous()  # the kernel changes both in place
    assert moment_VD.is_contiguous()
    if grad_UD.numel():
        grid = len(row_U), triton.cdiv(width, block)
        read = [tensor.contiguous() for tensor in (row_U, grad_UD, decay_U)]
        numbers = scale, correction, lr, 1 - beta2, epsilon
        _update_rows[grid](matrix_VD, moment_VD, *read, *numbers, width, BLOCK=block)
        torch.autograd.graph.increment_version([matrix_VD, moment_VD])


@triton.jit
def _square(g, row_sum, column_sum, rows, columns, parts, ROWS: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr):
    matrix = tl.program_id(0).to(tl.int64) // parts  # offsets into all matrices may pass 2^31
    part, block = tl.program_id(0) % parts, tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, PART, ROWS):
        row = part * PART + first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        at = (matrix * rows + row)[:, None] * columns + column[None, :]
        value = tl.load(g + at, mask=inside, other=0.0)
        square = value * value
        total += tl.sum(square, axis=0)
        at_row = (matrix * tl.num_programs(1) + block) * rows + row
        tl.store(row_sum + at_row, tl.sum(square, axis=1), mask=row < rows)
    tl.store(column_sum + (matrix * parts + part) * columns + column, total, mask=column < columns)


@triton.jit
def _divide(w, g, a, b, scale, lr, epsilon, rows, columns, parts, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    matrix = tl.program_id(0).to(tl.int64) // parts
    row = tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = (matrix * rows + row)[:, None] * columns + column[None, :]
    row_root = tl.load(a + matrix * rows + row, mask=row < rows, other=0.0)
    column_root = tl.load(b + matrix * columns + column, mask=column < columns, other=0.0)
    divisor = row_root[:, None] * column_root[None, :] + epsilon
    value = scale * tl.load(g + at, mask=inside, other=0.0)
    weight = tl.load(w + at, mask=inside, other=0.0)
    tl.store(w + at, weight - lr * (value / divisor), mask=inside)


@triton.jit
def _update_rows(matrix, moment, row, grad, decay, scale, correction, lr, weight, epsilon, width, BLOCK: tl.constexpr):
    touched = tl.program_id(0).to(tl.int64)  # rows times width may pass 2^31
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = tl.load(row + touched) * width + column
    slope = scale * tl.load(grad + touched * width + column, mask=inside, other=0.0)
    square = tl.load(moment + at, mask=inside, other=0.0) * tl.load(decay + touched) + weight * slope * slope
    tl.store(moment + at, square, mask=inside)
    value = tl.load(matrix + at, mask=inside, other=0.0)
    tl.store(matrix + at, value - lr * (slope / (tl.sqrt(square / correction) + epsilon)), mask=inside)
