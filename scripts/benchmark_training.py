"""Training words/s of mixtures of experts against the dense layer of equal operations, interleaved in one run.

    python scripts/benchmark_training.py --width 512 --hidden 1024 --experts 4 32 256 --words 4096

Whole updates are timed (batch, forward, backward, clipping, Adam) on made-up sentences; prints the medians and
the median of the ratios round by round, and with --json writes them.
"""

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from moe_lm.commands import build as make
from moe_lm.commands.configuration import composed, resolved
from moe_lm.commands.training import trainer_of
from moe_lm.prepared import Prepared, Split
from moe_lm.run import Run
from moe_lm.trainer import Trainer
from moe_lm.vocabulary.words import WordVocabulary


def main() -> None:
    """Time all models, one update each in turn."""
    options = _options()
    words = ["</S>", "<UNK>", *(f"w{i}" for i in range(options.vocabulary - 3)), "<S>"]
    vocabulary = WordVocabulary(words=words, counts=None)
    split = made_up_split(options.vocabulary, vocabulary.end, 60 * options.words)
    data = Prepared(vocabulary, dict.fromkeys(("train", "valid", "test"), split), "made up", {})
    make.keep_memory()
    make.set_threads(options.threads)
    models = {"moe_1_wide": ["model=moe_1_wide", f"model.expert_hidden={4 * options.hidden}"]}
    for count in options.experts:
        name = f"moe_{count}"
        models[name] = ["model=moe_4", f"model.num_experts={count}", f"model.expert_hidden={options.hidden}"]
    for count in options.hierarchical:
        name = f"moe_{count}_h"
        models[name] = ["model=moe_256_h", f"model.num_experts={count}", f"model.expert_hidden={options.hidden}"]
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: _trainer(name, choice, options, data, Path(folder)) for name, choice in models.items()}
        seconds = {name: [] for name in trainers}
        for round_ in range(options.rounds + 1):
            for name, trainer in trainers.items():
                started = time.perf_counter()
                num_words = _step(trainer)
                if trainer.model.embedding_VD.is_cuda:
                    torch.cuda.synchronize()
                if round_ > 0:  # the first update also allocates
                    seconds[name].append((time.perf_counter() - started) / num_words)
    _print(seconds, options)


def made_up_split(size: int, end: int, num_words: int) -> Split:
    """Return sentences of log-normal lengths (mean 25) and log-uniform words."""
    generator = np.random.default_rng(0)
    length = np.clip(generator.lognormal(3.05, 0.6, num_words // 25), 2, 250).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(length)])
    tokens = (np.exp(generator.random(starts[-1]) * np.log(size - 1)) - 1).astype(np.int32)
    tokens[starts[1:] - 1] = end
    return Split(tokens=tokens, starts=starts, words=length.astype(np.uint32))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1024, help="of one expert")
    parser.add_argument("--experts", type=int, nargs="+", default=[32])
    parser.add_argument("--hierarchical", type=int, nargs="*", default=[], help="experts, in 16 groups, 2 x 2 a token")
    parser.add_argument("--words", type=int, default=4096, help="in a batch")
    parser.add_argument("--vocabulary", type=int, default=20_000)
    parser.add_argument("--sampled", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _trainer(name: str, choice: list[str], options: argparse.Namespace, data: Prepared, folder: Path):
    arguments = [
        *choice,
        f"model.width={options.width}",
        f"batch.words={options.words}",
        f"batch.micro_words={options.words}",
    ]
    config = resolved(composed("train", [*arguments, f"softmax.num_sampled={options.sampled}", f"runs={folder}"]))
    on = make.device(config["machine"]["device"])
    make.be_deterministic(on)
    run = Run(folder / name)
    run.claim(config)
    trainer, _ = trainer_of(config, data, run, on, say=_ignore)
    trainer.model.train()
    return trainer


def _step(trainer: Trainer) -> int:
    """Make one update on the next batch and return its words."""
    step = trainer.progress.step
    batch = trainer.batches.step(step)
    trainer.update(batch, step, trainer.peak_rate * trainer.schedule(step))
    trainer.progress.step += 1
    return batch.num_words


def _ignore(line: str) -> None:
    """Let no line of a training stand between the figures."""


def _print(seconds: dict[str, list[float]], options: argparse.Namespace) -> None:
    dense = seconds["moe_1_wide"]
    rows = {
        name: {
            "words_per_second": 1 / statistics.median(times),
            "of_dense": statistics.median(d / t for d, t in zip(dense, times, strict=True)),
        }
        for name, times in seconds.items()
    }
    for name, row in rows.items():
        print(f"{name:<12} {row['words_per_second']:10,.0f} words/s   {row['of_dense']:.2f} of moe_1_wide")
    if options.json:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        record = {"rows": rows, "options": {k: str(v) for k, v in vars(options).items() if k != "json"}}
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"
        record |= {"device": device, "threads": torch.get_num_threads(), "commit": commit.stdout.strip()}
        record["torch"] = torch.__version__
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
