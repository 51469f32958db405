"""What a softmax layer is: hidden states and the words that followed, to nats.

Shape suffixes: T tokens, D width, V vocabulary.
"""

from typing import Protocol

from torch import Tensor


class Softmax(Protocol):
    """The output layer; in eval mode exact over the whole vocabulary, whatever it does in training."""

    exact_in_training: bool
    """Whether training's nats are over the whole vocabulary too."""
    weight_VD: Tensor
    bias_V: Tensor

    def __call__(self, hidden_TD: Tensor, target_T: Tensor, seed: int, host_T: Tensor | None = None) -> Tensor:
        """Return the summed nats (float64 scalar); `seed` fixes whatever is drawn.

        `host_T` are the targets in the host's memory, where `target_T` is a GPU's.
        """
        ...

    def token_nats(self, hidden_TD: Tensor, target_T: Tensor) -> Tensor:
        """Return each token's exact nats (float64, T); no gradients."""
        ...

    def operations_per_timestep(self) -> int:
        """Multiply-adds a token costs in training's forward pass (not in the paper's ops/timestep)."""
        ...
