"""Records of a report: runs as read from their files, and tables of figures."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from moe_lm.compat import current_config

Figures = Mapping[str, float | str | None]
"""Figures by name; None where a figure is missing."""


@dataclass(frozen=True)
class PaperResult:
    """A row of the paper's Table 7 or 8; None where the paper gives no figure."""

    name: str
    """Model name as the paper writes it."""
    operations: str | None
    """Millions of operations per timestep, with the printed digits."""
    parameters: str | None
    """Millions of parameters without embedding and softmax, with the printed digits."""
    total: str | None
    """Billions of parameters in total, with the printed digits."""
    perplexity: float | None
    """Test perplexity after 10 epochs (Table 7) or 1 epoch (Table 8)."""
    later_perplexity: float | None
    """Final test perplexity (Table 7)."""
    dropout: float | None
    """DropProb (Table 7)."""
    tflops: float | None
    """TFLOPS per GPU."""
    early_perplexity: float | None = None
    """Test perplexity after 0.1 epochs (Table 8)."""


@dataclass(frozen=True)
class PaperModel:
    """The paper's model with a run's architecture, at the run's size or at another one."""

    preset: str
    result: PaperResult
    comparable: bool
    """Whether the run has the paper's sizes and test text."""
    times_width: float
    """Width in the paper divided by the run's width."""
    words: float | None
    """Training words behind the paper's perplexity; None where the paper gives no perplexity."""


@dataclass(frozen=True)
class RunRecord:
    """The contents of one run directory; `result` is None while the run is unfinished."""

    name: str
    folder: Path
    result: Mapping[str, Any] | None
    metrics: tuple[Mapping[str, Any], ...]  # training lines
    evaluations: tuple[Mapping[str, Any], ...]  # lines with a split
    config: str
    audit: Mapping[str, Any] | None = None
    """Result of `moe-lm audit` at the run's last step; None if that step was not audited."""
    paper: PaperModel | None = field(default=None, compare=False)

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """The parsed configuration with this version's keys; empty if the file is not a YAML mapping."""
        try:
            settings = yaml.safe_load(self.config)
        except yaml.YAMLError:
            return {}
        return current_config(settings) if isinstance(settings, dict) else {}

    @property
    def layers(self) -> list[Mapping[str, Any]]:
        """The configured layers in their order; empty if the configuration has none."""
        model = self.settings.get("model")
        layers = model.get("layers") if isinstance(model, Mapping) else None
        if not isinstance(layers, Mapping):
            return []
        order = model.get("order")
        found = [layers.get(name) for name in order] if isinstance(order, list) else layers.values()
        return [layer for layer in found if isinstance(layer, Mapping)]

    @property
    def base_name(self) -> str:
        """The name without its `seed=N` part, which runs that differ only in the seed share."""
        return re.sub(r",seed=\d+(?=,|$)", "", self.name)

    @property
    def is_moe(self) -> bool:
        """Whether the run has a gate; only then do its training lines contain the experts' load."""
        return any("cv_load" in line for line in self.metrics)

    @property
    def kind(self) -> str:
        """`dense`, `flat` (one gate) or `hierarchical` (with a primary gate)."""
        if not self.is_moe:
            return "dense"
        return "hierarchical" if re.search(r"^\s+primary_gate:", self.config, re.MULTILINE) else "flat"

    def perplexity(self, split: str) -> float | None:
        """Return the final perplexity on a split, None where there is none."""
        return None if self.result is None else self.result["perplexity"].get(split)


@dataclass(frozen=True)
class Column:
    """A column of a table: its key in rows and CSV files, and its heading for readers."""

    key: str
    heading: str

    @property
    def is_paper(self) -> bool:
        """Whether the column holds the paper's figures."""
        return self.key.startswith("paper_")


@dataclass(frozen=True)
class Row:
    """A row of a table; `kind` is `run`, or `mean` or `deviation` over several seeds."""

    kind: str
    name: str
    figures: Figures
    num_seeds: int = 1

    @property
    def remark(self) -> str:
        """Text after the name that says what a row over several seeds holds; empty for a single run."""
        kinds = {"run": "", "mean": " mean", "deviation": " standard deviation"}
        return kinds[self.kind] + (f" ({self.num_seeds} seeds)" if self.num_seeds > 1 else "")


@dataclass(frozen=True)
class Table:
    """Rows of figures and the text that explains them; `name` is the stem of the CSV file."""

    name: str
    heading: str
    text: str
    formats: Mapping[Column, Callable[[Any], str]]
    """For each column, the function that writes its figures as text."""
    rows: Sequence[Row]
    names: str = "model"
    """Heading of the column of row names."""

    def cells(self, row: Row) -> list[str]:
        """Return a row's figures as text, empty where a figure is missing."""
        values = [(row.figures.get(column.key), style) for column, style in self.formats.items()]
        return ["" if value is None else style(value) for value, style in values]
