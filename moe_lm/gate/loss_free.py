"""Balance without a loss: a bias steers the choice and never the weight (Wang et al. 2024, arXiv 2408.15664).

Shape suffixes: T tokens, D width, E experts (of a group), K experts a token, G groups.
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from moe_lm.errors import UserError
from moe_lm.gate import Gating, checked_k
from moe_lm.gate.routing import choice_sums, initial_matrix, numbered, of_tokens, product, token_choice


class LossFree(nn.Module):
    """G(x)_i = s_i for the k largest s_i + b_i, else 0, with s = sigmoid(x W_g) (eq. 1 and 3).

    After each update b_i += bias_update_rate * sign(mean load - load_i), by the batch that the update read
    (Algorithm 1): the next batch is chosen for by what the last one showed, in evaluation by what is left at the end.
    """

    differentiable_stats: ClassVar[frozenset[str]] = frozenset({"importance_E", "probability_E", "log_z_squared"})
    required_stats: frozenset[str] | None = None

    def __init__(self, *, width: int, num_experts: int, k: int, bias_update_rate: float, num_groups: int | None = None):
        super().__init__()
        self.k, self.num_groups, self.num_experts = checked_k(k, num_experts), num_groups, num_experts
        if not 0 <= bias_update_rate < math.inf:
            raise UserError(f"bias_update_rate={bias_update_rate} of the gate loss_free: must be at least 0 and finite")
        self.bias_update_rate = bias_update_rate
        self.gate_DE = initial_matrix(width, num_experts, num_groups)
        self.register_buffer("bias_E", torch.zeros((num_groups or 1) * num_experts))

    def forward(self, x_TD: Tensor, group_T: Tensor | None = None) -> Gating:
        """Assign each token to its k experts; float32 whatever the autocast type."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logit_TE = product(x_TD.to(self.gate_DE.dtype), self.gate_DE, group_T)
            score_TE = logit_TE.sigmoid()
            biased_TE = score_TE.detach() + of_tokens(self.bias_E.view(-1, self.num_experts), group_T)
            expert_TK = biased_TE.topk(self.k, dim=1).indices
            gate_TK = score_TE.gather(1, expert_TK)
            expert_TK, sums = numbered(expert_TK, group_T, self.num_experts), {}
            if self.training:
                share_TE = score_TE / score_TE.sum(dim=1, keepdim=True).clamp(min=torch.finfo(score_TE.dtype).tiny)
                sums = choice_sums(logit_TE, expert_TK, group_T, self.num_groups, self.required_stats, share_TE)
            return token_choice(expert_TK, gate_TK, self.bias_E.numel(), sums=sums)

    @torch.no_grad()
    def adapt(self, statistics: Mapping[str, Tensor]) -> None:
        """Raise the bias of experts below the mean load of `load_E` (of their group), lower that of those above."""
        load_GE = statistics["load_E"].view(-1, self.num_experts)
        below_GE = (load_GE.mean(dim=1, keepdim=True) - load_GE).sign()
        self.bias_E += self.bias_update_rate * below_GE.reshape(-1).to(self.bias_E.dtype)

    def operations_per_timestep(self) -> int:
        """One matrix; the bias only adds."""
        return self.gate_DE.numel() // (self.num_groups or 1)
