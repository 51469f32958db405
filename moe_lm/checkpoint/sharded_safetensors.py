"""Named tensors in a folder of safetensors files, written and read by torch.distributed.checkpoint.

Each process writes the rows that it holds, and a different number of processes can read them. Only tensors are stored:
torch would write a Python number in a format that can run code when it is read.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from moe_lm.compat import current_parameter
from moe_lm.parallel.group import Group, Shard

FILE_BYTES = 2**30
"""Size at which tensors begin to go to the next file, because each file is assembled in memory."""


@dataclass(frozen=True)
class RowShard:
    """This process's rows of a tensor, with the methods that torch.distributed.checkpoint calls on a sharded tensor."""

    tensor: Tensor
    shard: Shard

    def size(self) -> torch.Size:
        """Return the size of the whole tensor."""
        return torch.Size((self.shard.total, *self.tensor.shape[1:]))

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [] if self.shard.size == 0 else [ChunkStorageMetadata(self._offsets, self.tensor.shape)]

    def __create_write_items__(self, name: str, rows: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.tensor)
        return [
            WriteItem(
                index=MetadataIndex(name, self._offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    @property
    def _offsets(self) -> torch.Size:
        return torch.Size((self.shard.first, *[0] * (self.tensor.dim() - 1)))


NamedTensors = Mapping[str, Tensor | RowShard]
"""Replicated tensors and row shards by name."""
Shards = Mapping[str, Shard]
"""Shard of each sharded parameter by name; every process holds the other parameters whole."""


class _SavePlanner(dcp.DefaultSavePlanner):
    """torch's planner, extended to row shards."""

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        # Copied to the CPU here, because torch's writer synchronises its own GPU copies only with its thread's stream.
        return _local(self.state_dict[index.fqn]).cpu()


class _LoadPlanner(dcp.DefaultLoadPlanner):
    def set_up_planner(self, state_dict: dict, metadata=None, is_coordinator: bool = False) -> None:
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return _local(self.state_dict[index.fqn])


def sharded(tensor: Tensor, shard: Shard | None) -> Tensor | RowShard:
    """Return the tensor, as a row shard if `shard` is given; scalars are never sharded."""
    return tensor if shard is None or tensor.dim() == 0 else RowShard(tensor, shard)


def local_bytes(tensors: NamedTensors) -> int:
    """Return the bytes that the tensors take in this process."""
    return sum(_local(x).nbytes for x in tensors.values())


def global_bytes(tensors: NamedTensors) -> int:
    """Return the bytes that the tensors take over all processes, replicated tensors counted once."""
    return sum(map(_whole_bytes, tensors.values()))


def copy_to_cpu(tensors: NamedTensors) -> dict[str, Tensor | RowShard]:
    """Return copies in the CPU's memory, made one after the other."""
    return {name: _map_local(x, lambda t: t.to("cpu", copy=True)) for name, x in tensors.items()}


def write(folder: Path, tensors: NamedTensors, group: Group) -> None:
    """Write the tensors of every process of the group; a replicated tensor is written by one process.

    Raises `OSError` or torch's `CheckpointException` on every process if one of them fails.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True, fqn_to_index_mapping=_file_numbers(tensors))
    tensors = {name: _map_local(x, Tensor.detach) for name, x in tensors.items()}
    with _single_process_allowed():
        place = {"process_group": group.handle, "no_dist": group.size == 1}
        dcp.save(tensors, storage_writer=writer, planner=_SavePlanner(), **place)


def read(folder: Path, tensors: NamedTensors) -> None:
    """Fill the tensors with those stored under the same names, or under names of earlier versions.

    Raises `ValueError` if the folder does not hold them; `shapes` tells what it holds.
    """
    reader = HuggingFaceStorageReader(str(folder))
    stored_names = {_current(name): name for name in reader.read_metadata().state_dict_metadata}
    targets = {stored_names.get(name, name): _map_local(x, Tensor.detach) for name, x in tensors.items()}
    with _single_process_allowed():
        dcp.load(targets, storage_reader=reader, planner=_LoadPlanner(), no_dist=True)


def shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and type of every tensor in a folder, under this version's names.

    Raises `SafetensorError` if a file is not safetensors, whatever its name.
    """
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    return {_current(name): (tuple(x.size), x.properties.dtype) for name, x in metadata.state_dict_metadata.items()}


def check_is_safetensors(file: Path) -> None:
    """Raise `SafetensorError` unless a file is safetensors by name and content."""
    if file.suffix != ".safetensors":
        raise SafetensorError(f"{file.name} is no safetensors file")
    with safe_open(file, framework="pt"):
        pass


def _current(key: str) -> str:
    """Return this version's key for a stored key, which is a parameter's name or the optimizer's "kind/name"."""
    kind, slash, name = key.rpartition("/")
    return f"{kind}{slash}{current_parameter(name)}"


def _file_numbers(tensors: NamedTensors) -> dict[str, int]:
    """Return the file number of each tensor, counted from 1 and the same on every process."""
    numbers, file, filled = {}, 1, 0
    for name, x in tensors.items():
        size = _whole_bytes(x)
        size = -(-size // len(x.shard.sizes)) if isinstance(x, RowShard) else size
        if filled and filled + size > FILE_BYTES:
            file, filled = file + 1, 0
        numbers[name] = file
        filled += size
    return numbers


def _whole_bytes(x: Tensor | RowShard) -> int:
    return x.size().numel() * _local(x).element_size()


def _local(x: Tensor | RowShard) -> Tensor:
    return x.tensor if isinstance(x, RowShard) else x


def _map_local(x: Tensor | RowShard, function: Callable[[Tensor], Tensor]) -> Tensor | RowShard:
    return RowShard(function(x.tensor), x.shard) if isinstance(x, RowShard) else function(x)


@contextmanager
def _single_process_allowed() -> Iterator[None]:
    """Silence torch's warning that torch.distributed is not in use."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
