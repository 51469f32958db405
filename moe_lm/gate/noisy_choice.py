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


def noisy_choice(
    logit_TF: Tensor, draw_TE: Tensor, noise_epsilon: float, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the largest noisy logits (T, N), their experts, all noisy logits, and P(x, i) of eq. 9 (T, E).

    H(x) = clean + draw * (Softplus(raw) + noise_epsilon), `logit_TF` being clean and raw side by side; without a choice
    to make, K = E, there is no P.
    """
    top_TN, expert_TN, noisy_TE, *chance = _NoisyChoice.apply(logit_TF, draw_TE, noise_epsilon, k)
    return top_TN, expert_TN, noisy_TE, chance[0] if chance else None


class _NoisyChoice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logit_TF, draw_TE, noise_epsilon, k):
        ctx.set_materialize_grads(False)
        clean_TE, raw_TE = logit_TF.chunk(2, dim=1)
        deviation_TE = F.softplus(raw_TE).add_(noise_epsilon)
        noisy_TE = torch.addcmul(clean_TE, draw_TE, deviation_TE)
        top_TN, expert_TN = noisy_TE.topk(min(k + 1, noisy_TE.shape[1]), dim=1)
        ctx.mark_non_differentiable(expert_TN)
        ctx.k, kept = k, (logit_TF, draw_TE, top_TN, expert_TN)
        if top_TN.shape[1] == k:
            ctx.save_for_backward(*kept)
            return top_TN, expert_TN, noisy_TE
        # The k-th largest value with expert i left out is the (k+1)-th of all where i is among the k, else the k-th.
        in_T1, out_T1 = top_TN[:, k:], top_TN[:, k - 1 : k]
        distance_TE = torch.where(noisy_TE > in_T1, in_T1, out_T1)
        torch.sub(clean_TE, distance_TE, out=distance_TE).div_(deviation_TE)
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
            distance_TE, deviation_TE = smooth
            torch.mul(distance_TE, distance_TE, out=grad_clean_TE).mul_(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
            grad_clean_TE.mul_(grad_chance_TE).div_(deviation_TE)
            torch.mul(grad_clean_TE, distance_TE, out=grad_deviation_TE).neg_()
            grad_top_TN = _with_thresholds(grad_top_TN, grad_clean_TE, top_TN, expert_TN, ctx.k)
        draw_TN = draw_TE.gather(1, expert_TN)
        grad_clean_TE.scatter_add_(1, expert_TN, grad_top_TN)
        grad_deviation_TE.scatter_add_(1, expert_TN, grad_top_TN * draw_TN)
        if grad_noisy_TE is not None:
            grad_clean_TE += grad_noisy_TE
            grad_deviation_TE.addcmul_(grad_noisy_TE, draw_TE)
        grad_deviation_TE.mul_(raw_TE.sigmoid())
        return grad_logit_TF, None, None, None


def _with_thresholds(grad_top_TN: Tensor, grad_TE: Tensor, top_TN: Tensor, expert_TN: Tensor, k: int) -> Tensor:
    """Add what reaches the k-th and (k+1)-th largest values as thresholds of the experts out of and in the top k."""
    # Of equal values at the border none is in.
    is_in_TK = top_TN[:, :k] > top_TN[:, k:]
    of_in_T = (grad_TE.gather(1, expert_TN[:, :k]) * is_in_TK).sum(dim=1)
    of_out_T = grad_TE.sum(dim=1) - of_in_T
    grad_top_TN = grad_top_TN.clone()
    grad_top_TN[:, k] -= of_in_T
    grad_top_TN[:, k - 1] -= of_out_T
    return grad_top_TN
