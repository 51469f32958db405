"""Free memory and free disk space of this machine."""

import shutil
from pathlib import Path


def free_memory() -> int | None:
    """Return the bytes of memory that can still be allocated; None if the system does not report them."""
    limits = (_available(), _available_in_cgroup())
    return min((limit for limit in limits if limit is not None), default=None)


def free_disk(folder: Path) -> int:
    """Return the free bytes of the file system that holds a folder."""
    return shutil.disk_usage(folder).free


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _available_in_cgroup() -> int | None:
    """Return the bytes left to the control group of a container or batch job; its file cache counts as free."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        counters = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return None if limit == "max" else int(limit) - int(used) + int(counters.get("inactive_file", 0))
    except (OSError, ValueError):
        return None
