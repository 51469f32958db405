"""Noisy top-k gating (section 2.1, eq. 3-5) with the smooth load estimator (Appendix A, eq. 8-10).

Shape suffixes: T tokens, D width, E experts (of a group), K experts a token, A = T*K assignments, G groups.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lm.gate import Gating, checked_k
from moe_lm.gate.choices import choice_sums, numbered, product, summed, token_choice
from moe_lm.mistake import Mistake


class NoisyTopK(nn.Module):
    """G(x) = Softmax(KeepTopK(x W_g + eps * (Softplus(x W_noise) + noise_epsilon), k)), noise in training only."""

    offers: ClassVar[frozenset[str]] = frozenset({"importance_E", "load_E", "probability_E", "log_z_squared"})
    wanted: frozenset[str] | None = None

    def __init__(self, *, width: int, num_experts: int, k: int, noise_epsilon: float, num_groups: int | None = None):
        super().__init__()
        if not noise_epsilon > 0:
            raise Mistake(f"gate.noise_epsilon={noise_epsilon}: must be positive")
        self.k, self.num_groups, self.num_experts = checked_k(k, num_experts), num_groups, num_experts
        self.noise_epsilon = noise_epsilon
        # Both start at zero, so that every expert is equally likely at first (Appendix A).
        groups = () if num_groups is None else (num_groups,)
        self.gate_DE = nn.Parameter(torch.zeros(*groups, width, num_experts))
        self.noise_DE = nn.Parameter(torch.zeros(*groups, width, num_experts))

    def forward(self, x_TD: Tensor, group_T: Tensor | None = None) -> Gating:
        """Assign each token to its k experts; float32 arithmetic whatever the autocast type."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return self._gating(x_TD.to(self.gate_DE.dtype), group_T)

    def operations_per_timestep(self) -> int:
        """Both matrices: the paper's ops/timestep counts W_noise too."""
        return (self.gate_DE.numel() + self.noise_DE.numel()) // (self.num_groups or 1)

    def _gating(self, x_TD: Tensor, group_T: Tensor | None) -> Gating:
        clean_TE = product(x_TD, self.gate_DE, group_T)
        noisy_TE, deviation_TE = clean_TE, None
        if self.training:
            deviation_TE = F.softplus(product(x_TD, self.noise_DE, group_T)) + self.noise_epsilon
            noisy_TE = clean_TE + torch.randn_like(clean_TE) * deviation_TE
        top_TK, expert_TK = noisy_TE.topk(min(self.k + 1, self.num_experts), dim=1)
        expert_TK, load_E, sums = numbered(expert_TK[:, : self.k], group_T, self.num_experts), None, {}
        if self.training:
            sums = choice_sums(noisy_TE, expert_TK, group_T, self.num_groups, self.wanted)
        if deviation_TE is not None and self.k < self.num_experts:
            chance_TE = probability_in_top_k(clean_TE, noisy_TE, deviation_TE, top_TK, self.k)
            load_E = summed(chance_TE, group_T, self.num_groups).reshape(-1)
        num_experts = self.num_experts * (self.num_groups or 1)
        return token_choice(expert_TK, top_TK[:, : self.k].softmax(dim=1), num_experts, load_E=load_E, sums=sums)


def probability_in_top_k(clean_TE: Tensor, noisy_TE: Tensor, deviation_TE: Tensor, top_TK: Tensor, k: int) -> Tensor:
    """P(x, i) of eq. 9: the chance that expert i stays chosen if its noise alone is drawn again.

    `top_TK` holds each token's k+1 largest noisy logits, descending. The k-th largest value with i left
    out is the (k+1)-th of them for an expert that is in the top k, and the k-th for one that is not.
    """
    threshold_in_T1, threshold_out_T1 = top_TK[:, k : k + 1], top_TK[:, k - 1 : k]
    threshold_TE = torch.where(noisy_TE > threshold_in_T1, threshold_in_T1, threshold_out_T1)
    return torch.special.ndtr((clean_TE - threshold_TE) / deviation_TE)
