"""Sampling of sentences token by token from the exact softmax over the whole vocabulary.

Shape suffixes: T tokens, D width, V vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from moe_lm.data.batch import collate
from moe_lm.data.prepared import Split
from moe_lm.data.vocabulary import Vocabulary
from moe_lm.errors import UserError
from moe_lm.seeds import derive_seed

_MAX_TOKENS_PER_WORD = 16
"""Limit on a sentence's tokens per word, as subword pieces might never end a word."""


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are sampled; raises `UserError` for impossible values."""

    temperature: float = 1.0
    """Divisor of the logits: below 1 it favours likely tokens further."""
    top: int | None = None
    """Number of most likely tokens to sample from (top-k sampling); 1 is greedy, None keeps all tokens."""
    max_words: int = 50
    """Maximum words of a sentence, prefix included."""
    unknown: bool = False
    """Whether `<UNK>` may be sampled; `<S>` never is."""

    def __post_init__(self):
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature={self.temperature}: must be positive (top=1 always takes the likeliest word)")
        if self.top is not None and self.top < 1:
            raise UserError(f"top={self.top}: must be at least 1, or null")
        if self.max_words < 1:
            raise UserError(f"max_words={self.max_words}: must be at least 1")


@dataclass(frozen=True)
class SampledSentence:
    """A sampled sentence."""

    sentence: str
    """The words of the prefix, followed by the sampled words."""
    ended: bool
    """Whether `</S>` was sampled; otherwise the sentence was cut at the maximum number of words."""
    log10: float
    """Log10 probability of the sampled tokens given the prefix, before temperature and top-k."""


def sample(
    model: nn.Module, vocabulary: Vocabulary, prefix: str, *, seed: int, number: int, config: SamplingConfig
) -> SampledSentence:
    """Sample the sentence that `seed` and `number` determine; it begins with the words of `prefix`.

    The language model must be in eval mode. Raises `UserError` where the prefix has `max_words` words or more.
    """
    given = prefix.split()
    if len(given) >= config.max_words:
        raise UserError(
            f"max_words={config.max_words}: the prefix has {len(given)} words; raise max_words or shorten it"
        )
    bits, ids = np.random.Philox(key=derive_seed("sample", seed, number)), vocabulary.encode_words(given)
    banned = [vocabulary.start] if config.unknown else [vocabulary.start, vocabulary.unknown]
    log10, max_tokens = 0.0, len(ids) + _MAX_TOKENS_PER_WORD * config.max_words
    while True:
        log_p_V = next_log_probabilities(model, vocabulary, ids).cpu()
        uniform = (int(bits.random_raw()) >> 11) * 2.0**-53  # a float64 below 1 holds 53 of the 64 random bits
        token = sample_token(log_p_V, uniform, banned, config)
        ended = token == vocabulary.end
        if not ended and (len(ids) == max_tokens or len(vocabulary.decode([*ids, token]).split()) > config.max_words):
            return SampledSentence(_to_text(vocabulary, given, ids), False, log10)
        log10 += log_p_V[token].item() / math.log(10)
        if ended:
            return SampledSentence(_to_text(vocabulary, given, ids), True, log10)
        ids.append(token)


@torch.no_grad()
def next_log_probabilities(model: nn.Module, vocabulary: Vocabulary, ids: list[int]) -> Tensor:
    """Return log_p_V, the log-probability of every next token after a sentence's first `ids` (float64).

    The forward pass takes one sentence: a batch of several would change the rounding and occasionally a sample.
    """
    tokens = np.array([*ids, vocabulary.end], dtype=np.int32)
    split = Split(tokens=tokens, starts=np.array([0, len(tokens)]), words=np.array([len(tokens)]))
    batch = collate(split, np.array([0]), vocabulary.start).to(model.device)
    hidden_TD, _ = model.hidden(batch)
    weight_VD, bias_V = model.softmax.weight_VD, model.softmax.bias_V
    return torch.addmv(bias_V, weight_VD, hidden_TD[-1].to(weight_VD.dtype)).double().log_softmax(dim=0)


def sample_token(log_p_V: Tensor, uniform: float, banned: list[int], config: SamplingConfig) -> int:
    """Return the token at which the cumulative distribution exceeds `uniform`, a number in [0, 1).

    Tokens are in the order of their ids; with top-k, the likeliest come first. Tokens in `banned` have probability 0.
    """
    score_V = log_p_V.clone()
    score_V[banned] = -torch.inf
    order = None
    if config.top is not None and config.top < len(score_V):
        score_V, order = score_V.sort(descending=True, stable=True)
        score_V, order = score_V[: config.top], order[: config.top]
    cumulative_V = ((score_V - score_V.max()) / config.temperature).exp().cumsum(dim=0)
    total = cumulative_V[-1].item()
    # uniform * total must not round up to the total, beyond which there is no token.
    place = int(torch.searchsorted(cumulative_V, min(uniform * total, math.nextafter(total, 0)), right=True))
    return place if order is None else int(order[place])


def unknown_words(vocabulary: Vocabulary, text: str) -> list[str]:
    """Return the words of a text that the vocabulary maps to `<UNK>`."""
    return [word for word in text.split() if vocabulary.unknown in vocabulary.encode_words([word])]


def _to_text(vocabulary: Vocabulary, given: list[str], ids: list[int]) -> str:
    """Decode ids to words; unknown words of the prefix keep their spelling."""
    words = vocabulary.decode(ids).split()
    for place, word in enumerate(given):
        if vocabulary.unknown in vocabulary.encode_words([word]):
            words[place] = word
    return " ".join(words)
