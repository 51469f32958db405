"""What benchmarks have in common: options, works timed in turn, ratios round by round, a record of the measuring."""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from moe_lm.errors import UserError, in_a_line, is_out_of_memory

Work = Callable[[], object]
Seconds = dict[str, list[float]]

_WARM_ROUNDS = 3
"""Where works take and free memory in turn, it takes some rounds until none needs more from the system."""


def positive(text: str) -> int:
    """Return an option's number; for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: must be at least 1")
    return number


def not_negative(text: str) -> int:
    """Return an option's number, or none; for argparse."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number}: must be at least 0")
    return number


def folder(text: str) -> Path:
    """Return an option's folder; for argparse."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no such folder")
    return Path(text)


def new_file(text: str) -> Path:
    """Return an option's file, whose folder there must be before anything is measured; for argparse."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: is a folder, name a file in it")
    folder(str(Path(text).parent))
    path, is_new = Path(text), not Path(text).exists()
    try:
        path.open("a").close()
        if is_new:
            path.unlink()  # what is never measured leaves nothing
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: cannot be written: {error.strerror}") from error
    return path


def run(main: Callable[[], None]) -> None:
    """Call a benchmark; of a mistake, or too little memory, say so in a line."""
    try:
        main()
    except Exception as error:
        if not isinstance(error, UserError | OSError) and not is_out_of_memory(error):
            raise
        print(f"{Path(sys.argv[0]).name}: {in_a_line(error, most=1000)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Work, device: torch.device) -> float:
    """Return how long a work takes, on a GPU to its end there."""
    wait_for(device)
    started = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - started


def repeats(device: torch.device) -> int:
    """Return how often a work is done between two looks at the clock: a GPU waits for the first of its operations."""
    return 5 if device.type == "cuda" else 1


def in_turn(works: Mapping[str, Work], rounds: int, device: torch.device) -> Seconds:
    """Return each work's seconds of every round, without the first rounds, until which memory is being faulted in.

    Each round begins with another work, so that none always follows the same one.
    """
    times = repeats(device)
    names, seconds = list(works), {name: [] for name in works}
    for round_ in range(_WARM_ROUNDS + rounds):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            took = seconds_of(lambda work=works[name]: [work() for _ in range(times)], device) / times
            if round_ >= _WARM_ROUNDS:
                seconds[name].append(took)
    return seconds


def compared(seconds: Seconds, to: str) -> dict[str, dict[str, float]]:
    """Return of each work the median seconds, and median, least and largest of its ratio to another, round by round."""
    rows = {}
    for name, times in seconds.items():
        ratios = [time / other for time, other in zip(times, seconds[to], strict=True)]
        rows[name] = {
            "seconds": statistics.median(times),
            "ratio": statistics.median(ratios),
            "least_ratio": min(ratios),
            "largest_ratio": max(ratios),
        }
    return rows


def product_ceiling(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Return the FLOP/s of the fastest of a second's products of square matrices, or of five: what this machine can do.

    A second, as others on the machine may hold it up for tenths of one.
    """
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds_of(lambda: a @ b, device)
    least, whole, count = math.inf, 0.0, 0
    while count < 5 or whole < 1:
        taken = seconds_of(lambda: a @ b, device)
        least, whole, count = min(least, taken), whole + taken, count + 1
    return 2 * size**3 / least


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that this process has held so far, on its GPU or as Linux counts it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


def machine(device: torch.device) -> str:
    """Return what measured."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def commit() -> str:
    """Return what the variable COMMIT says, of a tree that was copied from elsewhere, or the commit of this tree."""
    if named := os.environ.get("COMMIT"):
        return named
    try:
        described = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(described, capture_output=True, text=True, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def write_record(path: Path | None, device: torch.device, content: Mapping[str, object]) -> None:
    """Write what was found with the command and the machine that found it, where a path is given."""
    if path is None:
        return
    record = {
        **content,
        "command": " ".join(["python", *(sys.argv[:1] or []), *sys.argv[1:]]),
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
