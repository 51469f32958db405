"""Steps of FactoredAdam and LazyAdam, to compare Triton kernels in float32 with PyTorch in float64.

Shape suffixes: U touched rows, V rows, D width.
"""

import torch
from torch import Tensor, nn

from moe_lm.ops.sparse_rows import SparseRowGrad, set_row_grad
from moe_lm.optim.factored_adam import FactoredAdam
from moe_lm.optim.lazy_adam import LazyAdam

MATRICES = [
    (3, 5, 7),
    (2, 130, 9),
    (1, 70, 1500),
    (64, 33),
    (2, 3, 64, 32),
    (4, 8, 1024),
    (2, 9, 1030),
    (1, 1, 1),
    (0, 4, 4),
]
"""Shapes with sizes that are no powers of two, several parts and blocks; lists of matrices, a single one, none."""

VOCABULARIES = [(12, 3), (40, 512), (9, 1030), (5, 1)]

SETTINGS = {"lr": 0.05, "beta2": 0.9, "epsilon": 1e-3}


def factored_steps(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Return weights and both averages after four steps at changing rates; the last of several matrices is idle."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
    optimizer = FactoredAdam([weight], **SETTINGS)
    for step in range(4):
        gradient = torch.randn(shape, generator=generator) * 3.0**-step
        gradient[..., :1] = 0
        if len(shape) > 2 and shape[0] > 1:
            gradient[-1] = 0
        optimizer.param_groups[0]["lr"] = 0.05 / (1 + step)
        # Contiguous and transposed gradients in turn.
        weight.grad = gradient.to(device, dtype) if step % 2 else gradient.mT.contiguous().to(device, dtype).mT
        if step == 1:
            optimizer.norms([weight])  # the step uses its mean squares
        if step == 2:
            optimizer.norms([weight])
            weight.grad.mul_(2)  # now the step must not use them
            optimizer.scale = 0.25
        optimizer.step()
    state = optimizer.state[weight]
    return [x.detach().cpu().double() for x in (weight, state["row_mean"], state["column_mean"])]


def lazy_steps(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Return matrix, second moment and last steps after six steps that touch few rows or none, some after a gap."""
    generator = torch.Generator().manual_seed(0)
    matrix = nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
    optimizer = LazyAdam([matrix], **SETTINGS)
    for step in range(6):
        row_U = torch.randperm(shape[0], generator=generator)[: (3 * step) % shape[0]].sort().values
        value_UD = torch.randn(len(row_U), *shape[1:], generator=generator) * 3.0**-step
        optimizer.param_groups[0]["lr"] = 0.05 / (1 + step)
        optimizer.scale = 0.25 if step == 4 else 1.0
        value_UD = value_UD.to(device, dtype)
        if step % 2:  # not contiguous
            value_UD = value_UD.unsqueeze(-1).expand(*value_UD.shape, 2).contiguous()[..., 0]
        set_row_grad(matrix, SparseRowGrad(row_U.to(device), value_UD))
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state[matrix]
    return [x.detach().cpu().double() for x in (matrix, state["second_moment"], state["last_step"])]
