"""LazyAdam against PyTorch's Adam over whole matrices."""

import copy

import pytest
import torch
from torch import nn

from moe_lm.ops.sparse_rows import row_grad, take_rows
from moe_lm.optim.lazy_adam import LazyAdam

SETTINGS = {"lr": 0.01, "beta2": 0.9, "epsilon": 1e-6}


def pair(shape=(12, 3)):
    """Return a matrix with LazyAdam, and its copy with PyTorch's Adam without first moment."""
    torch.manual_seed(0)
    lazy = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    whole = nn.Parameter(lazy.detach().clone())
    adam = torch.optim.Adam([whole], lr=SETTINGS["lr"], betas=(0.0, SETTINGS["beta2"]), eps=SETTINGS["epsilon"])
    return lazy, LazyAdam([lazy], **SETTINGS), whole, adam


def backward(matrix, row_T, weight):
    (take_rows(matrix, row_T) * weight).sum().backward()


@pytest.mark.parametrize("shape", [(12, 3), (12,)], ids=["matrix", "vector"])
def test_lazy_rows_equal_adam_without_first_moment(shape):
    """Forty steps that touch few rows each agree, with long gaps, repeated rows and empty steps."""
    lazy, lazy_adam, whole, adam = pair(shape)
    draw = torch.Generator().manual_seed(1)
    for step in range(40):
        rows = torch.randint(0, 3 if step < 30 else 12, (step % 4,), generator=draw)
        weight = torch.randn(len(rows), *shape[1:], generator=draw, dtype=torch.float64)
        for group in (*lazy_adam.param_groups, *adam.param_groups):
            group["lr"] = 0.01 * (1 + step % 3)
        whole.grad = torch.zeros_like(whole)
        if len(rows):
            backward(lazy, rows, weight)
            backward(whole, rows, weight)
        lazy_adam.step()
        adam.step()
        lazy_adam.zero_grad()
        assert row_grad(lazy) is None
        # PyTorch corrects the bias by float32 steps; LazyAdam agrees to rounding.
        torch.testing.assert_close(lazy, whole, rtol=1e-9, atol=1e-12)


def test_dense_gradients_count_too():
    """A dense gradient, like a full softmax's, and a sparse one are added."""
    lazy, lazy_adam, whole, adam = pair()
    for _ in range(3):
        backward(lazy, torch.tensor([1, 4]), 2.0)
        for matrix in (lazy, whole):
            matrix.grad = torch.arange(36, dtype=torch.float64).view(12, 3)
        whole.grad[[1, 4]] += 2.0
        lazy_adam.step()
        adam.step()
        lazy_adam.zero_grad()
        torch.testing.assert_close(lazy, whole, rtol=1e-9, atol=1e-12)
    assert lazy.grad is None


def test_untouched_rows_stay_bit_for_bit():
    """Neither values nor second moments of rows without gradient change."""
    lazy, lazy_adam, _, _ = pair()
    before = lazy.detach().clone()
    for _ in range(5):
        backward(lazy, torch.tensor([3]), 1.0)
        lazy_adam.step()
        lazy_adam.zero_grad()
    others = [row for row in range(12) if row != 3]
    assert torch.equal(lazy.detach()[others], before[others])
    assert not lazy_adam.state[lazy]["second_moment"][others].any()
    assert (lazy.detach()[3] < before[3]).all()


def test_state_survives_a_round_trip():
    """With restored state the next step is the same bit for bit, in float32."""
    torch.manual_seed(0)
    first = nn.Parameter(torch.randn(6, 2))
    optimizer = LazyAdam([first], **SETTINGS)
    for row in (0, 3, 3):
        backward(first, torch.tensor([row]), 1.5)
        optimizer.step()
        optimizer.zero_grad()
    second = nn.Parameter(first.detach().clone())
    other = LazyAdam([second], **SETTINGS)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for matrix, its in ((first, optimizer), (second, other)):
        backward(matrix, torch.tensor([0, 5]), 0.5)
        its.step()
    assert torch.equal(first, second)
