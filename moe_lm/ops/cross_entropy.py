"""Cross-entropy over many candidate words, a chunk of tokens at a time, so that the logits never exist all at once.

Shape suffixes: T tokens, D width, C candidate words, V vocabulary.
"""

from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lm.ops.operation import operation, triton_runs

_MAX_ROWS_ON_CPU = 512
"""Maximum tokens per chunk in training: few enough for a cache to keep some logits, enough for efficient products."""

_CACHE_LINE = 16
"""Float32 numbers per cache line; products take up to twice as long if rows of logits begin inside a line."""

_MIN_PROBABILITY = 1e-30
"""Smallest probability whose logarithm is exact enough in float32."""

_EVALUATION_ROWS = 1024
"""Tokens per chunk of exact evaluation: enough to make reading the whole matrix worthwhile."""


@operation
def candidate_nats(
    hidden_TD: Tensor,
    weight_CD: Tensor,
    bias_C: Tensor,
    true_T: Tensor,
    hit_T: Tensor,
    chunk_logits: int,  # noqa: ARG001
) -> Tensor:
    """Return the sum over tokens of -log p(true word) in float64, differentiable in the first four arguments.

    The candidates' logits are hidden weight^T + bias, the true word's logit is `true_T`. If the true word is itself a
    candidate, `hit_T` (int64) is that candidate's column, which is left out; otherwise it is -1. Fast versions hold at
    most `chunk_logits` logits at a time; their products have the autocast type.
    """
    logits_TC = hidden_TD @ weight_CD.t() + bias_C
    is_hit_TC = torch.arange(len(bias_C), device=hit_T.device) == hit_T.unsqueeze(1)
    logits_TC = torch.cat([logits_TC.masked_fill(is_hit_TC, -torch.inf), true_T.unsqueeze(1)], dim=1)
    return -logits_TC.double().log_softmax(dim=1)[:, -1].sum()


@operation
@torch.no_grad()
def token_nats(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    target_T: Tensor,
    chunk_logits: int,  # noqa: ARG001
) -> Tensor:
    """Return each token's -log p(target) over all V words, float64 (T,), without gradients.

    The fast version holds at most `chunk_logits` logits at a time. Products have the weights' type, whatever the
    autocast type.
    """
    with torch.autocast(hidden_TD.device.type, enabled=False):
        logits_TV = hidden_TD.to(weight_VD.dtype) @ weight_VD.t() + bias_V
    return -logits_TV.double().log_softmax(dim=1).gather(1, target_T.unsqueeze(1)).squeeze(1)


@torch.no_grad()
def _token_nats_in_chunks(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor, target_T: Tensor, chunk_logits: int
) -> Tensor:
    num_tokens, num_words = len(hidden_TD), len(weight_VD)
    nats_T = hidden_TD.new_zeros(num_tokens, dtype=torch.float64)
    # With few tokens per chunk, the matrix of a large vocabulary would be read again and again. The vocabulary is
    # therefore divided into chunks too.
    rows = min(max(1, chunk_logits // _whole_lines(num_words), _EVALUATION_ROWS), chunk_logits)
    columns = chunk_logits // rows
    columns = min(columns // _CACHE_LINE * _CACHE_LINE or columns, _whole_lines(num_words))
    buffer_TC = weight_VD.new_empty(min(rows, num_tokens), columns)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        for first in range(0, num_tokens, rows):
            chunk = slice(first, first + rows)
            hidden = hidden_TD[chunk].to(weight_VD.dtype)
            nats_T[chunk] = _chunk_nats(hidden, weight_VD, bias_V, target_T[chunk], buffer_TC[: len(hidden)])
    return nats_T


def _chunk_nats(hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor, target_T: Tensor, buffer_TC: Tensor) -> Tensor:
    """Walk over the vocabulary, as many words at a time as the buffer has columns, adding up logsumexp in float64."""
    log_sum_T = hidden_TD.new_full((hidden_TD.shape[0],), -torch.inf, dtype=torch.float64)
    true_T = torch.zeros_like(log_sum_T)
    columns = buffer_TC.shape[1]
    for first in range(0, weight_VD.shape[0], columns):
        words = slice(first, first + columns)
        bias = bias_V[words]
        logits = torch.addmm(bias, hidden_TD, weight_VD[words].t(), out=buffer_TC[:, : len(bias)])
        column_T = target_T - first
        inside_T = (column_T >= 0) & (column_T < logits.shape[1])
        own_T = logits.gather(1, column_T.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
        true_T = torch.where(inside_T, own_T.double(), true_T)
        max_T1 = logits.amax(dim=1, keepdim=True)
        chunk_T = logits.sub_(max_T1).exp_().sum(dim=1).log().double() + max_T1.squeeze(1).double()
        log_sum_T = torch.logaddexp(log_sum_T, chunk_T)
    return log_sum_T - true_T


class _CandidateNats(torch.autograd.Function):
    """Gradients are computed in the forward pass, while a chunk's probabilities are in memory.

    `softmax` computes the probabilities of one chunk after another. The three products and, if the kernel computes
    them, the probabilities have the type `product`; sums, exponentials and gradients keep the arguments' types.
    """

    @staticmethod
    def forward(ctx, hidden_TD, weight_CD, bias_C, true_T, hit_T, chunk_logits, product, softmax):
        needed = any(ctx.needs_input_grad)
        grads = [torch.zeros_like(x) for x in (hidden_TD, weight_CD, bias_C, true_T)] if needed else []
        total = hidden_TD.new_zeros((), dtype=torch.float64)
        weight = weight_CD.to(product)
        softmax = softmax(len(hidden_TD), bias_C, chunk_logits)
        for first in range(0, len(hidden_TD), softmax.rows):
            chunk = slice(first, first + softmax.rows)
            hidden = hidden_TD[chunk].to(product)
            probability, true_probability, nats = softmax(hidden, weight, bias_C, true_T[chunk], hit_T[chunk])
            total += nats.sum(dtype=torch.float64)
            if needed:
                grads[2].add_(probability.sum(dim=0, dtype=bias_C.dtype))
                grads[3][chunk] = true_probability - 1
                probability = probability.to(product)
                grads[0][chunk] = probability @ weight
                _add_product_(grads[1], probability.t(), hidden)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *(saved * grad.to(saved.dtype) for saved in ctx.saved_tensors), None, None, None, None


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


class _TritonSoftmax:
    """One kernel turns the candidates' logits into probabilities in place; true words' probabilities are separate."""

    def __init__(self, num_tokens: int, bias_C: Tensor, chunk_logits: int):
        self.rows = max(1, min(chunk_logits // len(bias_C), num_tokens))

    def __call__(
        self, hidden_TD: Tensor, weight_CD: Tensor, bias_C: Tensor, true_T: Tensor, hit_T: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the probabilities of the candidates (T, C) and of the true words (T), and -log of the latter."""
        from moe_lm.ops.triton.softmax import probabilities_  # Triton is not installed everywhere, and slow to import

        logits_TC = torch.mm(hidden_TD, weight_CD.t())
        return logits_TC, *probabilities_(logits_TC, bias_C, true_T, hit_T)


class _TorchSoftmax:
    """Adds the true word's logit as one more column, so that one pass of `torch.softmax` serves all columns."""

    def __init__(self, num_tokens: int, bias_C: Tensor, chunk_logits: int):
        columns = len(bias_C) + 1
        if _whole_lines(columns) <= chunk_logits:
            columns = _whole_lines(columns)
        max_rows = _MAX_ROWS_ON_CPU if bias_C.is_cpu else num_tokens
        self.rows = max(1, min(chunk_logits // columns, max_rows))
        # All chunks share one buffer, which a cache may hold.
        self._buffer_TC = bias_C.new_empty(min(self.rows, num_tokens), columns)

    def __call__(
        self, hidden_TD: Tensor, weight_CD: Tensor, bias_C: Tensor, true_T: Tensor, hit_T: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the probabilities of the candidates (T, C) and of the true words (T), and -log of the latter."""
        every, num_candidates = self._buffer_TC[: len(true_T)], len(weight_CD)
        _write_logits_(every[:, :num_candidates], hidden_TD, weight_CD, bias_C, hit_T)
        every[:, num_candidates] = true_T
        every[:, num_candidates + 1 :] = -torch.inf
        torch.softmax(every, dim=1, out=every)
        probability_T = every[:, num_candidates]
        nats_T = -probability_T.log()
        small = (probability_T < _MIN_PROBABILITY).nonzero().squeeze(1)
        for some in small.split(max(1, len(true_T) // 8)):  # a few at a time, as their logits need memory again
            nats_T[some] = _exact_nats(hidden_TD[some], weight_CD, bias_C, true_T[some], hit_T[some])
        return every[:, :num_candidates], probability_T, nats_T


def _whole_lines(columns: int) -> int:
    return -(-columns // _CACHE_LINE) * _CACHE_LINE


def _write_logits_(logits_TC: Tensor, hidden_TD: Tensor, weight_CD: Tensor, bias_C: Tensor, hit_T: Tensor) -> None:
    """Write the candidates' logits, -infinity for a candidate that is left out."""
    if logits_TC.dtype == weight_CD.dtype:
        torch.mm(hidden_TD, weight_CD.t(), out=logits_TC)
    else:
        logits_TC.copy_(hidden_TD @ weight_CD.t())
    logits_TC.add_(bias_C)
    hit_T1 = hit_T.unsqueeze(1)
    column_T1 = hit_T1.clamp(min=0)
    logits_TC.scatter_(1, column_T1, logits_TC.gather(1, column_T1).masked_fill(hit_T1 >= 0, -torch.inf))


def _exact_nats(hidden_TD: Tensor, weight_CD: Tensor, bias_C: Tensor, true_T: Tensor, hit_T: Tensor) -> Tensor:
    """Return -log of true words' probabilities that are too small to take their logarithm."""
    logits_TC = bias_C.new_empty(len(true_T), len(bias_C))
    _write_logits_(logits_TC, hidden_TD, weight_CD, bias_C, hit_T)
    return torch.logaddexp(logits_TC.logsumexp(dim=1), true_T) - true_T


def _candidate_nats_in_chunks(*arguments: Tensor | int, softmax: type[_TorchSoftmax] | type[_TritonSoftmax]) -> Tensor:
    device, dtype = arguments[0].device.type, arguments[1].dtype
    product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
    with torch.autocast(device, enabled=False):
        return _CandidateNats.apply(*arguments, product, softmax)


candidate_nats.register(
    partial(_candidate_nats_in_chunks, softmax=_TritonSoftmax), when=lambda _, weight_CD, *__: triton_runs(weight_CD)
)
candidate_nats.register(partial(_candidate_nats_in_chunks, softmax=_TorchSoftmax), when=lambda *_: True)
token_nats.register(_token_nats_in_chunks, when=lambda *_: True)
