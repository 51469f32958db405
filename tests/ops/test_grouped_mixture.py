"""The mixture by grouped GEMM, run in float32 on the CPU, against one assignment at a time.

Shape suffixes: T tokens, A assignments, E experts.
"""

import os

import pytest
import torch
from made import Made
from mixture_by_hand import COUNTS, by_assignment, gradients, make

from moe_lm.ops import grouped_gemm
from moe_lm.ops.experts_grouped import experts_grouped


def in_kernels(monkeypatch, most_in_torch, most_rows_of_outer):
    """Products by Triton's interpreter, all of them or some beside torch's; the passes between them by torch."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("tests/gpu runs the kernels themselves")
    monkeypatch.setattr(grouped_gemm, "by_triton", lambda _: True)
    monkeypatch.setattr(grouped_gemm, "most_rows_of_outer", most_rows_of_outer)
    monkeypatch.setattr(grouped_gemm, "most_in_torch", most_in_torch)


def mixture(experts, x_TD, gating, counts, dtype, recompute=False):
    ends_E = torch.tensor(counts).cumsum(0)
    assignments = gating.token_A, gating.gate_A, ends_E
    return experts_grouped(x_TD, *assignments, experts.w1_EDH, experts.w2_EHD, dtype, recompute=recompute)


@pytest.mark.parametrize("most", [(0, 0), (1023, 0), (1023, 1536), 1, 3, 1023])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_equals_one_assignment_at_a_time(counts, recompute, most, monkeypatch):
    """Outputs and all gradients, gates' too; a token without any gets zeros, an expert without any a gradient of 0.

    Also where there are more experts than one grouped product takes, and where our kernels make products.
    """
    if isinstance(most, tuple):
        in_kernels(monkeypatch, *most)
    else:
        monkeypatch.setattr(grouped_gemm, "_MOST_GROUPS", most)
    experts, x_TD, gating = make(counts, torch.float32)
    inputs = (x_TD, gating.gate_A, experts.w1_EDH, experts.w2_EHD)
    got_TD = mixture(experts, x_TD, gating, counts, torch.float32, recompute)
    want_TD = by_assignment(x_TD, gating, *inputs[1:])
    torch.testing.assert_close(got_TD, want_TD, rtol=1e-5, atol=1e-5)
    got, want = gradients(got_TD, inputs), gradients(want_TD, inputs)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    for e, count in enumerate(counts):
        if count == 0:
            assert (got[2][e] == 0).all()
            assert (got[3][e] == 0).all()


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_bfloat16_products_and_float32_sums(recompute):
    """Near the float32 result to bfloat16's rounding; each gradient has its argument's type."""
    counts = [30, 0, 50, 9]
    experts, x_TD, gating = make(counts, torch.float32, width=16, hidden=24)  # rows of 16 bytes
    for argument in (x_TD, *experts.parameters()):
        argument.data = argument.data.bfloat16().float()  # or hidden units near 0 would change sides
    inputs = (x_TD, gating.gate_A, experts.w1_EDH, experts.w2_EHD)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        y_TD = mixture(experts, x_TD, gating, counts, dtype, recompute)
        results.append([y_TD, *gradients(y_TD, inputs)])
    for low, full in zip(*results, strict=True):
        assert low.dtype == torch.float32
        assert (low - full).norm() < 0.02 * full.norm()
        assert not torch.equal(low, full)


def test_two_backward_passes_are_equal():
    """The kept activations are not used up."""
    experts, x_TD, gating = make([3, 4], torch.float32)
    y_TD = mixture(experts, x_TD, gating, [3, 4], torch.float32)
    once, again = (torch.autograd.grad(y_TD.sum(), gating.gate_A, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again)


def test_gradients_of_many_experts_are_never_all_in_two_types(monkeypatch):
    """Where they come in parts: of 4 billion parameters each copy in bfloat16 takes 8 GB."""
    monkeypatch.setattr(grouped_gemm, "_MOST_GROUPS", 3)
    experts, x_TD, gating = make([4, 5, 3, 6, 2, 8, 1], torch.float32, width=16, hidden=24)
    y_TD = mixture(experts, x_TD, gating, [4, 5, 3, 6, 2, 8, 1], torch.bfloat16)
    with Made() as made:
        y_TD.sum().backward()
    numbers = 7 * 16 * 24
    assert [size for size in made.sizes() if size >= 2 * numbers] == [4 * numbers, 4 * numbers]


@pytest.mark.parametrize(("num_rows", "ours"), [(15, True), (16, False)])
def test_who_makes_products_beside_torchs(num_rows, ours, monkeypatch):
    """The first one our kernel, outer ones as well up to so many rows an expert, in the type that is asked for."""
    in_kernels(monkeypatch, 1023, 5)
    asked, real = [], grouped_gemm.InKernels

    class StepAccumulator(real):
        def products(self, *arguments, **options):
            asked.append("product")
            return super().products(*arguments, **options)

        def outer_products(self, *arguments):
            asked.append("outer product")
            return super().outer_products(*arguments)

    monkeypatch.setattr(grouped_gemm, "InKernels", StepAccumulator)
    torch.manual_seed(0)
    ends_E = torch.tensor([4, 4, num_rows])
    by = grouped_gemm.grouped_by(ends_E, num_rows, torch.float16 if ours else torch.float32)
    dtype, every_A = by._dtype, torch.arange(num_rows)
    x_AD, grad_AH = (torch.randn(num_rows, size).to(dtype) for size in (8, 16))
    if not ours:  # which needs torch's operator, in a type that it takes on a CPU
        by.outer_products(x_AD, every_A, grad_AH, torch.empty(3, 8, 16))
        assert asked == []
        return
    by.products(x_AD, every_A, torch.randn(3, 8, 16).to(dtype), relu=True)
    outer_EDH = by.outer_products(x_AD, every_A, grad_AH, torch.empty(3, 8, 16))
    assert asked == ["product", "outer product"]
    assert outer_EDH.dtype == torch.float32
    want_DH = x_AD[4:].double().t() @ grad_AH[4:].double()
    torch.testing.assert_close(outer_EDH[2].double(), want_DH, rtol=1e-5, atol=1e-5)  # not rounded to 16 bits
