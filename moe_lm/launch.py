"""Starts the processes of one machine by torchrun's own launcher, and ends with what they ended with."""

import logging
import os
import signal
import sys
import uuid
from dataclasses import fields

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from moe_lm.mistake import Mistake
from moe_lm.stopping import LAUNCHER, code_of

_LONGEST_SAVE = 120
"""Seconds that processes have for their last step and checkpoint after a signal, or to notice that one of them died.

On a GPU those that wait for the dead one notice nothing, and are killed then.
"""


def launch(arguments: list[str], num_processes: int) -> int:
    """Run `moe-lm` with these arguments in several processes; return the exit code of the first that failed, or 0.

    A signal is passed on to all of them, which then save and stop.
    """
    if os.environ.get("OMP_NUM_THREADS") is None:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // num_processes))
    # What went wrong the processes say themselves; the launcher would add a page.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.launcher").setLevel(logging.CRITICAL)
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        elastic_launch(_config(num_processes), sys.executable)("-m", "moe_lm", *arguments)
    except SignalException as stopped:
        return code_of(stopped.sigval)
    except ChildFailedError as failed:
        return _outcome({rank: failure.exitcode for rank, failure in failed.failures.items()})
    finally:
        del os.environ[LAUNCHER]
    return 0


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
        "signals_to_handle": "SIGTERM,SIGINT,SIGHUP,SIGUSR1",
        "shutdown_timeout": _LONGEST_SAVE,
    }
    known = {field.name for field in fields(LaunchConfig)}  # an older torch knows fewer
    return LaunchConfig(**{name: value for name, value in settings.items() if name in known})


def _outcome(codes: dict[int, int]) -> int:
    """Return the code that all failed with; one that a signal killed is said, and is a failure like any other."""
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
    """Raise `Mistake` for a number of processes that this machine cannot run; `num_devices` counts its GPUs."""
    if num_processes < 1:
        raise Mistake(f"num_processes={num_processes}: must be at least 1")
    if num_devices is not None and num_processes > num_devices:
        gpus = "1 GPU" if num_devices == 1 else f"{num_devices} GPUs"
        raise Mistake(f"num_processes={num_processes}: this machine has {gpus}, and each process takes one")
