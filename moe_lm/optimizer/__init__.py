"""What an optimizer recipe is: hyperparameters that become a torch optimizer once there is a model."""

from typing import Protocol

from torch import nn
from torch.optim import Optimizer


class OptimizerRecipe(Protocol):
    """What a YAML under `configs/optimizer` builds."""

    learning_rate: float
    """Peak of the schedule, reached at the end of warm-up."""
    clip_norm: float
    """Largest norm of the whole gradient; longer gradients are scaled down to it."""

    def build(self, model: nn.Module) -> Optimizer:
        """Return the optimizer of all the model's parameters."""
        ...
