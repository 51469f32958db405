"""What training minimises: nats per predicted word of the global batch plus the weighted balance losses.

Balance losses penalise how unevenly a gate uses its experts; they read additive statistics of the global batch.

Shape suffixes: E experts.
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from moe_lm.gate import Gating


class BalanceLoss:
    """A scalar from a gating's global statistics; the objective multiplies it by `weight`."""

    stat: ClassVar[str]
    """Name of the statistic through which the loss's gradient reaches a gate."""

    def __init__(self, *, weight: float):
        if not 0 <= weight < math.inf:
            raise ValueError(
                f"balance weight {weight}: must be finite and at least 0, as a negative one would reward imbalance"
            )
        self.weight = weight

    def __call__(self, gating: Gating) -> Tensor:
        """Return the unweighted loss; it depends on additive statistics alone, never on single assignments."""
        raise NotImplementedError


class Importance(BalanceLoss):
    """CV(Importance(X))^2: experts should receive equal sums of gate values (section 4, eq. 6-7)."""

    stat = "importance_E"

    def __call__(self, gating: Gating) -> Tensor:
        """Return the squared coefficient of variation of the importance."""
        return squared_coefficient_of_variation(gating.importance_E)


class Load(BalanceLoss):
    """CV(Load(X))^2: experts should receive equal numbers of tokens (Appendix A, eq. 8-11)."""

    stat = "load_E"

    def __call__(self, gating: Gating) -> Tensor:
        """Return the squared coefficient of variation of the load."""
        return squared_coefficient_of_variation(gating.load_E)


class SwitchLoss(BalanceLoss):
    """E sum_i f_i P_i (Fedus et al. 2021, arXiv 2101.03961, eq. 4-6).

    f_i is expert i's share of all choices before any capacity, P_i its mean probability. Only P carries a gradient.
    The loss is 1 if all f_i and all P_i are equal; this is its minimum for f = P.
    """

    stat = "probability_E"

    def __call__(self, gating: Gating) -> Tensor:
        """Return the loss of the batch; 0 for a gate without probabilities."""
        return _dot_of_shares(gating, "requested_E")


class GShardLoss(BalanceLoss):
    """E sum_i f_i P_i with f_i expert i's share of the first choices alone (Lepikhin et al. 2020, arXiv 2006.16668).

    This is E^2 times the loss in Algorithm 1, (1/E) sum_e (c_e/S) m_e, as in the authors' code. The loss is 1 if all
    f_i and all P_i are equal, so a weight means the same for any number of experts. Only P, the mean probability,
    carries a gradient.
    """

    stat = "probability_E"

    def __call__(self, gating: Gating) -> Tensor:
        """Return the loss of the batch; 0 for a gate without probabilities."""
        return _dot_of_shares(gating, "first_choice_E")


class ZLoss(BalanceLoss):
    """(1/T) sum_t (log sum_i exp(logit_ti))^2: keeps logits small (Zoph et al. 2022, arXiv 2202.08906, eq. 5).

    In a hierarchical layer the mean is over the decisions of both levels.
    """

    stat = "log_z_squared"

    def __call__(self, gating: Gating) -> Tensor:
        """Return the loss per token; 0 for a gate without logits."""
        return _mean(gating, "log_z_squared", "num_tokens")


class Batchwise(BalanceLoss):
    """L_batchwise(X, T, m) = sum_j sum_i (M_threshold - M_batchwise)(X_ji - T_i) over |X|, masks constant (Appendix F).

    It teaches a strictly balanced gate its thresholds. The paper sums over tokens and gives no weight; this is a mean
    over tokens, which, like nats per word, does not depend on the size of the batch. In a hierarchical layer the mean
    is over the decisions of both levels.
    """

    stat = "threshold_gap"

    def __call__(self, gating: Gating) -> Tensor:
        """Return the loss per token; 0 for a gate without thresholds."""
        return _mean(gating, "threshold_gap", "threshold_tokens")


def squared_coefficient_of_variation(x_E: Tensor) -> Tensor:
    """Return CV(x)^2, population variance over squared mean; the epsilon makes it 0 for a batch without tokens."""
    return x_E.var(correction=0) / (x_E.mean().square() + 1e-10)


def _mean(gating: Gating, total: str, count: str) -> Tensor:
    if total not in gating.sums:
        return gating.importance_E.new_zeros(())
    return gating.sums[total] / gating.sums[count].clamp(min=1)


def _dot_of_shares(gating: Gating, counted: str) -> Tensor:
    """Return E sum_i f_i P_i, with f from the counts `counted` and P the mean probability; 0 if either is missing."""
    sums = gating.sums
    if counted not in sums or "probability_E" not in sums:
        return gating.importance_E.new_zeros(())
    count_E, probability_E = sums[counted], sums["probability_E"]
    share_E = count_E / count_E.sum().clamp(min=1)
    # Probabilities sum to 1 per token, so their total is the number of tokens, a constant.
    num_tokens = probability_E.detach().sum().clamp(min=1e-10)
    return gating.num_experts * (share_E * probability_E).sum() / num_tokens


Gatings = Mapping[str, Gating]
"""Gatings of the gated layers by name."""

Statistics = dict[str, dict[str, Tensor]]
"""Additive gating statistics by layer and name."""


class Objective:
    """Nats / words + sum over gated layers and balance losses of weight * loss (eq. 7 and 11)."""

    def __init__(self, balance: Mapping[str, BalanceLoss]):
        self.balance = balance

    def __call__(
        self,
        nats: Tensor,
        num_words: int,
        gatings: Gatings,
        global_stats: Statistics | None = None,
        share: float = 1.0,
    ) -> tuple[Tensor, dict[str, float]]:
        """Return a micro-batch's part of the objective, and the unweighted value of each balance loss.

        `num_words` counts the words of the global batch. With `global_stats`, the statistics summed over the global
        batch, a balance loss reads global values while its gradient reaches this micro-batch's part of the sums; these
        gradients, summed over the micro-batches, are the gradient of the loss of the whole batch. Without
        `global_stats` each micro-batch has its own balance losses, weighted by its `share` of the batch's words.
        """
        total = nats / num_words
        values = dict.fromkeys(self.balance, 0.0)
        for layer, gating in gatings.items():
            if global_stats is not None:
                gating, share = _with_global_values(gating, global_stats[layer]), 1.0
            for name, loss in self.balance.items():
                value = loss(gating)
                values[name] += value.detach()
                total = total + share * loss.weight * value
        return total, values


def statistics_of(gatings: Gatings, counts: bool = True) -> Statistics:
    """Return the additive statistics of each gated layer, detached; zeros for a micro-batch that does not count."""
    found = {layer: {name: x.detach() for name, x in gating.statistics().items()} for layer, gating in gatings.items()}
    return (
        found if counts else {k: {name: torch.zeros_like(x) for name, x in part.items()} for k, part in found.items()}
    )


def add_statistics(total: Statistics | None, more: Statistics) -> Statistics:
    """Return the sum of two micro-batches' statistics."""
    if total is None:
        return more
    return {layer: {name: total[layer][name] + x for name, x in part.items()} for layer, part in more.items()}


def _with_global_values(gating: Gating, values: Mapping[str, Tensor]) -> Gating:
    """Return the gating with global values, whose gradient flows to the gating's own statistics."""
    return gating.with_statistics({name: values[name] + (x - x.detach()) for name, x in gating.statistics().items()})
