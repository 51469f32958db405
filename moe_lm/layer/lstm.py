"""The LSTM layer (Hochreiter & Schmidhuber 1997); every sentence starts from a zero state.

Shape suffixes: L timesteps, B sentences, T tokens, D width.
"""

import torch
from torch import Tensor, nn

from moe_lm.mistake import Mistake
from moe_lm.sentences import Sentences


class Lstm(nn.Module):
    """`width` LSTM units over `width` inputs; torch's own, so cuDNN and oneDNN apply."""

    def __init__(self, *, width: int):
        super().__init__()
        if width < 1:
            raise Mistake(f"model.width={width}: must be at least 1")
        self.lstm = nn.LSTM(width, width)
        # Forget bias 1 (Jozefowicz et al. 2016); torch adds two bias vectors, so the other stays 0.
        with torch.no_grad():
            for bias in (self.lstm.bias_ih_l0, self.lstm.bias_hh_l0):
                bias.zero_()
            self.lstm.bias_ih_l0[width : 2 * width] = 1.0

    def forward(self, x_TD: Tensor, sentences: Sentences) -> tuple[Tensor, None]:
        """Run over all sentences side by side; padding exists only inside this call."""
        y_LBD, _ = self.lstm(sentences.pad(x_TD))
        return sentences.unpad(y_LBD), None

    def operations_per_timestep(self) -> int:
        """4 gates of units * (inputs + recurrent inputs)."""
        return self.lstm.weight_ih_l0.numel() + self.lstm.weight_hh_l0.numel()
