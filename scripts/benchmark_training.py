"""Training words/s of mixtures of experts against the dense layer of equal operations, interleaved in one run.

    python scripts/benchmark_training.py --width 512 --hidden 1024 --experts 4 32 256 --words 4096

Times whole training steps (batch, forward, backward, clipping, Adam) on synthetic sentences. Each round gives a ratio
to the dense model. Prints the medians of words/s and of these ratios; --json writes them to a file.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import synthetic
from benchmarking import interleaved, parse, parser, positive, ratios, run, write_record

from moe_lm.analysis.cost import flops_per_word

DENSE = "moe_1_wide"


def main() -> None:
    """Time all models, one step each in turn."""
    options = _options()
    prepared = synthetic.data(options.vocabulary, 60 * options.words)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            name: synthetic.trainer(
                [*overrides, *_common(options)], prepared, Path(folder) / name, threads=options.threads
            )
            for name, overrides in _models(options).items()
        }
        device = trainers[DENSE].model.device
        steps = {name: partial(synthetic.step, trainer) for name, trainer in trainers.items()}
        seconds = interleaved(steps, options.rounds, device, warmup=1)
    to_each = {name: ratios(seconds, name)[DENSE]["ratio"] for name in trainers}
    rows = {
        name: {
            "words_per_second": 1 / row["seconds"],
            "of_dense": to_each[name],
            "flops_per_second": flops_per_word(trainers[name].model) / row["seconds"],
        }
        for name, row in ratios(seconds, DENSE).items()
    }
    for name, row in rows.items():
        rate = f"{row['flops_per_second'] / 1e9:,.0f} GFLOP/s"
        print(f"{name:<12} {row['words_per_second']:10,.0f} words/s   {row['of_dense']:.2f} of {DENSE}   {rate}")
    write_record(options, device, {"rows": rows})


def _models(options: argparse.Namespace) -> dict[str, list[str]]:
    hidden = f"model.expert_hidden={options.hidden}"
    models = {DENSE: [f"model={DENSE}", f"model.expert_hidden={4 * options.hidden}"]}
    for count in options.experts:
        models[f"moe_{count}"] = ["model=moe_4", f"model.num_experts={count}", hidden]
    for count in options.hierarchical:
        models[f"moe_{count}_h"] = ["model=moe_256_h", f"model.num_experts={count}", hidden]
    return models


def _common(options: argparse.Namespace) -> list[str]:
    words = [f"batch.words={options.words}", f"batch.micro_words={options.micro_words or options.words}"]
    return [*words, f"model.width={options.width}", f"softmax.num_sampled={options.sampled}", *options.overrides]


def _options() -> argparse.Namespace:
    made = parser(__doc__, "overrides", "threads", words=4096, vocabulary=20_000, rounds=7)
    made.add_argument("--micro-words", type=positive, help="words of a micro-batch; default: those of a batch")
    made.add_argument("--width", type=positive, default=512)
    made.add_argument("--hidden", type=positive, default=1024, help="hidden units of one expert")
    made.add_argument("--experts", type=positive, nargs="*", default=[32])
    made.add_argument(
        "--hierarchical", type=positive, nargs="*", default=[], help="experts in 16 groups, 2 x 2 a token"
    )
    made.add_argument("--sampled", type=positive, default=8192, help="words that the softmax samples")
    return parse(made)


if __name__ == "__main__":
    run(main)
