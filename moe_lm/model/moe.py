"""The sparsely-gated mixture-of-experts layer (section 2), applied to all tokens of a batch at once (3.1).

Shape suffixes: T tokens, A assignments, D width, H expert hidden, E experts.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from moe_lm.data.batch import PaddedLayout
from moe_lm.gate import Gate, Gating
from moe_lm.model import Layer, checked_init_scale, output_activation_of
from moe_lm.model.feed_forward import FeedForward
from moe_lm.ops.experts import moe_mlp
from moe_lm.ops.init import init_experts_


class Experts(nn.Module):
    """E_i(x) = ReLU(x W1_i) W2_i and their gate-weighted sum; one tensor holds W1 of all experts, another W2."""

    parameter_group = "experts"

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        num_experts: int,
        group_size: int = 1,
        held: range | None = None,
        output_init_scale: float = 1.0,
        identical: bool = False,
    ):
        """`group_size` consecutive experts are one group of a hierarchical layer.

        The module holds only the matrices of the experts in `held`, by default of all experts. W2 begins at
        `output_init_scale` times its usual deviation, and all experts begin as copies of the first if `identical`.
        """
        super().__init__()
        self.num_experts, self.group_size, self.identical = num_experts, group_size, identical
        self.output_init_scale = checked_init_scale(output_init_scale)
        self.held = range(num_experts) if held is None else held
        self.recompute = False
        """Whether the backward pass recomputes the hidden activations instead of keeping them (Appendix D)."""
        self.w1_EDH = nn.Parameter(torch.empty(len(self.held), width, hidden))
        self.w2_EHD = nn.Parameter(torch.empty(len(self.held), hidden, width))
        self.reset_parameters()

    @property
    def width(self) -> int:
        """Size of a token's vector, D."""
        return self.w1_EDH.shape[1]

    @property
    def hidden(self) -> int:
        """Hidden units of one expert, H."""
        return self.w1_EDH.shape[2]

    def reset_parameters(self) -> None:
        """Draw uniformly with variance 2/fan-in before the ReLU and 1/fan-in after it."""
        self._draw(self.w1_EDH, math.sqrt(2 / self.width))
        self._draw(self.w2_EHD, self.output_init_scale * math.sqrt(1 / self.hidden))

    @torch.no_grad()
    def _draw(self, weight_E: Tensor, std: float) -> None:
        if not self.identical:
            init_experts_(weight_E, std, self.held)
            return
        first = weight_E.new_empty(1, *weight_E.shape[1:])
        init_experts_(first, std, range(1))
        weight_E.copy_(first.expand_as(weight_E))

    def forward(self, x_TD: Tensor, gating: Gating) -> Tensor:
        """Return y_TD = sum_i G(x)_i E_i(x) over a token's experts (eq. 1); zeros for a token without experts."""
        assignments = gating.token_A, gating.expert_A, gating.gate_A
        return moe_mlp(x_TD, *assignments, self.w1_EDH, self.w2_EHD, recompute=self.recompute)

    def operations_per_row(self) -> int:
        """Return the multiply-adds of one expert for one token."""
        return 2 * self.width * self.hidden


def set_recompute(model: nn.Module, on: bool) -> None:
    """Set for all experts of a model whether the backward pass recomputes their hidden activations."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.recompute = on


class Mixture(Layer):
    """What flat and hierarchical mixtures share: routed experts, shared experts, and the activation on top.

    `num_shared_experts` experts that every token uses are added to the sum with weight 1 (DeepSeekMoE, Dai et al. 2024,
    arXiv 2401.06066, section 3.2). They are one dense layer of as many times the hidden units.
    """

    experts: Experts
    shared: FeedForward | None

    def add_experts(
        self,
        *,
        width: int,
        hidden: int,
        num_experts: int,
        group_size: int = 1,
        output_activation: str,
        output_init_scale: float,
        num_shared_experts: int,
        identical_experts: bool,
    ) -> None:
        """Build the experts; a constructor calls it after it has built the gates, whose weights are drawn first."""
        if num_shared_experts < 0:
            raise ValueError(f"model.num_shared_experts={num_shared_experts}: must be at least 0")
        sizes = {"width": width, "output_init_scale": output_init_scale}
        self.experts = Experts(
            hidden=hidden, num_experts=num_experts, group_size=group_size, identical=identical_experts, **sizes
        )
        self.shared = None
        if num_shared_experts:
            self.shared = FeedForward(
                hidden=num_shared_experts * hidden, num_hidden=1, output_activation="none", **sizes
            )
        self.output_activation = output_activation_of(output_activation)

    def reset_parameters(self) -> None:
        """Draw the parameters of the gates, the experts and the shared experts, in this order."""
        for gate in self.gates().values():
            gate.reset_parameters()
        self.experts.reset_parameters()
        if self.shared is not None:
            self.shared.reset_parameters()

    def output(self, x_TD: Tensor, gating: Gating, layout: PaddedLayout) -> Tensor:
        """Return y_TD = f(sum_i G(x)_i E_i(x) + shared experts), with f the output activation."""
        y_TD = self.experts(x_TD, gating)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD, layout)[0]
        return self.output_activation(y_TD)

    def shared_operations(self) -> int:
        """Return the multiply-adds per token of the shared experts."""
        return 0 if self.shared is None else self.shared.operations_per_timestep()


class MoE(Mixture):
    """y = f(sum_i G(x)_i E_i(x)) (eq. 1), where f is `output_activation`, a sigmoid in the paper (Appendix C.1)."""

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        num_experts: int,
        k: int,
        gate: Callable[..., Gate],
        gate_init_std: float | None = None,
        gate_noise_scale: float = 1.0,
        gate_temperature: float = 1.0,
        output_activation: str = "sigmoid",
        output_init_scale: float = 1.0,
        num_shared_experts: int = 0,
        identical_experts: bool = False,
    ):
        super().__init__()
        if min(width, hidden, num_experts) < 1:
            raise ValueError(
                f"model.width={width} model.expert_hidden={hidden} model.num_experts={num_experts} must be at least 1"
            )
        self.gate = gate(
            width=width,
            num_experts=num_experts,
            k=k,
            init_std=gate_init_std,
            temperature=gate_temperature,
            noise_scale=gate_noise_scale,
        )
        self.add_experts(
            width=width,
            hidden=hidden,
            num_experts=num_experts,
            output_activation=output_activation,
            output_init_scale=output_init_scale,
            num_shared_experts=num_shared_experts,
            identical_experts=identical_experts,
        )
        self.token_share = self.assignments_per_token / num_experts

    def gates(self) -> dict[str, Gate]:
        """Return the one gate."""
        return {"gate": self.gate}

    def forward(self, x_TD: Tensor, layout: PaddedLayout) -> tuple[Tensor, Gating]:
        """Return the mixture's output and its gating."""
        gating = self.gate(x_TD, input_T=layout.input_T)
        return self.output(x_TD, gating, layout), gating

    def operations_per_timestep(self) -> int:
        """Return the multiply-adds of the gate and of the experts that a token is sent to on average."""
        experts = round(self.assignments_per_token * self.experts.operations_per_row())
        return experts + self.shared_operations() + self.gate.operations_per_timestep()

    @property
    def assignments_per_token(self) -> float:
        """Return the mean number of experts that a token is sent to."""
        return self.gate.assignments_per_token

    @property
    def differentiable_stats(self) -> frozenset[str]:
        """Return the statistics through which a balance loss's gradient reaches the gate."""
        return self.gate.differentiable_stats

    def adapt(self, statistics: Mapping[str, Tensor]) -> None:
        """Let the gate change its buffers by the global batch's statistics."""
        self.gate.adapt(statistics)
