"""The hierarchical mixture of experts (Appendix B): a primary gate over groups, and a gate in each group.

Shape suffixes: T tokens, D width, G groups, E experts of all groups, R rows sent to groups, A assignments.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from moe_lm.data.batch import PaddedLayout
from moe_lm.gate import Gate, Gating
from moe_lm.model.moe import Mixture
from moe_lm.ops.routing import segment_sizes, segment_sum
from moe_lm.ops.token_dispatch import dispatch

_PRODUCTS = ("load_E", "requested_E", "first_choice_E", "probability_E")
"""Statistics per expert that combine both levels as equation 14 combines the load."""


class HierarchicalMoE(Mixture):
    """y = f(sum_i sum_j G_primary(x)_i G_i(x)_j E_ij(x)) (eq. 12), f being `output_activation`, the paper's sigmoid.

    There are `num_experts` experts in `num_groups` equal groups; a token goes to `primary_k` groups (k by default), and
    to k experts in each.
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
        gate_init_std: float | None = None,
        gate_noise_scale: float = 1.0,
        gate_temperature: float = 1.0,
        output_activation: str = "sigmoid",
        output_init_scale: float = 1.0,
        num_shared_experts: int = 0,
        identical_experts: bool = False,
    ):
        super().__init__()
        primary_k = k if primary_k is None else primary_k
        _check(k, primary_k, width=width, expert_hidden=hidden, num_experts=num_experts, num_groups=num_groups)
        self.k, self.num_groups, group_size = k, num_groups, num_experts // num_groups
        common = {"width": width, "init_std": gate_init_std, "temperature": gate_temperature}
        common["noise_scale"] = gate_noise_scale
        self.primary_gate = primary_gate(num_experts=num_groups, k=primary_k, **common)
        self.gate = gate(num_experts=group_size, k=k, num_groups=num_groups, **common)
        self.add_experts(
            width=width,
            hidden=hidden,
            num_experts=num_experts,
            group_size=group_size,
            output_activation=output_activation,
            output_init_scale=output_init_scale,
            num_shared_experts=num_shared_experts,
            identical_experts=identical_experts,
        )
        self.token_share = self.assignments_per_token / num_experts
        self.primary_gate.token_share = self.groups_per_token / num_groups

    def gates(self) -> dict[str, Gate]:
        """Return the gates of both levels, the primary gate first."""
        return {"primary_gate": self.primary_gate, "gate": self.gate}

    def forward(self, x_TD: Tensor, layout: PaddedLayout) -> tuple[Tensor, "HierarchicalGating"]:
        """Return the mixture's output and the gating of both levels; a group's gate sees only the rows sent to it."""
        primary = self.primary_gate(x_TD, input_T=layout.input_T)
        input_R = None if layout.input_T is None else layout.input_T.index_select(0, primary.token_A)
        secondary = self.gate(dispatch(x_TD, primary.token_A), primary.expert_A, input_R)
        gating = HierarchicalGating.of_levels(primary, secondary, self.k)
        return self.output(x_TD, gating, layout), gating

    def operations_per_timestep(self) -> int:
        """Return the multiply-adds of the primary gate and, for each of a token's groups, of its gate and experts."""
        secondary = self.gate.operations_per_timestep() * self.groups_per_token
        experts = self.assignments_per_token * self.experts.operations_per_row()
        return self.primary_gate.operations_per_timestep() + self.shared_operations() + round(secondary + experts)

    @property
    def groups_per_token(self) -> float:
        """Return the mean number of groups that a token is sent to."""
        return self.primary_gate.assignments_per_token

    @property
    def assignments_per_token(self) -> float:
        """Return the mean number of experts that a token is sent to."""
        return self.groups_per_token * self.gate.assignments_per_token

    @property
    def differentiable_stats(self) -> frozenset[str]:
        """Return the statistics through which a balance loss's gradient reaches a gate.

        Importance, load and scalars depend on both levels, whatever the gates are; any other statistic per expert
        exists only if both levels have it.
        """
        primary, secondary = self.primary_gate.differentiable_stats, self.gate.differentiable_stats
        always = {"importance_E", "load_E"}
        either = {name for name in primary | secondary if name in always or not name.endswith("_E")}
        return (primary & secondary) | either

    def adapt(self, statistics: Mapping[str, Tensor]) -> None:
        """Let the gates of both levels change their buffers by the global batch's statistics."""
        for level, gate in (("primary_", self.primary_gate), ("secondary_", self.gate)):
            gate.adapt({name.removeprefix(level): x for name, x in statistics.items() if name.startswith(level)})


@dataclass(frozen=True)
class HierarchicalGating(Gating):
    """A gating over the experts of all groups; its statistics that are not additive are computed from additive sums."""

    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """Additive sums of both levels, as primary_... and secondary_..., and `num_received_G`, |X^(i)|."""

    @classmethod
    def of_levels(cls, primary: Gating, secondary: Gating, k: int) -> "HierarchicalGating":
        """Return both levels as one gating; the tokens of `secondary` are the rows that `primary` sent.

        The gate value of an expert is G_primary(x)_i G_i(x)_j (eq. 12), the importance the sum of gate values (eq. 13).
        A row that the primary drops loses k assignments.
        """
        gate_A = primary.gate_A.index_select(0, secondary.token_A) * secondary.gate_A
        # |X^(i)| is a constant, because the gradient reaches the primary gate through its load.
        received_G = segment_sizes(primary.expert_A, primary.num_experts).to(primary.gate_A.dtype)
        parts = {"num_received_G": received_G}
        for level, gating in (("primary", primary), ("secondary", secondary)):
            parts |= {f"{level}_{name}": x for name, x in gating.statistics().items() if name != "importance_E"}
        load_E, sums = combined_statistics(parts)
        return cls(
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

    def statistics(self) -> dict[str, Tensor]:
        """Return the importance and the sums of both levels, which are additive over tokens."""
        return {"importance_E": self.importance_E, **self.parts}

    def with_statistics(self, values: Mapping[str, Tensor]) -> "HierarchicalGating":
        """Return the same gating with these statistics; load and further sums are recomputed from them."""
        parts = {name: values[name] for name in self.parts}
        load_E, sums = combined_statistics(parts)
        return replace(self, importance_E=values["importance_E"], load_E=load_E, sums=sums, parts=parts)


def combined_statistics(parts: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the load of the experts of all groups and the other statistics, from the sums of both levels.

    Load_H(X)_ij = Load_primary(X)_i Load_i(X^(i))_j / |X^(i)| (eq. 14); a group without tokens has no load. Choices and
    probabilities combine in the same way; scalars are added.
    """
    primary, secondary = (
        {name.removeprefix(level): x for name, x in parts.items() if name.startswith(level)}
        for level in ("primary_", "secondary_")
    )
    received_G = parts["num_received_G"].clamp(min=1)
    sums = {}
    for name in primary | secondary:
        values = [level[name] for level in (primary, secondary) if name in level]
        if values[0].dim() == 0:
            sums[name] = sum(values[1:], start=values[0])
        elif len(values) == 2 and name in _PRODUCTS:
            group_G, expert_GE = values[0], values[1].view(len(received_G), -1)
            sums[name] = ((group_G / received_G).unsqueeze(1) * expert_GE).reshape(-1)
    return sums.pop("load_E"), sums


def _check(k: int, primary_k: int, *, num_experts: int, num_groups: int, **sizes: int) -> None:
    sizes |= {"num_experts": num_experts, "num_groups": num_groups}
    if min(sizes.values()) < 1:
        raise ValueError(f"{' '.join(f'model.{name}={value}' for name, value in sizes.items())} must be at least 1")
    if num_experts % num_groups:
        raise ValueError(f"model.num_experts={num_experts}: must be a multiple of model.num_groups={num_groups}")
    if not 1 <= primary_k <= num_groups or not 1 <= k <= num_experts // num_groups:
        levels = f"model.k={k} at each level" if k == primary_k else f"model.k={k} and primary_k={primary_k}"
        raise ValueError(
            f"{levels}: must be at least 1, at most model.num_groups={num_groups} and at most the "
            f"{num_experts // num_groups} experts of a group"
        )
