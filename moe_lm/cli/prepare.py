"""moe-lm prepare: text to token ids on disk."""

import sys

from moe_lm.cli import log
from moe_lm.cli.config import composed, resolved
from moe_lm.cli.data import data_folder, prepared_data
from moe_lm.data.prepared import reference_lines, statistics_line
from moe_lm.errors import UserError


def main(arguments: list[str]) -> int:
    """Prepare the data and print their statistics."""
    config = resolved(composed("prepare", arguments))
    if config["processes"] is not None and config["processes"] < 1:
        raise UserError(f"processes={config['processes']}: must be at least 1, or null for one per core")
    lines = []

    def log_and_keep(line: str) -> None:
        lines.append(line)
        log(line)

    data = prepared_data(config, log_and_keep)
    if not lines:  # the data were there already
        for split, part in data.statistics.items():
            print(statistics_line(split, part, config["corpus"]["max_words"]), file=sys.stderr)
        for line in reference_lines(data.reference_counts):
            print(line, file=sys.stderr)
    print(f"{data_folder(config)}: vocabulary of {data.vocabulary.size:,}, fingerprint {data.fingerprint}")
    return 0
