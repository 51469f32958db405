"""Perplexity of a split: exp(sum of nats / number of predicted words).

The sum runs over every token of every sentence, `</S>` included and `<S>` excluded: a token's nats are its negative
log-probability under the exact softmax over the whole vocabulary. The divisor counts words, `</S>` included: a word
made of several subword pieces counts once, so perplexities of different vocabularies are comparable. Nats are summed in
float64 over the whole split and all processes, and divided once; batches are never averaged.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from moe_lm.data.batch import collate
from moe_lm.data.batching import dummy_batch, iter_eval_indices
from moe_lm.data.prepared import Split
from moe_lm.parallel.context import SINGLE_PROCESS, ParallelContext


@dataclass(frozen=True)
class EvalResult:
    """Evaluation of a model on a split."""

    nats: float
    """Sum of the negative log-probabilities of all tokens."""
    words: int
    """Number of predicted words, `</S>` included."""
    sentences: int
    """Number of sentences evaluated."""

    @property
    def perplexity(self) -> float:
        """exp(nats / words); infinity where that overflows a float."""
        try:
            return math.exp(self.nats / self.words)
        except OverflowError:
            return math.inf

    def metrics(self) -> dict[str, float]:
        """Return the figures under the names that metrics.jsonl and `moe-lm evaluate` use."""
        return {"perplexity": self.perplexity, "nats": self.nats, "predicted_words": self.words}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split,
    *,
    start: int,
    max_sentences: int,
    max_words: int,
    limit: int | None = None,
    on_progress: Callable[[int], object] = int,
    parallel: ParallelContext = SINGLE_PROCESS,
) -> EvalResult:
    """Evaluate a language model on each sentence of the split once, or on its first `limit` sentences.

    A batch holds at most `max_sentences` sentences and `max_words` padded tokens; processes take batches in turn.
    Neither changes the result. `start` is the id of `<S>`. After each batch, `on_progress` receives its number of words
    times the number of processes.
    """
    was_training = model.training
    model.eval()
    device = model.device
    cuts = list(iter_eval_indices(split, max_sentences=max_sentences, max_words=max_words, limit=limit))
    nats = torch.zeros((), dtype=torch.float64, device=device)
    for number in parallel.round_robin(len(cuts)):
        if number is None:  # no batch left, but expert-parallel layers need every process in each forward pass
            model.token_nats(dummy_batch(split, cuts[0], start).to(device))
            continue
        batch = collate(split, cuts[number], start)
        nats += model.token_nats(batch.to(device)).sum()
        on_progress(parallel.size * batch.num_words)
    parallel.world.all_reduce_(nats, "statistics")
    model.train(was_training)
    evaluated = np.concatenate(cuts) if cuts else np.empty(0, dtype=np.int64)
    return EvalResult(nats.item(), int(split.words[evaluated].sum()), len(evaluated))
