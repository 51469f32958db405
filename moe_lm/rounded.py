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
    """From now on let a copy, once asked for, stay with the parameter: whoever changes it by a kernel writes both."""
    parameter.rounded = None


def rounded(parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the parameter's copy in this type; None where nobody keeps one, or where the parameter has that type.

    It is made anew where torch knows that the parameter was changed; of a kernel's changes torch does not.
    """
    if not hasattr(parameter, "rounded") or parameter.dtype == dtype:
        return None
    copy = kept_rounded(parameter)
    if copy is None or copy.dtype != dtype:
        parameter.rounded = None  # its memory first
        with torch.inference_mode(False):  # of an evaluation it could not be used in training
            copy = parameter.detach().to(dtype)
        parameter.rounded = _Copy(copy, parameter._version, parameter.data_ptr())
    return copy


def kept_rounded(parameter: Tensor) -> Tensor | None:
    """Return the copy that a kernel is to change with the parameter, if there is one."""
    copy = getattr(parameter, "rounded", None)
    of_this = copy is not None and (copy.version, copy.of) == (parameter._version, parameter.data_ptr())
    return copy.tensor if of_this else None
