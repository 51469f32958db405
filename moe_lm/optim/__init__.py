"""What an optimizer recipe is: hyperparameters that become optimizers once there is a model."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moe_lm.ops.backend import by_triton
from moe_lm.ops.gradient_memory import forget_gradient
from moe_lm.ops.sparse_rows import row_grad

EXPERTS, VOCABULARY, REST = KINDS = ("experts", "vocabulary", "rest")
"""Kinds of parameters; experts' matrices are divided over processes, the others are in each."""


def kind_of(name: str) -> str:
    """Return the kind of the parameter of this name: its suffix says it."""
    if name.endswith(("_EDH", "_EHD")):
        return EXPERTS
    return VOCABULARY if name.endswith(("_VD", "_V")) else REST


class OptimizerRecipe(Protocol):
    """What a YAML under `configs/optimizer` builds."""

    learning_rate: float
    """Peak of the schedule, reached at the end of warm-up."""
    clip_norm: float
    """Largest norm of the whole gradient; longer gradients are scaled down to it."""

    def build(self, model: nn.Module) -> "CompositeOptimizer":
        """Return the optimizers of all the model's parameters."""
        ...

    def gradient_bytes(self, name: str, parameter: Tensor, num_rows: int) -> int:
        """Return what this parameter's gradient takes where a step touches `num_rows` rows of the vocabulary."""
        ...

    def state_bytes(self, name: str, parameter: Tensor) -> int:
        """Return what the optimizer keeps for this parameter from step to step."""
        ...

    def keeps_rounded(self, name: str) -> bool:
        """Return whether a copy of this parameter in 16 bits, once asked for, stays from step to step."""
        ...


class CompositeOptimizer:
    """Several torch optimizers, each with parameters of its own, as one.

    One with a `scale` multiplies its gradients by it in its next step, so that clipping them is no pass of its own; one
    with `norms` knows those of some gradients from what it makes of them anyway. One with
    `decides_on_device` may leave it to the device whether its next step is made, as torch's fused ones do.
    """

    def __init__(self, parts: Sequence[Optimizer]):
        self.parts = list(parts)

    @property
    def param_groups(self) -> list[dict]:
        """Return the parameter groups of all parts; a rate written into them counts."""
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """Return each parameter's state by name; a parameter without any is left out."""
        return {parameter: state for part in self.parts for parameter, state in part.state.items()}

    def load(self, state: Mapping[nn.Parameter, dict[str, Tensor]]) -> None:
        """Take over the state that `state` returned."""
        for part in self.parts:
            parameters = [parameter for group in part.param_groups for parameter in group["params"]]
            indexed = {i: state[parameter] for i, parameter in enumerate(parameters) if parameter in state}
            part.load_state_dict({"state": indexed, "param_groups": part.state_dict()["param_groups"]})

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of all parts."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def norm(self, parameters: Iterable[nn.Parameter] | None = None) -> Tensor:
        """Return the norm of the gradient of these parameters (of all)."""
        chosen = self.parameters if parameters is None else list(parameters)
        known: dict[nn.Parameter, Tensor] = {}
        for part in self.parts:
            known |= part.norms(chosen) if hasattr(part, "norms") else {}
        others = _gradients(parameter for parameter in chosen if parameter not in known)
        if not known:
            return nn.utils.get_total_norm(others, foreach=True)
        norms = [*known.values(), *(torch._foreach_norm(others) if others else [])]
        return torch.linalg.vector_norm(torch.stack(norms))

    @torch.no_grad()
    def clip(self, limit: float, had: float) -> None:
        """Scale the whole gradient down to the norm `limit` if the one that it had is longer."""
        factor = 1.0 if had <= limit else limit / had
        for part in self.parts:
            if hasattr(part, "scale"):
                part.scale = factor
            elif factor < 1:  # not times 1: a pass over all gradients
                torch._foreach_mul_(_gradients(p for group in part.param_groups for p in group["params"]), factor)

    def decides_on_device(self) -> bool:
        """Return whether `clip_on_device` counts for every part, with the gradients that there are."""
        of_torch = (part for part in self.parts if not hasattr(part, "decides_on_device"))
        ours = (part for part in self.parts if hasattr(part, "decides_on_device"))
        return all(part.decides_on_device() for part in ours) and all(
            by_triton(parameter) for part in of_torch for group in part.param_groups for parameter in group["params"]
        )

    @torch.no_grad()
    def clip_on_device(self, limit: float, had: Tensor, made: Tensor) -> None:
        """Do what `clip` does in the next step, without waiting for the norm; where it is not to be `made`, nothing."""
        found_inf, divisor = 1 - made.float(), (had.float() / limit).clamp(min=1)
        for part in self.parts:
            part.found_inf = found_inf
            if hasattr(part, "scale"):
                part.scale = 1 / divisor
            else:
                part.grad_scale = divisor  # torch's fused Adam divides by it

    def step(self) -> None:
        """Update every parameter."""
        for part in self.parts:
            part.step()
        self._forget_scales()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            forget_gradient(parameter)
        for part in self.parts:
            part.zero_grad(set_to_none=True)
        self._forget_scales()

    def _forget_scales(self) -> None:
        for part in self.parts:
            part.found_inf = None
            if hasattr(part, "scale"):
                part.scale = 1.0
            else:
                part.grad_scale = None


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return what there is of gradients, of whole parameters and of touched rows."""
    both = ((parameter.grad, row_grad(parameter)) for parameter in parameters)
    return [grad for whole, rows in both for grad in (whole, rows and rows.value_UD) if grad is not None]
