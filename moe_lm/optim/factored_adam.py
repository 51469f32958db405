"""Adam without a first moment and with a factored second moment, for the experts' matrices (Appendix D).

Shape suffixes: M matrices (experts), R rows, C columns, N rows taken at a time.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from moe_lm.ops.backend import by_triton
from moe_lm.ops.rounded import changed_together, keep_rounded, kept_rounded
from moe_lm.ops.squares import Squares, squares_of, want_squares
from moe_lm.optim.on_device import counted, kept

NUMBERS_ON_CPU = 1 << 20
"""Largest temporary on a CPU: 4 MiB stay in a cache; a quarter or four times as much took a third longer."""
NUMBERS_ELSEWHERE = 1 << 22
"""Largest temporary on a GPU, where a launch costs more than a cache saves."""


class FactoredAdam(torch.optim.Optimizer):
    """Adam with beta1 = 0 that keeps row and column means of the squared gradient in place of every number's.

    Per matrix r and c are moving averages of the squared gradient's means over columns and over rows,

        V = r c^T / mean(r) / (1 - beta2^t)        w -= lr g / (sqrt(V) + epsilon)

    which is Adam's own V where that has rank one. A parameter's last two dimensions are a matrix, so experts of
    (E, D, H) have one factorisation each. The state of E D H numbers is `row_mean` (E, D), `column_mean` (E, H)
    and `step`: 4 E (D + H) + 4 bytes in float32. A matrix that gets no gradient (an expert without tokens) stays
    as it is while its averages decay.

    Raises `ValueError` for a parameter with fewer than two dimensions.
    """

    scale: float | Tensor = 1.0
    """What the next step multiplies the gradients by; on the device where `found_inf` is."""
    found_inf: Tensor | None = None
    """Whether the next step changes nothing (`moe_lm.optim.on_device`); where kernels update all parameters."""

    def __init__(self, params: Iterable[Tensor] | Iterable[dict], *, lr: float, beta2: float, epsilon: float):
        super().__init__(params, {"lr": lr, "beta2": beta2, "epsilon": epsilon})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own; raises `ValueError` for one that is no matrix."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dim() < 2:
                raise ValueError(f"a second moment of shape {tuple(parameter.shape)} cannot be factored")
            want_squares(parameter)
            keep_rounded(parameter)

    @torch.no_grad()
    def norms(self, parameters: Iterable[Tensor]) -> dict[Tensor, Tensor]:
        """Return the norms of those gradients whose squares the step takes from memory (`moe_lm.ops.squares`)."""
        own = {parameter for group in self.param_groups for parameter in group["params"]}
        return {
            parameter: (squares_of(parameter, _squares).row_MR.sum() * parameter.shape[-1]).sqrt()
            for parameter in parameters
            if parameter in own and parameter.grad is not None and _in_kernels(parameter)
        }

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
                    state = self.state[parameter] or self._begin(parameter)
                    if _in_kernels(parameter):
                        _update_in_kernels(parameter, state, group, self.scale, self.found_inf)
                    else:
                        _update_by_parts(parameter, state, group, self.scale)
        self.scale, self.found_inf = 1.0, None
        return loss

    def decides_on_device(self) -> bool:
        """Return whether `found_inf` counts for all parameters."""
        every = [parameter for group in self.param_groups for parameter in group["params"]]
        return all(_in_kernels(parameter) or not parameter.numel() for parameter in every)

    def _begin(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["row_mean"] = parameter.new_zeros(parameter.shape[:-1])
        state["column_mean"] = parameter.new_zeros(*parameter.shape[:-2], parameter.shape[-1])
        return state


def _in_kernels(parameter: Tensor) -> bool:
    return by_triton(parameter) and parameter.dtype == torch.float32 and parameter.numel() > 0


def _update_in_kernels(
    parameter: Tensor,
    state: dict[str, Tensor],
    group: dict[str, Any],
    scale: float | Tensor,
    found_inf: Tensor | None,
) -> None:
    """Without temporaries of the matrices' size: one pass over them, to change them and their rounded copy."""
    from moe_lm.ops.triton.factored_adam import divide_

    squares, copy = squares_of(parameter, _squares), kept_rounded(parameter)
    w_MRC, g_MRC = _as_list_of(2, parameter), _as_list_of(2, parameter.grad)
    row_MR, column_MC = _as_list_of(1, state["row_mean"]), _as_list_of(1, state["column_mean"])
    for mean, new in ((row_MR, squares.row_MR), (column_MC, squares.column_MC)):
        mean.copy_(kept(mean.lerp(new * scale**2, 1 - group["beta2"]), mean, found_inf))
    correction = 1 - group["beta2"] ** counted(state, parameter, found_inf)
    roots = _roots(row_MR, column_MC, correction)
    copy_MRC = None if copy is None else _as_list_of(2, copy)
    numbers = {"scale": scale, "found_inf": found_inf, "rate": group["lr"], "epsilon": group["epsilon"]}
    divide_(w_MRC, g_MRC, *roots, copy_MRC, **numbers)
    changed_together(parameter, copy)


def _squares(gradient: Tensor) -> Squares:
    """Return their means by one pass over the gradient."""
    from moe_lm.ops.triton.factored_adam import square_means  # Triton is not everywhere, and slow to import

    return square_means(_as_list_of(2, gradient))


def _roots(row_MR: Tensor, column_MC: Tensor, correction: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return a and b of sqrt(V) = a b^T."""
    # Of a matrix that never had a gradient all are 0, and 0 / smallest number is still 0.
    whole_M1 = row_MR.mean(dim=1, keepdim=True).clamp_min_(torch.finfo(row_MR.dtype).tiny)
    return (row_MR / whole_M1).sqrt_(), (column_MC / correction).sqrt_()


def _update_by_parts(parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any], scale: float) -> None:
    """Walk over the matrices, several small ones or a part of a large one at a time."""
    state["step"] += 1
    if not parameter.numel():
        return
    correction = 1 - group["beta2"] ** state["step"].item()
    *_, rows, columns = parameter.shape
    numbers = NUMBERS_ON_CPU if parameter.is_cpu else NUMBERS_ELSEWHERE
    scratch = parameter.new_empty(min(parameter.numel(), max(numbers, columns)))
    matrices = max(1, numbers // (rows * columns))
    tensors = (_as_list_of(2, parameter), _as_list_of(2, parameter.grad))
    means = (_as_list_of(1, state["row_mean"]), _as_list_of(1, state["column_mean"]))
    parts = zip(*(tensor.split(matrices) for tensor in (*tensors, *means)), strict=True)
    for w_MRC, g_MRC, row_MR, column_MC in parts:
        if scale != 1:
            g_MRC.mul_(scale)
        _update_means(g_MRC, row_MR, column_MC, 1 - group["beta2"], scratch)
        a_MR, b_MC = _roots(row_MR, column_MC, correction)
        for some in _slices_of_rows(g_MRC, scratch):
            g_MNC = g_MRC[:, some]
            divisor_MNC = _like(g_MNC, scratch)
            torch.mul(a_MR[:, some, None], b_MC[:, None], out=divisor_MNC)
            w_MRC[:, some].addcdiv_(g_MNC, divisor_MNC.add_(group["epsilon"]), value=-group["lr"])


def _update_means(g_MRC: Tensor, row_MR: Tensor, column_MC: Tensor, weight: float, scratch: Tensor) -> None:
    """Move the averages towards this gradient's, in place."""
    sum_MC = torch.zeros_like(column_MC)
    for some in _slices_of_rows(g_MRC, scratch):
        g_MNC = g_MRC[:, some]
        square_MNC = torch.mul(g_MNC, g_MNC, out=_like(g_MNC, scratch))
        row_MR[:, some].lerp_(square_MNC.mean(dim=2), weight)
        sum_MC += square_MNC.sum(dim=1)
    column_MC.lerp_(sum_MC.div_(g_MRC.shape[1]), weight)


def _slices_of_rows(g_MRC: Tensor, scratch: Tensor) -> Iterator[slice]:
    """Yield slices of rows that fit the scratch: all at once, or of a single large matrix some at a time."""
    matrices, rows, columns = g_MRC.shape
    at_a_time = max(1, scratch.numel() // (matrices * columns))
    for start in range(0, rows, at_a_time):
        yield slice(start, start + at_a_time)


def _like(tensor: Tensor, scratch: Tensor) -> Tensor:
    return scratch[: tensor.numel()].view(tensor.shape)


def _as_list_of(dims: int, tensor: Tensor) -> Tensor:
    """Return the tensor with all dimensions before the last `dims` made one."""
    return tensor.unsqueeze(0).flatten(0, -dims - 1)
