"""moe-lm prepare: text to token ids on disk."""

import sys

from moe_lm.commands.configuration import composed, resolved
from moe_lm.commands.data import data_folder, prepared_data

HELP = "text to token ids in data/<name>/ (train does it by itself)"


def main(arguments: list[str]) -> int:
    """Prepare the data and print what is in them."""
    config = resolved(composed("prepare", arguments))
    data = prepared_data(config, say=lambda line: print(line, file=sys.stderr))
    for split, part in data.statistics.items():
        unigram = f", unigram perplexity {part['unigram_perplexity']:.1f}" if "unigram_perplexity" in part else ""
        print(f"{split}: {part['sentences']:,} sentences, {part['words']:,} words with </S>{unigram}")
    print(f"{data_folder(config)}: vocabulary of {data.vocabulary.size:,}, fingerprint {data.fingerprint}")
    return 0
