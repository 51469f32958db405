"""Writes checkpoints beside the training: copied piece by piece, written by a thread, complete before they count.

Every process writes what it holds; the first one adds `state.json` and gives the folder its name. What fails leaves the
earlier checkpoints as they were.
"""

import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch import nn
from torch.distributed.checkpoint import CheckpointException

from moe_lm.atomic_io import checksum, sync
from moe_lm.checkpoint import checkpoint
from moe_lm.checkpoint import sharded_safetensors as tensors_on_disk
from moe_lm.checkpoint.sharded_safetensors import Named
from moe_lm.errors import UserError, in_a_line
from moe_lm.optim import CompositeOptimizer
from moe_lm.parallel.context import SINGLE_PROCESS, ParallelContext
from moe_lm.resources import free_disk, free_memory

_SPARE = 0.1
"""Share of the free memory that a copy must leave."""
_ROOM = 2**20
"""Bytes of disk for what is not a tensor: headers and state."""

Result = TypeVar("Result")


class Saver:
    """Saves checkpoints of one run; `save` and `finish` are called by all processes together."""

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int,
        asynchronous: bool,
        say: Callable[[str], None],
        parallel: ParallelContext = SINGLE_PROCESS,
    ):
        self._folder, self._keep_last, self._asynchronous = folder, keep_last, asynchronous
        self._say, self._parallel = say, parallel
        self._writers = parallel.writers
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self._tight_memory_said = False

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: CompositeOptimizer,
        state: dict,
        keep: set[int],
        *,
        wait: bool = False,
    ) -> None:
        """Save this step's checkpoint, then delete all but the last few and the steps in `keep`.

        Returns once the tensors are copied and may change, or, `wait`, once the checkpoint is written. A failure is
        said and training goes on to the next attempt.
        """
        self._wait()
        path = checkpoint.path_of(self._folder, step)
        if self._parallel.first(path.exists):
            return
        parts = {"model": checkpoint.of_model(model), "optimizer": checkpoint.of_optimizer(model, optimizer)}
        state = {"step": step, "num_processes": self._parallel.size, **state}
        self._error = self._parallel.first(lambda: self._too_little_disk(path, parts))
        if self._error is not None:
            self._complain()
            return
        beside = self._asynchronous and not wait and self._fits_in_memory(parts)
        if beside:
            parts = {part: tensors_on_disk.copied(tensors) for part, tensors in parts.items()}
        self._thread = threading.Thread(target=self._write, args=(path, parts, state, keep), name="checkpoint")
        self._thread.start()
        if not beside:
            self._wait()

    def finish(self) -> str | None:
        """Wait for the checkpoint that is being written; return why the last one failed, None if it did not."""
        self._wait()
        return self._error

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._error is not None:
                self._complain()

    def _complain(self) -> None:
        if self._parallel.is_first:
            self._say(f"WARNING: {self._error}; earlier checkpoints are untouched")

    def _too_little_disk(self, path: Path, parts: dict[str, Named]) -> str | None:
        needed = _ROOM + sum(tensors_on_disk.num_bytes_of_all(tensors) for tensors in parts.values())
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            free = free_disk(self._folder)
        except OSError as error:
            return f"cannot write checkpoint {path}: {error.strerror}"
        if free >= needed:
            return None
        return (
            f"cannot write checkpoint {path}: it needs {needed / 2**20:,.0f} MiB and the disk has {free / 2**20:,.0f}"
        )

    def _fits_in_memory(self, parts: dict[str, Named]) -> bool:
        """Whether every machine can hold its processes' copies, and of each a file that is being made."""
        copy = sum(map(tensors_on_disk.num_bytes, parts.values()))
        machine, free = socket.gethostname(), free_memory()
        mine = (machine, copy + min(copy, tensors_on_disk.FILE_BYTES))
        needed = sum(num_bytes for where, num_bytes in self._parallel.each(mine) if where == machine)
        fits = not self._parallel.any(free is not None and needed >= (1 - _SPARE) * free)[0]
        if not fits and self._parallel.is_first and not self._tight_memory_said:
            self._say("memory has no room for a copy of the model: training waits while a checkpoint is written")
            self._tight_memory_said = True
        return fits

    def _write(self, path: Path, parts: dict[str, Named], state: dict, keep: set[int]) -> None:
        partial = checkpoint.partial_of(path)
        try:
            self._together(lambda: _emptied(partial), first=True)
            for part, tensors in parts.items():
                self._together(lambda part=part, tensors=tensors: self._written(partial / part, tensors))
            files = self._together(lambda: self._sums(partial))
            whole = state | {"files": dict(sorted(pair for each in files for pair in each.items()))}
            self._together(lambda: _put_in_place(partial, path, checkpoint.state_text(whole)), first=True)
        except _Failed as error:
            self._error = f"cannot write checkpoint {path}: {error}"
            if self._parallel.is_first:
                shutil.rmtree(partial, ignore_errors=True)
            return
        except RuntimeError as error:  # another process has gone
            self._error = f"cannot write checkpoint {path}: {in_a_line(error)}"
            return
        if self._parallel.is_first:
            self._prune(keep)

    def _prune(self, keep: set[int]) -> None:
        """Delete old checkpoints; one that cannot be deleted is said, as the new one is there all the same."""
        try:
            checkpoint.prune(self._folder, self._keep_last, keep)
        except Exception as error:
            self._say(f"WARNING: cannot delete old checkpoints in {self._folder}: {_said(error)}")

    def _written(self, folder: Path, tensors: Named) -> None:
        if not tensors:  # an optimizer before its first step
            folder.mkdir(exist_ok=True)
            return
        tensors_on_disk.write(folder, tensors, self._writers.control)

    def _sums(self, partial: Path) -> dict[str, list]:
        """Size and checksum of the files as they are read back; the processes take them by turns."""
        files = sorted(file for file in partial.rglob("*") if not file.is_dir())
        own = [file for i, file in enumerate(files) if i % self._writers.size == self._writers.rank]
        return {str(file.relative_to(partial)): [file.stat().st_size, checksum(file)] for file in own}

    def _together(self, call: Callable[[], Result], first: bool = False) -> list[Result]:
        """Let every process (or the first) call; return all results, or raise `_Failed` on all if one fails."""
        result, reason = None, None
        if self._writers.is_first or not first:
            try:
                result = call()
            except CheckpointException as error:
                reason = "; ".join(_said(failure[0]) for failure in error.failures.values())
            except Exception as error:  # whatever it is: a thread that dies would look like one that has written
                reason = _said(error)
        outcomes = self._writers.each((result, reason))
        if reasons := [reason for _, reason in outcomes if reason is not None]:
            raise _Failed(" ".join(reasons[0].split()))
        return [result for result, _ in outcomes]


class _Failed(Exception):
    """Some process could not do its part."""


def _said(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _emptied(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _put_in_place(partial: Path, path: Path, state: str) -> None:
    """From here on the checkpoint counts."""
    (partial / "state.json").write_text(state)
    for file in [*partial.rglob("*"), partial]:
        sync(file)
    partial.rename(path)
    sync(path.parent)


def must(error: str | None) -> None:
    """Raise `UserError` for a checkpoint without which the run cannot end."""
    if error is not None:
        raise UserError(f"{error}: earlier checkpoints are untouched; make room and repeat the command")
