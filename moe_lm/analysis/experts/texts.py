"""Token ids as text for readers: words, and contexts with the word at which a gate decided."""

import numpy as np

from moe_lm.analysis.experts import Context
from moe_lm.data.prepared import Split
from moe_lm.data.vocabulary import START, Vocabulary

BEFORE, AFTER = 14, 6
"""Words of a context that are shown before and after the one at which the gate decided."""
READ, FOLLOWING = 96, 48
"""Tokens that are looked at for them: a word may be made of several."""
LETTERS = 160
"""The most letters on each side, whatever the words are."""


class Texts:
    """Reads the tokens of a split."""

    def __init__(self, vocabulary: Vocabulary, split: Split):
        self._vocabulary, self._split = vocabulary, split

    def word(self, index: int) -> str:
        """Return a token as text; "·" stands before a piece that continues a word."""
        text = self._vocabulary.decode([index])
        if not text or "\ufffd" in text:  # a marker, a space alone, a part of a letter
            return self._vocabulary.token(index)
        # Set behind itself, only what begins a word makes two words.
        begins = len(self._vocabulary.tokens_per_word([index, index])) == 2
        return clipped_end(text) if begins else f"·{clipped_end(text)}"

    def context(self, gate: float, offset: int) -> Context:
        """Return the context of the token that predicts the one at this place of the split's tokens."""
        starts, tokens = self._split.starts, self._split.tokens
        sentence = int(np.searchsorted(starts, offset, side="right")) - 1
        first, last = int(starts[sentence]), int(starts[sentence + 1])
        read = tokens[max(first, offset - READ) : offset].tolist()
        following = tokens[offset : min(last, offset + FOLLOWING)].tolist()
        before, word, after = self._parts(read, following)
        if offset - READ > first:
            before = f"… {before}"
        return Context(gate, sentence, offset - first, clipped_begin(before), word, clipped_end(after, AFTER + 1))

    def _parts(self, read: list[int], following: list[int]) -> tuple[str, str, str]:
        """Return what stands before the last token that was read, that token, and what follows."""
        decode = self._vocabulary.decode
        if not read:
            return "", START, f" {decode(following)}"
        before, upto, whole = decode(read[:-1]), decode(read), decode(read + following)
        word = upto[len(before) :].lstrip()
        if upto.startswith(before) and whole.startswith(upto) and word and "\ufffd" not in upto:
            return upto[: len(upto) - len(word)], word, whole[len(upto) :]
        return f"{before} ", self.word(read[-1]), f" {decode(following)}"


def clipped_begin(text: str) -> str:
    """Return the last words of a text."""
    parts = text.split(" ")
    most = BEFORE + text.endswith(" ")
    kept = text if len(parts) <= most else f"… {' '.join(parts[-most:])}"
    return kept if len(kept) <= LETTERS else f"… {kept[-LETTERS:]}"


def clipped_end(text: str, most: int = 1) -> str:
    """Return the first words of a text."""
    parts = text.split(" ")
    kept = text if len(parts) <= most else f"{' '.join(parts[:most])} …"
    return kept if len(kept) <= LETTERS else f"{kept[:LETTERS]} …"
