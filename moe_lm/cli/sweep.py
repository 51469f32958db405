"""moe-lm sweep: train a study or a grid, a process per run; finished runs are skipped, a failed run stops no other."""

import shlex
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import yaml
from filelock import FileLock, Timeout
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from moe_lm.atomic_io import write_text
from moe_lm.cli.config import composed, default_name, parse, preset_of, quoted
from moe_lm.cli.job_runner import Devices, Job, run_all, visible
from moe_lm.compat import current_overrides
from moe_lm.config_files import choices, read_choice
from moe_lm.errors import UserError

OWN_KEYS = ("study", "scale", "runs", "parallel")


@dataclass(frozen=True)
class Study:
    """One scale of a study in configs/study: the runs to train and the overrides that they share."""

    study: str
    scale: str | None
    """The scale's name, None where the study has only one."""
    notes: list[str]
    """Notes for the report: what the study can show and what it cannot."""
    parallel: int | str
    """Runs at a time, or `auto`."""
    overrides: list[str]
    """Overrides of `train` that all runs share."""
    runs: list[str]
    """Each run's own overrides, as one types them."""
    audit: bool = False
    """Whether each finished run is audited too."""
    given: list[str] = field(default_factory=list)
    """Overrides of the command line, which replace the study's."""

    @property
    def folder(self) -> Path:
        """The default folder of the runs; each scale has its own."""
        return Path("runs") / "-".join(filter(None, (self.study, self.scale)))

    def save(self, path: Path) -> None:
        """Write the study for later reports."""
        write_text(path, yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True))


def study_of(name: str, scale: str | None) -> Study:
    """Return a study at a scale, by default the study's default scale; raises `UserError` if either is unknown."""
    if name not in choices("study"):
        raise UserError(f"study={name}: no such study; there are {', '.join(choices('study'))}")
    content = read_choice("study", name)
    if "scales" not in content:
        if scale:
            raise UserError(f"scale={scale}: study={name} has one size only: omit scale")
        return Study(study=name, scale=None, **content)
    scale = scale or content["scale"]
    if scale not in content["scales"]:
        raise UserError(f"scale={scale}: study={name} has scale={' and scale='.join(content['scales'])}")
    return Study(study=name, scale=scale, **content["scales"][scale])


def main(arguments: list[str]) -> int:
    """Train the runs that are not finished yet; return 1 if a run failed, 130 if interrupted."""
    arguments = [a for a in arguments if a not in ("-m", "--multirun")]
    runs, study, parallel = _own(arguments)
    devices = Devices(visible())
    # Every run is composed here, so that a misspelt key gives one error instead of one failed run for each model.
    jobs = [with_gpus(job, len(devices.names)) for job in jobs_of(arguments)]
    runs.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(runs / ".sweep.lock", timeout=0):
            file = runs / "study.yaml"
            if study:
                study = replace(study, given=[a for a in arguments if _key(a) not in OWN_KEYS])
            if study and not file.exists():
                study.save(file)
            audit = study is not None and study.audit
            code = run_all(jobs, runs, parallel=parallel, audit=audit, devices=devices)
            if study and code != 1:  # a failed run may have refused these overrides and kept its own
                study.save(file)
            return code
    except Timeout:
        raise UserError(f"another sweep is at work in {runs}: wait for it or choose another runs=...") from None


def with_gpus(job: Job, num_visible: int) -> Job:
    """Return a training job with its number of GPUs, one per process; raises `UserError` if too few are visible."""
    config = composed("train", list(job.arguments))
    if not num_visible or config.machine.device == "cpu":
        return job
    num_gpus = max(1, config.num_processes)
    if num_gpus > num_visible:
        raise UserError(
            f"{job.folder}: num_processes={num_gpus} needs a GPU for each process, and this sweep sees {num_visible}: "
            "choose fewer, or machine.device=cpu"
        )
    return replace(job, num_gpus=num_gpus)


def jobs_of(given: list[str]) -> list[Job]:
    """Enumerate the runs; an override of the command line replaces the study's value of the same key."""
    runs, study, _ = _own(given)
    given = [a for a in given if _key(a) not in OWN_KEYS]
    if study is None and not given:
        raise UserError("moe-lm sweep needs study=... or a grid, as in -m model=moe_4,moe_32")
    lines = [current_overrides(shlex.split(line)) for line in study.runs] if study else [[]]
    for key in {_key(a) for a in given} - {"name"}:
        if len({a for line in lines for a in line if _key(a) == key}) > 1:
            raise UserError(f"{key} is what the runs of this study differ in: choose another study, or -m with a grid")
    grid = [job for line in lines for job in _enumerate(_replaced(line, given))]
    common = _replaced(current_overrides(study.overrides), given) if study else []
    jobs = {}
    for job in grid:
        name = _name(job, grid, {_key(a) for a in given})
        kept = [a for a in common if _key(a) not in {_key(b) for b in job}]
        arguments = [a for a in (*kept, *job) if _key(a) != "name"]
        arguments += [f"name={name}", f"runs={runs}"]
        if jobs.setdefault(runs / name, arguments) != arguments:
            raise UserError(
                f"two runs of the grid would be called {name}: omit name=..., or sweep a key that changes the result"
            )
    return [Job(path, tuple(arguments)) for path, arguments in jobs.items()]


def _name(job: list[str], grid: list[list[str]], given: set[str]) -> str:
    """Return a run's name: the study's name or the preset, then the overrides that differ between runs."""
    shared = set.intersection(*map(set, grid))
    varied = [a for a in job if a not in shared]
    named = next((a.split("=", 1)[1].strip("'\"") for a in job if _key(a) == "name"), None)
    if named:
        return default_name(named, [a for a in varied if _key(a) in given])
    return default_name(preset_of(job), varied if len(grid) > 1 else job)


def _own(arguments: list[str]) -> tuple[Path, Study | None, int | None]:
    """Return the sweep's own arguments: folder of the runs, study, number of runs at a time (None: as GPUs allow)."""
    own = dict(a.split("=", 1) for a in arguments if _key(a) in OWN_KEYS and "=" in a)
    own = {key: value for key, value in own.items() if value not in ("", "null")}
    study = study_of(own["study"], own.get("scale")) if "study" in own else None
    if "scale" in own and study is None:
        raise UserError(f"scale={own['scale']}: a study has a scale, a grid has none: give study=... too")
    parallel = str(own.get("parallel") or (study.parallel if study else 1))
    if parallel != "auto" and (not parallel.isdecimal() or int(parallel) < 1):
        raise UserError(f"parallel={parallel}: needs a whole number of at least 1, or auto")
    at_a_time = None if parallel == "auto" else int(parallel)
    return Path(own.get("runs") or (study.folder if study else "runs/sweep")), study, at_a_time


def _replaced(overrides: list[str], given: list[str]) -> list[str]:
    keys = {_key(a) for a in given}
    return [a for a in overrides if _key(a) not in keys] + list(given)


def _enumerate(overrides: list[str]) -> list[list[str]]:
    """Return Hydra's Cartesian product of the sweeps among these overrides."""
    [jobs] = BasicSweeper.split_arguments(parse([quoted(a) for a in overrides]), max_batch_size=None)
    return [list(job) for job in jobs]


def _key(override: str) -> str:
    return override.lstrip("+~").split("=", 1)[0]
