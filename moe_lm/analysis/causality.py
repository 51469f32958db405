"""Whether a prediction sees what comes after it, or other sentences, and how many bits it takes from there.

A probe picks a sentence of a micro-batch and a position t in it, replaces what the predictions up to t must not depend
on, and compares them: the nats of the true next word at every position up to t. Everything runs in float64, where the
rounding of another grouping of rows is far below any leak.

Shape suffixes: T tokens.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moe_lm.data.batching import iter_eval_cuts
from moe_lm.data.micro_batch import MicroBatch, micro_batch
from moe_lm.data.prepared import Split
from moe_lm.errors import UserError
from moe_lm.gate import Gating
from moe_lm.model.language_model import LanguageModel
from moe_lm.seeds import derive_seed, random_keys

TOLERANCE_BITS = 1e-6
"""A change of a prediction above this is a leak; rounding in float64 stays below 1e-9."""
_PROBES_PER_BATCH = 4
_MEAN = {torch.randn_like: 0.0, torch.randn: 0.0, torch.rand_like: 0.5, torch.rand: 0.5}


@dataclass(frozen=True)
class Leak:
    """How predictions changed in bits when something that they must not see was replaced."""

    mean_bits: float = 0.0
    """Mean absolute change a predicted token: 0 only if nothing is seen."""
    gain_bits: float = 0.0
    """Mean of how much likelier the true words are with what truly stood there: what a model takes from it."""
    largest_bits: float = 0.0


@dataclass(frozen=True)
class Served:
    """The micro-batches of an audit under one rule of choice, as they truly are."""

    perplexity: float
    experts_per_token: float | None
    """On average over the gated layers; None without any."""
    unserved: float | None
    """Share of tokens that no expert serves."""


@dataclass(frozen=True)
class Audit:
    """What the probes found; `evaluation` is the rule by which perplexity is reported.

    Only words are replaced: what depends on the number or the lengths of other sentences is seen in `evaluation`, where
    they are left away too, and not in the leaks of training, which are lower bounds.
    """

    probes: int
    compared_tokens: int
    words: int
    """Predicted words of the micro-batches that were probed."""
    evaluation: Leak
    """All later words and all other sentences replaced, or left away: the larger change of both."""
    training: Leak
    """The same replaced, under training's choice, its noise at its mean and without dropout."""
    later_words: Leak
    """Under training's choice, later words of the same sentence alone replaced."""
    other_sentences: Leak
    """Under training's choice, the other sentences alone replaced."""
    by_evaluation: "Served"
    by_training: "Served"
    """Under training's choice: what a reader who had the whole batch would reach, no more."""

    @property
    def causal(self) -> bool:
        """Whether no prediction moved in evaluation."""
        return self.evaluation.largest_bits <= TOLERANCE_BITS


@torch.no_grad()
def audit(model: LanguageModel, split: Split, *, start: int, end: int, words: int, probes: int, seed: int) -> Audit:
    """Probe a model on micro-batches of about `words` tokens, drawn by `seed` from the split.

    `start` and `end` are the vocabulary's ids of `<S>` and `</S>`. The model is left in float64 and in eval mode.
    Raises `UserError` where the split has nothing to probe.
    """
    model = model.double().eval()
    found = {kind: [] for kind in ("evaluation", "training", "later_words", "other_sentences")}
    sums, num_words = {"evaluation": np.zeros(4), "training": np.zeros(4)}, 0
    drawn = _drawn(split, words, math.ceil(probes / _PROBES_PER_BATCH), seed)
    for number, chosen in enumerate(drawn):
        batch = micro_batch(split, chosen, start)
        probe = _Probe(model, batch, _other_tokens(batch.input_T, split, end, derive_seed(seed, "replaced", number)))
        for rule, total in sums.items():
            total += (probe.true[rule].sum().item(), *probe.served[rule])
        num_words += batch.num_words
        for place in range(len(range(number, probes, len(drawn)))):
            sentence, step = _position(batch, seed, number, place)
            for kind, changes in probe.changes(sentence, step).items():
                found[kind] += changes
    leaks = {kind: _leak(torch.cat(changes)) for kind, changes in found.items()}
    served = {f"by_{rule}": _served(total, num_words) for rule, total in sums.items()}
    return Audit(probes, sum(map(len, found["training"])), num_words, **leaks, **served)


class _Probe:
    """One micro-batch, its true predictions under both rules, and what replacing does to them."""

    def __init__(self, model: LanguageModel, batch: MicroBatch, other_T: Tensor):
        self.model, self.batch, self.other_T = model, batch, other_T
        self.step_T = _steps(batch)
        self.served: dict[str, tuple[int, ...]] = {}
        """By rule: tokens in gated layers, their assignments, and tokens without any."""
        self.true = {"evaluation": self._nats(batch), "training": self._nats(batch, by_training=True)}

    def changes(self, sentence: int, step: int) -> dict[str, list[Tensor]]:
        """Return the changes in nats of this sentence's predictions up to `step`, in each kind of replacement."""
        mine_T = self.batch.sentence_T == sentence
        seen_T = mine_T & (self.step_T <= step)
        later_T, others_T = mine_T & (self.step_T > step), ~mine_T
        replaced = {
            "training": self._replaced(later_T | others_T),
            "later_words": self._replaced(later_T),
            "other_sentences": self._replaced(others_T),
        }
        found = {kind: [self._change(batch, seen_T, by_training=True)] for kind, batch in replaced.items()}
        alone = self._nats(_alone(self.batch, seen_T)) - self.true["evaluation"][seen_T]
        return found | {"evaluation": [self._change(replaced["training"], seen_T), alone]}

    def _replaced(self, where_T: Tensor) -> MicroBatch:
        where_T = where_T & (self.step_T > 0)  # each sentence begins with <S>
        return replace(self.batch, input_T=torch.where(where_T, self.other_T, self.batch.input_T), input_rows=None)

    def _change(self, batch: MicroBatch, seen_T: Tensor, by_training: bool = False) -> Tensor:
        true_T = self.true["training" if by_training else "evaluation"]
        return self._nats(batch, by_training, seen_T) - true_T[seen_T]

    def _nats(self, batch: MicroBatch, by_training: bool = False, wanted_T: Tensor | None = None) -> Tensor:
        """Return the nats of the targets, or of those wanted: the softmax is the dearest part."""
        batch = batch.to(self.model.embedding_VD.device)
        with _training_choice(self.model) if by_training else contextlib.nullcontext():
            (hidden_TD, gatings), target_T = self.model.hidden(batch), batch.target_T
        if wanted_T is None:
            self.served.setdefault("training" if by_training else "evaluation", _counts(gatings.values()))
        else:
            place_A = wanted_T.nonzero().squeeze(1).to(hidden_TD.device)
            hidden_TD, target_T = hidden_TD.index_select(0, place_A), target_T.index_select(0, place_A)
        return self.model.softmax.token_nats(hidden_TD, target_T).cpu()


class _MeanOfNoise(TorchFunctionMode):
    """Gates draw the mean of their noise: a row's draw depends on its place among rows, which is no leak."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        drawn = func(*args, **(kwargs or {}))
        return torch.full_like(drawn, _MEAN[func]) if func in _MEAN else drawn


@contextlib.contextmanager
def _training_choice(model: LanguageModel) -> Iterator[None]:
    """Let the layers choose as in training, without noise; nothing adapts, and dropout is the model's, not theirs."""
    try:
        model.layers.train()
        with _MeanOfNoise():
            yield
    finally:
        model.layers.eval()


def _drawn(split: Split, words: int, count: int, seed: int) -> list[np.ndarray]:
    """Draw micro-batches of sentences of like length, as training's, each once: a small split has fewer."""
    every = list(iter_eval_cuts(split, max_sentences=words, max_words=words))
    if not every:
        raise UserError("the split holds no sentence to probe")
    order = np.argsort(random_keys(len(every), "audit", seed), kind="stable")
    return [every[i] for i in order[:count]]


def _position(batch: MicroBatch, seed: int, number: int, place: int) -> tuple[int, int]:
    """Draw one of the micro-batch's sentences and a step of it."""
    first, second = (int(key) for key in random_keys(2, "probe", seed, number, place))
    sentence = first % batch.sentences.num_sentences
    return sentence, second % int((batch.sentence_T == sentence).sum())


def _steps(batch: MicroBatch) -> Tensor:
    """Return the timestep of each token."""
    place = batch.sentences
    position_T = torch.arange(len(batch.input_T)) if place.position_T is None else place.position_T
    return position_T // place.num_sentences


def _other_tokens(input_T: Tensor, split: Split, end: int, seed: int) -> Tensor:
    """Draw a token for every place from the split's text, another than what stands there where the text has one."""
    draws = np.random.Philox(key=seed).random_raw(4 * len(input_T)).reshape(4, -1) % len(split.tokens)
    other_T = input_T.clone()
    for drawn in np.asarray(split.tokens)[draws.astype(np.int64)]:
        drawn_T = torch.from_numpy(drawn.astype(np.int64))
        other_T = torch.where((other_T == input_T) & (drawn_T != end), drawn_T, other_T)
    return other_T


def _alone(batch: MicroBatch, seen_T: Tensor) -> MicroBatch:
    """Return the first tokens of one sentence as a micro-batch of their own."""
    length = int(seen_T.sum())
    return MicroBatch(
        input_T=batch.input_T[seen_T],
        target_T=batch.target_T[seen_T],
        sentences=replace(batch.sentences, num_steps=length, num_sentences=1, position_T=None),
        sentence_T=torch.zeros(length, dtype=torch.int64),
        num_words=length,
    )


def _leak(nats_T: Tensor) -> Leak:
    bits_T = nats_T.double() / math.log(2)
    return Leak(bits_T.abs().mean().item(), bits_T.mean().item(), bits_T.abs().max().item())


def _counts(gatings: Iterable[Gating]) -> tuple[int, ...]:
    """Return the tokens of these gatings, their assignments, and the tokens without any."""
    rows = [(gating.num_tokens, len(gating.token_A), int(gating.num_unrouted())) for gating in gatings]
    return tuple(map(sum, zip(*rows, strict=True))) or (0, 0, 0)


def _served(sums: np.ndarray, num_words: int) -> Served:
    nats, tokens, assignments, unserved = sums.tolist()
    shares = (assignments / tokens, unserved / tokens) if tokens else (None, None)
    return Served(math.exp(min(nats / num_words, 700)), *shares)
