"""Functions of ranks that go wrong, and one that leaves behind what it can."""

import os
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from moe_lm import config_files


def wrong(parallel, how: str) -> None:
    """Go wrong in rank 1, for which the others wait."""
    if parallel.rank == 1:
        HOW[how]()
    parallel.each(None)


def _raise() -> None:
    raise ValueError("the mistake of rank 1")


HOW = {
    "raises": _raise,
    "warns": lambda: warnings.warn("the mistake of rank 1", stacklevel=1),
    "exits": lambda: sys.exit(0),
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hangs": lambda: time.sleep(1000),
}


def state(_: None) -> dict:
    """What a rank finds of its process's state, before it changes all of it."""
    found = {
        "folder": str(Path.cwd()),
        "left": os.environ.get("LEFT"),
        "from the test": os.environ.get("FROM_THE_TEST"),
        "numbers": [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")],
        "handler": signal.getsignal(signal.SIGTERM),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cached": config_files.packaged_targets.cache_info().currsize,
        "drawn": (torch.rand(()).item(), np.random.rand()),
        "hash": hash("a name"),
    }
    os.chdir("/")
    os.environ.update(LEFT="something", WORLD_SIZE="7")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.use_deterministic_algorithms(True)
    config_files.packaged_targets()
    return found
