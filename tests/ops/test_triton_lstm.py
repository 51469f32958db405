"""The GPU's LSTM, its kernels run by Triton's interpreter on the CPU, against torch's LSTM in float64.

Shape suffixes: L timesteps, B sentences, D inputs, U units.
"""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("tests/gpu runs the kernels themselves", allow_module_level=True)

from lstm_of_torch import ours_and_theirs

from moe_lm.ops.lstm import mixed_lstm


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("sizes", [(3, 4, 8, 8), (1, 3, 5, 7), (7, 2, 16, 600), (5, 1, 3, 3)], ids=str)
def test_is_torchs_lstm(sizes, dtype, tolerance):
    """Outputs and all gradients."""
    for got, want in ours_and_theirs(sizes, dtype):
        assert (got - want).norm() <= tolerance * want.norm()


def test_small_inputs_keep_their_digits():
    """Cells of 1e-6 and below: to float32's precision of what they are, not of 1."""
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(4, 4).double()
    for name, weight in lstm.named_parameters():
        weight.data.mul_(0 if "bias" in name else 1)
    x_LBD = 1e-6 * torch.randn(3, 2, 4, dtype=torch.float64)
    want_LBU, _ = lstm(x_LBD)
    got_LBU = mixed_lstm(x_LBD.float(), *(weight.detach().float() for weight in lstm.parameters()), torch.float32)
    assert (got_LBU.double() - want_LBU).norm() <= 1e-5 * want_LBU.norm()
