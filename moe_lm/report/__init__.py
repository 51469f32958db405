"""What a report is made from (run records) and what it leaves behind (files and a table)."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from moe_lm.report.paper import Printed

Line = Mapping[str, Any]


@dataclass(frozen=True)
class PaperModel:
    """The model of the paper that a run is, or that it imitates with other sizes."""

    preset: str
    printed: Printed
    comparable: bool
    """Whether the run has the paper's sizes and is tested on the paper's text."""
    times_width: float
    """The paper's width over the run's."""
    words: float | None
    """What the paper trained on for the printed perplexity; None where it does not say."""


@dataclass(frozen=True)
class RunRecord:
    """One run directory as its files tell it; `result` is None while the run is unfinished."""

    name: str
    folder: Path
    result: Mapping[str, Any] | None
    metrics: tuple[Line, ...]  # training lines
    evaluations: tuple[Line, ...]  # lines with a split
    config: str
    audit: Mapping[str, Any] | None = None
    """What `moe-lm audit` found of the finished run's last step, None where it was not asked."""
    paper: PaperModel | None = field(default=None, compare=False)

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """The configuration as data; empty where the file cannot be read as that."""
        try:
            settings = yaml.safe_load(self.config)
        except yaml.YAMLError:
            return {}
        return settings if isinstance(settings, dict) else {}

    @property
    def base_name(self) -> str:
        """The name without its `seed=N` part: the same for runs that differ in nothing else."""
        return re.sub(r",seed=\d+(?=,|$)", "", self.name)

    @property
    def is_moe(self) -> bool:
        """Whether the run has a gate: its training lines then say how the experts are loaded."""
        return any("cv_load" in line for line in self.metrics)

    @property
    def kind(self) -> str:
        """What stands between the LSTM layers: dense, flat or hierarchical (a mixture with a primary gate)."""
        if not self.is_moe:
            return "dense"
        return "hierarchical" if re.search(r"^\s+primary_gate:", self.config, re.MULTILINE) else "flat"

    def perplexity(self, split: str) -> float | None:
        """The final perplexity on a split, or None where the run has none."""
        return None if self.result is None else self.result["perplexity"].get(split)


@dataclass(frozen=True)
class Column:
    """One column of a table: its key in a row and in the CSV, and its heading for readers."""

    key: str
    heading: str

    @property
    def is_printed(self) -> bool:
        """Whether the figures are the paper's, which stand apart from ours."""
        return self.key.startswith("paper_")


@dataclass(frozen=True)
class Row:
    """One line of the table; `kind` is run, mean or deviation, absent figures are None."""

    kind: str
    name: str
    figures: Mapping[str, float | str | None]
    num_seeds: int = 1


@dataclass(frozen=True)
class Table:
    """Rows of figures with what they mean; `name` is the stem of its CSV file."""

    name: str
    heading: str
    text: str
    formats: Mapping[Column, Callable[[Any], str]]
    """Each column and how its figures are written for readers."""
    rows: Sequence[Row]
    names: str = "model"
    """What the names of the rows are the names of."""


@dataclass(frozen=True)
class Report:
    """What `write_report` left: its folder, every file in it, and the table for the console."""

    folder: Path
    files: tuple[Path, ...]
    markdown: str
