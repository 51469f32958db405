"""What both softmaxes have in common: how many logits they hold at a time."""

from torch import nn

from moe_lm.errors import UserError

_ON_A_CPU, _ON_A_GPU = 1 << 24, 1 << 28
"""On a CPU more are no faster; a GPU has done a smaller block before the host has handed it the next one."""


class ChunkedSoftmax(nn.Module):
    """A softmax with never more than `max_logits` logits in memory; None: as many as its device works well with."""

    def __init__(self, max_logits: int | None):
        super().__init__()
        if max_logits is not None and max_logits < 1:
            raise UserError(f"softmax.max_logits={max_logits}: must be at least 1, or null")
        self._asked = max_logits

    @property
    def max_logits(self) -> int:
        """Logits of a block, where its weights are now."""
        return self.most_logits(on_a_gpu=self.weight_VD.is_cuda)

    def most_logits(self, *, on_a_gpu: bool) -> int:
        """Logits of a block on the one device or the other."""
        if self._asked is not None:
            return self._asked
        return _ON_A_GPU if on_a_gpu else _ON_A_CPU
