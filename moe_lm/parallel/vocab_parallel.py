"""Embedding and softmax sharded over processes: each process holds a range of the vocabulary's rows.

Rows travel to the tokens that need them and gradients back; the exact softmax sends tokens to the rows instead.

Shape suffixes: T tokens of this process, A tokens of all processes, D width, U unique rows, R rows requested from this
process, V rows of the vocabulary held here, P processes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lm.loss.softmax import FullSoftmax, SampledSoftmax, Softmax
from moe_lm.model.language_model import Embedding
from moe_lm.ops.sparse_rows import UniqueIndices, take_rows
from moe_lm.parallel.group import Group, Shard

_PURPOSE = "rows"
"""Purpose by which a group counts the bytes it sends."""


class VocabParallelEmbedding(Embedding):
    """An embedding of which this process holds a shard; `forward` takes part in an all-to-all."""

    def __init__(self, embedding: Embedding, shard: Shard):
        width = embedding.weight_VD.shape[1]
        super().__init__(vocabulary_size=shard.total, width=width, held=shard.rows)
        self.shard = shard

    def forward(self, words: UniqueIndices) -> Tensor:
        """Return the rows of these words (T, D), wherever they are."""
        return _gathered_rows(self.weight_VD, words, self.shard)


class _VocabParallel(Softmax):
    """What both softmaxes share: exact nats over the rows of all processes."""

    shard: Shard

    def token_nats(self, hidden_TD: Tensor, target_T: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(hidden_TD.device.type, enabled=False):
            tokens = _AllTokens(hidden_TD.to(self.weight_VD.dtype), target_T, self.shard.group)
            return tokens.own(tokens.nats(self.weight_VD, self.bias_V, self.chunk_logits, self.shard))


class VocabParallelSampledSoftmax(_VocabParallel, SampledSoftmax):
    """A sampled softmax that gathers candidates' and targets' rows from all processes."""

    def __init__(self, softmax: SampledSoftmax, shard: Shard):
        sizes = {"width": softmax.width, "vocabulary_size": shard.total, "num_sampled": softmax.num_sampled}
        super().__init__(**sizes, chunk_logits=softmax._chunk_logits, held=shard.rows)
        self.shard = shard

    def rows_of(self, words: UniqueIndices) -> tuple[Tensor, Tensor]:
        weight, bias = (_gathered_rows(matrix, words, self.shard) for matrix in (self.weight_VD, self.bias_V))
        return weight, bias


class VocabParallelFullSoftmax(_VocabParallel, FullSoftmax):
    """A full softmax that sends tokens to the rows."""

    def __init__(self, softmax: FullSoftmax, shard: Shard):
        sizes = {"width": softmax.width, "vocabulary_size": shard.total}
        super().__init__(**sizes, chunk_logits=softmax._chunk_logits, held=shard.rows)
        self.shard = shard

    def forward(self, hidden_TD: Tensor, targets: UniqueIndices, seed: int) -> Tensor:  # noqa: ARG002
        """Return the summed nats of this process's tokens."""
        target_T = targets.row_T
        if not torch.is_grad_enabled():
            return self.token_nats(hidden_TD, target_T).sum()
        with torch.autocast(hidden_TD.device.type, enabled=False):
            weights = self.weight_VD, self.bias_V
            return _SummedNats.apply(hidden_TD, *weights, target_T, self.chunk_logits, self.shard)


MODULES = VocabParallelEmbedding, VocabParallelSampledSoftmax, VocabParallelFullSoftmax


def parallel_softmax(softmax: Softmax, shard: Shard) -> Softmax:
    """Return the parallel version of a softmax; raises `ValueError` where it has none."""
    for serial, sharded in ((SampledSoftmax, VocabParallelSampledSoftmax), (FullSoftmax, VocabParallelFullSoftmax)):
        if isinstance(softmax, serial):
            return sharded(softmax, shard)
    raise ValueError(f"parallel.vocab=true: {type(softmax).__name__} cannot be sharded")


def _gathered_rows(matrix_VD: Tensor, words: UniqueIndices, shard: Shard) -> Tensor:
    """Return rows of the whole matrix (T, D) by word, differentiable in the rows held here.

    All processes of the shard's group take part; a row is sent to a process once, however often its tokens need it.
    """
    group = shard.group
    row_U, place_T, _ = words.unique
    ends = torch.tensor(shard.sizes, device=row_U.device).cumsum(dim=0)
    ends_P = torch.searchsorted(row_U, ends)
    requested_P = ends_P.diff(prepend=ends_P.new_zeros(1))
    requested, sent = torch.stack([requested_P, group.all_to_all_equal(requested_P, _PURPOSE)]).tolist()
    row_R = group.all_to_all_raw(row_U, requested, sent, _PURPOSE) - shard.first
    value_UD = group.all_to_all(take_rows(matrix_VD, row_R), sent, requested, _PURPOSE)
    return value_UD.index_select(0, place_T)


class _AllTokens:
    """The tokens of all processes, in the order of their ranks."""

    def __init__(self, hidden_TD: Tensor, target_T: Tensor, group: Group):
        parts = group.all_gather(target_T, _PURPOSE)
        self.sizes = [len(part) for part in parts]
        self.target_A, self._group = torch.cat(parts), group
        self.hidden_AD = torch.cat(group.all_gather(hidden_TD, _PURPOSE))

    def own(self, x_A: Tensor) -> Tensor:
        """Return the part of `x_A` that belongs to this process's tokens."""
        return x_A.split(self.sizes)[self._group.rank]

    def nats(self, weight_VD: Tensor, bias_V: Tensor, chunk_logits: int, shard: Shard) -> Tensor:
        """Return -log p(target) of all tokens (float64), from each process's sums over its rows."""
        log_sum_A = self.hidden_AD.new_full(self.target_A.shape, -torch.inf, dtype=torch.float64)
        true_A = torch.zeros_like(log_sum_A)
        for tokens, words in _chunks(len(self.target_A), shard.size, chunk_logits):
            logits = torch.addmm(bias_V[words], self.hidden_AD[tokens], weight_VD[words].t())
            place, inside = _places(self.target_A[tokens], words, shard)
            found = logits.gather(1, place.unsqueeze(1)).squeeze(1).double()
            true_A[tokens] += torch.where(inside, found, 0.0)
            # In float64 from here on, as the sums of all processes are combined.
            log_sum_A[tokens] = torch.logaddexp(log_sum_A[tokens], logits.logsumexp(dim=1).double())
        sums_PA = torch.stack(self._group.all_gather(log_sum_A, _PURPOSE))
        self.log_sum_A = sums_PA.logsumexp(dim=0)
        return self.log_sum_A - self._group.all_reduce_(true_A, _PURPOSE)


class _SummedNats(torch.autograd.Function):
    """Keeps hidden states and sums; the backward pass recomputes each chunk of logits."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, bias_V, target_T, chunk_logits, shard):
        tokens = _AllTokens(hidden_TD.to(weight_VD.dtype), target_T, shard.group)
        nats_A = tokens.nats(weight_VD, bias_V, chunk_logits, shard)
        ctx.save_for_backward(tokens.hidden_AD, tokens.target_A, tokens.log_sum_A, weight_VD, bias_V)
        ctx.rest = tokens.sizes, chunk_logits, shard, hidden_TD.dtype
        return tokens.own(nats_A).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden_AD, target_A, log_sum_A, weight_VD, bias_V = ctx.saved_tensors
        sizes, chunk_logits, shard, dtype = ctx.rest
        group = shard.group
        # The loss of each process has its own weight, which is 0 if its tokens do not count.
        grads = torch.cat(group.all_gather(grad.reshape(1).double(), _PURPOSE))
        scale_A = grads.repeat_interleave(torch.tensor(sizes, device=grads.device), output_size=sum(sizes))
        grad_hidden_AD, grad_weight_VD = torch.zeros_like(hidden_AD), torch.zeros_like(weight_VD)
        grad_bias_V = torch.zeros_like(bias_V)
        for tokens, words in _chunks(len(target_A), shard.size, chunk_logits):
            hidden, weight = hidden_AD[tokens], weight_VD[words]
            logits = torch.addmm(bias_V[words], hidden, weight.t())
            probability = logits.sub_(log_sum_A[tokens].unsqueeze(1)).exp_()
            place, inside = _places(target_A[tokens], words, shard)
            probability.scatter_add_(1, place.unsqueeze(1), -inside.to(probability.dtype).unsqueeze(1))
            probability.mul_(scale_A[tokens].unsqueeze(1))
            grad_hidden_AD[tokens] += probability @ weight
            grad_weight_VD[words] += probability.t() @ hidden
            grad_bias_V[words] += probability.sum(dim=0)
        own = sizes[group.rank]
        parts = group.all_to_all_raw(grad_hidden_AD, sizes, [own] * group.size, _PURPOSE)
        grad_hidden_TD = parts.view(group.size, own, -1).sum(dim=0)
        return grad_hidden_TD.to(dtype), grad_weight_VD, grad_bias_V, None, None, None


def _chunks(num_tokens: int, num_words: int, chunk_logits: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of tokens and of words that together have at most `chunk_logits` logits."""
    tokens_at_once = max(1, min(num_tokens, chunk_logits // max(1, min(num_words, chunk_logits))))
    words_at_once = max(1, min(num_words, chunk_logits // tokens_at_once))
    for token in range(0, num_tokens, tokens_at_once):
        for word in range(0, num_words, words_at_once):
            yield slice(token, token + tokens_at_once), slice(word, min(word + words_at_once, num_words))


def _places(target: Tensor, words: slice, shard: Shard) -> tuple[Tensor, Tensor]:
    """Return where each target stands in a block of this process's words, and whether it stands there at all."""
    place = target - shard.first - words.start
    size = words.stop - words.start
    return place.clamp(0, size - 1), (place >= 0) & (place < size)
