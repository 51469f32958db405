"""Tokens to rows and back, with numbers of assignments that differ from token to token.

Shape suffixes: T tokens, D width, A assignments.
"""

import pytest
import torch

from moe_lm.ops.token_dispatch import combine, dispatch, row_order

UNEVEN = [0, 3, 3, 0, 3, 4]
"""Tokens 0 and 3 get 2 and 3 assignments, token 4 gets one, 1 and 2 get none."""

CASES = [(UNEVEN, 5), ([], 3), ([], 0), ([0], 1)]
"""Tokens of the assignments, and how many tokens there are."""


def drawn(tokens):
    """Tokens, gates and rows of assignments."""
    generator = torch.Generator().manual_seed(0)
    token_A = torch.tensor(tokens, dtype=torch.int64)
    gate_A = torch.randn(len(tokens), dtype=torch.float64, generator=generator).requires_grad_()
    return token_A, gate_A, torch.randn(len(tokens), 3, dtype=torch.float64, generator=generator).requires_grad_()


def test_combine_is_the_weighted_sum_over_a_tokens_assignments():
    """Tokens with 0, 1, 2 and 3 assignments get the loop's sums; so are the gradients of rows and gates."""
    for tokens, num_tokens in CASES:
        token_A, gate_A, y_AD = drawn(tokens)
        rows = [torch.zeros(3, dtype=torch.float64) for _ in range(num_tokens)]
        for a, token in enumerate(tokens):
            rows[token] = rows[token] + gate_A[a] * y_AD[a]
        want_TD = torch.stack(rows) if rows else torch.zeros(0, 3, dtype=torch.float64)
        got_TD = combine(y_AD, token_A, gate_A, num_tokens)
        torch.testing.assert_close(got_TD, want_TD)
        if tokens:
            factor_TD = torch.randn(num_tokens, 3, dtype=torch.float64)
            got, want = (torch.autograd.grad((y * factor_TD).sum(), (y_AD, gate_A)) for y in (got_TD, want_TD))
            for mine, theirs in zip(got, want, strict=True):
                torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("version", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dispatch_repeats_each_token_for_each_of_its_experts(version, dtype, request):
    """Row a is the token of assignment a, and a token's gradient is the sum over its rows, zeros without rows."""
    if version == "triton":
        request.getfixturevalue("triton_on_cpu")
    for tokens, num_tokens in [*CASES, ([0, 2, 5, 2, 0, 2], 6)]:
        token_A, _, factor_AD = drawn(tokens)
        x_TD = torch.randn(num_tokens, 3, dtype=dtype).requires_grad_()
        x_AD = dispatch(x_TD, token_A)
        assert torch.equal(x_AD, x_TD.detach()[token_A])
        assert ("_Dispatch" in x_AD.grad_fn.name()) == (version == "triton" and dtype == torch.float32)
        (x_AD * factor_AD.detach()).sum().backward()
        want_TD = torch.zeros(num_tokens, 3, dtype=torch.float64)
        for a, token in enumerate(tokens):
            want_TD[token] += factor_AD[a].detach()
        torch.testing.assert_close(x_TD.grad.double(), want_TD, rtol=1e-5, atol=1e-5)


def test_bfloat16_outputs_are_summed_in_float32():
    """Under autocast expert outputs are bfloat16: the sum is float32, the gradient has the outputs' type."""
    token_A, gate_A, _ = drawn(UNEVEN)
    gate_A = gate_A.detach().float().requires_grad_()
    y_AD = torch.randn(6, 3).bfloat16().requires_grad_()
    y_TD = combine(y_AD, token_A, gate_A, 5)
    assert y_TD.dtype == torch.float32
    y_TD.sum().backward()
    assert y_AD.grad.dtype == torch.bfloat16
    assert gate_A.grad.dtype == torch.float32
    torch.testing.assert_close(y_TD[4], y_AD[5].float() * gate_A[5])


def test_order_of_more_tokens_than_16_bits_number():
    """Rows are sorted by all bits of their token; rows of one token stay in order."""
    order_A, ends_T = row_order(torch.tensor([39_999, 7_231, 0, 39_999]), 40_000)
    assert order_A.tolist() == [2, 1, 0, 3]
    assert ends_T[[0, 7_230, 7_231, 39_998, 39_999]].tolist() == [1, 1, 2, 2, 4]
