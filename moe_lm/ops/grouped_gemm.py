"""Grouped GEMM: each row times the matrix of its expert, without a launch for each expert.

PyTorch's operator is faster as long as the products are the bottleneck, but takes fewer than 1,024 matrices, all in the
type of the rows. With more experts, reading and casting the matrices is the bottleneck: Triton kernels take any number
of matrices, of any type. Kernels also compute those products for which PyTorch's operator would need another pass over
all rows, before it (a gather) or after it (a ReLU, a cast).

Shape suffixes: A rows, D inputs, H outputs, E experts.
"""

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lm.ops.operation import operation, triton_runs

max_torch_experts = 1023
"""Maximum number of experts for which PyTorch's operator computes the products even where Triton runs."""

max_outer_rows = 1536
"""Maximum mean number of rows per expert for which a Triton kernel computes the matrices' gradient even if PyTorch's
operator computes the products; with more rows, PyTorch's outer product and a cast take less time."""

_MAX_GROUPS = 1023
"""Maximum number of matrices per call: PyTorch's operator for Hopper GPUs takes fewer than 1,024."""


class ExpertRows:
    """Which rows belong to which expert: rows are sorted by expert, and the rows of expert e end at `ends_E[e]`."""

    def __init__(self, ends_E: Tensor, num_rows: int):
        self.ends_E, self.num_rows = ends_E, num_rows

    @property
    def num_experts(self) -> int:
        """Return E."""
        return len(self.ends_E)

    @cached_property
    def tiles(self):
        """The tiles of rows that Triton programs multiply."""
        from moe_lm.ops.triton.tiles import tiles_of  # Triton is not installed everywhere, and slow to import

        return tiles_of(self.ends_E, self.num_rows)

    @cached_property
    def parts(self) -> list[tuple[slice, slice, Tensor]]:
        """Experts, rows and `offs` of each call of PyTorch's operator; for several calls the host waits for the GPU."""
        ends_E = self.ends_E.to(torch.int32)
        num_parts = max(1, -(-self.num_experts // _MAX_GROUPS))  # 1,024 experts make two equal parts
        starts = [part * self.num_experts // num_parts for part in range(num_parts)]
        stops = [*starts[1:], self.num_experts]
        row_stops = [self.num_rows] if num_parts == 1 else ends_E[[stop - 1 for stop in stops]].tolist()
        experts, rows = map(slice, starts, stops), map(slice, [0, *row_stops[:-1]], row_stops)
        return [(e, r, ends_E[e] - r.start if r.start else ends_E[e]) for e, r in zip(experts, rows, strict=True)]


@operation
def cast_weights(weight_EDH: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrices in the type that `grouped_mm` needs for rows of type `dtype`. Not differentiable."""
    return weight_EDH.to(dtype)


@operation
def grouped_mm(
    x: Tensor, token_A: Tensor | None, weight_EDH: Tensor, rows: ExpertRows, *, relu: bool = False
) -> Tensor:
    """Return each row times its expert's matrix (A, H), or the ReLU of it, in the type of x. Not differentiable.

    Row a is `x[token_A[a]]` or, without tokens, `x[a]`.
    """
    y_AH = differentiable_grouped_mm.reference(_gathered(x, token_A), weight_EDH, rows)
    return y_AH.relu_() if relu else y_AH


@operation
def grouped_outer(x: Tensor, token_A: Tensor | None, grad_AH: Tensor, rows: ExpertRows, dtype: torch.dtype) -> Tensor:
    """Return x^T grad over each expert's rows (E, D, H), the gradient of its matrix; zeros for an expert without rows.

    Row a of x is as in `grouped_mm`. Not differentiable.
    """
    x_AD = _gathered(x, token_A)
    if len(rows.parts) == 1:
        return F.grouped_mm(x_AD.t(), grad_AH, offs=rows.parts[0][2]).to(dtype)
    # Each call's gradients are cast at once, so that those of all experts never exist in two types together.
    out_EDH = x.new_empty(rows.num_experts, x.shape[1], grad_AH.shape[1], dtype=dtype)
    for experts, part, ends_E in rows.parts:
        if part.stop > part.start:
            out_EDH[experts] = F.grouped_mm(x_AD[part].t(), grad_AH[part], offs=ends_E)
        else:
            out_EDH[experts] = 0
    return out_EDH


@operation
def differentiable_grouped_mm(x_AD: Tensor, weight_EDH: Tensor, rows: ExpertRows) -> Tensor:
    """Return each row times its expert's matrix (A, H) in the type of x; differentiable in rows and matrices."""
    weight_EDH = weight_EDH.to(x_AD.dtype)
    y = [
        F.grouped_mm(x_AD[part], weight_EDH[experts], offs=ends_E)
        for experts, part, ends_E in rows.parts
        if part.stop > part.start or len(rows.parts) == 1
    ]
    if not y:
        return x_AD.new_empty(0, weight_EDH.shape[2])
    return y[0] if len(y) == 1 else torch.cat(y)


def _gathered(x: Tensor, token_A: Tensor | None) -> Tensor:
    return x if token_A is None else x.index_select(0, token_A)


def _too_many_for_torch(weight_EDH: Tensor) -> bool:
    return len(weight_EDH) > max_torch_experts and triton_runs(weight_EDH)


def _triton_saves_a_pass(
    x: Tensor, token_A: Tensor | None, weight_EDH: Tensor, _: ExpertRows, relu: bool = False
) -> bool:
    return _too_many_for_torch(weight_EDH) or (token_A is not None and relu and triton_runs(x))


def _triton_makes_gradient(x: Tensor, _token_A: Tensor | None, _grad_AH: Tensor, rows: ExpertRows, *_: object) -> bool:
    few_rows = rows.num_rows <= max_outer_rows * rows.num_experts
    return (few_rows or rows.num_experts > max_torch_experts) and triton_runs(x)


_KERNELS = "moe_lm.ops.triton.grouped_gemm"
cast_weights.register(lambda weight_EDH, _: weight_EDH, when=lambda weight_EDH, _: _too_many_for_torch(weight_EDH))
grouped_mm.register(f"{_KERNELS}:grouped_mm", when=_triton_saves_a_pass)
grouped_outer.register(f"{_KERNELS}:grouped_outer", when=_triton_makes_gradient)
differentiable_grouped_mm.register(
    f"{_KERNELS}:differentiable_grouped_mm", when=lambda _, weight_EDH, __: _too_many_for_torch(weight_EDH)
)
