"""moe-lm report: table, plots and one html page of a folder of runs."""

from pathlib import Path

import yaml

from moe_lm.commands.configuration import composed, resolved
from moe_lm.mistake import Mistake
from moe_lm.report.write import write_report

HELP = "table, plots and an html page of a folder of runs"


def main(arguments: list[str]) -> int:
    """Write <runs>/report/ and print the table and where the page is."""
    folder = Path(resolved(composed("report", arguments))["runs"])
    report = write_report(folder, _notes(folder / "study.yaml"))
    print(report.markdown)
    print(f"\n{report.folder / 'index.html'}")
    return 0


def _notes(study: Path) -> list[str]:
    if not study.is_file():
        return []
    try:
        return [str(note) for note in yaml.safe_load(study.read_text(encoding="utf-8"))["notes"]]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError) as error:
        raise Mistake(f"{study} is damaged ({type(error).__name__}): delete it, or repeat the sweep") from error
