"""What training minimises: nats per predicted word of the global batch plus the weighted balance losses."""

from collections.abc import Mapping

from torch import Tensor

from moe_lm.gate import Gating
from moe_lm.loss.balance import BalanceLoss

Statistics = dict[str, dict[str, Tensor]]
"""Of each gated layer, by name: its additive statistics, by name."""


class Objective:
    """Nats / words + sum over gated layers and balance losses of weight * loss (eq. 7 and 11)."""

    def __init__(self, balance: Mapping[str, BalanceLoss]):
        self.balance = balance

    def __call__(
        self,
        nats: Tensor,
        num_words: int,
        gatings: Mapping[str, Gating],
        global_stats: Statistics | None = None,
        share: float = 1.0,
    ) -> tuple[Tensor, dict[str, float]]:
        """Return one micro-batch's share of the objective, and each balance loss's unweighted value.

        `num_words` is the global batch's. `global_stats`, the statistics summed over the global batch, makes
        the losses read global values while their gradient reaches this micro-batch's part of the sums; added
        up over the micro-batches that is the gradient of the loss of the whole batch. Without it each micro-batch
        has losses of its own, which count by its `share` of the batch's words.
        """
        total = nats / num_words
        terms = dict.fromkeys(self.balance, 0.0)
        for layer, gating in gatings.items():
            if global_stats is not None:
                gating, share = _with_global_values(gating, global_stats[layer]), 1.0
            for name, loss in self.balance.items():
                value = loss(gating)
                terms[name] += value.detach()
                total = total + share * loss.weight * value
        return total, terms


def statistics(gatings: Mapping[str, Gating]) -> Statistics:
    """Return the additive statistics of each gated layer, detached."""
    return {layer: {name: x.detach() for name, x in gating.statistics().items()} for layer, gating in gatings.items()}


def add(total: Statistics | None, more: Statistics) -> Statistics:
    """Return the sums of two micro-batches' statistics."""
    if total is None:
        return more
    return {layer: {name: total[layer][name] + x for name, x in part.items()} for layer, part in more.items()}


def _with_global_values(gating: Gating, values: Mapping[str, Tensor]) -> Gating:
    """Return the gating with global values whose gradient is that of its own."""
    return gating.with_statistics({name: values[name] + (x - x.detach()) for name, x in gating.statistics().items()})
