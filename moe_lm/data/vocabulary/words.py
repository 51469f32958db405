"""A vocabulary of whole words, read from a file or counted from the training split."""

import codecs
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from moe_lm.data.vocabulary import END, START, UNKNOWN, TrainingText, Vocabulary
from moe_lm.errors import UserError

_MARKERS = (START, END, UNKNOWN)
_FILE = "vocabulary.txt"
_SENTINEL = "!!!MAXTERMID"
"""A line of vocab-2016-09-10.txt, the vocabulary published with the benchmark's models, that is not a word."""


class _Ids(dict[str, int]):
    """Ids by word, with the id of `<UNK>` for any other word; a lookup takes a fifth less time than `get`."""

    def __missing__(self, word: str) -> int:
        return self[UNKNOWN]


class WordVocabulary(Vocabulary):
    """Words in the order of their ids; any other word, or a word spelled like a marker, is unknown."""

    def __init__(self, *, words: list[str], counts: list[int] | None) -> None:
        """`words` includes the markers, in the order of ids; `counts` is only saved."""
        self._words, self._counts = words, counts
        ids = {word: index for index, word in enumerate(words)}
        self.size = len(words)
        self.start, self.end, self.unknown = ids.pop(START), ids.pop(END), ids[UNKNOWN]
        self._ids = _Ids(ids)

    def encode_words(self, words: list[str]) -> list[int]:
        """Return one id per word."""
        return list(map(self._ids.__getitem__, words))

    def tokens_per_word(self, ids: list[int]) -> list[int]:
        """Return a 1 for each id: every word is one token."""
        return [1] * len(ids)

    def token(self, index: int) -> str:
        """Return the word of this id."""
        return self._words[index]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the words joined by spaces; `<S>` and `</S>` are left out, an unknown word becomes `<UNK>`."""
        return " ".join(self._words[index] for index in ids if index not in (self.start, self.end))

    def save(self, folder: Path) -> None:
        """Write `vocabulary.txt`: one word per line, with a tab and its count where the words were counted."""
        lines = self._words
        if self._counts is not None:
            lines = [f"{word}\t{count}" for word, count in zip(self._words, self._counts, strict=True)]
        (folder / _FILE).write_bytes("".join(f"{line}\n" for line in lines).encode())


class Words:
    """The recipe of a word vocabulary: the words of `file`, or the training words with at least `min_count`."""

    def __init__(self, *, file: str | None, min_count: int, max_size: int | None) -> None:
        """`max_size` includes the markers and applies to counted words only; a file is used as a whole."""
        if min_count < 1:
            raise ValueError(f"vocabulary.min_count={min_count} is impossible; give 1 to keep every word, or more")
        if max_size is not None and max_size < 4:
            raise ValueError(f"vocabulary.max_size={max_size} leaves no word beside the three markers; give 4 or more")
        if file is not None and max_size is not None:
            raise ValueError("vocabulary.max_size does not apply to vocabulary.file; drop one, or shorten the file")
        self._file = None if file is None else Path(file).expanduser().resolve()
        self._min_count, self._max_size = min_count, max_size
        self.min_count = min_count if file is None and max_size is None else None

    def inputs(self) -> dict:
        """Return the vocabulary file's path, bytes and modification time in nanoseconds, if there is one."""
        if self._file is None:
            return {"file": None}
        try:
            stat = self._file.stat()
        except OSError as error:
            raise _unreadable(self._file, error) from error
        return {"file": [str(self._file), stat.st_size, stat.st_mtime_ns]}

    def build(self, text: TrainingText) -> WordVocabulary:
        """Read the file, or count the words and sort them by decreasing count, ties by word."""
        if self._file is None:
            return self._from_counts(*text.count_words())
        words, _ = _read(self._file)
        missing = [marker for marker in _MARKERS if marker not in words]
        text.log(
            f"vocabulary: {self._file.name} holds {len(words):,} tokens"
            + (f", {', '.join(missing)} added" if missing else ", the markers among them")
            + "; vocabulary.min_count does not apply to a file"
        )
        # Markers that the file lacks are added: </S> and <UNK> first, as they are frequent; <S> last, as it is never
        # predicted.
        words = [marker for marker in (END, UNKNOWN) if marker in missing] + words
        return WordVocabulary(words=[*words, START] if START in missing else words, counts=None)

    def load(self, folder: Path) -> WordVocabulary:
        """Read `vocabulary.txt`; raises `UserError` where it is missing or damaged."""
        words, counts = _read(folder / _FILE)
        missing = [marker for marker in _MARKERS if marker not in words]
        if missing:
            raise UserError(f"{folder / _FILE} is damaged: it lacks {', '.join(missing)}; prepare the corpus again")
        return WordVocabulary(words=words, counts=counts if len(counts) == len(words) else None)

    def _from_counts(self, counts: Counter[str], num_sentences: int) -> WordVocabulary:
        """Keep the frequent words; `</S>` counts once per sentence, and `<UNK>` for all other words."""
        total = counts.total()
        for marker in _MARKERS:  # a marker that occurs in the text is an unknown word
            counts.pop(marker, None)
        kept = sorted(
            (item for item in counts.items() if item[1] >= self._min_count),
            key=lambda item: (-item[1], item[0]),
        )
        if self._max_size is not None:
            del kept[self._max_size - len(_MARKERS) :]
        if not kept:
            raise UserError(
                f"no word is left: none of the {len(counts):,} training words occurs vocabulary.min_count="
                f"{self._min_count} times; lower it"
            )
        kept += [(END, num_sentences), (UNKNOWN, total - sum(count for _, count in kept))]
        kept.sort(key=lambda item: (-item[1], item[0]))
        kept.append((START, 0))
        return WordVocabulary(words=[word for word, _ in kept], counts=[count for _, count in kept])


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"vocabulary file {path} cannot be read: {error.strerror}; check vocabulary.file")


def _read(path: Path) -> tuple[list[str], list[int]]:
    """Return a file's words and their counts, if it has any; only "\\n" ends a line, empty lines are skipped."""
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise _unreadable(path, error) from error
    line_of: dict[str, int] = {}
    counts = []
    for number, line in enumerate(lines, start=1):
        try:
            # Here, unlike in text, only spaces and tabs separate fields: a word that contains other white space is kept
            # but never occurs. No published vocabulary has such a word.
            fields = re.split("[ \t]+", line.decode().strip(" \t\r"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file") from error
        if fields[0] in ("", _SENTINEL):
            continue
        if len(fields) > 2 or (len(fields) == 2 and not fields[1].isdecimal()):
            raise UserError(f"{path}, line {number}: expected a word, and perhaps its count, not {len(fields)} fields")
        if fields[0] in line_of:
            raise UserError(f"{path}, line {number}: {fields[0]} is already on line {line_of[fields[0]]}; keep one")
        line_of[fields[0]] = number
        counts += [int(count) for count in fields[1:]]
    if not set(line_of) - set(_MARKERS):
        raise UserError(f"vocabulary file {path} holds no word; give one word per line, the most frequent first")
    return list(line_of), counts
