"""Run directories as records, runs grouped by seed, and the figures of a run or of several seeds."""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_lm.compat import current_metrics
from moe_lm.errors import UserError
from moe_lm.report import Figures, RunRecord
from moe_lm.report.paper import Presets, paper_model

RESULT_NUMBERS = (
    "seed",
    "operations_per_timestep",
    "parameters_without_embedding_and_softmax",
    "parameters_total",
    "words",
    "flops",
    "seconds",
    "words_per_second",
)
BALANCE = ("cv_importance", "cv_load", "max_over_mean_load", "max_over_mean_tokens")
FRACTIONS = ("dropped_fraction", "unrouted_fraction")
LAST_LINES = 5
"""Training lines at the end of a run over which expert balance is averaged."""


def read_runs(folder: Path, presets: Presets | None = None) -> list[RunRecord]:
    """Read every run in `folder`, or `folder` itself, sorted by operations and parameters; unfinished runs come last.

    `presets` returns a preset's configuration, from which the paper's model of each run is found.
    Raises `UserError` where there is no run or a run is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: give runs=<folder that holds run directories>")
    try:
        folders = [folder] if is_run(folder) else [child for child in sorted(folder.iterdir()) if is_run(child)]
        runs = [read_run(child) for child in folders]
    except PermissionError as error:
        raise UserError(f"cannot read {error.filename}: make it readable") from error
    if not runs:
        study = next((path.parent.parent for path in sorted(folder.glob("*/*/config.yaml"))), None)
        mend = f"did you mean runs={study}?" if study else "train one first, or give another folder"
        raise UserError(f"no run in {folder} (a run holds config.yaml): {mend}")
    if presets:
        runs = [replace(run, paper=paper_model(run, presets)) for run in runs]
    return sorted(runs, key=order)


def read_run(folder: Path) -> RunRecord:
    """Read one run directory, with or without result.json and metrics.jsonl."""
    lines, result = read_lines(folder / "metrics.jsonl"), read_result(folder / "result.json")
    return RunRecord(
        name=folder.resolve().name,
        folder=folder,
        result=result,
        audit=read_audit(folder / "audit.json", result),
        metrics=tuple(line for line in lines if "split" not in line),
        evaluations=tuple(line for line in lines if "split" in line),
        config=(folder / "config.yaml").read_text(encoding="utf-8", errors="replace"),
    )


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory."""
    return (folder / "config.yaml").is_file()


def order(run: RunRecord) -> tuple:
    """Return a run's sort key for every table and legend; runs that differ only in the seed stay together."""
    if run.result is None:
        return (math.inf, math.inf, run.base_name, 0)
    operations = run.result["operations_per_timestep"]
    parameters = run.result["parameters_without_embedding_and_softmax"]
    return (operations, parameters, run.base_name, run.result["seed"])


def read_result(path: Path) -> Mapping[str, Any] | None:
    """Read result.json and check what the report uses; None if the run is unfinished."""
    if not path.exists():
        return None
    mend = "evaluate the run again, or move it away"
    result = parse_object(path.read_bytes(), str(path), mend)
    check_numbers(result, RESULT_NUMBERS, str(path), mend)
    perplexity = result.get("perplexity")
    if not isinstance(perplexity, dict) or not all(v is None or is_number(v) for v in perplexity.values()):
        raise damaged(str(path), "perplexity is not a number for each split", mend)
    return result


def read_audit(path: Path, result: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Read audit.json and check what the report uses; None unless it is of the result's last step."""
    if result is None or not path.exists():
        return None
    mend = "repeat moe-lm audit, or move it away"
    audit = parse_object(path.read_bytes(), str(path), mend)
    try:
        audit["by_evaluation"] = current_metrics(audit["by_evaluation"])
        numbers = [audit["step"], *(audit[key]["mean_bits"] for key in ("training", "later_words"))]
        numbers += [audit[key]["perplexity"] for key in ("by_evaluation", "by_training")]
        unrouted = audit["by_evaluation"]["unrouted_fraction"]
        whole = isinstance(audit["causal"], bool) and isinstance(unrouted, float | None)
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(str(path), error, mend) from error
    if not whole or not all(map(is_number, numbers)):
        raise damaged(str(path), "not all of its figures are numbers", mend)
    return audit if audit["step"] == result.get("steps") else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl without blank lines and without a last line that is still being written."""
    if not path.exists():
        return []
    *complete, unfinished = path.read_bytes().split(b"\n")
    lines = [read_line(text, path, number) for number, text in enumerate(complete, start=1) if text.strip()]
    with suppress(UserError):  # no newline yet: a later report finds the whole line
        if unfinished.strip():
            lines.append(read_line(unfinished, path, len(complete) + 1))
    return lines


def read_line(text: bytes, path: Path, number: int) -> dict[str, Any]:
    """Parse one line of metrics.jsonl and check what the report uses."""
    where, mend = f"{path} line {number}", "remove that line, or resume the run from its checkpoint"
    line = parse_object(text, where, mend)
    check_numbers(line, ("words", "perplexity" if "split" in line else "nats_per_word"), where, mend)
    return current_metrics(line)


def parse_object(text: bytes, where: str, mend: str) -> dict[str, Any]:
    """Parse a JSON object; raises `UserError` where it is none."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise damaged(where, error, mend) from error
    if not isinstance(value, dict):
        raise damaged(where, "not a JSON object", mend)
    return value


def check_numbers(values: Mapping[str, Any], keys: Iterable[str], where: str, mend: str) -> None:
    """Raise `UserError` unless each key holds a number."""
    for key in keys:
        if not is_number(values.get(key)):
            raise damaged(where, f"{key} is not a number", mend)


def damaged(where: str, reason: str | Exception, mend: str) -> UserError:
    """Return the error about a damaged file, in one line."""
    reason = (str(reason).splitlines() or [type(reason).__name__])[0]
    return UserError(f"{where} is damaged ({reason}): {mend}")


def is_number(value: object) -> bool:
    """Whether a JSON value is a number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def seed_groups(runs: Iterable[RunRecord]) -> list[tuple[str, list[RunRecord]]]:
    """Group finished runs by preset and name without `seed=N`, in order; a group may be a single run."""
    groups: dict[tuple, dict[int, RunRecord]] = {}
    for run in runs:
        if run.result is not None:
            # Keyed by seed, because `moe_4` and `moe_4,seed=1` may be the same sample twice.
            group = groups.setdefault((run.base_name, run.result.get("preset")), {})
            group.setdefault(run.result["seed"], run)
    return [(name, list(group.values())) for (name, _), group in groups.items()]


def run_figures(run: RunRecord) -> dict[str, float | None]:
    """Return the figures of a finished run: those of result.json, expert balance, and the audit."""
    figures = {key: value for key, value in run.result.items() if isinstance(value, int | float)}
    figures |= {key: last_mean(run, key) for key in BALANCE + FRACTIONS}
    if run.audit:
        causal, by_training = run.audit["by_evaluation"], run.audit["by_training"]
        figures |= {f"audited_{key}": value for key, value in causal.items()}
        figures["perplexity_shift"] = by_training["perplexity"] / causal["perplexity"]
        figures["leak_bits"] = run.audit["training"]["mean_bits"]
        figures["leak_of_later_words_bits"] = run.audit["later_words"]["mean_bits"]
    return figures | {f"{split}_perplexity": run.perplexity(split) for split in ("test", "valid")}


def last_mean(run: RunRecord, key: str) -> float | None:
    """Return the mean of a metric over the last training lines that have it, None where none has."""
    values = [line[key] for line in run.metrics if key in line][-LAST_LINES:]
    return statistics.fmean(values) if values else None


def mean_figures(runs: Sequence[RunRecord], statistic: Callable = statistics.fmean) -> dict[str, float | None]:
    """Return the mean of each figure over runs, or another statistic; None unless every run has a finite value."""
    samples = [run_figures(run) for run in runs]
    values = {key: [sample.get(key) for sample in samples] for key in samples[0]}
    known = {key: all(v is not None and math.isfinite(v) for v in column) for key, column in values.items()}
    return {key: statistic(column) if known[key] else None for key, column in values.items()}


def deviations(runs: Sequence[RunRecord]) -> Figures:
    """Return the sample standard deviation (n - 1) of each figure over several runs."""
    return mean_figures(runs, statistics.stdev)


def environments_of(runs: Sequence[RunRecord]) -> list[str]:
    """Return a line for each combination of device and versions with the runs that it trained."""
    groups: dict[str, list[str]] = {}
    for run in runs:
        if run.result is not None:
            versions = sorted((run.result.get("versions") or {}).items())
            stack = ", ".join(f"{name} {version}" for name, version in versions)
            device = f"{run.result.get('num_processes', 1)} × {run.result.get('device', 'unknown device')}"
            groups.setdefault(f"{device}; {stack}", []).append(run.name)
    if len(groups) == 1:
        return [f"All runs: {line}" for line in groups]
    return [f"{', '.join(names)}: {line}" for line, names in groups.items()]
