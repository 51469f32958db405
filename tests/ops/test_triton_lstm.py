"""The mixed-precision LSTM, its kernels run by Triton's interpreter on the CPU, against PyTorch's LSTM in float64.

Shape suffixes: L timesteps, B sentences, D inputs, U units.
"""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("tests/gpu runs the kernels themselves", allow_module_level=True)

from lstm_cases import ours_and_theirs

from moe_lm.model.lstm import lstm
from moe_lm.ops import lstm_mixed as module
from moe_lm.ops import operation
from moe_lm.ops.lstm_mixed import lstm_mixed


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("sizes", [(3, 4, 8, 8), (1, 3, 5, 7), (7, 2, 16, 600), (5, 1, 3, 3)], ids=str)
def test_is_torchs_lstm(sizes, dtype, tolerance):
    """Outputs and all gradients agree."""
    for got, want in ours_and_theirs(sizes, dtype):
        assert (got - want).norm() <= tolerance * want.norm()


def test_small_inputs_keep_their_digits():
    """Cells of 1e-6 and below keep float32's relative precision."""
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(4, 4).double()
    for name, weight in lstm.named_parameters():
        weight.data.mul_(0 if "bias" in name else 1)
    x_LBD = 1e-6 * torch.randn(3, 2, 4, dtype=torch.float64)
    want_LBU, _ = lstm(x_LBD)
    got_LBU = lstm_mixed(x_LBD.float(), *(weight.detach().float() for weight in lstm.parameters()), torch.float32)
    assert (got_LBU.double() - want_LBU).norm() <= 1e-5 * want_LBU.norm()


@pytest.mark.parametrize("mixed", [False, True])
def test_many_sentences_under_autocast_run_by_the_kernels(monkeypatch, mixed):
    """From some sentences on, under autocast alone; outputs and gradients have the weights' type either way."""
    monkeypatch.setattr(module, "triton_runs", lambda _: True)
    monkeypatch.setattr(operation, "triton_devices", ("cpu",))
    monkeypatch.setattr(module, "_MIN_SENTENCES_MIXED", 4)
    used, real = [], module.lstm_mixed
    monkeypatch.setattr(module, "lstm_mixed", lambda *arguments: [used.append(True), real(*arguments)][1])
    torch.manual_seed(0)
    theirs, x_LBD = torch.nn.LSTM(3, 5), torch.randn(6, 4 if mixed else 3, 3)
    weights = [weight.detach().clone().requires_grad_() for weight in theirs.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        y_LBU = lstm(x_LBD, *weights, training=True)
    assert bool(used) == mixed
    want_LBU, _ = theirs(x_LBD)
    y_LBU.square().sum().backward()
    want_LBU.square().sum().backward()
    gradients = [(ours.grad, weight.grad) for ours, weight in zip(weights, theirs.parameters(), strict=True)]
    for got, want in [(y_LBU, want_LBU), *gradients]:
        assert got.dtype == torch.float32
        assert (got - want).norm() <= (0.03 if mixed else 1e-6) * want.norm()
    lstm(x_LBD, *weights, training=True)
    assert len(used) == mixed
