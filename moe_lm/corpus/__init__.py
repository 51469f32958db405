"""What a corpus is: three splits of sentences, each streamed as text.

Implementations stand beside this file, one each, and are chosen by the YAML of the same name.
"""

from collections.abc import Iterator
from typing import Protocol

SPLITS = ("train", "valid", "test")


class Corpus(Protocol):
    """Sentences of the splits `train`, `valid` and `test`."""

    max_words: int
    """Training sentences of more words are left out and counted; held-out ones are always kept."""

    def sentences(self, split: str) -> Iterator[str]:
        """Stream the split's sentences, each a line of words separated by white space (an empty line is none).

        Raises `Mistake` for text that cannot be read, with the file and the line.
        """
        ...

    def inputs(self) -> dict:
        """Return a JSON-able record that changes whenever the text behind the corpus may have changed.

        Raises `Mistake` where a named file does not exist or a glob matches nothing.
        """
        ...
