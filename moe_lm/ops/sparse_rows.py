"""Rows taken from matrices too large to be updated whole at every step, and gradients for these rows alone.

Shape suffixes: T taken rows or ids, U unique ones, V rows or possible ids, D width (V alone: a vector counts as a
matrix of width 1).
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe_lm.ops.operation import operation, triton_runs
from moe_lm.ops.routing import segment_ends, stable_sort_below

_MAX_TABLE_RATIO = 8
"""Possible ids per given id up to which a lookup table is faster than a sort."""


def unique_inverse(id_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct ids (int64, ascending), and the index of each id among them.

    On one CPU thread, 300,000 ids of up to 800,000 possible ones take 2.2 ms by the table and 5.4 ms by torch's sort.
    """
    bound = int(id_T.max()) + 1 if len(id_T) else 0
    if bound > _MAX_TABLE_RATIO * len(id_T):
        return id_T.unique(return_inverse=True)
    id_U = id_T.new_zeros(bound, dtype=torch.bool).index_fill_(0, id_T, True).nonzero().squeeze(1)
    index_V = id_T.new_empty(bound).index_copy_(0, id_U, torch.arange(len(id_U), device=id_T.device))
    return id_U, index_V.index_select(0, id_T)


class SparseRowGrad(NamedTuple):
    """The gradient of some rows of a matrix, whose other rows have a gradient of zero."""

    row_U: Tensor
    """The rows' numbers: int64, ascending, unique."""
    value_UD: Tensor
    """The rows' gradients."""
    host_U: Tensor | None = None
    """The rows' numbers in the host's memory, if they are known there."""


class RowSparseParameter(nn.Parameter):
    """A matrix or vector whose gradient may be kept for only the rows that `take_rows` took, instead of densely.

    Copies, pickles and loaded state dicts keep the type. `nn.Module.to` keeps the parameter itself; where PyTorch
    replaces parameters (`to_empty` of a module on the meta device), a `RowSparseModule` keeps the type.
    """

    sparse_grad: bool
    """Whether `take_rows` adds gradients to `row_grads` instead of a dense `.grad`; the optimizer decides."""
    row_grads: list[SparseRowGrad]
    """Parts of the sparse gradient since `clear_row_grads`; `row_grad` returns their sum."""

    def __new__(cls, data: Tensor, requires_grad: bool = True, sparse_grad: bool = False) -> "RowSparseParameter":
        """Return a parameter with these numbers, as `nn.Parameter` does."""
        parameter = super().__new__(cls, data.detach(), requires_grad)
        parameter.sparse_grad, parameter.row_grads = sparse_grad, []
        return parameter

    def __deepcopy__(self, memo: dict[int, Any]) -> "RowSparseParameter":
        if id(self) not in memo:
            memo[id(self)] = RowSparseParameter(self.detach().clone(), self.requires_grad, self.sparse_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: int) -> tuple:
        return RowSparseParameter, (self.detach(), self.requires_grad, self.sparse_grad)


class RowSparseModule(nn.Module):
    """A module whose row-sparse parameters keep their type where PyTorch would replace them by plain parameters."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RowSparseModule":
        before = dict(self._parameters)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._parameters[name]
            if isinstance(old, RowSparseParameter) and not isinstance(new, RowSparseParameter):
                self._parameters[name] = RowSparseParameter(new, new.requires_grad, old.sparse_grad)
        return self


class UniqueIndices:
    """Numbers of rows to take from several matrices; the unique numbers are found only once.

    `host_T` holds the same numbers in the host's memory if `row_T` is on a GPU; without it the host waits for the GPU
    to count the unique ones. `unique` may be given if it is known.
    """

    def __init__(
        self, row_T: Tensor, host_T: Tensor | None = None, unique: tuple[Tensor, Tensor, Tensor | None] | None = None
    ):
        if unique is not None:
            self.unique = unique
        self.row_T = row_T
        self._host_T = row_T if host_T is None and row_T.device.type == "cpu" else host_T

    @cached_property
    def unique(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The unique rows, ascending, each taken row's index among them, and the unique rows in the host's memory."""
        if self._host_T is None:
            return *self.row_T.unique(return_inverse=True), None
        host_U, inverse_T = unique_inverse(self._host_T)
        return *(copy_to_device(x, self.row_T.device) for x in (host_U, inverse_T)), host_U

    @cached_property
    def sorted(self) -> tuple[Tensor, Tensor]:
        """The taken rows' places in the order of unique rows (int64, T), and each unique row's end (int64, U)."""
        row_U, inverse_T, _ = self.unique
        sorted_T, order_T = stable_sort_below(inverse_T, len(row_U))
        return order_T, segment_ends(sorted_T, len(row_U))

    @property
    def is_found(self) -> bool:
        """Whether the unique rows are known already."""
        return "unique" in vars(self)

    def map(self, function: Callable[[Tensor], Tensor]) -> "UniqueIndices":
        """Return the indices with `function` (such as a copy to a device) applied; the host's tensors stay the same."""
        unique = None
        if self.is_found:
            row_U, inverse_T, host_U = self.unique
            unique = function(row_U), function(inverse_T), host_U
        return UniqueIndices(function(self.row_T), self._host_T, unique)

    def preceded_by(self, row_S: Tensor) -> Tensor | None:
        """Return `row_S` followed by these rows, in the host's memory; None if the host does not know these rows."""
        return None if self._host_T is None else torch.cat([row_S, self._host_T])


def copy_to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return the host's tensor on this device, without a wait for the GPU's earlier work."""
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


def collect_row_grads(parameter: nn.Parameter) -> None:
    """Make `take_rows` leave this parameter's gradient in `row_grads`; a plain parameter changes its class."""
    if not isinstance(parameter, RowSparseParameter):
        parameter.__class__ = RowSparseParameter
        parameter.row_grads = []
    parameter.sparse_grad = True


def take_rows(matrix_VD: Tensor, rows: Tensor | UniqueIndices) -> Tensor:
    """Return the rows (T, D), differentiable in the matrix.

    Calls for several matrices share a `UniqueIndices`, so that the unique rows are found once.
    """
    taken = rows if isinstance(rows, UniqueIndices) else UniqueIndices(rows)
    if torch.is_grad_enabled() and isinstance(matrix_VD, RowSparseParameter) and matrix_VD.sparse_grad:
        return _TakeRows.apply(matrix_VD, taken)
    row_T = taken.row_T
    return F.embedding(row_T, matrix_VD) if matrix_VD.dim() == 2 else matrix_VD.index_select(0, row_T)


def row_grad(matrix_VD: Tensor) -> SparseRowGrad | None:
    """Return the summed gradient of all rows taken since `clear_row_grads`, None if there are none."""
    parts = matrix_VD.row_grads if isinstance(matrix_VD, RowSparseParameter) else []
    while len(parts) > 1:
        parts.append(_merge(parts.pop(), parts.pop()))
    return parts[0] if parts else None


def set_row_grad(matrix_VD: RowSparseParameter, gradient: SparseRowGrad) -> None:
    """Replace the gradient that `row_grad` returns, for example by the gradient of a larger batch."""
    matrix_VD.row_grads[:] = [gradient]


def clear_row_grads(matrix_VD: RowSparseParameter) -> None:
    """Drop the sparse gradient."""
    matrix_VD.row_grads.clear()


def sum_duplicate_rows(row_T: Tensor, grad_TD: Tensor) -> SparseRowGrad:
    """Return the gradient of rows that may have been taken several times."""
    return _gradient_of(UniqueIndices(row_T), grad_TD)


class _TakeRows(torch.autograd.Function):
    """A gather whose backward pass makes no dense matrix: it adds the gradient to the parameter's `row_grads`."""

    @staticmethod
    def forward(ctx, matrix_VD, taken):
        ctx.matrix_VD, ctx.taken = matrix_VD, taken
        _ = taken.unique  # found now, while a GPU still has enough to do
        return matrix_VD.index_select(0, taken.row_T)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD):
        _add_part(ctx.matrix_VD.row_grads, _gradient_of(ctx.taken, grad_TD))
        return None, None


def _add_part(parts: list[SparseRowGrad], part: SparseRowGrad) -> None:
    """Add a part, after merging it with the last part as long as that has at most twice as many rows.

    Each part then has more than twice the rows of the next. Together the parts never hold more than twice the rows
    touched, however many micro-batches there are, and a row is moved only a few times.
    """
    while parts and len(parts[-1].row_U) <= 2 * len(part.row_U):
        part = _merge(part, parts.pop())
    parts.append(part)


def _merge(a: SparseRowGrad, b: SparseRowGrad) -> SparseRowGrad:
    host_T = None if a.host_U is None or b.host_U is None else torch.cat([a.host_U, b.host_U])
    rows = UniqueIndices(torch.cat([a.row_U, b.row_U]), host_T)
    return _gradient_of(rows, torch.cat([a.value_UD, b.value_UD]))


def _gradient_of(taken: UniqueIndices, grad_TD: Tensor) -> SparseRowGrad:
    row_U, _, host_U = taken.unique
    return SparseRowGrad(row_U, _sum_by_unique(grad_TD, taken), host_U)


@operation
def _sum_by_unique(grad_TD: Tensor, taken: UniqueIndices) -> Tensor:
    """Return the sum of each unique row's gradients (U, D)."""
    row_U, inverse_T, _ = taken.unique
    return grad_TD.new_zeros(len(row_U), *grad_TD.shape[1:]).index_add_(0, inverse_T, grad_TD)


def _sum_by_kernel(grad_TD: Tensor, taken: UniqueIndices) -> Tensor:
    from moe_lm.ops.triton.rows import sum_segments  # Triton is not installed everywhere, and slow to import

    value_UD = sum_segments(grad_TD.unsqueeze(1).flatten(1), *taken.sorted)  # a vector is a matrix of width 1
    return value_UD.view(-1, *grad_TD.shape[1:])


_sum_by_unique.register(_sum_by_kernel, when=lambda grad_TD, _: grad_TD.dtype == torch.float32 and triton_runs(grad_TD))
