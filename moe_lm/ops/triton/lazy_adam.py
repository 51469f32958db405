"""The update of a vocabulary matrix's touched rows on a GPU in one pass, where torch's operators make twenty.

Shape suffixes: U touched rows, V rows, D width.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_lm.ops.sparse_rows import SparseRowGrad
from moe_lm.ops.triton.rows import block_of
from moe_lm.optim.on_device import number


def update_rows_(
    matrix_VD: Tensor,
    moment_VD: Tensor,
    touched: SparseRowGrad,
    decay_U: Tensor,
    *,
    scale: Tensor | float,
    rate: float,
    beta2: float,
    correction: Tensor,
    epsilon: float,
    found_inf: Tensor | None = None,
) -> None:
    """Make of touched rows m = decay m + (1 - beta2) g^2 and w -= rate g / (sqrt(m / correction) + epsilon), in place.

    g is `scale` times the gradient. Rows are distinct; all other rows stay as they are, where `found_inf` is 1 all.
    """
    row_U, grad_UD = touched.row_U.contiguous(), touched.value_UD.contiguous()
    width = matrix_VD.shape[1]
    block = block_of(width)
    assert matrix_VD.is_contiguous()  # both are changed where they are
    assert moment_VD.is_contiguous()
    if grad_UD.numel():
        grid = len(row_U), triton.cdiv(width, block)
        numbers = number(scale, matrix_VD), number(found_inf, matrix_VD), correction.float(), rate, 1 - beta2, epsilon
        _update[grid](matrix_VD, moment_VD, row_U, grad_UD, decay_U.contiguous(), *numbers, width, BLOCK=block)


@triton.jit
def _update(
    matrix,
    moment,
    row,
    grad,
    decay,
    scale,
    found_inf,
    correction,
    rate,
    weight,
    epsilon,
    width,
    BLOCK: tl.constexpr,
):
    if tl.load(found_inf) != 0:
        return
    touched = tl.program_id(0).to(tl.int64)  # rows times width may pass 2^31
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = tl.load(row + touched) * width + column
    slope = tl.load(scale) * tl.load(grad + touched * width + column, mask=inside, other=0.0)
    square = tl.load(moment + at, mask=inside, other=0.0) * tl.load(decay + touched) + weight * slope * slope
    tl.store(moment + at, square, mask=inside)
    value = tl.load(matrix + at, mask=inside, other=0.0)
    tl.store(matrix + at, value - rate * (slope / (tl.sqrt(square / tl.load(correction)) + epsilon)), mask=inside)
