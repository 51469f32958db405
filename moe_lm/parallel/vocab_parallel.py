"""Embedding and softmax divided over processes: each holds a range of the vocabulary's rows.

Rows travel to the tokens that need them, their gradients back; the exact softmax sends tokens to the rows instead.

Shape suffixes: T tokens here, A tokens of all processes, D width, U distinct rows, R rows asked of this process,
V the vocabulary's rows here.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lm.ops.cross_entropy import exact_nats
from moe_lm.ops.sparse_rows import UniqueIndices, take_rows
from moe_lm.parallel.group import Group, Shard

PURPOSE = "rows"
"""What the bytes are counted as."""


def vocab_parallel_rows(matrix_VD: Tensor, rows: UniqueIndices, share: Shard) -> Tensor:
    """Return rows of the whole matrix (T, D) by their numbers in it, differentiable in the rows here.

    All processes of the share's group take part; each row is sent once to a process, however often it needs it.
    """
    group = share.group
    if group.size == 1:
        return take_rows(matrix_VD, rows)
    row_U, place_T, _ = rows.found
    ends = torch.tensor(share.sizes, device=row_U.device).cumsum(dim=0)
    ends_P = torch.searchsorted(row_U, ends)
    asked_P = ends_P.diff(prepend=ends_P.new_zeros(1))
    asked, given = torch.stack([asked_P, group.all_to_all_equal(asked_P, PURPOSE)]).tolist()
    row_R = group.all_to_all_raw(row_U, asked, given, PURPOSE) - share.first
    value_UD = group.all_to_all(take_rows(matrix_VD, row_R), given, asked, PURPOSE)
    return value_UD.index_select(0, place_T)


def vocab_parallel_summed_nats(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor, target_T: Tensor, max_logits: int, share: Shard
) -> Tensor:
    """Return sum over the tokens here of -log p(target) (float64), differentiable in the first three arguments."""
    with torch.autocast(hidden_TD.device.type, enabled=False):
        return _SummedNats.apply(hidden_TD, weight_VD, bias_V, target_T, max_logits, share)


@torch.no_grad()
def vocab_parallel_nats(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor, target_T: Tensor, max_logits: int, share: Shard
) -> Tensor:
    """Return each token's -log p(target) over the whole vocabulary, float64 (T,)."""
    if share.group.size == 1:
        return exact_nats(hidden_TD, weight_VD, bias_V, target_T, max_logits)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        every = _Everyone(hidden_TD.to(weight_VD.dtype), target_T, share.group)
        return every.own(every.nats(weight_VD, bias_V, max_logits, share))


class _Everyone:
    """The tokens of all processes, by process."""

    def __init__(self, hidden_TD: Tensor, target_T: Tensor, group: Group):
        parts = group.all_gather(target_T, PURPOSE)
        self.sizes = [len(part) for part in parts]
        self.target_A, self._group = torch.cat(parts), group
        self.hidden_AD = torch.cat(group.all_gather(hidden_TD, PURPOSE))

    def own(self, x_A: Tensor) -> Tensor:
        """Return the part of this process's tokens."""
        return x_A.split(self.sizes)[self._group.rank]

    def nats(self, weight_VD: Tensor, bias_V: Tensor, max_logits: int, share: Shard) -> Tensor:
        """Return -log p(target) of all tokens (float64), from each process's sums over its rows."""
        log_sum_A = self.hidden_AD.new_full(self.target_A.shape, -torch.inf, dtype=torch.float64)
        true_A = torch.zeros_like(log_sum_A)
        for tokens, words in _blocks(len(self.target_A), share.size, max_logits):
            logits = torch.addmm(bias_V[words], self.hidden_AD[tokens], weight_VD[words].t())
            place, inside = _places(self.target_A[tokens], words, share)
            found = logits.gather(1, place.unsqueeze(1)).squeeze(1).double()
            true_A[tokens] += torch.where(inside, found, 0.0)
            # In float64 from here on: the sums of all processes meet.
            log_sum_A[tokens] = torch.logaddexp(log_sum_A[tokens], logits.logsumexp(dim=1).double())
        sums_PA = torch.stack(self._group.all_gather(log_sum_A, PURPOSE))
        self.log_sum_A = sums_PA.logsumexp(dim=0)
        return self.log_sum_A - self._group.all_reduce_(true_A, PURPOSE)


class _SummedNats(torch.autograd.Function):
    """Keeps hidden states and sums; the backward pass makes each block of logits anew."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, bias_V, target_T, max_logits, share):
        every = _Everyone(hidden_TD.to(weight_VD.dtype), target_T, share.group)
        nats_A = every.nats(weight_VD, bias_V, max_logits, share)
        ctx.save_for_backward(every.hidden_AD, every.target_A, every.log_sum_A, weight_VD, bias_V)
        ctx.rest = every.sizes, max_logits, share, hidden_TD.dtype
        return every.own(nats_A).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden_AD, target_A, log_sum_A, weight_VD, bias_V = ctx.saved_tensors
        sizes, max_logits, share, dtype = ctx.rest
        group = share.group
        # Each process's loss has a weight of its own: 0 where its tokens are not to count.
        grads = torch.cat(group.all_gather(grad.reshape(1).double(), PURPOSE))
        scale_A = grads.repeat_interleave(torch.tensor(sizes, device=grads.device), output_size=sum(sizes))
        grad_hidden_AD, grad_weight_VD = torch.zeros_like(hidden_AD), torch.zeros_like(weight_VD)
        grad_bias_V = torch.zeros_like(bias_V)
        for tokens, words in _blocks(len(target_A), share.size, max_logits):
            hidden, weight = hidden_AD[tokens], weight_VD[words]
            logits = torch.addmm(bias_V[words], hidden, weight.t())
            probability = logits.sub_(log_sum_A[tokens].unsqueeze(1)).exp_()
            place, inside = _places(target_A[tokens], words, share)
            probability.scatter_add_(1, place.unsqueeze(1), -inside.to(probability.dtype).unsqueeze(1))
            probability.mul_(scale_A[tokens].unsqueeze(1))
            grad_hidden_AD[tokens] += probability @ weight
            grad_weight_VD[words] += probability.t() @ hidden
            grad_bias_V[words] += probability.sum(dim=0)
        own = sizes[group.rank]
        parts = group.all_to_all_raw(grad_hidden_AD, sizes, [own] * group.size, PURPOSE)
        grad_hidden_TD = parts.view(group.size, own, -1).sum(dim=0)
        return grad_hidden_TD.to(dtype), grad_weight_VD, grad_bias_V, None, None, None


def _blocks(num_tokens: int, num_words: int, max_logits: int) -> Iterator[tuple[slice, slice]]:
    """Yield tokens and words of products of at most `max_logits` logits."""
    tokens_at_once = max(1, min(num_tokens, max_logits // max(1, min(num_words, max_logits))))
    words_at_once = max(1, min(num_words, max_logits // tokens_at_once))
    for token in range(0, num_tokens, tokens_at_once):
        for word in range(0, num_words, words_at_once):
            yield slice(token, token + tokens_at_once), slice(word, min(word + words_at_once, num_words))


def _places(target: Tensor, words: slice, share: Shard) -> tuple[Tensor, Tensor]:
    """Return where each target stands in a block of this process's words, and whether it stands there at all."""
    place = target - share.first - words.start
    size = words.stop - words.start
    return place.clamp(0, size - 1), (place >= 0) & (place < size)
