"""Balance without a loss: a bias steers the choice and never the weight (Wang et al. 2024, arXiv 2408.15664).

Shape suffixes: T tokens, E experts of a group, K experts a token, G groups.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from moe_lm.gate import Gate, Gating, TokenGroups


class LossFree(Gate):
    """G(x)_i = s_i for the k largest s_i + b_i, else 0, with s = sigmoid(x W_g) (eq. 1 and 3).

    After each update b_i += bias_update_rate * sign(mean load - load_i), with the loads of that update's batch
    (Algorithm 1). Evaluation uses the last b.
    """

    differentiable_stats = Gate.differentiable_stats | {"probability_E"}

    def __init__(self, *, bias_update_rate: float, **sizes: int | None):
        super().__init__(**sizes)
        if not 0 <= bias_update_rate < math.inf:
            raise ValueError(
                f"bias_update_rate={bias_update_rate} of the gate loss_free: must be at least 0 and finite"
            )
        self.bias_update_rate = bias_update_rate
        self.register_per_expert("bias_E", 0.0)

    def choose(self, logit_TE: Tensor, groups: TokenGroups) -> Gating:
        """Send each token to its k largest biased scores."""
        score_TE = logit_TE.sigmoid()
        biased_TE = score_TE.detach() + groups.per_token(self.bias_E.view(-1, self.num_experts))
        expert_TK = biased_TE.topk(self.k, dim=1).indices
        gate_TK, share_TE = score_TE.gather(1, expert_TK), None
        if self.training:
            share_TE = score_TE / score_TE.sum(dim=1, keepdim=True).clamp(min=torch.finfo(score_TE.dtype).tiny)
        return self.token_choice(expert_TK, gate_TK, logit_TE, groups, probability_TE=share_TE)

    @torch.no_grad()
    def adapt(self, statistics: Mapping[str, Tensor]) -> None:
        """Raise the bias of experts with less than their group's mean `load_E`, lower that of the others."""
        load_GE = statistics["load_E"].view(-1, self.num_experts)
        below_GE = (load_GE.mean(dim=1, keepdim=True) - load_GE).sign()
        self.bias_E += self.bias_update_rate * below_GE.reshape(-1).to(self.bias_E.dtype)
