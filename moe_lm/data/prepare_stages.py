"""What is done with one part of a corpus: its words are counted, its sentences encoded; each leaves files behind."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

from moe_lm.atomic_io import write_text
from moe_lm.data.corpus import Part
from moe_lm.data.split_writer import PartWriter
from moe_lm.data.vocabulary import Vocabulary, VocabularyRecipe
from moe_lm.data.workers import Watch

_WATCHED = 1 << 16
"""Sentences between two signs of progress."""


def count_part(task: tuple[int, Part], watch: Watch, *, folder: Path, max_words: int) -> None:
    """Count a part's words into a file."""
    index, part = task
    num_sentences = 0

    def split() -> Iterator[list[str]]:
        nonlocal num_sentences
        for line in _watched(kept(part, max_words), watch):
            words = line.split()
            num_sentences += bool(words)
            yield words

    counts = Counter(chain.from_iterable(split()))  # counted in C
    found = {"sentences": num_sentences, "words": list(counts), "counts": list(counts.values())}
    write_text(folder / f"{index:05}.json", json.dumps(found))


@dataclass
class Encoder:
    """Writes a part's arrays, then its statistics, which say that the arrays are there."""

    recipe: VocabularyRecipe
    folder: Path
    max_words: int
    durable: bool

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return self.recipe.load(self.folder / "vocabulary")

    def __call__(self, task: tuple[str, int, Part], watch: Watch) -> None:
        split, index, part = task
        stem = stem_of(self.folder, split, index)
        writer = PartWriter(stem, self.vocabulary, max_words=self.max_words, keep_longer=split != "train")
        for line in _watched(part.sentences(), watch):
            writer.add(line)
        write_text(record_of(stem), json.dumps(writer.finish(durable=self.durable)))


def stem_of(folder: Path, split: str, index: int) -> Path:
    return folder / "parts" / f"{split}-{index:05}"


def record_of(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.json")


def _watched(lines: Iterator[str], watch: Watch) -> Iterator[str]:
    """Pass lines on and tell how many."""
    number = 0
    for number, line in enumerate(lines, start=1):
        yield line
        if number % _WATCHED == 0:
            watch(_WATCHED)
    watch(number % _WATCHED)


def kept(part: Part, max_words: int | None) -> Iterator[str]:
    """Stream a part's sentences of at most `max_words` words."""
    for line in part.sentences():
        # n words are at least 2n - 1 characters, so most lines need no splitting.
        if max_words is None or len(line) < 2 * max_words or len(line.split()) <= max_words:
            yield line


def read_json(path: Path) -> dict | None:
    """Return what a file holds, or None where there is no whole one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
