"""Some of the processes that train together: what they send each other, how much of it, and who holds which rows.

Shape suffixes: R rows, D numbers of a row.
"""

from collections import Counter
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class Group:
    """Some of the processes, by rank; one alone sends nothing.

    `sent` counts the bytes that this process sends to others, by purpose: of an all-reduce those of a ring,
    2 (n - 1) / n of the tensor.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, handle: dist.ProcessGroup | None = None, sent: Counter | None = None
    ):
        self.rank, self.size, self.handle = rank, size, handle
        self.sent = Counter() if sent is None else sent

    def all_reduce_(self, tensor: Tensor, purpose: str) -> Tensor:
        """Replace a tensor by its sum over the group, the same bits on each process; return it."""
        if (work := self.all_reduce_async_(tensor, purpose)) is not None:
            work.wait()
        return tensor

    def all_reduce_async_(self, tensor: Tensor, purpose: str) -> dist.Work | None:
        """Begin `all_reduce_`; the tensor holds the sum once the returned work is waited for."""
        if self.size == 1 or tensor.numel() == 0:
            return None
        self._count(purpose, 2 * (self.size - 1) / self.size * tensor.numel() * tensor.element_size())
        torch.autograd.graph.increment_version(tensor)  # as what is known of its numbers no longer holds
        return dist.all_reduce(tensor, group=self.handle, async_op=True)

    def all_to_all(self, x_RD: Tensor, given: list[int], taken: list[int], purpose: str) -> Tensor:
        """Send the first `given[0]` rows to process 0, the next to 1, ...; return the `taken[i]` rows of each.

        Differentiable: the gradient goes back the way the rows came.
        """
        return _Exchange.apply(x_RD, self, given, taken, purpose)

    def all_to_all_equal(self, x_RD: Tensor, purpose: str) -> Tensor:
        """Send each process an equal part of the rows; return as many, by process."""
        part = x_RD.shape[0] // self.size
        return self.all_to_all(x_RD, [part] * self.size, [part] * self.size, purpose)

    def all_gather(self, x_RD: Tensor, purpose: str) -> list[Tensor]:
        """Return the rows of every process, as many as each has."""
        num_rows = torch.tensor([x_RD.shape[0]] * self.size, device=x_RD.device)
        taken = self.all_to_all_equal(num_rows, purpose).tolist()
        # Padded: a gather of unequal parts is not in every backend. Owners are drawn so that they differ little.
        padded = x_RD.new_zeros(max(taken), *x_RD.shape[1:])
        padded[: x_RD.shape[0]] = x_RD
        parts = [torch.empty_like(padded) for _ in taken]
        if padded.numel():
            self._count(purpose, (self.size - 1) * padded.numel() * padded.element_size())
            dist.all_gather(parts, padded, group=self.handle)
        return [part[:rows] for part, rows in zip(parts, taken, strict=True)]

    def all_to_all_raw(self, x_RD: Tensor, given: list[int], taken: list[int], purpose: str) -> Tensor:
        """Do what `all_to_all` says, without a gradient."""
        received_RD = x_RD.new_empty(sum(taken), *x_RD.shape[1:])
        row = x_RD[:1].numel() * x_RD.element_size() if len(x_RD) else 0
        self._count(purpose, (len(x_RD) - given[self.rank]) * row)
        dist.all_to_all_single(received_RD, x_RD.contiguous(), taken, given, group=self.handle)
        return received_RD

    def _count(self, purpose: str, num_bytes: float) -> None:
        self.sent[purpose] += num_bytes


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD, group, given, taken, purpose):
        ctx.where = group, given, taken, purpose
        return group.all_to_all_raw(x_RD, given, taken, purpose)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RD):
        group, given, taken, purpose = ctx.where
        return group.all_to_all_raw(grad_RD, taken, given, purpose), None, None, None, None


@dataclass(frozen=True)
class Shard:
    """Which rows of a parameter this process holds: a range, one after another by rank."""

    group: Group
    sizes: tuple[int, ...]
    """Rows of each process of the group."""

    @property
    def first(self) -> int:
        """Number of the first row here."""
        return sum(self.sizes[: self.group.rank])

    @property
    def size(self) -> int:
        """Rows here."""
        return self.sizes[self.group.rank]

    @property
    def total(self) -> int:
        """Rows of all processes."""
        return sum(self.sizes)

    @property
    def rows(self) -> range:
        """Numbers of the rows here."""
        return range(self.first, self.first + self.size)


def shard_rows(total: int, group: Group, together: int = 1) -> Shard:
    """Divide rows as evenly as can be; `together` rows stay on one process where there are enough such packets."""
    if total % together or total // together < group.size:
        together = 1
    packets, more = divmod(total // together, group.size)
    return Shard(group, tuple((packets + (rank < more)) * together for rank in range(group.size)))
