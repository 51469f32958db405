"""What commands make of a configuration: its objects, and the machine as it asks for it."""

import contextlib
import ctypes
import os

import torch

from moe_lm.construction import build, build_model, check_targets, packaged_targets
from moe_lm.errors import UserError

__all__ = ["build", "build_model", "check_targets", "packaged_targets"]

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def device(name: str, several: bool = False) -> torch.device:
    """Return the device of `machine.device`, of several processes this one's (LOCAL_RANK of the environment).

    Raises `UserError` where the machine lacks it.
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
        raise UserError(f"process {place} of this machine finds no GPU: it has {torch.cuda.device_count()}")
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
    """Fix the CPU threads and let no operation differ from run to run."""
    if threads is not None:
        if threads < 1:
            raise UserError(f"machine.threads={threads}: must be at least 1, or null")
        torch.set_num_threads(threads)


def leave_threads(threads: int | None, on: torch.device) -> None:
    """On a GPU keep one CPU thread, where none are asked for: what is left to the host has no use for more.

    Of trainings side by side on one machine, each with a thread for every core, each step would wait for all others'.
    """
    if threads is None and on.type == "cuda":
        torch.set_num_threads(1)


def be_deterministic(on: torch.device) -> None:
    """Choose reproducible kernels on the CPU; a GPU promises its results to rounding only."""
    torch.use_deterministic_algorithms(on.type == "cpu")
    # Filling every fresh tensor with NaN is a debugging aid that costs a pass over memory.
    torch.utils.deterministic.fill_uninitialized_memory = False


def keep_memory() -> None:
    """Let glibc keep what is freed, not fault it in again each step, and take large tensors in pages of 2 MiB.

    Measured at 256 experts of 1 M parameters: forward and backward of the layer take 0.52 of the time, and by the large
    pages 0.91 of that (docs/performance.md). Before the first tensor is made, as torch then decides on its pages.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def ready_to_read(config: dict) -> torch.device:
    """Check and apply what the commands that read text with a model have in common; return the device."""
    for key, value in config.get("batch", {}).items():
        if value < 1:
            raise UserError(f"batch.{key}={value}: must be at least 1")
    set_threads(config["machine"]["threads"])
    keep_memory()
    return device(config["machine"]["device"])
