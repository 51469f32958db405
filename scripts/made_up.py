"""A training on made-up sentences, for measuring: real batches, model and optimizer, no text and no vocabulary file."""

from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch

from moe_lm.cli import machine as make
from moe_lm.cli.config import composed, resolved
from moe_lm.cli.training import check, trainer_of
from moe_lm.data.prepared import Prepared, Split
from moe_lm.data.vocabulary.words import WordVocabulary
from moe_lm.errors import UserError
from moe_lm.run import Run
from moe_lm.train.later import Later
from moe_lm.train.trainer import Trainer

LEFT_OUT = "an update was left out, its loss or gradient not finite, so it took no time: lower optimizer.learning_rate"
_UNREAD: WeakKeyDictionary[Trainer, Later] = WeakKeyDictionary()
"""Whether the last update was made, read while the next one is under way, as a training does."""


def data(vocabulary_size: int, num_words: int) -> Prepared:
    """Return a vocabulary of this size, and a split of about as many words three times."""
    if vocabulary_size < 4:
        raise UserError(f"--vocabulary {vocabulary_size}: </S>, <UNK>, <S> and a word are 4")
    words = ["</S>", "<UNK>", *(f"w{i}" for i in range(vocabulary_size - 3)), "<S>"]
    vocabulary = WordVocabulary(words=words, counts=None)
    made = split(vocabulary_size, vocabulary.end, num_words)
    return Prepared(vocabulary, dict.fromkeys(("train", "valid", "test"), made), "made up", {})


def split(size: int, end: int, num_words: int) -> Split:
    """Return sentences of log-normal lengths (mean 25) and log-uniform words."""
    if num_words < 25:
        raise UserError(f"{num_words} words are no sentence: 25 at least")
    generator = np.random.default_rng(0)
    length = np.clip(generator.lognormal(3.05, 0.6, num_words // 25), 2, 250).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(length)])
    tokens = (np.exp(generator.random(starts[-1]) * np.log(size - 1)) - 1).astype(np.int32)
    tokens[starts[1:] - 1] = end
    return Split(tokens=tokens, starts=starts, words=length.astype(np.uint32))


def trainer(name: str, overrides: list[str], prepared: Prepared, folder: Path) -> Trainer:
    """Return what `moe-lm train` with these overrides would train, with the made-up data."""
    config = resolved(composed("train", [*overrides, f"runs={folder}", f"name={name}"]))
    check(config)
    on = make.device(config["machine"]["device"])
    make.be_deterministic(on)
    run = Run(folder / name)
    run.claim(config)
    made, _ = trainer_of(config, prepared, run, on, say=_ignore)
    made.model.train()
    return made


def step(of: Trainer) -> int:
    """Make one update on the next batch and return its words; one that was left out ends the measurement."""
    number = of.progress.step
    batch = of.ahead.step(number)
    done = of.update(batch, number, of.peak_rate * of.schedule(number))
    check_last(of)
    _UNREAD[of] = done.decision
    of.progress.step += 1
    return batch.num_words


def check_last(of: Trainer) -> None:
    """Raise `UserError` where the last update was left out; waits for it."""
    if of in _UNREAD and not _UNREAD[of].read():
        raise UserError(LEFT_OUT)


def device_of(of: Trainer) -> torch.device:
    """Return where a training runs."""
    return of.model.embedding_VD.device


def _ignore(line: str) -> None:
    """Let no line of a training stand between the figures."""
