"""What the machine has left: memory and disk."""

import shutil
from pathlib import Path


def free_memory() -> int | None:
    """Return the bytes of memory that can still be taken, None where the system does not say."""
    found = [_available(), _of_container()]
    return min((x for x in found if x is not None), default=None)


def free_disk(folder: Path) -> int:
    """Return the bytes that the file system of a folder has left."""
    return shutil.disk_usage(folder).free


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def _of_container() -> int | None:
    """What a control group (a container, a batch job) may still take; files in its cache can go."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        inactive = [
            line for line in (folder / "memory.stat").read_text().splitlines() if line.startswith("inactive_file ")
        ]
        return None if limit == "max" else int(limit) - int(used) + sum(int(line.split()[1]) for line in inactive)
    except (OSError, ValueError):
        return None
