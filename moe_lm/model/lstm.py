"""The LSTM layer (Hochreiter & Schmidhuber 1997), plain and projected; every sentence starts from a zero state.

Shape suffixes: L timesteps, B sentences, T tokens, D width, U units, G = 4*U gates.
"""

import math

import torch
from torch import Tensor, nn

from moe_lm.data.batch import PaddedLayout
from moe_lm.model import Layer
from moe_lm.ops.operation import operation


@operation
def lstm(
    x_LBD: Tensor, weight_ih_GD: Tensor, weight_hh_GU: Tensor, bias_ih_G: Tensor, bias_hh_G: Tensor, *, training: bool
) -> Tensor:
    """Return every timestep's outputs (L, B, U) from a zero state, differentiable in the inputs and the weights.

    This is PyTorch's own LSTM, by cuDNN or oneDNN, in the weights' type whatever the autocast type: under autocast
    cuDNN would use float16 even where bfloat16 is asked for, and lose the small gradients of a mean over hundreds of
    thousands of words. cuDNN computes no gradients without `training`.
    """
    with torch.autocast(x_LBD.device.type, enabled=False):
        x_LBD = x_LBD.to(weight_ih_GD.dtype)
        zero_1BU = x_LBD.new_zeros(1, x_LBD.shape[1], weight_hh_GU.shape[1])
        weights = weight_ih_GD, weight_hh_GU, bias_ih_G, bias_hh_G
        # Biases, one layer, no dropout inside, one direction, timesteps first.
        y_LBU, *_ = torch.lstm(x_LBD, (zero_1BU, zero_1BU), weights, True, 1, 0.0, training, False, False)
    return y_LBU


lstm.register("moe_lm.ops.lstm_mixed:lstm", when="moe_lm.ops.lstm_mixed:is_faster", on_gpu=True)


class Lstm(Layer):
    """`width` LSTM units over `width` inputs; its parameters have PyTorch's names and shapes."""

    def __init__(self, *, width: int):
        super().__init__()
        if width < 1:
            raise ValueError(f"model.width={width}: must be at least 1")
        self.lstm = nn.LSTM(width, width)
        _set_forget_bias_(self.lstm)

    def reset_parameters(self) -> None:
        """Draw PyTorch's initial weights and set the biases."""
        self.lstm.reset_parameters()
        _set_forget_bias_(self.lstm)

    def forward(self, x_TD: Tensor, layout: PaddedLayout) -> tuple[Tensor, None]:
        """Run over all sentences side by side; padding exists only inside this call."""
        weights = (getattr(self.lstm, name) for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"))
        return unpad(lstm(pad(x_TD, layout), *weights, training=self.training), layout), None

    def operations_per_timestep(self) -> int:
        """Return units * (inputs + recurrent inputs) for 4 gates."""
        return self.lstm.weight_ih_l0.numel() + self.lstm.weight_hh_l0.numel()


class ProjectedLstm(Layer):
    """`units` LSTM units whose projection to `width` is both output and recurrent input (Sak et al. 2014).

    With inputs x_t and cell outputs h_t, the layer returns r_t = P h_t, and the gates read W_ih x_t + W_hh r_{t-1}.
    """

    def __init__(self, *, width: int, units: int):
        super().__init__()
        if min(width, units) < 1:
            raise ValueError(f"model.width={width} model.lstm_units={units} must be at least 1")
        # torch only supports projections to fewer numbers than there are units.
        self.lstm = _NarrowProjection(width, units) if width < units else _WideProjection(width, units)
        _set_forget_bias_(self.lstm)

    def reset_parameters(self) -> None:
        """Draw PyTorch's initial weights and set the biases."""
        self.lstm.reset_parameters()
        _set_forget_bias_(self.lstm)

    def forward(self, x_TD: Tensor, layout: PaddedLayout) -> tuple[Tensor, None]:
        """Run over all sentences side by side; padding exists only inside this call."""
        return _run(self.lstm, x_TD, layout), None

    def operations_per_timestep(self) -> int:
        """Return units * (inputs + recurrent inputs) for 4 gates, plus units * outputs for the projection."""
        matrices = (self.lstm.weight_ih_l0, self.lstm.weight_hh_l0, self.lstm.weight_hr_l0)
        return sum(matrix.numel() for matrix in matrices)


class _NarrowProjection(nn.LSTM):
    """torch's own projection; oneDNN is switched off, as it has none and torch would warn that it falls back."""

    def __init__(self, width: int, units: int):
        super().__init__(width, units, proj_size=width)

    def forward(self, x_LBD: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
            return super().forward(x_LBD)


class _WideProjection(nn.Module):
    """A projection to at least as many numbers as there are units, with parameters of torch's names and shapes.

    As W_hh r_{t-1} = (W_hh P) h_{t-1}, it is computed as an LSTM without projection whose recurrent matrix is W_hh P,
    followed by one product with P for all timesteps. A timestep costs no more operations than it does with W_hh.
    """

    def __init__(self, width: int, units: int):
        super().__init__()
        self.units = units
        self.weight_ih_l0 = nn.Parameter(torch.empty(4 * units, width))
        self.weight_hh_l0 = nn.Parameter(torch.empty(4 * units, width))
        self.bias_ih_l0 = nn.Parameter(torch.empty(4 * units))
        self.bias_hh_l0 = nn.Parameter(torch.empty(4 * units))
        self.weight_hr_l0 = nn.Parameter(torch.empty(width, units))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.units)
        for weight in (self.weight_ih_l0, self.weight_hh_l0, self.weight_hr_l0):
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, x_LBD: Tensor) -> tuple[Tensor, None]:
        recurrent_GU = self.weight_hh_l0 @ self.weight_hr_l0
        start_1BU = x_LBD.new_zeros(1, x_LBD.shape[1], self.units)
        weights = (self.weight_ih_l0, recurrent_GU, self.bias_ih_l0, self.bias_hh_l0)
        # Biases, one layer, no dropout inside, one direction, timesteps first.
        h_LBU, *_ = torch.lstm(x_LBD, (start_1BU, start_1BU), weights, True, 1, 0.0, self.training, False, False)
        return h_LBU @ self.weight_hr_l0.t(), None


def _run(lstm: nn.Module, x_TD: Tensor, layout: PaddedLayout) -> Tensor:
    """Run in the weights' own type whatever the autocast type.

    Under autocast cuDNN would use float16, even where bfloat16 is asked for, and lose the small gradients of a mean
    over hundreds of thousands of words.
    """
    with torch.autocast(x_TD.device.type, enabled=False):
        y_LBD, _ = lstm(pad(x_TD.to(lstm.weight_ih_l0.dtype), layout))
        return unpad(y_LBD, layout)


def pad(x_TD: Tensor, layout: PaddedLayout) -> Tensor:
    """Return the tokens as a padded array x_LBD, with zeros in the padding."""
    if layout.index_T is not None:
        zeros = x_TD.new_zeros(layout.num_steps * layout.num_sentences, x_TD.shape[1])
        x_TD = zeros.index_copy_(0, layout.index_T, x_TD)
    return x_TD.view(layout.num_steps, layout.num_sentences, -1)


def unpad(x_LBD: Tensor, layout: PaddedLayout) -> Tensor:
    """Return the tokens x_TD of a padded array, without the padding."""
    x_TD = x_LBD.reshape(layout.num_steps * layout.num_sentences, -1)
    return x_TD if layout.index_T is None else x_TD.index_select(0, layout.index_T)


@torch.no_grad()
def _set_forget_bias_(lstm: nn.Module) -> None:
    """Set the forget bias to 1 (Jozefowicz et al. 2016) and all others to 0; of the two that PyTorch adds, one is 0."""
    for bias_G in (lstm.bias_ih_l0, lstm.bias_hh_l0):
        bias_G.zero_()
    units = len(lstm.bias_ih_l0) // 4
    lstm.bias_ih_l0[units : 2 * units] = 1.0
