"""Operations and their implementations: a plain PyTorch reference, and fast versions registered beside it.

This module is the only one that decides which implementation runs, by device, type, size and what is installed. Callers
name the operation and never a backend:

    @operation
    def segment_sum(x, index, num_segments):            # the reference: plain, differentiable PyTorch
        return x.new_zeros(num_segments, *x.shape[1:]).index_add(0, index, x)

    segment_sum.register("moe_lm.ops.triton.rows:segment_sum", when=lambda x, *_: triton_runs(x))

A version is named by its module, which is imported when the version first runs: Triton is not everywhere, and slow to
import.
"""

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

_reference_only = False


class Operation:
    """A function with several implementations, called like the function."""

    def __init__(self, reference: Callable):
        functools.update_wrapper(self, reference)
        self.reference = reference
        self._versions: list[tuple[Callable[..., bool], Callable]] = []

    def register(self, implementation: str | Callable, *, when: Callable[..., bool]) -> None:
        """Add a version, or the `module:function` that has it, for calls whose arguments satisfy `when`.

        Of several versions that could run, the one registered first does.
        """
        self._versions.append(
            (when, _imported_later(implementation) if isinstance(implementation, str) else implementation)
        )

    def __call__(self, *args, **kwargs):
        """Run the first version that accepts these arguments, else the reference."""
        if not _reference_only:
            for when, version in self._versions:
                if when(*args, **kwargs):
                    return version(*args, **kwargs)
        return self.reference(*args, **kwargs)


def operation(reference: Callable) -> Operation:
    """Make a function the reference of an operation of the same name."""
    return Operation(reference)


@contextlib.contextmanager
def reference_only() -> Iterator[None]:
    """Run every operation by its reference inside this context: what fast versions are compared with."""
    global _reference_only
    before, _reference_only = _reference_only, True
    try:
        yield
    finally:
        _reference_only = before


def triton_runs(x: Tensor) -> bool:
    """Return whether Triton kernels run on this tensor; they compute in float32, so never on float64."""
    return x.is_cuda and x.dtype != torch.float64 and _triton_compiles()


@functools.cache
def _triton_compiles() -> bool:
    """Compile one kernel: Triton needs a C compiler, which not every machine with a GPU has."""
    if find_spec("triton") is None:
        return False
    try:
        from moe_lm.ops.triton.rows import gathered

        one = torch.ones(1, 1, device="cuda")
        gathered(one, torch.zeros(1, dtype=torch.int64, device="cuda"), one[0])
    except Exception as error:  # the compiler's errors have no common class
        warnings.warn(f"Triton kernels do not compile here, PyTorch operators run instead: {error}", stacklevel=2)
        return False
    return True


def _imported_later(name: str) -> Callable:
    module, _, function = name.partition(":")

    def version(*args, **kwargs):
        return getattr(importlib.import_module(module), function)(*args, **kwargs)

    return version
