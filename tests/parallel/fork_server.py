"""Forks the ranks of one call after another from a process that has imported all they need, and tells how each ended.

The server itself computes nothing and has no threads, which a fork would lose.
"""

import faulthandler
import gc
import importlib
import os
import pickle
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import tiny_training  # noqa: F401
import torch
import torch._dynamo  # an optimizer imports it at its first use
from several import Call

import moe_lm.cli.train  # noqa: F401
from moe_lm.parallel.context import SINGLE_PROCESS, destroy_parallel, init_parallel
from moe_lm.parallel.signals import end_with_parent


def main(connection: Connection) -> None:
    """Serve calls until the other end of the pipe is closed."""
    end_with_parent()
    gc.freeze()  # a collection in a rank would copy the pages of all that is imported
    while True:
        try:
            call = connection.recv()
        except EOFError:
            return
        ranks = {_forked(call, rank): rank for rank in call.ranks}
        while ranks:
            pid, status = os.wait()
            connection.send((ranks.pop(pid), os.waitstatus_to_exitcode(status)))


def _forked(call: Call, rank: int) -> int:
    """Return the process id of a rank; the rank itself ends here."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        _become(call, rank)
        result = pickle.dumps(_called(call, rank))
        Path(call.folder, f"result-{rank}").write_bytes(result)
        code = 0
    except BaseException:  # SystemExit too: a rank that ends early returns nothing
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _become(call: Call, rank: int) -> None:
    """Set what differs between processes that a launcher has started."""
    log = os.open(Path(call.folder, f"log-{rank}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(call.folder)
    os.environ.clear()
    os.environ.update(call.environment)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(call.size), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    end_with_parent()
    faulthandler.dump_traceback_later(call.timeout, exit=True)
    # Fresh processes have different seeds: what draws without one of its own must not agree.
    np.random.seed()
    torch.default_generator.seed()
    torch.set_num_threads(1)


def _called(call: Call, rank: int) -> object:
    module, name = call.function.split(":")
    function, argument = getattr(importlib.import_module(module), name), pickle.loads(call.argument)
    if not call.meet:
        return function(argument)
    parallel = SINGLE_PROCESS
    if call.size > 1:
        parallel = init_parallel(torch.device("cpu"), f"file://{call.folder}/meeting-{call.size}")
    result = function(parallel, argument)
    destroy_parallel()
    return result


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
