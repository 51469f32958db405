"""Each expert's outer products, the gradient of its matrix, for any number of experts; see `triton_products`.

Shape suffixes: T tokens, A rows, D inputs, H outputs, E experts, S shares of an expert's rows, B blocks across
a matrix, C blocks down.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_lm.ops.squares import Squares
from moe_lm.ops.triton.tiles import Form, Tiles, power_of_two, precision_of, stages_of, tokens_read, warps_of

DOWN = 64
"""Rows of a tile at most."""

FORMS = {2: Form(128, 64, 3), 4: Form(128, 32, 4)}
"""By the bytes of the factors' numbers: the fastest tried (docs/performance.md)."""

_PROGRAMS = 512
"""Programs that outer products should be: where there are fewer, an expert's rows are shared out among several."""


def outer_products(
    x: Tensor, token_A: Tensor | None, grad_AH: Tensor, tiles: Tiles, dtype: torch.dtype, *, squares: bool = False
) -> tuple[Tensor, Squares | None]:
    """Return each expert's x^T grad (E, D, H) in this type, sums in float32; zeros for one without rows.

    Where asked for and where one program makes all of a tile: the means of its squares too.
    """
    x, grad_AH, num_experts = x.contiguous(), grad_AH.contiguous(), len(tiles.ends_E)
    num_inputs, num_outputs = x.shape[1], grad_AH.shape[1]
    form = FORMS[x.element_size()]
    down, across = power_of_two(num_inputs, DOWN), power_of_two(num_outputs, form.columns)
    blocks = triton.cdiv(num_inputs, down) * triton.cdiv(num_outputs, across)
    depth = min(form.depth, tiles.side)
    most_shares = triton.cdiv(tiles.num_rows, num_experts * depth)
    shares = max(1, min(most_shares, _PROGRAMS // (num_experts * blocks)))
    squares = squares and shares == 1
    of_row_EBD = x.new_empty(num_experts, triton.cdiv(num_outputs, across), num_inputs, dtype=torch.float32)
    of_column_ECH = x.new_empty(num_experts, triton.cdiv(num_inputs, down), num_outputs, dtype=torch.float32)
    out_SEDH = x.new_empty(shares, num_experts, num_inputs, num_outputs, dtype=dtype if shares == 1 else torch.float32)
    if out_SEDH.numel():
        _outer[(shares * num_experts * blocks,)](
            x,
            tokens_read(token_A, tiles),
            grad_AH,
            out_SEDH,
            of_row_EBD,
            of_column_ECH,
            tiles.ends_E,
            num_experts,
            num_inputs,
            num_outputs,
            shares,
            TAKEN=token_A is not None,
            SQUARES=squares,
            PRECISION=precision_of(x, along_rows=True),
            DOWN=down,
            ACROSS=across,
            DEPTH=depth,
            num_warps=warps_of(down * across),
            num_stages=stages_of(form, down, x, grad_AH),
        )
    out_EDH = out_SEDH[0] if shares == 1 else out_SEDH.sum(dim=0).to(dtype)
    if not squares:
        return out_EDH, None
    return out_EDH, Squares(of_row_EBD.sum(dim=1).div_(num_outputs), of_column_ECH.sum(dim=1).div_(num_inputs))


@triton.jit
def _outer(
    x,
    token,
    grad,
    out,
    of_row,
    of_column,
    ends,
    experts,
    inputs,
    outputs,
    shares,
    TAKEN: tl.constexpr,
    SQUARES: tl.constexpr,
    PRECISION: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    across = tl.cdiv(outputs, ACROSS)
    blocks = tl.cdiv(inputs, DOWN) * across
    block = tl.program_id(0) % blocks
    matrix = (tl.program_id(0) // blocks).to(tl.int64)  # of share * experts + expert
    of = matrix % experts
    begin = tl.load(ends + of - 1, mask=of > 0, other=0)
    end = tl.load(ends + of)
    # Each share has as many rows, of whole steps; the last ones may have fewer, or none.
    size = tl.cdiv(tl.cdiv(end - begin, shares), DEPTH) * DEPTH
    begin += matrix // experts * size
    end = tl.minimum(end, begin + size)
    down = block // across * DOWN + tl.arange(0, DOWN)
    column = block % across * ACROSS + tl.arange(0, ACROSS)
    total = tl.zeros((DOWN, ACROSS), dtype=tl.float32)
    for start in range(begin, end, DEPTH):
        row = start + tl.arange(0, DEPTH)
        there = row < end
        taken = row
        if TAKEN:
            taken = tl.load(token + row, mask=there, other=0)
        some = tl.load(
            x + taken[None, :] * inputs + down[:, None], mask=there[None, :] & (down < inputs)[:, None], other=0.0
        )
        slope = tl.load(
            grad + row[:, None] * outputs + column[None, :],
            mask=there[:, None] & (column < outputs)[None, :],
            other=0.0,
        )
        total = tl.dot(some, slope, total, input_precision=PRECISION)
    at = (matrix * inputs + down[:, None]) * outputs + column[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(down < inputs)[:, None] & (column < outputs)[None, :])
    if SQUARES:  # of what lies beyond the matrix all are 0
        square = total * total
        of = (matrix * across + block % across) * inputs + down
        tl.store(of_row + of, tl.sum(square, axis=1), mask=down < inputs)
        of = (matrix * tl.cdiv(inputs, DOWN) + block // across) * outputs + column
        tl.store(of_column + of, tl.sum(square, axis=0), mask=column < outputs)
