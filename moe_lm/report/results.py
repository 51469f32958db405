"""Reads run directories: config.yaml, metrics.jsonl and result.json, which are the truth of a run."""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from moe_lm.errors import UserError
from moe_lm.report import RunRecord

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


def read_runs(folder: Path) -> list[RunRecord]:
    """Every run directly in `folder`, or `folder` itself, by operations and parameters; unfinished last."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: give runs=<folder that holds run directories>")
    if is_run(folder):
        return [read_run(folder)]
    try:
        runs = [read_run(child) for child in sorted(folder.iterdir()) if is_run(child)]
    except PermissionError as error:
        raise UserError(f"cannot read {error.filename}: make it readable") from error
    if not runs:
        raise UserError(f"no run in {folder} (a run holds config.yaml): {nearest_runs(folder)}")
    return sorted(runs, key=order)


def read_run(folder: Path) -> RunRecord:
    """One run directory, with or without result.json and metrics.jsonl."""
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


def nearest_runs(folder: Path) -> str:
    """How to mend a folder without runs: the study inside it that has some, or train first."""
    study = next((path.parent.parent for path in sorted(folder.glob("*/*/config.yaml"))), None)
    return f"did you mean runs={study}?" if study else "train one first, or give another folder"


def order(run: RunRecord) -> tuple:
    """The place of a run in every table and legend; runs that differ only by seed stay together."""
    if run.result is None:
        return (math.inf, math.inf, run.base_name, 0)
    operations = run.result["operations_per_timestep"]
    parameters = run.result["parameters_without_embedding_and_softmax"]
    return (operations, parameters, run.base_name, run.result["seed"])


def read_result(path: Path) -> Mapping[str, Any] | None:
    """The contents of result.json, checked for what the report reads, or None if the run is unfinished."""
    if not path.exists():
        return None
    mend = "evaluate the run again, or move it away"
    try:
        result = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({first_line(error)}): {mend}") from error
    if not isinstance(result, dict):
        raise UserError(f"{path} is damaged (not a JSON object): {mend}")
    for key in RESULT_NUMBERS:
        if not is_number(result.get(key)):
            raise UserError(f"{path} is damaged ({key} is not a number): {mend}")
    perplexity = result.get("perplexity")
    if not isinstance(perplexity, dict) or not all(v is None or is_number(v) for v in perplexity.values()):
        raise UserError(f"{path} is damaged (perplexity is not a number for each split): {mend}")
    return result


def read_audit(path: Path, result: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What audit.json says of the result's last step, checked for what the report reads; None for other steps."""
    if result is None or not path.exists():
        return None
    mend = "repeat moe-lm audit, or move it away"
    try:
        audit = json.loads(path.read_bytes())
        whole = isinstance(audit["causal"], bool) and isinstance(audit["by_evaluation"]["unserved"], float | None)
        numbers = [audit["step"], *(audit[key]["mean_bits"] for key in ("training", "later_words"))]
        numbers += [audit[key]["perplexity"] for key in ("by_evaluation", "by_training")]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}): {mend}") from error
    if not whole or not all(map(is_number, numbers)):
        raise UserError(f"{path} is damaged (not all of its figures are numbers): {mend}")
    return audit if audit["step"] == result.get("steps") else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that a running process has not finished is left out."""
    if not path.exists():
        return []
    *complete, unfinished = path.read_bytes().split(b"\n")
    lines = [read_line(text, path, number) for number, text in enumerate(complete, start=1)]
    with suppress(UserError):  # no newline yet: a later report will find it whole
        lines.append(read_line(unfinished, path, len(complete) + 1))
    return [line for line in lines if line]


def read_line(text: bytes, path: Path, number: int) -> dict[str, Any]:
    """One line of metrics.jsonl, checked for what the report reads; empty for a blank line."""
    if not text.strip():
        return {}
    mend = "remove that line, or resume the run from its checkpoint"
    try:
        line = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} line {number} is damaged ({first_line(error)}): {mend}") from error
    if not isinstance(line, dict):
        raise UserError(f"{path} line {number} is damaged (not a JSON object): {mend}")
    for key in ("words", "perplexity" if "split" in line else "nats_per_word"):
        if not is_number(line.get(key)):
            raise UserError(f"{path} line {number} is damaged ({key} is not a number): {mend}")
    return line


def is_number(value: object) -> bool:
    """Whether a JSON value is a number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def first_line(error: Exception) -> str:
    """The first line of an exception's message: a `UserError` has only one."""
    return (str(error).splitlines() or [type(error).__name__])[0]
