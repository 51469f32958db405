"""How fast text is prepared and loaded, in words/s: counting, encoding, and batches without a model.

    python scripts/benchmark_data.py --words 20_000_000 --files 8

Writes plain text of synthetic words (log-uniform, sentences of 25 words) into a temporary folder, prepares it with
`vocabulary=words` on all cores, then collates training batches without training. --json writes the rates to a file.
"""

import argparse
import os
import re
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from benchmarking import parse, parser, positive, run, seconds_of, write_record

from moe_lm.cli.config import composed, resolved
from moe_lm.cli.data import prepared_data
from moe_lm.data.batching import Batches
from moe_lm.data.prepared import Prepared

_CPU = torch.device("cpu")
_SENTENCE_WORDS = 25


def main() -> None:
    """Prepare, then load."""
    options, logged, found = _options(), [], []
    with tempfile.TemporaryDirectory() as folder:
        _write_text(Path(folder), options)
        texts = [f"corpus.{split}={folder}/{split}*.txt" for split in ("train", "valid", "test")]
        config = resolved(composed("train", ["corpus=text", *texts, f"data={folder}/data"]))
        seconds = seconds_of(lambda: found.append(prepared_data(config, log=logged.append)), _CPU)
        words = sum(split.num_words for split in found[0].splits.values())
        rates = _logged_rates(logged) | {"preparation": words / seconds, "loading": _loading(found[0], options)}
    for name, rate in rates.items():
        print(f"{name:<12} {rate / 1e6:8.2f} M words/s")
    write_record(options, _CPU, {"words_per_second": rates, "cores": os.cpu_count()})


def _options() -> argparse.Namespace:
    made = parser(__doc__, "threads")
    made.add_argument("--words", type=positive, default=20_000_000, help="words of the training text")
    made.add_argument("--files", type=positive, default=8)
    made.add_argument("--vocabulary", type=positive, default=200_000, help="approximate number of different words")
    made.add_argument("--batch-words", type=positive, default=300_000)
    made.add_argument("--micro-words", type=positive, default=18_750)
    made.add_argument("--steps", type=positive, default=40)
    return parse(made)


def _write_text(folder: Path, options: argparse.Namespace) -> None:
    generator = np.random.default_rng(0)
    spelled = np.array([f"w{number:x}" for number in range(options.vocabulary)], dtype=object)
    counts = {f"train-{i}": options.words // options.files for i in range(options.files)}
    for name, count in (counts | {"valid": 5000, "test": 5000}).items():
        shape = count // _SENTENCE_WORDS, _SENTENCE_WORDS
        lines = spelled[np.exp(generator.random(shape) * np.log(options.vocabulary)).astype(int) - 1]
        (folder / f"{name}.txt").write_text("".join(" ".join(line) + "\n" for line in lines))


def _logged_rates(lines: list[str]) -> dict[str, float]:
    """Return the rates that the preparation logs for its two passes."""
    found = re.findall(r"^(counting|encoding): .*?([\d,]+) words/s", "\n".join(lines), re.MULTILINE)
    return {name: float(rate.replace(",", "")) for name, rate in found}


def _loading(prepared: Prepared, options: argparse.Namespace) -> float:
    """Return the median words/s of collating a batch; the first batch, which also cuts a pool, counts like the rest."""
    batches = Batches(
        prepared.splits["train"],
        start=prepared.vocabulary.start,
        seed=1,
        words=options.batch_words,
        micro_words=options.micro_words,
    )
    rates = []
    for step in range(options.steps):
        words = []
        took = seconds_of(lambda step=step, to=words: to.extend(m.num_words for m in batches.step(step)), _CPU)
        rates.append(sum(words) / took)
    return statistics.median(rates)


if __name__ == "__main__":
    run(main)
