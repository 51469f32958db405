"""Triton kernel of `moe_lm.ops.cross_entropy`: logits become probabilities in place, in one pass.

PyTorch's operators read or write the logits a dozen times; for 300,000 tokens and 8,192 words each pass moves 5 to
10 GB.

Shape suffixes: T tokens, C candidate words.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_BLOCK, _WARPS = 1024, 8
"""Logits that one program holds at a time, and its warps: the fastest of nine pairs on an H100."""


def probabilities_(logits_TC: Tensor, bias_C: Tensor, true_T: Tensor, hit_T: Tensor) -> tuple[Tensor, Tensor]:
    """Replace logits without bias by probabilities; return the true words' probabilities and their -log, in float32.

    The true word has no column. If it is also a candidate, its candidate column `hit_T` gets the probability 0.
    """
    num_tokens, num_candidates = logits_TC.shape
    true_probability_T, nats_T = (true_T.new_empty(num_tokens, dtype=torch.float32) for _ in range(2))
    if num_tokens:
        block = min(_MAX_BLOCK, triton.next_power_of_2(num_candidates))
        assert logits_TC.is_contiguous()  # the kernel changes them in place
        read = [tensor.contiguous() for tensor in (bias_C, true_T, hit_T)]
        rows = logits_TC, *read, true_probability_T, nats_T
        _probabilities[(num_tokens,)](*rows, num_candidates, BLOCK=block, num_warps=_WARPS)
    return true_probability_T, nats_T


@triton.jit
def _probabilities(logits, bias, true, hit, true_probability, nats, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # rows times columns may pass 2^31
    own = tl.load(true + row).to(tl.float32)
    left_out = tl.load(hit + row)
    top = own
    total = own * 0.0 + 1.0  # the true word's own share, exp(own - top)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        counts = (column < columns) & (column != left_out)
        value = tl.load(logits + row * columns + column, mask=counts, other=float("-inf")).to(tl.float32)
        value += tl.load(bias + column, mask=counts, other=0.0).to(tl.float32)
        higher = tl.maximum(top, tl.max(value, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(value - higher), axis=0)
        top = higher
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        counts = (column < columns) & (column != left_out)
        at = logits + row * columns + column
        value = tl.load(at, mask=counts, other=float("-inf")).to(tl.float32)
        value += tl.load(bias + column, mask=counts, other=0.0).to(tl.float32)
        tl.store(at, (tl.exp(value - top) / total).to(logits.dtype.element_ty), mask=column < columns)
    tl.store(true_probability + row, tl.exp(own - top) / total)
    tl.store(nats + row, tl.log(total) + top - own)
