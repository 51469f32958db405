"""Whether our own kernels run: where there is a GPU and Triton."""

from importlib.util import find_spec

import torch
from torch import Tensor

_HAS_TRITON = find_spec("triton") is not None
plain = False
"""Whether GPUs, too, take torch's operators: to measure what the kernels are worth."""


def by_triton(x: Tensor) -> bool:
    """Return whether work on this tensor is a kernel's; they compute in float32, so none in float64 is."""
    return x.is_cuda and x.dtype != torch.float64 and _HAS_TRITON and not plain
