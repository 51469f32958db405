"""One part's sentences to its arrays on disk, counted on the way, and the parts of a split to one.

Shape suffix: V vocabulary.
"""

import os
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moe_lm.data.vocabulary import Vocabulary

DTYPES = {"tokens": "<i4", "starts": "<i8", "words": "<u4"}
_PART_DTYPES = {"tokens": "<i4", "lengths": "<i4", "words": "<u4"}
BUFFER = 1 << 20
"""Tokens held in memory before they are written."""
STATISTICS = ("sentences", "words", "tokens", "unknown_words", "empty_lines", "longer_than_max_words")


class PartWriter:
    """Appends one part's sentences to `<stem>.tokens`, `.lengths` (tokens a sentence) and `.words`."""

    def __init__(self, stem: Path, vocabulary: Vocabulary, *, max_words: int, keep_longer: bool) -> None:
        """Sentences of more than `max_words` are counted, and left out unless `keep_longer`."""
        self._files = {kind: _part_file(stem, kind).open("wb") for kind in _PART_DTYPES}
        self._vocabulary, self._max_words, self._keep_longer = vocabulary, max_words, keep_longer
        self._tokens, self._lengths, self._words = array("i"), array("i"), array("I")
        self._statistics = dict.fromkeys(STATISTICS, 0)

    def add(self, line: str) -> None:
        """Encode and keep one sentence; an empty line, or one that is too long, is only counted."""
        words = line.split()
        num_words = len(words)
        if num_words == 0:
            self._statistics["empty_lines"] += 1
            return
        if num_words > self._max_words:
            self._statistics["longer_than_max_words"] += 1
            if not self._keep_longer:
                return
        ids = self._vocabulary.encode_words(words)
        self._tokens.extend(ids)
        self._tokens.append(self._vocabulary.end)
        self._lengths.append(len(ids) + 1)
        self._words.append(num_words + 1)
        if len(self._tokens) >= BUFFER:
            self._flush()

    def _flush(self) -> None:
        held = {"tokens": self._tokens, "lengths": self._lengths, "words": self._words}
        values = {kind: np.array(numbers, _PART_DTYPES[kind]) for kind, numbers in held.items()}
        for kind, file in self._files.items():
            file.write(values[kind])
        sums = {
            "sentences": len(values["words"]),
            "words": int(values["words"].sum(dtype=np.int64)),
            "tokens": len(values["tokens"]),
            "unknown_words": int((values["tokens"] == self._vocabulary.unknown).sum()),
        }
        for name, number in sums.items():
            self._statistics[name] += number
        self._tokens, self._lengths, self._words = array("i"), array("i"), array("I")

    def finish(self, *, durable: bool) -> dict[str, int]:
        """Write what is left, and wait for the disk if `durable`; return the part's statistics."""
        self._flush()
        for file in self._files.values():
            file.flush()
            if durable:
                os.fsync(file.fileno())
            file.close()
        return self._statistics


def part_is_there(stem: Path, statistics: dict[str, int]) -> bool:
    """Return whether the files of a part have the sizes that its statistics tell."""
    entries = {"tokens": statistics["tokens"], "lengths": statistics["sentences"], "words": statistics["sentences"]}
    return all(
        (path := _part_file(stem, kind)).exists() and path.stat().st_size == 4 * count
        for kind, count in entries.items()
    )


def _part_file(stem: Path, kind: str) -> Path:
    return stem.with_name(f"{stem.name}.{kind}")


def join_parts(stems: list[Path], folder: Path, split: str, size: int, digest) -> np.ndarray:
    """Write the parts, one after another, as the arrays of a split; return how often each of `size` ids occurs.

    The tokens go into `digest` too. Memory is that of a few buffers.
    """
    counts_V = np.zeros(size, np.int64)
    files = {kind: (folder / f"{split}.{kind}").open("wb") for kind in DTYPES}
    num_tokens = 0
    files["starts"].write(np.zeros(1, DTYPES["starts"]).tobytes())
    for stem in stems:
        for tokens in _chunks(_part_file(stem, "tokens"), _PART_DTYPES["tokens"]):
            files["tokens"].write(tokens)
            digest.update(tokens)
            counts_V += np.bincount(tokens, minlength=size)
        for lengths in _chunks(_part_file(stem, "lengths"), _PART_DTYPES["lengths"]):
            starts = num_tokens + np.cumsum(lengths, dtype=np.int64)
            files["starts"].write(starts.astype(DTYPES["starts"]))
            num_tokens = int(starts[-1])
        for words in _chunks(_part_file(stem, "words"), _PART_DTYPES["words"]):
            files["words"].write(words)
    for file in files.values():
        file.close()
    return counts_V


def _chunks(path: Path, dtype: str) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while len(values := np.fromfile(file, dtype, BUFFER)):
            yield values


def unigram_perplexity(train_V: np.ndarray, held_out_V: np.ndarray, num_words: int) -> float:
    """Return the perplexity per word of the held-out counts under add-one smoothed training frequencies."""
    log_probability_V = np.log(train_V + 1) - np.log(train_V.sum() + len(train_V))
    return float(np.exp(-(held_out_V @ log_probability_V) / num_words))


def statistics_line(split: str, statistics: dict, max_words: int) -> str:
    """Return a split's statistics as a line for people."""
    predicted, sentences = statistics["words"], statistics["sentences"]
    line = f"{split}: {sentences:,} sentences, {predicted:,} words with </S>, {statistics['tokens']:,} tokens"
    line += f", {100 * statistics['unknown_words'] / (predicted - sentences):.2f} % unknown"
    if longer := statistics["longer_than_max_words"]:
        line += f"; {longer:,} of more than {max_words} words {'left out' if split == 'train' else 'kept'}"
    if empty := statistics["empty_lines"]:
        line += f"; {empty:,} empty lines skipped"
    if "unigram_perplexity" in statistics:
        line += f"; unigram perplexity {statistics['unigram_perplexity']:,.1f}"
    return line
