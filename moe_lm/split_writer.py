"""One split's sentences to its arrays on disk, counted on the way.

Shape suffix: V vocabulary.
"""

from array import array
from pathlib import Path

import numpy as np

from moe_lm.vocabulary import Vocabulary

DTYPES = {"tokens": "<i4", "starts": "<i8", "words": "<u4"}
BUFFER = 1 << 20
"""Tokens held in memory before they are written."""


class SplitWriter:
    """Appends one split's sentences to its three files, about a million tokens at a time."""

    def __init__(self, folder: Path, split: str, vocabulary: Vocabulary, digest, max_words: int) -> None:
        self._paths = {part: folder / f"{split}.{part}" for part in DTYPES}
        self._is_train, self._max_words = split == "train", max_words
        self._vocabulary, self._digest = vocabulary, digest
        self._tokens, self._lengths, self._words = array("i"), array("q", [0]), array("I")
        self._num_written = 0
        self._statistics = dict.fromkeys(
            ("sentences", "words", "tokens", "unknown_words", "empty_lines", "longer_than_max_words"), 0
        )
        self.counts = np.zeros(vocabulary.size, np.int64)
        """How often each id occurs."""

    def add(self, line: str) -> None:
        """Encode and keep one sentence; an empty line or, in training, one that is too long is only counted."""
        num_words = len(line.split())
        if num_words == 0:
            self._statistics["empty_lines"] += 1
            return
        if num_words > self._max_words:
            self._statistics["longer_than_max_words"] += 1
            if self._is_train:
                return
        ids = self._vocabulary.encode(line)
        self._tokens.extend(ids)
        self._tokens.append(self._vocabulary.end)
        self._lengths.append(len(ids) + 1)
        self._words.append(num_words + 1)
        if len(self._tokens) >= BUFFER:
            self._flush()

    def _flush(self) -> None:
        tokens = np.array(self._tokens, DTYPES["tokens"])
        starts = np.array(self._num_written + np.cumsum(self._lengths), DTYPES["starts"])
        words = np.array(self._words, DTYPES["words"])
        for part, values in {"tokens": tokens, "starts": starts, "words": words}.items():
            with self._paths[part].open("ab") as file:
                file.write(values.tobytes())
        self._digest.update(tokens.tobytes())
        self.counts += np.bincount(tokens, minlength=len(self.counts))
        self._num_written += len(tokens)
        self._statistics["sentences"] += len(words)
        self._statistics["words"] += int(words.sum(dtype=np.int64))
        self._tokens, self._lengths, self._words = array("i"), array("q"), array("I")

    def finish(self) -> dict:
        """Write what is left and return the split's statistics."""
        self._flush()
        unknown = int(self.counts[self._vocabulary.unknown])
        return self._statistics | {"tokens": self._num_written, "unknown_words": unknown}


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
