"""What a vocabulary is: a numbering of tokens, ordered by frequency as log-uniform sampling needs.

Implementations stand beside this file, one each, and are chosen by the YAML of the same name.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

START, END, UNKNOWN = "<S>", "</S>", "<UNK>"


class Vocabulary(Protocol):
    """A finished numbering of tokens; ids run from 0 to `size` - 1, more frequent tokens first."""

    size: int
    start: int
    """Id of `<S>`, the first input of every sentence; never predicted, yet counted in `size`."""
    end: int
    """Id of `</S>`, predicted at the end of every sentence and counted as a word."""
    unknown: int

    def encode(self, sentence: str) -> list[int]:
        """Return the ids of the sentence's tokens, without `<S>` and `</S>`."""
        ...

    def encode_words(self, words: list[str]) -> list[int]:
        """Return the ids of a sentence that is split into words already."""
        ...

    def tokens_per_word(self, ids: list[int]) -> list[int]:
        """Return how many of a sentence's ids, in order, spell each of its words."""
        ...

    def token(self, index: int) -> str:
        """Return the token of this id as text."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the sentence that these ids spell, markers left out."""
        ...

    def save(self, folder: Path) -> None:
        """Write the vocabulary's files into an existing folder."""
        ...


class TrainingText(Protocol):
    """The training split as a recipe sees it; every call is a pass of its own over the text."""

    def sentences(self) -> Iterator[str]:
        """Stream the sentences in order."""
        ...

    def count_words(self) -> tuple[Counter[str], int]:
        """Return how often each word occurs, and the number of sentences that have one; on many processes."""
        ...

    def say(self, line: str) -> None:
        """Tell the user something about the vocabulary."""
        ...


class VocabularyRecipe(Protocol):
    """How a vocabulary comes about: what a YAML under `configs/vocabulary` builds; picklable."""

    min_count: int | None
    """Given where the vocabulary is every word of training seen that often, else None."""

    def inputs(self) -> dict:
        """Return a JSON-able record that changes whenever the vocabulary may have changed."""
        ...

    def build(self, text: TrainingText) -> Vocabulary:
        """Make the vocabulary from the training split."""
        ...

    def load(self, folder: Path) -> Vocabulary:
        """Read what `Vocabulary.save` wrote; raises `UserError` where a file is missing or damaged."""
        ...
