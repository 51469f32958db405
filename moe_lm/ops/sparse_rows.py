"""Rows of a matrix too large to be updated whole at every step: a gradient for the rows that were taken.

Shape suffixes: T taken rows, U distinct rows, V rows, D width (V alone: a vector counts as a matrix of width 1).
"""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe_lm.data.unique import unique_inverse
from moe_lm.ops.backend import by_triton
from moe_lm.ops.token_rows import Places, places


class SparseRowGrad(NamedTuple):
    """The gradient of a matrix of which all other rows' gradients are zero."""

    row_U: Tensor
    """int64, ascending, distinct."""
    value_UD: Tensor
    host_U: Tensor | None = None
    """The same rows in the host's memory, where it knows them."""


class UniqueIndices:
    """Rows to take of several matrices, whose distinct ones are found once.

    Of rows on a GPU `host_T` are the same in the host's memory: without them the host waits for the GPU to say how
    many are distinct. `found` may be given.
    """

    def __init__(
        self, row_T: Tensor, host_T: Tensor | None = None, found: tuple[Tensor, Tensor, Tensor | None] | None = None
    ):
        if found is not None:
            self.found = found
        self.row_T = row_T
        self._host_T = row_T if host_T is None and row_T.device.type == "cpu" else host_T

    @cached_property
    def found(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The distinct rows, ascending, where among them each taken one is, and the former as the host has them."""
        if self._host_T is None:
            return *self.row_T.unique(return_inverse=True), None
        host_U, place_T = unique_inverse(self._host_T)
        return *(sent(x, self.row_T.device) for x in (host_U, place_T)), host_U

    @cached_property
    def places(self) -> Places:
        """Where those of each distinct row are among the taken ones."""
        row_U, place_T, _ = self.found
        return places(place_T, len(row_U))


def sent(x: Tensor, device: torch.device) -> Tensor:
    """Return what the host made on this device, without a wait for what a GPU has to do before."""
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


def collect_row_grads(matrix_VD: nn.Parameter) -> None:
    """From now on `take_rows` leaves the matrix's gradient in `row_grad`, not in `.grad`."""
    matrix_VD.row_grads = []


def take_rows(matrix_VD: Tensor, rows: Tensor | UniqueIndices) -> Tensor:
    """Return the rows (T, D), differentiable in the matrix; matrices of which the same are taken share a `UniqueIndices`."""
    taken = rows if isinstance(rows, UniqueIndices) else UniqueIndices(rows)
    row_T = taken.row_T
    if torch.is_grad_enabled() and hasattr(matrix_VD, "row_grads"):
        return _Take.apply(matrix_VD, taken)
    return F.embedding(row_T, matrix_VD) if matrix_VD.dim() == 2 else matrix_VD.index_select(0, row_T)


def row_grad(matrix_VD: Tensor) -> SparseRowGrad | None:
    """Return the summed gradient of all rows taken since `clear_row_grads`, None if there were none."""
    parts = getattr(matrix_VD, "row_grads", [])
    while len(parts) > 1:
        parts.append(_joined(parts.pop(), parts.pop()))
    return parts[0] if parts else None


def set_row_grad(matrix_VD: Tensor, gradient: SparseRowGrad) -> None:
    """Let `row_grad` return this one, as of a larger batch."""
    matrix_VD.row_grads[:] = [gradient]


def clear_row_grads(matrix_VD: Tensor) -> None:
    """Drop what `row_grad` returns."""
    if hasattr(matrix_VD, "row_grads"):
        matrix_VD.row_grads.clear()


def _keep(parts: list[SparseRowGrad], part: SparseRowGrad) -> None:
    """Add a part, joined with the last ones while these are no more than twice its size.

    Each part is then larger than twice the next: together they never take more than twice the rows touched, however
    many micro-batches there are, and a row is moved a few times only.
    """
    while parts and len(parts[-1].row_U) <= 2 * len(part.row_U):
        part = _joined(part, parts.pop())
    parts.append(part)


def _joined(a: SparseRowGrad, b: SparseRowGrad) -> SparseRowGrad:
    host_T = None if a.host_U is None or b.host_U is None else torch.cat([a.host_U, b.host_U])
    rows = UniqueIndices(torch.cat([a.row_U, b.row_U]), host_T)
    return _summed(rows, torch.cat([a.value_UD, b.value_UD]))


def summed_rows(row_T: Tensor, grad_TD: Tensor) -> SparseRowGrad:
    """Return the gradient of rows that were taken several times."""
    return _summed(UniqueIndices(row_T), grad_TD)


def _summed(taken: UniqueIndices, grad_TD: Tensor) -> SparseRowGrad:
    row_U, place_T, host_U = taken.found
    if by_triton(grad_TD) and grad_TD.dtype == torch.float32:
        from moe_lm.ops.triton.rows import summed_runs  # Triton is not everywhere, and slow to import

        value_UD = summed_runs(grad_TD.unsqueeze(1).flatten(1), *taken.places)  # of a vector columns of one
        return SparseRowGrad(row_U, value_UD.view(len(row_U), *grad_TD.shape[1:]), host_U)
    value_UD = grad_TD.new_zeros(len(row_U), *grad_TD.shape[1:]).index_add_(0, place_T, grad_TD)
    return SparseRowGrad(row_U, value_UD, host_U)


class _Take(torch.autograd.Function):
    """A gather whose backward pass makes no matrix of the whole size; it hands the gradient over by itself."""

    @staticmethod
    def forward(ctx, matrix_VD, taken):
        ctx.matrix_VD, ctx.taken = matrix_VD, taken
        _ = taken.found  # now, while a GPU still has enough to do
        return matrix_VD.index_select(0, taken.row_T)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD):
        _keep(ctx.matrix_VD.row_grads, _summed(ctx.taken, grad_TD))
        return None, None
