"""Tokens to experts and back, with numbers of assignments that differ from token to token.

Shape suffixes: T tokens, D width, A assignments.
"""

import pytest
import torch

from moe_lm.gate import Gating
from moe_lm.ops.dispatch import combine, dispatch

UNEVEN = [(0, 0), (0, 3), (1, 3), (2, 0), (2, 3), (2, 4)]
"""(expert, token): tokens 0 and 3 get 2 and 3, token 4 gets one, 1 and 2 get none; expert 3 gets nobody."""


def gating_of(pairs, num_tokens, num_experts=4):
    expert_A = torch.tensor([expert for expert, _ in pairs], dtype=torch.int64)
    gate_A = torch.randn(len(pairs), dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    return Gating(
        token_A=torch.tensor([token for _, token in pairs], dtype=torch.int64),
        expert_A=expert_A,
        gate_A=gate_A,
        num_tokens=num_tokens,
        importance_E=torch.zeros(num_experts),
        load_E=torch.zeros(num_experts),
        num_requested=len(pairs),
    )


@pytest.mark.parametrize(("pairs", "num_tokens"), [(UNEVEN, 5), ([], 3), ([], 0), ([(2, 0)], 1)])
def test_combine_is_the_weighted_sum_over_a_tokens_assignments(pairs, num_tokens):
    """Tokens with 0, 1, 2 and 3 assignments get the loop's sums; so are the gradients to answers and gates."""
    gating = gating_of(pairs, num_tokens)
    y_AD = torch.randn(len(pairs), 3, dtype=torch.float64).requires_grad_()
    rows = [torch.zeros(3, dtype=torch.float64) for _ in range(num_tokens)]
    for a, (_, token) in enumerate(pairs):
        rows[token] = rows[token] + gating.gate_A[a] * y_AD[a]
    want_TD = torch.stack(rows) if rows else torch.zeros(0, 3, dtype=torch.float64)
    got_TD = combine(y_AD, gating)
    torch.testing.assert_close(got_TD, want_TD)
    if pairs:
        factor_TD = torch.randn(num_tokens, 3, dtype=torch.float64)
        inputs = (y_AD, gating.gate_A)
        got = torch.autograd.grad((got_TD * factor_TD).sum(), inputs)
        want = torch.autograd.grad((want_TD * factor_TD).sum(), inputs)
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(("pairs", "num_tokens"), [(UNEVEN, 5), ([], 3), ([], 0)])
def test_dispatch_repeats_each_token_for_each_of_its_experts(pairs, num_tokens):
    """Row a is the token of assignment a, and a token's gradient is the sum over its rows."""
    gating = gating_of(pairs, num_tokens)
    x_TD = torch.randn(num_tokens, 3, dtype=torch.float64).requires_grad_()
    x_AD = dispatch(x_TD, gating)
    assert x_AD.tolist() == [x_TD[token].tolist() for _, token in pairs]
    factor_AD = torch.randn(len(pairs), 3, dtype=torch.float64)
    (x_AD * factor_AD).sum().backward()
    want_TD = torch.zeros(num_tokens, 3, dtype=torch.float64)
    for a, (_, token) in enumerate(pairs):
        want_TD[token] += factor_AD[a]
    torch.testing.assert_close(x_TD.grad, want_TD)


def test_bfloat16_answers_are_summed_in_float32():
    """Under autocast the experts answer in bfloat16: the sum is float32, the gradient has the answers' type."""
    gating = gating_of(UNEVEN, 5)
    gate_A = gating.gate_A.detach().float().requires_grad_()
    gating = Gating(**{**vars(gating), "gate_A": gate_A})
    y_AD = torch.randn(6, 3).bfloat16().requires_grad_()
    y_TD = combine(y_AD, gating)
    assert y_TD.dtype == torch.float32
    y_TD.sum().backward()
    assert y_AD.grad.dtype == torch.bfloat16
    assert gate_A.grad.dtype == torch.float32
    torch.testing.assert_close(y_TD[4], y_AD[5].float() * gate_A[5])
