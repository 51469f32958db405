"""The runs of a sweep as processes: started as GPUs and `parallel` allow, watched, and stopped with the sweep."""

import heapq
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_lm.errors import UserError
from moe_lm.parallel import signals
from moe_lm.parallel.launch import program
from moe_lm.report.runs import read_audit, read_result

VISIBLE = "CUDA_VISIBLE_DEVICES"

STOPPED = (signals.INTERRUPTED, signals.REQUEUE, -signal.SIGINT, -signal.SIGTERM)
"""Exit codes of a run that was asked to stop and has saved itself."""


@dataclass(frozen=True)
class Job:
    """One process of the sweep: a training run, or the audit of a finished run."""

    folder: Path
    """The run's directory."""
    arguments: tuple[str, ...]
    """Overrides of the command."""
    command: str = "train"
    num_gpus: int = 0

    @property
    def log(self) -> Path:
        """The file for the process's output; it lies beside the directory, which a failed run may never create."""
        return self.folder.with_name(self.folder.name + ".log")


class Devices:
    """The GPUs of a sweep, each lent to one job at a time, named as in CUDA_VISIBLE_DEVICES."""

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self._holders: dict[str, Hashable] = {}

    def take(self, holder: Hashable, number: int) -> dict[str, str] | None:
        """Lend GPUs and return the holder's environment variables; None where too few are free."""
        free = [name for name in self.names if name not in self._holders]
        if number > len(free):
            return None
        self._holders |= dict.fromkeys(free[:number], holder)
        return {VISIBLE: ",".join(free[:number])} if number else {}

    def give_back(self, holder: Hashable) -> None:
        """Free the GPUs of a holder."""
        self._holders = {name: other for name, other in self._holders.items() if other != holder}


def visible(environment: Mapping[str, str] = os.environ, count: int | None = None) -> list[str]:
    """Return the names of the GPUs that a process with this environment sees; `count` is the number that CUDA reports.

    Child processes need the names that this process was given, numbers or UUIDs: with CUDA_VISIBLE_DEVICES=2,3 the
    numbers 0 and 1 would be other GPUs.
    """
    if count is None:
        import torch

        count = torch.cuda.device_count()  # creates no CUDA context, which would take memory from the runs
    given = environment.get(VISIBLE)
    names = [str(i) for i in range(count)] if given is None else [name.strip() for name in given.split(",")]
    return names[:count]  # CUDA stops at the first name that it does not know


class Clock:
    """Estimates the progress and the remaining time of a sweep from the output of its running jobs."""

    def __init__(self, num_jobs: int, at_a_time: int, now: Callable[[], float] = time.monotonic):
        self._num_jobs, self._at_a_time, self._now = num_jobs, at_a_time, now
        self._started: dict[Job, float] = {}
        self._durations: list[float] = []
        self._trained: set[Job] = set()
        self._num_done = 0

    def start(self, job: Job) -> None:
        """Take the time at which a job starts."""
        self._started[job] = self._now()

    def end(self, job: Job, code: int) -> None:
        """Count a job that has ended, and keep how long it took if it has trained to its end."""
        seconds = self._now() - self._started.pop(job)
        self._num_done += job.command == "train" and code == 0
        self._durations += [seconds] if job in self._trained and code == 0 else []

    def line(self, running: Mapping[Job, str], num_waiting: int) -> str:
        """Return the status line; `running` holds the last line of each job's output, mostly a bar of tqdm."""
        bars = {job: re.search(r"(\d+)%\|.*<([\d:]+)", text) for job, text in running.items()}
        self._trained |= {job for job, bar in bars.items() if bar and job.command == "train"}
        parts = [f"{job.folder.name} {bars[job][1]} %" if bars[job] else f"{job.folder.name} begins" for job in running]
        if running and all(bars.values()):
            parts.append(self._remaining({job: _seconds(bar[2]) for job, bar in bars.items()}, num_waiting))
        return " | ".join([f"{self._num_done} of {self._num_jobs} runs done", *parts])

    def _remaining(self, seconds_left: Mapping[Job, float], num_waiting: int) -> str:
        now = self._now()
        whole = [*self._durations, *(now - self._started[job] + left for job, left in seconds_left.items())]
        slots = [*seconds_left.values(), *[0.0] * (self._at_a_time - len(seconds_left))]
        heapq.heapify(slots)
        for _ in range(num_waiting):  # a waiting run starts in the slot that is free first
            heapq.heapreplace(slots, slots[0] + sum(whole) / len(whole))
        return f"about {math.ceil(max(slots) / 60)} min left"


def num_trainings(jobs: Sequence[Job]) -> int:
    """Return how many of these jobs are trainings, not audits."""
    return sum(job.command == "train" for job in jobs)


def _seconds(text: str) -> float:
    """Return the seconds of a duration such as 1:02:03 or 02:03."""
    return sum(int(part) * 60**place for place, part in enumerate(reversed(text.split(":"))))


def run_all(jobs: list[Job], runs: Path, *, parallel: int | None, audit: bool, devices: Devices) -> int:
    """Run every job, at most `parallel` at a time (None: as GPUs allow, but at least one); return the exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    waiting, running, failed = list(jobs), {}, []
    clock = Clock(len(jobs), parallel or max(1, len(devices.names)))
    try:
        while waiting or running:
            while waiting and (environment := _place(waiting[0], len(running), parallel, devices)) is not None:
                job = waiting.pop(0)
                running[job] = _start(job, environment)
                clock.start(job)
                _print(f"[{jobs.index(job) + 1}/{len(jobs)}] {job.folder}" if job in jobs else f"audit of {job.folder}")
            _status(clock.line({job: _last_line(job.log) for job in running}, num_trainings(waiting)))
            time.sleep(0.2)
            for job in [job for job, child in running.items() if child.poll() is not None]:
                code = running.pop(job).returncode
                clock.end(job, code)
                devices.give_back(job)
                if code in STOPPED:
                    raise KeyboardInterrupt
                _print(_outcome(job))
                failed += [(job, code, _last_line(job.log))] if code else []
                if audit and not code and job.command == "train" and not _is_audited(job):
                    waiting.insert(0, audit_of(job))
    except KeyboardInterrupt:
        _stop(running)
        _print(f"interrupted; repeat the command to go on in {runs}")
        return 130
    finally:
        _stop(running)  # no training outlives the sweep, whatever ends it
    for job, code, line in failed:
        _print(f"failed (exit code {code}): {job.folder}: {line}\n  log: {job.log}")
    _print(f"{len(jobs) - len({job.folder for job, *_ in failed})} of {len(jobs)} runs finished in {runs}")
    return 1 if failed else 0


def audit_of(job: Job) -> Job:
    """Return the audit of a finished run, on the run's kind of device; an audit needs one GPU at most."""
    machine = [a for a in job.arguments if a.partition("=")[0] in ("machine.device", "machine.threads")]
    return Job(job.folder, (f"run={job.folder}", *machine), "audit", min(job.num_gpus, 1))


def _place(job: Job, num_running: int, parallel: int | None, devices: Devices) -> dict[str, str] | None:
    """Return the job's environment if it may start now. Jobs start in order: no small one overtakes a large one."""
    by_gpus = parallel is None and job.num_gpus
    if not by_gpus and num_running >= (parallel or 1):
        return None
    return devices.take(job, job.num_gpus)


def _is_audited(job: Job) -> bool:
    """Whether an audit found the run's last step causal; any other audit is repeated."""
    found = _audit_result(job)
    return found is not None and found["causal"]


def _audit_result(job: Job) -> dict | None:
    try:
        return read_audit(job.folder / "audit.json", read_result(job.folder / "result.json"))
    except UserError:
        return None


def _outcome(job: Job) -> str:
    """Return one line about a finished job: the last line of its log, or the result of an audit."""
    if job.command == "audit" and (found := _audit_result(job)) is not None and found["causal"]:
        return f"{job.folder} is causal; training's choice leaks {found['training']['mean_bits']:.4f} bits a token"
    return _last_line(job.log)


def _stop(running: dict[Job, subprocess.Popen]) -> None:
    for child in running.values():
        child.terminate()  # a training run finishes its step and saves
    for child in running.values():
        child.wait()


def _start(job: Job, environment: dict[str, str]) -> subprocess.Popen:
    with job.log.open("ab") as stream:
        return subprocess.Popen(
            [*program(), job.command, *job.arguments],
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | environment,
        )


def _last_line(log: Path) -> str:
    """Return the last line of a log, in which a progress bar rewrites its line with carriage returns."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 4096))
        text = stream.read().decode(errors="replace")
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n")]
    return next((line for line in reversed(lines) if line), "starting")


def _status(text: str) -> None:
    """Show a line on the terminal; the next line replaces it."""
    if sys.stderr.isatty():
        print("\r\x1b[K" + text[: shutil.get_terminal_size().columns - 1], end="", file=sys.stderr, flush=True)


def _print(text: str) -> None:
    print(("\r\x1b[K" if sys.stderr.isatty() else "") + text, file=sys.stderr, flush=True)


def _interrupt(number, frame):  # noqa: ARG001
    raise KeyboardInterrupt
