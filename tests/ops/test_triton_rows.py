"""The GPU's kernels, run by Triton's interpreter on the CPU, against torch's operators in float64.

Shape suffixes: T tokens, D width, A assignments.
"""

import os

import pytest
import torch
from rows_of_tokens import RUNS, SIZES, rows_of, run_of

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("tests/gpu runs the kernels themselves", allow_module_level=True)

from moe_lm.ops import sparse_rows as rows
from moe_lm.ops import token_rows as fused_rows
from moe_lm.ops.triton import rows as triton_rows

TYPES = [torch.float32, torch.bfloat16]


def near(got, want, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gathered(sizes, dtype):
    """gate * x of the assignment's token, in the type of x."""
    token_A, gate_A, _ = rows_of(*sizes, dtype)
    x_TD = torch.randn(sizes[0], sizes[1]).to(dtype)
    got = triton_rows.gathered(x_TD, token_A, gate_A)
    assert got.dtype == dtype
    near(got, x_TD.double()[token_A] * gate_A.double().unsqueeze(1), dtype)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_summed_by_token(sizes, dtype, weighted):
    """A loop over assignments; float32 whatever the type; a token without rows gets zeros."""
    token_A, gate_A, y_AD = rows_of(*sizes, dtype)
    places = fused_rows.places(token_A, sizes[0])
    got = triton_rows.summed_by_token(y_AD, *places, gate_A if weighted else None)
    want = torch.zeros(sizes[0], sizes[1], dtype=torch.float64)
    for token, gate, y in zip(token_A.tolist(), gate_A.double(), y_AD.double(), strict=True):
        want[token] += (gate if weighted else 1) * y
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused_rows.summed_by_token(y_AD, token_A, places, gate_A if weighted else None), got)


@pytest.mark.parametrize("width", [1, 20])
@pytest.mark.parametrize("counts", RUNS, ids=str)
def test_summed_runs(counts, width):
    """However many rows a sum has, and in whatever order they come: several pieces, one that is full, none."""
    place_T, y_TD, want_UD = run_of(counts, width)
    got = triton_rows.summed_runs(y_TD, *fused_rows.places(place_T, len(counts)))
    torch.testing.assert_close(got.double(), want_UD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(9, 3), (9,)], ids=str)
def test_gradients_of_rows_taken_often(shape, monkeypatch):
    """Of a matrix and a vector, over three micro-batches, one of no rows, as torch's additions make them in float64."""
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        monkeypatch.setattr(rows, "by_triton", lambda x: True)  # but not in float64
        matrix = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        rows.collect_row_grads(matrix)
        for row_T in (
            torch.tensor([3] * 150 + [0, 8, 3]),
            torch.tensor([1, 3, 8]),
            torch.tensor([], dtype=torch.int64),
        ):
            weight = torch.randn(len(row_T), *shape[1:]).to(dtype)
            (rows.take_rows(matrix, row_T) * weight).sum().backward()
        results.append(rows.row_grad(matrix))
    assert results[0].row_U.tolist() == results[1].row_U.tolist() == [0, 1, 3, 8]
    torch.testing.assert_close(results[0].value_UD.double(), results[1].value_UD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_hidden_gradient(sizes, dtype):
    """Dots with the gradient as it came, then the gradient masked and weighted, in its place."""
    _, gate_A, grad_AH = rows_of(*sizes, dtype)
    h_AH = torch.randn(grad_AH.shape).relu().to(dtype)
    want_gate = (grad_AH.double() * h_AH.double()).sum(dim=1)
    want_AH = grad_AH.double() * (h_AH > 0) * gate_A.double().unsqueeze(1)
    by_torch = grad_AH.clone()
    got_gate = triton_rows.hidden_gradient_(grad_AH, h_AH, gate_A)
    near(got_gate, want_gate, torch.float32)
    near(grad_AH, want_AH, dtype)
    near(fused_rows.hidden_gradient_(by_torch, h_AH, gate_A), want_gate, torch.float32)
    torch.testing.assert_close(by_torch, grad_AH)
