"""Copies of matrices in 16 bits, for products: kept by the optimizer, whose pass over the matrices writes them too.

Cast anew, or read in 32 bits, matrices of 4 billion parameters are 17 GB more to move each time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Copy:
    tensor: Tensor
    version: int
    of: int
    """Address of the parameter's numbers, as `.data` may be others."""

    def __reduce__(self) -> tuple:
        return type(None), ()  # a saved parameter has none


def keep_rounded(parameter: Tensor) -> None:
    """From now on let a copy, once asked for, stay with the parameter; whoever writes both says `refreshed`."""
    parameter.rounded = None


def rounded(parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the parameter's copy in this type; None where nobody keeps one, or where the parameter has that type.

    It is made anew where torch knows that the parameter was changed otherwise.
    """
    if not hasattr(parameter, "rounded") or parameter.dtype == dtype:
        return None
    copy = parameter.rounded
    if copy is None or copy.tensor.dtype != dtype or not _is_of(copy, parameter):
        parameter.rounded = None  # its memory first
        refreshed(parameter, parameter.detach().to(dtype))
    return parameter.rounded.tensor


def kept_rounded(parameter: Tensor) -> Tensor | None:
    """Return the copy that there is, whatever is in it, to be written."""
    copy = getattr(parameter, "rounded", None)
    return copy.tensor if copy is not None and copy.tensor.device == parameter.device else None


def refreshed(parameter: Tensor, copy: Tensor) -> None:
    """Say that the copy holds the parameter's numbers."""
    parameter.rounded = _Copy(copy, parameter._version, parameter.data_ptr())


def _is_of(copy: _Copy, parameter: Tensor) -> bool:
    return copy.version == parameter._version and copy.of == parameter.data_ptr()
