"""Adam (Kingma & Ba 2015), the paper's optimizer."""

import torch
from torch import nn

from moe_lm.mistake import Mistake


class Adam:
    """torch's fused Adam over all parameters; the paper gives neither betas nor epsilon nor clipping."""

    def __init__(self, *, learning_rate: float, beta1: float, beta2: float, epsilon: float, clip_norm: float):
        if not (learning_rate > 0 and clip_norm > 0 and epsilon > 0 and 0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise Mistake(
                f"optimizer: learning_rate={learning_rate} clip_norm={clip_norm} epsilon={epsilon} must be "
                f"positive, beta1={beta1} beta2={beta2} at least 0 and below 1"
            )
        self.learning_rate = learning_rate
        self.clip_norm = clip_norm
        self._settings = {"lr": learning_rate, "betas": (beta1, beta2), "eps": epsilon}

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of all the model's parameters."""
        return torch.optim.Adam(model.parameters(), fused=True, **self._settings)
