"""Exact evaluation over a large vocabulary: words a second, and the share of what matrix products reach.

    python scripts/benchmark_evaluation.py --tokens 4096 --threads 2

Every word's probability among all of the vocabulary's, as `moe-lm evaluate` makes it, on made-up sentences. With --json
writes the figures.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import made_up
import torch
from measuring import new_file, peak_bytes, positive, product_ceiling, run, seconds_of, write_record

from moe_lm.analysis.cost.operations import operations_per_timestep
from moe_lm.analysis.perplexity import measure
from moe_lm.cli import machine as make
from moe_lm.cli.config import composed, resolved

TEST_TOKENS = 159_658
"""Of the benchmark's standard test shard."""


def main() -> None:
    """Measure a part of a test set, or the whole of it."""
    options = _options()
    make.keep_memory()
    make.set_threads(options.threads)
    prepared = made_up.data(options.vocabulary, options.tokens)
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"model={options.model}", "batch.micro_words=1024", *options.overrides]
        trainer = made_up.trainer("evaluation", overrides, prepared, Path(folder))
    on, split = made_up.device_of(trainer), prepared.splits["test"]
    most = resolved(composed("evaluate", ["run=none"]))["batch"]

    def work() -> None:
        start = prepared.vocabulary.start
        measure(trainer.model, split, start=start, max_sentences=most["sentences"], max_words=most["words"])

    seconds = statistics.median(seconds_of(work, on) for _ in range(options.rounds))
    rate = split.num_words / seconds
    flops = 2 * (operations_per_timestep(trainer.model) + trainer.model.softmax.weight_VD.numel())
    ceiling = product_ceiling(on, torch.float32, options.square)
    print(
        f"{rate:,.0f} words/s, the test shard in {TEST_TOKENS / rate / 60:.1f} minutes; {flops * rate / 1e9:,.0f} "
        f"GFLOP/s, {100 * flops * rate / ceiling:.0f} % of what products of square matrices reach; "
        f"peak {peak_bytes(on) / 2**30:.1f} GiB"
    )
    found = {"words_per_second": rate, "flops_per_second": flops * rate, "product_flops_per_second": ceiling}
    sizes = {key: value for key, value in vars(options).items() if key != "json"}
    write_record(options.json, on, found | {"peak_bytes": peak_bytes(on), "options": sizes})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="moe_4", help="a preset of configs/model")
    parser.add_argument("--tokens", type=positive, default=TEST_TOKENS)
    parser.add_argument("--vocabulary", type=positive, default=793_471)
    parser.add_argument("--rounds", type=positive, default=1)
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--square", type=positive, default=2048, help="size of the products that give the ceiling")
    parser.add_argument("--overrides", nargs="*", default=[], help="further keys of moe-lm train")
    parser.add_argument("--json", type=new_file)
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
