"""A group of processes that train together: its collectives, the bytes they send, and row-wise shards.

Shape suffixes: R rows, D numbers per row.
"""

from collections import Counter
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class Group:
    """Some of the processes, by rank; a group of one process sends nothing.

    `sent` counts the bytes that this process sends to others, by purpose; an all-reduce counts as a ring all-reduce
    would, 2 (n - 1) / n of the tensor.
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
        """Begin `all_reduce_`; the tensor holds the sum once the returned work has been waited for."""
        if self.size == 1 or tensor.numel() == 0:
            return None
        self._count(purpose, 2 * (self.size - 1) / self.size * tensor.numel() * tensor.element_size())
        torch.autograd.graph.increment_version(tensor)  # anything cached about its values is stale now
        return dist.all_reduce(tensor, group=self.handle, async_op=True)

    def all_to_all(self, x_RD: Tensor, send: list[int], receive: list[int], purpose: str) -> Tensor:
        """Send the first `send[0]` rows to process 0, the next to 1, ...; return `receive[i]` rows from each process i.

        The gradients of the rows are sent back.
        """
        return _AllToAll.apply(x_RD, self, send, receive, purpose)

    def all_to_all_equal(self, x_RD: Tensor, purpose: str) -> Tensor:
        """Send each process an equal part of the rows; return the parts received, by process."""
        part = x_RD.shape[0] // self.size
        return self.all_to_all(x_RD, [part] * self.size, [part] * self.size, purpose)

    def all_gather(self, x_RD: Tensor, purpose: str) -> list[Tensor]:
        """Return the rows of every process, however many each has."""
        num_rows = torch.tensor([x_RD.shape[0]] * self.size, device=x_RD.device)
        rows = self.all_to_all_equal(num_rows, purpose).tolist()
        # Padded, because not every backend gathers unequal parts; callers spread rows so that parts differ little.
        padded = x_RD.new_zeros(max(rows), *x_RD.shape[1:])
        padded[: x_RD.shape[0]] = x_RD
        parts = [torch.empty_like(padded) for _ in rows]
        if padded.numel():
            self._count(purpose, (self.size - 1) * padded.numel() * padded.element_size())
            dist.all_gather(parts, padded, group=self.handle)
        return [part[:count] for part, count in zip(parts, rows, strict=True)]

    def all_to_all_raw(self, x_RD: Tensor, send: list[int], receive: list[int], purpose: str) -> Tensor:
        """Do what `all_to_all` does, without a gradient."""
        received_RD = x_RD.new_empty(sum(receive), *x_RD.shape[1:])
        row_bytes = x_RD[:1].numel() * x_RD.element_size() if len(x_RD) else 0
        self._count(purpose, (len(x_RD) - send[self.rank]) * row_bytes)
        dist.all_to_all_single(received_RD, x_RD.contiguous(), receive, send, group=self.handle)
        return received_RD

    def _count(self, purpose: str, num_bytes: float) -> None:
        self.sent[purpose] += num_bytes


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD, group, send, receive, purpose):
        ctx.arguments = group, send, receive, purpose
        return group.all_to_all_raw(x_RD, send, receive, purpose)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RD):
        group, send, receive, purpose = ctx.arguments
        return group.all_to_all_raw(grad_RD, receive, send, purpose), None, None, None, None


@dataclass(frozen=True)
class Shard:
    """The rows of a parameter (its dimension 0) that this process holds: a contiguous range, ordered by rank."""

    group: Group
    sizes: tuple[int, ...]
    """Rows of each process of the group."""

    @property
    def first(self) -> int:
        """Return the number of the first row held here."""
        return sum(self.sizes[: self.group.rank])

    @property
    def size(self) -> int:
        """Return the number of rows held here."""
        return self.sizes[self.group.rank]

    @property
    def total(self) -> int:
        """Return the number of rows of all processes."""
        return sum(self.sizes)

    @property
    def rows(self) -> range:
        """Return the numbers of the rows held here."""
        return range(self.first, self.first + self.size)


def shard_rows(total: int, group: Group, packet: int = 1) -> Shard:
    """Shard rows as evenly as possible; each packet of `packet` rows stays on one process if there are enough."""
    if total % packet or total // packet < group.size:
        packet = 1
    packets, remainder = divmod(total // packet, group.size)
    return Shard(group, tuple((packets + (rank < remainder)) * packet for rank in range(group.size)))
