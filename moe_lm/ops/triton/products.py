"""Each row times the matrix of its expert, for any number of experts.

Rows are found by their token where they are needed, and matrices are read in the type that they have: of billions of
parameters no copy is made in the rows' type. The host does not wait for how many rows an expert has.

Shape suffixes: A rows, T tokens, D inputs, H outputs, E experts, M tiles of rows.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_lm.ops.triton.tiles import Form, Tiles, power_of_two, precision_of, stages_of, tokens_read, warps_of

FORMS = {(2, 2): Form(128, 64, 3), (2, 4): Form(128, 32, 4), (4, 4): Form(128, 32, 3)}
"""By the bytes of a row's numbers and of its matrix's, 4 where they differ otherwise: the fastest tried
(docs/performance.md)."""


def products(x: Tensor, token_A: Tensor | None, weight_EDH: Tensor, tiles: Tiles, *, relu: bool = False) -> Tensor:
    """Return each row times its expert's matrix (A, H) in the rows' type, sums in float32; `relu`: of it the ReLU.

    Row a is `x[token_A[a]]` or, without tokens, `x[a]`; the matrices may be views, as transposed ones are, each within
    2^31 numbers.
    """
    x, precision = x.contiguous(), precision_of(x)
    num_experts, num_inputs, num_outputs = weight_EDH.shape
    if precision == "tf32" and weight_EDH.stride(1) != 1:
        weight_EDH = weight_EDH.mT.contiguous().mT  # tensor cores take 32 bits along the inputs alone
    out_AH = x.new_empty(tiles.num_rows, num_outputs)
    size = x.element_size()
    form = FORMS[size, 2 if size == weight_EDH.element_size() == 2 else 4]
    columns = power_of_two(num_outputs, form.columns)
    grid = (len(tiles.expert_M) * triton.cdiv(num_outputs, columns),)
    if grid[0]:
        _product[grid](
            x,
            tokens_read(token_A, tiles),
            weight_EDH,
            out_AH,
            *tiles[:3],
            num_experts,
            num_inputs,
            num_outputs,
            *weight_EDH.stride(),
            RELU=relu,
            TAKEN=token_A is not None,
            PRECISION=precision,
            ROWS=tiles.side,
            COLUMNS=columns,
            DEPTH=form.depth,
            num_warps=warps_of(tiles.side * columns),
            num_stages=stages_of(form, tiles.side, x, weight_EDH),
        )
    return out_AH


@triton.jit
def _product(
    x,
    token,
    w,
    out,
    expert,
    first,
    ends,
    experts,
    inputs,
    outputs,
    w_expert,
    w_row,
    w_column,
    RELU: tl.constexpr,
    TAKEN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # Side by side in time are the blocks of one tile: they share its rows, and with the next tile their matrix.
    blocks = tl.cdiv(outputs, COLUMNS)
    tile = tl.program_id(0) // blocks
    of = tl.load(expert + tile)
    if of >= experts:
        return
    row = tl.load(first + tile) + tl.arange(0, ROWS)  # int64: rows times inputs may pass 2^31
    there = row < tl.load(ends + of)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    taken = row
    if TAKEN:
        taken = tl.load(token + row, mask=there, other=0)
    x_at = x + taken[:, None] * inputs + depth[None, :]
    w_at = w + of * w_expert + depth[:, None] * w_row + column[None, :] * w_column
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, inputs, DEPTH):
        inside = start + depth < inputs
        some = tl.load(x_at + start, mask=there[:, None] & inside[None, :], other=0.0)
        weight = tl.load(w_at + start * w_row, mask=inside[:, None] & (column < outputs)[None, :], other=0.0)
        total = tl.dot(some, weight.to(some.dtype), total, input_precision=PRECISION)
    if RELU:
        total = tl.where(total < 0, 0.0, total)  # NaN stays
    at = row[:, None] * outputs + column[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=there[:, None] & (column < outputs)[None, :])
