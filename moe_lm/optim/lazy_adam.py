"""Adam without a first moment for the rows that a step touched: the vocabulary's two matrices.

Shape suffixes: U touched rows, V rows, D width.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from moe_lm.ops.adam import lazy_adam_, per_row
from moe_lm.ops.sparse_rows import SparseRowGrad, clear_row_grads, collect_row_grads, row_grad


class LazyAdam(torch.optim.Optimizer):
    """Adam with beta1 = 0 over whole matrices, at the cost of only the touched rows.

    With beta1 = 0 a row without gradient does not move; the decay that its second moment missed is made up for when the
    row is next touched. The state is `second_moment` (V, D), `last_step` (V) and `step`.

    The constructor makes `take_rows` leave the parameters' gradients as sparse row gradients.
    """

    scale: float = 1.0
    """Factor of the gradients in the next step: clipping by it needs no pass over them."""

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, beta2: float, epsilon: float):
        super().__init__(params, {"lr": lr, "beta2": beta2, "epsilon": epsilon})
        for group in self.param_groups:
            for matrix in group["params"]:
                collect_row_grads(matrix)

    @torch.no_grad()
    def step(self) -> None:
        """Update the rows that have a gradient; a dense gradient touches all rows."""
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix] or self._init_state(matrix)
                state["step"] += 1
                touched = row_grad(matrix)
                if matrix.grad is not None:
                    _update_all_rows(matrix, touched, state, group, self.scale)
                elif touched is not None:
                    _update_rows(matrix, touched, state, group, self.scale)
        self.scale = 1.0

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop dense and sparse gradients."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for matrix in group["params"]:
                clear_row_grads(matrix)

    def _init_state(self, matrix: nn.Parameter) -> dict[str, Tensor]:
        self.state[matrix] = {
            "step": torch.zeros(()),
            "second_moment": torch.zeros_like(matrix),
            # In the parameter's type, in which PyTorch loads all state; float32 is exact up to step 16.7 million.
            "last_step": matrix.new_zeros(matrix.shape[0]),
        }
        return self.state[matrix]


def _update_rows(
    matrix_VD: Tensor, touched: SparseRowGrad, state: dict[str, Tensor], group: dict[str, float], scale: float
) -> None:
    row_U, grad_UD, _ = touched
    step, beta2 = state["step"].item(), group["beta2"]
    decay_U = beta2 ** (step - state["last_step"].index_select(0, row_U))
    state["last_step"].index_fill_(0, row_U, step)
    settings = {name: group[name] for name in ("lr", "beta2", "epsilon")}
    moment_VD, correction = state["second_moment"], 1 - beta2**step
    lazy_adam_(matrix_VD, moment_VD, row_U, grad_UD, decay_U, correction=correction, scale=scale, **settings)


def _update_all_rows(
    matrix_VD: Tensor,
    touched: SparseRowGrad | None,
    state: dict[str, Tensor],
    group: dict[str, float],
    scale: float,
) -> None:
    """Update by a dense gradient, such as a full softmax has, plus the sparse gradient if there is one."""
    grad_VD, moment_VD = matrix_VD.grad, state["second_moment"]
    if touched is not None:
        grad_VD.index_add_(0, touched.row_U, touched.value_UD)
    if scale != 1:
        grad_VD.mul_(scale)
    step, beta2 = state["step"].item(), group["beta2"]
    decay_V = beta2 ** (step - state["last_step"])
    state["last_step"].fill_(step)
    moment_VD.mul_(per_row(decay_V, grad_VD)).addcmul_(grad_VD, grad_VD, value=1 - beta2)
    divisor_VD = (moment_VD / (1 - beta2**step)).sqrt_().add_(group["epsilon"])
    matrix_VD.addcdiv_(grad_VD, divisor_VD, value=-group["lr"])
