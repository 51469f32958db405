"""Each row times the matrix of its expert, and each expert's outer products, for any number of experts.

Rows are found by their token where they are needed, and matrices are read in the type that they have: of billions of
parameters no copy is made in the rows' type. The host does not wait for how many rows an expert has.

Shape suffixes: A rows, T tokens, D inputs, H outputs, E experts, M tiles of rows.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_lm.triton_rows import pieces_of

_MOST_ROWS, _LEAST = 128, 16
"""Rows of a tile at most and, as tensor cores want them, rows and columns at least."""


class _Form(NamedTuple):
    """How a program makes its tile."""

    columns: int
    """At most."""
    depth: int
    """Of the sum that one step of it takes."""
    stages: int
    """Steps on their way, at most."""


_FORMS = {(2, 2): _Form(128, 64, 3), (2, 4): _Form(128, 32, 4), (4, 4): _Form(128, 32, 3)}
"""By the bytes of a row's numbers and of its matrix's: the fastest tried (docs/performance.md)."""

_DOWN, _OUTER_FORMS = 64, {2: _Form(128, 64, 3), 4: _Form(128, 32, 4)}
"""An outer product's rows at most, and its other sizes by the bytes of its factors' numbers, likewise."""

_PROGRAMS = 512
"""Programs that outer products should be: where there are fewer, an expert's rows are shared out among several."""


class Tiles(NamedTuple):
    """Rows of one expert each, some side by side: what a program multiplies."""

    expert_M: Tensor
    """int64; the number of experts where there is no tile."""
    first_M: Tensor
    """int64: each tile's first row."""
    ends_E: Tensor
    """int64: where each expert's rows end."""
    num_rows: int
    side: int
    """Rows of a tile; an expert's last tile may have fewer."""


def tiles_of(ends_E: Tensor, num_rows: int) -> Tiles:
    """Return the tiles of so many rows in all, sorted by expert, those of expert e ending at `ends_E[e]`."""
    side = _power_of_two(-(-num_rows // len(ends_E)), _MOST_ROWS)  # of a mean expert all rows: its matrix is read once
    ends_E = ends_E.long()
    expert_M, first_M, _ = pieces_of(ends_E, num_rows, side)
    return Tiles(expert_M, first_M, ends_E, num_rows, side)


def products(x: Tensor, token_A: Tensor | None, weight_EDH: Tensor, tiles: Tiles, *, relu: bool = False) -> Tensor:
    """Return each row times its expert's matrix (A, H) in the rows' type, sums in float32; `relu`: of it the ReLU.

    Row a is `x[token_A[a]]` or, without tokens, `x[a]`; the matrices may be views, as transposed ones are, each within
    2^31 numbers.
    """
    x, precision = x.contiguous(), _precision(x)
    num_experts, num_inputs, num_outputs = weight_EDH.shape
    if precision == "tf32" and weight_EDH.stride(1) != 1:
        weight_EDH = weight_EDH.mT.contiguous().mT  # tensor cores take 32 bits along the inputs alone
    out_AH = x.new_empty(tiles.num_rows, num_outputs)
    form = _FORMS[x.element_size(), weight_EDH.element_size()]
    columns = _power_of_two(num_outputs, form.columns)
    grid = (len(tiles.expert_M) * triton.cdiv(num_outputs, columns),)
    if grid[0]:
        _product[grid](
            x,
            *_taken(token_A, tiles),
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
            num_warps=_warps(tiles.side * columns),
            num_stages=_stages(form, tiles.side, x, weight_EDH),
        )
    return out_AH


def outer_products(x: Tensor, token_A: Tensor | None, grad_AH: Tensor, tiles: Tiles, dtype: torch.dtype) -> Tensor:
    """Return each expert's x^T grad (E, D, H) in this type, sums in float32; zeros for one without rows."""
    x, grad_AH, num_experts = x.contiguous(), grad_AH.contiguous(), len(tiles.ends_E)
    num_inputs, num_outputs = x.shape[1], grad_AH.shape[1]
    form = _OUTER_FORMS[x.element_size()]
    down, across = _power_of_two(num_inputs, _DOWN), _power_of_two(num_outputs, form.columns)
    blocks = triton.cdiv(num_inputs, down) * triton.cdiv(num_outputs, across)
    depth = min(form.depth, tiles.side)
    most_shares = triton.cdiv(tiles.num_rows, num_experts * depth)
    shares = max(1, min(most_shares, _PROGRAMS // (num_experts * blocks)))
    out_SEDH = x.new_empty(shares, num_experts, num_inputs, num_outputs, dtype=dtype if shares == 1 else torch.float32)
    if out_SEDH.numel():
        _outer[(shares * num_experts * blocks,)](
            x,
            *_taken(token_A, tiles),
            grad_AH,
            out_SEDH,
            tiles.ends_E,
            num_experts,
            num_inputs,
            num_outputs,
            shares,
            TAKEN=token_A is not None,
            PRECISION=_precision(x, along_rows=True),
            DOWN=down,
            ACROSS=across,
            DEPTH=depth,
            num_warps=_warps(down * across),
            num_stages=_stages(form, down, x, grad_AH),
        )
    return out_SEDH[0] if shares == 1 else out_SEDH.sum(dim=0).to(dtype)


def _power_of_two(size: int, most: int) -> int:
    return min(most, max(_LEAST, triton.next_power_of_2(size)))


def _stages(form: _Form, rows: int, x: Tensor, other: Tensor) -> int:
    """Return the form's stages, fewer where they would not fit into shared memory."""
    step_bytes = form.depth * (rows * x.element_size() + form.columns * other.element_size())
    return max(1, min(form.stages, _shared_bytes(x.device) // step_bytes))


def _warps(numbers: int) -> int:
    return 8 if numbers >= 128**2 else 4


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    """Return what a program on this device may have of fast memory; for the interpreter enough."""
    if device.type != "cuda":
        return 227 << 10
    found = torch.cuda.get_device_properties(device)
    return getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block)  # AMD's have the latter alone


def _taken(token_A: Tensor | None, tiles: Tiles) -> list[Tensor]:
    return [tiles.ends_E if token_A is None else token_A.contiguous()]  # without tokens it is not read


def _precision(x: Tensor, *, along_rows: bool = False) -> str:
    """Return how much of float32 factors counts: TF32's 10 bits of mantissa where torch's products may take these.

    Tensor cores do not take TF32 where sums go from row to row in memory. There each factor is two bfloat16 numbers, of
    16 bits together, which the interpreter has no name for.
    """
    if x.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    return "bf16x3" if along_rows and x.is_cuda else "tf32"


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


@triton.jit
def _outer(
    x,
    token,
    grad,
    out,
    ends,
    experts,
    inputs,
    outputs,
    shares,
    TAKEN: tl.constexpr,
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
