"""The weighted sum of experts (eq. 1) as a loop of matrix products inside one autograd node: for CPUs, and float32.

Indexing stacked weights inside autograd would cost a full-size gradient per expert. What is made of an expert's rows,
from the gather of its tokens to the sum of its answers, is used up while it is in the cache, and of it the hidden
activations alone are kept. The gradient of a gate value, grad . E(x), is (grad W2^T) . h, so that no answer is.

Shape suffixes: T tokens, D width, H expert hidden, E experts, A assignments.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lm.ops.cpu_rows import add_, gathered, hidden_gradient_
from moe_lm.ops.expert_products import outer_products, products
from moe_lm.ops.gradient_memory import new_gradient
from moe_lm.thread_pool import run_parallel

_BYTES = 4 << 20
"""Of hidden activations that are worked on together, where an expert's own are not more: few enough for a core's cache,
and so many that small experts do not pay for each operation on a few rows."""

_WORTHWHILE = 1 << 29
"""Multiply-adds of a product, some milliseconds, from which on threads take experts of their own."""

_UNEQUAL = 1.25
"""Of an equal share, what one thread may have."""


class _Block(NamedTuple):
    """Experts that are worked on together, and their rows among all assignments."""

    experts: slice
    rows: slice
    sizes: list[int]


Part = list[_Block]
"""What one thread works on."""


def experts_loop(
    x_TD: Tensor,
    token_A: Tensor,
    gate_A: Tensor,
    ends_E: Tensor,
    w1_EDH: Tensor,
    w2_EHD: Tensor,
    *,
    recompute: bool = False,
) -> Tensor:
    """Return y_TD, of each token the sum over its assignments of gate * ReLU(x W1) W2, zeros where there are none.

    Assignments are sorted by expert, those of expert e end at `ends_E[e]` (int64). `recompute` makes the hidden
    activations anew in the backward pass, a block of experts at a time and with the same bits.
    """
    return _LoopedMixture.apply(x_TD, token_A, gate_A, ends_E, w1_EDH, w2_EHD, recompute)


class _LoopedMixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, token_A, gate_A, ends_E, w1_EDH, w2_EHD, recompute):
        ctx.parts = _parts(ends_E.tolist(), w1_EDH)
        h_AH = None if recompute else x_TD.new_empty(len(token_A), w1_EDH.shape[2])
        kept = x_TD, token_A, gate_A, h_AH, w1_EDH, w2_EHD
        y_TD = _summed(partial(_add_answers_, kept), ctx.parts, x_TD)
        ctx.save_for_backward(*kept)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD):
        kept = ctx.saved_tensors  # read once: torch's checkpointing forgets them
        x_TD, _, gate_A, _, *weights = kept
        grads = torch.empty_like(gate_A), *(new_gradient(weight) for weight in weights)
        grad_x_TD = _summed(partial(_add_gradients_, kept, grad_TD, grads), ctx.parts, x_TD)
        return grad_x_TD, None, grads[0], None, *grads[1:], None


def _summed(add_of_: Callable[[Part, Tensor], None], parts: list[Part], like_TD: Tensor) -> Tensor:
    """Return the sum of what all parts add to zeros, at the same time."""
    sums = [torch.zeros_like(like_TD) for _ in parts]
    run_parallel([partial(add_of_, part, sum_TD) for part, sum_TD in zip(parts, sums, strict=True)])
    for sum_TD in sums[1:]:
        sums[0].add_(sum_TD)
    return sums[0]


def _add_answers_(kept: Sequence[Tensor], part: Part, y_TD: Tensor) -> None:
    x_TD, token_A, gate_A, h_AH, w1_EDH, w2_EHD = kept
    rows_RD = _room(part, x_TD)
    for block, h in _with_hidden(part, h_AH, w1_EDH):
        token = token_A[block.rows]
        x = y = rows_RD[: len(token)]
        products(gathered(x_TD, token, x), block.sizes, w1_EDH[block.experts], h)
        products(h.relu_(), block.sizes, w2_EHD[block.experts], y)
        add_(y_TD, token, y, gate_A[block.rows])


def _add_gradients_(
    kept: Sequence[Tensor], grad_TD: Tensor, grads: Sequence[Tensor], part: Part, grad_x_TD: Tensor
) -> None:
    x_TD, token_A, gate_A, h_AH, w1_EDH, w2_EHD = kept
    grad_gate_A, grad_w1_EDH, grad_w2_EHD = grads
    x_RD, grad_RD = _room(part, x_TD), _room(part, x_TD)
    hidden = _with_hidden(part, h_AH, w1_EDH), _with_hidden(part, None, w1_EDH)
    for (block, h), (_, grad_h) in zip(*hidden, strict=True):
        sizes, w1, w2 = block.sizes, w1_EDH[block.experts], w2_EHD[block.experts]
        token, gate = token_A[block.rows], gate_A[block.rows]
        x, grad = gathered(x_TD, token, x_RD[: len(token)]), gathered(grad_TD, token, grad_RD[: len(token)])
        if h_AH is None:
            products(x, sizes, w1, h).relu_()
        products(grad, sizes, w2.mT, grad_h)
        hidden_gradient_(grad_h, h, gate, grad_gate_A[block.rows])
        grad.mul_(gate.unsqueeze(1))
        outer_products(h, sizes, grad, grad_w2_EHD[block.experts])
        outer_products(x, sizes, grad_h, grad_w1_EDH[block.experts])
        add_(grad_x_TD, token, products(grad_h, sizes, w1.mT, x))


def _parts(ends: list[int], w1_EDH: Tensor) -> list[Part]:
    """Share the experts out among threads: one part where that would not be faster."""
    threads, row_bytes = torch.get_num_threads(), w1_EDH.shape[2] * w1_EDH.element_size()
    if w1_EDH.is_cuda or threads == 1 or ends[-1] * w1_EDH[0].numel() < _WORTHWHILE:
        return [_blocks(ends, _BYTES // row_bytes)]
    blocks = _blocks(ends, min(_BYTES // row_bytes, ends[-1] // (4 * threads)))
    parts: list[Part] = [[] for _ in range(threads)]
    for block in blocks:
        middle = (block.rows.start + block.rows.stop) // 2
        parts[min(middle * threads // ends[-1], threads - 1)].append(block)
    largest = max(sum(sum(block.sizes) for block in part) for part in parts)
    # All wait for the largest: with few experts, or most rows for one, all threads had better work on each.
    return [part for part in parts if part] if largest * threads <= _UNEQUAL * ends[-1] else [blocks]


def _blocks(ends: list[int], most: int) -> Part:
    """Cut the experts into blocks of as many as have no more rows than `most`, but at least one."""
    blocks, first, start = [], 0, 0
    sizes = [end - begin for begin, end in itertools.pairwise([0, *ends])]
    for expert, end in enumerate(ends, start=1):
        if expert == len(ends) or ends[expert] - start > most:
            blocks.append(_Block(slice(first, expert), slice(start, end), sizes[first:expert]))
            first, start = expert, end
    return blocks


def _room(part: Part, like_TD: Tensor) -> Tensor:
    """Return memory for the rows of any of these blocks: each finds that of the last one in the cache."""
    return like_TD.new_empty(max(sum(block.sizes) for block in part), like_TD.shape[1])


def _with_hidden(blocks: list[_Block], h_AH: Tensor | None, w1_EDH: Tensor) -> Iterator[tuple[_Block, Tensor]]:
    """Yield each block with its rows of h_AH or, without one, a view of memory as large as the largest block's.

    A product's last bits depend on how its memory is aligned, so each view lies as far behind a multiple of 64 bytes
    (a cache line, at which torch's memory begins) as the block's slice of a whole h_AH would.
    """
    if h_AH is not None:
        yield from ((block, h_AH[block.rows]) for block in blocks)
        return
    hidden, line = w1_EDH.shape[2], 64 // w1_EDH.element_size()
    memory = w1_EDH.new_empty(max(sum(block.sizes) for block in blocks) * hidden + line)
    for block in blocks:
        yield block, memory.as_strided((sum(block.sizes), hidden), (hidden, 1), block.rows.start * hidden % line)
