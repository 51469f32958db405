"""Triton kernels of `moe_lm.ops.lstm_mixed`: the work of a timestep between its products, one kernel per direction.

Sums, cells and their gradients are float32.

Shape suffixes: B sentences, U units, G = 4 U gates: input, forget, cell, output.
"""

import triton
import triton.language as tl
from torch import Tensor

_MAX_BLOCK = 512
"""Maximum number of units that one program updates; it holds some twenty numbers per unit."""


def forward_(
    pre_BG: Tensor, bias_G: Tensor, before_BU: Tensor | None, z_BG: Tensor, c_BU: Tensor, h_BU: Tensor
) -> None:
    """Compute gates before their nonlinearity, cells and outputs from the products with x and h and the previous cells.

    `z`, `c` and `h` are written. Rows of h may have any stride; all other tensors are contiguous.
    """
    grid, block = _layout(c_BU)
    sizes = c_BU.shape[1], h_BU.stride(0)
    before = c_BU if before_BU is None else before_BU  # the first timestep reads none
    _forward[grid](pre_BG, bias_G, before, z_BG, c_BU, h_BU, *sizes, FIRST=before_BU is None, BLOCK=block)


def backward_(
    grad_y_BU: Tensor,
    grad_h_BU: Tensor | None,
    z_BG: Tensor,
    c_BU: Tensor,
    before_BU: Tensor | None,
    grad_c_BU: Tensor,
    grad_z_BG: Tensor,
) -> None:
    """Compute the gates' gradients, and replace the cells' gradient by that of the previous cells.

    `grad_y` comes from the layer above, `grad_h` from the next timestep if there is one; its rows may have any stride.
    """
    grid, block = _layout(c_BU)
    after = grad_y_BU if grad_h_BU is None else grad_h_BU
    before = c_BU if before_BU is None else before_BU
    sizes = c_BU.shape[1], after.stride(0)
    _backward[grid](
        grad_y_BU,
        after,
        z_BG,
        c_BU,
        before,
        grad_c_BU,
        grad_z_BG,
        *sizes,
        FIRST=before_BU is None,
        LAST=grad_h_BU is None,
        BLOCK=block,
    )


def _layout(c_BU: Tensor) -> tuple[tuple[int, int], int]:
    """Return the grid, by sentence and by block of units, and the units of a block."""
    num_sentences, num_units = c_BU.shape
    block = min(_MAX_BLOCK, triton.next_power_of_2(num_units))
    return (num_sentences, triton.cdiv(num_units, block)), block


@triton.jit
def _tanh(x):
    # The difference would keep few digits of a small number; the first terms of the series keep them all.
    return tl.where(tl.abs(x) < 0.03, x * (1.0 - x * x / 3.0), 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def _forward(pre, bias, before, z, c, h, units, h_stride, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < units
    at = row * units + unit
    gate = row * 4 * units + unit
    i = tl.load(pre + gate, mask=inside, other=0.0).to(tl.float32) + tl.load(bias + unit, mask=inside, other=0.0)
    f = tl.load(pre + gate + units, mask=inside, other=0.0).to(tl.float32)
    f += tl.load(bias + unit + units, mask=inside, other=0.0)
    g = tl.load(pre + gate + 2 * units, mask=inside, other=0.0).to(tl.float32)
    g += tl.load(bias + unit + 2 * units, mask=inside, other=0.0)
    o = tl.load(pre + gate + 3 * units, mask=inside, other=0.0).to(tl.float32)
    o += tl.load(bias + unit + 3 * units, mask=inside, other=0.0)
    tl.store(z + gate, i.to(z.dtype.element_ty), mask=inside)
    tl.store(z + gate + units, f.to(z.dtype.element_ty), mask=inside)
    tl.store(z + gate + 2 * units, g.to(z.dtype.element_ty), mask=inside)
    tl.store(z + gate + 3 * units, o.to(z.dtype.element_ty), mask=inside)
    cell = tl.sigmoid(i) * _tanh(g)
    if not FIRST:
        cell += tl.sigmoid(f) * tl.load(before + at, mask=inside, other=0.0)
    tl.store(c + at, cell, mask=inside)
    out = tl.sigmoid(o) * _tanh(cell)
    tl.store(h + row * h_stride + unit, out.to(h.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad_y,
    grad_h,
    z,
    c,
    before,
    grad_c,
    grad_z,
    units,
    h_stride,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < units
    at = row * units + unit
    gate = row * 4 * units + unit
    i = tl.sigmoid(tl.load(z + gate, mask=inside, other=0.0).to(tl.float32))
    f = tl.sigmoid(tl.load(z + gate + units, mask=inside, other=0.0).to(tl.float32))
    g = _tanh(tl.load(z + gate + 2 * units, mask=inside, other=0.0).to(tl.float32))
    o = tl.sigmoid(tl.load(z + gate + 3 * units, mask=inside, other=0.0).to(tl.float32))
    slope = tl.load(grad_y + at, mask=inside, other=0.0).to(tl.float32)
    if not LAST:
        slope += tl.load(grad_h + row * h_stride + unit, mask=inside, other=0.0).to(tl.float32)
    shown = _tanh(tl.load(c + at, mask=inside, other=0.0))
    of_cell = slope * o * (1.0 - shown * shown)
    if not LAST:
        of_cell += tl.load(grad_c + at, mask=inside, other=0.0)
    of_f = of_cell * 0.0
    if not FIRST:
        of_f = of_cell * tl.load(before + at, mask=inside, other=0.0) * f * (1.0 - f)
    of_i = of_cell * g * i * (1.0 - i)
    of_g = of_cell * i * (1.0 - g * g)
    of_o = slope * shown * o * (1.0 - o)
    tl.store(grad_z + gate, of_i.to(grad_z.dtype.element_ty), mask=inside)
    tl.store(grad_z + gate + units, of_f.to(grad_z.dtype.element_ty), mask=inside)
    tl.store(grad_z + gate + 2 * units, of_g.to(grad_z.dtype.element_ty), mask=inside)
    tl.store(grad_z + gate + 3 * units, of_o.to(grad_z.dtype.element_ty), mask=inside)
    tl.store(grad_c + at, of_cell * f, mask=inside)
