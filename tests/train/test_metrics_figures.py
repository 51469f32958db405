"""The figures of the training log: balance as in Table 6, and sums between two lines."""

import math

import pytest
import torch

from moe_lm.gate import Gating
from moe_lm.train.metrics import Interval, balance_figures

NONE_A = torch.zeros(0, dtype=torch.int64)


def part(importance, load):
    sums = {"importance_E": torch.tensor(importance).double(), "load_E": torch.tensor(load).double()}
    return Gating(token_A=NONE_A, expert_A=NONE_A, gate_A=NONE_A.float(), num_tokens=0, num_requested=0, **sums)


def test_figures_of_one_layer_by_hand():
    """CV is the population deviation over the mean, and the peak is the largest load over the mean load."""
    figures = balance_figures([part([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 8.0])])
    assert figures["cv_importance"].item() == pytest.approx(math.sqrt(1.25) / 2.5)
    assert figures["cv_load"].item() == pytest.approx(math.sqrt(3))
    assert figures["max_over_mean_load"].item() == pytest.approx(4)


def test_figures_of_table_6_without_losses():
    """Of 256 experts, one with 17.80 times the mean load, as Table 6 prints for weights of 0, is seen as such."""
    load = [17.80] + [(256 - 17.80) / 255] * 255
    figures = balance_figures([part([1.0] * 256, load)])
    assert figures["max_over_mean_load"].item() == pytest.approx(17.80)
    # Of one expert above all others, CV = (peak - 1) / sqrt(n - 1).
    assert figures["cv_load"].item() == pytest.approx(16.80 / math.sqrt(255))
    assert figures["cv_importance"].item() == pytest.approx(0, abs=1e-9)


def test_two_layers_are_averaged():
    """Each figure is the mean over the gated layers."""
    even, uneven = part([1.0, 1.0], [2.0, 2.0]), part([0.0, 6.0], [1.0, 3.0])
    figures = {name: x.item() for name, x in balance_figures([even, uneven]).items()}
    assert figures == pytest.approx({"cv_importance": 0.5, "cv_load": 0.25, "max_over_mean_load": 1.25})


def test_a_model_without_gates_has_no_balance_figures():
    """A dense stack logs none."""
    assert balance_figures([]) == {}


def test_what_a_stored_interval_lacks_has_no_mean_in_it():
    """An earlier version's checkpoint had fewer figures: a sum over the later steps alone would be told as of all."""
    stored = Interval({"steps": 2.0, "nats": 3.0})
    stored.add(steps=1, nats=1.0, new=5.0)
    stored.add(seconds=1.0)
    assert stored.sums() == {"steps": 3.0, "nats": 4.0, "seconds": 1.0}
    fresh = Interval({"skipped": 1.0})
    fresh.add(steps=1, nats=1.0, new=5.0)
    fresh.add(steps=1, nats=1.0, new=5.0)
    assert fresh.sums() == {"skipped": 1.0, "steps": 2.0, "nats": 2.0, "new": 10.0}


def test_an_interval_sums_numbers_and_tensors_in_float64():
    """Figures add up by name, from stored sums on, without losing small steps to float32."""
    interval = Interval({"words": 5.0})
    for _ in range(3):
        interval.add(words=2, nats=torch.tensor(2.0**24, dtype=torch.float32))
    interval.add(nats=torch.tensor(1.0, requires_grad=True))
    assert interval.sums() == {"words": 11.0, "nats": 3 * 2.0**24 + 1}
    assert all(type(value) is float for value in interval.sums().values())


def test_an_interval_of_an_earlier_version_goes_on_under_todays_names():
    """A checkpoint of commit 5ce4160 has sums of `dropped` and `unserved`."""
    stored = Interval({"steps": 1.0, "dropped": 0.5, "unserved": 0.25})
    stored.add(steps=1, dropped_fraction=0.25, unrouted_fraction=0.25)
    assert stored.sums() == {"steps": 2.0, "dropped_fraction": 0.75, "unrouted_fraction": 0.5}
