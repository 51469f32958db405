"""Cross-entropy over many candidates, a block of tokens at a time: the logits never exist all at once.

Shape suffixes: T tokens, D width, C candidate words.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lm.ops.backend import by_triton

_MOST_ROWS_ON_CPU = 512
"""Tokens a block in training: the passes over its logits find some in the cache, its products are large enough."""

_LINE = 16
"""Numbers of a cache line, of which rows of logits are whole ones: a product may take twice as long where they begin
amid one (docs/performance.md)."""

_FAINT = 1e-30
"""A probability below which float32's rounding begins to show in its logarithm."""

_LEAST_ROWS = 1024
"""Tokens a block of exact evaluation, where there are as many: enough for a product to be worth its reading."""


def summed_nats(
    hidden_TD: Tensor, weight_CD: Tensor, bias_C: Tensor, true_T: Tensor, hit_T: Tensor, max_logits: int
) -> Tensor:
    """Return sum over tokens of -log p(true word) in float64, differentiable in the first four arguments.

    The candidates' logits are hidden weight^T + bias, the true word's are `true_T`; where the true word is
    itself a candidate, `hit_T` (int64) names that column, which is left out (-1: it is none).
    """
    device = hidden_TD.device.type
    product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_CD.dtype
    with torch.autocast(device, enabled=False):
        return _SummedNats.apply(hidden_TD, weight_CD, bias_C, true_T, hit_T, max_logits, product)


@torch.no_grad()
def exact_nats(hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor, target_T: Tensor, max_logits: int) -> Tensor:
    """Return each token's -log p(target) over all V words, float64 (T,); at most `max_logits` logits at a time."""
    nats_T = hidden_TD.new_zeros(hidden_TD.shape[0], dtype=torch.float64)
    # A block of few tokens would read the whole of a large vocabulary's matrix again and again.
    rows = min(max(1, max_logits // _whole_lines(weight_VD.shape[0]), _LEAST_ROWS), max_logits)
    columns = max_logits // rows
    columns = min(columns // _LINE * _LINE or columns, _whole_lines(weight_VD.shape[0]))
    room_TC = weight_VD.new_empty(min(rows, hidden_TD.shape[0]), columns)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        for first in range(0, hidden_TD.shape[0], rows):
            block = slice(first, first + rows)
            hidden = hidden_TD[block].to(weight_VD.dtype)
            nats_T[block] = _block_nats(hidden, weight_VD, bias_V, target_T[block], room_TC[: len(hidden)])
    return nats_T


def _block_nats(hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor, target_T: Tensor, room_TC: Tensor) -> Tensor:
    """Walk over the vocabulary, as many words at a time as the room has columns, summing exponentials in log space."""
    log_sum_T = hidden_TD.new_full((hidden_TD.shape[0],), -torch.inf, dtype=torch.float64)
    true_T = torch.zeros_like(log_sum_T)
    columns = room_TC.shape[1]
    for first in range(0, weight_VD.shape[0], columns):
        block = slice(first, first + columns)
        bias = bias_V[block]
        logits = torch.addmm(bias, hidden_TD, weight_VD[block].t(), out=room_TC[:, : len(bias)])
        place_T = target_T - first
        inside_T = (place_T >= 0) & (place_T < logits.shape[1])
        own_T = logits.gather(1, place_T.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
        true_T = torch.where(inside_T, own_T.double(), true_T)
        top_T1 = logits.amax(dim=1, keepdim=True)
        block_T = logits.sub_(top_T1).exp_().sum(dim=1).log().double() + top_T1.squeeze(1).double()
        log_sum_T = torch.logaddexp(log_sum_T, block_T)
    return log_sum_T - true_T


class _SummedNats(torch.autograd.Function):
    """The gradients are made in the forward pass, while a block's probabilities are at hand.

    The three products, and with our kernel the probabilities, have the type `product`; sums, exponentials and gradients
    keep the arguments' types.
    """

    @staticmethod
    def forward(ctx, hidden_TD, weight_CD, bias_C, true_T, hit_T, max_logits, product):
        arguments = (hidden_TD, weight_CD, bias_C, true_T)
        needed = any(ctx.needs_input_grad)
        grads = [torch.zeros_like(x) for x in arguments] if needed else []
        total = hidden_TD.new_zeros((), dtype=torch.float64)
        weight = weight_CD.to(product)
        most_rows = _MOST_ROWS_ON_CPU if hidden_TD.is_cpu else hidden_TD.shape[0]
        in_a_kernel = by_triton(weight)
        # Without the kernel the true word's logit stands beside the candidates'.
        columns = weight.shape[0] if in_a_kernel else weight.shape[0] + 1
        if not in_a_kernel and _whole_lines(columns) <= max_logits:
            columns = _whole_lines(columns)
        rows = max(1, min(max_logits // columns, most_rows))
        # One memory for all blocks, which the cache may hold; the kernel has its own.
        room_TC = None if in_a_kernel else bias_C.new_empty(min(rows, hidden_TD.shape[0]), columns)
        for first in range(0, hidden_TD.shape[0], rows):
            block = slice(first, first + rows)
            hidden = hidden_TD[block].to(product)
            of_block = hidden, weight, bias_C, true_T[block], hit_T[block]
            probability, true_probability, nats = _probabilities(*of_block, room_TC)
            total += nats.sum(dtype=torch.float64)
            if needed:
                grads[2].add_(probability.sum(dim=0, dtype=bias_C.dtype))
                grads[3][block] = true_probability - 1
                probability = probability.to(product)
                grads[0][block] = probability @ weight
                _add_product(grads[1], probability.t(), hidden)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *(saved * grad.to(saved.dtype) for saved in ctx.saved_tensors), None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


def _probabilities(
    hidden_TD: Tensor, weight_CD: Tensor, bias_C: Tensor, true_T: Tensor, hit_T: Tensor, room_TC: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the candidates' probabilities (T, C), the true word's, and -log of the latter; None: by the kernel.

    The room has more columns than there are candidates.
    """
    if room_TC is None:
        from moe_lm.ops.triton.softmax import probabilities_  # Triton is not everywhere, and slow to import

        logits_TC = torch.mm(hidden_TD, weight_CD.t())
        return logits_TC, *probabilities_(logits_TC, bias_C, true_T, hit_T)
    # With the true word's logit as one more column torch's softmax, one pass, serves all of them.
    every, num_candidates = room_TC[: len(true_T)], len(weight_CD)
    _logits(hidden_TD, weight_CD, bias_C, hit_T, every[:, :num_candidates])
    every[:, num_candidates] = true_T
    every[:, num_candidates + 1 :] = -torch.inf
    torch.softmax(every, dim=1, out=every)
    probability_T = every[:, num_candidates]
    nats_T = -probability_T.log()
    faint = (probability_T < _FAINT).nonzero().squeeze(1)
    for some in faint.split(max(1, len(true_T) // 8)):  # a few, as their logits need room once more
        nats_T[some] = _nats(hidden_TD[some], weight_CD, bias_C, true_T[some], hit_T[some])
    return every[:, :num_candidates], probability_T, nats_T


def _whole_lines(columns: int) -> int:
    return -(-columns // _LINE) * _LINE


def _logits(hidden_TD: Tensor, weight_CD: Tensor, bias_C: Tensor, hit_T: Tensor, to_TC: Tensor) -> None:
    """Write the candidates' logits, -infinity for the one that is left out."""
    if to_TC.dtype == weight_CD.dtype:
        torch.mm(hidden_TD, weight_CD.t(), out=to_TC)
    else:
        to_TC.copy_(hidden_TD @ weight_CD.t())
    to_TC.add_(bias_C)
    hit_T1 = hit_T.unsqueeze(1)
    column_T1 = hit_T1.clamp(min=0)
    to_TC.scatter_(1, column_T1, to_TC.gather(1, column_T1).masked_fill(hit_T1 >= 0, -torch.inf))


def _nats(hidden_TD: Tensor, weight_CD: Tensor, bias_C: Tensor, true_T: Tensor, hit_T: Tensor) -> Tensor:
    """Return -log of true words' probabilities that are too small to be taken the logarithm of."""
    logits_TC = bias_C.new_empty(len(true_T), len(bias_C))
    _logits(hidden_TD, weight_CD, bias_C, hit_T, logits_TC)
    return torch.logaddexp(logits_TC.logsumexp(dim=1), true_T) - true_T
