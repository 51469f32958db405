"""moe-lm score: log10 probabilities of sentences, word by word, printed as n-gram toolkits do."""

import io
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from hydra.core.override_parser.types import Quote, QuotedString

from moe_lm.batches import in_order
from moe_lm.commands import build as make
from moe_lm.commands.configuration import composed, resolved
from moe_lm.commands.load import Trained, load
from moe_lm.corpus.lines import decoded_lines, lines
from moe_lm.mistake import Mistake
from moe_lm.prepared import Split
from moe_lm.vocabulary import END, START

HELP = "log10 probability of each word and sentence of a file or standard input"


@dataclass
class Sums:
    """Counts and log10 probability of some sentences; unknown words are scored as `<UNK>` and counted."""

    sentences: int = 0
    words: int = 0
    unknown: int = 0
    log10: float = 0.0

    def add(self, other: "Sums") -> None:
        """Add another's."""
        self.sentences += other.sentences
        self.words += other.words
        self.unknown += other.unknown
        self.log10 += other.log10

    def text(self, name: str) -> str:
        """Return the two lines of SRILM's `ngram -ppl`: `ppl` counts `</S>` as a word, `ppl1` does not."""
        with_end = _power(-self.log10 / (self.words + self.sentences))
        without_end = _power(-self.log10 / self.words) if self.words else math.nan
        return (
            f"{name}{self.sentences} sentences, {self.words} words, {self.unknown} OOVs\n"
            f"0 zeroprobs, logprob= {self.log10:.6f} ppl= {with_end:.6f} ppl1= {without_end:.6f}"
        )


def main(arguments: list[str]) -> int:
    """Print each sentence with its words' and its own log10 probability, then the sums of all."""
    files = [a for a in arguments if "=" not in a or Path(a).is_file()]
    if len(files) > 1:
        raise Mistake(f"one file at a time, not {len(files)}: {' '.join(files)}; or join them: cat ... | moe-lm score")
    quoted = [f"file={QuotedString(a, Quote.single).with_quotes()}" for a in files if a != "-"]
    config = resolved(composed("score", [a for a in arguments if a not in files] + quoted))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a letter still gets the rest
    batch = config["batch"]
    on = make.ready_to_read(config)
    trained = load(config["run"], str(config["checkpoint"]), on)
    total = Sums()
    for sentences in _groups(_sentences(config["file"]), batch["sentences"]):
        encoded = [trained.vocabulary.encode(sentence) for sentence in sentences]
        for sentence, ids, nats in zip(sentences, encoded, _nats(trained, encoded, batch["words"]), strict=True):
            sums, lines_of_words = _scored(trained, sentence.split(), ids, nats)
            total.add(sums)
            if config["words"]:
                print(sentence, *lines_of_words, sep="\n")
                print(sums.text(""), end="\n\n")
            else:
                print(f"{sums.log10:.6f}\t{sentence}")
    if total.sentences == 0:
        raise Mistake(f"{config['file'] or 'standard input'} holds no sentence")
    print(total.text(f"file {config['file'] or '-'}: "))
    return 0


def _sentences(file: str | None) -> Iterator[str]:
    if not file and sys.stdin is None:
        raise Mistake("standard input is closed: name a file, as in moe-lm score run=... sentences.txt")
    source = lines(Path(file)) if file else decoded_lines(sys.stdin.buffer, "standard input")
    return (" ".join(line.split()) for line in source if line.strip())


def _groups(sentences: Iterable[str], size: int) -> Iterator[list[str]]:
    sentences = iter(sentences)
    while group := list(islice(sentences, size)):
        yield group


@torch.no_grad()
def _nats(trained: Trained, encoded: list[list[int]], max_words: int) -> list[np.ndarray]:
    """Return, for each sentence, the nats of its tokens and of `</S>`."""
    vocabulary = trained.vocabulary
    tokens = np.array([i for ids in encoded for i in (*ids, vocabulary.end)], dtype=np.int32)
    starts = np.cumsum([0, *(len(ids) + 1 for ids in encoded)])
    split = Split(tokens=tokens, starts=starts, words=np.diff(starts).astype(np.uint32))
    nats: list[np.ndarray] = [np.empty(0)] * len(encoded)
    device = trained.model.embedding_VD.device
    for chosen, batch in in_order(split, start=vocabulary.start, max_sentences=len(encoded), max_words=max_words):
        nats_T, sentence_T = trained.model.token_nats(batch.to(device)).cpu().numpy(), batch.sentence_T.numpy()
        for place, index in enumerate(chosen):
            nats[index] = nats_T[sentence_T == place]
    return nats


def _scored(trained: Trained, words: list[str], ids: list[int], nats: np.ndarray) -> tuple[Sums, list[str]]:
    vocabulary = trained.vocabulary
    log10 = -nats / math.log(10)
    ends = np.cumsum(vocabulary.tokens_per_word(ids))
    of_words = [float(part.sum()) for part in np.split(log10, ends)]
    printed = [
        f"\tp( {word} | {before} {'...' if i else ''}) \t= {10**value:.6g} [ {value:.6f} ]"
        for i, (word, before, value) in enumerate(zip([*words, END], [START, *words], of_words, strict=True))
    ]
    unknown = sum(1 for i in ids if i == vocabulary.unknown)
    return Sums(1, len(words), unknown, math.fsum(of_words)), printed


def _power(exponent: float) -> float:
    return 10**exponent if exponent < 300 else math.inf
