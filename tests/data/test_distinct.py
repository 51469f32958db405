"""Distinct numbers by a table or by a sort: the same ones, in the same places."""

import pytest
import torch

from moe_lm.data import unique as module
from moe_lm.data.unique import unique_inverse


@pytest.mark.parametrize("most", [0, 8, 10**9], ids=["sorted", "as it is", "in a table"])
@pytest.mark.parametrize("x", [[], [0], [5, 5, 5], [7, 0, 3, 7, 1, 0], list(range(40, 0, -3)), [10**6, 2]], ids=str)
def test_ascending_and_each_ones_place(x, most, monkeypatch):
    """As Python's own sets tell."""
    monkeypatch.setattr(module, "_MOST_OF_TABLE", most)
    found, place = unique_inverse(torch.tensor(x, dtype=torch.int64))
    assert found.tolist() == sorted(set(x))
    assert place.tolist() == [sorted(set(x)).index(number) for number in x]
    assert found.dtype == place.dtype == torch.int64


def test_a_table_of_at_most_eight_times_as_many(monkeypatch):
    """Of a few among very many there is none: it would take gigabytes."""
    monkeypatch.setattr(torch.Tensor, "unique", None)
    assert unique_inverse(torch.tensor([23, 1, 23]))[0].tolist() == [1, 23]
    with pytest.raises(TypeError):
        unique_inverse(torch.tensor([24, 1, 24]))


def test_whatever_the_default_device():
    """Numbers in the host's memory stay there."""
    with torch.device("meta"):
        x_T = torch.tensor([3, 1, 3], device="cpu")
        assert [x.tolist() for x in unique_inverse(x_T)] == [[1, 3], [1, 0, 1]]
