"""Sums, sizes and ends of rows sorted by whose they are, by torch's operators and by Triton's interpreter.

Shape suffixes: A rows, R runs, D width.
"""

import os

import pytest
import torch
from rows_of_tokens import RUNS

from moe_lm.gate.routing import token_choice
from moe_lm.ops import dispatch
from moe_lm.ops import segments as sorted_rows
from moe_lm.ops import token_rows as fused_rows

BY = [
    "torch",
    pytest.param(
        "kernels", marks=pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu runs them")
    ),
]


@pytest.fixture(params=BY)
def made_by(request, monkeypatch):
    """Who makes the sums."""
    for module in (sorted_rows, dispatch, fused_rows):
        monkeypatch.setattr(module, "by_triton", lambda _: request.param == "kernels")
    return request.param


@pytest.mark.parametrize("bound", [1, 2**15, 2**15 + 1, 2**31, 2**31 + 1, 2**40])
def test_sorted(bound):
    """The largest and the least that there can be, and of equal ones the earlier first."""
    x_A = torch.tensor([bound - 1, 0, bound // 2, bound - 1, 0])
    sorted_A, order_A = sorted_rows.stable_sort_below(x_A, bound)
    want = sorted(range(5), key=lambda place: (int(x_A[place]), place))
    assert order_A.tolist() == want
    assert sorted_A.tolist() == [int(x_A[place]) for place in want]
    assert sorted_A.dtype == torch.int64


@pytest.mark.parametrize("counts", RUNS, ids=str)
def test_ends_and_sizes(counts):
    """Also of runs without rows, and of no runs."""
    of_A = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64))
    assert sorted_rows.segment_sizes(of_A, len(counts)).tolist() == counts
    assert sorted_rows.segment_ends(of_A, len(counts)).tolist() == torch.tensor(counts).cumsum(0).tolist()


@pytest.mark.parametrize("width", [(5,), ()], ids=["rows", "numbers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("counts", [*RUNS, [2050, 0, 1]], ids=str)
def test_sums(counts, dtype, width, made_by):
    """Of each run its rows' sum, zeros without rows; a row's gradient is its run's."""
    torch.manual_seed(0)
    by_kernel = made_by == "kernels" and dtype == torch.float32
    of_A = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64))
    x = torch.randn(len(of_A), *width, dtype=dtype, requires_grad=True)
    total = sorted_rows.segment_sum(x, of_A, len(counts))
    assert (total.dtype, total.shape) == (dtype, (len(counts), *width))
    assert ("_Sums" in total.grad_fn.name()) == by_kernel
    for own, part in zip(total, x.split(counts), strict=True):
        torch.testing.assert_close(own.double(), part.double().sum(dim=0), rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(total)
    total.backward(grad)
    torch.testing.assert_close(x.grad, grad[of_A])


def test_of_more_tokens_and_experts_than_16_bits_number():
    """Their order is by all bits: of tokens in `places`, of experts in a choice."""
    token_A = torch.tensor([39_999, 7_231, 0, 39_999])
    order_A, ends_T = fused_rows.places(token_A, 40_000)
    assert order_A.tolist() == [2, 1, 0, 3]
    assert ends_T[[0, 7_230, 7_231, 39_998, 39_999]].tolist() == [1, 1, 2, 2, 4]
    gating = token_choice(torch.tensor([[39_999], [7_231]]), torch.ones(2, 1), 40_000)
    assert gating.expert_A.tolist() == [7_231, 39_999]
    assert gating.token_A.tolist() == [1, 0]


def test_gradients_of_dispatched_tokens(made_by):
    """A token's is the sum of its rows', zeros where it was sent nowhere."""
    torch.manual_seed(0)
    token_A = torch.tensor([0, 2, 5, 2, 0, 2])
    gating = type("Gating", (), {"token_A": token_A})
    x_TD = torch.randn(6, 4, requires_grad=True)
    x_AD, grad_AD = dispatch.dispatch(x_TD, gating), torch.randn(6, 4)
    assert torch.equal(x_AD, x_TD.detach()[token_A])
    assert ("_Dispatch" in x_AD.grad_fn.name()) == (made_by == "kernels")
    x_AD.backward(grad_AD)
    want_TD = torch.zeros(6, 4, dtype=torch.float64)
    for token, grad in zip(token_A.tolist(), grad_AD.double(), strict=True):
        want_TD[token] += grad
    torch.testing.assert_close(x_TD.grad.double(), want_TD)
