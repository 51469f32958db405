"""Distinct ids by a table or by a sort: the same values and indices."""

import pytest
import torch

from moe_lm.ops import sparse_rows as unique
from moe_lm.ops.sparse_rows import unique_inverse

IDS = [[], [0], [5, 5, 5], [7, 0, 3, 7, 1, 0], list(range(40, 0, -3)), [10**6, 2]]


@pytest.mark.parametrize("ratio", [0, 8, 10**9], ids=["sort", "default", "table"])
def test_ascending_values_and_the_index_of_each_id(ratio, monkeypatch):
    """As Python's own sets give them."""
    monkeypatch.setattr(unique, "_MAX_TABLE_RATIO", ratio)
    for ids in IDS:
        value_U, index_T = unique_inverse(torch.tensor(ids, dtype=torch.int64))
        assert value_U.tolist() == sorted(set(ids))
        assert index_T.tolist() == [sorted(set(ids)).index(number) for number in ids]
        assert value_U.dtype == index_T.dtype == torch.int64


def test_the_table_has_at_most_eight_entries_per_id(monkeypatch):
    """A table for a few of very many ids would take gigabytes."""
    monkeypatch.setattr(torch.Tensor, "unique", None)
    assert unique_inverse(torch.tensor([23, 1, 23]))[0].tolist() == [1, 23]
    with pytest.raises(TypeError):
        unique_inverse(torch.tensor([24, 1, 24]))


def test_the_default_device_does_not_matter():
    """Ids on the CPU stay there."""
    with torch.device("meta"):
        id_T = torch.tensor([3, 1, 3], device="cpu")
        assert [x.tolist() for x in unique_inverse(id_T)] == [[1, 3], [1, 0, 1]]
