"""What the tests on a GPU have in common: the device, and a training's objects on it."""

from pathlib import Path

import pytest
import torch
from tiny_training import TRAINING, with_overrides

from moe_lm.commands import build as make
from moe_lm.commands.configuration import composed, resolved
from moe_lm.commands.data import prepared_data
from moe_lm.commands.training import trainer_of
from moe_lm.run import Run
from moe_lm.trainer import Trainer

WIDTH = ["model.width=16", "model.expert_hidden=32", "model.num_experts=8"]


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
def trainer(workspace):
    """Make a trainer of the tiny training, on a device and with a precision."""

    def made(on: torch.device, *overrides: str, precision: str = "float32") -> Trainer:
        machine = [f"machine.device={on.type}", f"machine.precision={precision}"]
        arguments = with_overrides(TRAINING, *WIDTH, "model.dropout=0", *overrides, *machine, f"name={on.type}")
        unread = "softmax.num_sampled" if "softmax=full" in arguments else None
        config = resolved(composed("train", [a for a in arguments if a.partition("=")[0] != unread]))
        run = Run(Path("runs") / on.type)
        run.folder.mkdir(parents=True, exist_ok=True)
        data = prepared_data(config, say=lambda line: None)
        make.be_deterministic(on)
        found, _ = trainer_of(config, data, run, on, lambda line: None)
        generator = torch.Generator().manual_seed(7)
        for name, parameter in found.model.named_parameters():
            if name.endswith(("gate_DE", "noise_DE")):  # at zero all logits would tie
                parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        return found

    return made


@pytest.fixture
def same_noise(monkeypatch):
    """Draw noise on the CPU whatever the device, so that it is the same on each."""

    for name in ("randn", "rand"):
        draw = getattr(torch, name)
        drawn = lambda x, draw=draw: draw(x.shape, dtype=x.dtype).to(x.device)  # noqa: E731
        monkeypatch.setattr(torch, f"{name}_like", drawn)
