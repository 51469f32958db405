"""The sparsely-gated mixture-of-experts layer (section 2), applied to all tokens of a batch at once (3.1).

Shape suffixes: T tokens, D width, A assignments.
"""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from moe_lm.data.sentences import Sentences
from moe_lm.errors import UserError
from moe_lm.gate import Gate, Gating, differentiable_stats_of
from moe_lm.model.experts import Experts
from moe_lm.parallel.context import SINGLE_PROCESS, ParallelContext


class MoE(nn.Module):
    """y = sigmoid(sum_i G(x)_i E_i(x)) (eq. 1; the sigmoid: Appendix C.1)."""

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        num_experts: int,
        k: int,
        gate: Callable[..., Gate],
        parallel: ParallelContext = SINGLE_PROCESS,
    ):
        super().__init__()
        if min(width, hidden, num_experts) < 1:
            raise UserError(
                f"model.width={width} model.expert_hidden={hidden} model.num_experts={num_experts} must be at least 1"
            )
        self.k = k
        self.gate = gate(width=width, num_experts=num_experts, k=k)
        self.experts = Experts(width=width, hidden=hidden, num_experts=num_experts, parallel=parallel)

    def forward(self, x_TD: Tensor, sentences: Sentences) -> tuple[Tensor, Gating]:  # noqa: ARG002
        """Return the mixture's output and the gating that made it."""
        gating = self.gate(x_TD)
        return self.experts(x_TD, gating).sigmoid(), gating

    def operations_per_timestep(self) -> int:
        """k experts, or as many as the gate sends a token to on average, and the gate."""
        experts = round(self.assignments_per_token * self.experts.operations_per_row())
        return experts + self.gate.operations_per_timestep()

    @property
    def assignments_per_token(self) -> float:
        """Experts a token, on average."""
        return getattr(self.gate, "assignments_per_token", self.k)

    @property
    def differentiable_stats(self) -> frozenset[str]:
        """The statistics through which a balance loss's gradient reaches the gate."""
        return differentiable_stats_of(self.gate)

    def adapt(self, statistics: Mapping[str, Tensor]) -> None:
        """Let the gate move what no gradient moves, by the global batch's statistics."""
        if hasattr(self.gate, "adapt"):
            self.gate.adapt(statistics)
