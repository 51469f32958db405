"""Writes a report: the table, the plots and the page, in `<runs>/report/`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_lm.mistake import Mistake
from moe_lm.report import Report
from moe_lm.report.page import to_html
from moe_lm.report.plots import NAMES, draw_plots
from moe_lm.report.results import read_runs
from moe_lm.report.table import table_rows, to_csv, to_markdown, unfinished_runs


def write_report(folder: Path, notes: Sequence[str] = ()) -> Report:
    """Report on the runs of `folder` in `folder/report`; the same runs give the same bytes.

    `notes` stand at the top of the page: what the study can show and what not.
    Raises `Mistake` where there is no run, a run is damaged or the report cannot be written.
    """
    folder = Path(folder)
    runs = read_runs(folder)
    rows, unfinished = table_rows(runs), unfinished_runs(runs)
    plots = draw_plots(runs)
    pictures = {name: formats["svg"].decode() for name, formats in plots.items()}
    markdown = to_markdown(rows, unfinished)
    page = to_html(folder.resolve().name, notes, runs, rows, unfinished, pictures)
    contents = {
        "index.html": page.encode(),
        "table.md": markdown.encode(),
        "table.csv": to_csv(rows).encode(),
    } | {f"{name}.{kind}": data for name, formats in plots.items() for kind, data in formats.items()}
    return Report(folder / "report", write_files(folder / "report", contents), markdown)


def write_files(target: Path, contents: Mapping[str, bytes]) -> tuple[Path, ...]:
    """Put each file in place whole, and remove plots of an earlier report that this one does not have."""
    try:
        target.mkdir(exist_ok=True)
        for name, data in contents.items():
            temporary = target / f".{name}.tmp"
            temporary.write_bytes(data)
            temporary.replace(target / name)
        for stale in (target / f"{name}.{kind}" for name in NAMES for kind in ("png", "svg")):
            if stale.name not in contents:
                stale.unlink(missing_ok=True)
    except OSError as error:
        raise Mistake(f"cannot write {target} ({error.strerror}): make it a folder you may write to") from error
    return tuple(target / name for name in contents)
