"""moe-lm prepare: text to token ids on disk."""

import sys

from moe_lm.cli.config import composed, resolved
from moe_lm.cli.data import data_folder, prepared_data
from moe_lm.data.reference_counts import report
from moe_lm.data.split_writer import statistics_line
from moe_lm.errors import UserError

HELP = "text to token ids in data/<name>/ (train does it by itself)"


def main(arguments: list[str]) -> int:
    """Prepare the data and print what is in them."""
    config = resolved(composed("prepare", arguments))
    if config["processes"] is not None and config["processes"] < 1:
        raise UserError(f"processes={config['processes']}: must be at least 1, or null for one a core")
    said = []

    def say(line: str) -> None:
        said.append(line)
        print(line, file=sys.stderr)

    data = prepared_data(config, say)
    if not said:  # it was there already
        for split, part in data.statistics.items():
            print(statistics_line(split, part, config["corpus"]["max_words"]), file=sys.stderr)
        print("\n".join(report(data.figures)), end="\n" if data.figures else "", file=sys.stderr)
    print(f"{data_folder(config)}: vocabulary of {data.vocabulary.size:,}, fingerprint {data.fingerprint}")
    return 0
