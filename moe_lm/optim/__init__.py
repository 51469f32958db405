"""The contract of an optimizer recipe, and several PyTorch optimizers that update one model together."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moe_lm.ops.sparse_rows import row_grad

_T = TypeVar("_T")

EXPERTS, GATES, FEED_FORWARD, VOCABULARY, REST = "experts", "gates", "feed_forward", "vocabulary", "rest"
"""Groups of parameters, as modules declare them by `parameter_group`."""


def parameter_groups(model: nn.Module) -> dict[str, str]:
    """Return the group of each parameter by name, as declared by its module or else the nearest module around it."""
    return _declared(model, "parameter_group", REST)


def token_shares(model: nn.Module) -> dict[str, float]:
    """Return by parameter name the share of the batch's tokens that reach one expert, or one expert's gate column.

    Modules declare it as `token_share`; the parameters of other modules are reached by every token (1.0).
    """
    return _declared(model, "token_share", 1.0)


def _declared(model: nn.Module, attribute: str, default: _T) -> dict[str, _T]:
    found: dict[str, _T] = {}

    def visit(module: nn.Module, prefix: str, inherited: _T) -> None:
        value = getattr(module, attribute, inherited)
        found.update({f"{prefix}{name}": value for name, _ in module.named_parameters(recurse=False)})
        for name, child in module.named_children():
            visit(child, f"{prefix}{name}.", value)

    visit(model, "", default)
    return {name: found[name] for name, _ in model.named_parameters()}


class OptimizerRecipe(Protocol):
    """What a YAML under `configs/optimizer` builds: hyperparameters that become optimizers once there is a model."""

    learning_rate: float
    """Peak of the schedule, reached at the end of warm-up."""
    clip_norm: float
    """Largest global gradient norm; longer gradients are scaled down to it."""

    def build(self, model: nn.Module) -> "CompositeOptimizer":
        """Return the optimizers of all the model's parameters."""
        ...

    def gradient_bytes(self, group: str, parameter: Tensor, num_rows: int) -> int:
        """Return the bytes of a parameter's gradient if a step touches `num_rows` of its rows."""
        ...

    def state_bytes(self, group: str, parameter: Tensor) -> int:
        """Return the bytes of a parameter's optimizer state."""
        ...


class CompositeOptimizer:
    """Several PyTorch optimizers, each with parameters of its own, as one.

    An optimizer with a `scale` multiplies its gradients by it in its next step, so that clipping needs no pass of its
    own. An optimizer with `norms` returns the norms of gradients that it has to square anyway.
    """

    def __init__(self, parts: Sequence[Optimizer]):
        self.parts = list(parts)

    @property
    def param_groups(self) -> list[dict]:
        """Return the parameter groups of all parts; a group's `rate` is its factor of the learning rate."""
        return [group for part in self.parts for group in part.param_groups]

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the next step."""
        for group in self.param_groups:
            group["lr"] = learning_rate * group["rate"]

    @property
    def state(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """Return each parameter's state by name; a parameter without state is left out."""
        return {parameter: state for part in self.parts for parameter, state in part.state.items()}

    def load(self, state: Mapping[nn.Parameter, dict[str, Tensor]]) -> None:
        """Restore what `state` returned."""
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
        """Return the gradient norm of these parameters, by default of all."""
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
    def clip(self, max_norm: float, norm: float) -> None:
        """Scale the gradient, whose global norm is `norm`, down to `max_norm` if it is longer."""
        factor = 1.0 if norm <= max_norm else max_norm / norm
        for part in self.parts:
            if hasattr(part, "scale"):
                part.scale = factor
            elif factor < 1:  # a factor of 1 would be a pass over all gradients for nothing
                torch._foreach_mul_(_gradients(p for group in part.param_groups for p in group["params"]), factor)

    def step(self) -> None:
        """Update every parameter."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Drop all gradients, and a clipping factor that no step has used."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)
            if hasattr(part, "scale"):
                part.scale = 1.0


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return the gradients that exist, dense ones and those of touched rows."""
    both = ((parameter.grad, row_grad(parameter)) for parameter in parameters)
    return [grad for dense, rows in both for grad in (dense, rows and rows.value_UD) if grad is not None]
