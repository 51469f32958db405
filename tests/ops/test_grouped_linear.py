"""The product of rows with their group's matrix, by each version, against a loop over the rows.

Shape suffixes: T rows, D inputs, E outputs, G groups.
"""

import pytest
import torch
from torch.nn import functional as F

from moe_lm.ops.grouped_linear import grouped_linear

# Rows of each group: none at all, one, empty groups at the ends and between, equal sizes, extreme skew both ways.
SIZES = [[0, 0, 0], [0], [1], [7], [0, 5, 0], [3, 0, 0, 2], [4] * 6, [60, *[1] * 20], [0] * 30 + [50], [9, *[0] * 30]]
# float32 on a CPU runs by `F.grouped_mm`, widths padded to multiples of 4; groups of float64 are padded.
PATHS = [
    (torch.float32, 8, 4, "unpadded"),
    (torch.float32, 4, 12, "unpadded"),
    (torch.float32, 5, 3, "unpadded"),
    (torch.float32, 8, 3, "unpadded"),
    (torch.float32, 1, 1, "unpadded"),
    (torch.float64, 8, 4, "padded"),
    (torch.float64, 3, 5, "padded"),
]


def inputs(sizes, dtype, width, outputs):
    torch.manual_seed(sum(sizes) + len(sizes))
    group_T = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    x_TD = torch.randn(sum(sizes), width, dtype=dtype, requires_grad=True)
    weight_GDE = torch.randn(len(sizes), width, outputs, dtype=dtype, requires_grad=True)
    return x_TD, weight_GDE, group_T


def by_hand(x_TD, weight_GDE, group_T, factor_TE):
    """The product and its gradients under sum(factor * y), row by row, in float64."""
    x_TD, weight_GDE, factor_TE = x_TD.detach().double(), weight_GDE.detach().double(), factor_TE.double()
    y_TE, grad_x_TD, grad_weight_GDE = torch.zeros_like(factor_TE), torch.zeros_like(x_TD), torch.zeros_like(weight_GDE)
    for t, g in enumerate(group_T.tolist()):
        y_TE[t] = (x_TD[t].unsqueeze(1) * weight_GDE[g]).sum(dim=0)
        grad_x_TD[t] = (weight_GDE[g] * factor_TE[t]).sum(dim=1)
        grad_weight_GDE[g] += torch.outer(x_TD[t], factor_TE[t])
    return y_TE, grad_x_TD, grad_weight_GDE


def compare(results, want, rtol, atol):
    for got, expected in zip(results, want, strict=True):
        torch.testing.assert_close(got.detach().double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("dtype", "width", "outputs", "path"), PATHS)
def test_each_row_meets_the_matrix_of_its_group(monkeypatch, dtype, width, outputs, path):
    """Values and both gradients, by version and reference, are the loop's; an empty group's gradient is 0."""
    taken, real = [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *a, **kwargs: (taken.append("unpadded"), real(*a, **kwargs))[1])
    rtol, atol = (1e-12, 1e-12) if dtype == torch.float64 else (1e-5, 1e-5)
    for sizes in SIZES:
        taken.clear()
        x_TD, weight_GDE, group_T = inputs(sizes, dtype, width, outputs)
        y_TE = grouped_linear(x_TD, weight_GDE, group_T)
        assert (taken or ["padded"]) == [path], sizes
        assert y_TE.dtype == dtype
        assert y_TE.shape == (sum(sizes), outputs)
        factor_TE = torch.randn(y_TE.shape, dtype=dtype)
        want = by_hand(x_TD, weight_GDE, group_T, factor_TE)
        for result_TE in (y_TE, grouped_linear.reference(x_TD, weight_GDE, group_T)):
            gradients = torch.autograd.grad((result_TE * factor_TE).sum(), (x_TD, weight_GDE))
            compare((result_TE, *gradients), want, rtol, atol)


@pytest.mark.parametrize(("dtype", "width", "outputs", "path"), PATHS)
def test_any_layout_will_do(dtype, width, outputs, path):
    """Transposed rows and a broadcast gradient, like that of a plain sum, work by both versions."""
    for num_rows in (0, 1, 6):
        sizes = [num_rows, 0, num_rows // 2]
        x_TD, weight_GDE, group_T = inputs(sizes, dtype, width, outputs)
        turned_TD = x_TD.detach().t().contiguous().t().requires_grad_()
        y_TE = grouped_linear(turned_TD, weight_GDE, group_T)
        gradients = torch.autograd.grad(y_TE.sum(), (turned_TD, weight_GDE))
        want = by_hand(x_TD, weight_GDE, group_T, torch.ones(sum(sizes), outputs))
        compare((y_TE, *gradients), want, 1e-5, 1e-5)


def test_gradcheck():
    """The gradients agree with finite differences in float64."""
    x_TD, weight_GDE, group_T = inputs([2, 0, 3, 1], torch.float64, 3, 2)
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, group_T), (x_TD, weight_GDE))


def test_one_group_is_a_plain_product():
    """With one group it is x W, and without gradients it keeps none."""
    x_TD, weight_GDE, group_T = inputs([9], torch.float32, 8, 4)
    torch.testing.assert_close(grouped_linear(x_TD, weight_GDE, group_T), x_TD @ weight_GDE[0])
    with torch.no_grad():
        assert not grouped_linear(x_TD, weight_GDE, group_T).requires_grad


@pytest.mark.parametrize(("dtype", "width", "outputs", "path"), PATHS)
def test_repeats_bit_for_bit(dtype, width, outputs, path):
    """Two calls give the same bits, forward and backward, with deterministic algorithms asked for."""
    x_TD, weight_GDE, group_T = inputs([40, 1, 0, 30], dtype, width, outputs)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            y_TE = grouped_linear(x_TD, weight_GDE, group_T)
            runs.append((y_TE, *torch.autograd.grad(y_TE.square().sum(), (x_TD, weight_GDE))))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
