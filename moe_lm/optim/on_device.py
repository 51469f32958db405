"""What updates have in common that the device decides on, so that the host need not wait to know whether they are made.

`found_inf` is, as in torch's optimizers, a number on the device: where it is 1 an update changes nothing; None is 0.
"""

import torch
from torch import Tensor


def counted(state: dict[str, Tensor], parameter: Tensor, found_inf: Tensor | None) -> Tensor:
    """Count a parameter's step, where it is made, in the device's memory; return it (float64)."""
    step = state["step"].to(parameter.device)
    state["step"] = step + 1 if found_inf is None else step + (1 - found_inf)
    return state["step"].double()


def kept(new: Tensor, old: Tensor | float, found_inf: Tensor | None) -> Tensor:
    """Return what is new, or where the update is not made what was."""
    return new if found_inf is None else torch.where(found_inf == 0, new, old)


def number(x: Tensor | float | None, like: Tensor) -> Tensor:
    """Return a number on the device as kernels read it: None as 0, the host's filled in, as a copy would wait."""
    return x if isinstance(x, Tensor) else like.new_full((), x or 0.0, dtype=torch.float32)
