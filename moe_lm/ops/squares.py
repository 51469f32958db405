"""Means of a gradient's squares, which a factored second moment takes: known to who makes the gradient anyway.

Read from memory again they are a pass over the gradients, of 4 billion parameters 17 GB.

Shape suffixes: M matrices (experts), R rows, C columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Squares(NamedTuple):
    """Of a list of matrices (float32)."""

    row_MR: Tensor
    """Means over columns."""
    column_MC: Tensor
    """Means over rows."""


@dataclass(frozen=True)
class _Noted:
    of: StorageWeakRef
    """The gradient's memory: autograd hands on another tensor over the same. Once freed it is nobody's again."""
    layout: tuple
    version: int
    squares: Squares

    def __reduce__(self) -> tuple:
        return type(None), ()  # a saved parameter's are nobody's


def want_squares(parameter: Tensor) -> None:
    """From now on let who makes the parameter's gradient note its squares, where that costs no pass."""
    parameter.squares = None


def want_squares_no_longer(parameter: Tensor) -> None:
    """Say that another optimizer takes the gradients."""
    vars(parameter).pop("squares", None)


def wants_squares(parameter: Tensor) -> bool:
    """Return whether they are wanted."""
    return hasattr(parameter, "squares")


def note_squares(parameter: Tensor, gradient: Tensor, squares: Squares) -> None:
    """Keep them for as long as this gradient is the parameter's and is not changed."""
    memory = StorageWeakRef(gradient.untyped_storage())
    parameter.squares = _Noted(memory, _layout(gradient), gradient._version, squares)


def squares_of(parameter: Tensor, make: Callable[[Tensor], Squares]) -> Squares:
    """Return those of `parameter.grad`, made once for as long as torch knows of no change.

    `.data` hides one, as do torch's scaling of losses and its fused optimizers.
    """
    gradient, noted = parameter.grad, getattr(parameter, "squares", None)
    known = noted is not None and (noted.version, noted.layout) == (gradient._version, _layout(gradient))
    if not known or noted.of != StorageWeakRef(gradient.untyped_storage()):
        note_squares(parameter, gradient, make(gradient))
    return parameter.squares.squares


def _layout(gradient: Tensor) -> tuple:
    return gradient.data_ptr(), gradient.shape, gradient.stride()
