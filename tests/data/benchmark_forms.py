"""The benchmark's archive in small: its shards, and what reads and prepares them."""

import random

from moe_lm.data.corpus.lm1b import Lm1b
from moe_lm.data.prepare import prepare
from moe_lm.data.vocabulary.words import Words

TRAINING = "training-monolingual.tokenized.shuffled"
HELD_OUT = "heldout-monolingual.tokenized.shuffled"


def lines_of(seed, count):
    draw = random.Random(seed)
    words = [f"w{i}" for i in range(40)] + ["naïve", "“", "\u2028x", "$", "<UNK>"]
    return [" ".join(draw.choices(words, k=draw.randint(1, 30))) for _ in range(count)]


SHARDS = {
    **{f"{TRAINING}/news.en-{number:05}-of-00100": lines_of(number, 60) for number in (1, 2, 10, 99)},
    f"{TRAINING}/news.en-00000-of-00100": ["what the held-out shards were cut from is no training text"],
    f"{HELD_OUT}/news.en.heldout-00000-of-00050": lines_of(1000, 25),
    f"{HELD_OUT}/news.en.heldout-00007-of-00050": lines_of(1007, 12),
    f"{HELD_OUT}/news.en.heldout-00010-of-00050": lines_of(1010, 13),
    f"{HELD_OUT}/README": ["no shard"],
}
NAMES = list(SHARDS)
TEST_WORDS = sum(len(line.split()) + 1 for line in SHARDS[NAMES[5]])
TRAIN = [line for name in NAMES[:4] for line in SHARDS[name]]


def lm1b(folder=None, path=None, revision=None, subset=None, streaming=True, max_words=1000):
    return Lm1b(
        folder=folder and str(folder),
        path=path and str(path),
        revision=revision,
        subset=subset,
        streaming=streaming,
        max_words=max_words,
    )


def make(corpus, folder, log=lambda line: None):
    recipe = Words(file=None, min_count=3, max_size=None)
    return prepare(corpus=corpus, recipe=recipe, folder=folder, settings={}, log=log, progress=False)


def arrays(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "data.json"}
