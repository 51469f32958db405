"""Triton kernels of `moe_lm.ops.grouped_gemm`, for any number of experts.

Kernels find a row by its token when they read it, and read matrices of any type, so that neither the rows nor billions
of parameters are copied. The host does not wait to learn how many rows an expert has.

Shape suffixes: A rows, T tokens, D inputs, H outputs, E experts, M tiles of rows, S splits of an expert's rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lm.ops.grouped_gemm import ExpertRows
from moe_lm.ops.triton.tiles import BlockShape, block_size, input_precision, num_stages, num_warps, token_pointer

MM_SHAPES = {(2, 2): BlockShape(128, 64, 3), (2, 4): BlockShape(128, 32, 4), (4, 4): BlockShape(128, 32, 3)}
"""Block shapes of `grouped_mm` by the bytes of a number in rows and in matrices (4 unless both have 2): the fastest of
those tried (docs/performance.md)."""

OUTER_SHAPES = {2: BlockShape(128, 64, 3), 4: BlockShape(128, 32, 4)}
"""Block shapes of `grouped_outer` by the bytes of a number in its factors: the fastest of those tried."""

OUTER_BLOCK_M = 64
"""Maximum number of rows in a block of `grouped_outer`."""

_MIN_PROGRAMS = 512
"""Number of programs of `grouped_outer` below which an expert's rows are split among several programs."""


def grouped_mm(
    x: Tensor, token_A: Tensor | None, weight_EDH: Tensor, rows: ExpertRows, *, relu: bool = False
) -> Tensor:
    """Return each row times its expert's matrix (A, H), or the ReLU of it, in the rows' type; sums are float32.

    The matrices may be views, such as transposed ones, each within 2^31 numbers.
    """
    x, precision, tiles = x.contiguous(), input_precision(x), rows.tiles
    num_experts, num_inputs, num_outputs = weight_EDH.shape
    if precision == "tf32" and weight_EDH.stride(1) != 1:
        weight_EDH = weight_EDH.mT.contiguous().mT  # TF32 tensor cores need matrices contiguous along inputs
    out_AH = x.new_empty(rows.num_rows, num_outputs)
    size = x.element_size()
    shape = MM_SHAPES[size, 2 if size == weight_EDH.element_size() == 2 else 4]
    block_n = block_size(num_outputs, shape.block_n)
    grid = (len(tiles.expert_M) * triton.cdiv(num_outputs, block_n),)
    if grid[0]:
        _grouped_mm[grid](
            x,
            token_pointer(token_A, tiles),
            weight_EDH,
            out_AH,
            tiles.expert_M,
            tiles.first_M,
            tiles.ends_E,
            num_experts,
            num_inputs,
            num_outputs,
            *weight_EDH.stride(),
            RELU=relu,
            GATHER=token_A is not None,
            PRECISION=precision,
            BLOCK_M=tiles.block_m,
            BLOCK_N=block_n,
            BLOCK_K=shape.block_k,
            num_warps=num_warps(tiles.block_m * block_n),
            num_stages=num_stages(shape, tiles.block_m, x, weight_EDH),
        )
    return out_AH


def grouped_outer(x: Tensor, token_A: Tensor | None, grad_AH: Tensor, rows: ExpertRows, dtype: torch.dtype) -> Tensor:
    """Return x^T grad over each expert's rows (E, D, H) in type `dtype`; sums are float32, zeros for no rows."""
    x, grad_AH, tiles, num_experts = x.contiguous(), grad_AH.contiguous(), rows.tiles, rows.num_experts
    num_inputs, num_outputs = x.shape[1], grad_AH.shape[1]
    shape = OUTER_SHAPES[x.element_size()]
    block_m, block_n = block_size(num_inputs, OUTER_BLOCK_M), block_size(num_outputs, shape.block_n)
    blocks = triton.cdiv(num_inputs, block_m) * triton.cdiv(num_outputs, block_n)
    block_k = min(shape.block_k, tiles.block_m)
    max_splits = triton.cdiv(rows.num_rows, num_experts * block_k)
    splits = max(1, min(max_splits, _MIN_PROGRAMS // (num_experts * blocks)))
    out_SEDH = x.new_empty(splits, num_experts, num_inputs, num_outputs, dtype=dtype if splits == 1 else torch.float32)
    if out_SEDH.numel():
        _grouped_outer[(splits * num_experts * blocks,)](
            x,
            token_pointer(token_A, tiles),
            grad_AH,
            out_SEDH,
            tiles.ends_E,
            num_experts,
            num_inputs,
            num_outputs,
            splits,
            GATHER=token_A is not None,
            PRECISION=input_precision(x, along_rows=True),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_warps=num_warps(block_m * block_n),
            num_stages=num_stages(shape, block_m, x, grad_AH),
        )
    return out_SEDH[0] if splits == 1 else out_SEDH.sum(dim=0).to(dtype)


def differentiable_grouped_mm(x_AD: Tensor, weight_EDH: Tensor, rows: ExpertRows) -> Tensor:
    """Return each row times its expert's matrix (A, H) in the rows' type; differentiable in rows and matrices."""
    return _GroupedMM.apply(x_AD, weight_EDH, rows)


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_AD, weight_EDH, rows):
        ctx.save_for_backward(x_AD, weight_EDH)
        ctx.rows = rows
        return grouped_mm(x_AD, None, weight_EDH, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_AH):
        x_AD, weight_EDH = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad_x_AD = grouped_mm(grad_AH, None, weight_EDH.mT, ctx.rows) if needs_x else None
        grad_EDH = grouped_outer(x_AD, None, grad_AH, ctx.rows, weight_EDH.dtype) if needs_weight else None
        return grad_x_AD, grad_EDH, None


@triton.jit
def _grouped_mm(
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
    GATHER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Consecutive programs compute the blocks of one tile and so reuse its rows. The next tile mostly belongs to the
    # same expert, so its matrix is reused too.
    blocks = tl.cdiv(outputs, BLOCK_N)
    tile = tl.program_id(0) // blocks
    e = tl.load(expert + tile)
    if e >= experts:
        return
    row = tl.load(first + tile) + tl.arange(0, BLOCK_M)  # int64: rows times inputs may pass 2^31
    row_valid = row < tl.load(ends + e)
    column = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    source = tl.load(token + row, mask=row_valid, other=0) if GATHER else row
    x_at = x + source[:, None] * inputs + k[None, :]
    w_at = w + e * w_expert + k[:, None] * w_row + column[None, :] * w_column
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, inputs, BLOCK_K):
        k_valid = start + k < inputs
        x_block = tl.load(x_at + start, mask=row_valid[:, None] & k_valid[None, :], other=0.0)
        w_block = tl.load(w_at + start * w_row, mask=k_valid[:, None] & (column < outputs)[None, :], other=0.0)
        total = tl.dot(x_block, w_block.to(x_block.dtype), total, input_precision=PRECISION)
    if RELU:
        total = tl.where(total < 0, 0.0, total)  # NaN stays
    at = row[:, None] * outputs + column[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=row_valid[:, None] & (column < outputs)[None, :])


@triton.jit
def _grouped_outer(
    x,
    token,
    grad,
    out,
    ends,
    experts,
    inputs,
    outputs,
    splits,
    GATHER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks_n = tl.cdiv(outputs, BLOCK_N)
    blocks = tl.cdiv(inputs, BLOCK_M) * blocks_n
    block = tl.program_id(0) % blocks
    matrix = (tl.program_id(0) // blocks).to(tl.int64)  # split * experts + expert
    e = matrix % experts
    begin = tl.load(ends + e - 1, mask=e > 0, other=0)
    end = tl.load(ends + e)
    # Every split has equally many rows, in whole blocks; the last splits may have fewer or none.
    size = tl.cdiv(tl.cdiv(end - begin, splits), BLOCK_K) * BLOCK_K
    begin += matrix // experts * size
    end = tl.minimum(end, begin + size)
    m = block // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        row_valid = row < end
        source = tl.load(token + row, mask=row_valid, other=0) if GATHER else row
        x_block = tl.load(
            x + source[None, :] * inputs + m[:, None], mask=row_valid[None, :] & (m < inputs)[:, None], other=0.0
        )
        grad_block = tl.load(
            grad + row[:, None] * outputs + n[None, :], mask=row_valid[:, None] & (n < outputs)[None, :], other=0.0
        )
        total = tl.dot(x_block, grad_block, total, input_precision=PRECISION)
    at = (matrix * inputs + m[:, None]) * outputs + n[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(m < inputs)[:, None] & (n < outputs)[None, :])
