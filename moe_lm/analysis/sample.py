"""Sentences drawn from a model token by token, each from the exact softmax over the whole vocabulary.

Shape suffixes: T tokens, D width, V vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_lm.data.micro_batch import micro_batch
from moe_lm.data.prepared import Split
from moe_lm.data.vocabulary import Vocabulary
from moe_lm.errors import UserError
from moe_lm.model.language_model import LanguageModel
from moe_lm.seeds import derive_seed

_TOKENS_A_WORD = 16
"""Most tokens a sentence may have for each of its words: pieces alone might never end a word."""


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn; raises `UserError` for what is impossible."""

    temperature: float = 1.0
    """What logits are divided by: below 1 the likelier words come more often still."""
    top: int | None = None
    """Only so many of the likeliest tokens are drawn from; 1: always the likeliest; None: all."""
    max_words: int = 50
    """Most words of a sentence, its prefix included."""
    unknown: bool = False
    """Whether `<UNK>` may be drawn; `<S>`, which stands in no sentence, never is."""

    def __post_init__(self):
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature={self.temperature}: must be positive (top=1 always takes the likeliest word)")
        if self.top is not None and self.top < 1:
            raise UserError(f"top={self.top}: must be at least 1, or null")
        if self.max_words < 1:
            raise UserError(f"max_words={self.max_words}: must be at least 1")


@dataclass(frozen=True)
class Sampled:
    """A sentence that was drawn."""

    sentence: str
    """The prefix and what was drawn, as words."""
    ended: bool
    """Whether `</S>` was drawn; else the sentence was cut at its most words."""
    log10: float
    """Log10 probability of all that was drawn, given the prefix, by the model itself: whatever temperature and top."""


def sample(
    model: LanguageModel, vocabulary: Vocabulary, prefix: str, *, seed: int, number: int, how: Drawing
) -> Sampled:
    """Draw sentence `number` of `seed` (and of no other sentence's draws), beginning with the words of `prefix`.

    The model must be in eval mode. Raises `UserError` where the prefix leaves no word to draw.
    """
    given = prefix.split()
    if len(given) >= how.max_words:
        raise UserError(f"max_words={how.max_words}: the prefix has {len(given)} words; raise max_words or shorten it")
    bits, ids = np.random.Philox(key=derive_seed("sample", seed, number)), vocabulary.encode_words(given)
    barred = [vocabulary.start] if how.unknown else [vocabulary.start, vocabulary.unknown]
    log10, most = 0.0, len(ids) + _TOKENS_A_WORD * how.max_words
    while True:
        log_p_V = next_log_probabilities(model, vocabulary, ids).cpu()
        # Of the 64 random bits the 53 that a float64 below 1 holds.
        drawn = draw(log_p_V, (int(bits.random_raw()) >> 11) * 2.0**-53, barred, how)
        ended = drawn == vocabulary.end
        if not ended and (len(ids) == most or len(vocabulary.decode([*ids, drawn]).split()) > how.max_words):
            return Sampled(_spelt(vocabulary, given, ids), False, log10)
        log10 += log_p_V[drawn].item() / math.log(10)
        if ended:
            return Sampled(_spelt(vocabulary, given, ids), True, log10)
        ids.append(drawn)


@torch.no_grad()
def next_log_probabilities(model: LanguageModel, vocabulary: Vocabulary, ids: list[int]) -> Tensor:
    """Return the log of every token's probability after these of a sentence (float64, V): a pass over all of them.

    One sentence at a time, as other sentences in a batch would change the rounding and with it, now and then, a draw.
    """
    tokens = np.array([*ids, vocabulary.end], dtype=np.int32)
    split = Split(tokens=tokens, starts=np.array([0, len(tokens)]), words=np.array([len(tokens)]))
    batch = micro_batch(split, np.array([0]), vocabulary.start).to(model.embedding_VD.device)
    hidden_TD, _ = model.hidden(batch)
    weight_VD, bias_V = model.softmax.weight_VD, model.softmax.bias_V
    return torch.addmv(bias_V, weight_VD, hidden_TD[-1].to(weight_VD.dtype)).double().log_softmax(dim=0)


def draw(log_p_V: Tensor, uniform: float, barred: list[int], how: Drawing) -> int:
    """Return the token at `uniform` (at least 0, below 1) of the distribution's cumulative sum; ties: the lower id."""
    score_V = log_p_V.clone()
    score_V[barred] = -torch.inf
    order = None
    if how.top is not None and how.top < len(score_V):
        score_V, order = score_V.sort(descending=True, stable=True)
        score_V, order = score_V[: how.top], order[: how.top]
    total_V = ((score_V - score_V.max()) / how.temperature).exp().cumsum(dim=0)
    last = total_V[-1].item()
    # Rounding must not carry it up to the whole sum, beyond which there is no token.
    place = int(torch.searchsorted(total_V, min(uniform * last, math.nextafter(last, 0)), right=True))
    return place if order is None else int(order[place])


def unknown_words(vocabulary: Vocabulary, text: str) -> list[str]:
    """Return the words of a text that the vocabulary reads as `<UNK>`."""
    return [word for word in text.split() if vocabulary.unknown in vocabulary.encode_words([word])]


def _spelt(vocabulary: Vocabulary, given: list[str], ids: list[int]) -> str:
    """Return the words that the ids spell; those of the prefix as they were given, known or not."""
    words = vocabulary.decode(ids).split()
    for place, word in enumerate(given):
        if vocabulary.unknown in vocabulary.encode_words([word]):
            words[place] = word
    return " ".join(words)
