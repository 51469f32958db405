"""The LSTM layer (Hochreiter & Schmidhuber 1997), plain and projected; every sentence starts from a zero state.

Shape suffixes: L timesteps, B sentences, T tokens, D width, U units, G = 4*U gates.
"""

import math

import torch
from torch import Tensor, nn

from moe_lm.data.sentences import Sentences
from moe_lm.errors import UserError
from moe_lm.ops.backend import by_triton
from moe_lm.ops.lstm import mixed_lstm

_WORTH_OWN = 3072
"""Sentences from which on the GPU has more to do in a timestep than the host; cuDNN hands over faster."""


class Lstm(nn.Module):
    """`width` LSTM units over `width` inputs; torch's own, so cuDNN and oneDNN apply.

    On a GPU under autocast many sentences side by side go through `mixed_lstm`.
    """

    def __init__(self, *, width: int):
        super().__init__()
        if width < 1:
            raise UserError(f"model.width={width}: must be at least 1")
        self.lstm = nn.LSTM(width, width)
        _forget_little_(self.lstm.bias_ih_l0, self.lstm.bias_hh_l0)

    def forward(self, x_TD: Tensor, sentences: Sentences) -> tuple[Tensor, None]:
        """Run over all sentences side by side; padding exists only inside this call."""
        mixed = sentences.num_sentences >= _WORTH_OWN and torch.is_autocast_enabled(x_TD.device.type)
        if not (mixed and by_triton(x_TD)):
            return _recurred(self.lstm, x_TD, sentences), None
        dtype, lstm = torch.get_autocast_dtype(x_TD.device.type), self.lstm
        weights = lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0, lstm.bias_hh_l0
        y_LBD = mixed_lstm(sentences.pad(x_TD.to(dtype)), *weights, dtype)
        return sentences.unpad(y_LBD).to(x_TD.dtype), None

    def operations_per_timestep(self) -> int:
        """4 gates of units * (inputs + recurrent inputs)."""
        return self.lstm.weight_ih_l0.numel() + self.lstm.weight_hh_l0.numel()


class ProjectedLstm(nn.Module):
    """`units` LSTM units whose output, projected to `width`, is what recurs and leaves (Sak et al. 2014).

    With inputs x_t and cells' outputs h_t the layer gives r_t = P h_t, and the gates read W_ih x_t + W_hh r_{t-1}.
    """

    def __init__(self, *, width: int, units: int):
        super().__init__()
        if min(width, units) < 1:
            raise UserError(f"model.width={width} model.lstm_units={units} must be at least 1")
        # torch projects to fewer numbers than there are units, never to as many or more.
        self.lstm = _NarrowProjection(width, units) if width < units else _WideProjection(width, units)
        _forget_little_(self.lstm.bias_ih_l0, self.lstm.bias_hh_l0)

    def forward(self, x_TD: Tensor, sentences: Sentences) -> tuple[Tensor, None]:
        """Run over all sentences side by side; padding exists only inside this call."""
        return _recurred(self.lstm, x_TD, sentences), None

    def operations_per_timestep(self) -> int:
        """4 gates of units * (inputs + recurrent inputs), and the projection."""
        matrices = (self.lstm.weight_ih_l0, self.lstm.weight_hh_l0, self.lstm.weight_hr_l0)
        return sum(matrix.numel() for matrix in matrices)


class _NarrowProjection(nn.LSTM):
    """torch's own projection; oneDNN knows none, and torch would warn that it falls back."""

    def __init__(self, width: int, units: int):
        super().__init__(width, units, proj_size=width)

    def forward(self, x_LBD: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
            return super().forward(x_LBD)


class _WideProjection(nn.Module):
    """A projection to at least as many numbers as there are units, by parameters of torch's names and shapes.

    As W_hh r_{t-1} = (W_hh P) h_{t-1}, it is an LSTM without projection whose recurrent matrix is W_hh P, and one
    product with P for all timesteps: no more operations a step than W_hh itself costs.
    """

    def __init__(self, width: int, units: int):
        super().__init__()
        self.units = units
        self.weight_ih_l0 = nn.Parameter(torch.empty(4 * units, width))
        self.weight_hh_l0 = nn.Parameter(torch.empty(4 * units, width))
        self.bias_ih_l0 = nn.Parameter(torch.empty(4 * units))
        self.bias_hh_l0 = nn.Parameter(torch.empty(4 * units))
        self.weight_hr_l0 = nn.Parameter(torch.empty(width, units))
        for weight in (self.weight_ih_l0, self.weight_hh_l0, self.weight_hr_l0):
            nn.init.uniform_(weight, -1 / math.sqrt(units), 1 / math.sqrt(units))

    def forward(self, x_LBD: Tensor) -> tuple[Tensor, None]:
        recurrent_GU = self.weight_hh_l0 @ self.weight_hr_l0
        start_1BU = x_LBD.new_zeros(1, x_LBD.shape[1], self.units)
        weights = (self.weight_ih_l0, recurrent_GU, self.bias_ih_l0, self.bias_hh_l0)
        # Biases, one layer, no dropout inside, one direction, timesteps first.
        h_LBU, *_ = torch.lstm(x_LBD, (start_1BU, start_1BU), weights, True, 1, 0.0, self.training, False, False)
        return h_LBU @ self.weight_hr_l0.t(), None


def _recurred(lstm: nn.Module, x_TD: Tensor, sentences: Sentences) -> Tensor:
    """Run in the weights' own type whatever the autocast type.

    Under autocast cuDNN would take float16, also where bfloat16 is asked for, and lose the small gradients of a mean
    over hundreds of thousands of words.
    """
    with torch.autocast(x_TD.device.type, enabled=False):
        y_LBD, _ = lstm(sentences.pad(x_TD.to(lstm.weight_ih_l0.dtype)))
        return sentences.unpad(y_LBD)


@torch.no_grad()
def _forget_little_(bias_ih_G: Tensor, bias_hh_G: Tensor) -> None:
    """Set the forget bias to 1 (Jozefowicz et al. 2016), others to 0; torch adds two vectors, so one stays 0."""
    for bias in (bias_ih_G, bias_hh_G):
        bias.zero_()
    units = len(bias_ih_G) // 4
    bias_ih_G[units : 2 * units] = 1.0
