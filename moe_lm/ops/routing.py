"""Operations of routing: rows sorted into segments, and the noisy top-k choice with its load estimate (eq. 4, 8 and 9).

Shape suffixes: A rows, S segments, D width, T tokens, E experts, F = 2 E, K experts a token, N = min(K + 1, E) of which
a token keeps K, G groups of experts.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe_lm.ops.operation import operation, triton_runs


def stable_sort_below(x_A: Tensor, bound: int) -> tuple[Tensor, Tensor]:
    """Sort integers from 0 to `bound` - 1 stably; return them in ascending order, and where each was before.

    Both are int64. Sorting uses the narrowest type that holds them, as a radix sort makes a pass for each eight bits.
    """
    narrow = torch.int16 if bound <= 2**15 else torch.int32 if bound <= 2**31 else torch.int64
    sorted_A, order_A = x_A.to(narrow).sort(stable=True)
    return sorted_A.long(), order_A


def segment_ends(segment_A: Tensor, num_segments: int) -> Tensor:
    """Return the end of each segment's rows (int64, S); `segment_A` ascends.

    `bincount` would make the host wait for a GPU's counts.
    """
    return torch.searchsorted(segment_A, torch.arange(num_segments, device=segment_A.device), right=True)


def segment_sizes(segment_A: Tensor, num_segments: int) -> Tensor:
    """Return the number of each segment's rows (int64, S); `segment_A` ascends."""
    ends_S = segment_ends(segment_A, num_segments)
    return ends_S.diff(prepend=ends_S.new_zeros(1))


@operation
def segment_sum(x: Tensor, segment_A: Tensor, num_segments: int) -> Tensor:
    """Return the sum of each segment's rows (S, D) or numbers (S), differentiable in x; `segment_A` ascends."""
    return x.new_zeros(num_segments, *x.shape[1:]).index_add(0, segment_A, x)


class _SegmentSum(torch.autograd.Function):
    """Sums by Triton: a GPU's atomic additions to few segments wait for one another."""

    @staticmethod
    def forward(ctx, x, segment_A, num_segments):
        from moe_lm.ops.triton import rows  # Triton is not installed everywhere, and slow to import

        ctx.save_for_backward(segment_A)
        ends_S = segment_ends(segment_A, num_segments)
        if x.dim() == 1:
            return rows.sum_scalars(x, ends_S)
        return rows.sum_segments(x, torch.arange(len(segment_A), device=segment_A.device), ends_S)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (segment_A,) = ctx.saved_tensors
        return grad.index_select(0, segment_A), None, None


segment_sum.register(_SegmentSum.apply, when=lambda x, *_: x.dtype == torch.float32 and triton_runs(x))


_MAX_EXPERTS_IN_KERNEL, _MAX_K_IN_KERNEL = 4096, 64
"""Limits of the Triton kernel, which holds a whole row in registers and searches it once for each largest logit."""

_MAX_K_BY_SEARCH = 16
"""Largest k for which k searches of a row for its maximum are faster than `torch.topk` on a CPU."""

_INDEX_BITS = (1 << 29) - 1
"""Low bits of a float64 that are zero in every float32 number."""


class TokenGroups:
    """The tokens of one call, sorted by the group of experts that each may choose from.

    A flat gate has a single group with all tokens, so an equation is written once for flat and hierarchical layers.
    """

    def __init__(
        self,
        num_tokens: int,
        num_experts: int,
        group_T: Tensor | None = None,
        num_groups: int | None = None,
        input_T: Tensor | None = None,
    ):
        """`input_T` are the ids of the tokens' input words, for gates that read them."""
        self.num_tokens, self.num_experts, self.input_T = num_tokens, num_experts, input_T
        self.group_T, self.num_groups = group_T, num_groups or 1

    def sizes(self) -> Tensor:
        """Return the number of tokens in each group (float64, G)."""
        if self.group_T is None:
            return torch.tensor([self.num_tokens], dtype=torch.float64)
        return segment_sizes(self.group_T, self.num_groups).double()

    def sum(self, x_TE: Tensor) -> Tensor:
        """Return the sums over each group's tokens (G, E)."""
        if self.group_T is None:
            return x_TE.sum(dim=0, keepdim=True)
        return segment_sum(x_TE, self.group_T, self.num_groups)

    def per_token(self, x_GE: Tensor) -> Tensor:
        """Return the row of each token's group (T, E); without groups, the single row (1, E), to be broadcast."""
        return x_GE if self.group_T is None else x_GE.index_select(0, self.group_T)

    def expert_numbers(self, expert_TK: Tensor) -> Tensor:
        """Return the experts' numbers among all groups: expert j of group g has the number g * num_experts + j."""
        return expert_TK if self.group_T is None else expert_TK + (self.group_T * self.num_experts).unsqueeze(1)


@operation
def noisy_top_k(
    logit_TF: Tensor, draw_TE: Tensor, noise_epsilon: float, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the largest noisy logits (T, N), their experts, all noisy logits, and each expert's chance of selection.

        H(x)_i = clean_i + draw_i * std_i            with std = Softplus(raw) + noise_epsilon       (eq. 4)
        P(x, i) = Phi((clean_i - kth_excluding(H(x), k, i)) / std_i)                                (eq. 9)

    `logit_TF` has clean and raw logits side by side. P is None for K = E, where there is nothing to choose.
    """
    clean_TE, raw_TE = logit_TF.chunk(2, dim=1)
    std_TE = F.softplus(raw_TE) + noise_epsilon
    noisy_TE = clean_TE + draw_TE * std_TE
    top_TN, expert_TN = noisy_TE.topk(min(k + 1, noisy_TE.shape[1]), dim=1)
    if top_TN.shape[1] == k:
        return top_TN, expert_TN, noisy_TE, None
    # Without expert i the k-th largest logit is the (k+1)-th of all if i is among the k largest, else the k-th.
    threshold_TE = torch.where(noisy_TE > top_TN[:, k:], top_TN[:, k:], top_TN[:, k - 1 : k])
    chance_TE = torch.special.ndtr((clean_TE - threshold_TE) / std_TE)
    return top_TN, expert_TN, noisy_TE, chance_TE


class _NoisyTopK(torch.autograd.Function):
    """One autograd node with a hand-written gradient: autograd would make twice as many passes over (T, E)."""

    @staticmethod
    def forward(ctx, logit_TF, draw_TE, noise_epsilon, k):
        ctx.set_materialize_grads(False)
        clean_TE, raw_TE = logit_TF.chunk(2, dim=1)
        std_TE = F.softplus(raw_TE).add_(noise_epsilon)
        noisy_TE = torch.addcmul(clean_TE, draw_TE, std_TE)
        top_TN, expert_TN = _top_k(noisy_TE, min(k + 1, noisy_TE.shape[1]))
        ctx.mark_non_differentiable(expert_TN)
        ctx.k = k
        if top_TN.shape[1] == k:
            ctx.save_for_backward(logit_TF, draw_TE, top_TN, expert_TN)
            return top_TN, expert_TN, noisy_TE, None
        z_TE = _z_scores(clean_TE, std_TE, top_TN, expert_TN, k)
        ctx.save_for_backward(logit_TF, draw_TE, top_TN, expert_TN, z_TE, std_TE)
        chance_TE = (z_TE * math.sqrt(0.5)).erf_().add_(1).mul_(0.5)
        return top_TN, expert_TN, noisy_TE, chance_TE

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_top_TN, _, grad_noisy_TE, grad_chance_TE):
        logit_TF, draw_TE, top_TN, expert_TN, *smooth = ctx.saved_tensors
        grad_logit_TF = torch.empty_like(logit_TF)
        # The second half holds the gradient of std until the last line makes it that of the raw logits.
        grad_clean_TE, grad_std_TE = grad_logit_TF.chunk(2, dim=1)
        if grad_top_TN is None:
            grad_top_TN = torch.zeros_like(top_TN)
        if grad_chance_TE is None:
            grad_logit_TF.zero_()
        else:
            z_TE, std_TE = smooth
            # dP/dclean is the normal density at z, divided by std.
            torch.mul(z_TE, z_TE, out=grad_clean_TE).mul_(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
            grad_clean_TE.mul_(grad_chance_TE).div_(std_TE)
            torch.mul(grad_clean_TE, z_TE, out=grad_std_TE).neg_()
            grad_top_TN = _with_threshold_gradient(grad_top_TN, grad_clean_TE, top_TN, expert_TN, ctx.k)
        draw_TN = draw_TE.gather(1, expert_TN)
        grad_clean_TE.scatter_add_(1, expert_TN, grad_top_TN)
        grad_std_TE.scatter_add_(1, expert_TN, grad_top_TN * draw_TN)
        if grad_noisy_TE is not None:
            grad_clean_TE += grad_noisy_TE
            grad_std_TE.addcmul_(grad_noisy_TE, draw_TE)
        grad_std_TE.mul_(logit_TF.chunk(2, dim=1)[1].sigmoid())
        return grad_logit_TF, None, None, None


def _z_scores(clean_TE: Tensor, std_TE: Tensor, top_TN: Tensor, expert_TN: Tensor, k: int) -> Tensor:
    """Return (clean - kth_excluding) / std; only a token's k chosen experts have the (k+1)-th logit as threshold."""
    in_T1, out_T1, expert_TK = top_TN[:, k:], top_TN[:, k - 1 : k], expert_TN[:, :k]
    z_TE = torch.sub(clean_TE, out_T1).div_(std_TE)
    # An expert whose logit equals the (k+1)-th is not counted as chosen.
    threshold_TK = torch.where(top_TN[:, :k] > in_T1, in_T1, out_T1)
    z_TK = clean_TE.gather(1, expert_TK).sub_(threshold_TK).div_(std_TE.gather(1, expert_TK))
    return z_TE.scatter_(1, expert_TK, z_TK)


def _with_threshold_gradient(
    grad_top_TN: Tensor, grad_clean_TE: Tensor, top_TN: Tensor, expert_TN: Tensor, k: int
) -> Tensor:
    """Return the gradient of the largest logits, including the gradient that they have as thresholds.

    The k-th largest is the threshold of all experts but the chosen ones, whose threshold is the (k+1)-th.
    """
    is_chosen_TK = top_TN[:, :k] > top_TN[:, k:]
    chosen_T = (grad_clean_TE.gather(1, expert_TN[:, :k]) * is_chosen_TK).sum(dim=1)
    grad_top_TN = grad_top_TN.clone()
    grad_top_TN[:, k] -= chosen_T
    grad_top_TN[:, k - 1] -= grad_clean_TE.sum(dim=1) - chosen_T
    return grad_top_TN


def _top_k(x_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the same bits as `x_TE.topk(k)`, on a CPU in a sixth of its time for 5 of 256 columns.

    A float32 number leaves the low 29 bits of a float64 zero. With the column's index in these bits, one vectorized
    maximum finds value and index together, whereas `topk` moves pairs of them.
    """
    num_columns = x_TE.shape[1]
    # With 64 columns or more per result `topk` sorts partially, which is as fast.
    searched = x_TE.is_cpu and x_TE.dtype == torch.float32 and k < _MAX_K_BY_SEARCH and 32 <= num_columns < 64 * k
    if not searched:
        return x_TE.topk(k, dim=1)
    key_TE = x_TE.double()
    key_TE.view(torch.int64).bitwise_or_(torch.arange(num_columns))
    best_TN = key_TE.new_empty(len(x_TE), k + 1)  # one more shows whether the k-th is tied
    bits_TN = best_TN.view(torch.int64)
    for n in range(k + 1):
        torch.amax(key_TE, dim=1, keepdim=True, out=best_TN[:, n : n + 1])
        if n < k:
            key_TE.scatter_(1, bits_TN[:, n : n + 1] & _INDEX_BITS, -torch.inf)
    index_TN = bits_TN & _INDEX_BITS
    top_TN = (bits_TN ^ index_TN).view(torch.float64).float()
    # Rows with ties, NaN or infinity are left to `topk`: its order of equal numbers follows no simple rule.
    odd_T = (top_TN[:, 1:] < top_TN[:, :-1]).all(dim=1).logical_not_().nonzero().squeeze(1)
    top_TK, index_TK = top_TN[:, :k].contiguous(), index_TN[:, :k].contiguous()
    if len(odd_T):
        top_TK[odd_T], index_TK[odd_T] = x_TE.index_select(0, odd_T).topk(k, dim=1)
    return top_TK, index_TK


def _fits_kernel(_: Tensor, draw_TE: Tensor, noise_epsilon: float, k: int) -> bool:  # noqa: ARG001
    fits = draw_TE.shape[1] <= _MAX_EXPERTS_IN_KERNEL and k <= _MAX_K_IN_KERNEL
    return fits and draw_TE.dtype == torch.float32 and triton_runs(draw_TE)


noisy_top_k.register("moe_lm.ops.triton.noisy_top_k:noisy_top_k", when=_fits_kernel)
noisy_top_k.register(_NoisyTopK.apply, when=lambda *_: True)
