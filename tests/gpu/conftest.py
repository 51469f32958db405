"""What the tests on a GPU have in common: the device, and noise that is the CPU's."""

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Every test of this folder needs a GPU."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.fixture
def gpu() -> torch.device:
    """The first GPU."""
    return torch.device("cuda")


@pytest.fixture
def same_noise(monkeypatch):
    """Draw noise on the CPU whatever the device, so that it is the same on each."""

    for name in ("randn", "rand"):
        draw = getattr(torch, name)
        drawn = lambda x, draw=draw: draw(x.shape, dtype=x.dtype).to(x.device)  # noqa: E731
        monkeypatch.setattr(torch, f"{name}_like", drawn)
