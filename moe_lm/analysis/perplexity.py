"""Perplexity, defined once: sum nats, sum predicted words, divide once (section 5.1)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from moe_lm.data.batching import iter_eval_cuts
from moe_lm.data.micro_batch import idle, micro_batch
from moe_lm.data.prepared import Split
from moe_lm.model.language_model import LanguageModel
from moe_lm.parallel.context import SINGLE_PROCESS, ParallelContext


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
    parallel: ParallelContext = SINGLE_PROCESS,
) -> Measured:
    """Return nats and words of every sentence of the split, each once, or of its first `limit`.

    The batching, `max_sentences` and at most `max_words` padded tokens together, does not change the result, nor does
    the number of processes, which take batches by turns.
    """
    was_training = model.training
    model.eval()
    device = model.embedding_VD.device
    cuts = list(iter_eval_cuts(split, max_sentences=max_sentences, max_words=max_words, limit=limit))
    nats = torch.zeros((), dtype=torch.float64, device=device)
    for number in parallel.round_robin(len(cuts)):
        if number is None:  # experts wait for all processes
            model.token_nats(idle(split, cuts[0], start).to(device))
            continue
        batch = micro_batch(split, cuts[number], start)
        nats += model.token_nats(batch.to(device)).sum()
        watch(parallel.size * batch.num_words)
    parallel.world.all_reduce_(nats, "statistics")
    model.train(was_training)
    chosen = np.concatenate(cuts) if cuts else np.empty(0, dtype=np.int64)
    return Measured(nats.item(), int(split.words[chosen].sum()), len(chosen))
