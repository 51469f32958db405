"""Writes a report: the table, the plots and the page, in `<runs>/report/`."""

from collections.abc import Sequence
from pathlib import Path

from moe_lm.atomic_io import replace_files
from moe_lm.report import Report
from moe_lm.report.ablation import balance_tables
from moe_lm.report.beside import Presets, paper_tables, set_beside
from moe_lm.report.page import to_html
from moe_lm.report.plots import NAMES, draw_plots
from moe_lm.report.results import read_runs
from moe_lm.report.routing import routing_tables
from moe_lm.report.table import main_table, unfinished_runs
from moe_lm.report.writing import to_csv, to_markdown

SOMETIMES = (
    "paper.csv",
    "imitated.csv",
    "balance.csv",
    "routing.csv",
    *(f"{name}.{kind}" for name in NAMES for kind in ("png", "svg")),
)
"""Files that only some reports have."""


def write_report(folder: Path, presets: Presets, notes: Sequence[str] = (), study: str = "") -> Report:
    """Report on the runs of `folder` in `folder/report`; the same runs give the same bytes.

    `presets` gives a preset's configuration, which tells whether a run is the paper's model or imitates it.
    `notes` and `study` stand at the top of the page: what the study can show and what not, its name and scale.
    Raises `UserError` where there is no run, a run is damaged or the report cannot be written.
    """
    folder = Path(folder)
    runs = set_beside(read_runs(folder), presets)
    tables = [main_table(runs), *paper_tables(runs), *balance_tables(runs), *routing_tables(runs)]
    unfinished = unfinished_runs(runs)
    plots = draw_plots(runs)
    pictures = {name: formats["svg"].decode() for name, formats in plots.items()}
    markdown = to_markdown(tables, unfinished)
    page = to_html(folder.resolve().name, study, notes, runs, tables, unfinished, pictures)
    contents = {"index.html": page.encode(), "table.md": markdown.encode()}
    contents |= {f"{table.name}.csv": to_csv(table).encode() for table in tables}
    contents |= {f"{name}.{kind}": data for name, formats in plots.items() for kind, data in formats.items()}
    return Report(folder / "report", replace_files(folder / "report", contents, SOMETIMES), markdown)
