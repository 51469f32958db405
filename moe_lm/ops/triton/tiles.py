"""What our kernels' products by expert have in common: tiles of rows, their sizes, and what a GPU makes of them.

Shape suffixes: A rows, E experts, M tiles of rows.
"""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moe_lm.ops.triton.rows import pieces_of

MOST_ROWS, _LEAST = 128, 16
"""Rows of a tile at most and, as tensor cores want them, rows and columns at least."""


class Form(NamedTuple):
    """How a program makes its tile."""

    columns: int
    """At most."""
    depth: int
    """Of the sum that one step of it takes."""
    stages: int
    """Steps on their way, at most."""


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
    side = power_of_two(-(-num_rows // len(ends_E)), MOST_ROWS)  # of a mean expert all rows: its matrix is read once
    ends_E = ends_E.long()
    expert_M, first_M, _ = pieces_of(ends_E, num_rows, side)
    return Tiles(expert_M, first_M, ends_E, num_rows, side)


def power_of_two(size: int, most: int) -> int:
    """Return a tile's side for so many rows or columns: all of them where they are few enough."""
    return min(most, max(_LEAST, triton.next_power_of_2(size)))


def stages_of(form: Form, rows: int, x: Tensor, other: Tensor) -> int:
    """Return the form's stages with tiles of so many rows, fewer where they would not fit into shared memory."""
    step_bytes = form.depth * (rows * x.element_size() + form.columns * other.element_size())
    return max(1, min(form.stages, _shared_bytes(x.device) // step_bytes))


def warps_of(numbers: int) -> int:
    """Return the warps for a tile of so many numbers."""
    return 8 if numbers >= 128**2 else 4


def tokens_read(token_A: Tensor | None, tiles: Tiles) -> Tensor:
    """Return the tokens as kernels read them, without gaps; where there are none, what is not read."""
    return tiles.ends_E if token_A is None else token_A.contiguous()


def precision_of(x: Tensor, *, along_rows: bool = False) -> str:
    """Return how much of float32 factors counts: TF32's 10 bits of mantissa where torch's products may take these.

    Tensor cores do not take TF32 where sums go from row to row in memory. There each factor is two bfloat16 numbers, of
    16 bits together, which the interpreter has no name for.
    """
    if x.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    return "bf16x3" if along_rows and x.is_cuda else "tf32"


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    """Return what a program on this device may have of fast memory; for the interpreter enough."""
    if device.type != "cuda":
        return 227 << 10
    found = torch.cuda.get_device_properties(device)
    return getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block)  # AMD's have the latter alone
