"""moe-lm report: table, plots and one html page of a folder of runs."""

from functools import cache
from pathlib import Path

import yaml

from moe_lm.cli.config import composed, resolved
from moe_lm.compat import current_overrides
from moe_lm.errors import UserError
from moe_lm.report.write import write_report

WITHOUT_EFFECT = ("machine.", "logging.", "checkpoint.", "parallel.", "num_processes=")
"""Overrides that do not affect what a study's notes say."""


def main(arguments: list[str]) -> int:
    """Write <runs>/report/ and print the table and the path of the page."""
    folder = Path(resolved(composed("report", arguments))["runs"])
    study, notes = _study(folder / "study.yaml")
    report = write_report(folder, cache(_preset), notes, study)
    print(report.markdown)
    print(f"\n{report.folder / 'index.html'}")
    return 0


def _preset(name: str) -> dict:
    """Return the configuration of a preset without overrides."""
    return resolved(composed("train", [f"model={name}"]))


def _study(path: Path) -> tuple[str, list[str]]:
    """Return the name and scale of a sweep's study as text, and its notes; both are empty for runs without a study."""
    if not path.is_file():
        return "", []
    try:
        study = yaml.safe_load(path.read_text(encoding="utf-8"))
        words = [f"{key} {study[key]}" for key in ("study", "scale") if study.get(key)]
        notes = [str(note) for note in _list(study["notes"])]
        given = [str(a) for a in _list(study.get("given", []))]
        given = [a for a in current_overrides(given) if not a.lstrip("+~").startswith(WITHOUT_EFFECT)]
        if given:
            notes.insert(0, f"These runs were made with {' '.join(given)}: what is said below is of the study without.")
        return ", ".join(words), notes
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}): delete it, or repeat the sweep") from error


def _list(value: object) -> list:
    if not isinstance(value, list):
        raise TypeError
    return value
