"""The runs of a sweep as processes: started as GPUs and `parallel` allow, watched, stopped with the sweep."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from moe_lm.cli.devices import Devices
from moe_lm.errors import UserError
from moe_lm.parallel import signals as stopping
from moe_lm.parallel.launch import program
from moe_lm.report.results import read_audit, read_result

# A run that was told to stop has saved itself and says so by its code.
INTERRUPTED = (stopping.INTERRUPTED, stopping.REQUEUE, -signal.SIGINT, -signal.SIGTERM)


@dataclass(frozen=True)
class Job:
    """One run of the sweep: its directory, the overrides of the command that makes or audits it, the GPUs it takes."""

    folder: Path
    arguments: tuple[str, ...]
    command: str = "train"
    num_gpus: int = 0

    @property
    def log(self) -> Path:
        """Where the process's output goes: beside the directory, which a mistake may leave unmade."""
        return self.folder.with_name(self.folder.name + ".log")


def run_all(jobs: list[Job], runs: Path, *, parallel: int | None, audit: bool, devices: Devices) -> int:
    """Run every job, at most `parallel` at a time (None: as many as have GPUs, at least one); return the exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    waiting, running, failed = list(jobs), {}, []
    signal.signal(signal.SIGHUP, _interrupt)
    try:
        while waiting or running:
            while waiting and (environment := _place(waiting[0], len(running), parallel, devices)) is not None:
                job = waiting.pop(0)
                running[job] = _start(job, environment)
                _print(f"[{jobs.index(job) + 1}/{len(jobs)}] {job.folder}" if job in jobs else f"audit of {job.folder}")
            _status(" | ".join(_last_line(job.log) for job in running))
            time.sleep(0.2)
            for job in [job for job, child in running.items() if child.poll() is not None]:
                code = running.pop(job).returncode
                devices.give_back(job)
                if code in INTERRUPTED:
                    raise KeyboardInterrupt
                _print(_told(job))
                failed += [(job, code, _last_line(job.log))] if code else []
                if audit and not code and job.command == "train" and not _is_audited(job):
                    waiting.insert(0, audit_of(job))
    except KeyboardInterrupt:
        _stop(running)
        _print(f"interrupted; repeat the command to go on in {runs}")
        return 130
    finally:
        _stop(running)  # whatever ends the sweep, no training outlives it
    for job, code, line in failed:
        _print(f"failed (exit code {code}): {job.folder}: {line}\n  log: {job.log}")
    _print(f"{len(jobs) - len({job.folder for job, *_ in failed})} of {len(jobs)} runs finished in {runs}")
    return 1 if failed else 0


def audit_of(job: Job) -> Job:
    """Return the audit of a finished run, on the machine that the run was told to take: one GPU is enough for it."""
    machine = [a for a in job.arguments if a.partition("=")[0] in ("machine.device", "machine.threads")]
    return Job(job.folder, (f"run={job.folder}", *machine), "audit", min(job.num_gpus, 1))


def _place(job: Job, num_running: int, parallel: int | None, devices: Devices) -> dict[str, str] | None:
    """Return what the job's environment needs if it may start now: in turn, so that no small run overtakes a large."""
    by_gpus = parallel is None and job.num_gpus
    if not by_gpus and num_running >= (parallel or 1):
        return None
    return devices.take(job, job.num_gpus)


def _is_audited(job: Job) -> bool:
    """Whether a run's last step was found causal; what is damaged or was not is audited anew, and says so again."""
    found = _found_by_audit(job)
    return found is not None and found["causal"]


def _found_by_audit(job: Job) -> dict | None:
    try:
        return read_audit(job.folder / "audit.json", read_result(job.folder / "result.json"))
    except UserError:
        return None


def _told(job: Job) -> str:
    """Return what a process that has ended says in a line: an audit, which ends with notes, what it found."""
    if job.command == "audit" and (found := _found_by_audit(job)) is not None and found["causal"]:
        return f"{job.folder} is causal; training's choice leaks {found['training']['mean_bits']:.4f} bits a token"
    return _last_line(job.log)


def _stop(running: dict[Job, subprocess.Popen]) -> None:
    for child in running.values():
        child.terminate()  # it finishes its step and saves
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
    """Return what stands last in a log; a progress bar rewrites its line with carriage returns."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 4096))
        text = stream.read().decode(errors="replace")
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n")]
    return next((line for line in reversed(lines) if line), "starting")


def _status(text: str) -> None:
    """Show a line that the next one replaces; only where somebody may be looking."""
    if sys.stderr.isatty():
        print("\r\x1b[K" + text[: shutil.get_terminal_size().columns - 1], end="", file=sys.stderr, flush=True)


def _print(text: str) -> None:
    print(("\r\x1b[K" if sys.stderr.isatty() else "") + text, file=sys.stderr, flush=True)


def _interrupt(number, frame):  # noqa: ARG001
    raise KeyboardInterrupt
