"""Whether our own kernels run: Triton's on a GPU, where it can build them, Numba's on one thread of a CPU."""

import functools
import warnings
from importlib.util import find_spec

import torch
from torch import Tensor

plain = False
"""Whether all work is torch's operators': to measure what the kernels are worth."""

_WORTHWHILE = 1 << 18
"""Numbers, some tenths of a millisecond, from which on a loop pays for being compiled within some thousand calls."""


def by_triton(x: Tensor) -> bool:
    """Return whether work on this tensor is a kernel's; they compute in float32, so none in float64 is."""
    return x.is_cuda and x.dtype != torch.float64 and not plain and _builds()


@functools.cache
def _builds() -> bool:
    """Try one kernel: Triton needs a C compiler on the machine, and not every machine with a GPU has one."""
    if find_spec("triton") is None:
        return False
    try:
        from moe_lm.ops.triton.rows import gathered  # not everywhere, and slow to import

        one = torch.ones(1, 1, device="cuda")
        gathered(one, torch.zeros(1, dtype=torch.int64, device="cuda"), one[0])
    except Exception as error:  # whatever the compiler says
        warnings.warn(f"no kernels of our own, torch's operators instead: {error}", stacklevel=2)
        return False
    return True


def by_numba(x: Tensor) -> bool:
    """Return whether passes over this tensor are a compiled loop's: of many numbers, on one thread of a CPU."""
    fits = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.numel() >= _WORTHWHILE
    return fits and torch.get_num_threads() == 1 and not plain and _compiles()


@functools.cache
def _compiles() -> bool:
    """Try one loop: Numba refuses a NumPy that it does not know."""
    try:
        if find_spec("numba") is None:
            return False
        import numba  # not everywhere, and slow to import

        if numba.config.DISABLE_JIT:  # NUMBA_DISABLE_JIT=1, to debug other code: loops would take minutes
            return False
        from moe_lm.ops.numba_rows import add_

        add_(torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), torch.ones(1, 1), None)
    except Exception as error:  # whatever it says
        warnings.warn(f"no compiled loops, torch's operators instead: {error}", stacklevel=2)
        return False
    return True
