"""Each expert's matrix product with its own rows, one expert after another: on a CPU.

On one thread of an Intel processor a product of few rows is cut into pieces of the matrix: MKL takes up to twice as
long for the whole one there, with several threads or on an AMD processor less (docs/performance.md).

Shape suffixes: R rows, D width, H expert hidden, E experts.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor

_FEW, _PIECE, _WIDE = range(24, 177), 64, 1024
"""Rows for which pieces of this many of a matrix's rows are faster, where its own are at least so wide."""

_OUTER_FEW, _OUTER_PIECE = range(44, 193), 128
"""Rows for which pieces of this many of an outer product's rows are faster."""


def products(x_RD: Tensor, sizes: list[int], w_EDH: Tensor, out_RH: Tensor) -> Tensor:
    """Fill each expert's rows of `out_RH` with the product of its rows of x and its matrix; return it."""
    cut = _cuts() and w_EDH.shape[1] > _PIECE and w_EDH.shape[2] >= _WIDE and w_EDH.stride(2) == 1
    for x, weight, out in zip(x_RD.split(sizes), w_EDH.unbind(), out_RH.split(sizes), strict=True):
        if cut and len(x) in _FEW:
            first, *others = zip(x.split(_PIECE, dim=1), weight.split(_PIECE), strict=True)
            torch.mm(*first, out=out)
            for piece in others:
                out.addmm_(*piece)
        else:
            torch.mm(x, weight, out=out)
    return out_RH


def outer_products(x_RD: Tensor, sizes: list[int], grad_RH: Tensor, out_EDH: Tensor) -> None:
    """Fill each expert's matrix with the product of its rows' transpose and gradients; one of no rows with zeros."""
    cut = _cuts() and out_EDH.shape[1] > _OUTER_PIECE
    for x, grad, out in zip(x_RD.split(sizes), grad_RH.split(sizes), out_EDH.unbind(), strict=True):
        if cut and len(x) in _OUTER_FEW:
            for columns, piece in zip(x.t().split(_OUTER_PIECE), out.split(_OUTER_PIECE), strict=True):
                torch.mm(columns, grad, out=piece)
        else:
            torch.mm(x.t(), grad, out=out)


def _cuts() -> bool:
    return torch.get_num_threads() == 1 and _on_intel()


@functools.cache
def _on_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux
        return False
