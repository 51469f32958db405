"""Several processes on this machine, each running one function of a test's; what each returned comes back.

Two fork servers import torch and moe_lm once and fork the ranks of every call, so that a call costs no imports and
leaves no state to the next one. Ranks of even and odd number come from different servers: forks of one process share
its addresses and its seed of hashes, and would hide a set that two processes iterate in different orders.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent.parent
NUM_SERVERS = 2
GRACE = 5
"""Seconds in which ranks that wait for a failed one say so, before they are killed."""
START = 60
"""Seconds in which the servers import."""


class Call(NamedTuple):
    """What a server needs to know of a call."""

    size: int
    ranks: range
    """The ranks that this server forks."""
    function: str
    """module:name"""
    argument: bytes
    folder: str
    environment: dict[str, str]
    meet: bool
    timeout: float


class Ranks:
    """Runs functions in several processes; the servers start with the first call, and again after a failure."""

    def __init__(self):
        self._servers: list[_Server] = []

    def run(
        self, size: int, function: str, argument: object, folder: Path, *, meet: bool = True, timeout: float = 120
    ) -> list:
        """Call `function` (module:name) in `size` processes; return what each returned, by rank.

        It gets the `ParallelContext` of processes that have met and the argument; without `meet`, the argument alone.
        The working directory is `folder`, and the environment that of this call. Raises `AssertionError` with the
        output of every rank that failed.
        """
        rest = function, pickle.dumps(argument), str(folder), dict(os.environ), meet, timeout
        for name in [f"meeting-{size}", *(f"log-{rank}" for rank in range(size))]:
            (folder / name).unlink(missing_ok=True)
        if not all(server.alive for server in self._servers):
            self.stop()
        try:
            self._servers = self._servers or [_Server() for _ in range(NUM_SERVERS)]
            for first, server in enumerate(self._servers[:size]):
                with contextlib.suppress(OSError):  # one that has died says why in its log
                    server.connection.send(Call(size, range(first, size, NUM_SERVERS), *rest))
            codes = self._wait(size, timeout)
        except BaseException:
            self.stop()
            raise
        if any(codes.get(rank) != 0 for rank in range(size)):
            said = "".join(server.log() for server in self._servers)
            if len(codes) < size:
                self.stop()
            raise AssertionError(f"{function} failed in {size} processes\n{said}{_report(codes, size, folder)}")
        return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(size)]

    def stop(self) -> None:
        """End the servers, and the ranks that are left."""
        for server in self._servers:
            server.kill()
        self._servers = []

    def _wait(self, size: int, timeout: float) -> dict[int, int]:
        """Return the exit codes of the ranks that ended in time, the first to end first."""
        codes: dict[int, int] = {}
        open_connections = {server.connection for server in self._servers}
        deadline = time.monotonic() + START + timeout
        while len(codes) < size and open_connections:
            ready = wait(open_connections, max(0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                try:
                    rank, code = connection.recv()
                    codes[rank] = code
                except (EOFError, OSError):  # the server has died
                    open_connections.remove(connection)
                    code = 1
                if code:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return codes


class _Server:
    """A fork server and this process's end of the pipe to it."""

    def __init__(self):
        self.connection, theirs = Pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        paths = os.pathsep.join([str(TESTS), str(TESTS / "parallel"), str(TESTS.parent)])
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", Path(__file__).with_name("fork_server.py"), str(theirs.fileno())],
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, with its ranks, that can be killed
        )
        theirs.close()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def log(self) -> str:
        """Return what the server itself had to say."""
        self._log.seek(0)
        return self._log.read().decode()

    def kill(self) -> None:
        if self.alive:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.connection.close()
        self._log.close()


def _report(codes: dict[int, int], size: int, folder: Path) -> str:
    """Return the output of each rank that failed, the first first, and of those that had not ended."""
    failed = [rank for rank, code in codes.items() if code] + [rank for rank in range(size) if rank not in codes]
    parts = []
    for rank in failed:
        how = f"exit code {codes[rank]}" if rank in codes else "had not ended"
        log = folder / f"log-{rank}"
        parts.append(f"--- rank {rank}: {how}\n{log.read_text() if log.exists() else ''}")
    return "\n".join(parts)
