"""The memory of a large gradient, kept from one update to the next.

Gradients are dropped after each update. Where the allocator then puts something small into the gap, the next gradient
needs fresh memory, and faulting in 1 GiB can take longer than the products that fill it.
"""

import torch
from torch import Tensor, nn


def new_gradient(parameter: Tensor) -> Tensor:
    """Return memory of a parameter's shape with anything in it: that of its last forgotten gradient where there is one.

    On a CPU alone: a GPU's memory is torch's own to reuse, and better used by activations meanwhile.
    """
    spare = getattr(parameter, "spare_gradient", None)
    if parameter.device.type == "cpu":
        parameter.spare_gradient = None  # from now on it has one
    fits = spare is not None and _form(spare) == _form(parameter)
    return spare if fits else torch.empty_like(parameter, requires_grad=False)


def forget_gradient(parameter: nn.Parameter) -> None:
    """Drop a parameter's gradient; whoever still holds it sees the next one written over it."""
    grad = parameter.grad
    if grad is not None and hasattr(parameter, "spare_gradient") and _alone(grad):
        parameter.spare_gradient = grad
    parameter.grad = None


def _form(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _alone(tensor: Tensor) -> bool:
    """Whether the tensor is all that its memory holds: a part of a message would keep the whole of it."""
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
