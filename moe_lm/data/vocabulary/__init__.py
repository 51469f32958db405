"""What a vocabulary is: ids of tokens in order of frequency, which log-uniform sampling needs.

Each implementation is a module of this package, chosen by the YAML of the same name.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

START, END, UNKNOWN = "<S>", "</S>", "<UNK>"


class Vocabulary(Protocol):
    """Ids of tokens, from 0 to `size` - 1, the most frequent first."""

    size: int
    start: int
    """Id of `<S>`, the first input of every sentence; it is never predicted, but counts in `size`."""
    end: int
    """Id of `</S>`, which is predicted at the end of every sentence and counts as a word."""
    unknown: int
    """Id of `<UNK>`."""

    def encode(self, sentence: str) -> list[int]:
        """Return the ids of the sentence's tokens, without `<S>` and `</S>`."""
        return self.encode_words(sentence.split())

    def encode_words(self, words: list[str]) -> list[int]:
        """Return the ids of a sentence given as its words."""
        ...

    def tokens_per_word(self, ids: list[int]) -> list[int]:
        """Return the number of ids that spell each word of a sentence."""
        ...

    def token(self, index: int) -> str:
        """Return the text of the token with this id."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the sentence that these ids spell, without markers."""
        ...

    def save(self, folder: Path) -> None:
        """Write the vocabulary's files into an existing folder."""
        ...


class TrainingText(Protocol):
    """The training split as a recipe sees it; each method reads the text once."""

    def sentences(self) -> Iterator[str]:
        """Stream the sentences in order."""
        ...

    def count_words(self) -> tuple[Counter[str], int]:
        """Return the count of each word, and the number of sentences that are not empty."""
        ...

    def log(self, line: str) -> None:
        """Log a line about the vocabulary for the user."""
        ...


class VocabularyRecipe(Protocol):
    """How a vocabulary is built and loaded, as described by a YAML file of `configs/vocabulary`; picklable."""

    min_count: int | None
    """Minimum count if the vocabulary holds every training word that occurs at least that often, else None."""

    def inputs(self) -> dict:
        """Return a JSON-able record that changes whenever the vocabulary may have changed."""
        ...

    def build(self, text: TrainingText) -> Vocabulary:
        """Build the vocabulary from the training split."""
        ...

    def load(self, folder: Path) -> Vocabulary:
        """Read the files that `Vocabulary.save` wrote; raises `UserError` where one is missing or damaged."""
        ...
