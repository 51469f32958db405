"""Log10 probabilities of the words of sentences, by the exact softmax.

Shape suffixes: T tokens.
"""

import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from moe_lm.data.batching import iter_eval_batches
from moe_lm.data.prepared import Split
from moe_lm.data.vocabulary import Vocabulary


@dataclass(frozen=True)
class ScoredSentence:
    """A sentence with the log10 probability of each word."""

    words: list[str]
    log10_of_words: list[float]
    """Log10 probability of each word, then of `</S>`."""
    unknown: int
    """Number of words scored as `<UNK>`."""

    @property
    def log10(self) -> float:
        """Log10 probability of the sentence, `</S>` included."""
        return math.fsum(self.log10_of_words)


def split_of(vocabulary: Vocabulary, sentences: Iterable[str]) -> Split:
    """Return an in-memory split of sentences whose words are separated by spaces."""
    tokens, starts, words = array("i"), array("q", [0]), array("I")
    for sentence in sentences:
        sentence_words = sentence.split()
        tokens.extend((*vocabulary.encode_words(sentence_words), vocabulary.end))
        starts.append(len(tokens))
        words.append(len(sentence_words) + 1)
    return Split(
        tokens=np.array(tokens, dtype=np.int32),
        starts=np.array(starts, dtype=np.int64),
        words=np.array(words, dtype=np.uint32),
    )


def score_sentences(
    model: nn.Module, vocabulary: Vocabulary, sentences: list[str], *, max_words: int
) -> Iterator[ScoredSentence]:
    """Yield every sentence with its words' log10 probabilities; a batch holds at most `max_words` padded tokens.

    The language model must be in eval mode.
    """
    split = split_of(vocabulary, sentences)
    nats = _token_nats(model, vocabulary, split, max_words)
    for sentence, first, last, nats_T in zip(sentences, split.starts, split.starts[1:], nats, strict=False):
        ids = split.tokens[first : last - 1].tolist()
        ends = np.cumsum(vocabulary.tokens_per_word(ids), dtype=np.int64)
        log10_of_words = [float(part.sum()) for part in np.split(-nats_T / math.log(10), ends)]
        yield ScoredSentence(sentence.split(), log10_of_words, ids.count(vocabulary.unknown))


@torch.no_grad()
def _token_nats(model: nn.Module, vocabulary: Vocabulary, split: Split, max_words: int) -> list[np.ndarray]:
    """Return the nats of each sentence's tokens, `</S>` included (float64)."""
    nats: list[np.ndarray] = [np.empty(0)] * split.num_sentences
    device = model.device
    batches = iter_eval_batches(split, start=vocabulary.start, max_sentences=split.num_sentences, max_words=max_words)
    for chosen, batch in batches:
        nats_T, sentence_T = model.token_nats(batch.to(device)).cpu().numpy(), batch.layout.sentence_T.numpy()
        for place, index in enumerate(chosen):
            nats[index] = nats_T[sentence_T == place]
    return nats
