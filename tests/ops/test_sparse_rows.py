"""Rows taken from a large matrix: values and gradients are those of indexing the whole matrix."""

import copy
import io

import pytest
import torch
from torch import nn

from moe_lm.ops.sparse_rows import (
    RowSparseModule,
    RowSparseParameter,
    UniqueIndices,
    clear_row_grads,
    collect_row_grads,
    row_grad,
    take_rows,
)


def dense_gradient(shape, rows, weights):
    """Return the gradient of sum(weight * row), number by number."""
    total = torch.zeros(shape, dtype=torch.float64)
    for row, weight in zip(rows, weights, strict=True):
        total[row] += weight
    return total


@pytest.mark.parametrize("shape", [(7, 3), (7,)], ids=["matrix", "vector"])
def test_row_gradients_are_the_rows_of_the_whole_gradient(shape):
    """Repeated rows are summed, rows come once and ascending, and the matrix itself gets no gradient."""
    torch.manual_seed(0)
    matrix = RowSparseParameter(torch.randn(shape, dtype=torch.float64), sparse_grad=True)
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


def test_matrices_share_unique_indices_and_have_gradients_of_their_own():
    """A matrix and a vector share the unique rows, found once."""
    torch.manual_seed(0)
    matrix, vector = (nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((7, 3), (7,)))
    rows, weights = UniqueIndices(torch.tensor([5, 0, 5, 2])), []
    for parameter in (matrix, vector):
        collect_row_grads(parameter)
        weights.append(torch.randn(4, *parameter.shape[1:], dtype=torch.float64))
        (take_rows(parameter, rows) * weights[-1]).sum().backward()
    for parameter, weight in zip((matrix, vector), weights, strict=True):
        row_U, value_UD, _ = row_grad(parameter)
        assert row_U.tolist() == [0, 2, 5]
        torch.testing.assert_close(value_UD, dense_gradient(parameter.shape, [5, 0, 5, 2], weight)[row_U])
    assert row_grad(matrix).row_U is row_grad(vector).row_U


def test_without_sparse_grad_the_gradient_is_dense():
    """Plain parameters and row-sparse ones without the flag get `.grad`; under no_grad nothing is kept."""
    for dense in (nn.Parameter(torch.ones(4, 2)), RowSparseParameter(torch.ones(4, 2))):
        take_rows(dense, torch.tensor([1, 1])).sum().backward()
        assert dense.grad.tolist() == [[0, 0], [2, 2], [0, 0], [0, 0]]
        assert row_grad(dense) is None
    sparse = RowSparseParameter(torch.ones(4, 2), sparse_grad=True)
    with torch.no_grad():
        assert not take_rows(sparse, torch.tensor([1])).requires_grad
    assert row_grad(sparse) is None


def test_the_switch_turns_sparse_gradients_on():
    """A plain parameter gets them too and stays the same object."""
    for parameter in (nn.Parameter(torch.ones(4, 2)), RowSparseParameter(torch.ones(4, 2))):
        collect_row_grads(parameter)
        assert isinstance(parameter, RowSparseParameter)
        take_rows(parameter, torch.tensor([1, 1])).sum().backward()
        assert parameter.grad is None
        assert row_grad(parameter).row_U.tolist() == [1]


class Words(RowSparseModule):
    """A module with a row-sparse matrix, a frozen one and a plain bias."""

    def __init__(self):
        super().__init__()
        self.weight_VD = RowSparseParameter(torch.arange(8.0).view(4, 2), sparse_grad=True)
        self.frozen_VD = RowSparseParameter(torch.zeros(4, 2), requires_grad=False)
        self.bias_V = nn.Parameter(torch.zeros(4))


def is_row_sparse(words, weight_VD):
    """Whether all parameters have their types and flags, and the matrix these numbers."""
    assert isinstance(words.weight_VD, RowSparseParameter)
    assert (words.weight_VD.sparse_grad, words.weight_VD.requires_grad, words.weight_VD.row_grads) == (True, True, [])
    assert isinstance(words.frozen_VD, RowSparseParameter)
    assert (words.frozen_VD.sparse_grad, words.frozen_VD.requires_grad) == (False, False)
    assert type(words.bias_V) is nn.Parameter
    assert torch.equal(words.weight_VD.detach(), weight_VD)
    take_rows(words.weight_VD, torch.tensor([1])).sum().backward()
    assert row_grad(words.weight_VD).row_U.tolist() == [1]
    return True


def test_a_copy_is_row_sparse():
    """It has gradients of its own."""
    words = Words()
    take_rows(words.weight_VD, torch.tensor([3])).sum().backward()
    assert is_row_sparse(copy.deepcopy(words), words.weight_VD.detach())
    assert row_grad(words.weight_VD).row_U.tolist() == [3]


def test_a_module_that_moves_is_row_sparse():
    """To another type, and from the meta device."""
    words = nn.Sequential(Words())
    parameter = words[0].weight_VD
    assert is_row_sparse(words.to(torch.float64)[0], torch.arange(8.0).double().view(4, 2))
    assert words[0].weight_VD is parameter
    with torch.device("meta"):
        words = nn.Sequential(Words())
    words.to_empty(device="cpu")
    with torch.no_grad():
        words[0].weight_VD.fill_(3.0)
    assert is_row_sparse(words[0], torch.full((4, 2), 3.0))


def test_loading_a_state_dict_keeps_a_parameter():
    """The stored tensors are plain; the parameter stays the same object."""
    words, other = Words(), Words()
    state = {name: tensor + 1 for name, tensor in other.state_dict().items()}
    assert {type(tensor) for tensor in state.values()} == {torch.Tensor}
    parameter = words.weight_VD
    words.load_state_dict(state)
    assert words.weight_VD is parameter
    assert is_row_sparse(words, torch.arange(8.0).view(4, 2) + 1)


def test_a_stored_parameter_is_row_sparse():
    """Its gradients are not stored."""
    words, file = Words(), io.BytesIO()
    take_rows(words.weight_VD, torch.tensor([3])).sum().backward()
    torch.save(words, file)
    file.seek(0)
    assert is_row_sparse(torch.load(file, weights_only=False), words.weight_VD.detach())


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

    matrix = RowSparseParameter(torch.ones(10_000, 8), sparse_grad=True)
    with Watch():
        loss = take_rows(matrix, torch.arange(50)).square().sum()
        loss.backward()
    assert row_grad(matrix).value_UD.shape == (50, 8)
    assert largest <= 50 * 8


def test_many_micro_batches_take_no_more_than_twice_the_rows():
    """Words sampled for all micro-batches are not stored again for each; the sum stays that of the whole batch."""
    torch.manual_seed(0)
    matrix = RowSparseParameter(torch.zeros(5000, 2, dtype=torch.float64), sparse_grad=True)
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
