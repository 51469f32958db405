"""A small file system in memory, to be filled up."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from faults.trial import Trial


@contextlib.contextmanager
def small_disk(trial: Trial) -> Iterator[Path]:
    """Put the run onto a file system of a few MiB in memory."""
    disk = trial.site.folder / f"disk-{trial.name}"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "faults", disk], check=True)
    try:
        trial.arguments["runs"] = f"disk-{trial.name}"
        trial.run = disk / trial.name
        yield disk
        trial.close()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def may_mount(folder: Path) -> bool:
    """Return whether this process may mount a file system."""
    place = folder / "disk-tried"
    place.mkdir(exist_ok=True)
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "faults", place], capture_output=True)
    except OSError:
        return False
    return done.returncode == 0 and subprocess.run(["umount", place], capture_output=True).returncode == 0


def fill(disk: Path, room: int) -> None:
    """Fill a file system except for `room` bytes."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(4096))
    os.truncate(ballast, max(0, ballast.stat().st_size - room))
