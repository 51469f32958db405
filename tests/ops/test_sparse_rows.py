"""Rows taken from a large matrix: values and gradients are those of indexing the whole of it."""

import pytest
import torch
from torch import nn

from moe_lm.ops.sparse_rows import UniqueIndices, clear_row_grads, collect_row_grads, row_grad, take_rows


def dense_gradient(shape, rows, weights):
    """The gradient of sum(weight * row) number by number."""
    total = torch.zeros(shape, dtype=torch.float64)
    for row, weight in zip(rows, weights, strict=True):
        total[row] += weight
    return total


@pytest.mark.parametrize("shape", [(7, 3), (7,)], ids=["matrix", "vector"])
def test_row_gradients_are_the_rows_of_the_whole_gradient(shape):
    """Repeated rows are summed, rows come once and ascending, and the matrix itself gets no gradient."""
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    collect_row_grads(matrix)
    parts = [torch.tensor([5, 0, 5, 2]), torch.tensor([2, 6])]
    weights = [torch.randn(len(part), *shape[1:], dtype=torch.float64) for part in parts]
    for part, weight in zip(parts, weights, strict=True):
        taken = take_rows(matrix, part)
        assert torch.equal(taken, matrix.detach()[part])
        (taken * weight).sum().backward()
    assert matrix.grad is None
    row_U, value_UD, _ = row_grad(matrix)
    assert row_U.tolist() == [0, 2, 5, 6]
    expected = dense_gradient(shape, torch.cat(parts).tolist(), torch.cat(weights))
    torch.testing.assert_close(value_UD, expected[row_U])
    clear_row_grads(matrix)
    assert row_grad(matrix) is None


def test_matrices_of_which_the_same_rows_are_taken_have_gradients_of_their_own():
    """A matrix and a vector share what rows are distinct, found once."""
    torch.manual_seed(0)
    matrix, vector = (nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((7, 3), (7,)))
    unique_inverse, weights = UniqueIndices(torch.tensor([5, 0, 5, 2])), []
    for parameter in (matrix, vector):
        collect_row_grads(parameter)
        weights.append(torch.randn(4, *parameter.shape[1:], dtype=torch.float64))
        (take_rows(parameter, unique_inverse) * weights[-1]).sum().backward()
    for parameter, weight in zip((matrix, vector), weights, strict=True):
        row_U, value_UD, _ = row_grad(parameter)
        assert row_U.tolist() == [0, 2, 5]
        torch.testing.assert_close(value_UD, dense_gradient(parameter.shape, [5, 0, 5, 2], weight)[row_U])
    assert row_grad(matrix).row_U is row_grad(vector).row_U


def test_without_lazy_rows_the_gradient_is_an_ordinary_one():
    """A matrix nobody marked gets `.grad`; under no_grad nothing is kept."""
    plain, marked = (nn.Parameter(torch.ones(4, 2)) for _ in range(2))
    collect_row_grads(marked)
    take_rows(plain, torch.tensor([1, 1])).sum().backward()
    assert plain.grad.tolist() == [[0, 0], [2, 2], [0, 0], [0, 0]]
    assert row_grad(plain) is None
    with torch.no_grad():
        assert not take_rows(marked, torch.tensor([1])).requires_grad
    assert row_grad(marked) is None


def test_nothing_of_the_matrix_size_is_made():
    """Forward and backward of a few rows make no tensor anywhere near the size of the matrix."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    matrix = nn.Parameter(torch.ones(10_000, 8))
    collect_row_grads(matrix)
    with Watch():
        loss = take_rows(matrix, torch.arange(50)).square().sum()
        loss.backward()
    assert row_grad(matrix).value_UD.shape == (50, 8)
    assert largest <= 50 * 8


def test_many_micro_batches_take_no_more_than_twice_the_rows():
    """Words sampled for all micro-batches are not stored again for each; the sum stays that of the whole."""
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.zeros(5000, 2, dtype=torch.float64))
    collect_row_grads(matrix)
    shared, expected, touched = torch.arange(300), torch.zeros(5000, 2, dtype=torch.float64), set(range(300))
    for _ in range(60):
        own = torch.randint(300, 5000, (20,))
        rows = torch.cat([shared, own])
        weight = torch.randn(len(rows), 2, dtype=torch.float64)
        (take_rows(matrix, rows) * weight).sum().backward()
        expected.index_add_(0, rows, weight)
        touched |= set(own.tolist())
        assert sum(len(part.row_U) for part in matrix.row_grads) <= 2 * len(touched)
    row_U, value_UD, _ = row_grad(matrix)
    assert row_U.tolist() == sorted(touched)
    torch.testing.assert_close(value_UD, expected[row_U])
