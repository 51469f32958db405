"""moe-lm score: log10 probabilities of sentences, word by word, in the format of n-gram toolkits."""

import io
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString

from moe_lm.analysis.score import ScoredSentence, score_sentences
from moe_lm.cli import machine as make
from moe_lm.cli.config import composed, resolved
from moe_lm.data.corpus.lines import decoded_lines, lines
from moe_lm.data.vocabulary import END, START
from moe_lm.errors import UserError
from moe_lm.inference import load


@dataclass
class Sums:
    """Counts and log10 probability of sentences; unknown words are scored as `<UNK>` and counted."""

    sentences: int = 0
    words: int = 0
    unknown: int = 0
    log10: float = 0.0

    def add(self, other: "Sums") -> None:
        """Add the sums of other sentences."""
        self.sentences += other.sentences
        self.words += other.words
        self.unknown += other.unknown
        self.log10 += other.log10

    def text(self, name: str) -> str:
        """Return two lines as SRILM's `ngram -ppl` prints them: `ppl` counts `</S>` as a word, `ppl1` does not."""
        with_end = _power(-self.log10 / (self.words + self.sentences))
        without_end = _power(-self.log10 / self.words) if self.words else math.nan
        return (
            f"{name}{self.sentences} sentences, {self.words} words, {self.unknown} OOVs\n"
            f"0 zeroprobs, logprob= {self.log10:.6f} ppl= {with_end:.6f} ppl1= {without_end:.6f}"
        )


def main(arguments: list[str]) -> int:
    """Print the log10 probabilities of each sentence and of its words, then the sums over all sentences."""
    files = [a for a in arguments if "=" not in a or Path(a).is_file()]
    if len(files) > 1:
        raise UserError(
            f"one file at a time, not {len(files)}: {' '.join(files)}; or join them: cat ... | moe-lm score"
        )
    quoted = [f"file={QuotedString(a, Quote.single).with_quotes()}" for a in files if a != "-"]
    config = resolved(composed("score", [a for a in arguments if a not in files] + quoted))
    allow_any_letter()
    batch = config["batch"]
    on = make.ready_to_read(config)
    trained = load(config["run"], str(config["checkpoint"]), on)
    total = Sums()
    for sentences in _groups(_sentences(config["file"]), batch["sentences"]):
        for one in score_sentences(trained.model, trained.vocabulary, sentences, max_words=batch["words"]):
            sums, sentence = _sums(one), " ".join(one.words)
            total.add(sums)
            if config["words"]:
                print(sentence, *_lines_of_words(one), sep="\n")
                print(sums.text(""), end="\n\n")
            else:
                print(f"{sums.log10:.6f}\t{sentence}")
    if total.sentences == 0:
        raise UserError(f"{config['file'] or 'standard input'} holds no sentence")
    print(total.text(f"file {config['file'] or '-'}: "))
    return 0


def allow_any_letter() -> None:
    """Make print escape the letters that the terminal's encoding lacks, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _sentences(file: str | None) -> Iterator[str]:
    if not file and sys.stdin is None:
        raise UserError("standard input is closed: name a file, as in moe-lm score run=... sentences.txt")
    source = lines(Path(file)) if file else decoded_lines(sys.stdin.buffer, "standard input")
    return (" ".join(line.split()) for line in source if line.strip())


def _groups(sentences: Iterable[str], size: int) -> Iterator[list[str]]:
    sentences = iter(sentences)
    while group := list(islice(sentences, size)):
        yield group


def _sums(scored: ScoredSentence) -> Sums:
    return Sums(1, len(scored.words), scored.unknown, scored.log10)


def _lines_of_words(scored: ScoredSentence) -> list[str]:
    words, values = scored.words, scored.log10_of_words
    return [
        f"\tp( {word} | {before} {'...' if i else ''}) \t= {10**value:.6g} [ {value:.6f} ]"
        for i, (word, before, value) in enumerate(zip([*words, END], [START, *words], values, strict=True))
    ]


def _power(exponent: float) -> float:
    return 10**exponent if exponent < 300 else math.inf
