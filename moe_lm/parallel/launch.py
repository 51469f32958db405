"""Starts the processes of one machine by torchrun's own launcher, and ends with what they ended with."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import uuid
from dataclasses import fields
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from moe_lm.errors import UserError
from moe_lm.parallel.signals import INTERRUPTED, LAUNCHER, REQUEUE, STOPPED_EARLY, code_of
from moe_lm.resources import free_memory

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_PROCESS_BYTES = 300 << 20
"""What a process takes before it has a model: Python and torch."""


def launch(arguments: list[str], num_processes: int) -> int:
    """Run `moe-lm` with these arguments in several processes; return the exit code of the first that failed, or 0.

    A signal is passed on to all of them, which then save and stop; how long that takes is theirs to say. When one dies,
    torchrun's launcher gives the others half a minute: on a GPU they wait for it and notice nothing.
    """
    if os.environ.get("OMP_NUM_THREADS") is None:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // num_processes))
    # What went wrong the processes say themselves; the launcher would add a page.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.launcher").setLevel(logging.CRITICAL)
    os.environ[LAUNCHER] = str(os.getpid())
    received: list[int] = []
    before = {number: signal.signal(number, _passing_on(received)) for number in _PASSED_ON if not _ignored(number)}
    try:
        elastic_launch(_config(num_processes), sys.executable)(*program()[1:], *arguments)
    except SignalException as stopped:  # another one, or an older torch, whose launcher takes them all
        return code_of(stopped.sigval)
    except ChildFailedError as failed:
        return _outcome({rank: failure.exitcode for rank, failure in failed.failures.items()}, received)
    finally:
        del os.environ[LAUNCHER]
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def program() -> tuple[str, ...]:
    """Return the command line that starts moe-lm, not from what lies in the working directory unless it lies there."""
    here = Path(__file__).resolve().parents[2]
    return sys.executable, *(() if here == Path.cwd() else ("-P",)), "-m", "moe_lm"


def _ignored(number: int) -> bool:
    return signal.getsignal(number) == signal.SIG_IGN  # as nohup has it


def _passing_on(received: list[int]):
    """Return what hands a signal to every process; before there is any it ends the launcher."""

    def pass_on(number, frame):  # noqa: ARG001
        received.append(number)
        children = _children()
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if not children:
            sys.exit(code_of(number))

    return pass_on


def _children() -> list[int]:
    """Return the processes that this one started; torchrun's launcher does not tell them."""
    if Path("/proc/self/stat").exists():
        table = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                table.append((path.parent.name, path.read_text().rpartition(")")[2].split()[1]))
    else:
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
        table = [line.split() for line in listed.splitlines()]
    return [int(pid) for pid, parent in table if int(parent) == os.getpid()]


def _config(num_processes: int) -> LaunchConfig:
    settings = {
        "min_nodes": 1,
        "max_nodes": 1,
        "nproc_per_node": num_processes,
        "run_id": uuid.uuid4().hex,
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "localhost:0",
        "local_addr": "localhost",
        "max_restarts": 0,
        "monitor_interval": 0.1,
        "logs_specs": DefaultLogsSpecs(),
        "signals_to_handle": "SIGQUIT",  # the others are passed on here
    }
    known = {field.name for field in fields(LaunchConfig)}  # an older torch knows fewer
    return LaunchConfig(**{name: value for name, value in settings.items() if name in known})


def _outcome(codes: dict[int, int], received: list[int]) -> int:
    """Return the code that all failed with; one that a signal killed is said, and is a failure like any other.

    Where all were stopped by a signal passed on, before or in training, that is what they ended of.
    """
    stops = {REQUEUE, INTERRUPTED, STOPPED_EARLY, *(-number for number in received)}
    if received and stops.issuperset(codes.values()):
        return code_of(received[0])
    # SIGTERM is what the launcher sends to those that are left.
    killed = sorted((code == -signal.SIGTERM, rank, code) for rank, code in codes.items() if code < 0)
    told = [code for code in codes.values() if code > 0]
    if killed and (not killed[0][0] or not told):
        _, rank, code = killed[0]
        name = signal.Signals(-code).name
        print(f"moe-lm: process {rank} was killed by {name}: repeat the command to go on", file=sys.stderr)
        return 1
    return min(told, key=lambda code: (code == 1, code))


def check_num_processes(num_processes: int, num_devices: int | None) -> None:
    """Raise `UserError` for a number of processes that this machine cannot run; `num_devices` counts its GPUs."""
    if num_processes < 1:
        raise UserError(f"num_processes={num_processes}: must be at least 1")
    if num_devices is not None and num_processes > num_devices:
        gpus = "1 GPU" if num_devices == 1 else f"{num_devices} GPUs"
        raise UserError(f"num_processes={num_processes}: this machine has {gpus}, and each process takes one")
    free = free_memory()
    if free is not None and num_processes * _PROCESS_BYTES > free:
        needed = f"each takes {_PROCESS_BYTES / 2**20:.0f} MiB before it has a model"
        raise UserError(f"num_processes={num_processes}: {needed}, and {free / 2**30:.1f} GiB of memory are free")
