"""Launches the processes of one machine by torchrun's launcher and returns their exit code."""

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
from moe_lm.parallel.signals import INTERRUPTED, LAUNCHER, REQUEUE, STOPPED_EARLY, exit_code_of
from moe_lm.resources import free_memory

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_PROCESS_BYTES = 300 << 20
"""Memory of a process before it has a model: Python and PyTorch."""


def launch(arguments: list[str], num_processes: int) -> int:
    """Run `moe-lm` with these arguments in several processes; return the exit code of the first that failed, or 0.

    A signal is forwarded to all processes, which save and stop in their own time. When one dies, torchrun's launcher
    kills the others after half a minute: on a GPU they would wait for it for ever.
    """
    if os.environ.get("OMP_NUM_THREADS") is None:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // num_processes))
    # The processes log their own errors, to which the launcher would add a page.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.launcher").setLevel(logging.CRITICAL)
    os.environ[LAUNCHER] = str(os.getpid())
    received: list[int] = []
    before = {
        number: signal.signal(number, _forward_to_children(received)) for number in _FORWARDED if not _ignored(number)
    }
    try:
        elastic_launch(_config(num_processes), sys.executable)(*program()[1:], *arguments)
    except SignalException as stopped:  # an older torch, whose launcher handles all signals
        return exit_code_of(stopped.sigval)
    except ChildFailedError as failed:
        return _outcome({rank: failure.exitcode for rank, failure in failed.failures.items()}, received)
    finally:
        del os.environ[LAUNCHER]
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def program() -> tuple[str, ...]:
    """Return the command line that starts this moe-lm, whatever else the working directory holds."""
    here = Path(__file__).resolve().parents[2]
    return sys.executable, *(() if here == Path.cwd() else ("-P",)), "-m", "moe_lm"


def _ignored(number: int) -> bool:
    return signal.getsignal(number) == signal.SIG_IGN  # for example by nohup


def _forward_to_children(received: list[int]):
    """Return a handler that forwards a signal to every process or, if there is none yet, ends the launcher."""

    def forward(number, frame):  # noqa: ARG001
        received.append(number)
        children = _children()
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if not children:
            sys.exit(exit_code_of(number))

    return forward


def _children() -> list[int]:
    """Return the ids of the child processes, which torchrun's launcher does not expose."""
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
        "signals_to_handle": "SIGQUIT",  # the other signals are forwarded by this module
    }
    known = {field.name for field in fields(LaunchConfig)}  # an older torch knows fewer
    return LaunchConfig(**{name: value for name, value in settings.items() if name in known})


def _outcome(codes: dict[int, int], received: list[int]) -> int:
    """Return one exit code for all processes, given the exit codes of the failed ones.

    If a forwarded signal stopped all of them, the result is the exit code of that signal. A process that another signal
    killed is reported and counts as failed.
    """
    stops = {REQUEUE, INTERRUPTED, STOPPED_EARLY, *(-number for number in received)}
    if received and stops.issuperset(codes.values()):
        return exit_code_of(received[0])
    # The launcher itself sends SIGTERM to the processes that are left.
    killed = sorted((code == -signal.SIGTERM, rank, code) for rank, code in codes.items() if code < 0)
    failed = [code for code in codes.values() if code > 0]
    if killed and (not killed[0][0] or not failed):
        _, rank, code = killed[0]
        name = signal.Signals(-code).name
        print(f"moe-lm: process {rank} was killed by {name}: repeat the command to go on", file=sys.stderr)
        return 1
    return min(failed, key=lambda code: (code == 1, code))


def check_num_processes(num_processes: int, num_devices: int | None) -> None:
    """Raise `UserError` for more processes than this machine can run; `num_devices` is the number of its GPUs."""
    if num_processes < 1:
        raise UserError(f"num_processes={num_processes}: must be at least 1")
    if num_devices is not None and num_processes > num_devices:
        gpus = "1 GPU" if num_devices == 1 else f"{num_devices} GPUs"
        raise UserError(f"num_processes={num_processes}: this machine has {gpus}, and each process takes one")
    free = free_memory()
    if free is not None and num_processes * _PROCESS_BYTES > free:
        needed = f"each takes {_PROCESS_BYTES / 2**20:.0f} MiB before it has a model"
        raise UserError(f"num_processes={num_processes}: {needed}, and {free / 2**30:.1f} GiB of memory are free")
