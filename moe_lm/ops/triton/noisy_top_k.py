"""Triton kernels of `moe_lm.ops.routing`: noise, choice and chances in one pass over each row, forward and backward.

PyTorch's operators make some thirty passes over (tokens, experts).

Shape suffixes: T tokens, E experts, F = 2 E, K experts a token, N = min(K + 1, E) of which a token keeps K.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK_NUMBERS = 1024
"""Numbers of each tensor that one program holds, unless one row has more."""


def noisy_top_k(
    logit_TF: Tensor, draw_TE: Tensor, noise_epsilon: float, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the largest noisy logits (T, N), their experts, all noisy logits, and P(x, i) (T, E; None if K = E)."""
    return _NoisyTopK.apply(logit_TF, draw_TE, noise_epsilon, k)


class _NoisyTopK(torch.autograd.Function):
    """Noise, standard deviations and z-scores are recomputed in the backward pass."""

    @staticmethod
    def forward(ctx, logit_TF, draw_TE, noise_epsilon, k):
        ctx.set_materialize_grads(False)
        logit_TF, draw_TE = logit_TF.contiguous(), draw_TE.contiguous()
        top_TN, expert_TN, noisy_TE, chance_TE = _forward(logit_TF, draw_TE, noise_epsilon, k)
        ctx.mark_non_differentiable(expert_TN)
        ctx.save_for_backward(logit_TF, draw_TE, top_TN, expert_TN)
        ctx.settings = noise_epsilon, k
        return top_TN, expert_TN, noisy_TE, chance_TE

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_top_TN, _, grad_noisy_TE, grad_chance_TE):
        grads = grad_top_TN, grad_noisy_TE, grad_chance_TE
        return _backward(ctx.saved_tensors, *grads, *ctx.settings), None, None, None


def _forward(logit_TF: Tensor, draw_TE: Tensor, noise_epsilon: float, k: int) -> tuple[Tensor, ...]:
    num_tokens, num_experts = draw_TE.shape
    num_largest = min(k + 1, num_experts)
    top_TN = draw_TE.new_empty(num_tokens, num_largest)
    expert_TN = top_TN.new_empty(num_tokens, num_largest, dtype=torch.int64)
    noisy_TE = torch.empty_like(draw_TE)
    chance_TE = torch.empty_like(draw_TE) if num_largest > k else None
    if num_tokens:
        # The kernel writes no chances for K = E: any pointer will do.
        results = top_TN, expert_TN, noisy_TE, noisy_TE if chance_TE is None else chance_TE
        grid, sizes = _layout(num_tokens, num_experts)
        _choose[grid](
            logit_TF, draw_TE, *results, noise_epsilon, num_tokens, num_experts, K=k, LARGEST=num_largest, **sizes
        )
    return top_TN, expert_TN, noisy_TE, chance_TE


def _backward(
    saved: tuple[Tensor, ...],
    grad_top_TN: Tensor | None,
    grad_noisy_TE: Tensor | None,
    grad_chance_TE: Tensor | None,
    noise_epsilon: float,
    k: int,
) -> Tensor:
    """Return the logits' gradient from the gradients of the largest logits, all noisy logits and the chances."""
    logit_TF, draw_TE, top_TN, _ = saved
    grad_logit_TF, stride = torch.empty_like(logit_TF), 0
    if not len(draw_TE):
        return grad_logit_TF
    if grad_chance_TE is not None:
        # The gradient of a sum over tokens is one row that `expand` repeats: the kernel reads it with stride 0.
        grad_chance_TE = grad_chance_TE if grad_chance_TE.stride(1) == 1 else grad_chance_TE.contiguous()
        stride = grad_chance_TE.stride(0)
    grads = [None if grad is None else grad.contiguous() for grad in (grad_top_TN, grad_noisy_TE)] + [grad_chance_TE]
    flags = dict(zip(("TOP", "NOISY", "CHANCE"), (grad is not None for grad in grads), strict=True))
    grads = [draw_TE if grad is None else grad for grad in grads]  # a missing gradient is not read
    grid, sizes = _layout(*draw_TE.shape)
    sizes |= {"K": k, "LARGEST": top_TN.shape[1]}
    _choice_gradient[grid](*saved, *grads, grad_logit_TF, noise_epsilon, *draw_TE.shape, stride, **flags, **sizes)
    return grad_logit_TF


def _layout(num_tokens: int, num_experts: int) -> tuple[tuple[int], dict[str, int]]:
    """Return the grid, and the block of tokens and experts of each program."""
    block = triton.next_power_of_2(num_experts)
    rows = max(1, min(32, _BLOCK_NUMBERS // block))
    return (triton.cdiv(num_tokens, rows),), {"ROWS": rows, "BLOCK": block, "num_warps": 4 if block <= 2048 else 8}


@triton.jit
def _softplus(x):
    # log(1 + e) would lose a small e in the sum; the factor restores the digits that the sum dropped (Kahan).
    exponential = tl.exp(tl.minimum(x, 20.0))
    one_more = 1.0 + exponential
    kept = tl.where(one_more == 1.0, 1.0, one_more - 1.0)
    small = tl.where(one_more == 1.0, exponential, tl.log(one_more) * (exponential / kept))
    # NaN is returned as it is: the minimum of NaN and a number may be the number.
    return tl.where((x > 20.0) | (x != x), x, small)


@triton.jit
def _ordered(x, column):
    """Return int64 keys that sort like the numbers, NaN above all; of equal numbers the first has the largest key."""
    bits = tl.where(x != x, 0x7FC00000, (x + 0.0).to(tl.int32, bitcast=True))  # -0 is 0
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)


@triton.jit
def _block(tokens, experts, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return this program's tokens and columns, which of them exist, and their offsets in (T, E) and in (T, F)."""
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = (token < tokens)[:, None] & (column < experts)[None, :]
    at = token[:, None] * experts + column[None, :]
    at_logit = token[:, None] * (2 * experts) + column[None, :]
    return token, column, inside, at, at_logit


@triton.jit
def _choose(
    logit,
    draw,
    top,
    expert,
    noisy,
    chance,
    epsilon,
    tokens,
    experts,
    K: tl.constexpr,
    LARGEST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token, column, inside, at, at_logit = _block(tokens, experts, ROWS, BLOCK)
    clean = tl.load(logit + at_logit, mask=inside, other=0.0)
    deviation = _softplus(tl.load(logit + at_logit + experts, mask=inside, other=0.0)) + epsilon
    value = clean + tl.load(draw + at, mask=inside, other=0.0) * deviation
    tl.store(noisy + at, value, mask=inside)
    lowest = tl.full((ROWS, BLOCK), -0x7FFFFFFFFFFFFFFF, dtype=tl.int64)
    key = tl.where(inside, _ordered(value, column[None, :]), lowest)
    # Two separate tensors of zeros: Triton 3.6 loses one of two names for the same tensor that a loop reassigns.
    in_threshold = tl.zeros((ROWS,), dtype=tl.float32)
    out_threshold = tl.zeros((ROWS,), dtype=tl.float32)
    for place in range(LARGEST):
        best = tl.max(key, axis=1)
        number = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
        is_it = column[None, :] == number[:, None]
        found = tl.sum(tl.where(is_it, value, 0.0), axis=1)
        key = tl.where(is_it, lowest, key)
        tl.store(top + token * LARGEST + place, found, mask=token < tokens)
        tl.store(expert + token * LARGEST + place, number.to(tl.int64), mask=token < tokens)
        out_threshold = tl.where(place == K - 1, found, out_threshold)
        in_threshold = found
    if LARGEST > K:
        # Without expert i the k-th largest logit is the (k+1)-th of all if i is among the k largest, else the k-th.
        threshold = tl.where(value > in_threshold[:, None], in_threshold[:, None], out_threshold[:, None])
        z = (clean - threshold) / deviation
        tl.store(chance + at, 0.5 * (1.0 + tl.math.erf(z * 0.7071067811865476)), mask=inside)


@triton.jit
def _is_in(top, expert, there, column, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return 1 for the experts that the forward pass chose, else 0: recomputed noisy logits may round differently.

    An expert whose logit equals the (k+1)-th is not counted as chosen.
    """
    in_threshold = tl.load(top + K, mask=there, other=0.0)
    found = tl.zeros((ROWS, BLOCK), dtype=tl.int32)
    for place in range(K):
        value = tl.load(top + place, mask=there, other=0.0)
        number = tl.load(expert + place, mask=there, other=-1)
        is_it = (column[None, :] == number[:, None]) & (value > in_threshold)[:, None]
        found = tl.where(is_it, 1, found)
    return found


@triton.jit
def _choice_gradient(
    logit,
    draw,
    top,
    expert,
    grad_top,
    grad_noisy,
    grad_chance,
    grad_logit,
    epsilon,
    tokens,
    experts,
    chance_stride,
    K: tl.constexpr,
    LARGEST: tl.constexpr,
    TOP: tl.constexpr,
    NOISY: tl.constexpr,
    CHANCE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token, column, inside, at, at_logit = _block(tokens, experts, ROWS, BLOCK)
    there = token < tokens
    raw = tl.load(logit + at_logit + experts, mask=inside, other=0.0)
    noise = tl.load(draw + at, mask=inside, other=0.0)
    of_clean = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    of_deviation = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    of_in = tl.zeros((ROWS,), dtype=tl.float32)
    of_out = tl.zeros((ROWS,), dtype=tl.float32)
    if CHANCE:
        deviation = _softplus(raw) + epsilon
        clean = tl.load(logit + at_logit, mask=inside, other=0.0)
        out_threshold = tl.load(top + token * LARGEST + K - 1, mask=there, other=0.0)
        in_threshold = tl.load(top + token * LARGEST + K, mask=there, other=0.0)
        is_in = _is_in(top + token * LARGEST, expert + token * LARGEST, there, column, K, ROWS, BLOCK)
        z = (clean - tl.where(is_in > 0, in_threshold[:, None], out_threshold[:, None])) / deviation
        of_chance = tl.load(grad_chance + token[:, None] * chance_stride + column[None, :], mask=inside, other=0.0)
        of_clean = of_chance * 0.3989422804014327 * tl.exp(-0.5 * z * z) / deviation
        of_deviation = -of_clean * z
        of_in = tl.sum(tl.where(is_in > 0, of_clean, 0.0), axis=1)
        of_out = tl.sum(tl.where(is_in > 0, 0.0, of_clean), axis=1)
    for place in range(LARGEST):
        number = tl.load(expert + token * LARGEST + place, mask=there, other=-1)
        slope = tl.zeros((ROWS,), dtype=tl.float32)
        if TOP:
            slope = tl.load(grad_top + token * LARGEST + place, mask=there, other=0.0)
        if CHANCE:
            slope -= tl.where(place == K, of_in, 0.0) + tl.where(place == K - 1, of_out, 0.0)
        here = tl.where(column[None, :] == number[:, None], slope[:, None], 0.0)
        of_clean += here
        of_deviation += here * noise
    if NOISY:
        more = tl.load(grad_noisy + at, mask=inside, other=0.0)
        of_clean += more
        of_deviation += more * noise
    tl.store(grad_logit + at_logit, of_clean, mask=inside)
    tl.store(grad_logit + at_logit + experts, of_deviation * tl.sigmoid(raw), mask=inside)
