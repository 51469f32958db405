"""Named tensors to a folder of safetensors and back, each process its rows: torch's distributed checkpoint.

Any number of processes reads what any number wrote. Tensors alone are stored: of one Python number among them torch
would make a file that runs code when it is read, under the same name.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from moe_lm.parallel.group import Group, Shard

FILE_BYTES = 2**30
"""Where a file would hold more, the next tensors go to another: a file is made in memory before it is written."""


@dataclass(frozen=True)
class Rows:
    """The rows that this process holds of a tensor: what torch's distributed checkpoint asks of such a thing."""

    tensor: Tensor
    share: Shard

    def size(self) -> torch.Size:
        """Return the size of the whole."""
        return torch.Size((self.share.total, *self.tensor.shape[1:]))

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        if self.share.size == 0:
            return []
        return [ChunkStorageMetadata(self._offsets, self.tensor.shape)]

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
        return torch.Size((self.share.first, *[0] * (self.tensor.dim() - 1)))


class _SavePlanner(dcp.DefaultSavePlanner):
    """torch's own, which finds rows in tensors alone."""

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        # Not left to the writer, which copies from a GPU without waiting on any stream but its own thread's.
        return _held(self.state_dict[index.fqn]).cpu()


class _LoadPlanner(dcp.DefaultLoadPlanner):
    def set_up_planner(self, state_dict: dict, metadata=None, is_coordinator: bool = False) -> None:
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return _held(self.state_dict[index.fqn])


Named = Mapping[str, Tensor | Rows]
"""Tensors that every process has alike, and rows of those that are divided."""


def named(tensor: Tensor, share: Shard | None) -> Tensor | Rows:
    """Return the tensor, or, where its rows are divided as `share` says, what names them; a number is not divided."""
    return tensor if share is None or tensor.dim() == 0 else Rows(tensor, share)


def num_bytes(tensors: Named) -> int:
    """Return what these take in this process."""
    return sum(_held(x).numel() * _held(x).element_size() for x in tensors.values())


def num_bytes_of_all(tensors: Named) -> int:
    """Return what these take in all processes together, what several have alike counted once."""
    return sum(x.size().numel() * _held(x).element_size() for x in tensors.values())


def copied(tensors: Named) -> dict[str, Tensor | Rows]:
    """Return copies in the CPU's memory, made one after the other."""
    return {name: _apply(x, lambda t: t.to("cpu", copy=True)) for name, x in tensors.items()}


def write(folder: Path, tensors: Named, group: Group) -> None:
    """Write the tensors of every process of the group; what several have alike one of them writes.

    Raises `OSError` or torch's `CheckpointException` on every process where one of them fails.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True, fqn_to_index_mapping=_files(tensors))
    tensors = {name: _apply(x, Tensor.detach) for name, x in tensors.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as is meant, for one process
        place = {"process_group": group.handle, "no_dist": group.size == 1}
        dcp.save(tensors, storage_writer=writer, planner=_SavePlanner(), **place)


def read(folder: Path, tensors: Named) -> None:
    """Fill these tensors; raises `ValueError` where the folder holds no such ones, as a rule after `shapes`."""
    tensors = {name: _apply(x, Tensor.detach) for name, x in tensors.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        reader = HuggingFaceStorageReader(str(folder))
        dcp.load(tensors, storage_reader=reader, planner=_LoadPlanner(), no_dist=True)


def shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and type of every tensor in a folder.

    Raises `SafetensorError` where a file is none, whatever its name.
    """
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    return {name: (tuple(x.size), x.properties.dtype) for name, x in metadata.state_dict_metadata.items()}


def check_is_safetensors(file: Path) -> None:
    """Raise `SafetensorError` for a file that is something else under this name."""
    if file.suffix != ".safetensors":
        raise SafetensorError(f"{file.name} is no safetensors file")
    with safe_open(file, framework="pt"):
        pass


def _files(tensors: Named) -> dict[str, int]:
    """Return the number of the file of each tensor, the same on every process, from 1."""
    numbers, file, filled = {}, 1, 0
    for name, x in tensors.items():
        size = x.size().numel() * _held(x).element_size()
        size = -(-size // len(x.share.sizes)) if isinstance(x, Rows) else size
        if filled and filled + size > FILE_BYTES:
            file, filled = file + 1, 0
        numbers[name] = file
        filled += size
    return numbers


def _held(x: Tensor | Rows) -> Tensor:
    return x.tensor if isinstance(x, Rows) else x


def _apply(x: Tensor | Rows, change) -> Tensor | Rows:
    return Rows(change(x.tensor), x.share) if isinstance(x, Rows) else change(x)
