"""The processes that train one model together: how they meet, agree and divide the work."""

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moe_lm.errors import UserError, in_a_line
from moe_lm.parallel.group import Group

PATIENCE = timedelta(minutes=30)
"""How long a process waits for what others compute beside it."""
LONGEST = timedelta(days=2)
"""How long it waits for what the first one does alone: prepare text, say. One that has died is noticed at once."""
SOON = timedelta(seconds=20)
"""How long it looks for torchrun's own store: that was there before this process, unless torchrun was killed since."""

_GONE = r"Connection closed by peer|Connection reset|Broken pipe|Connection refused|Timed out waiting|gloo"

Anything = TypeVar("Anything")


@dataclass(frozen=True)
class ParallelContext:
    """All processes of a training, and the groups in which they divide the experts."""

    world: Group = field(default_factory=Group)
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
    def writers(self) -> "ParallelContext":
        """Return all processes, as a thread that writes may speak to them: apart from what the training says."""
        return replace(self, control=self.background)

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.world.rank

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.world.size

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def sent(self) -> Counter:
        """Bytes that this process sent, by purpose."""
        return self.world.sent

    def first(self, call: Callable[[], Anything]) -> Anything:
        """Let the first process call; return its result on all. Where it raises `UserError`, the others end quietly."""
        if self.size == 1:
            return call()
        outcome: list = [None, False]
        mistake = None
        if self.is_first:
            try:
                outcome[0] = call()
            except UserError as error:
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

    def round_robin(self, count: int) -> list[int | None]:
        """Return which of `count` micro-batches are this process's, by turns; None where it has nothing to do.

        Every process has as many turns, because the experts wait for all.
        """
        numbers = range(self.rank, -(-count // self.size) * self.size, self.size)
        return [number if number < count else None for number in numbers]


SINGLE_PROCESS = ParallelContext()


def expected_size() -> int:
    """Return how many processes torchrun (or a batch system that sets the same variables) started; 0: none did."""
    return int(os.environ.get("WORLD_SIZE", 0)) if "RANK" in os.environ else 0


def begin(device: torch.device, meeting: str = "env://") -> ParallelContext:
    """Meet the other processes, as RANK and WORLD_SIZE, MASTER_ADDR and MASTER_PORT of the environment say.

    `meeting` names another place than that address, as torch writes it: file:///...

    Raises `UserError` where they do not come.
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
        raise UserError(
            f"cannot meet the other processes ({in_a_line(error)}): start them with torchrun or num_processes=..."
        ) from None
    sent: Counter = Counter()
    groups = [Group(rank, size, dist.new_group(backend="gloo", timeout=LONGEST), Counter()) for _ in range(2)]
    return ParallelContext(Group(rank, size, None, sent), control=groups[0], background=groups[1])


def expert_processes(size: int, num_experts: int, wanted: int | None = None) -> int:
    """Return how many of `size` processes divide the experts: as many as divide `size` and find an expert each."""
    return wanted or max(n for n in range(1, size + 1) if size % n == 0 and n <= max(1, num_experts))


def with_experts(
    parallel: ParallelContext, num_experts: int, wanted: int | None, device: torch.device
) -> ParallelContext:
    """Return the processes with groups for the experts, which `wanted` processes divide while the others hold copies.

    Those of a group are neighbours by rank, so on one machine where they fit. Raises `UserError` where `wanted` does not
    divide their number.
    """
    size = parallel.size
    if wanted is not None and (wanted < 1 or size % wanted):
        raise UserError(f"machine.expert_processes={wanted}: must divide the number of processes, {size}")
    if size == 1:
        return parallel
    several = expert_processes(size, num_experts, wanted)
    mesh = init_device_mesh(device.type, (size // several, several), mesh_dim_names=("replicas", "experts"))
    replica, place = mesh.get_coordinate()
    return replace(
        parallel,
        experts=Group(place, several, mesh.get_group("experts"), parallel.sent),
        replicas=Group(replica, size // several, mesh.get_group("replicas"), parallel.sent),
    )


def with_vocabulary(parallel: ParallelContext, divide: bool) -> ParallelContext:
    """Return the processes, among all of which, if so wished, the vocabulary's rows are divided."""
    return replace(parallel, vocabulary=parallel.world) if divide else parallel


def is_loss(error: BaseException) -> bool:
    """Whether an error says that another process has gone, and not that something here is wrong."""
    if not dist.is_initialized() or isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return dist.is_initialized()
    return re.search(_GONE, str(error)) is not None


def end() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
