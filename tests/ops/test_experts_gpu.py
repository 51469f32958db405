"""Experts by grouped GEMM, run in float32 on the CPU by PyTorch and by Triton's interpreter.

Shape suffixes: T tokens, A assignments, E experts.
"""

from functools import partial

import pytest
import torch
from made import Made
from naive_experts import COUNTS, assert_right, assert_rows_right, gradients, make, results

from moe_lm.ops import grouped_gemm
from moe_lm.ops.experts_gpu import grouped_mlp, moe_mlp

IN_FLOAT32 = [partial(function, dtype=torch.float32) for function in (moe_mlp, grouped_mlp)]


@pytest.mark.parametrize("max_groups", [1, 3, 1023])
def test_equals_one_assignment_at_a_time(max_groups, monkeypatch, nan_memory):
    """Outputs and all gradients, also with more experts than one call of PyTorch's operator takes."""
    monkeypatch.setattr(grouped_gemm, "_MAX_GROUPS", max_groups)
    for counts in COUNTS:
        for recompute in (False, True):
            assert_right(IN_FLOAT32[0], counts, torch.float32, 1e-5, recompute=recompute)
            if sum(counts):  # never called without rows
                assert_rows_right(IN_FLOAT32[1], counts, torch.float32, 1e-5, recompute=recompute)


@pytest.mark.parametrize("limits", [(0, 0), (1023, 0), (1023, 1536)], ids=str)
def test_equals_one_assignment_at_a_time_in_kernels(limits, monkeypatch, triton_on_cpu):
    """By Triton alone, or for products that would cost PyTorch's operator a pass over the rows."""
    monkeypatch.setattr(grouped_gemm, "max_torch_experts", limits[0])
    monkeypatch.setattr(grouped_gemm, "max_outer_rows", limits[1])
    for counts in COUNTS:
        for recompute in (False, True):
            assert_right(IN_FLOAT32[0], counts, torch.float32, 1e-5, recompute=recompute)
            assert_rows_right(IN_FLOAT32[1], counts, torch.float32, 1e-5, recompute=recompute)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_bfloat16_products_and_float32_sums(recompute):
    """Near the float32 result to bfloat16's rounding; outputs and gradients have their argument's type."""
    case = make([30, 0, 50, 9], torch.float32, width=16, hidden=24)  # rows of 16 bytes
    case = case.to(torch.bfloat16).to(torch.float32)  # or hidden units near 0 would change sides
    low, full = (results(moe_mlp, case, recompute=recompute, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    for mine, theirs in zip(low, full, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 0.02 * theirs.norm()
        assert not torch.equal(mine, theirs)


def test_two_backward_passes_are_equal():
    """The kept activations are not used up."""
    case = make([3, 4], torch.float32)
    y_TD = IN_FLOAT32[0](*case)
    once, again = (torch.autograd.grad(y_TD.sum(), case.gate_A, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again)


def test_recomputation_repeats_one_product():
    """The first product, for the hidden activations; the second one is not repeated."""
    arguments = make([9, 3, 0, 8], torch.float32).rows
    calls = {}
    for on in (False, True):
        with Made() as made:
            gradients(IN_FLOAT32[1](*arguments, recompute=on), (arguments[0], *arguments[2:]))
        calls[on] = made.calls[torch.ops.aten._grouped_mm.default]
    assert calls == {False: 6, True: 7}


def test_gradients_of_many_experts_are_never_all_in_two_types(monkeypatch):
    """With several calls of PyTorch's operator: a bfloat16 copy of 4 billion parameters takes 8 GB."""
    monkeypatch.setattr(grouped_gemm, "_MAX_GROUPS", 3)
    case = make([4, 5, 3, 6, 2, 8, 1], torch.float32, width=16, hidden=24)
    y_TD = moe_mlp(*case, dtype=torch.bfloat16)
    with Made() as made:
        y_TD.sum().backward()
    numbers = 7 * 16 * 24
    assert [size for size in made.sizes() if size >= 2 * numbers] == [4 * numbers, 4 * numbers]


@pytest.mark.parametrize(("num_rows", "by_triton"), [(15, True), (16, False)])
def test_products_that_triton_makes_beside_pytorch(num_rows, by_triton, monkeypatch, triton_on_cpu):
    """The first product, which gathers and takes the ReLU, and the gradients of experts with few rows.

    The gradient is not rounded to the rows' type on its way to its own.
    """
    monkeypatch.setattr(grouped_gemm, "max_outer_rows", 5)
    from moe_lm.ops.triton import grouped_gemm as kernels

    called = []
    for name in ("grouped_mm", "grouped_outer"):
        real = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, real=real, **k: [called.append(real.__name__), real(*a, **k)][1])
    torch.manual_seed(0)
    rows = grouped_gemm.ExpertRows(torch.tensor([4, 4, num_rows]), num_rows)
    dtype, every_A = torch.float16 if by_triton else torch.float32, torch.arange(num_rows)
    x_AD, grad_AH, weight_EDH = (torch.randn(*shape).to(dtype) for shape in ((num_rows, 8), (num_rows, 16), (3, 8, 16)))
    grouped_gemm.grouped_mm(x_AD, every_A, weight_EDH, rows, relu=True)
    outer_EDH = grouped_gemm.grouped_outer(x_AD, every_A, grad_AH, rows, torch.float32)
    assert called == ["grouped_mm", *(["grouped_outer"] if by_triton else [])]
    if not by_triton:  # PyTorch's operator runs on a CPU in float32
        grouped_gemm.grouped_mm(x_AD, every_A, weight_EDH, rows)
        grouped_gemm.grouped_mm(x_AD, None, weight_EDH, rows, relu=True)
        grouped_gemm.differentiable_grouped_mm(x_AD, weight_EDH, rows)
        assert called == ["grouped_mm"]
    assert outer_EDH.dtype == torch.float32
    want_DH = x_AD[4:].double().t() @ grad_AH[4:].double()
    torch.testing.assert_close(outer_EDH[2].double(), want_DH, rtol=1e-5, atol=1e-5)


def test_triton_reads_the_matrices_of_many_experts_as_they_are(monkeypatch, triton_on_cpu):
    """They are cast for PyTorch's operator alone."""
    weight_EDH = torch.ones(3, 8, 16)
    assert grouped_gemm.cast_weights(weight_EDH, torch.float16).dtype == torch.float16
    monkeypatch.setattr(grouped_gemm, "max_torch_experts", 2)
    assert grouped_gemm.cast_weights(weight_EDH, torch.float16) is weight_EDH
