"""Writes a report to `<runs>/report/`: tables, plots and the page."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from moe_lm.atomic_io import replace_files
from moe_lm.report.formats import to_csv, to_markdown
from moe_lm.report.html import render
from moe_lm.report.plots import NAMES, draw_plots
from moe_lm.report.runs import Presets, environments_of, read_runs
from moe_lm.report.tables import report_tables, unfinished_runs

OPTIONAL = (
    *("paper.csv", "imitated.csv", "balance.csv", "routing.csv", "leverage.csv", "experts.csv"),
    *(f"{name}.{kind}" for name in NAMES for kind in ("png", "svg")),
)
"""Files that only some reports have."""


class Report(NamedTuple):
    """The folder of a report, every file in it, and its tables for the console."""

    folder: Path
    files: tuple[Path, ...]
    markdown: str


def write_report(folder: Path, presets: Presets, notes: Sequence[str] = (), study: str = "") -> Report:
    """Write the report on the runs of `folder` to `folder/report`; the same runs give the same bytes.

    `presets` returns a preset's configuration, which tells whether a run is the paper's model at some size. `notes`
    (what the study shows and what it does not) and `study` (its name and scale) are shown at the top of the page.
    Raises `UserError` where there is no run, a run is damaged or the report cannot be written.
    """
    folder = Path(folder)
    runs = read_runs(folder, presets)
    tables, unfinished, plots = report_tables(runs), unfinished_runs(runs), draw_plots(runs)
    markdown = to_markdown(tables, unfinished)
    page = render(
        "page.html.j2",
        title=folder.resolve().name,
        study=study,
        notes=notes,
        finished=len(runs) - len(unfinished),
        unfinished=unfinished,
        tables=tables,
        plots={name: formats["svg"].decode() for name, formats in plots.items()},
        runs=runs,
        environments=environments_of(runs),
    )
    contents = {"index.html": page.encode(), "table.md": markdown.encode()}
    contents |= {f"{table.name}.csv": to_csv(table).encode() for table in tables}
    contents |= {f"{name}.{kind}": data for name, formats in plots.items() for kind, data in formats.items()}
    return Report(folder / "report", replace_files(folder / "report", contents, OPTIONAL), markdown)
