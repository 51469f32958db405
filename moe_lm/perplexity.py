"""Perplexity, defined once: sum nats, sum predicted words, divide once (section 5.1)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_lm.batches import in_order
from moe_lm.model import LanguageModel
from moe_lm.prepared import Split


@dataclass(frozen=True)
class Measured:
    """What a model made of a split, by the exact softmax over the whole vocabulary."""

    nats: float
    words: int
    """Predicted words, `</S>` included."""
    sentences: int

    @property
    def perplexity(self) -> float:
        """e^(nats / words); infinite where that is beyond a float."""
        try:
            return math.exp(self.nats / self.words)
        except OverflowError:
            return math.inf

    def line(self) -> dict[str, float]:
        """Return the figures as metrics.jsonl and `evaluate` name them."""
        return {"perplexity": self.perplexity, "nats": self.nats, "predicted_words": self.words}


@torch.no_grad()
def measure(
    model: LanguageModel,
    split: Split,
    *,
    start: int,
    max_sentences: int,
    max_words: int,
    limit: int | None = None,
    watch: Callable[[int], object] = int,
) -> Measured:
    """Return nats and words of every sentence of the split, each once, or of its first `limit`.

    The batching, `max_sentences` and at most `max_words` padded tokens together, does not change the result.
    """
    was_training = model.training
    model.eval()
    device = model.embedding_VD.device
    nats = torch.zeros((), dtype=torch.float64, device=device)
    words = sentences = 0
    for chosen, batch in in_order(split, start=start, max_sentences=max_sentences, max_words=max_words, limit=limit):
        nats += model.token_nats(batch.to(device)).sum()
        words += batch.num_words
        sentences += len(chosen)
        watch(batch.num_words)
    model.train(was_training)
    return Measured(nats.item(), words, sentences)
