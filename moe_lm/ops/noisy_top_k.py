"""The noisy choice of k experts and the smooth load in one pass of autograd (eq. 4, 8 and 9).

Written out by hand: a chain of differentiable operations costs several times the passes over (tokens, experts), at
hundreds of experts a tenth of the whole layer.

Shape suffixes: T tokens, E experts, F = 2 E, K experts a token, N = min(K + 1, E) of which a token keeps K.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe_lm.ops.backend import by_numba, by_triton

_MOST_EXPERTS, _MOST_K = 4096, 64
"""Of the kernel: a row is in registers whole, and looked through once for each of the largest."""


def noisy_choice(
    logit_TF: Tensor, draw_TE: Tensor, noise_epsilon: float, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the largest noisy logits (T, N), their experts, all noisy logits, and P(x, i) of eq. 9 (T, E).

    H(x) = clean + draw * (Softplus(raw) + noise_epsilon), `logit_TF` being clean and raw side by side; without a choice
    to make, K = E, there is no P.
    """
    fits = draw_TE.dtype == torch.float32 and draw_TE.shape[1] <= _MOST_EXPERTS and k <= _MOST_K
    in_a_kernel = fits and by_triton(draw_TE)
    choice = _ChoiceInAKernel if in_a_kernel else _NoisyChoice
    top_TN, expert_TN, noisy_TE, *chance = choice.apply(logit_TF, draw_TE, noise_epsilon, k)
    return top_TN, expert_TN, noisy_TE, chance[0] if chance else None


class _ChoiceInAKernel(torch.autograd.Function):
    """On a GPU; noise, deviations and z are made anew in the backward pass."""

    @staticmethod
    def forward(ctx, logit_TF, draw_TE, noise_epsilon, k):
        from moe_lm.gate import triton_choice  # Triton is not everywhere, and slow to import

        ctx.set_materialize_grads(False)
        logit_TF, draw_TE = logit_TF.contiguous(), draw_TE.contiguous()
        top_TN, expert_TN, *others = triton_choice.chosen(logit_TF, draw_TE, noise_epsilon, k)
        ctx.mark_non_differentiable(expert_TN)
        ctx.save_for_backward(logit_TF, draw_TE, top_TN, expert_TN)
        ctx.settings = noise_epsilon, k
        return top_TN, expert_TN, *others

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_top_TN, _, *grads):
        from moe_lm.ops.triton import noisy_top_k as triton_choice

        grad_noisy_TE, grad_chance_TE = (*grads, None)[:2]
        grads = grad_top_TN, grad_noisy_TE, grad_chance_TE
        return triton_choice.gradient(ctx.saved_tensors, *grads, *ctx.settings), None, None, None


class _NoisyChoice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logit_TF, draw_TE, noise_epsilon, k):
        ctx.set_materialize_grads(False)
        deviation_TE = F.softplus(logit_TF.chunk(2, dim=1)[1]).add_(noise_epsilon)
        top_TN, expert_TN, noisy_TE, distance_TE = _chosen(logit_TF, draw_TE, deviation_TE, k)
        ctx.mark_non_differentiable(expert_TN)
        ctx.k, kept = k, (logit_TF, draw_TE, top_TN, expert_TN)
        if top_TN.shape[1] == k:
            ctx.save_for_backward(*kept)
            return top_TN, expert_TN, noisy_TE
        ctx.save_for_backward(*kept, distance_TE, deviation_TE)
        chance_TE = (distance_TE * math.sqrt(0.5)).erf_().add_(1).mul_(0.5)
        return top_TN, expert_TN, noisy_TE, chance_TE

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_top_TN, _, grad_noisy_TE, grad_chance_TE=None):
        logit_TF, draw_TE, top_TN, expert_TN, *smooth = ctx.saved_tensors
        raw_TE, grad_logit_TF = logit_TF.chunk(2, dim=1)[1], torch.empty_like(logit_TF)
        # Of the deviation until the end, where it becomes that of the raw logit.
        grad_clean_TE, grad_deviation_TE = grad_logit_TF.chunk(2, dim=1)
        if grad_top_TN is None:
            grad_top_TN = torch.zeros_like(top_TN)
        if grad_chance_TE is None:
            grad_logit_TF.zero_()
        else:
            grad_top_TN, distance_TE = grad_top_TN.clone(), smooth[0]
            torch.mul(distance_TE, distance_TE, out=grad_clean_TE).mul_(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
            grad_clean_TE.mul_(grad_chance_TE)
            _smooth_gradient_((top_TN, expert_TN, *smooth), grad_logit_TF, grad_top_TN, ctx.k)
        draw_TN = draw_TE.gather(1, expert_TN)
        grad_clean_TE.scatter_add_(1, expert_TN, grad_top_TN)
        grad_deviation_TE.scatter_add_(1, expert_TN, grad_top_TN * draw_TN)
        if grad_noisy_TE is not None:
            grad_clean_TE += grad_noisy_TE
            grad_deviation_TE.addcmul_(grad_noisy_TE, draw_TE)
        grad_deviation_TE.mul_(raw_TE.sigmoid())
        return grad_logit_TF, None, None, None


def _chosen(logit_TF: Tensor, draw_TE: Tensor, deviation_TE: Tensor, k: int) -> tuple[Tensor, ...]:
    """Return the largest noisy logits (T, N), their experts, all noisy logits, and z of eq. 9 (T, E; none if K = E)."""
    if by_numba(draw_TE):
        from moe_lm.gate import numba_choice  # slow to import, and not everywhere

        return numba_choice.chosen(logit_TF, draw_TE, deviation_TE, k)
    clean_TE = logit_TF.chunk(2, dim=1)[0]
    noisy_TE = torch.addcmul(clean_TE, draw_TE, deviation_TE)
    top_TN, expert_TN = noisy_TE.topk(min(k + 1, noisy_TE.shape[1]), dim=1)
    if top_TN.shape[1] == k:
        return top_TN, expert_TN, noisy_TE, noisy_TE[:0]
    # The k-th largest value with expert i left out is the (k+1)-th of all where i is among the k, else the k-th.
    in_T1, out_T1 = top_TN[:, k:], top_TN[:, k - 1 : k]
    distance_TE = torch.where(noisy_TE > in_T1, in_T1, out_T1)
    torch.sub(clean_TE, distance_TE, out=distance_TE).div_(deviation_TE)
    return top_TN, expert_TN, noisy_TE, distance_TE


def _smooth_gradient_(kept: tuple[Tensor, ...], grad_logit_TF: Tensor, grad_top_TN: Tensor, k: int) -> None:
    """Make z's gradient, in the place of the clean logits', theirs and the deviations'; add the thresholds'.

    Those are the k-th largest value, of the experts that are out, and the (k+1)-th, of those that are in.
    """
    if by_numba(kept[-1]):
        from moe_lm.ops import numba_choice

        numba_choice.smooth_gradient_(kept, grad_logit_TF, grad_top_TN, k)
        return
    top_TN, expert_TN, distance_TE, deviation_TE = kept
    grad_clean_TE, grad_deviation_TE = grad_logit_TF.chunk(2, dim=1)
    grad_clean_TE.div_(deviation_TE)
    torch.mul(grad_clean_TE, distance_TE, out=grad_deviation_TE).neg_()
    # Of equal values at the border none is in.
    is_in_TK = top_TN[:, :k] > top_TN[:, k:]
    of_in_T = (grad_clean_TE.gather(1, expert_TN[:, :k]) * is_in_TK).sum(dim=1)
    grad_top_TN[:, k] -= of_in_T
    grad_top_TN[:, k - 1] -= grad_clean_TE.sum(dim=1) - of_in_T
