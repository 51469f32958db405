"""Whether our own kernels run: where there is a GPU and a Triton that can build them."""

import functools
import warnings
from importlib.util import find_spec

import torch
from torch import Tensor

plain = False
"""Whether GPUs, too, take torch's operators: to measure what the kernels are worth."""


def by_triton(x: Tensor) -> bool:
    """Return whether work on this tensor is a kernel's; they compute in float32, so none in float64 is."""
    return x.is_cuda and x.dtype != torch.float64 and not plain and _builds()


@functools.cache
def _builds() -> bool:
    """Try one kernel: Triton needs a C compiler on the machine, and not every machine with a GPU has one."""
    if find_spec("triton") is None:
        return False
    try:
        from moe_lm.triton_rows import gathered  # not everywhere, and slow to import

        one = torch.ones(1, 1, device="cuda")
        gathered(one, torch.zeros(1, dtype=torch.int64, device="cuda"), one[0])
    except Exception as error:  # whatever the compiler says
        warnings.warn(f"no kernels of our own, torch's operators instead: {error}", stacklevel=2)
        return False
    return True
