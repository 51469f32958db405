"""Which GPUs of this machine the runs of a sweep take."""

import os
from collections.abc import Hashable, Mapping, Sequence

import torch

VISIBLE = "CUDA_VISIBLE_DEVICES"


class Devices:
    """The GPUs that a sweep may use, by the names that CUDA_VISIBLE_DEVICES knows them by, each lent to one run."""

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self._holders: dict[str, Hashable] = {}

    def take(self, holder: Hashable, number: int) -> dict[str, str] | None:
        """Lend so many GPUs; return what the holder's environment needs, nothing for 0, None where too few are free."""
        free = [name for name in self.names if name not in self._holders]
        if number > len(free):
            return None
        self._holders |= dict.fromkeys(free[:number], holder)
        return {VISIBLE: ",".join(free[:number])} if number else {}

    def give_back(self, holder: Hashable) -> None:
        """Take back what a holder has."""
        self._holders = {name: other for name, other in self._holders.items() if other != holder}


def visible(environment: Mapping[str, str] = os.environ, count: int | None = None) -> list[str]:
    """Return the names of the GPUs that a process of this environment sees; `count` is what CUDA makes of it.

    A child needs the names that this process was given, numbers or UUIDs: to a child with CUDA_VISIBLE_DEVICES=2,3
    the numbers 0 and 1 would be other GPUs.
    """
    # Counting starts no CUDA context, which would take memory from the runs.
    count = torch.cuda.device_count() if count is None else count
    given = environment.get(VISIBLE)
    names = [str(i) for i in range(count)] if given is None else [name.strip() for name in given.split(",")]
    return names[:count]  # CUDA stops at the first name that it does not know
