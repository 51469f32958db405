"""Adam without first moment for the rows that a step touched: the vocabulary's two matrices.

Shape suffixes: U touched rows, V rows, D width.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from moe_lm.ops.backend import by_triton
from moe_lm.ops.sparse_rows import SparseRowGrad, clear_row_grads, collect_row_grads, row_grad
from moe_lm.optim.on_device import counted, kept


class LazyAdam(torch.optim.Optimizer):
    """Equals Adam with beta1 = 0 over the whole matrices, at the cost of the touched rows alone.

    With beta1 = 0 a row without gradient does not move; what its second moment would have decayed meanwhile is
    made up when the row is next touched. State: `second_moment` (V, D), `last_step` (V), `step`.
    """

    scale: float | Tensor = 1.0
    """What the next step multiplies the gradients by; on the device where `found_inf` is."""
    found_inf: Tensor | None = None
    """Whether the next step changes nothing (`moe_lm.optim.on_device`); where kernels run, and for rows alone."""

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, beta2: float, epsilon: float):
        super().__init__(params, {"lr": lr, "beta2": beta2, "epsilon": epsilon})
        for group in self.param_groups:
            for matrix in group["params"]:
                collect_row_grads(matrix)

    @torch.no_grad()
    def step(self) -> None:
        """Update the rows that have a gradient; a gradient of the whole matrix touches all rows."""
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix] or self._begin(matrix)
                touched = row_grad(matrix)
                if matrix.grad is None and _in_kernels(matrix):
                    _update_on_device(matrix, touched, state, group, self.scale, self.found_inf)
                    continue
                state["step"] += 1
                if matrix.grad is not None:
                    _update_all(matrix, touched, state, group, self.scale)
                elif touched is not None:
                    _update(matrix, touched, state, group, self.scale)
        self.scale, self.found_inf = 1.0, None

    def decides_on_device(self) -> bool:
        """Return whether `found_inf` counts for the gradients that there are."""
        every = [matrix for group in self.param_groups for matrix in group["params"]]
        return all(matrix.grad is None and _in_kernels(matrix) for matrix in every)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of both forms."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for matrix in group["params"]:
                clear_row_grads(matrix)

    def _begin(self, matrix: nn.Parameter) -> dict[str, Tensor]:
        self.state[matrix] = {
            "step": torch.zeros(()),
            "second_moment": torch.zeros_like(matrix),
            # Steps as float32 numbers, exact up to 16.7 million: torch loads any state in the parameter's type.
            "last_step": matrix.new_zeros(matrix.shape[0]),
        }
        return self.state[matrix]


def _update_all(
    matrix_VD: Tensor, more: SparseRowGrad | None, state: dict[str, Tensor], settings: dict, scale: float
) -> None:
    """Every row has a gradient, as of a full softmax; rows taken beside it are added."""
    grad_VD, moment_VD = matrix_VD.grad, state["second_moment"]
    if more is not None:
        grad_VD.index_add_(0, more.row_U, more.value_UD)
    if scale != 1:
        grad_VD.mul_(scale)
    step, beta2 = state["step"].item(), settings["beta2"]
    decay_V = beta2 ** (step - state["last_step"])
    state["last_step"].fill_(step)
    moment_VD.mul_(_of_rows(decay_V, grad_VD)).addcmul_(grad_VD, grad_VD, value=1 - beta2)
    deviation_VD = (moment_VD / (1 - beta2**step)).sqrt_().add_(settings["epsilon"])
    matrix_VD.addcdiv_(grad_VD, deviation_VD, value=-settings["lr"])


def _in_kernels(matrix_VD: Tensor) -> bool:
    return by_triton(matrix_VD) and matrix_VD.dtype == torch.float32


def _of_rows(factor_U: Tensor, value_UD: Tensor) -> Tensor:
    return factor_U.view(-1, *[1] * (value_UD.dim() - 1))


def _update(matrix_VD: Tensor, touched: SparseRowGrad, state: dict[str, Tensor], settings: dict, scale: float) -> None:
    row_U, grad_UD, _ = touched
    step, beta2 = state["step"].item(), settings["beta2"]
    decay_U = beta2 ** (step - state["last_step"].index_select(0, row_U))
    state["last_step"].index_fill_(0, row_U, step)
    if scale != 1:
        grad_UD.mul_(scale)
    moment_UD = state["second_moment"].index_select(0, row_U)
    moment_UD.mul_(_of_rows(decay_U, grad_UD)).addcmul_(grad_UD, grad_UD, value=1 - beta2)
    state["second_moment"].index_copy_(0, row_U, moment_UD)
    deviation_UD = moment_UD.div_(1 - beta2**step).sqrt_().add_(settings["epsilon"])
    matrix_VD.index_add_(0, row_U, grad_UD / deviation_UD, alpha=-settings["lr"])


def _update_on_device(
    matrix_VD: Tensor,
    touched: SparseRowGrad | None,
    state: dict[str, Tensor],
    settings: dict,
    scale: Tensor | float,
    found_inf: Tensor | None,
) -> None:
    """Do what `_update` does, with no number that the host knows; matrices by one pass in a kernel."""
    step, beta2 = counted(state, matrix_VD, found_inf), settings["beta2"]
    if touched is None:
        return
    row_U, last_V, correction = touched.row_U, state["last_step"], 1 - beta2**step
    last_U = last_V.index_select(0, row_U)
    decay_U = beta2 ** (state["step"] - last_U)
    last_V.index_copy_(0, row_U, kept(state["step"].expand_as(last_U), last_U, found_inf))
    numbers = {"scale": scale, "rate": settings["lr"], "epsilon": settings["epsilon"], "found_inf": found_inf}
    if matrix_VD.dim() == 2:
        from moe_lm.ops.triton.lazy_adam import update_rows_  # Triton is not everywhere, and slow to import

        update_rows_(matrix_VD, state["second_moment"], touched, decay_U, beta2=beta2, correction=correction, **numbers)
        return
    slope_U, before_U = touched.value_UD * scale, state["second_moment"].index_select(0, row_U)
    square_U = (before_U * _of_rows(decay_U, slope_U)).addcmul_(slope_U, slope_U, value=1 - beta2)
    state["second_moment"].index_copy_(0, row_U, kept(square_U, before_U, found_inf))
    change_U = slope_U / (square_U / correction).sqrt_().add_(settings["epsilon"])
    matrix_VD.index_add_(0, row_U, kept(change_U, 0.0, found_inf), alpha=-settings["lr"])
