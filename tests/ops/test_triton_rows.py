"""Triton's kernels over rows, run by its interpreter on the CPU, against float64.

Shape suffixes: T tokens, D width, A assignments.
"""

import os

import pytest
import torch
from row_cases import SEGMENTS, SIZES, rows_of, segment_case

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("tests/gpu runs the kernels themselves", allow_module_level=True)

from moe_lm.ops.experts_gpu import hidden_gradient_
from moe_lm.ops.sparse_rows import RowSparseParameter, row_grad, take_rows
from moe_lm.ops.token_dispatch import gather_weighted, row_order, sum_by_token
from moe_lm.ops.triton import rows as kernels

pytestmark = pytest.mark.usefixtures("triton_on_cpu")

TYPES = [torch.float32, torch.bfloat16]


def near(got, want, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gather_weighted(dtype):
    """gate * x of the assignment's token, in the type of x, by the kernel and by the reference."""
    for sizes in SIZES:
        token_A, gate_A, _ = rows_of(*sizes, dtype)
        x_TD = torch.randn(sizes[0], sizes[1]).to(dtype)
        want = x_TD.double()[token_A] * gate_A.double().unsqueeze(1)
        for function in (gather_weighted, gather_weighted.reference):
            got = function(x_TD, token_A, gate_A)
            assert got.dtype == dtype
            near(got, want, dtype)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_sum_by_token(dtype, weighted):
    """A loop over assignments; float32 whatever the type; a token without rows gets zeros."""
    for sizes in SIZES:
        token_A, gate_A, y_AD = rows_of(*sizes, dtype)
        want = torch.zeros(sizes[0], sizes[1], dtype=torch.float64)
        for token, gate, y in zip(token_A.tolist(), gate_A.double(), y_AD.double(), strict=True):
            want[token] += (gate if weighted else 1) * y
        for function in (sum_by_token, sum_by_token.reference):
            got = function(y_AD, token_A, row_order(token_A, sizes[0]), gate_A if weighted else None)
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_hidden_gradient(dtype):
    """Dots with the gradient as it came, then the gradient masked and weighted, in place."""
    for sizes in SIZES:
        _, gate_A, grad_AH = rows_of(*sizes, dtype)
        h_AH = torch.randn(grad_AH.shape).relu().to(dtype)
        want_gate = (grad_AH.double() * h_AH.double()).sum(dim=1)
        want_AH = grad_AH.double() * (h_AH > 0) * gate_A.double().unsqueeze(1)
        for function in (hidden_gradient_, hidden_gradient_.reference):
            changed_AH = grad_AH.clone()
            near(function(changed_AH, h_AH, gate_A), want_gate, torch.float32)
            near(changed_AH, want_AH, dtype)


def test_kernels_run(monkeypatch):
    """They are what the operations above call, for all types but float64."""
    called = []
    for name in ("gather_weighted", "sum_by_token", "hidden_gradient_"):
        monkeypatch.setattr(kernels, name, lambda *_, name=name: called.append(name))
    for dtype in (torch.bfloat16, torch.float64):
        token_A, gate_A, y_AD = rows_of(*SIZES[0], dtype)
        gather_weighted(y_AD, token_A, gate_A)
        sum_by_token(y_AD, token_A, row_order(token_A, SIZES[0][0]))
        hidden_gradient_(y_AD, y_AD, gate_A)
    assert called == ["gather_weighted", "sum_by_token", "hidden_gradient_"]


@pytest.mark.parametrize("width", [1, 20])
@pytest.mark.parametrize("counts", SEGMENTS, ids=str)
def test_sum_segments(counts, width):
    """However many rows a segment has, and in whatever order they come: several pieces, one that is full, none."""
    segment_A, y_AD, want_UD = segment_case(counts, width)
    got = kernels.sum_segments(y_AD, *row_order(segment_A, len(counts)))
    torch.testing.assert_close(got.double(), want_UD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(9, 3), (9,)], ids=str)
def test_gradients_of_rows_taken_often(shape):
    """A matrix's and a vector's, over three micro-batches, one of no rows, as PyTorch adds them in float64."""
    results = []
    for dtype in (torch.float32, torch.float64):  # no kernel takes float64
        torch.manual_seed(0)
        matrix = RowSparseParameter(torch.zeros(shape, dtype=dtype), sparse_grad=True)
        for row_T in (
            torch.tensor([3] * 150 + [0, 8, 3]),
            torch.tensor([1, 3, 8]),
            torch.tensor([], dtype=torch.int64),
        ):
            weight = torch.randn(len(row_T), *shape[1:]).to(dtype)
            (take_rows(matrix, row_T) * weight).sum().backward()
        results.append(row_grad(matrix))
    assert results[0].row_U.tolist() == results[1].row_U.tolist() == [0, 1, 3, 8]
    torch.testing.assert_close(results[0].value_UD.double(), results[1].value_UD, rtol=1e-5, atol=1e-5)
