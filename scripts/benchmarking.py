"""What the benchmarks share: options, interleaved timing, ratios round by round, and a record of each measurement."""

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

from moe_lm.cli.machine import keep_memory, set_threads
from moe_lm.errors import UserError, in_a_line, is_out_of_memory

Work = Callable[[], object]
Seconds = dict[str, list[float]]

_SHARED = {
    "words": {"help": "words of a batch"},
    "vocabulary": {"help": "words of the vocabulary"},
    "rounds": {"help": "rounds that are timed"},
    "square": {"default": 2048, "help": "size of the square matrices whose products give the ceiling"},
    "threads": {"help": "CPU threads; default: torch's choice"},
}
"""Options of several benchmarks, all positive integers."""


def positive(text: str) -> int:
    """Return an option's number; for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: must be at least 1")
    return number


def new_file(text: str) -> Path:
    """Return the path of a file that can be written, without leaving a new one behind; for argparse."""
    path, is_new = Path(text), not Path(text).exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: cannot be written: {error.strerror}") from error
    if is_new:
        path.unlink()
    return path


def parser(doc: str, *shared: str, **defaults: int) -> argparse.ArgumentParser:
    """Return a parser with the script's docstring as help, some of the shared options, and --json.

    The names in `defaults` are shared options too, with these defaults.
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in (*shared, *defaults):
        if name == "overrides":
            made.add_argument("--overrides", nargs="*", default=[], help="further keys of moe-lm train")
        else:
            settings = {"type": positive, **_SHARED[name]}
            made.add_argument(f"--{name}", **settings | ({"default": defaults[name]} if name in defaults else {}))
    made.add_argument("--json", type=new_file, help="file for the figures")
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the command's options and apply its settings."""
    options = made.parse_args()
    apply_settings(options)
    return options


def apply_settings(options: argparse.Namespace) -> None:
    """Set the number of threads of this process, and let it keep freed memory."""
    keep_memory()
    set_threads(options.threads)


def run(main: Callable[[], None]) -> None:
    """Run a benchmark; report a user's mistake or too little memory in one line, without a traceback."""
    try:
        main()
    except Exception as error:
        if not isinstance(error, UserError | OSError) and not is_out_of_memory(error):
            raise
        print(f"{Path(sys.argv[0]).name}: {in_a_line(error, most=1000)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished everything launched so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Work, device: torch.device) -> float:
    """Return how long a call takes, on a GPU until its kernels have finished."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def interleaved(works: Mapping[str, Work], rounds: int, device: torch.device, warmup: int = 3) -> Seconds:
    """Return the seconds of each work in each round, or its seconds per unit if it returns how many units it did.

    Each round begins with a different work, so that none always follows the same one. The warm-up rounds, which
    allocate memory, are left out. On a GPU a work runs five times between two synchronisations.
    """
    times = 5 if device.type == "cuda" else 1
    names, seconds = list(works), {name: [] for name in works}
    for number in range(warmup + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            done = []
            took = seconds_of(lambda work=works[name], to=done: to.extend(work() for _ in range(times)), device)
            if number >= warmup:
                seconds[name].append(took / sum(units if isinstance(units, int) else 1 for units in done))
    return seconds


def ratios(seconds: Seconds, to: str) -> dict[str, dict[str, float]]:
    """Return each work's median seconds, and the median, least and largest of its ratios to `to` in the rounds."""
    rows = {}
    for name, times in seconds.items():
        found = [time / other for time, other in zip(times, seconds[to], strict=True)]
        rows[name] = {
            "seconds": statistics.median(times),
            "ratio": statistics.median(found),
            "least_ratio": min(found),
            "largest_ratio": max(found),
        }
    return rows


def product_ceiling(device: torch.device, size: int, dtype: torch.dtype | None = None) -> float:
    """Return the FLOP/s of the fastest product of square matrices, out of at least five and at least a second.

    `dtype` is by default bfloat16 on a GPU, float32 on a CPU.
    """
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds_of(lambda: a @ b, device)
    least, total, count = math.inf, 0.0, 0
    while count < 5 or total < 1:  # other programs may delay this one for tenths of a second
        took = seconds_of(lambda: a @ b, device)
        least, total, count = min(least, took), total + took, count + 1
    return 2 * size**3 / least


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that this process has held so far, on its GPU or as Linux counts it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


def machine(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def commit() -> str:
    """Return this tree's commit, or the environment variable COMMIT, which a copy without history needs."""
    if named := os.environ.get("COMMIT"):
        return named
    try:
        describe = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(describe, capture_output=True, text=True, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def write_record(options: argparse.Namespace, device: torch.device, content: Mapping[str, object]) -> None:
    """Write the figures with options, command, machine and versions to the file that --json names, if any."""
    if options.json is None:
        return
    record = {
        **content,
        "options": {key: value for key, value in vars(options).items() if key != "json"},
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    options.json.write_text(json.dumps(record, indent=1, default=str) + "\n")
