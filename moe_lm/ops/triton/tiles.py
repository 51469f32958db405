"""Tiles of rows for the grouped products, the sizes of their blocks, and the limits of the GPU.

Shape suffixes: A rows, E experts, M tiles of rows.
"""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moe_lm.ops.triton.rows import split_segments

MAX_BLOCK_M, _MIN_BLOCK = 128, 16
"""Maximum rows of a tile, and minimum rows and columns of a block, as tensor cores need them."""


class BlockShape(NamedTuple):
    """The largest shape of the blocks that a program multiplies."""

    block_n: int
    """Columns of the output."""
    block_k: int
    """Terms of the sum that one step takes."""
    stages: int
    """Steps whose loads are in flight."""


class Tiles(NamedTuple):
    """Tiles of consecutive rows of one expert; a program multiplies the rows of one tile."""

    expert_M: Tensor
    """The expert of each tile (int64); E for a tile that is not used."""
    first_M: Tensor
    """The first row of each tile (int64)."""
    ends_E: Tensor
    """The end of each expert's rows (int64)."""
    block_m: int
    """Rows of a tile; the last tile of an expert may have fewer."""


def tiles_of(ends_E: Tensor, num_rows: int) -> Tiles:
    """Return the tiles of `num_rows` rows sorted by expert, where the rows of expert e end at `ends_E[e]`."""
    # An average expert fits into one tile, so that its matrix is read once.
    block_m = block_size(-(-num_rows // len(ends_E)), MAX_BLOCK_M)
    ends_E = ends_E.long()
    expert_M, first_M, _ = split_segments(ends_E, num_rows, block_m)
    return Tiles(expert_M, first_M, ends_E, block_m)


def block_size(size: int, most: int) -> int:
    """Return the side of a block for `size` rows or columns: a power of two that covers them, or `most`."""
    return min(most, max(_MIN_BLOCK, triton.next_power_of_2(size)))


def num_stages(shape: BlockShape, rows: int, x: Tensor, other: Tensor) -> int:
    """Return the stages of `shape`, or as many as fit into shared memory with blocks of `rows` rows."""
    step_bytes = shape.block_k * (rows * x.element_size() + shape.block_n * other.element_size())
    return max(1, min(shape.stages, _shared_bytes(x.device) // step_bytes))


def num_warps(numbers: int) -> int:
    """Return the number of warps for a block of `numbers` numbers."""
    return 8 if numbers >= 128**2 else 4


def token_pointer(token_A: Tensor | None, tiles: Tiles) -> Tensor:
    """Return the tokens contiguous, as kernels read them; without tokens, a tensor that is not read."""
    return tiles.ends_E if token_A is None else token_A.contiguous()


def input_precision(x: Tensor, *, along_rows: bool = False) -> str:
    """Return Triton's `input_precision` for factors like x: TF32 where PyTorch's float32 products may use it.

    Tensor cores do not support TF32 where a sum runs from row to row in memory. There each factor is split into two
    bfloat16 numbers, with 16 bits of mantissa together; the interpreter does not know this precision.
    """
    if x.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    return "bf16x3" if along_rows and x.is_cuda else "tf32"


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    """Return the shared memory that a program may use on this device; for the interpreter, Hopper's."""
    if device.type != "cuda":
        return 227 << 10
    found = torch.cuda.get_device_properties(device)
    return getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block)  # AMD has the latter only
