"""Preparation and loading of text, in words a second: counting, encoding, and batches without a model.

    python scripts/benchmark_data.py --words 20_000_000 --files 8

Writes plain text of made-up words (log-uniform, sentences of 25 words) into a temporary folder, prepares it by
`vocabulary=words` on all cores, then lays out training batches with nothing to train. With --json writes the rates.
"""

import argparse
import os
import re
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measuring import new_file, positive, run, seconds_of, write_record

from moe_lm.cli.config import composed, resolved
from moe_lm.cli.data import prepared_data
from moe_lm.data.batching import Batches
from moe_lm.data.prepared import Prepared

_CPU = torch.device("cpu")
_SENTENCE = 25
"""Words."""


def main() -> None:
    """Prepare, then load."""
    options = _options()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write_text(folder, options)
        texts = [f"corpus.{split}={folder}/{split}*.txt" for split in ("train", "valid", "test")]
        config = resolved(composed("train", ["corpus=text", *texts, f"data={folder}/data"]))
        said = []
        started = time.perf_counter()
        prepared = prepared_data(config, say=said.append)
        whole = time.perf_counter() - started
        words = sum(split.num_words for split in prepared.splits.values())
        found = _rates(said) | {"preparation": words / whole, "loading": _loading(prepared, options)}
    for name, rate in found.items():
        print(f"{name:<12} {rate / 1e6:8.2f} M words/s")
    sizes = {key: value for key, value in vars(options).items() if key != "json"}
    write_record(options.json, _CPU, {"words_per_second": found, "cores": os.cpu_count(), "options": sizes})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=positive, default=20_000_000, help="of the training text")
    parser.add_argument("--files", type=positive, default=8)
    parser.add_argument("--vocabulary", type=positive, default=200_000, help="different words, about")
    parser.add_argument("--batch-words", type=positive, default=300_000)
    parser.add_argument("--micro-words", type=positive, default=18_750)
    parser.add_argument("--steps", type=positive, default=40)
    parser.add_argument("--json", type=new_file)
    return parser.parse_args()


def _write_text(folder: Path, options: argparse.Namespace) -> None:
    generator = np.random.default_rng(0)
    spelled = np.array([f"w{number:x}" for number in range(options.vocabulary)], dtype=object)
    counts = {f"train-{i}": options.words // options.files for i in range(options.files)} | {
        "valid": 5000,
        "test": 5000,
    }
    for name, count in counts.items():
        drawn = np.exp(generator.random(count // _SENTENCE * _SENTENCE) * np.log(options.vocabulary)).astype(int) - 1
        lines = spelled[drawn].reshape(-1, _SENTENCE)
        (folder / f"{name}.txt").write_text("".join(" ".join(line) + "\n" for line in lines))


def _rates(said: list[str]) -> dict[str, float]:
    """Return what the preparation says of its two passes."""
    found = re.findall(r"^(counting|encoding): .*?([\d,]+) words/s", "\n".join(said), re.MULTILINE)
    return {name: float(rate.replace(",", "")) for name, rate in found}


def _loading(prepared: Prepared, options: argparse.Namespace) -> float:
    """Return the words a second of batches that nobody trains on, the first pool's cutting apart."""
    batches = Batches(
        prepared.splits["train"],
        start=prepared.vocabulary.start,
        seed=1,
        words=options.batch_words,
        micro_words=options.micro_words,
    )
    rates = []
    for step in range(options.steps):
        seen = []
        took = seconds_of(lambda step=step, seen=seen: seen.extend(m.num_words for m in batches.step(step)), _CPU)
        rates.append(sum(seen) / took)
    return statistics.median(rates)


if __name__ == "__main__":
    run(main)
