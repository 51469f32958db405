"""Fixtures of the operations' tests."""

import os

import pytest
import torch

from moe_lm.ops import operation


@pytest.fixture
def triton_on_cpu(monkeypatch):
    """Triton's interpreter runs every operation that has a kernel."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("tests/gpu runs the kernels themselves")
    monkeypatch.setattr(operation, "triton_devices", ("cpu",))


@pytest.fixture
def nan_memory():
    """Fresh memory is NaN everywhere, so that a place that nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
