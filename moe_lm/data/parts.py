"""Work on the parts of a corpus, on one process or several: counting, encoding, and joining the encoded parts.

Each part leaves files in the folder of a preparation. A file counts as complete once it has its final name, and the
arrays of a part once its statistics exist, so an interrupted preparation can resume.

Shape suffix: V vocabulary.
"""

import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from moe_lm.atomic_io import write_text
from moe_lm.data.corpus import Part
from moe_lm.data.vocabulary import Vocabulary, VocabularyRecipe
from moe_lm.data.workers import Report, map_unordered

BUFFER = 1 << 20
"""Tokens held in memory before they are written."""
STATISTICS = ("sentences", "words", "tokens", "unknown_words", "empty_lines", "longer_than_max_words")
_DTYPES = {"tokens": "<i4", "lengths": "<i4", "words": "<u4"}
"""Arrays of an encoded part; `lengths` are tokens per sentence."""
_REPORT_EVERY = 1 << 16
"""Sentences between two reports of progress."""


def run_on_parts(
    name: str,
    tasks: Sequence[tuple],
    is_done: Sequence[bool],
    work: Callable[[tuple, Report], None],
    *,
    num_processes: int,
    progress: bool,
) -> Iterator[tuple[int, bool]]:
    """Yield each task's index and whether it was run now: tasks already done come first, then the others as they end.

    The last item of a task is its part; `work` reports numbers of sentences, which a progress bar shows.
    """
    left = [index for index, done in enumerate(is_done) if not done]
    sizes = [task[-1].size for task in tasks]
    sentences = 0

    def report(amount: int) -> None:
        nonlocal sentences
        sentences += amount
        bar.set_postfix_str(f"{sentences:,} sentences")

    with tqdm(desc=name, total=sum(sizes), unit="B", unit_scale=True, disable=not progress) as bar:
        for index, done in enumerate(is_done):
            if done:
                bar.update(sizes[index])
                yield index, False
        for number, _ in map_unordered(work, [tasks[i] for i in left], num_processes=num_processes, report=report):
            bar.update(sizes[left[number]])
            yield left[number], True


def kept_sentences(part: Part, max_words: int | None) -> Iterator[str]:
    """Stream a part's sentences of at most `max_words` words."""
    for line in part.sentences():
        # A line of fewer than 2n characters holds at most n words, so most lines are kept without `split`.
        if max_words is None or len(line) < 2 * max_words or len(line.split()) <= max_words:
            yield line


def count_part(task: tuple[int, Part], report: Report, *, folder: Path, max_words: int) -> None:
    """Write the word counts of a part's sentences to `<folder>/<index>.json`."""
    index, part = task
    num_sentences = 0

    def words_of_sentences() -> Iterator[list[str]]:
        nonlocal num_sentences
        for line in _reported(kept_sentences(part, max_words), report):
            words = line.split()
            num_sentences += bool(words)
            yield words

    counts = Counter(chain.from_iterable(words_of_sentences()))  # counts in C
    record = {"sentences": num_sentences, "words": counts.total()}
    record |= {"spelled": list(counts), "counts": list(counts.values())}
    write_text(folder / f"{index:05}.json", json.dumps(record))


@dataclass
class Encoder:
    """Writes a part's arrays, then its statistics."""

    recipe: VocabularyRecipe
    folder: Path
    max_words: int
    durable: bool
    """Whether to wait until the arrays are on the disk."""

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return self.recipe.load(self.folder / "vocabulary")

    def __call__(self, task: tuple[str, int, Part], report: Report) -> None:
        split, index, part = task
        stem, statistics = part_stem(self.folder, split, index), dict.fromkeys(STATISTICS, 0)
        with ExitStack() as stack:
            files = {kind: stack.enter_context(_array_file(stem, kind).open("wb")) for kind in _DTYPES}
            for arrays in self._encoded(_reported(part.sentences(), report), split, statistics):
                for kind, file in files.items():
                    file.write(arrays[kind])
                statistics["sentences"] += len(arrays["words"])
                statistics["words"] += int(arrays["words"].sum(dtype=np.int64))
                statistics["tokens"] += len(arrays["tokens"])
                statistics["unknown_words"] += int((arrays["tokens"] == self._vocabulary.unknown).sum())
            for file in files.values():
                file.flush()
                if self.durable:
                    os.fsync(file.fileno())
        write_text(_statistics_file(stem), json.dumps(statistics))

    def _encoded(self, lines: Iterator[str], split: str, statistics: dict[str, int]) -> Iterator[dict[str, np.ndarray]]:
        """Yield arrays of about `BUFFER` tokens; count empty and long lines, and leave long ones out of training."""
        vocabulary, max_words = self._vocabulary, self.max_words
        held = {"tokens": array("i"), "lengths": array("i"), "words": array("I")}
        tokens, lengths, num_words = held.values()
        for line in lines:
            words = line.split()
            if not words:
                statistics["empty_lines"] += 1
                continue
            if len(words) > max_words:
                statistics["longer_than_max_words"] += 1
                if split == "train":
                    continue
            ids = vocabulary.encode_words(words)
            tokens.extend(ids)
            tokens.append(vocabulary.end)
            lengths.append(len(ids) + 1)
            num_words.append(len(words) + 1)
            if len(tokens) >= BUFFER:
                yield {kind: np.array(values, _DTYPES[kind]) for kind, values in held.items()}
                for values in held.values():
                    del values[:]
        yield {kind: np.array(values, _DTYPES[kind]) for kind, values in held.items()}


def part_stem(folder: Path, split: str, index: int) -> Path:
    """Return the path of a part's files without their suffixes."""
    return folder / "parts" / f"{split}-{index:05}"


def part_statistics(stem: Path) -> dict[str, int] | None:
    """Return the statistics of an encoded part, or None unless all of its files are complete."""
    statistics = read_json(_statistics_file(stem))
    if statistics is None:
        return None
    counts = {"tokens": statistics["tokens"], "lengths": statistics["sentences"], "words": statistics["sentences"]}
    files = {kind: _array_file(stem, kind) for kind in counts}
    is_complete = all(path.exists() and path.stat().st_size == 4 * counts[kind] for kind, path in files.items())
    return statistics if is_complete else None


def join_parts(stems: list[Path], folder: Path, split: str, size: int, digest) -> np.ndarray:
    """Join the arrays of a split's parts and write them; return how often each of `size` ids occurs (V).

    `digest` is updated with the tokens. Only a few buffers are in memory at a time.
    """
    counts_V, num_tokens = np.zeros(size, np.int64), 0
    with ExitStack() as stack:
        files = {
            kind: stack.enter_context((folder / f"{split}.{kind}").open("wb")) for kind in ("tokens", "starts", "words")
        }
        files["starts"].write(np.zeros(1, "<i8"))
        for stem in stems:
            for tokens in _chunks(stem, "tokens"):
                files["tokens"].write(tokens)
                digest.update(tokens)
                counts_V += np.bincount(tokens, minlength=size)
            for lengths in _chunks(stem, "lengths"):
                starts = num_tokens + np.cumsum(lengths, dtype=np.int64)
                files["starts"].write(starts.astype("<i8"))
                num_tokens = int(starts[-1])
            for words in _chunks(stem, "words"):
                files["words"].write(words)
    return counts_V


def read_json(path: Path) -> dict | None:
    """Return a file's content, or None where there is no complete file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _statistics_file(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.json")


def _array_file(stem: Path, kind: str) -> Path:
    return stem.with_name(f"{stem.name}.{kind}")


def _chunks(stem: Path, kind: str) -> Iterator[np.ndarray]:
    with _array_file(stem, kind).open("rb") as file:
        while len(values := np.fromfile(file, _DTYPES[kind], BUFFER)):
            yield values


def _reported(lines: Iterator[str], report: Report) -> Iterator[str]:
    """Yield the lines and report their number now and then."""
    number = 0
    for number, line in enumerate(lines, start=1):
        yield line
        if number % _REPORT_EVERY == 0:
            report(_REPORT_EVERY)
    report(number % _REPORT_EVERY)
