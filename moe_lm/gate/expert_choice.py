"""Expert Choice: every expert takes the tokens it scores highest (Zhou et al. 2022, arXiv 2202.09368, section 3.2).

Shape suffixes: T tokens, D width, E experts (of a group, or of all where a group is not spoken of), G groups.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from moe_lm.gate import Gating, checked_k
from moe_lm.gate.choices import (
    batchwise_mask,
    expert_choice,
    initial_matrix,
    logit_sums,
    of_tokens,
    product,
    tokens_of_groups,
)
from moe_lm.gate.transport import at_most, entropic_choice
from moe_lm.mistake import Mistake


class ExpertChoice(nn.Module):
    """G(x)_i = S_i for the experts i that take x, else 0, with S = Softmax(x W_g), not renormalised.

    In training each expert takes the m = c * tokens / experts tokens of the call with the largest S_i, so c experts a
    token on average, with `max_experts` at most so many for any of them (section 3.3). In evaluation expert i takes a
    token whose S_i lies above threshold_i, which looks at nothing but this token: a running mean of the border
    between the m largest S_i of training's calls and the others (of the smallest of those and the largest of these);
    of more than `max_experts` those with the largest S_i.
    """

    offers: ClassVar[frozenset[str]] = frozenset({"importance_E", "log_z_squared"})
    chooses_over_batch: ClassVar[str] = (
        "lets each expert take the tokens it scores highest in the micro-batch; evaluation goes by running thresholds"
    )
    wanted: frozenset[str] | None = None

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
        decay: float = 0.99,
        num_groups: int | None = None,
    ):
        super().__init__()
        self.num_groups, self.num_experts = num_groups, num_experts
        self.assignments_per_token = float(checked_k(k, num_experts) if capacity_factor is None else capacity_factor)
        _check(self.assignments_per_token, num_experts, max_experts, entropy_weight, max_iterations, decay)
        self.max_experts, self.decay = max_experts, decay
        self.entropy_weight, self.max_iterations = entropy_weight, max_iterations
        self.gate_DE = initial_matrix(width, num_experts, num_groups)
        experts = (num_groups or 1) * num_experts
        self.register_buffer("cut_sum_E", torch.zeros(experts))
        self.register_buffer("cut_weight_E", torch.zeros(experts))

    def forward(self, x_TD: Tensor, group_T: Tensor | None = None) -> Gating:
        """Assign tokens to experts; float32 arithmetic whatever the autocast type."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return self._gating(x_TD.to(self.gate_DE.dtype), group_T)

    @property
    def threshold_E(self) -> Tensor:
        """What S_i must exceed in evaluation, of all experts; 1 / experts where training has shown nothing yet."""
        weight_E = self.cut_weight_E
        mean_E = self.cut_sum_E / torch.where(weight_E > 0, weight_E, 1)
        return torch.where(weight_E > 0, mean_E, 1 / self.num_experts)

    @torch.no_grad()
    def adapt(self, statistics: Mapping[str, Tensor]) -> None:
        """Take the batch's mean borders, `cut_E` / `num_cuts_E`, into the running means, where there are any."""
        num_cuts_E = statistics["num_cuts_E"]
        new_E = (num_cuts_E > 0).to(self.cut_sum_E.dtype) * (1 - self.decay)
        cut_E = (statistics["cut_E"] / num_cuts_E.clamp(min=1)).to(self.cut_sum_E.dtype)
        for buffer_E, value_E in ((self.cut_sum_E, new_E * cut_E), (self.cut_weight_E, new_E)):
            buffer_E.mul_(torch.where(num_cuts_E > 0, self.decay, 1.0)).add_(value_E)

    def operations_per_timestep(self) -> int:
        """One matrix; the thresholds only compare."""
        return self.gate_DE.numel() // (self.num_groups or 1)

    def _gating(self, x_TD: Tensor, group_T: Tensor | None) -> Gating:
        logit_TE = product(x_TD, self.gate_DE, group_T)
        score_TE = logit_TE.softmax(dim=1)
        fixed_TE, sums = score_TE.detach(), {}
        if self.training:
            mask_TE = batchwise_mask(fixed_TE, self.assignments_per_token, group_T)
            sums = logit_sums(logit_TE, self.wanted) | self._cuts(fixed_TE, mask_TE, group_T)
            if self.max_experts is not None:
                mask_TE = self._capped(fixed_TE, group_T)
        else:
            threshold_TE = of_tokens(self.threshold_E.view(-1, self.num_experts), group_T)
            mask_TE = fixed_TE > threshold_TE
            if self.max_experts is not None:
                mask_TE = at_most(fixed_TE, mask_TE, self.max_experts)
        return expert_choice(mask_TE, score_TE, group_T, self.num_groups, sums)

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

    def _cuts(self, score_TE: Tensor, mask_TE: Tensor, group_T: Tensor | None) -> dict[str, Tensor]:
        """Return each expert's border between taken and left, and 1 where its group has tokens at all."""
        least_GE = _smallest(score_TE.masked_fill(~mask_TE, torch.inf), group_T, self.num_groups)
        left_GE = -_smallest(-score_TE.masked_fill(mask_TE, -torch.inf), group_T, self.num_groups)
        cut_GE = torch.where(left_GE.isfinite(), (least_GE + left_GE) / 2, least_GE)
        tokens_G = tokens_of_groups(len(score_TE), group_T, self.num_groups).to(score_TE)
        some_GE = (tokens_G > 0).unsqueeze(1).expand_as(cut_GE)
        return {
            "cut_E": torch.where(some_GE, cut_GE, 0).reshape(-1),
            "num_cuts_E": some_GE.to(score_TE.dtype).reshape(-1),
        }


def _smallest(x_TE: Tensor, group_T: Tensor | None, num_groups: int | None) -> Tensor:
    """Return the smallest over each group's tokens, (G, E); infinite for a group without any."""
    inf_GE = x_TE.new_full((num_groups or 1, x_TE.shape[1]), torch.inf)
    if group_T is None:
        group_T = torch.zeros(len(x_TE), dtype=torch.int64, device=x_TE.device)
    return inf_GE.scatter_reduce(0, group_T.unsqueeze(1).expand_as(x_TE), x_TE, "amin")


def _check(
    factor: float, num_experts: int, max_experts: int | None, weight: float, iterations: int, decay: float
) -> None:
    if not 0 < factor <= num_experts:
        raise Mistake(
            f"gate.capacity_factor={factor:g} experts a token of {num_experts}: must be positive and at most as many"
        )
    if max_experts is not None and not max_experts >= factor:
        raise Mistake(f"gate.max_experts={max_experts}: must be at least the {factor:g} experts a token on average")
    if not weight > 0 or iterations < 1:
        raise Mistake(f"gate.entropy_weight={weight} gate.max_iterations={iterations}: must be positive")
    if not 0 <= decay < 1:
        raise Mistake(f"gate.decay={decay}: must be at least 0 and below 1")
