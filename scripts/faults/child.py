"""A command with all its processes, which are found by a mark in their environment."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
_INJECT = Path(__file__).resolve().parent / "inject"
LONGEST = 600
"""Seconds after which a tiny training counts as hanging."""


class Child:
    """A running command whose output goes to a file."""

    def __init__(self, command: list[str], folder: Path, log: Path, program: str, ranks: str, several: bool):
        self._mark = f"FAULTS_MARK={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        env |= {name: value, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(_INJECT), str(REPOSITORY)])}
        if program:
            env |= {"FAULTS_PROGRAM": program, "FAULTS_RANKS": ranks}
            env |= {"FAULTS_RANK_OF_STARTED": "launcher" if several else "0"}
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as stream:
            self._process = subprocess.Popen(command, cwd=folder, env=env, stdout=stream, stderr=subprocess.STDOUT)
        self.pid = self._process.pid

    @property
    def code(self) -> int | None:
        """Return the exit code of the command, None while it runs."""
        return self._process.poll()

    @property
    def text(self) -> str:
        """Return the output so far."""
        return self.log.read_text(errors="replace")

    @property
    def last_line(self) -> str:
        """Return the last line of the output."""
        return self.text.splitlines()[-1]

    def processes(self) -> dict[int, str | None]:
        """Return the rank of each living process by its id, None for a process without rank."""
        found = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal():
                try:
                    variables = (folder / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                if self._mark.encode() in variables:
                    ranks = [x[5:].decode() for x in variables if x.startswith(b"RANK=")]
                    found[int(folder.name)] = ranks[0] if ranks else None
        return found

    def kill(self, rank: str | None = None, number: int = signal.SIGKILL) -> bool:
        """Send a signal to the process of a rank, or to the command; return False if it does not run (any more)."""
        pids = [pid for pid, found in self.processes().items() if found == rank] if rank is not None else [self.pid]
        alive = [pid for pid in pids if pid != self.pid or self.code is None]
        for pid in alive:
            _send(pid, number)
        return bool(alive)

    def kill_all(self) -> None:
        """Kill all processes."""
        for pid in self.processes():
            _send(pid, signal.SIGKILL)

    def wait(self, seconds: float = LONGEST, until: Callable[[], bool] = bool) -> bool:
        """Wait until all processes have ended or a condition holds; return False when the time is up."""
        deadline = time.monotonic() + seconds
        while not until():
            if self.code is not None and not self.processes():
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.004 if self.code is None else 0.05)
        return True

    def end(self) -> None:
        """Kill all processes, and those that they start meanwhile."""
        while self.processes():
            self.kill_all()
            time.sleep(0.02)
        self._process.wait()


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def train(
    arguments: Mapping[str, object], folder: Path, log: Path, *, program: str = "", ranks: str = "0,1", torchrun: bool
) -> Child:
    """Start `moe-lm train` with these keys; `program` runs first in the processes of these ranks."""
    several = arguments["num_processes"] != 1
    command = [sys.executable]
    if torchrun:
        arguments = {key: value for key, value in arguments.items() if key != "num_processes"}
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    command += ["-m", "moe_lm", "train", *(f"{key}={value}" for key, value in arguments.items())]
    return Child(command, folder, log, program, ranks, several)
