"""The Python API: a trained model that computes perplexities and probabilities and samples sentences."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from moe_lm.analysis.perplexity import evaluate
from moe_lm.analysis.sample import SamplingConfig, sample
from moe_lm.analysis.score import ScoredSentence, score_sentences, split_of
from moe_lm.checkpoint import load as stored
from moe_lm.data.vocabulary import Vocabulary
from moe_lm.errors import UserError

MAX_SENTENCES, MAX_WORDS = 256, 16_384
"""Limits of a batch, the defaults of configs/evaluate.yaml; they change memory and speed, not the result."""


@dataclass(frozen=True)
class LoadedModel:
    """A language model in eval mode with its vocabulary and configuration."""

    model: nn.Module
    vocabulary: Vocabulary
    config: dict
    step: int
    fingerprint: str
    """Fingerprint of the training data."""

    def perplexity(self, sentences: Iterable[str]) -> float:
        """Return the perplexity per word, `</S>` included, of sentences whose words are separated by spaces.

        It equals the result of `moe-lm evaluate`; empty sentences are skipped. Raises `UserError` if none is left.
        """
        if isinstance(sentences, str):
            raise UserError("perplexity takes a list of sentences: perplexity([sentence])")
        split = split_of(self.vocabulary, (sentence for sentence in sentences if sentence.strip()))
        if split.num_sentences == 0:
            raise UserError("perplexity needs a sentence: all given sentences are empty")
        start = self.vocabulary.start
        return evaluate(self.model, split, start=start, max_sentences=MAX_SENTENCES, max_words=MAX_WORDS).perplexity

    def log10(self, sentence: str) -> float:
        """Return the log10 probability of a sentence, `</S>` included, as `moe-lm score` does."""
        return self.score(sentence).log10

    def score(self, sentence: str) -> ScoredSentence:
        """Return the sentence's words with the log10 probability of each."""
        [only] = score_sentences(self.model, self.vocabulary, [sentence], max_words=MAX_WORDS)
        return only

    def sample(self, prefix: str = "", *, num: int = 5, seed: int = 1, **options: float | bool | None) -> list[str]:
        """Return the first `num` sentences that `moe-lm sample` draws; `options` are fields of `SamplingConfig`."""
        config = SamplingConfig(**options)
        samples = (sample(self.model, self.vocabulary, prefix, seed=seed, number=i, config=config) for i in range(num))
        return [drawn.sentence for drawn in samples]


def load(folder: str | Path, which: str, on: torch.device) -> LoadedModel:
    """Load a run's checkpoint (`last`, `best` or a step) or an export; raises `UserError`."""
    return LoadedModel(**stored.load(Path(folder), which, on))
