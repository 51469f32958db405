"""Prepared text: a vocabulary and the token ids of three splits, as flat arrays in one folder.

The folder holds `data.json`, the vocabulary's files, and per split of N sentences `<split>.tokens` (int32, the ids
of sentence 0 followed by `</S>`, then sentence 1, ...; no `<S>`), `<split>.starts` (int64, N + 1) and
`<split>.words` (uint32, N), all little-endian. `moe_lm.data.prepare` writes it, whole or not at all.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moe_lm.data.corpus import SPLITS
from moe_lm.data.vocabulary import Vocabulary, VocabularyRecipe
from moe_lm.errors import UserError

FORMAT = 1
DTYPES = {"tokens": "<i4", "starts": "<i8", "words": "<u4"}
_NUM_MARKERS = 3


@dataclass(frozen=True)
class Split:
    """One split of N sentences, memory-mapped."""

    tokens: np.ndarray
    """Ids of each sentence followed by `</S>` (int32)."""
    starts: np.ndarray
    """Index in `tokens` at which each sentence begins, then the number of tokens (int64, N + 1)."""
    words: np.ndarray
    """Words of each sentence, `</S>` included; perplexity divides by their sum (uint32, N)."""

    @property
    def num_sentences(self) -> int:
        """Number of sentences."""
        return len(self.words)

    @property
    def num_words(self) -> int:
        """Number of words, one `</S>` per sentence included."""
        return int(self.words.sum(dtype=np.int64))


@dataclass(frozen=True)
class Prepared:
    """The data of training and evaluation."""

    vocabulary: Vocabulary
    splits: dict[str, Split]
    fingerprint: str
    """blake2b of the vocabulary's files and every token."""
    statistics: dict
    """Per split `sentences words tokens unknown_words empty_lines longer_than_max_words`, and for the held-out splits
    `unigram_perplexity` per word. Sentences longer than `max_words` are left out of the training split only."""
    reference_counts: dict = field(default_factory=dict)
    """Published counts (`expected`) and counts of this text (`found`), by `<split>.<statistic>` or `vocabulary`."""


def open_prepared(folder: Path, recipe: VocabularyRecipe) -> Prepared:
    """Map a prepared folder into memory; raises `UserError` where it is missing, damaged or of another format."""
    record = read_record(folder)
    splits = {}
    for split in SPLITS:
        paths = {kind: folder / f"{split}.{kind}" for kind in DTYPES}
        splits[split] = Split(**{kind: np.memmap(path, DTYPES[kind], "r") for kind, path in paths.items()})
    return Prepared(recipe.load(folder), splits, record["fingerprint"], record["statistics"], record.get("figures", {}))


def read_record(folder: Path) -> dict:
    """Return the content of `data.json`; raises `UserError` unless every file has the size recorded there."""
    try:
        record = json.loads((folder / "data.json").read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise UserError(f"{folder} has format {record['format']}, this version reads {FORMAT}; prepare again")
        wrong = [name for name, size in record["files"].items() if (folder / name).stat().st_size != size]
    except FileNotFoundError as error:
        raise UserError(f"{folder} is not prepared ({Path(error.filename).name} is missing); prepare it") from error
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}/data.json cannot be read ({error}); prepare it again") from error
    if wrong:
        raise UserError(f"{folder / wrong[0]} is damaged: its size differs from data.json; prepare it again")
    return record


def statistics_line(split: str, statistics: dict, max_words: int) -> str:
    """Return one line for the user about a split's statistics."""
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


def reference_lines(counts: dict[str, dict[str, int]]) -> list[str]:
    """Return lines for the user about `Prepared.reference_counts`: one if all agree, else a longer warning."""
    if not counts:
        return []
    wrong = {name: count for name, count in counts.items() if count["expected"] != count["found"]}
    if not wrong:
        splits = {name.partition(".")[0] for name in counts}
        compared = "the test split, all that was compared, " if splits == {"test"} else ""
        found = ", ".join(f"{_spelled_out(name)} {count['found']:,}" for name, count in counts.items())
        return [f"{compared}agrees with the published figures: {found}"]
    lines = ["*" * 72, "WARNING: counts differ from the published figures"]
    for name, count in wrong.items():
        found, expected = count["found"], count["expected"]
        lines.append(f"  {_spelled_out(name)}: {found:,}, published {expected:,} ({found - expected:+,})")
    vocabulary = wrong.get("vocabulary", {"expected": 0, "found": 0})
    if 0 < abs(vocabulary["found"] - vocabulary["expected"]) <= _NUM_MARKERS:
        lines.append("  So small a difference may come from counting the markers in another way.")
    if wrong.keys() != {"vocabulary"}:
        lines.append("This is NOT the published text: perplexities on it cannot be compared with published ones.")
    return [*lines, "*" * 72]


def _spelled_out(name: str) -> str:
    if name == "vocabulary":
        return "vocabulary with <S>, </S> and <UNK>"
    split, _, statistic = name.partition(".")
    return f"{split} {statistic}{' with </S>' if statistic == 'words' else ''}"
