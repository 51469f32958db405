"""The balance losses, worked by hand.

Shape suffixes: E experts.
"""

import math

import pytest
import torch

from moe_lm.gate import Gating
from moe_lm.loss.objective import Importance, Load, squared_coefficient_of_variation


def gating_of(importance, load):
    empty = torch.zeros(0, dtype=torch.int64)
    return Gating(
        token_A=empty,
        expert_A=empty,
        gate_A=torch.zeros(0),
        num_tokens=0,
        importance_E=torch.tensor(importance, dtype=torch.float64),
        load_E=torch.tensor(load, dtype=torch.float64),
        num_requested=0,
    )


@pytest.mark.parametrize(
    ("values", "squared"),
    [
        ([1, 2, 3, 4], 1.25 / 6.25),  # mean 2.5, population variance 5/4
        ([0, 0, 0, 8], 12 / 4),  # everything to one of n experts: n - 1
        ([0, 6], 1.0),
        ([5, 5, 5], 0.0),
        ([7], 0.0),
        ([0, 0, 0], 0.0),  # a batch without tokens
    ],
    ids=str,
)
def test_squared_variation_by_hand(values, squared):
    """CV^2 is the population variance over the squared mean, for both losses from their own statistic."""
    assert squared_coefficient_of_variation(torch.tensor(values).double()).item() == pytest.approx(squared, rel=1e-9)
    ones = [1.0] * len(values)
    assert Importance(weight=0.1)(gating_of(values, ones)).item() == pytest.approx(squared, rel=1e-9)
    assert Load(weight=0.1)(gating_of(ones, values)).item() == pytest.approx(squared, rel=1e-9)
    assert Importance(weight=0.1)(gating_of(ones, values)).item() == 0
    assert Load(weight=0.1)(gating_of(values, ones)).item() == 0


def test_variation_does_not_depend_on_the_number_of_tokens():
    """Ten times the tokens give the same loss."""
    x_E = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0]).double()
    few, many = squared_coefficient_of_variation(x_E), squared_coefficient_of_variation(10 * x_E)
    assert few.item() == pytest.approx(many.item(), rel=1e-9)


def test_gradient_by_hand():
    """For (1, 3): CV^2 = ((a-b)/(a+b))^2, whose gradient is 4(a-b)/(a+b)^3 (b, -a) = (-3/8, 1/8)."""
    x_E = torch.tensor([1.0, 3.0]).double().requires_grad_()
    squared_coefficient_of_variation(x_E).backward()
    assert x_E.grad.tolist() == pytest.approx([-3 / 8, 1 / 8], rel=1e-8)


def test_an_empty_batch_has_no_gradient_of_nan():
    """Statistics of 0 everywhere give gradients of 0."""
    x_E = torch.zeros(4).requires_grad_()
    squared_coefficient_of_variation(x_E).backward()
    assert x_E.grad.tolist() == [0.0] * 4


@pytest.mark.parametrize("weight", [-0.1, math.inf, math.nan])
def test_an_impossible_weight_is_refused(weight):
    with pytest.raises(ValueError, match="must be finite and at least 0"):
        Load(weight=weight)


def test_weight_is_kept_and_not_applied():
    """The loss is unweighted; the objective multiplies."""
    assert Importance(weight=0.3).weight == 0.3
    assert Load(weight=0.3)(gating_of([1, 1], [0, 6])).item() == pytest.approx(1)
