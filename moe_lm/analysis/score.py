"""Sentences to the log10 probabilities of their words, by the exact softmax.

Shape suffixes: T tokens.
"""

import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from moe_lm.data.batching import iter_eval_batches
from moe_lm.data.prepared import Split
from moe_lm.data.vocabulary import Vocabulary
from moe_lm.model.language_model import LanguageModel


@dataclass(frozen=True)
class Scored:
    """A sentence, word by word."""

    words: list[str]
    log10_of_words: list[float]
    """One more than words: the last is that of `</S>`."""
    unknown: int
    """Words that were scored as `<UNK>`."""

    @property
    def log10(self) -> float:
        """Return the sentence's log10 probability, `</S>` included."""
        return math.fsum(self.log10_of_words)


def split_of(vocabulary: Vocabulary, sentences: Iterable[str]) -> Split:
    """Return sentences as a split in memory."""
    tokens, starts, words = array("i"), array("q", [0]), array("I")
    for sentence in sentences:
        of_sentence = sentence.split()
        tokens.extend((*vocabulary.encode_words(of_sentence), vocabulary.end))
        starts.append(len(tokens))
        words.append(len(of_sentence) + 1)
    return Split(
        tokens=np.array(tokens, dtype=np.int32),
        starts=np.array(starts, dtype=np.int64),
        words=np.array(words, dtype=np.uint32),
    )


def scored(model: LanguageModel, vocabulary: Vocabulary, sentences: list[str], *, max_words: int) -> Iterator[Scored]:
    """Yield every sentence's words with their log10 probabilities, at most `max_words` padded tokens in a batch.

    The model must be in eval mode.
    """
    split = split_of(vocabulary, sentences)
    nats = _nats(model, vocabulary, split, max_words)
    for sentence, first, last, of_tokens in zip(sentences, split.starts, split.starts[1:], nats, strict=False):
        ids = split.tokens[first : last - 1].tolist()
        ends = np.cumsum(vocabulary.tokens_per_word(ids), dtype=np.int64)
        of_words = [float(part.sum()) for part in np.split(-of_tokens / math.log(10), ends)]
        yield Scored(sentence.split(), of_words, ids.count(vocabulary.unknown))


@torch.no_grad()
def _nats(model: LanguageModel, vocabulary: Vocabulary, split: Split, max_words: int) -> list[np.ndarray]:
    """Return, for each sentence, the nats of its tokens and of `</S>` (float64)."""
    nats: list[np.ndarray] = [np.empty(0)] * split.num_sentences
    device = model.embedding_VD.device
    batches = iter_eval_batches(split, start=vocabulary.start, max_sentences=split.num_sentences, max_words=max_words)
    for chosen, batch in batches:
        nats_T, sentence_T = model.token_nats(batch.to(device)).cpu().numpy(), batch.sentence_T.numpy()
        for place, index in enumerate(chosen):
            nats[index] = nats_T[sentence_T == place]
    return nats
