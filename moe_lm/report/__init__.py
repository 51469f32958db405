"""What a report is made from (run records) and what it leaves behind (files and a table)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """One run directory as its files tell it; `result` is None while the run is unfinished."""

    name: str
    folder: Path
    result: Mapping[str, Any] | None
    metrics: tuple[Line, ...]  # training lines
    evaluations: tuple[Line, ...]  # lines with a split
    config: str

    @property
    def base_name(self) -> str:
        """The name without its `seed=N` part: the same for runs that differ in nothing else."""
        return re.sub(r",seed=\d+(?=,|$)", "", self.name)

    @property
    def is_moe(self) -> bool:
        """Whether the run has a gate: its training lines then say how the experts are loaded."""
        return any("cv_load" in line for line in self.metrics)

    def perplexity(self, split: str) -> float | None:
        """The final perplexity on a split, or None where the run has none."""
        return None if self.result is None else self.result["perplexity"].get(split)


@dataclass(frozen=True)
class Column:
    """One column: its key in a row and in the CSV, and its heading for readers."""

    key: str
    heading: str


@dataclass(frozen=True)
class Row:
    """One line of the table; `kind` is run, mean or deviation, absent figures are None."""

    kind: str
    name: str
    figures: Mapping[str, float | None]
    num_seeds: int = 1


@dataclass(frozen=True)
class Report:
    """What `write_report` left: its folder, every file in it, and the table for the console."""

    folder: Path
    files: tuple[Path, ...]
    markdown: str
