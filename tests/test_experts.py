"""The experts' grouped products against one row at a time.

Shape suffixes: A assignments, D width, H hidden, E experts.
"""

import math

import pytest
import torch

from moe_lm.experts import Experts, grouped_products

WIDTH, HIDDEN = 8, 12
COUNTS = [[3, 0, 5, 1], [0, 0, 7, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 4, 0, 9], [6]]


@pytest.fixture
def nan_memory():
    """Fresh memory is NaN everywhere, so a place that nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def make(counts, dtype=torch.float64):
    torch.manual_seed(0)
    experts = Experts(width=WIDTH, hidden=HIDDEN, num_experts=len(counts)).to(dtype)
    x_AD = torch.randn(sum(counts), WIDTH, dtype=dtype).requires_grad_()
    expert_A = torch.tensor([e for e, count in enumerate(counts) for _ in range(count)], dtype=torch.int64)
    return experts, x_AD, expert_A


def by_row(x_AD, expert_A, w1_EDH, w2_EHD):
    """ReLU(x W1) W2, a row at a time."""
    rows = [torch.clamp(x_D @ w1_EDH[e], min=0) @ w2_EHD[e] for x_D, e in zip(x_AD, expert_A.tolist(), strict=True)]
    return torch.stack(rows) if rows else x_AD * 1


def gradients(y_AD, inputs):
    factor_AD = torch.randn(y_AD.shape, generator=torch.Generator().manual_seed(1), dtype=y_AD.dtype)
    return torch.autograd.grad((y_AD * factor_AD).sum(), inputs, materialize_grads=True)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_experts_equal_one_row_at_a_time(counts, nan_memory):
    """Outputs and all gradients are those of the loop in float64; an expert without rows has gradient 0."""
    experts, x_AD, expert_A = make(counts)
    inputs = (x_AD, experts.w1_EDH, experts.w2_EHD)
    got_AD, want_AD = experts(x_AD, expert_A), by_row(x_AD, expert_A, *inputs[1:])
    torch.testing.assert_close(got_AD, want_AD)
    got, want = gradients(got_AD, inputs), gradients(want_AD, inputs)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)
    for e, count in enumerate(counts):
        if count == 0:
            assert (got[1][e] == 0).all()
            assert (got[2][e] == 0).all()


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_grouped_products_equal_one_row_at_a_time(counts, nan_memory):
    """The grouped GEMM of a GPU, run in float32 on the CPU, agrees with the loop, with empty groups too."""
    experts, x_AD, expert_A = make(counts, torch.float32)
    inputs = (x_AD, experts.w1_EDH, experts.w2_EHD)
    ends_E = torch.tensor(counts).cumsum(0)
    got_AD = grouped_products(x_AD, ends_E, experts.w1_EDH, experts.w2_EHD, torch.float32)
    want_AD = by_row(x_AD, expert_A, *inputs[1:])
    torch.testing.assert_close(got_AD, want_AD, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(gradients(got_AD, inputs), gradients(want_AD, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_float32_agrees_with_float64():
    """In float32 outputs and gradients are those of float64 to rounding."""
    results = {}
    for dtype in (torch.float32, torch.float64):
        experts, x_AD, expert_A = make([30, 0, 50, 10])
        experts, x_AD = experts.to(dtype), x_AD.detach().to(dtype).requires_grad_()
        y_AD = experts(x_AD, expert_A)
        factor_AD = torch.linspace(-1, 1, y_AD.numel(), dtype=dtype).view_as(y_AD)
        grads = torch.autograd.grad((y_AD * factor_AD).sum(), (x_AD, experts.w1_EDH, experts.w2_EHD))
        results[dtype] = [y_AD, *grads]
    for single, double in zip(results[torch.float32], results[torch.float64], strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5)


def test_a_transposed_gradient_is_no_trouble():
    """The gradient that comes back may lie transposed in memory."""
    experts, x_AD, expert_A = make([3, 0, 5])
    factor_DA = torch.randn(WIDTH, 8, dtype=torch.float64)
    inputs = (x_AD, experts.w1_EDH, experts.w2_EHD)
    got = torch.autograd.grad((experts(x_AD, expert_A).t() * factor_DA).sum(), inputs)
    want = torch.autograd.grad((by_row(x_AD, expert_A, *inputs[1:]).t() * factor_DA).sum(), inputs)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_two_matrices_without_biases_and_their_spread():
    """Two tensors of E D H numbers, no biases, of standard deviations sqrt(2/D) and sqrt(1/H)."""
    experts = Experts(width=64, hidden=128, num_experts=16)
    shapes = {name: tuple(p.shape) for name, p in experts.named_parameters()}
    assert shapes == {"w1_EDH": (16, 64, 128), "w2_EHD": (16, 128, 64)}
    # 131,072 uniform numbers: the deviation's standard error is about 0.13 %.
    assert experts.w1_EDH.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.01)
    assert experts.w2_EHD.std().item() == pytest.approx(math.sqrt(1 / 128), rel=0.01)


def test_operations_of_a_row_are_the_papers():
    """512 -> 1024 -> 512 costs 1.05 M multiply-adds a token (Appendix C.1)."""
    with torch.device("meta"):
        assert Experts(width=512, hidden=1024, num_experts=4).operations_per_row() == 1_048_576
