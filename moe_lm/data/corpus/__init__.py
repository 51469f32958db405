"""What a corpus is: three splits of sentences, in parts that are streamed as text.

Each implementation is a module of this package, chosen by the YAML of the same name.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

SPLITS = ("train", "valid", "test")


class Part(Protocol):
    """Some consecutive sentences of a split, which one process can read by itself; picklable."""

    name: str
    """Unique name of the part; if the text changes, the name or `Corpus.inputs` must change too."""
    size: int
    """Amount of work: the bytes of text, at least approximately."""

    def sentences(self) -> Iterator[str]:
        """Stream the sentences, each a line of words separated by white space; empty lines do not count as sentences.

        Raises `UserError` for text that cannot be read, with the file and the line.
        """
        ...


class Corpus(Protocol):
    """Sentences of the splits `train`, `valid` and `test`."""

    max_words: int
    """Training sentences of more words are left out and counted; held-out sentences are always kept."""

    def parts(self, split: str) -> Sequence[Part]:
        """Return the split's parts in order; how a split is cut depends on its text alone."""
        ...

    def inputs(self) -> dict:
        """Return a JSON-able record that changes whenever the text of the corpus may have changed.

        Raises `UserError` where a named file does not exist or a glob matches nothing.
        """
        ...

    def notes(self) -> list[str]:
        """Return lines for the user about the splits, logged before they are prepared."""
        return []

    def reference_counts(self, min_count: int | None) -> dict[str, int]:  # noqa: ARG002
        """Return published counts that preparation must reproduce, by `<split>.<statistic>` or `vocabulary`.

        `min_count` is None unless the vocabulary holds every training word that occurs at least that often.
        """
        return {}


@dataclass(frozen=True)
class InMemory:
    """A part whose sentences are in memory."""

    name: str
    lines: Sequence[str] = field(repr=False)

    @property
    def size(self) -> int:
        """Number of characters."""
        return sum(map(len, self.lines))

    def sentences(self) -> Iterator[str]:
        """Yield the sentences in order."""
        yield from self.lines
