"""A small made-up corpus, the arguments of a tiny training on it, and the command line called in this process."""

import gc
import os
import random
import re
import shlex
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from moe_lm.__main__ import main

gc.freeze()  # what torch and hydra brought is not looked through again at every collection

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
WORDS = [f"w{i}" for i in range(50)]

# Two micro-batches a step, noise and dropout on: accumulation and the first pass over the statistics run.
TRAINING = shlex.split(
    "model=moe_4 model.width=8 model.expert_hidden=8 model.num_experts=4 model.k=2 corpus=text "
    "corpus.train=[text/train.txt] corpus.valid=[text/valid.txt] corpus.test=[text/test.txt] "
    "vocabulary.min_count=1 softmax.num_sampled=16 batch.words=200 batch.micro_words=100 "
    "training.num_words=2300 training.log_every=3 training.valid_every=5 valid.max_sentences=10 "
    "schedule.warmup_steps=5 optimizer.learning_rate=0.01 checkpoint.every_seconds=0 checkpoint.keep_last=3 "
    "machine.device=cpu machine.threads=1 name=tiny"
)

# Lines that may precede the error: progress of the preparation.
PROGRESS = re.compile(
    r"(vocabulary|train|valid|test|unigram perplexity|runs/\S+): |[\d,]+ updates of |the token ids of its training "
)


class Outcome(NamedTuple):
    """Exit code and outputs of a command."""

    code: int
    out: str
    err: str


def write_corpus(folder: Path) -> None:
    """Sentences of a Markov chain in which each word is followed by one of four."""
    draw = random.Random(1)
    followers = {word: draw.sample(WORDS, 4) for word in WORDS}
    folder.mkdir()
    for split, count in {"train": 300, "valid": 40, "test": 40}.items():
        sentences = []
        for _ in range(count):
            words = [draw.choice(WORDS)]
            while len(words) < 20 and draw.random() > 0.12:
                words.append(draw.choice(followers[words[-1]]))
            sentences.append(" ".join(words))
        (folder / f"{split}.txt").write_text("\n".join(sentences) + "\n")


def with_overrides(arguments: list[str], *overrides: str) -> list[str]:
    """The arguments with some keys replaced."""
    keys = {override.split("=")[0] for override in overrides}
    return [argument for argument in arguments if argument.split("=")[0] not in keys] + list(overrides)


def signal_handlers() -> dict:
    """This process's handlers of the signals that a training handles."""
    return {number: signal.getsignal(number) for number in SIGNALS}


def call(*arguments: str) -> int:
    """Run a command in this process and undo what it sets for the rest of the process."""
    handlers = signal_handlers()
    threads = torch.get_num_threads()
    try:
        return main(list(arguments))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
        gc.collect()  # lets go of the run's lock


@contextmanager
def working_in(folder: Path):
    """Change the working directory for a while."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def assert_one_line(outcome: Outcome, *expected: str) -> None:
    """A failure ends in one line that starts with `moe-lm: ` and holds the expected words."""
    assert outcome.code != 0
    *before, last = outcome.err.splitlines()
    assert last.startswith("moe-lm: "), outcome.err
    assert all(PROGRESS.match(line) for line in before), outcome.err
    assert "Traceback" not in outcome.err
    for words in expected:
        assert words in last, last
