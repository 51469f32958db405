"""The LSTM with bfloat16 products, to compare with PyTorch's in float64.

Shape suffixes: L timesteps, B sentences, D inputs, U units.
"""

import torch
from torch import Tensor

from moe_lm.ops.lstm_mixed import lstm_mixed


def ours_and_theirs(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cpu"
) -> list[tuple[Tensor, Tensor]]:
    """Return outputs and all gradients in pairs; weights, inputs and output gradients are exact in `dtype`.

    Sizes are timesteps, sentences, inputs, units.
    """
    num_steps, num_sentences, num_inputs, num_units = sizes
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(num_inputs, num_units).double()
    for weight in lstm.parameters():
        weight.data = weight.data.to(dtype).double()
    x_LBD = torch.randn(num_steps, num_sentences, num_inputs).to(dtype)
    grad_LBU = torch.randn(num_steps, num_sentences, num_units).to(dtype)
    theirs = x_LBD.double().requires_grad_()
    want_LBU, _ = lstm(theirs)
    want_LBU.backward(grad_LBU.double())
    ours = x_LBD.float().to(device).requires_grad_()
    weights = [weight.detach().float().to(device).requires_grad_() for weight in lstm.parameters()]
    got_LBU = lstm_mixed(ours, *weights, dtype)
    assert got_LBU.dtype == dtype
    got_LBU.backward(grad_LBU.to(device))
    gradients = [(mine.grad, weight.grad) for mine, weight in zip(weights, lstm.parameters(), strict=True)]
    pairs = [(got_LBU, want_LBU), (ours.grad, theirs.grad), *gradients]
    return [(got.detach().cpu().double(), want.detach()) for got, want in pairs]
