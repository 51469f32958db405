"""Initial weights, drawn so that a process draws none but the rows it holds, and the same ones whoever holds them.

The paper gives no deviations (docs/design.md says why these).
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from moe_lm.seeds import derive_seed
from moe_lm.thread_pool import run_parallel

_BLOCK = 1024
"""Rows of a vocabulary's matrix that share a seed."""

_WORTH_THREADS = 1 << 22
"""Numbers that take longer to draw than threads to begin."""


def initialize_(weight: Tensor, deviation: float, generator: torch.Generator | None = None) -> None:
    """Draw uniformly with this standard deviation."""
    bound = deviation * math.sqrt(3)
    nn.init.uniform_(weight, -bound, bound, generator)


def initialize_experts_(weight_E: Tensor, deviation: float, numbers: range) -> None:
    """Draw the matrices of the experts with these numbers, each from a seed of its own."""
    _draw_rows_(weight_E, numbers, 1, lambda rows, generator: initialize_(rows, deviation, generator))


def initialize_words_(weight_VD: Tensor, deviation: float, numbers: range) -> None:
    """Draw the rows of the words with these numbers from a normal distribution, block by block."""
    _draw_rows_(weight_VD, numbers, _BLOCK, lambda rows, generator: rows.normal_(0, deviation, generator=generator))


@torch.no_grad()
def _draw_rows_(
    weight: Tensor, numbers: range, in_block: int, draw: Callable[[Tensor, torch.Generator], object]
) -> None:
    if weight.is_meta:
        return
    base = int(torch.randint(2**62, (), device="cpu"))
    blocks = range(numbers.start // in_block, -(-numbers.stop // in_block))

    def some(blocks: range) -> None:
        generator = torch.Generator()
        for block in blocks:
            rows = weight.new_empty(in_block, *weight.shape[1:])
            draw(rows, generator.manual_seed(derive_seed(base, block)))
            start = block * in_block
            first, last = max(start, numbers.start), min(start + in_block, numbers.stop)
            weight[first - numbers.start : last - numbers.start] = rows[first - start : last - start]

    # A thread of its own is not in the inference mode that this one may be in.
    alone = weight.numel() < _WORTH_THREADS or torch.is_inference_mode_enabled()
    threads = 1 if alone else torch.get_num_threads()
    run_parallel([partial(some, blocks[place::threads]) for place in range(threads)])
