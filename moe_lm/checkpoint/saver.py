"""Asynchronous checkpoints: tensors are copied to the CPU, then written by a thread while training goes on.

Every process writes the rows it holds; the first process adds `state.json` and gives the folder its final name. A
failure leaves the earlier checkpoints untouched.
"""

import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch import nn
from torch.distributed.checkpoint import CheckpointException

from moe_lm.checkpoint import checkpoint, sharded_safetensors
from moe_lm.checkpoint.sharded_safetensors import NamedTensors
from moe_lm.errors import UserError, in_a_line
from moe_lm.optim.composite import CompositeOptimizer
from moe_lm.parallel.context import SINGLE_PROCESS, ParallelContext
from moe_lm.resources import free_disk, free_memory

_MEMORY_RESERVE = 0.1
"""Fraction of the free memory that a copy of the tensors must leave free."""
_DISK_RESERVE = 2**20
"""Bytes of disk for headers and `state.json`."""

Result = TypeVar("Result")


class Saver:
    """Saves and loads the checkpoints of one run; all processes call `load_newest`, `save` and `finish` together."""

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int,
        asynchronous: bool,
        log: Callable[[str], None],
        parallel: ParallelContext = SINGLE_PROCESS,
    ):
        self._folder, self._keep_last, self._asynchronous = folder, keep_last, asynchronous
        self._log, self._parallel, self._writers = log, parallel, parallel.writers
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self._memory_warned = False

    @property
    def run_folder(self) -> Path:
        """Return the run directory that holds the checkpoints."""
        return self._folder.parent

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, ascending."""
        return checkpoint.steps(self._folder)

    def load_newest(self, model: nn.Module, optimizer: CompositeOptimizer, fingerprint: str) -> dict | None:
        """Load model and optimizer from the newest intact checkpoint; return its state, or None without checkpoints.

        Raises `UserError` where the checkpoint was trained on data with another fingerprint.
        """
        path = checkpoint.newest(self._folder, self._parallel, self._log)
        if path is None:
            return None
        state = checkpoint.load_state(path)
        if state["data"] != fingerprint:
            raise UserError(f"the data have changed since {self.run_folder} began: choose another name=...")
        shards = self._parallel.shards
        checkpoint.load_model(path, model, shards, verified=True)
        optimizer.load(checkpoint.load_optimizer_state(path, model, shards, verified=True))
        return state

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

        Returns once the tensors are copied, so that they may change, or, with `wait`, once the checkpoint is written. A
        failure is logged and does not stop the training.
        """
        self._wait()
        path = checkpoint.path_of(self._folder, step)
        if self._parallel.first(path.exists):
            return
        shards = self._parallel.shards
        parts = {
            "model": checkpoint.model_tensors(model, shards),
            "optimizer": checkpoint.optimizer_tensors(model, optimizer.state, shards),
        }
        state = {"step": step, "num_processes": self._parallel.size, **state}
        self._error = self._parallel.first(lambda: self._check_disk(path, parts))
        if self._error is not None:
            self._log_error()
            return
        in_background = self._asynchronous and not wait and self._fits_in_memory(parts)
        if in_background:
            parts = {part: sharded_safetensors.copy_to_cpu(tensors) for part, tensors in parts.items()}
        self._thread = threading.Thread(target=self._write, args=(path, parts, state, keep), name="checkpoint")
        self._thread.start()
        if not in_background:
            self._wait()

    def finish(self) -> str | None:
        """Wait for the checkpoint that is being written; return why the last save failed, None if it succeeded."""
        self._wait()
        return self._error

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._error is not None:
                self._log_error()

    def _log_error(self) -> None:
        if self._parallel.is_first:
            self._log(f"WARNING: {self._error}; earlier checkpoints are untouched")

    def _check_disk(self, path: Path, parts: dict[str, NamedTensors]) -> str | None:
        """Return why the disk cannot hold the checkpoint, None if it can."""
        needed = _DISK_RESERVE + sum(map(sharded_safetensors.global_bytes, parts.values()))
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

    def _fits_in_memory(self, parts: dict[str, NamedTensors]) -> bool:
        """Whether each machine can hold a copy of its processes' tensors, and the file that each process assembles."""
        copy = sum(map(sharded_safetensors.local_bytes, parts.values()))
        machine, free = socket.gethostname(), free_memory()
        mine = (machine, copy + min(copy, sharded_safetensors.FILE_BYTES))
        needed = sum(num_bytes for where, num_bytes in self._parallel.each(mine) if where == machine)
        fits = not self._parallel.any(free is not None and needed >= (1 - _MEMORY_RESERVE) * free)[0]
        if not fits and self._parallel.is_first and not self._memory_warned:
            self._log("memory has no room for a copy of the model: training waits while a checkpoint is written")
            self._memory_warned = True
        return fits

    def _write(self, path: Path, parts: dict[str, NamedTensors], state: dict, keep: set[int]) -> None:
        partial = checkpoint.partial_path(path)
        try:
            self._run_on_all(lambda: _clear(partial), only_first=True)
            for part, tensors in parts.items():
                self._run_on_all(lambda part=part, tensors=tensors: self._write_part(partial / part, tensors))
            files = self._run_on_all(lambda: checkpoint.manifest(partial, self._writers))
            whole = state | {"files": dict(sorted(pair for each in files for pair in each.items()))}
            self._run_on_all(lambda: checkpoint.commit(partial, path, whole), only_first=True)
        except _WriteError as error:
            self._error = f"cannot write checkpoint {path}: {error}"
            if self._parallel.is_first:
                shutil.rmtree(partial, ignore_errors=True)
            return
        except RuntimeError as error:  # another process is gone
            self._error = f"cannot write checkpoint {path}: {in_a_line(error)}"
            return
        if self._parallel.is_first:
            self._prune(keep)

    def _prune(self, keep: set[int]) -> None:
        """Delete old checkpoints; a failure is only logged, because the new checkpoint is complete."""
        try:
            checkpoint.prune(self._folder, self._keep_last, keep)
        except Exception as error:
            self._log(f"WARNING: cannot delete old checkpoints in {self._folder}: {_reason(error)}")

    def _write_part(self, folder: Path, tensors: NamedTensors) -> None:
        if tensors:
            sharded_safetensors.write(folder, tensors, self._writers.control)
        else:  # an optimizer before its first step
            folder.mkdir(exist_ok=True)

    def _run_on_all(self, call: Callable[[], Result], only_first: bool = False) -> list[Result]:
        """Run a function on all processes, or only on the first; return all results, or raise `_WriteError` on all."""
        result, reason = None, None
        if self._writers.is_first or not only_first:
            try:
                result = call()
            except CheckpointException as error:
                reason = "; ".join(_reason(failure[0]) for failure in error.failures.values())
            except Exception as error:  # whatever its type: a thread that died would look finished
                reason = _reason(error)
        outcomes = self._writers.each((result, reason))
        if reasons := [reason for _, reason in outcomes if reason is not None]:
            raise _WriteError(" ".join(reasons[0].split()))
        return [result for result, _ in outcomes]


class _WriteError(Exception):
    """Some process could not write its part."""


def _clear(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
