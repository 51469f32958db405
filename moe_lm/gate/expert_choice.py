"""Expert Choice: every expert takes the tokens it scores highest (Zhou et al. 2022, arXiv 2202.09368, section 3.2).

Shape suffixes: T tokens, E experts of a group (in statistics and thresholds, of all groups), G groups.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from moe_lm.gate import Gate, Gating, TokenGroups
from moe_lm.gate.capped_choice import at_most, capped_choice
from moe_lm.gate.routing import batchwise_mask, equal_share

_MAX_STEP = 0.5
"""Largest step of a log threshold: with thousands of experts m is small, and n_i may be many times m."""
_MIN_LOG_THRESHOLD = -60.0
"""Lower limit, as with `max_experts` an expert may get too few tokens however low its threshold is."""


class ExpertChoice(Gate):
    """G(x)_i = S_i for the experts i that take x, else 0, with S = Softmax(x W_g), not renormalised.

    In training each expert takes the m = c * tokens / experts tokens of the call with the largest S_i. A token thus has
    c experts on average and at most `max_experts`, if that is given (section 3.3). In evaluation expert i takes every
    token whose S_i exceeds threshold_i, a rule that looks at one token only; with `max_experts`, only a token's largest
    S_i count. After each update log threshold_i += threshold_rate * (n_i - m) / m, where n_i is the number of tokens in
    the batch that expert i would take by the rule of evaluation.
    """

    non_causal_note = (
        "lets each expert take the tokens it scores highest in the micro-batch; evaluation uses running thresholds"
    )

    def __init__(
        self,
        *,
        k: int,
        capacity_factor: float | None = None,
        max_experts: int | None = None,
        entropy_weight: float = 0.001,
        max_iterations: int = 100,
        threshold_rate: float = 0.1,
        **sizes: int | None,
    ):
        super().__init__(k=k if capacity_factor is None else 1, **sizes)  # a capacity factor replaces k
        self.assignments_per_token = float(k if capacity_factor is None else capacity_factor)
        self.max_experts, self.threshold_rate = max_experts, threshold_rate
        self.entropy_weight, self.max_iterations = entropy_weight, max_iterations
        self._check_options()
        self.register_per_expert("log_threshold_E", -math.log(self.num_experts))

    @property
    def threshold_E(self) -> Tensor:
        """The value that S_i must exceed in evaluation; 1 / experts at first."""
        return self.log_threshold_E.exp()

    def choose(self, logit_TE: Tensor, groups: TokenGroups) -> Gating:
        """Give each expert its m best tokens or, in evaluation, the tokens above its threshold."""
        score_TE = logit_TE.softmax(dim=1)
        fixed_TE, sums = score_TE.detach(), {}
        mask_TE = fixed_TE > groups.per_token(self.threshold_E.view(-1, self.num_experts))
        if self.max_experts is not None:
            mask_TE = at_most(fixed_TE, mask_TE, self.max_experts)
        if self.training:
            sums["above_E"] = groups.sum(mask_TE.to(score_TE.dtype)).reshape(-1)
            share_G = equal_share(self.assignments_per_token, groups).to(score_TE)
            sums["share_E"] = share_G.repeat_interleave(self.num_experts)
            mask_TE = self._batch_choice(fixed_TE, groups)
        return self.expert_choice(mask_TE, score_TE, logit_TE, groups, sums)

    def _batch_choice(self, score_TE: Tensor, groups: TokenGroups) -> Tensor:
        if self.max_experts is None:
            return batchwise_mask(score_TE, self.assignments_per_token, groups)
        return capped_choice(
            score_TE,
            self.assignments_per_token,
            self.max_experts,
            groups,
            entropy_weight=self.entropy_weight,
            max_iterations=self.max_iterations,
        )

    @torch.no_grad()
    def adapt(self, statistics: Mapping[str, Tensor]) -> None:
        """Move the thresholds so that `above_E` (n_i of each expert) approaches `share_E` (its m)."""
        above_E, share_E = statistics["above_E"], statistics["share_E"]
        step_E = self.threshold_rate * (above_E - share_E) / share_E.clamp(min=1)
        step_E = step_E.clamp(-_MAX_STEP, _MAX_STEP).to(self.log_threshold_E.dtype)
        self.log_threshold_E.add_(step_E).clamp_(min=_MIN_LOG_THRESHOLD)

    def _check_options(self) -> None:
        factor, most = self.assignments_per_token, self.max_experts
        if not 0 < factor <= self.num_experts:
            raise ValueError(
                f"capacity_factor={factor:g} of the gate expert_choice, in experts a token: must be positive and "
                f"at most as many as there are, {self.num_experts}"
            )
        if most is not None and not most >= factor:
            raise ValueError(
                f"max_experts={most} of the gate expert_choice: must be at least the {factor:g} experts that a token "
                "has on average"
            )
        if not self.entropy_weight > 0 or self.max_iterations < 1:
            raise ValueError(
                f"entropy_weight={self.entropy_weight} max_iterations={self.max_iterations} of the gate "
                "expert_choice: must be positive"
            )
        if not 0 <= self.threshold_rate <= 1:
            raise ValueError(
                f"threshold_rate={self.threshold_rate} of the gate expert_choice: must be at least 0 and at most 1"
            )
