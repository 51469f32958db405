"""Expert Choice: every expert takes the tokens it scores highest (Zhou et al. 2022, arXiv 2202.09368, section 3.2).

Shape suffixes: T tokens, D width, E experts (of a group, or of all where a group is not spoken of), G groups.
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from moe_lm.errors import UserError
from moe_lm.gate import Gating, checked_k
from moe_lm.gate.capped_choice import at_most, entropic_choice
from moe_lm.gate.routing import (
    batchwise_mask,
    equal_share,
    expert_choice,
    initial_matrix,
    logit_sums,
    of_tokens,
    product,
    summed,
    tokens_of_groups,
)

_FARTHEST = 0.5
"""Largest step of a threshold's logarithm: among thousands of experts m is small, and many tokens may lie above."""
_LOWEST = -60.0
"""Of a threshold's logarithm: with a limit an expert may get too few tokens however low its threshold."""


class ExpertChoice(nn.Module):
    """G(x)_i = S_i for the experts i that take x, else 0, with S = Softmax(x W_g), not renormalised.

    In training each expert takes the m = c * tokens / experts tokens of the call with the largest S_i, so c experts a
    token on average, with `max_experts` at most so many for any of them (section 3.3). In evaluation expert i takes a
    token whose S_i lies above threshold_i, which looks at nothing but this token; of more than `max_experts` those with
    the largest S_i. Each update moves the thresholds towards those by which the evaluation's rule would have given
    every expert its m tokens of the batch: log threshold_i += threshold_rate * (tokens above - m) / m.
    """

    differentiable_stats: ClassVar[frozenset[str]] = frozenset({"importance_E", "log_z_squared"})
    non_causal_note: ClassVar[str] = (
        "lets each expert take the tokens it scores highest in the micro-batch; evaluation goes by running thresholds"
    )
    required_stats: frozenset[str] | None = None

    def __init__(
        self,
        *,
        width: int,
        num_experts: int,
        k: int,
        capacity_factor: float | None = None,
        max_experts: int | None = None,
        entropy_weight: float = 0.001,
        max_iterations: int = 100,
        threshold_rate: float = 0.1,
        num_groups: int | None = None,
    ):
        super().__init__()
        self.num_groups, self.num_experts = num_groups, num_experts
        self.assignments_per_token = float(checked_k(k, num_experts) if capacity_factor is None else capacity_factor)
        _check(self.assignments_per_token, num_experts, max_experts, entropy_weight, max_iterations, threshold_rate)
        self.max_experts, self.threshold_rate = max_experts, threshold_rate
        self.entropy_weight, self.max_iterations = entropy_weight, max_iterations
        self.gate_DE = initial_matrix(width, num_experts, num_groups)
        self.register_buffer("log_threshold_E", torch.full(((num_groups or 1) * num_experts,), -math.log(num_experts)))

    def forward(self, x_TD: Tensor, group_T: Tensor | None = None) -> Gating:
        """Assign tokens to experts; float32 whatever the autocast type."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return self._gating(x_TD.to(self.gate_DE.dtype), group_T)

    @property
    def threshold_E(self) -> Tensor:
        """What S_i must exceed in evaluation, of all experts; at first 1 / experts."""
        return self.log_threshold_E.exp()

    @torch.no_grad()
    def adapt(self, statistics: Mapping[str, Tensor]) -> None:
        """Move the thresholds by the batch's `above_E`, taken by the evaluation's rule, and `share_E`, its m tokens."""
        above_E, share_E = statistics["above_E"], statistics["share_E"]
        step_E = self.threshold_rate * (above_E - share_E) / share_E.clamp(min=1)
        step_E = step_E.clamp(-_FARTHEST, _FARTHEST).to(self.log_threshold_E.dtype)
        self.log_threshold_E.add_(step_E).clamp_(min=_LOWEST)

    def operations_per_timestep(self) -> int:
        """One matrix; the thresholds only compare."""
        return self.gate_DE.numel() // (self.num_groups or 1)

    def _gating(self, x_TD: Tensor, group_T: Tensor | None) -> Gating:
        logit_TE = product(x_TD, self.gate_DE, group_T)
        score_TE = logit_TE.softmax(dim=1)
        fixed_TE, sums = score_TE.detach(), {}
        mask_TE = fixed_TE > of_tokens(self.threshold_E.view(-1, self.num_experts), group_T)
        if self.max_experts is not None:
            mask_TE = at_most(fixed_TE, mask_TE, self.max_experts)
        if self.training:
            sums = logit_sums(logit_TE, self.required_stats) | self._loads(mask_TE, fixed_TE, group_T)
            if self.max_experts is None:
                mask_TE = batchwise_mask(fixed_TE, self.assignments_per_token, group_T)
            else:
                mask_TE = self._capped(fixed_TE, group_T)
        return expert_choice(mask_TE, score_TE, group_T, self.num_groups, sums)

    def _loads(self, above_TE: Tensor, score_TE: Tensor, group_T: Tensor | None) -> dict[str, Tensor]:
        """Return how many tokens each expert would take by the evaluation's rule, and m."""
        tokens_G = tokens_of_groups(len(score_TE), group_T, self.num_groups)
        share_G = equal_share(self.assignments_per_token, self.num_experts, tokens_G).to(score_TE)
        return {
            "above_E": summed(above_TE.to(score_TE.dtype), group_T, self.num_groups).reshape(-1),
            "share_E": share_G.repeat_interleave(self.num_experts),
        }

    def _capped(self, score_TE: Tensor, group_T: Tensor | None) -> Tensor:
        return entropic_choice(
            score_TE,
            self.assignments_per_token,
            self.max_experts,
            entropy_weight=self.entropy_weight,
            max_iterations=self.max_iterations,
            group_T=group_T,
            num_groups=self.num_groups,
        )


def _check(
    factor: float, num_experts: int, max_experts: int | None, weight: float, iterations: int, rate: float
) -> None:
    if not 0 < factor <= num_experts:
        raise UserError(
            f"capacity_factor={factor:g} of the gate expert_choice, experts a token of {num_experts}: "
            "must be positive and at most as many"
        )
    if max_experts is not None and not max_experts >= factor:
        raise UserError(
            f"max_experts={max_experts} of the gate expert_choice: must be at least the {factor:g} experts a token "
            "on average"
        )
    if not weight > 0 or iterations < 1:
        raise UserError(
            f"entropy_weight={weight} max_iterations={iterations} of the gate expert_choice: must be positive"
        )
    if not 0 <= rate <= 1:
        raise UserError(f"threshold_rate={rate} of the gate expert_choice: must be at least 0 and at most 1")
