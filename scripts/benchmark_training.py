"""Training words/s of mixtures of experts against the dense layer of equal operations, interleaved in one run.

    python scripts/benchmark_training.py --width 512 --hidden 1024 --experts 4 32 256 --words 4096

Whole updates are timed (batch, forward, backward, clipping, Adam) on made-up sentences; prints the medians and
the median of the ratios round by round, and with --json writes them.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import made_up
from measuring import new_file, positive, repeats, run, seconds_of, write_record

from moe_lm.analysis.cost.operations import flops_per_word
from moe_lm.cli import machine as make
from moe_lm.train.trainer import Trainer

DENSE = "moe_1_wide"


def main() -> None:
    """Time all models, one update each in turn."""
    options = _options()
    prepared = made_up.data(options.vocabulary, 60 * options.words)
    make.keep_memory()
    make.set_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            name: made_up.trainer(name, [*choice, *_common(options)], prepared, Path(folder))
            for name, choice in _models(options).items()
        }
        on = made_up.device_of(trainers[DENSE])
        seconds = {name: [] for name in trainers}
        for round_ in range(options.rounds + 1):
            for name, trainer in trainers.items():
                words = []
                took = seconds_of(lambda of=trainer, to=words: _updates(of, repeats(on), to), on)
                made_up.check_last(trainer)
                if round_ > 0:  # the first update also allocates
                    seconds[name].append(took / sum(words))
    rows = {
        name: {
            "words_per_second": 1 / statistics.median(times),
            "of_dense": statistics.median(d / t for d, t in zip(seconds[DENSE], times, strict=True)),
            "flops_per_second": flops_per_word(trainers[name].model) / statistics.median(times),
        }
        for name, times in seconds.items()
    }
    for name, row in rows.items():
        rate = f"{row['flops_per_second'] / 1e9:,.0f} GFLOP/s"
        print(f"{name:<12} {row['words_per_second']:10,.0f} words/s   {row['of_dense']:.2f} of {DENSE}   {rate}")
    kept = {key: value for key, value in vars(options).items() if key != "json"}
    write_record(options.json, on, {"rows": rows, "options": kept})


def _updates(trainer: Trainer, times: int, words: list[int]) -> None:
    for _ in range(times):
        words.append(made_up.step(trainer))


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
    words += [] if options.threads is None else [f"machine.threads={options.threads}"]
    return [*words, f"model.width={options.width}", f"softmax.num_sampled={options.sampled}", *options.overrides]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=positive, default=512)
    parser.add_argument("--hidden", type=positive, default=1024, help="of one expert")
    parser.add_argument("--experts", type=positive, nargs="*", default=[32])
    parser.add_argument(
        "--hierarchical", type=positive, nargs="*", default=[], help="experts, in 16 groups, 2 x 2 a token"
    )
    parser.add_argument("--words", type=positive, default=4096, help="in a batch")
    parser.add_argument("--micro-words", type=positive, help="in a micro-batch; a batch is one if left out")
    parser.add_argument("--vocabulary", type=positive, default=20_000)
    parser.add_argument("--sampled", type=positive, default=8192)
    parser.add_argument("--threads", type=positive, default=None)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--overrides", nargs="*", default=[], help="further keys of moe-lm train")
    parser.add_argument("--json", type=new_file)
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
