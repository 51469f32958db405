"""Initial weights, drawn so that any subset of a matrix's rows can be drawn alone and equals those rows of the whole.

The paper gives no standard deviations; docs/decisions/model.md gives the reasons for those chosen here.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from moe_lm.seeds import derive_seed
from moe_lm.thread_pool import run_parallel

_ROWS_PER_SEED = 1024
"""Rows of a vocabulary matrix that share a seed."""

_MIN_PARALLEL_NUMEL = 1 << 22
"""Smallest tensor that is drawn on several threads: smaller ones take less time than starting threads."""


def init_uniform_(weight: Tensor, std: float, generator: torch.Generator | None = None) -> None:
    """Draw uniformly with this standard deviation."""
    bound = std * math.sqrt(3)
    nn.init.uniform_(weight, -bound, bound, generator)


def init_experts_(weight_E: Tensor, std: float, experts: range) -> None:
    """Draw the matrices of these experts, each from a seed of its own."""
    _draw_rows_(weight_E, experts, 1, lambda rows, generator: init_uniform_(rows, std, generator))


def init_words_(weight_VD: Tensor, std: float, words: range) -> None:
    """Draw the rows of these words from a normal distribution, `_ROWS_PER_SEED` rows per seed."""
    _draw_rows_(weight_VD, words, _ROWS_PER_SEED, lambda rows, generator: rows.normal_(0, std, generator=generator))


@torch.no_grad()
def _draw_rows_(
    weight: Tensor, numbers: range, block_rows: int, draw: Callable[[Tensor, torch.Generator], object]
) -> None:
    if weight.is_meta:
        return
    base = int(torch.randint(2**62, (), device="cpu"))
    blocks = range(numbers.start // block_rows, -(-numbers.stop // block_rows))

    def draw_blocks(blocks: range) -> None:
        generator = torch.Generator()
        for block in blocks:
            rows = weight.new_empty(block_rows, *weight.shape[1:])
            draw(rows, generator.manual_seed(derive_seed(base, block)))
            start = block * block_rows
            first, last = max(start, numbers.start), min(start + block_rows, numbers.stop)
            weight[first - numbers.start : last - numbers.start] = rows[first - start : last - start]

    # Threads of the pool do not inherit the inference mode of this thread.
    single = weight.numel() < _MIN_PARALLEL_NUMEL or torch.is_inference_mode_enabled()
    threads = 1 if single else torch.get_num_threads()
    run_parallel([partial(draw_blocks, blocks[place::threads]) for place in range(threads)])
