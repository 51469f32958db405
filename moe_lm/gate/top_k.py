"""Top-k gating without noise, "token choice" (section 2.1, eq. 3 and 5).

Shape suffixes: T tokens, E experts of a group, K experts a token.
"""

from torch import Tensor

from moe_lm.gate import Gate, Gating, TokenGroups


class TopK(Gate):
    """G(x) = Softmax(KeepTopK(x W_g, k)), the same in training and evaluation."""

    differentiable_stats = Gate.differentiable_stats | {"probability_E"}

    def check_k(self) -> None:
        """Also refuse k = 1 of several experts, as the gate value would be the constant 1."""
        super().check_k()
        if self.k == 1 < self.num_experts:
            raise ValueError(
                "the gate top_k with one expert a token gives it the weight 1 and learns nothing from the text: "
                "model.k=2, or the gate switch for one expert a token"
            )

    def choose(self, logit_TE: Tensor, groups: TokenGroups) -> Gating:
        """Send each token to the experts of its k largest logits."""
        top_TK, expert_TK = logit_TE.topk(self.k, dim=1)
        return self.token_choice(expert_TK, top_TK.softmax(dim=1), logit_TE, groups)
