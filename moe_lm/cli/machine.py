"""The `machine` group of a configuration: device, precision, threads and memory.

This module re-exports the functions that build a configuration's objects.
"""

import contextlib
import ctypes
import os

import torch

from moe_lm.construction import build, build_model, check_targets
from moe_lm.errors import UserError

__all__ = ["build", "build_model", "check_targets"]

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def device(name: str, several: bool = False) -> torch.device:
    """Return the torch device of `machine.device`; with several processes, this process's GPU by its LOCAL_RANK.

    Raises `UserError` where the machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UserError(f"machine.device={name}: choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("machine.device=cuda: torch sees no GPU here; choose machine.device=cpu")
    if not several or name == "cpu":
        return torch.device(name)
    place = int(os.environ.get("LOCAL_RANK", 0))
    if place >= torch.cuda.device_count():
        raise UserError(f"process {place} of this machine finds no GPU: the machine has {torch.cuda.device_count()}")
    torch.cuda.set_device(place)
    return torch.device(name, place)


def autocast_type(precision: str, on: torch.device) -> torch.dtype | None:
    """Return the autocast type of `machine.precision`, None for float32."""
    if precision not in ("auto", "float32", "bfloat16"):
        raise UserError(f"machine.precision={precision}: choose auto, float32 or bfloat16")
    if precision == "auto":
        precision = "bfloat16" if on.type == "cuda" else "float32"
    return torch.bfloat16 if precision == "bfloat16" else None


def set_threads(threads: int | None) -> None:
    """Set the number of CPU threads; None keeps torch's choice."""
    if threads is not None:
        if threads < 1:
            raise UserError(f"machine.threads={threads}: must be at least 1, or null")
        torch.set_num_threads(threads)


def leave_threads(threads: int | None, on: torch.device) -> None:
    """Use one CPU thread for training on a GPU unless `machine.threads` is set, as the CPU's work needs no more.

    Otherwise several training runs on one machine would compete for its cores, each with a thread per core.
    """
    if threads is None and on.type == "cuda":
        torch.set_num_threads(1)


def be_deterministic(on: torch.device) -> None:
    """Choose deterministic kernels on the CPU; results on a GPU are reproducible up to rounding only."""
    torch.use_deterministic_algorithms(on.type == "cpu")
    # Filling new tensors with NaN is a debugging aid that costs a pass over memory.
    torch.utils.deterministic.fill_uninitialized_memory = False


def keep_memory() -> None:
    """Let glibc keep freed memory for the next step instead of returning it, and use huge pages (2 MiB).

    For a layer of 256 experts of 1 M parameters, keeping memory reduces the time of a forward and backward pass to 0.52
    of what it was, and huge pages reduce that to 0.91 of it (docs/performance.md). Call this before the first tensor is
    created, because torch reads THP_MEM_ALLOC_ENABLE at its first allocation.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def ready_to_read(config: dict) -> torch.device:
    """Apply the settings common to all commands that read text with a model; return the device."""
    for key, value in config.get("batch", {}).items():
        if value < 1:
            raise UserError(f"batch.{key}={value}: must be at least 1")
    set_threads(config["machine"]["threads"])
    keep_memory()
    return device(config["machine"]["device"])
