"""Copies of matrices in 16 bits, for products: kept by the optimizer, whose pass over the matrices writes them too.

Cast anew, or read in 32 bits, matrices of 4 billion parameters are 17 GB more to move each time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(frozen=True)
class _Copy:
    tensor: Tensor
    version: int
    of: StorageWeakRef
    """The memory of the parameter's numbers, as `.data` may be others: once freed it is nobody's again."""

    def __reduce__(self) -> tuple:
        return type(None), ()  # a saved parameter has none


def keep_rounded(parameter: Tensor) -> None:
    """From now on let a copy, once asked for, stay with the parameter: who changes it by a kernel changes both."""
    parameter.rounded = None


def keep_rounded_no_longer(parameter: Tensor) -> None:
    """Say that another optimizer will change the parameter: torch's fused ones do so unseen."""
    vars(parameter).pop("rounded", None)


def rounded(parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the parameter's copy in this type; None where nobody keeps one, or where the parameter has that type.

    It is made anew where torch knows that the parameter was changed (torch's fused optimizers and `.data` hide it).
    """
    if not hasattr(parameter, "rounded") or parameter.dtype == dtype:
        return None
    copy = kept_rounded(parameter)
    if copy is None or copy.dtype != dtype:
        parameter.rounded = None  # its memory first
        with torch.inference_mode(False):  # of an evaluation it could not be used in training
            copy = parameter.detach().to(dtype)
        _note(parameter, copy)
    return copy


def kept_rounded(parameter: Tensor) -> Tensor | None:
    """Return the copy that a kernel is to change with the parameter, if there is one."""
    copy = getattr(parameter, "rounded", None)
    if copy is None or copy.version != parameter._version:
        return None
    return copy.tensor if copy.of == StorageWeakRef(parameter.untyped_storage()) else None


def changed_together(parameter: Tensor, copy: Tensor | None) -> None:
    """Say that a kernel has changed the parameter, and its copy alike: no graph that saved either may be used again."""
    torch.autograd.graph.increment_version(parameter)
    if copy is not None:
        torch.autograd.graph.increment_version(copy)
        _note(parameter, copy)


def _note(parameter: Tensor, copy: Tensor) -> None:
    parameter.rounded = _Copy(copy, parameter._version, StorageWeakRef(parameter.untyped_storage()))
