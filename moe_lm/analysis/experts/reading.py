"""One reading of a text, in evaluation mode: what the gates of a model decide about every token.

Shape suffixes: T tokens, V vocabulary, B sentences.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from moe_lm.analysis.experts.tally import Tally, Tokens
from moe_lm.data.batching import iter_eval_batches
from moe_lm.data.micro_batch import MicroBatch
from moe_lm.data.prepared import Split
from moe_lm.errors import UserError
from moe_lm.model.language_model import LanguageModel


@dataclass(frozen=True)
class Reading:
    """How much was read, and what was counted of each gated layer."""

    sentences: int
    words: int
    count_V: np.ndarray
    """How often each token was the input."""
    tallies: dict[str, Tally]
    """By the layer's name, in the model's order."""

    @property
    def tokens(self) -> int:
        """Input tokens."""
        return int(self.count_V.sum())


@torch.no_grad()
def gated_layers(model: LanguageModel, start: int) -> dict[str, int]:
    """Return the number of experts of every layer with a gate, by its name: what one token makes known."""
    split = Split(tokens=np.array([start]), starts=np.array([0, 1]), words=np.array([1]))
    [(_, batch)] = iter_eval_batches(split, start=start, max_sentences=1, max_words=1)
    _, gatings = model.hidden(batch.to(model.embedding_VD.device))
    return {name: gating.num_experts for name, gating in gatings.items()}


def first_sentences(split: Split, max_words: int | None) -> int:
    """Return how many sentences from the first on have `max_words` words together, or all; raises `UserError` for none.

    The last of them may go beyond; None reads all.
    """
    if split.num_sentences == 0:
        raise UserError("the split holds no sentence: choose another")
    if max_words is None:
        return split.num_sentences
    total_N = np.cumsum(split.words, dtype=np.int64)
    return min(int(np.searchsorted(total_N, max_words)) + 1, split.num_sentences)


@torch.no_grad()
def read(
    model: LanguageModel,
    split: Split,
    *,
    start: int,
    sentences: int,
    contexts: int,
    max_sentences: int,
    max_words: int,
    watch: Callable[[int], object] = int,
) -> Reading:
    """Read the first `sentences` of a split; the batching, as `measure` has it, does not change the result.

    The model is left in evaluation mode, and the layers in float64: at the rounding of float32 another batching would
    now and then send a token elsewhere.
    """
    model.eval()
    model.layers.double()
    model.embedding_VD.data = model.embedding_VD.data.double()
    tallies = _empty_tallies(model, start, contexts)
    count_V, words = np.zeros(model.embedding_VD.shape[0], np.int64), 0
    batches = iter_eval_batches(split, start=start, max_sentences=max_sentences, max_words=max_words, limit=sentences)
    for chosen, batch in batches:
        _, gatings = model.hidden(batch.to(model.embedding_VD.device))
        tokens = tokens_of(batch, split.starts[chosen])
        np.add.at(count_V, tokens.word_T, 1)
        for name, gating in gatings.items():
            tallies[name].add(gating, tokens)
        words += batch.num_words
        watch(batch.num_words)
    return Reading(sentences, words, count_V, tallies)


def _empty_tallies(model: LanguageModel, start: int, contexts: int) -> dict[str, Tally]:
    return {
        name: Tally(
            num_experts=num_experts,
            num_groups=getattr(model.layers[name], "num_groups", None),
            vocabulary_size=model.embedding_VD.shape[0],
            contexts=contexts,
        )
        for name, num_experts in gated_layers(model, start).items()
    }


def tokens_of(batch: MicroBatch, start_B: np.ndarray) -> Tokens:
    """Return where the tokens of a micro-batch stand in the split, in which its sentences begin at `start_B`."""
    place, sentence_T = batch.sentences, batch.sentence_T.numpy()
    every_T = np.arange(len(sentence_T)) if place.position_T is None else place.position_T.numpy()
    step_T = every_T // place.num_sentences
    word_T = batch.input_T.numpy()
    return Tokens(word_T, np.asarray(start_B)[sentence_T] + step_T, prefixes(word_T, step_T, sentence_T))


def prefixes(word_T: np.ndarray, step_T: np.ndarray, sentence_T: np.ndarray) -> np.ndarray:
    """Return a 64-bit number for what was read up to each token: the sum, modulo 2^64, of one for (word, step).

    Different texts agree by chance alone, one pair in 2^64.
    """
    with np.errstate(over="ignore"):
        part_T = _mixed(_mixed(word_T.astype(np.uint64)) + step_T.astype(np.uint64))
        order = np.lexsort((step_T, sentence_T))
        total_T = np.cumsum(part_T[order], dtype=np.uint64)
        begin_T = np.flatnonzero(step_T[order] == 0)
        before_T = np.r_[np.zeros(1, np.uint64), total_T][begin_T]
        sizes = np.diff(np.r_[begin_T, len(order)])
        prefix_T = np.empty_like(part_T)
        prefix_T[order] = total_T - np.repeat(before_T, sizes)
    return prefix_T


def _mixed(x: np.ndarray) -> np.ndarray:
    """Return well-mixed bits (the finaliser of SplitMix64)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
