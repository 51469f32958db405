"""moe-lm sweep: a study or a grid, one process a run; finished runs are skipped, a failed one stops no other."""

import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from omegaconf import DictConfig, OmegaConf

from moe_lm.commands.configuration import choices, composed, default_name, folder, parse, preset_of, quoted
from moe_lm.mistake import Mistake
from moe_lm.run import write_text

HELP = "train every model of a study, or of a grid (-m model=moe_4,moe_32 seed=1,2)"
OWN_KEYS = ("study", "runs")


@dataclass(frozen=True)
class Job:
    """One run of the sweep: its directory and the overrides of `moe-lm train` that make it."""

    folder: Path
    arguments: list[str]


def main(arguments: list[str]) -> int:
    """Train what is not finished yet; 1 if a run failed, 130 if interrupted."""
    arguments = [a for a in arguments if a not in ("-m", "--multirun")]
    runs, study = _own(arguments)
    jobs = jobs_of(arguments)
    for job in jobs:
        composed("train", job.arguments)  # a misspelt key is one mistake, not one failed run for each model
    runs.mkdir(parents=True, exist_ok=True)
    if study:
        write_text(runs / "study.yaml", OmegaConf.to_yaml(study))
    return _train_all(jobs, runs)


def jobs_of(given: list[str]) -> list[Job]:
    """Enumerate the runs; what is given on the command line replaces the study's value of the same key."""
    runs, study = _own(given)
    given = [a for a in given if _key(a) not in OWN_KEYS]
    if study is None and not given:
        raise Mistake("moe-lm sweep needs study=... or a grid, as in -m model=moe_4,moe_32")
    lines = [shlex.split(line) for line in study.runs] if study else [[]]
    grid = [job for line in lines for job in _enumerate(_replaced(line, given))]
    common = _replaced(list(study.overrides), given) if study else []
    jobs = {}
    for job in grid:
        name = _name(job, grid, {_key(a) for a in given})
        kept = [a for a in common if _key(a) not in {_key(b) for b in job}]
        arguments = [a for a in (*kept, *job) if _key(a) != "name"]
        jobs[runs / name] = [*arguments, f"name={name}", f"runs={runs}"]
    return [Job(path, arguments) for path, arguments in jobs.items()]


def _name(job: list[str], grid: list[list[str]], given: set[str]) -> str:
    """Return the study's name or the preset, and the overrides in which the runs differ."""
    shared = set.intersection(*map(set, grid))
    varied = [a for a in job if a not in shared]
    named = next((a.split("=", 1)[1] for a in job if _key(a) == "name"), None)
    if named:
        return default_name(named, [a for a in varied if _key(a) in given])
    return default_name(preset_of(job), varied if len(grid) > 1 else job)


def _own(arguments: list[str]) -> tuple[Path, DictConfig | None]:
    """Return where the runs go and the study, of the arguments that are the sweep's own."""
    own = dict(a.split("=", 1) for a in arguments if _key(a) in OWN_KEYS and "=" in a)
    study = _study(own["study"]) if "study" in own else None
    return Path(own.get("runs") or f"runs/{own.get('study', 'sweep')}"), study


def _study(name: str) -> DictConfig:
    if name not in choices("study"):
        raise Mistake(f"study={name}: no such study; there are {', '.join(choices('study'))}")
    return OmegaConf.load(folder() / "study" / f"{name}.yaml")


def _replaced(overrides: list[str], given: list[str]) -> list[str]:
    keys = {_key(a) for a in given}
    return [a for a in overrides if _key(a) not in keys] + list(given)


def _enumerate(overrides: list[str]) -> list[list[str]]:
    """Return Hydra's Cartesian product of the sweeps among these overrides."""
    [jobs] = BasicSweeper.split_arguments(parse([quoted(a) for a in overrides]), max_batch_size=None)
    return [list(job) for job in jobs]


def _key(override: str) -> str:
    return override.lstrip("+~").split("=", 1)[0]


def _train_all(jobs: list[Job], runs: Path) -> int:
    failed = []
    signal.signal(signal.SIGTERM, _interrupt)
    for number, job in enumerate(jobs, 1):
        print(f"[{number}/{len(jobs)}] {job.folder}", file=sys.stderr, flush=True)
        code, log = _train(job)
        if code in (130, -2, -15):
            print(f"interrupted; repeat the command to go on in {runs}", file=sys.stderr)
            return 130
        if code:
            failed.append((job, code, log))
    for job, code, log in failed:
        last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
        print(f"failed (exit code {code}): {job.folder}: {last[0]}\n  log: {log}", file=sys.stderr)
    print(f"{len(jobs) - len(failed)} of {len(jobs)} runs finished in {runs}", file=sys.stderr)
    return 1 if failed else 0


def _train(job: Job) -> tuple[int, Path]:
    """Run `moe-lm train` as a process of its own; its output goes to the console and to a log."""
    log = job.folder.with_name(job.folder.name + ".log")
    command = [sys.executable, "-m", "moe_lm", "train", *job.arguments]
    with (
        log.open("ab") as stream,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child,
    ):
        try:
            while block := child.stdout.read1(4096):
                stream.write(block)
                stream.flush()
                sys.stderr.buffer.write(block)
                sys.stderr.flush()
        except KeyboardInterrupt:
            child.terminate()  # it finishes its step and saves
            stream.write(child.stdout.read())
        return child.wait(), log


def _interrupt(number, frame):  # noqa: ARG001
    raise KeyboardInterrupt
