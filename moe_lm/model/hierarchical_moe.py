"""The hierarchical mixture of experts (Appendix B): a primary gate over groups, a gate in each group.

Shape suffixes: T tokens, D width, G groups, E experts of all groups, R rows sent to groups, A assignments.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from moe_lm.data.sentences import Sentences
from moe_lm.errors import UserError
from moe_lm.gate import Gate, Gating, differentiable_stats_of
from moe_lm.model.experts import Experts
from moe_lm.ops.dispatch import dispatch
from moe_lm.ops.segments import segment_sizes, segment_sum
from moe_lm.parallel.context import SINGLE_PROCESS, ParallelContext

_PRODUCTS = ("load_E", "requested_E", "first_choice_E", "probability_E")
"""Sums of one entry an expert that both levels together have as equation 14 makes the load."""


class HierarchicalMoE(nn.Module):
    """y = sigmoid(sum_i sum_j G_primary(x)_i G_i(x)_j E_ij(x)) (eq. 12; the sigmoid: Appendix C.1).

    `num_experts` in `num_groups` equal groups; `primary_k` groups a token, k where that is not given, and k experts in
    each of them.
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
        primary_k: int | None = None,
        parallel: ParallelContext = SINGLE_PROCESS,
    ):
        super().__init__()
        primary_k = k if primary_k is None else primary_k
        _check(k, primary_k, width=width, expert_hidden=hidden, num_experts=num_experts, num_groups=num_groups)
        self.k, self.primary_k, self.num_groups = k, primary_k, num_groups
        self.primary_gate = primary_gate(width=width, num_experts=num_groups, k=primary_k)
        in_group = num_experts // num_groups
        self.gate = gate(width=width, num_experts=in_group, k=k, num_groups=num_groups)
        self.experts = Experts(
            width=width, hidden=hidden, num_experts=num_experts, parallel=parallel, together=in_group
        )

    def forward(self, x_TD: Tensor, sentences: Sentences) -> tuple[Tensor, "HierarchicalGating"]:  # noqa: ARG002
        """Return the mixture's output and the gating of both levels; a group's gate sees only what it is sent."""
        primary = self.primary_gate(x_TD)
        gating = joined(primary, self.gate(dispatch(x_TD, primary), primary.expert_A), self.k)
        return self.experts(x_TD, gating).sigmoid(), gating

    def operations_per_timestep(self) -> int:
        """The primary gate, and for each group a token is sent to the secondary gate and its experts."""
        secondary = self.gate.operations_per_timestep() * self.groups_per_token
        experts = self.assignments_per_token * self.experts.operations_per_row()
        return self.primary_gate.operations_per_timestep() + round(secondary + experts)

    @property
    def groups_per_token(self) -> float:
        """Groups that a token is sent to, on average."""
        return getattr(self.primary_gate, "assignments_per_token", self.primary_k)

    @property
    def assignments_per_token(self) -> float:
        """Experts a token, on average."""
        return self.groups_per_token * getattr(self.gate, "assignments_per_token", self.k)

    @property
    def differentiable_stats(self) -> frozenset[str]:
        """The statistics through which a balance loss's gradient reaches a gate.

        Importance and load are made of both levels whatever the gates, and scalars are sums; of other entries an expert
        there must be both.
        """
        levels = differentiable_stats_of(self.primary_gate), differentiable_stats_of(self.gate)
        either, both = levels[0] | levels[1], levels[0] & levels[1]
        always = {"importance_E", "load_E"}
        return both | {name for name in either if name in always or not name.endswith("_E")}

    def adapt(self, statistics: Mapping[str, Tensor]) -> None:
        """Let the gates of both levels move what no gradient moves, by the global batch's statistics."""
        for level, gate in (("primary_", self.primary_gate), ("secondary_", self.gate)):
            if hasattr(gate, "adapt"):
                gate.adapt({n.removeprefix(level): x for n, x in statistics.items() if n.startswith(level)})


@dataclass(frozen=True)
class HierarchicalGating(Gating):
    """A gating over all a * b experts; what is not additive itself is made of sums that are."""

    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """The additive sums of both levels, as primary_... and secondary_..., and `num_received_G`, |X^(i)|."""

    def statistics(self) -> dict[str, Tensor]:
        """Return the importance and the sums of both levels: additive over tokens and over processes."""
        return {"importance_E": self.importance_E, **self.parts}

    def with_statistics(self, values: Mapping[str, Tensor]) -> "HierarchicalGating":
        """Return the gating with other statistics in the place of its own, all else made anew from them."""
        parts = {name: values[name] for name in self.parts}
        load_E, sums = of_both_levels(parts)
        return replace(self, importance_E=values["importance_E"], load_E=load_E, sums=sums, parts=parts)


def joined(primary: Gating, secondary: Gating, k: int) -> HierarchicalGating:
    """Return both levels as one gating; the secondary's tokens are the rows that the primary sent.

    A gate's weight is G_primary(x)_i G_i(x)_j (eq. 12), the importance their sum (eq. 13). A row that the primary
    drops loses k assignments.
    """
    gate_A = primary.gate_A.index_select(0, secondary.token_A) * secondary.gate_A
    parts = {"num_received_G": _counts(primary)}
    for level, gating in (("primary", primary), ("secondary", secondary)):
        parts |= {f"{level}_{name}": x for name, x in gating.statistics().items() if name != "importance_E"}
    load_E, sums = of_both_levels(parts)
    return HierarchicalGating(
        token_A=primary.token_A.index_select(0, secondary.token_A),
        expert_A=secondary.expert_A,
        gate_A=gate_A,
        num_tokens=primary.num_tokens,
        importance_E=segment_sum(gate_A, secondary.expert_A, secondary.num_experts),
        load_E=load_E,
        num_requested=secondary.num_requested + k * primary.num_dropped,
        num_dropped=secondary.num_dropped + k * primary.num_dropped,
        sums=sums,
        parts=parts,
    )


def of_both_levels(parts: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the load of all a * b experts and the further sums, from those of both levels.

    Load_H(X)_ij = Load_primary(X)_i Load_i(X^(i))_j / |X^(i)| (eq. 14); a group without tokens has no load. Choices and
    probabilities are made in the same way; scalars are added.
    """
    levels = [
        {name.removeprefix(level): x for name, x in parts.items() if name.startswith(level)}
        for level in ("primary_", "secondary_")
    ]
    received_G = parts["num_received_G"].clamp(min=1)
    sums = {}
    for name in levels[0] | levels[1]:
        values = [level[name] for level in levels if name in level]
        if values[0].dim() == 0:
            sums[name] = sum(values[1:], start=values[0])
        elif len(values) == 2 and name in _PRODUCTS:
            of_groups_G, of_experts_GE = values[0], values[1].view(len(received_G), -1)
            sums[name] = ((of_groups_G / received_G).unsqueeze(1) * of_experts_GE).reshape(-1)
    return sums.pop("load_E"), sums


def _counts(primary: Gating) -> Tensor:
    """|X^(i)|: how many tokens each group is sent; a constant, as the gradient reaches the gate through its load."""
    return segment_sizes(primary.expert_A, primary.num_experts).to(primary.gate_A.dtype)


def _check(k: int, primary_k: int, *, num_experts: int, num_groups: int, **sizes: int) -> None:
    sizes |= {"num_experts": num_experts, "num_groups": num_groups}
    if min(sizes.values()) < 1:
        raise UserError(f"{' '.join(f'model.{name}={value}' for name, value in sizes.items())} must be at least 1")
    if num_experts % num_groups:
        raise UserError(f"model.num_experts={num_experts}: must be a multiple of model.num_groups={num_groups}")
    if not 1 <= primary_k <= num_groups or not 1 <= k <= num_experts // num_groups:
        levels = f"model.k={k} at each level" if k == primary_k else f"model.k={k} and primary_k={primary_k}"
        raise UserError(
            f"{levels}: must be at least 1, at most model.num_groups={num_groups} and at most the "
            f"{num_experts // num_groups} experts of a group"
        )
