"""What a gate is: it sends tokens to experts and says how much each expert's answer counts.

Shape suffixes: T tokens, D width, E experts, K experts a token, A assignments, G groups of experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from moe_lm.errors import UserError


@dataclass(frozen=True)
class Gating:
    """A gate's decision: a flat list of assignments, ascending by expert and then by token."""

    token_A: Tensor
    """int64: which token."""
    expert_A: Tensor
    """int64: which expert."""
    gate_A: Tensor
    """float32: the weight of this expert's answer, G(x)_i."""
    num_tokens: int
    importance_E: Tensor
    """Sum of the gate values each expert received (eq. 6)."""
    load_E: Tensor
    """Assignments each expert received: the smooth estimate (eq. 10) or, without noise, their number."""
    num_requested: int
    """Assignments that the gate asked for."""
    num_dropped: int = 0
    """Assignments lost to a capacity limit; `num_requested` - `num_dropped` are in the list."""
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    """Further additive statistics that balance losses or the gate's `adapt` may read, by name.

    Of one entry an expert: `requested_E`, its choices before any capacity, `first_choice_E`, the first choices among them,
    `probability_E`, the sum of its share of a softmax over all experts. Scalars: `log_z_squared`, the sum of
    logsumexp(logits)^2, and `num_tokens`, over how many.
    """

    @property
    def num_experts(self) -> int:
        """Number of experts, E."""
        return self.importance_E.numel()

    def num_unrouted(self) -> Tensor:
        """Return how many tokens no expert serves: dropped everywhere, or chosen by none."""
        served_T = torch.zeros(self.num_tokens, dtype=torch.bool, device=self.token_A.device)
        return self.num_tokens - served_T.index_fill_(0, self.token_A, True).sum()

    def statistics(self) -> dict[str, Tensor]:
        """Return everything that balance losses read, as sums: additive over tokens and over processes."""
        return {"importance_E": self.importance_E, "load_E": self.load_E, **self.sums}

    def with_statistics(self, values: Mapping[str, Tensor]) -> "Gating":
        """Return the gating with other statistics in the place of its own, as of a larger batch."""
        sums = {name: values[name] for name in self.sums}
        return replace(self, importance_E=values["importance_E"], load_E=values["load_E"], sums=sums)


class Gate(Protocol):
    """A gating network, G(x), or, made with `num_groups`, one for each group of experts (Appendix B).

    What has a default here may be left out of an implementation.
    """

    num_experts: int
    """Experts to choose among, with groups those of one group."""
    assignments_per_token: float
    """Experts that a token is sent to on average, where that is not `k`."""
    only_k: int | None = None
    """The one k that the gate is defined for."""
    differentiable_stats: frozenset[str] = frozenset({"importance_E"})
    """Names of the statistics through which the gradient of a balance loss reaches the gate."""
    required_stats: frozenset[str] | None = None
    """Names of the statistics that losses read: no others need be made of a batch; None: all."""
    needs_loss: str | None = None
    """Name of the balance loss without which the gate would not learn what it needs at evaluation."""
    non_causal_note: str | None = None
    """What its choice in training depends on beside the token itself, and what evaluation goes by instead."""

    def __call__(self, x_TD: Tensor, group_T: Tensor | None = None) -> Gating:
        """Assign each token to experts.

        With groups, row t is offered the experts of its group alone; `group_T` (int64) ascends, and expert j of
        group g has the number g * num_experts + j.
        """
        ...

    def operations_per_timestep(self) -> int:
        """Multiply-adds a token costs in the gate's matrices, with groups those of one group."""
        ...

    def adapt(self, statistics: Mapping[str, Tensor]) -> None:
        """Move what no gradient moves (a bias, a threshold) by the global batch's statistics, after its update.

        A function of these sums alone, so that it is the same on every process; what it moves is a buffer, so that it
        is part of the checkpoint. A gate without any such thing has no `adapt`.
        """


def checked_k(k: int, num_experts: int, only: int | None = None, name: str = "") -> int:
    """Return k; raises `UserError` where there are not as many experts, or where the gate is defined for another k."""
    if not 1 <= k <= num_experts:
        raise UserError(
            f"model.k={k} experts a token of model.num_experts={num_experts}: "
            "k must be at least 1 and at most num_experts"
        )
    if only is not None and k != min(only, num_experts):
        experts = "1 expert" if only == 1 else f"{only} experts"
        raise UserError(
            f"the gate {name} sends a token to {experts}, not {k}: model.k={only}"
            " (or primary_k of the layer, for a primary gate)"
        )
    return k


def differentiable_stats_of(gate: Gate) -> frozenset[str]:
    """Return what a gate offers to balance losses; one that does not say so offers what `Gate` says."""
    return getattr(gate, "differentiable_stats", Gate.differentiable_stats)
