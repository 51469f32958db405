"""The sparsely-gated mixture-of-experts layer (section 2), applied to all tokens of a batch at once (3.1).

Shape suffixes: T tokens, D width, A assignments.
"""

from collections.abc import Callable

from torch import Tensor, nn

from moe_lm.dispatch import combine, dispatch
from moe_lm.experts import Experts
from moe_lm.gate import Gate, Gating
from moe_lm.mistake import Mistake
from moe_lm.sentences import Sentences


class MoE(nn.Module):
    """y = sigmoid(sum_i G(x)_i E_i(x)) (eq. 1; the sigmoid: Appendix C.1)."""

    def __init__(self, *, width: int, hidden: int, num_experts: int, k: int, gate: Callable[..., Gate]):
        super().__init__()
        if min(width, hidden, num_experts) < 1:
            raise Mistake(
                f"model.width={width} model.expert_hidden={hidden} model.num_experts={num_experts} must be at least 1"
            )
        self.k = k
        self.gate = gate(width=width, num_experts=num_experts, k=k)
        self.experts = Experts(width=width, hidden=hidden, num_experts=num_experts)

    def forward(self, x_TD: Tensor, sentences: Sentences) -> tuple[Tensor, Gating]:  # noqa: ARG002
        """Return the mixture's output and the gating that made it."""
        gating = self.gate(x_TD)
        y_AD = self.experts(dispatch(x_TD, gating), gating.expert_A)
        return combine(y_AD, gating).sigmoid(), gating

    def operations_per_timestep(self) -> int:
        """k experts and the gate."""
        return self.k * self.experts.operations_per_row() + self.gate.operations_per_timestep()
