"""The processes that train one model together: rendezvous, groups, agreement, and the division of micro-batches."""

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moe_lm.errors import UserError, in_a_line
from moe_lm.parallel.group import Group, Shard

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Longest wait for a collective of the training."""
SETUP_TIMEOUT = timedelta(days=2)
"""Longest wait for work of the first process alone, such as preparing text; a dead process is noticed at once."""
AGENT_STORE_TIMEOUT = timedelta(seconds=20)
"""Longest wait for torchrun's own store, which exists before this process unless torchrun has been killed since."""

_CONNECTION_LOST = r"Connection closed by peer|Connection reset|Broken pipe|Connection refused|Timed out waiting|gloo"

T = TypeVar("T")


@dataclass(frozen=True)
class ParallelContext:
    """All processes of a training, and the groups over which experts are sharded."""

    world: Group = field(default_factory=Group)
    experts: Group = field(default_factory=Group)
    """The processes over which each layer's experts are sharded, this one included."""
    replicas: Group = field(default_factory=Group)
    """The processes that hold the same experts as this one."""
    control: Group = field(default_factory=Group)
    """All processes, for decisions on the CPU, which wait for no device."""
    background: Group = field(default_factory=Group)
    """All processes, for a thread that writes a checkpoint while the training uses the other groups."""
    shards: Mapping[str, Shard] = field(default_factory=dict)
    """Shard of each sharded parameter by name, along dimension 0; every process holds the other parameters whole."""

    @property
    def writers(self) -> "ParallelContext":
        """Return the context for a thread that writes a checkpoint, whose messages must not mix with the training's."""
        return replace(self, control=self.background)

    @property
    def rank(self) -> int:
        """Return the number of this process."""
        return self.world.rank

    @property
    def size(self) -> int:
        """Return the number of processes."""
        return self.world.size

    @property
    def is_first(self) -> bool:
        """Return whether this is the process that writes and logs."""
        return self.rank == 0

    @property
    def sent(self) -> Counter:
        """Return the bytes that this process sent, by purpose."""
        return self.world.sent

    def first(self, call: Callable[[], T]) -> T:
        """Call in the first process, and return its result in all; if it raises `UserError`, others exit silently."""
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

    def each(self, value: T) -> list[T]:
        """Return every process's value, by rank."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value, group=self.control.handle)
        return values

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether any process has set it, without a wait for a device."""
        if self.size == 1:
            return list(flags)
        most = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.control.handle)
        return [bool(flag) for flag in most]

    def round_robin(self, count: int) -> list[int | None]:
        """Return the indices of this process's micro-batches, of `count` in all; None in a round without one.

        Every process takes part in every round, because experts wait for all processes.
        """
        numbers = range(self.rank, -(-count // self.size) * self.size, self.size)
        return [number if number < count else None for number in numbers]


SINGLE_PROCESS = ParallelContext()


def expected_size() -> int:
    """Return how many processes torchrun, or a batch system that sets its variables, started; 0 if neither did."""
    return int(os.environ.get("WORLD_SIZE", 0)) if "RANK" in os.environ else 0


def init_parallel(device: torch.device, init_method: str = "env://") -> ParallelContext:
    """Initialise torch.distributed from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT of the environment.

    `init_method` names another rendezvous, as PyTorch writes it: file:///... Raises `UserError` if the other processes
    do not join.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        timeout = AGENT_STORE_TIMEOUT if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else SETUP_TIMEOUT
        store, rank, size = next(
            dist.rendezvous(init_method, int(os.environ["RANK"]), expected_size(), timeout=timeout)
        )
        store.set_timeout(SETUP_TIMEOUT)
        # A restart by torchrun keeps the store, with the addresses of processes that have died.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"attempt {attempt}", store),
            rank=rank,
            world_size=size,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )
    except (ValueError, RuntimeError) as error:  # a DistError is a RuntimeError
        raise UserError(
            f"cannot meet the other processes ({in_a_line(error)}): start them with torchrun or num_processes=..."
        ) from None
    sent: Counter = Counter()
    groups = [Group(rank, size, dist.new_group(backend="gloo", timeout=SETUP_TIMEOUT), Counter()) for _ in range(2)]
    return ParallelContext(Group(rank, size, None, sent), control=groups[0], background=groups[1])


def expert_parallel_size(world_size: int, num_experts: int, wanted: int | None = None) -> int:
    """Return how many processes shard experts: by default the largest divisor of `world_size` up to `num_experts`."""
    sizes = (size for size in range(1, world_size + 1) if world_size % size == 0)
    return wanted or max(size for size in sizes if size <= max(1, num_experts))


def with_expert_groups(
    parallel: ParallelContext, num_experts: int, expert_size: int | None, device: torch.device
) -> ParallelContext:
    """Return the context with a group over which experts are sharded, and a group of processes with equal experts.

    Processes that share experts are neighbours by rank, so they are on one machine where possible. Raises `UserError`
    where `expert_size` does not divide the number of processes.
    """
    size = parallel.size
    if expert_size is not None and (expert_size < 1 or size % expert_size):
        raise UserError(f"parallel.expert_size={expert_size}: must divide the number of processes, {size}")
    if size == 1:
        return parallel
    expert_size = expert_parallel_size(size, num_experts, expert_size)
    mesh = init_device_mesh(device.type, (size // expert_size, expert_size), mesh_dim_names=("replicas", "experts"))
    replica, place = mesh.get_coordinate()
    return replace(
        parallel,
        experts=Group(place, expert_size, mesh.get_group("experts"), parallel.sent),
        replicas=Group(replica, size // expert_size, mesh.get_group("replicas"), parallel.sent),
    )


def is_peer_loss(error: BaseException) -> bool:
    """Return whether an error means that another process has died, not that something is wrong in this process."""
    if not dist.is_initialized() or isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return dist.is_initialized()
    return re.search(_CONNECTION_LOST, str(error)) is not None


def destroy_parallel() -> None:
    """Leave torch.distributed."""
    if dist.is_initialized():
        dist.destroy_process_group()
