"""Operations and their implementations: a plain PyTorch reference, and fast versions registered for it.

The rules that choose between implementations, by device, type, size and installed packages, are in this module and in
the `register` calls that follow the references. Callers name the operation and never a backend:

    @operation
    def segment_sum(x, index, num_segments):            # the reference: plain, differentiable PyTorch
        return x.new_zeros(num_segments, *x.shape[1:]).index_add(0, index, x)

    segment_sum.register("moe_lm.ops.triton.rows:segment_sum", when=lambda x, *_: triton_runs(x))

A version is named by its module, which is imported when the version first runs: Triton is not installed everywhere, and
slow to import.

The table is plain Python because a PyTorch custom operator adds more time to a call than a small operation takes, and
accepts no Python objects.
"""

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

triton_devices = ("cuda",)
"""Types of devices whose tensors Triton takes; tests that run Triton's interpreter add "cpu"."""

_reference_only = False


class Operation:
    """A function with several implementations, called like the function."""

    def __init__(self, reference: Callable):
        functools.update_wrapper(self, reference)
        self.reference = reference
        self._versions: list[tuple[bool, Callable[..., bool], Callable]] = []

    def register(
        self, implementation: str | Callable, *, when: str | Callable[..., bool], on_gpu: bool = False
    ) -> None:
        """Add a version for calls whose arguments satisfy `when` and, with `on_gpu`, whose first argument is on a GPU.

        Both functions may be given as "module:function". If several versions accept the arguments, the one registered
        first runs.
        """
        when, version = (_imported_when_called(f) if isinstance(f, str) else f for f in (when, implementation))
        self._versions.append((on_gpu, when, version))

    def __call__(self, *args, **kwargs):
        """Run the first version that accepts these arguments, else the reference."""
        if not _reference_only:
            for on_gpu, when, version in self._versions:
                if (not on_gpu or args[0].device.type in triton_devices) and when(*args, **kwargs):
                    return version(*args, **kwargs)
        return self.reference(*args, **kwargs)


def operation(reference: Callable) -> Operation:
    """Make a function the reference of an operation of the same name."""
    return Operation(reference)


@contextlib.contextmanager
def reference_only() -> Iterator[None]:
    """Run every operation by its reference inside this context, to compare fast versions with it.

    The switch holds for the whole process, because a backward pass on a GPU runs in autograd's own threads.
    """
    global _reference_only
    before, _reference_only = _reference_only, True
    try:
        yield
    finally:
        _reference_only = before


def triton_runs(x: Tensor) -> bool:
    """Return whether Triton kernels run on this tensor; they compute in float32, so never on float64."""
    return x.device.type in triton_devices and x.dtype != torch.float64 and _triton_compiles(x.device.type)


@functools.cache
def _triton_compiles(device: str) -> bool:
    """Compile one kernel: Triton needs a C compiler, which not every machine with a GPU has."""
    if find_spec("triton") is None:
        return False
    try:
        from moe_lm.ops.triton.rows import gather_weighted

        one = torch.ones(1, 1, device=device)
        gather_weighted(one, torch.zeros(1, dtype=torch.int64, device=device), one[0])
    except Exception as error:  # the compiler's errors have no common class
        warnings.warn(f"Triton kernels do not compile here; PyTorch operators run instead: {error}", stacklevel=2)
        return False
    return True


def _imported_when_called(name: str) -> Callable:
    module, _, function = name.partition(":")

    def version(*args, **kwargs):
        return getattr(importlib.import_module(module), function)(*args, **kwargs)

    return version
