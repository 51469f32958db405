"""The passes of `FactoredAdam` over experts' matrices on a GPU: one to square the gradient, one to change the weights.

By torch's operators some matrices at a time they are fifteen launches for each 16 MiB, of 4,096 experts as many
thousands as the host hands over in a tenth of a second.

Shape suffixes: M matrices (experts), R rows, C columns, P parts of rows or columns.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_lm.ops.squares import Squares
from moe_lm.ops.triton.rows import block_of
from moe_lm.optim.on_device import number

_ROWS, _PART = 8, 64
"""Rows held at a time, and of one program: sums over its rows cost a 64th of the gradient in memory."""


def square_means(g_MRC: Tensor) -> Squares:
    """Return the squared gradient's means over columns (M, R) and over rows (M, C); no atomic additions."""
    matrices, rows, columns = g_MRC.shape
    block, parts = block_of(columns), triton.cdiv(rows, _PART)
    grid = matrices * parts, triton.cdiv(columns, block)
    of_row_MPR = g_MRC.new_empty(matrices, grid[1], rows)
    of_column_MPC = g_MRC.new_empty(matrices, parts, columns)
    sizes = {"ROWS": _ROWS, "PART": _PART, "BLOCK": block}
    _square[grid](g_MRC.contiguous(), of_row_MPR, of_column_MPC, rows, columns, parts, **sizes)
    return Squares(of_row_MPR.sum(dim=1).div_(columns), of_column_MPC.sum(dim=1).div_(rows))


def divide_(
    w_MRC: Tensor,
    g_MRC: Tensor,
    a_MR: Tensor,
    b_MC: Tensor,
    copy_MRC: Tensor | None = None,
    *,
    scale: Tensor | float,
    rate: float,
    epsilon: float,
    found_inf: Tensor | None = None,
) -> None:
    """Take rate * scale * g / (a b^T + epsilon) from each matrix, in its place, and write it, rounded, to its copy.

    Where `found_inf` is 1 all stays as it is.
    """
    matrices, rows, columns = w_MRC.shape
    block, parts = block_of(columns), triton.cdiv(rows, _ROWS)
    assert w_MRC.is_contiguous()  # both are changed where they are
    assert copy_MRC is None or copy_MRC.is_contiguous()
    given = [tensor.contiguous() for tensor in (g_MRC, a_MR, b_MC)]
    grid = matrices * parts, triton.cdiv(columns, block)
    sizes = {"COPIED": copy_MRC is not None, "ROWS": _ROWS, "BLOCK": block}
    copy = w_MRC if copy_MRC is None else copy_MRC
    how = number(scale, w_MRC), number(found_inf, w_MRC), rate, epsilon
    _divide[grid](w_MRC, copy, *given, *how, rows, columns, parts, **sizes)


@triton.jit
def _square(g, of_row, of_column, rows, columns, parts, ROWS: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr):
    matrix = tl.program_id(0).to(tl.int64) // parts  # the numbers of all matrices may pass 2^31
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
        of = (matrix * tl.num_programs(1) + block) * rows + row
        tl.store(of_row + of, tl.sum(square, axis=1), mask=row < rows)
    tl.store(of_column + (matrix * parts + part) * columns + column, total, mask=column < columns)


@triton.jit
def _divide(
    w,
    copy,
    g,
    a,
    b,
    scale,
    found_inf,
    rate,
    epsilon,
    rows,
    columns,
    parts,
    COPIED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(found_inf) != 0:
        return
    matrix = tl.program_id(0).to(tl.int64) // parts
    row = tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = (matrix * rows + row)[:, None] * columns + column[None, :]
    of_row = tl.load(a + matrix * rows + row, mask=row < rows, other=0.0)
    of_column = tl.load(b + matrix * columns + column, mask=column < columns, other=0.0)
    divisor = of_row[:, None] * of_column[None, :] + epsilon
    value = tl.load(scale) * tl.load(g + at, mask=inside, other=0.0)
    weight = tl.load(w + at, mask=inside, other=0.0)
    weight -= rate * (value / divisor)
    tl.store(w + at, weight, mask=inside)
    if COPIED:
        tl.store(copy + at, weight.to(copy.dtype.element_ty), mask=inside)
