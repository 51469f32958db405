"""The contract of an optimizer recipe, and the groups of parameters that learn by different rules and rates."""

from typing import Protocol, TypeVar

from torch import Tensor, nn

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

    def build(self, model: nn.Module) -> object:
        """Return the `CompositeOptimizer` of all the model's parameters."""
        ...

    def gradient_bytes(self, group: str, parameter: Tensor, num_rows: int) -> int:
        """Return the bytes of a parameter's gradient if a step touches `num_rows` of its rows."""
        ...

    def state_bytes(self, group: str, parameter: Tensor) -> int:
        """Return the bytes of a parameter's optimizer state."""
        ...
