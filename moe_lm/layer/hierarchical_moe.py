"""The hierarchical mixture of experts (Appendix B): a primary gate over groups, a gate in each group.

Shape suffixes: T tokens, D width, G groups, E experts of all groups, R rows sent to groups, A assignments.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from moe_lm.dispatch import combine, dispatch
from moe_lm.experts import Experts
from moe_lm.gate import Gate, Gating
from moe_lm.mistake import Mistake
from moe_lm.sentences import Sentences


class HierarchicalMoE(nn.Module):
    """y = sigmoid(sum_i sum_j G_primary(x)_i G_i(x)_j E_ij(x)) (eq. 12; the sigmoid: Appendix C.1).

    `num_experts` in `num_groups` equal groups; k groups a token and k experts in each, so k * k experts a token.
    """

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        num_experts: int,
        num_groups: int,
        k: int,
        primary_gate: Callable[..., Gate],
        gate: Callable[..., Gate],
    ):
        super().__init__()
        _check(width=width, expert_hidden=hidden, num_experts=num_experts, num_groups=num_groups, k=k)
        self.k, self.num_groups = k, num_groups
        self.primary_gate = primary_gate(width=width, num_experts=num_groups, k=k)
        self.gate = gate(width=width, num_experts=num_experts // num_groups, k=k, num_groups=num_groups)
        self.experts = Experts(width=width, hidden=hidden, num_experts=num_experts)

    def forward(self, x_TD: Tensor, sentences: Sentences) -> tuple[Tensor, "HierarchicalGating"]:  # noqa: ARG002
        """Return the mixture's output and the gating of both levels; a group's gate sees only what it is sent."""
        primary = self.primary_gate(x_TD)
        gating = joined(primary, self.gate(dispatch(x_TD, primary), primary.expert_A), self.k)
        y_AD = self.experts(dispatch(x_TD, gating), gating.expert_A)
        return combine(y_AD, gating).sigmoid(), gating

    def operations_per_timestep(self) -> int:
        """The primary gate, k secondary gates and k * k experts."""
        secondary = self.gate.operations_per_timestep() + self.k * self.experts.operations_per_row()
        return self.primary_gate.operations_per_timestep() + self.k * secondary


@dataclass(frozen=True)
class HierarchicalGating(Gating):
    """A gating over all a * b experts, whose load is not additive itself but made of additive sums (eq. 14)."""

    def statistics(self) -> dict[str, Tensor]:
        """Return the importance and the sums of both levels: additive over tokens and over processes."""
        return {"importance_E": self.importance_E, **self.sums}

    def with_statistics(self, values: Mapping[str, Tensor]) -> "HierarchicalGating":
        """Return the gating with other statistics in the place of its own, the load made anew from them."""
        sums = {name: values[name] for name in self.sums}
        return replace(self, importance_E=values["importance_E"], load_E=hierarchical_load(sums), sums=sums)


def joined(primary: Gating, secondary: Gating, k: int) -> HierarchicalGating:
    """Return both levels as one gating; the secondary's tokens are the rows that the primary sent.

    A gate's weight is G_primary(x)_i G_i(x)_j (eq. 12), the importance their sum (eq. 13). A row that the primary
    drops loses k assignments. Scalar sums of both levels are added.
    """
    gate_A = primary.gate_A.index_select(0, secondary.token_A) * secondary.gate_A
    sums = dict(secondary.sums)
    for name, value in primary.sums.items():
        sums[name] = sums[name] + value if name in sums else value
    sums |= {
        "primary_load_G": primary.load_E,
        "secondary_load_E": secondary.load_E,
        "num_received_G": _counts(primary),
    }
    return HierarchicalGating(
        token_A=primary.token_A.index_select(0, secondary.token_A),
        expert_A=secondary.expert_A,
        gate_A=gate_A,
        num_tokens=primary.num_tokens,
        importance_E=gate_A.new_zeros(secondary.num_experts).index_add(0, secondary.expert_A, gate_A),
        load_E=hierarchical_load(sums),
        num_asked=secondary.num_asked + k * primary.num_dropped,
        num_dropped=secondary.num_dropped + k * primary.num_dropped,
        sums=sums,
    )


def hierarchical_load(sums: Mapping[str, Tensor]) -> Tensor:
    """Load_H(X)_ij = Load_primary(X)_i Load_i(X^(i))_j / |X^(i)| (eq. 14); a group without tokens has no load."""
    received_G = sums["num_received_G"].clamp(min=1)
    load_GE = sums["secondary_load_E"].view(len(received_G), -1)
    return ((sums["primary_load_G"] / received_G).unsqueeze(1) * load_GE).reshape(-1)


def _counts(primary: Gating) -> Tensor:
    """|X^(i)|: how many tokens each group is sent; a constant, as the gradient reaches the gate through its load."""
    ones_A = primary.gate_A.detach().new_ones(primary.gate_A.shape)
    return ones_A.new_zeros(primary.num_experts).index_add(0, primary.expert_A, ones_A)


def _check(*, num_experts: int, num_groups: int, k: int, **sizes: int) -> None:
    sizes |= {"num_experts": num_experts, "num_groups": num_groups}
    if min(sizes.values()) < 1:
        raise Mistake(f"{' '.join(f'model.{name}={value}' for name, value in sizes.items())} must be at least 1")
    if num_experts % num_groups:
        raise Mistake(f"model.num_experts={num_experts}: must be a multiple of model.num_groups={num_groups}")
    if not 1 <= k <= min(num_groups, num_experts // num_groups):
        raise Mistake(
            f"model.k={k} at each level: must be at least 1, at most model.num_groups={num_groups} and at most the "
            f"{num_experts // num_groups} experts of a group"
        )
