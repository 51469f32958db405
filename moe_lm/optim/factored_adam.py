"""Adam without a first moment and with a factored second moment, for the experts' matrices (Appendix D).

Shape suffixes: M matrices (experts), R rows, C columns.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_lm.ops.adam import factored_adam_, square_means
from moe_lm.ops.operation import triton_runs


class FactoredAdam(torch.optim.Optimizer):
    """Adam with beta1 = 0 that averages the squared gradient's row and column means, not every number's square.

    For each matrix, r and c are moving averages of the squared gradient's means over columns and over rows,

        V = r c^T / mean(r) / (1 - beta2^t)        w -= lr g / (sqrt(V) + epsilon)

    which equals Adam's own V if that has rank one. A parameter's last two dimensions are a matrix, so each expert of
    an (E, D, H) tensor has its own factorisation. The state of E D H numbers is `row_mean` (E, D), `column_mean` (E, H)
    and `step`: 4 E (D + H) + 4 bytes in float32. A matrix that gets no gradient (an expert without tokens) stays as it
    is while its averages decay.

    Raises `ValueError` for a parameter with fewer than two dimensions.
    """

    scale: float = 1.0
    """Factor of the gradients in the next step: clipping by it needs no pass over them."""

    def __init__(self, params: Iterable[Tensor] | Iterable[dict], *, lr: float, beta2: float, epsilon: float):
        super().__init__(params, {"lr": lr, "beta2": beta2, "epsilon": epsilon})
        self._square_means: dict[Tensor, _SquareMeans] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own; raises `ValueError` for one that is no matrix."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dim() < 2:
                raise ValueError(f"a second moment of shape {tuple(parameter.shape)} cannot be factored")

    @torch.no_grad()
    def norms(self, parameters: Iterable[Tensor]) -> dict[Tensor, Tensor]:
        """Return the gradient norms of the parameters that a kernel updates.

        They come from the mean squares that the next step needs too, so that one pass over the gradients serves both.
        """
        own = {parameter for group in self.param_groups for parameter in group["params"]}
        found = {}
        for parameter in parameters:
            gradient = parameter.grad
            if parameter in own and gradient is not None and gradient.numel() and triton_runs(gradient):
                means = square_means(_merge_leading(gradient, 2))
                self._square_means[parameter] = _SquareMeans(means, gradient, gradient._version)
                found[parameter] = (means[0].sum() * gradient.shape[-1]).sqrt()
        return found

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient; return what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        self._square_means.clear()
        self.scale = 1.0
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and what `norms` keeps of them."""
        super().zero_grad(set_to_none)
        self._square_means.clear()

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter] or self._init_state(parameter)
        state["step"] += 1
        settings = {name: group[name] for name in ("lr", "beta2", "epsilon")}
        factored_adam_(
            _merge_leading(parameter, 2),
            _merge_leading(parameter.grad, 2),
            _merge_leading(state["row_mean"], 1),
            _merge_leading(state["column_mean"], 1),
            self._known_means(parameter),
            step=state["step"].item(),
            scale=self.scale,
            **settings,
        )

    def _known_means(self, parameter: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the mean squares that `norms` computed, unless the gradient has changed since."""
        known = self._square_means.get(parameter)
        if known is None or known.gradient is not parameter.grad or known.version != parameter.grad._version:
            return None
        return known.means

    def _init_state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["row_mean"] = parameter.new_zeros(parameter.shape[:-1])
        state["column_mean"] = parameter.new_zeros(*parameter.shape[:-2], parameter.shape[-1])
        return state


class _SquareMeans(NamedTuple):
    means: tuple[Tensor, Tensor]
    """Means of the squared gradient over columns (M, R) and over rows (M, C)."""
    gradient: Tensor
    """The gradient that they belong to."""
    version: int
    """The gradient's version counter at that time; PyTorch increments it with every in-place change."""


def _merge_leading(tensor: Tensor, dims: int) -> Tensor:
    """Return the tensor with all dimensions before the last `dims` merged into one."""
    return tensor.unsqueeze(0).flatten(0, -dims - 1)
