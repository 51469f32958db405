"""moe-lm sweep: a study or a grid, one process a run; finished runs are skipped, a failed one stops no other."""

import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from moe_lm.commands.configuration import composed, default_name, parse, preset_of, quoted
from moe_lm.commands.study import Study, study_of
from moe_lm.mistake import Mistake
from moe_lm.report.results import read_audit, read_result

HELP = "train every model of a study, or of a grid (-m model=moe_4,moe_32 seed=1,2)"
OWN_KEYS = ("study", "scale", "runs", "parallel")
INTERRUPTED = (130, -signal.SIGINT, -signal.SIGTERM)


@dataclass(frozen=True)
class Job:
    """One run of the sweep: its directory and the overrides of the command that makes it, or that audits it."""

    folder: Path
    arguments: tuple[str, ...]
    command: str = "train"

    @property
    def log(self) -> Path:
        """Where the process's output goes: beside the directory, which a mistake may leave unmade."""
        return self.folder.with_name(self.folder.name + ".log")


def main(arguments: list[str]) -> int:
    """Train what is not finished yet; 1 if a run failed, 130 if interrupted."""
    arguments = [a for a in arguments if a not in ("-m", "--multirun")]
    runs, study, parallel = _own(arguments)
    jobs = jobs_of(arguments)
    for job in jobs:
        composed("train", list(job.arguments))  # a misspelt key is one mistake, not one failed run for each model
    runs.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(runs / ".sweep.lock", timeout=0):
            if study:
                study.save(runs / "study.yaml")
            return _train_all(jobs, runs, parallel, audit=study is not None and study.audit)
    except Timeout:
        raise Mistake(f"another sweep is at work in {runs}: wait for it or choose another runs=...") from None


def jobs_of(given: list[str]) -> list[Job]:
    """Enumerate the runs; what is given on the command line replaces the study's value of the same key."""
    runs, study, _ = _own(given)
    given = [a for a in given if _key(a) not in OWN_KEYS]
    if study is None and not given:
        raise Mistake("moe-lm sweep needs study=... or a grid, as in -m model=moe_4,moe_32")
    lines = [shlex.split(line) for line in study.runs] if study else [[]]
    for key in {_key(a) for a in given} - {"name"}:
        if len({a for line in lines for a in line if _key(a) == key}) > 1:
            raise Mistake(f"{key} is what the runs of this study differ in: choose another study, or -m with a grid")
    grid = [job for line in lines for job in _enumerate(_replaced(line, given))]
    common = _replaced(list(study.overrides), given) if study else []
    jobs = {}
    for job in grid:
        name = _name(job, grid, {_key(a) for a in given})
        kept = [a for a in common if _key(a) not in {_key(b) for b in job}]
        arguments = [a for a in (*kept, *job) if _key(a) != "name"]
        arguments += [f"name={name}", f"runs={runs}"]
        if jobs.setdefault(runs / name, arguments) != arguments:
            raise Mistake(
                f"two runs of the grid would be called {name}: give no name, or sweep what changes the result"
            )
    return [Job(path, tuple(arguments)) for path, arguments in jobs.items()]


def _name(job: list[str], grid: list[list[str]], given: set[str]) -> str:
    """Return the study's name or the preset, and the overrides in which the runs differ."""
    shared = set.intersection(*map(set, grid))
    varied = [a for a in job if a not in shared]
    named = next((a.split("=", 1)[1].strip("'\"") for a in job if _key(a) == "name"), None)
    if named:
        return default_name(named, [a for a in varied if _key(a) in given])
    return default_name(preset_of(job), varied if len(grid) > 1 else job)


def _own(arguments: list[str]) -> tuple[Path, Study | None, int]:
    """Return where the runs go, the study, and how many runs go at a time: the arguments that are the sweep's own."""
    own = dict(a.split("=", 1) for a in arguments if _key(a) in OWN_KEYS and "=" in a)
    own = {key: value for key, value in own.items() if value not in ("", "null")}
    study = study_of(own["study"], own.get("scale")) if "study" in own else None
    if "scale" in own and study is None:
        raise Mistake(f"scale={own['scale']}: a study has a scale, a grid has none: give study=... too")
    parallel = str(own.get("parallel") or (study.parallel if study else 1))
    if not parallel.isdigit() or int(parallel) < 1:
        raise Mistake(f"parallel={parallel}: needs a whole number of at least 1")
    return Path(own.get("runs") or (study.folder if study else "runs/sweep")), study, int(parallel)


def _replaced(overrides: list[str], given: list[str]) -> list[str]:
    keys = {_key(a) for a in given}
    return [a for a in overrides if _key(a) not in keys] + list(given)


def _enumerate(overrides: list[str]) -> list[list[str]]:
    """Return Hydra's Cartesian product of the sweeps among these overrides."""
    [jobs] = BasicSweeper.split_arguments(parse([quoted(a) for a in overrides]), max_batch_size=None)
    return [list(job) for job in jobs]


def _key(override: str) -> str:
    return override.lstrip("+~").split("=", 1)[0]


def _train_all(jobs: list[Job], runs: Path, parallel: int, audit: bool) -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    waiting, running, failed = list(jobs), {}, []
    signal.signal(signal.SIGHUP, _interrupt)
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                job = waiting.pop(0)
                running[job] = _start(job)
                _print(f"[{jobs.index(job) + 1}/{len(jobs)}] {job.folder}" if job in jobs else f"audit of {job.folder}")
            _status(" | ".join(_last_line(job.log) for job in running))
            time.sleep(0.2)
            for job in [job for job, child in running.items() if child.poll() is not None]:
                code = running.pop(job).returncode
                if code in INTERRUPTED:
                    raise KeyboardInterrupt
                _print(_last_line(job.log))
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
    """Return the audit of a finished run, on the machine that the run was told to take."""
    machine = [a for a in job.arguments if _key(a) in ("machine.device", "machine.threads")]
    return Job(job.folder, (f"run={job.folder}", *machine), "audit")


def _is_audited(job: Job) -> bool:
    """Whether a run's last step was found causal; what is damaged or was not is audited anew, and says so again."""
    try:
        found = read_audit(job.folder / "audit.json", read_result(job.folder / "result.json"))
    except Mistake:
        return False
    return found is not None and found["causal"]


def _stop(running: dict[Job, subprocess.Popen]) -> None:
    for child in running.values():
        child.terminate()  # it finishes its step and saves
    for child in running.values():
        child.wait()


def _start(job: Job) -> subprocess.Popen:
    command = [sys.executable, "-m", "moe_lm", job.command, *job.arguments]
    with job.log.open("ab") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)


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
