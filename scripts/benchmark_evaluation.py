"""Exact evaluation over a large vocabulary: words/s, and FLOP/s relative to square matrix products.

    python scripts/benchmark_evaluation.py --tokens 4096 --threads 2

Computes each word's probability over the whole vocabulary, as `moe-lm evaluate` does, on synthetic sentences.
--json writes the figures to a file.
"""

import statistics
import tempfile
from functools import partial
from pathlib import Path

import synthetic
import torch
from benchmarking import parse, parser, peak_bytes, positive, product_ceiling, run, seconds_of, write_record

from moe_lm.analysis.cost import operations_per_timestep
from moe_lm.analysis.perplexity import evaluate
from moe_lm.cli.config import composed, resolved

TEST_TOKENS = 159_658
"""Tokens of the 1-Billion-Word Benchmark's standard test shard."""


def main() -> None:
    """Measure a whole test set, or a part of it."""
    made = parser(__doc__, "overrides", "threads", "square", vocabulary=793_471, rounds=1)
    made.add_argument("--model", default="moe_4", help="a preset of configs/model")
    made.add_argument("--tokens", type=positive, default=TEST_TOKENS)
    options = parse(made)
    prepared = synthetic.data(options.vocabulary, options.tokens)
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"model={options.model}", "batch.micro_words=1024", *options.overrides]
        model = synthetic.trainer(overrides, prepared, Path(folder) / "evaluation", threads=options.threads).model
    split, batch = prepared.splits["test"], resolved(composed("evaluate", ["run=none"]))["batch"]
    sizes = {"max_sentences": batch["sentences"], "max_words": batch["words"]}
    work = partial(evaluate, model, split, start=prepared.vocabulary.start, **sizes)
    rate = split.num_words / statistics.median(seconds_of(work, model.device) for _ in range(options.rounds))
    flops = 2 * (operations_per_timestep(model) + model.softmax.weight_VD.numel()) * rate
    ceiling, peak = product_ceiling(model.device, options.square, torch.float32), peak_bytes(model.device)
    print(
        f"{rate:,.0f} words/s, the test shard in {TEST_TOKENS / rate / 60:.1f} minutes; {flops / 1e9:,.0f} GFLOP/s, "
        f"{100 * flops / ceiling:.0f} % of what products of square matrices reach; peak {peak / 2**30:.1f} GiB"
    )
    found = {"words_per_second": rate, "flops_per_second": flops, "product_flops_per_second": ceiling}
    write_record(options, model.device, found | {"peak_bytes": peak})


if __name__ == "__main__":
    run(main)
