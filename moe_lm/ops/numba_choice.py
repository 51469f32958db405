"""The loops of `moe_lm.ops.noisy_top_k` over a token's experts, while its row is in the cache.

Shape suffixes: T tokens, E experts, F = 2 E, K experts a token, N = min(K + 1, E) of which a token keeps K.
"""

import torch
from torch import Tensor

from moe_lm.ops.compiled import compiled


def chosen(logit_TF: Tensor, draw_TE: Tensor, deviation_TE: Tensor, k: int) -> tuple[Tensor, ...]:
    """Return the largest noisy logits (T, N), their experts, all noisy logits, and z of eq. 9 (T, E; none if K = E)."""
    largest = min(k + 1, draw_TE.shape[1])
    top_TN = draw_TE.new_empty(len(draw_TE), largest)
    expert_TN = torch.empty(len(draw_TE), largest, dtype=torch.int64)
    noisy_TE, distance_TE = torch.empty_like(draw_TE), torch.empty_like(draw_TE if largest > k else draw_TE[:0])
    results = top_TN, expert_TN, noisy_TE, distance_TE
    _choose(*(x.numpy() for x in (logit_TF, draw_TE, deviation_TE, *results)), k)
    return results


def smooth_gradient_(kept: tuple[Tensor, ...], grad_logit_TF: Tensor, grad_top_TN: Tensor, k: int) -> None:
    """Make z's gradient, in the place of the clean logits', theirs and the deviations'; add the thresholds'."""
    _smooth_gradient(*(x.numpy() for x in (*kept, grad_logit_TF, grad_top_TN)), k)


@compiled
def _is_larger(a, b):
    """As torch's topk has it: NaN is larger than any number."""
    return a > b or (a != a and b == b)


@compiled
def _choose(logit, draw, deviation, top, expert, noisy, distance, k):
    num_tokens, num_experts = draw.shape
    largest = top.shape[1]
    for t in range(num_tokens):
        row, values, numbers = noisy[t], top[t], expert[t]
        for e in range(num_experts):
            row[e] = logit[t, e] + draw[t, e] * deviation[t, e]
        for e in range(num_experts):
            if e >= largest and not _is_larger(row[e], values[largest - 1]):
                continue
            place = min(e, largest - 1)
            while place > 0 and _is_larger(row[e], values[place - 1]):
                values[place], numbers[place] = values[place - 1], numbers[place - 1]
                place -= 1
            values[place], numbers[place] = row[e], e
        if largest > k:
            of_in, of_out = values[k], values[k - 1]
            for e in range(num_experts):
                threshold = of_in if row[e] > of_in else of_out
                distance[t, e] = (logit[t, e] - threshold) / deviation[t, e]


@compiled
def _smooth_gradient(top, expert, distance, deviation, grad_logit, grad_top, k):
    num_tokens, num_experts = distance.shape
    for t in range(num_tokens):
        grad_clean, grad_deviation = grad_logit[t, :num_experts], grad_logit[t, num_experts:]
        total = of_in = grad_logit.dtype.type(0)
        for e in range(num_experts):
            gradient = grad_clean[e] / deviation[t, e]
            grad_clean[e], grad_deviation[e] = gradient, -gradient * distance[t, e]
            total += gradient
        for place in range(k):
            if top[t, place] > top[t, k]:  # of equal values at the border none is in
                of_in += grad_clean[expert[t, place]]
        grad_top[t, k] -= of_in
        grad_top[t, k - 1] -= total - of_in
