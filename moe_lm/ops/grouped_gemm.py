"""Grouped GEMM: each row times the matrix of its expert, without a launch for each expert.

torch's operator is the faster one as long as products bound it, but takes fewer than 1,024 matrices, and in the type of
the rows alone. Beyond, where the matrices' reading and casting bound it, our kernels take any number, as they are.
Beside torch's products they make those that would else need passes over all rows, before or after.

Shape suffixes: T tokens, A rows, D inputs, H outputs, E experts.
"""

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe_lm.ops.backend import by_triton
from moe_lm.ops.rounded import rounded
from moe_lm.ops.squares import note_squares, wants_squares

most_in_torch = 1023
"""Experts whose products are torch's, at most, where there are our kernels."""

most_rows_of_outer = 1536
"""Rows that a mean expert may have for our kernel to make its gradient beside torch's products: of more it takes longer
than torch's outer product, which is cast afterwards."""

_MOST_GROUPS = 1023
"""Of one grouped product: torch's for Hopper takes fewer than 1,024."""


class Grouped(Protocol):
    """Products of rows that are sorted by expert."""

    def cast(self, weight_EDH: Tensor) -> Tensor:
        """Return the matrices as the products take them. Not differentiable."""
        ...

    def products(self, x: Tensor, token_A: Tensor | None, weight_EDH: Tensor, *, relu: bool = False) -> Tensor:
        """Return each row times its expert's matrix (A, H); `relu`: of it the ReLU. Not differentiable.

        Row a is `x[token_A[a]]` or, without tokens, `x[a]`.
        """
        ...

    def outer_products(self, x: Tensor, token_A: Tensor | None, grad_AH: Tensor, of_EDH: Tensor) -> Tensor:
        """Return the gradient of these matrices, x^T grad of an expert's rows, in their type; zeros for one without."""
        ...

    def differentiable(self, x_AD: Tensor, weight_EDH: Tensor) -> Tensor:
        """Return each row times its expert's matrix (A, H), differentiable in both, in the rows' type."""
        ...


def grouped_by(ends_E: Tensor, num_rows: int, dtype: torch.dtype, *, sparing: bool = False) -> Grouped:
    """Return the products in this type of so many rows, those of expert e ending at `ends_E[e]`.

    `sparing`: of memory; no copy of the matrices stays from step to step.
    """
    if len(ends_E) > most_in_torch and by_triton(ends_E):
        return InKernels(ends_E, num_rows, dtype, sparing=sparing)
    return _InTorch(ends_E.to(torch.int32), num_rows, dtype, sparing)


def _kept(weight_EDH: Tensor, dtype: torch.dtype, sparing: bool) -> Tensor:
    """Return the matrices' copy in this type, where the optimizer keeps one, or they themselves."""
    kept_EDH = None if sparing else rounded(weight_EDH, dtype)
    return weight_EDH if kept_EDH is None else kept_EDH


class _InTorch:
    """Of more experts than it takes several products are made; the host then waits for where their rows end."""

    def __init__(self, ends_E: Tensor, num_rows: int, dtype: torch.dtype, sparing: bool):
        self._dtype, self._ends_E, self._num_rows, self._sparing = dtype, ends_E, num_rows, sparing
        num_experts = len(ends_E)
        num_parts = max(1, -(-num_experts // _MOST_GROUPS))  # of 1,024 experts not one part of 1,023 and one of 1
        firsts = [part * num_experts // num_parts for part in range(num_parts)]
        lasts = [*firsts[1:], num_experts]
        stops = [num_rows] if num_parts == 1 else ends_E[[last - 1 for last in lasts]].tolist()
        experts, rows = map(slice, firsts, lasts), map(slice, [0, *stops[:-1]], stops)
        self._parts = list(zip(experts, rows, strict=True))

    def cast(self, weight_EDH: Tensor) -> Tensor:
        return _kept(weight_EDH, self._dtype, self._sparing).to(self._dtype)

    def products(self, x: Tensor, token_A: Tensor | None, weight_EDH: Tensor, *, relu: bool = False) -> Tensor:
        if token_A is not None and relu and by_triton(x):  # which gathers by itself, and takes the ReLU
            return self._in_kernels.products(x, token_A, weight_EDH, relu=True)
        y_AH = self.differentiable(_rows(x, token_A), weight_EDH)
        return y_AH.relu_() if relu else y_AH

    def outer_products(self, x: Tensor, token_A: Tensor | None, grad_AH: Tensor, of_EDH: Tensor) -> Tensor:
        if self._num_rows <= most_rows_of_outer * len(self._ends_E) and by_triton(x):
            return self._in_kernels.outer_products(x, token_A, grad_AH, of_EDH)
        x_AD = _rows(x, token_A)
        if len(self._parts) == 1:
            return F.grouped_mm(x_AD.t(), grad_AH, offs=self._ends_E).to(of_EDH.dtype)
        # Of many experts never all are in two types.
        made_EDH = torch.empty_like(of_EDH, memory_format=torch.contiguous_format, requires_grad=False)
        for experts, rows in self._parts:
            if rows.stop > rows.start:
                made_EDH[experts] = F.grouped_mm(x_AD[rows].t(), grad_AH[rows], offs=self._offsets(experts, rows))
            else:
                made_EDH[experts] = 0
        return made_EDH

    def differentiable(self, x_AD: Tensor, weight_EDH: Tensor) -> Tensor:
        weight_EDH = weight_EDH.to(x_AD.dtype)
        made = [
            F.grouped_mm(x_AD[rows], weight_EDH[experts], offs=self._offsets(experts, rows))
            for experts, rows in self._parts
            if rows.stop > rows.start or len(self._parts) == 1
        ]
        if not made:
            return x_AD.new_empty(0, weight_EDH.shape[2])
        return made[0] if len(made) == 1 else torch.cat(made)

    @cached_property
    def _in_kernels(self) -> "InKernels":
        return InKernels(self._ends_E, self._num_rows, self._dtype)

    def _offsets(self, experts: slice, rows: slice) -> Tensor:
        ends_E = self._ends_E[experts]
        return ends_E - rows.start if rows.start else ends_E


def _rows(x: Tensor, token_A: Tensor | None) -> Tensor:
    return x if token_A is None else x.index_select(0, token_A)


class InKernels:
    """By Triton, of any number of experts: neither rows nor matrices are copied, and the host waits for nothing."""

    def __init__(self, ends_E: Tensor, num_rows: int, dtype: torch.dtype, *, sparing: bool = False):
        from moe_lm.ops.triton.tiles import tiles_of  # Triton is not everywhere, and slow to import

        self._tiles, self._dtype, self._sparing = tiles_of(ends_E, num_rows), dtype, sparing

    def cast(self, weight_EDH: Tensor) -> Tensor:
        return _kept(weight_EDH, self._dtype, self._sparing)  # what is not rounded the products round by themselves

    def products(self, x: Tensor, token_A: Tensor | None, weight_EDH: Tensor, *, relu: bool = False) -> Tensor:
        from moe_lm.ops.triton.products import products

        return products(x, token_A, weight_EDH, self._tiles, relu=relu)

    def outer_products(self, x: Tensor, token_A: Tensor | None, grad_AH: Tensor, of_EDH: Tensor) -> Tensor:
        from moe_lm.ops.triton.outer_products import outer_products

        wanted = wants_squares(of_EDH)
        grad_EDH, squares = outer_products(x, token_A, grad_AH, self._tiles, of_EDH.dtype, squares=wanted)
        if squares is not None:
            note_squares(of_EDH, grad_EDH, squares)
        return grad_EDH

    def differentiable(self, x_AD: Tensor, weight_EDH: Tensor) -> Tensor:
        return _InKernels.apply(x_AD, weight_EDH, self)


class _InKernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_AD, weight_EDH, by):
        cast_EDH = by.cast(weight_EDH)
        ctx.save_for_backward(x_AD, cast_EDH)
        ctx.by, ctx.weight_EDH = by, weight_EDH  # itself: a checkpoint hands back another tensor of the same numbers
        return by.products(x_AD, None, cast_EDH)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_AH):
        x_AD, cast_EDH = ctx.saved_tensors
        of_x, of_weight, _ = ctx.needs_input_grad
        grad_x_AD = ctx.by.products(grad_AH, None, cast_EDH.mT) if of_x else None
        return grad_x_AD, ctx.by.outer_products(x_AD, None, grad_AH, ctx.weight_EDH) if of_weight else None, None
