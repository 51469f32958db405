"""moe-lm report: table, plots and one html page of a folder of runs."""

from pathlib import Path

import yaml

from moe_lm.commands.configuration import composed, resolved
from moe_lm.report.write import write_report

HELP = "table, plots and an html page of a folder of runs"


def main(arguments: list[str]) -> int:
    """Write <runs>/report/ and print the table and where the page is."""
    folder = Path(resolved(composed("report", arguments))["runs"])
    study = folder / "study.yaml"
    notes = (yaml.safe_load(study.read_text()) or {}).get("notes", []) if study.is_file() else []
    report = write_report(folder, notes)
    print(report.markdown)
    print(f"\n{report.folder / 'index.html'}")
    return 0
