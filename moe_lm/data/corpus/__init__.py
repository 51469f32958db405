"""What a corpus is: three splits of sentences, each in parts that are streamed as text.

Implementations stand beside this file, one each, and are chosen by the YAML of the same name.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

SPLITS = ("train", "valid", "test")


class Part(Protocol):
    """A stretch of a split's sentences that one process can read by itself; picklable."""

    name: str
    """Tells the part from any other, and changes where its text may have changed beside `Corpus.inputs`."""
    size: int
    """How much work it is, in bytes of text or near it."""

    def sentences(self) -> Iterator[str]:
        """Stream the sentences, each a line of words separated by white space (an empty line is none).

        Raises `UserError` for text that cannot be read, with the file and the line.
        """
        ...


class Corpus(Protocol):
    """Sentences of the splits `train`, `valid` and `test`."""

    max_words: int
    """Training sentences of more words are left out and counted; held-out ones are always kept."""

    def parts(self, split: str) -> Sequence[Part]:
        """Return the split's parts in order; how a split is cut depends on its text alone."""
        ...

    def inputs(self) -> dict:
        """Return a JSON-able record that changes whenever the text behind the corpus may have changed.

        Raises `UserError` where a named file does not exist or a glob matches nothing.
        """
        ...

    def notes(self) -> list[str]:
        """Return lines for people about what these splits are, said before they are prepared."""
        ...

    def figures(self, min_count: int | None) -> dict[str, int]:
        """Return what is published of this corpus and must come out again: `<split>.<statistic>`, `vocabulary`.

        `min_count` is given where the vocabulary is every word of training seen that often, else None.
        """
        ...


@dataclass(frozen=True)
class InMemory:
    """A part of sentences that are in memory already."""

    name: str
    lines: Sequence[str] = field(repr=False)

    @property
    def size(self) -> int:
        """Return the number of letters."""
        return sum(map(len, self.lines))

    def sentences(self) -> Iterator[str]:
        """Yield them in order."""
        yield from self.lines
