"""A vocabulary of subwords: the pieces of a SentencePiece model, renumbered by frequency."""

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from moe_lm.data.vocabulary import END, START, UNKNOWN, TrainingText, Vocabulary
from moe_lm.errors import UserError

_MODEL, _ORDER = "subwords.model", "subwords.order.json"
_SPECIAL = 3 + 256  # markers and bytes
# SentencePiece writes a space as "▁"; a "▁" of the text is escaped with a private-use character.
_ESCAPES = {"\ue000": "\ue000a", "▁": "\ue000b"}
_UNESCAPES = {escaped: plain for plain, escaped in _ESCAPES.items()}
_ESCAPE, _UNESCAPE = re.compile("[\ue000▁]"), re.compile("\ue000[ab]")


class SubwordVocabulary(Vocabulary):
    """Pieces numbered by decreasing frequency; rare characters are spelled byte by byte, so every text has ids."""

    def __init__(self, *, model: bytes, order: list[int]) -> None:
        """`model` is a serialized SentencePiece model; `order` gives, for each id, its piece's number in that model."""
        from sentencepiece import SentencePieceProcessor

        self._model, self._order = model, order
        self._pieces = SentencePieceProcessor(model_proto=model)
        self._id_of = [0] * len(order)
        for index, piece in enumerate(order):
            self._id_of[piece] = index
        self.size = len(order)
        self.start = self._id_of[self._pieces.bos_id()]
        self.end = self._id_of[self._pieces.eos_id()]
        self.unknown = self._id_of[self._pieces.unk_id()]

    def encode_words(self, words: list[str]) -> list[int]:
        """Return the ids of the pieces that spell these words."""
        id_of = self._id_of
        return [id_of[piece] for piece in self._pieces.encode(_plain(words))]

    def tokens_per_word(self, ids: list[int]) -> list[int]:
        """Return the number of pieces of each word; the first piece of a word begins with "▁"."""
        counts: list[int] = []
        for index in ids:
            if not counts or self.token(index).startswith("▁"):
                counts.append(0)
            counts[-1] += 1
        return counts

    def token(self, index: int) -> str:
        """Return the piece of this id; "▁" stands for the space before a word."""
        return self._pieces.id_to_piece(self._order[index])

    def decode(self, ids: Iterable[int]) -> str:
        """Return the words that the pieces spell, without `<S>` and `</S>`; an unknown piece becomes `<UNK>`."""
        pieces = [self._order[index] for index in ids if index not in (self.start, self.end)]
        text = " ".join(self._pieces.decode(pieces).split())
        return _UNESCAPE.sub(lambda match: _UNESCAPES[match[0]], text)

    def save(self, folder: Path) -> None:
        """Write `subwords.model` and `subwords.order.json`."""
        (folder / _MODEL).write_bytes(self._model)
        (folder / _ORDER).write_text(json.dumps(self._order), encoding="utf-8")


class Subwords:
    """The recipe of a subword vocabulary: `size` pieces, trained on at most `max_sentences` sentences."""

    min_count = None

    def __init__(self, *, size: int, max_sentences: int) -> None:
        """`size` includes the three markers and the 256 bytes."""
        if size <= _SPECIAL:
            raise ValueError(f"vocabulary.size={size} leaves no piece beside {_SPECIAL} markers and bytes; give more")
        if max_sentences < 1:
            raise ValueError(f"vocabulary.max_sentences={max_sentences} leaves nothing to learn from; give 1 or more")
        self._size, self._max_sentences = size, max_sentences

    def inputs(self) -> dict:
        """Return the version of SentencePiece, on which the pieces may depend."""
        return {"sentencepiece": version("sentencepiece")}

    def build(self, text: TrainingText) -> SubwordVocabulary:
        """Train on evenly spaced sentences; the same text gives the same bytes."""
        num_sentences = sum(1 for _ in text.sentences())
        step = max(1, -(-num_sentences // self._max_sentences))

        def sample() -> Iterator[str]:
            return (_plain(sentence.split()) for sentence in islice(text.sentences(), 0, None, step))

        model = self._train(sample())
        return SubwordVocabulary(model=model, order=_by_frequency(model, sample()))

    def load(self, folder: Path) -> SubwordVocabulary:
        """Read the two files; raises `UserError` where one is missing or damaged."""
        try:
            order = json.loads((folder / _ORDER).read_text(encoding="utf-8"))
            vocabulary = SubwordVocabulary(model=(folder / _MODEL).read_bytes(), order=order)
            # Otherwise a surplus or repeated number would go unnoticed until its id is sampled.
            if sorted(order) != list(range(vocabulary._pieces.get_piece_size())):
                raise ValueError("the order does not match the model's pieces")
        except (OSError, ValueError, TypeError, IndexError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"the subword vocabulary in {folder} is missing or damaged ({reason}); prepare again"
            ) from error
        return vocabulary

    def _train(self, sample: Iterator[str]) -> bytes:
        from sentencepiece import SentencePieceTrainer

        model = io.BytesIO()
        try:
            SentencePieceTrainer.train(
                sentence_iterator=sample,
                model_writer=model,
                model_type="unigram",
                vocab_size=self._size,
                byte_fallback=True,
                normalization_rule_name="identity",
                num_threads=1,  # with more threads, the model would depend on their timing
                input_sentence_size=0,
                max_sentence_length=1 << 16,
                unk_piece=UNKNOWN,
                bos_piece=START,
                eos_piece=END,
                unk_surface=f" {UNKNOWN} ",
                minloglevel=2,
            )
        except RuntimeError as error:
            if user_error := self._size_error(error):
                raise user_error from error
            raise
        return model.getvalue()

    def _size_error(self, error: RuntimeError) -> UserError | None:
        """Return a `UserError` for SentencePiece's errors about the size, None for any other."""
        text = " ".join(str(error).split())
        if high := re.search(r"too high.*?<= (\d+)", text):
            return UserError(f"vocabulary.size={self._size} is too large for this text; give {high[1]} or less")
        if low := re.search(r"smaller than required_chars.*? vs (\d+)", text):
            return UserError(
                f"vocabulary.size={self._size} is less than the characters of this text; give {low[1]} or more"
            )
        return None


def _by_frequency(model: bytes, sample: Iterator[str]) -> list[int]:
    """Return the piece numbers by decreasing count in the sample, ties by number, `<S>` last."""
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_proto=model)
    counts: Counter[int] = Counter()
    num_sentences = 0
    for sentence in sample:
        counts.update(pieces.encode(sentence))
        num_sentences += 1
    counts[pieces.eos_id()] = num_sentences
    counts[pieces.bos_id()] = -1  # never predicted
    return sorted(range(pieces.get_piece_size()), key=lambda piece: (-counts[piece], piece))


def _plain(words: list[str]) -> str:
    """Return the input of SentencePiece: the words with single spaces between them, "▁" escaped."""
    return _ESCAPE.sub(lambda match: _ESCAPES[match[0]], " ".join(words))
