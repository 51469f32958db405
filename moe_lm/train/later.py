"""A number of the device's, on its way to the host while both go on."""

import torch
from torch import Tensor


class Later:
    """One number: on a GPU copied when all that was asked for before it is done, elsewhere there at once."""

    def __init__(self, x: Tensor):
        self._host, self._copied = x, None
        if x.is_cuda:
            self._host = torch.empty_like(x, device="cpu", pin_memory=True)
            self._host.copy_(x, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(x.device))

    @property
    def is_here(self) -> bool:
        """Whether it was there at once: reading it never waits."""
        return self._copied is None

    def read(self) -> float | bool:
        """Return it; wait for it where it is still on its way, for nothing that was asked for after it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.item()
