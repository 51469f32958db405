"""Processes that train one model together: who they are, what they send each other, and how much of it.

Shape suffixes: R rows, D numbers of a row.
"""

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import init_device_mesh

from moe_lm.mistake import Mistake, in_a_line

PATIENCE = timedelta(minutes=30)
"""How long a process waits for what others compute beside it."""
LONGEST = timedelta(days=2)
"""How long it waits for what the first one does alone: prepare text, say. One that has died is noticed at once."""
SOON = timedelta(seconds=20)
"""How long it looks for torchrun's own store: that was there before this process, unless torchrun was killed since."""

_GONE = r"Connection closed by peer|Connection reset|Broken pipe|Connection refused|Timed out waiting|gloo"

Anything = TypeVar("Anything")


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

    def sum_(self, tensor: Tensor, purpose: str) -> Tensor:
        """Replace a tensor by its sum over the group, the same bits on each process; return it."""
        if (work := self.sum_later_(tensor, purpose)) is not None:
            work.wait()
        return tensor

    def sum_later_(self, tensor: Tensor, purpose: str) -> dist.Work | None:
        """Begin `sum_`; the tensor holds the sum once the returned work is waited for."""
        if self.size == 1 or tensor.numel() == 0:
            return None
        self._count(purpose, 2 * (self.size - 1) / self.size * tensor.numel() * tensor.element_size())
        return dist.all_reduce(tensor, group=self.handle, async_op=True)

    def exchange(self, x_RD: Tensor, given: list[int], taken: list[int], purpose: str) -> Tensor:
        """Send the first `given[0]` rows to process 0, the next to 1, ...; return the `taken[i]` rows of each.

        Differentiable: the gradient goes back the way the rows came.
        """
        return _Exchange.apply(x_RD, self, given, taken, purpose)

    def exchange_equal(self, x_RD: Tensor, purpose: str) -> Tensor:
        """Send each process an equal part of the rows; return as many, by process."""
        part = x_RD.shape[0] // self.size
        return self.exchange(x_RD, [part] * self.size, [part] * self.size, purpose)

    def gather(self, x_RD: Tensor, purpose: str) -> list[Tensor]:
        """Return the rows of every process, as many as each has."""
        num_rows = torch.tensor([x_RD.shape[0]] * self.size, device=x_RD.device)
        taken = self.exchange_equal(num_rows, purpose).tolist()
        # Padded: a gather of unequal parts is not in every backend. Owners are drawn so that they differ little.
        padded = x_RD.new_zeros(max(taken), *x_RD.shape[1:])
        padded[: x_RD.shape[0]] = x_RD
        parts = [torch.empty_like(padded) for _ in taken]
        if padded.numel():
            self._count(purpose, (self.size - 1) * padded.numel() * padded.element_size())
            dist.all_gather(parts, padded, group=self.handle)
        return [part[:rows] for part, rows in zip(parts, taken, strict=True)]

    def swap(self, x_RD: Tensor, given: list[int], taken: list[int], purpose: str) -> Tensor:
        """Do what `exchange` says, without a gradient."""
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
        return group.swap(x_RD, given, taken, purpose)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RD):
        group, given, taken, purpose = ctx.where
        return group.swap(grad_RD, taken, given, purpose), None, None, None, None


@dataclass(frozen=True)
class Share:
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


def divided(total: int, group: Group, together: int = 1) -> Share:
    """Divide rows as evenly as can be; `together` rows stay on one process where there are enough such packets."""
    if total % together or total // together < group.size:
        together = 1
    packets, more = divmod(total // together, group.size)
    return Share(group, tuple((packets + (rank < more)) * together for rank in range(group.size)))


@dataclass(frozen=True)
class Processes:
    """All processes of a training, and the groups in which they divide the experts."""

    everyone: Group = field(default_factory=Group)
    experts: Group = field(default_factory=Group)
    """The processes among which each layer's experts are divided, this one included."""
    replicas: Group = field(default_factory=Group)
    """The processes that hold the same experts as this one."""
    control: Group = field(default_factory=Group)
    """All processes, for what the CPU decides: waits for no device."""
    vocabulary: Group = field(default_factory=Group)
    """The processes among which the rows of embedding and softmax are divided: alone, or everyone."""

    background: Group = field(default_factory=Group)
    """All processes, for a thread that writes while the others train."""

    @property
    def writers(self) -> "Processes":
        """Return all processes, as a thread that writes may speak to them: apart from what the training says."""
        return replace(self, control=self.background)

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.everyone.rank

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.everyone.size

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def sent(self) -> Counter:
        """Bytes that this process sent, by purpose."""
        return self.everyone.sent

    def first(self, call: Callable[[], Anything]) -> Anything:
        """Let the first process call; return its result on all. Where it raises `Mistake`, the others end quietly."""
        if self.size == 1:
            return call()
        outcome: list = [None, False]
        mistake = None
        if self.is_first:
            try:
                outcome[0] = call()
            except Mistake as error:
                mistake, outcome[1] = error, True
        dist.broadcast_object_list(outcome, src=0, group=self.control.handle)
        if mistake is not None:
            raise mistake
        if outcome[1]:
            raise SystemExit(2)
        return outcome[0]

    def each(self, value: Anything) -> list[Anything]:
        """Return every process's value, by rank."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value, group=self.control.handle)
        return values

    def any(self, *flags: bool) -> list[bool]:
        """Return of each flag whether any process has it set; no wait for a device."""
        if self.size == 1:
            return list(flags)
        most = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.control.handle)
        return [bool(flag) for flag in most]

    def turns(self, count: int) -> list[int | None]:
        """Return which of `count` micro-batches are this process's, by turns; None where it has nothing to do.

        Every process has as many turns, because the experts wait for all.
        """
        numbers = range(self.rank, -(-count // self.size) * self.size, self.size)
        return [number if number < count else None for number in numbers]


ALONE = Processes()


def expected_size() -> int:
    """Return how many processes torchrun (or a batch system that sets the same variables) started; 0: none did."""
    return int(os.environ.get("WORLD_SIZE", 0)) if "RANK" in os.environ else 0


def begin(device: torch.device, meeting: str = "env://") -> Processes:
    """Meet the other processes, as RANK and WORLD_SIZE, MASTER_ADDR and MASTER_PORT of the environment say.

    `meeting` names another place than that address, as torch writes it: file:///...

    Raises `Mistake` where they do not come.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        patience = SOON if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else LONGEST
        store, rank, size = next(dist.rendezvous(meeting, int(os.environ["RANK"]), expected_size(), timeout=patience))
        store.set_timeout(LONGEST)
        # torchrun keeps its store when it starts processes again, with the addresses of those that have died.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"attempt {attempt}", store),
            rank=rank,
            world_size=size,
            timeout=PATIENCE,
            device_id=device if device.type == "cuda" else None,
        )
    except (ValueError, RuntimeError) as error:  # a DistError is a RuntimeError
        raise Mistake(
            f"cannot meet the other processes ({in_a_line(error)}): start them with torchrun or num_processes=..."
        ) from None
    sent: Counter = Counter()
    groups = [Group(rank, size, dist.new_group(backend="gloo", timeout=LONGEST), Counter()) for _ in range(2)]
    return Processes(Group(rank, size, None, sent), control=groups[0], background=groups[1])


def with_experts(processes: Processes, num_experts: int, wanted: int | None, device: torch.device) -> Processes:
    """Return the processes with groups for the experts: `wanted` processes share them, the others hold copies.

    By default as many as divide the number of processes and find an expert each. Processes of one machine come first.
    Raises `Mistake` where `wanted` does not divide them.
    """
    size = processes.size
    if wanted is not None and (wanted < 1 or size % wanted):
        raise Mistake(f"machine.expert_processes={wanted}: must divide the number of processes, {size}")
    most = max(n for n in range(1, size + 1) if size % n == 0 and n <= max(1, num_experts))
    several = wanted or most
    if size == 1:
        return processes
    mesh = init_device_mesh(device.type, (size // several, several), mesh_dim_names=("replicas", "experts"))
    replica, place = mesh.get_coordinate()
    return replace(
        processes,
        experts=Group(place, several, mesh.get_group("experts"), processes.sent),
        replicas=Group(replica, size // several, mesh.get_group("replicas"), processes.sent),
    )


def with_vocabulary(processes: Processes, divide: bool) -> Processes:
    """Return the processes, among all of which, if so wished, the vocabulary's rows are divided."""
    return replace(processes, vocabulary=processes.everyone) if divide else processes


def is_loss(error: BaseException) -> bool:
    """Whether an error says that another process has gone, and not that something here is wrong."""
    if not dist.is_initialized() or isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return dist.is_initialized()
    return re.search(_GONE, str(error)) is not None


def end() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
