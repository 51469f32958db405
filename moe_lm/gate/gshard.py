"""GShard's top-2 gating: capacity, and a second expert by chance (Lepikhin et al. 2020, arXiv 2006.16668, Algorithm 1).

Shape suffixes: T tokens, E experts of a group, K = 2 experts a token (1 where there is only one).
"""

import torch
from torch import Tensor

from moe_lm.gate import Gate, Gating, TokenGroups
from moe_lm.gate.routing import within_capacity


class GShard(Gate):
    """G(x) = g_1 / (g_1 + g_2) and g_2 / (g_1 + g_2) for the two largest of g = Softmax(x W_g), else 0.

    In training an expert takes at most capacity_factor * 2 * tokens / experts assignments of the call: first choices
    in the order of the tokens, then second choices in the same order, each of these only where 2 g_2 / (g_1 + g_2) >
    U(0, 1). A choice that is left out counts as dropped, and the token's other expert keeps its weight. Evaluation
    keeps all choices.
    """

    only_k = 2
    differentiable_stats = Gate.differentiable_stats | {"probability_E"}
    non_causal_note = (
        "drops choices beyond an expert's capacity, second choices after all first ones; evaluation drops none"
    )

    def __init__(self, *, capacity_factor: float, **sizes: int | None):
        super().__init__(**sizes)
        if not capacity_factor > 0:
            raise ValueError(f"capacity_factor={capacity_factor} of the gate gshard: must be positive")
        self.capacity_factor = capacity_factor

    def choose(self, logit_TE: Tensor, groups: TokenGroups) -> Gating:
        """Send each token to its two likeliest experts; in training, to the second by chance, and within capacity."""
        top_TK, expert_TK = logit_TE.topk(self.k, dim=1)
        gate_TK, kept_TK = top_TK.softmax(dim=1), None  # the two largest of a softmax, renormalised
        if self.training:
            drawn_TK = torch.ones_like(expert_TK, dtype=torch.bool)
            if self.k == 2:
                drawn_TK[:, 1] = 2 * gate_TK.detach()[:, 1] > torch.rand_like(gate_TK[:, 1])
            kept_TK = within_capacity(expert_TK, self.capacity_factor, groups, drawn_TK)
        return self.token_choice(expert_TK, gate_TK, logit_TE, groups, kept_TK=kept_TK)
