"""Adam updates without a first moment: with a factored second moment (experts), or of touched rows only (vocabulary).

Shape suffixes: M matrices (experts), R rows, C columns, N rows of a chunk; U touched rows, V rows, D width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_lm.ops.operation import operation, triton_runs

_CHUNK_ON_CPU = 1 << 20
"""Numbers in the largest temporary on a CPU: 4 MiB stay in a cache; a quarter or four times as much is slower."""
_CHUNK_ELSEWHERE = 1 << 22
"""Numbers in the largest temporary on a GPU, where a kernel launch costs more than a cache saves."""


@operation
def square_means(g_MRC: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared gradient's means over columns (M, R) and over rows (M, C)."""
    square_MRC = g_MRC.square()
    return square_MRC.mean(dim=2), square_MRC.mean(dim=1)


@operation
def factored_adam_(
    w_MRC: Tensor,
    g_MRC: Tensor,
    row_MR: Tensor,
    column_MC: Tensor,
    known_means: tuple[Tensor, Tensor] | None = None,  # noqa: ARG001
    *,
    step: float,
    lr: float,
    beta2: float,
    epsilon: float,
    scale: float,
) -> None:
    """Update weights and moving averages r (`row_MR`) and c (`column_MC`) in place, from `scale` times the gradient.

        V = r c^T / mean(r) / (1 - beta2^step)        w -= lr g / (sqrt(V) + epsilon)

    `step` counts from 1. `known_means` are `square_means` of the unscaled gradient, for versions that can use them.
    This version walks over the matrices in chunks that fit a cache, and scales the gradient in place.
    """
    if not w_MRC.numel():
        return
    correction = 1 - beta2**step
    rows, columns = w_MRC.shape[1:]
    size = _CHUNK_ON_CPU if w_MRC.is_cpu else _CHUNK_ELSEWHERE
    scratch = w_MRC.new_empty(min(w_MRC.numel(), max(size, columns)))
    chunks = (tensor.split(max(1, size // (rows * columns))) for tensor in (w_MRC, g_MRC, row_MR, column_MC))
    for weight, gradient, row, column in zip(*chunks, strict=True):
        if scale != 1:
            gradient.mul_(scale)
        _update_means_(gradient, row, column, 1 - beta2, scratch)
        row_root_MR, column_root_MC = factored_roots(row, column, correction)
        for part in _row_slices(gradient, scratch):
            g_MNC = gradient[:, part]
            divisor_MNC = _view_of(scratch, g_MNC)
            torch.mul(row_root_MR[:, part, None], column_root_MC[:, None], out=divisor_MNC)
            weight[:, part].addcdiv_(g_MNC, divisor_MNC.add_(epsilon), value=-lr)


def factored_roots(row_MR: Tensor, column_MC: Tensor, correction: float) -> tuple[Tensor, Tensor]:
    """Return a (M, R) and b (M, C) with sqrt(V) = a b^T."""
    # The averages of a matrix that never had a gradient are all 0, and 0 / smallest number is still 0.
    mean_M1 = row_MR.mean(dim=1, keepdim=True).clamp_min_(torch.finfo(row_MR.dtype).tiny)
    return (row_MR / mean_M1).sqrt_(), (column_MC / correction).sqrt_()


def _update_means_(g_MRC: Tensor, row_MR: Tensor, column_MC: Tensor, weight: float, scratch: Tensor) -> None:
    """Move the averages towards this gradient's mean squares."""
    sum_MC = torch.zeros_like(column_MC)
    for part in _row_slices(g_MRC, scratch):
        g_MNC = g_MRC[:, part]
        square_MNC = torch.mul(g_MNC, g_MNC, out=_view_of(scratch, g_MNC))
        row_MR[:, part].lerp_(square_MNC.mean(dim=2), weight)
        sum_MC += square_MNC.sum(dim=1)
    column_MC.lerp_(sum_MC.div_(g_MRC.shape[1]), weight)


def _row_slices(g_MRC: Tensor, scratch: Tensor) -> Iterator[slice]:
    """Yield slices of rows that fit the scratch: all rows, or some of a single large matrix."""
    matrices, rows, columns = g_MRC.shape
    size = max(1, scratch.numel() // (matrices * columns))
    for start in range(0, rows, size):
        yield slice(start, start + size)


def _view_of(scratch: Tensor, like: Tensor) -> Tensor:
    return scratch[: like.numel()].view(like.shape)


@operation
def lazy_adam_(
    matrix_VD: Tensor,
    moment_VD: Tensor,
    row_U: Tensor,
    grad_UD: Tensor,
    decay_U: Tensor,
    *,
    correction: float,
    lr: float,
    beta2: float,
    epsilon: float,
    scale: float,
) -> None:
    """Update the touched rows and their second moments in place, from `scale` times the gradient.

        m = decay m + (1 - beta2) g^2        w -= lr g / (sqrt(m / correction) + epsilon)

    Touched rows are distinct; vectors (V) are matrices of width 1. This version scales the gradient in place.
    """
    if scale != 1:
        grad_UD.mul_(scale)
    moment_UD = moment_VD.index_select(0, row_U)
    moment_UD.mul_(per_row(decay_U, grad_UD)).addcmul_(grad_UD, grad_UD, value=1 - beta2)
    moment_VD.index_copy_(0, row_U, moment_UD)
    divisor_UD = moment_UD.div_(correction).sqrt_().add_(epsilon)
    matrix_VD.index_add_(0, row_U, grad_UD / divisor_UD, alpha=-lr)


def per_row(factor_U: Tensor, value_UD: Tensor) -> Tensor:
    """Return factors, one per row, in a shape that broadcasts over the values of each row."""
    return factor_U.view(-1, *[1] * (value_UD.dim() - 1))


def _runs_in_kernel(x: Tensor, *_: object, **__: object) -> bool:
    return x.dim() > 1 and x.dtype == torch.float32 and x.numel() > 0 and triton_runs(x)


for update in (square_means, factored_adam_, lazy_adam_):
    update.register(f"moe_lm.ops.triton.adam:{update.__name__}", when=_runs_in_kernel)
