"""Gates: which experts each token is sent to, and how much each expert's output counts.

A gate is one file: a `Gate` whose method `choose` maps logits to a `Gating`. Matrices, groups of experts, precision,
statistics and operation counts are in the base class.

Shape suffixes: T tokens, D width, E experts (of a group, or of all groups in a `Gating`), F = E or, with noise, 2 E,
K experts a token, A assignments, G groups of experts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from moe_lm.ops.grouped_linear import grouped_linear
from moe_lm.ops.routing import TokenGroups, segment_sizes, segment_sum, stable_sort_below


@dataclass(frozen=True)
class Gating:
    """A gate's decision: a flat list of assignments, ascending by expert and then by token."""

    token_A: Tensor
    """Token of each assignment (int64)."""
    expert_A: Tensor
    """Expert of each assignment (int64)."""
    gate_A: Tensor
    """Weight of the expert's output, G(x)_i (float32)."""
    num_tokens: int
    """Number of tokens, including tokens without any expert."""
    importance_E: Tensor
    """Sum of the gate values that each expert received (eq. 6)."""
    load_E: Tensor
    """Assignments that each expert received: the smooth estimate (eq. 10) or, without noise, their number."""
    num_requested: int
    """Number of assignments that the gate asked for."""
    num_dropped: int = 0
    """Number of assignments lost to a capacity limit; the list has `num_requested` - `num_dropped`."""
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    """Further additive statistics by name, for balance losses and for the gate's `adapt`.

    For each expert: `requested_E` counts the tokens that chose it, before any capacity limit, `first_choice_E` the
    tokens that chose it first, `probability_E` sums its probabilities. Scalars: `log_z_squared` sums
    logsumexp(logits)^2 over `num_tokens` tokens.
    """

    @classmethod
    def from_choices(
        cls,
        expert_TK: Tensor,
        gate_TK: Tensor,
        num_experts: int,
        *,
        kept_TK: Tensor | None = None,
        load_E: Tensor | None = None,
        sums: Mapping[str, Tensor] | None = None,
    ) -> "Gating":
        """Return the gating of tokens that each chose K of `num_experts` experts, without choices not in `kept_TK`."""
        num_tokens, k = expert_TK.shape
        expert_A, order_A = stable_sort_below(expert_TK.reshape(-1), num_experts)
        if kept_TK is not None:
            place_A = kept_TK.reshape(-1).index_select(0, order_A).nonzero().squeeze(1)
            expert_A, order_A = expert_A.index_select(0, place_A), order_A.index_select(0, place_A)
        gate_A = gate_TK.reshape(-1).index_select(0, order_A)
        return cls(
            token_A=order_A // k,
            expert_A=expert_A,
            gate_A=gate_A,
            num_tokens=num_tokens,
            importance_E=segment_sum(gate_A, expert_A, num_experts),
            load_E=segment_sizes(expert_A, num_experts).to(gate_A.dtype) if load_E is None else load_E,
            num_requested=num_tokens * k,
            num_dropped=num_tokens * k - expert_A.numel(),
            sums=sums or {},
        )

    @property
    def num_experts(self) -> int:
        """Number of experts of all groups."""
        return self.importance_E.numel()

    def tokens_per_expert(self) -> Tensor:
        """Return how many tokens each expert takes (int64, E), after any capacity limit."""
        return segment_sizes(self.expert_A, self.num_experts)

    def num_unrouted(self) -> Tensor:
        """Return the number of tokens without any expert: dropped by all that they chose, or chosen by none."""
        routed_T = torch.zeros(self.num_tokens, dtype=torch.bool, device=self.token_A.device)
        return self.num_tokens - routed_T.index_fill_(0, self.token_A, True).sum()

    def statistics(self) -> dict[str, Tensor]:
        """Return everything that balance losses read, as sums, additive over tokens and micro-batches."""
        return {"importance_E": self.importance_E, "load_E": self.load_E, **self.sums}

    def with_statistics(self, values: Mapping[str, Tensor]) -> "Gating":
        """Return the same gating with these statistics, for example those of a larger batch."""
        sums = {name: values[name] for name in self.sums}
        return replace(self, importance_E=values["importance_E"], load_E=values["load_E"], sums=sums)


class Gate(nn.Module):
    """A gating network G(x) or, if `num_groups` is given, one for each group of experts (Appendix B).

    A subclass implements `choose` and overrides the class attributes below that do not fit it. It may also override
    `init_matrix_`, `check_k`, `logits` and `adapt`.
    """

    parameter_group: ClassVar[str] = "gates"
    """Optimizer group of the gate's parameters."""
    only_k: ClassVar[int | None] = None
    """The only k that the gate is defined for; None: any."""
    has_matrix: ClassVar[bool] = True
    """Whether the gate has a matrix W_g; without one `logits` returns zeros."""
    has_noise: bool = False
    """Whether the gate has a second matrix, W_noise; in training `logits` then also returns x W_noise (T, 2 E)."""
    differentiable_stats: frozenset[str] = frozenset({"importance_E", "log_z_squared"})
    """Statistics through which the gradient of a balance loss reaches the gate."""
    needs_loss: ClassVar[str | None] = None
    """Name of the balance loss without which the gate would not learn the numbers that it uses in evaluation."""
    non_causal_note: ClassVar[str | None] = None
    """How a training choice depends on other tokens, and what evaluation does instead; None if it does not depend."""
    required_stats: frozenset[str] | None = None
    """Statistics that the balance losses read; others are not computed. None: all are computed."""
    depends_on_length: bool = False
    """Whether the gate reads `progress`, so that its training depends on the total number of updates."""
    progress: float = 0.0
    """Fraction of all updates made before the current one; the training step sets it."""

    def __init__(
        self,
        *,
        width: int,
        num_experts: int,
        k: int,
        num_groups: int | None = None,
        init_std: float | None = None,
        temperature: float = 1.0,
        noise_scale: float = 1.0,
    ):
        """W_g begins as N(0, `init_std`^2), or by `init_matrix_`; `noise_scale` multiplies the noise, 0 omits it."""
        super().__init__()
        self.num_experts, self.k, self.num_groups = num_experts, k, num_groups
        self.init_std, self.temperature, self.noise_scale = init_std, temperature, noise_scale
        self.has_noise = self.has_noise and noise_scale > 0
        self.check_k()
        for key, value in (("gate_init_std", init_std or 0), ("gate_noise_scale", noise_scale)):
            if value and not 1e-6 <= value <= 1e6:  # beyond these, logits are lost to rounding or overflow
                raise ValueError(f"model.{key}={value}: must be 0, or at least 1e-6 and at most 1e6")
        if not 1e-6 <= temperature <= 1e6:
            raise ValueError(f"model.layers.NAME.gate_temperature={temperature}: must be at least 1e-6 and at most 1e6")
        self.assignments_per_token: float = k  # on average
        self._initial_values: dict[str, float] = {}
        shape = (width, num_experts) if num_groups is None else (num_groups, width, num_experts)
        if self.has_matrix:
            self.gate_DE = nn.Parameter(torch.empty(shape))
        if self.has_noise:
            self.noise_DE = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def check_k(self) -> None:
        """Raise ValueError unless 1 <= k <= `num_experts` and k is the one that `only_k` allows."""
        k, num_experts = self.k, self.num_experts
        if not 1 <= k <= num_experts:
            sizes = f"model.k={k} experts a token of model.num_experts={num_experts}"
            raise ValueError(f"{sizes}: k must be at least 1 and at most num_experts")
        if self.only_k is not None and k != min(self.only_k, num_experts):
            name = type(self).__module__.rpartition(".")[2]
            experts = "1 expert" if self.only_k == 1 else f"{self.only_k} experts"
            raise ValueError(
                f"the gate {name} sends a token to {experts}, not {k}: model.k={self.only_k}"
                " (or primary_k of the layer, for a primary gate)"
            )

    def register_per_expert(self, name: str, value: float, *, learned: bool = False) -> None:
        """Add one number for each expert of all groups, a parameter if `learned`, else a buffer."""
        value_E = torch.full(((self.num_groups or 1) * self.num_experts,), value)
        self.register_parameter(name, nn.Parameter(value_E)) if learned else self.register_buffer(name, value_E)
        self._initial_values[name] = value

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the matrices, and set the numbers of `register_per_expert` to their initial values."""
        for weight in self._matrices():
            if self.init_std is None or weight is not self.gate_DE:
                self.init_matrix_(weight)
            else:
                weight.normal_(0, self.init_std)
        for name, value in self._initial_values.items():
            getattr(self, name).fill_(value)

    def init_matrix_(self, weight: Tensor) -> None:
        """Draw from a truncated normal of variance 0.1 / width, as in the Switch Transformer."""
        deviation = math.sqrt(0.1 / weight.shape[-2])
        nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)

    def forward(self, x_TD: Tensor, group_T: Tensor | None = None, input_T: Tensor | None = None) -> Gating:
        """Assign tokens to experts; with groups, token t to experts of group `group_T[t]` (int64, ascending).

        `input_T` are the ids of the tokens' input words. All computations are in the matrices' type, whatever the
        autocast type.
        """
        with torch.autocast(x_TD.device.type, enabled=False):
            groups = TokenGroups(len(x_TD), self.num_experts, group_T, self.num_groups, input_T)
            dtype = self.gate_DE.dtype if self.has_matrix else torch.promote_types(x_TD.dtype, torch.float32)
            return self.choose(self.logits(x_TD.to(dtype), groups), groups)

    def logits(self, x_TD: Tensor, groups: TokenGroups) -> Tensor:
        """Return x W_g / temperature (T, E), in training with x W_noise appended for a gate with noise (T, 2 E)."""
        if not self.has_matrix:
            return x_TD.new_zeros(1, 1).expand(len(x_TD), self.num_experts)
        weight = self.gate_DE if self.temperature == 1 else self.gate_DE / self.temperature
        if self.has_noise and self.training:  # a single product, as a wide one is faster than two narrow ones
            weight = torch.cat([weight, self.noise_DE], dim=-1)
        return x_TD @ weight if groups.group_T is None else grouped_linear(x_TD, weight, groups.group_T)

    def choose(self, logit_TF: Tensor, groups: TokenGroups) -> Gating:
        """Return the gating by the gate's equation, with `token_choice` or `expert_choice`."""
        raise NotImplementedError

    def token_choice(
        self,
        expert_TK: Tensor,
        gate_TK: Tensor,
        logit_TE: Tensor,
        groups: TokenGroups,
        *,
        probability_TE: Tensor | None = None,
        kept_TK: Tensor | None = None,
        load_E: Tensor | None = None,
    ) -> Gating:
        """Return the gating of tokens that each chose K experts of their group, first choices first.

        The statistic `probability_E` sums `probability_TE` (default: Softmax of the logits). An assignment is dropped
        where `kept_TK` is false. `load_E` replaces the number of assignments as the load.
        """
        expert_TK, sums = groups.expert_numbers(expert_TK), {}
        num_experts = self.num_experts * groups.num_groups
        if self.training:
            sums = self._logit_sums(logit_TE)
            if self._computes("probability_E"):
                probability_TE = logit_TE.softmax(dim=1) if probability_TE is None else probability_TE
                zeros_E = probability_TE.new_zeros(num_experts)
                ones_TK = torch.ones_like(expert_TK, dtype=zeros_E.dtype)
                sums["requested_E"] = zeros_E.index_add(0, expert_TK.reshape(-1), ones_TK.reshape(-1))
                sums["first_choice_E"] = zeros_E.index_add(0, expert_TK[:, 0], ones_TK[:, 0])
                sums["probability_E"] = groups.sum(probability_TE).reshape(-1)
        return Gating.from_choices(expert_TK, gate_TK, num_experts, kept_TK=kept_TK, load_E=load_E, sums=sums)

    def expert_choice(
        self,
        mask_TE: Tensor,
        gate_TE: Tensor,
        logit_TE: Tensor,
        groups: TokenGroups,
        sums: Mapping[str, Tensor] | None = None,
    ) -> Gating:
        """Return the gating of experts that take the tokens where `mask_TE` is true; `sums` are for training only."""
        sums = self._logit_sums(logit_TE) | dict(sums or {}) if self.training else {}
        column_A, token_A = mask_TE.t().nonzero(as_tuple=True)
        expert_A, num_experts = column_A, self.num_experts * groups.num_groups
        if groups.group_T is not None:
            expert_A = groups.group_T.index_select(0, token_A) * self.num_experts + column_A
            expert_A, order_A = expert_A.sort(stable=True)
            column_A, token_A = column_A.index_select(0, order_A), token_A.index_select(0, order_A)
        gate_A = gate_TE.reshape(-1).index_select(0, token_A * self.num_experts + column_A)
        return Gating(
            token_A=token_A,
            expert_A=expert_A,
            gate_A=gate_A,
            num_tokens=len(mask_TE),
            importance_E=segment_sum(gate_A, expert_A, num_experts),
            load_E=segment_sizes(expert_A, num_experts).to(gate_A.dtype),
            num_requested=token_A.numel(),
            sums=sums,
        )

    def adapt(self, statistics: Mapping[str, Tensor]) -> None:
        """After an update, change buffers without gradients, by the statistics of the update's global batch alone."""

    def operations_per_timestep(self) -> int:
        """Return the multiply-adds per token in the gate's matrices; with groups, in the matrices of one group."""
        return sum(weight.numel() for weight in self._matrices()) // (self.num_groups or 1)

    def _matrices(self) -> list[nn.Parameter]:
        names = ["gate_DE"] * self.has_matrix + ["noise_DE"] * self.has_noise
        return [getattr(self, name) for name in names]

    def _computes(self, stat: str) -> bool:
        """Return whether a statistic is computed: it has a gradient to this gate, and a loss reads it."""
        return stat in self.differentiable_stats and (self.required_stats is None or stat in self.required_stats)

    def _logit_sums(self, logit_TE: Tensor) -> dict[str, Tensor]:
        if not self._computes("log_z_squared"):
            return {}
        log_z_squared = logit_TE.logsumexp(dim=1).square().sum()
        return {"log_z_squared": log_z_squared, "num_tokens": logit_TE.new_full((), logit_TE.shape[0])}
