"""A training on synthetic sentences, for benchmarks: real batches, model and optimizer, but no text."""

from pathlib import Path

import numpy as np

from moe_lm.cli import machine as make
from moe_lm.cli.config import composed, resolved
from moe_lm.cli.training import check, trainer_of
from moe_lm.data.prepared import Prepared, Split
from moe_lm.data.vocabulary.words import WordVocabulary
from moe_lm.errors import UserError
from moe_lm.run import Run
from moe_lm.train.trainer import Trainer


def data(vocabulary_size: int, num_words: int) -> Prepared:
    """Return a vocabulary of this size and, as all three splits, sentences of about `num_words` words."""
    if vocabulary_size < 4:
        raise UserError(f"--vocabulary {vocabulary_size}: </S>, <UNK>, <S> and a word are 4")
    words = ["</S>", "<UNK>", *(f"w{i}" for i in range(vocabulary_size - 3)), "<S>"]
    vocabulary = WordVocabulary(words=words, counts=None)
    split = _split(vocabulary_size, vocabulary.end, num_words)
    return Prepared(vocabulary, dict.fromkeys(("train", "valid", "test"), split), "synthetic", {})


def _split(size: int, end: int, num_words: int) -> Split:
    """Return sentences of log-normal lengths (mean 25) and log-uniform words."""
    if num_words < 25:
        raise UserError(f"{num_words} words are too few for a sentence: at least 25")
    generator = np.random.default_rng(0)
    length = np.clip(generator.lognormal(3.05, 0.6, num_words // 25), 2, 250).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(length)])
    tokens = (np.exp(generator.random(starts[-1]) * np.log(size - 1)) - 1).astype(np.int32)
    tokens[starts[1:] - 1] = end
    return Split(tokens=tokens, starts=starts, words=length.astype(np.uint32))


def trainer(overrides: list[str], prepared: Prepared, folder: Path, *, threads: int | None = None) -> Trainer:
    """Return the trainer that `moe-lm train` with these overrides would make, in a new folder, with synthetic data."""
    overrides = [*([] if threads is None else [f"machine.threads={threads}"]), *overrides]
    config = resolved(composed("train", [*overrides, f"runs={folder.parent}", f"name={folder.name}"]))
    check(config)
    device = make.device(config["machine"]["device"])
    make.be_deterministic(device)
    run = Run(folder)
    run.claim(config)
    made, _ = trainer_of(config, prepared, run, device, lambda _: None)
    made.model.train()
    return made


def step(of: Trainer) -> int:
    """Run the next training step and return its words; raises `UserError` if it was skipped, which takes less time."""
    number = of.progress.step
    batch = of.prefetcher.step(number)
    result = of.train_step(batch, number, of.learning_rate(number))
    if not result.updated:
        raise UserError("a step was skipped, its loss or gradient not finite: lower optimizer.learning_rate")
    of.progress.step += 1
    return batch.num_words
