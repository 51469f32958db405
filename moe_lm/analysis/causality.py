"""Causality audit: whether a prediction depends on later words or other sentences, and by how many bits.

A probe picks a position t in one sentence of a micro-batch and replaces input that the predictions up to t must not
depend on. It compares the nats of the true next words up to t before and after. Everything runs in float64, where
rounding changes a prediction by less than 1e-9 bits.

Shape suffixes: T tokens, A assignments, D width.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moe_lm.data.batch import MicroBatch, PaddedLayout, collate
from moe_lm.data.batching import iter_eval_indices
from moe_lm.data.prepared import Split
from moe_lm.errors import UserError
from moe_lm.ops.sparse_rows import UniqueIndices
from moe_lm.seeds import derive_seed, random_keys

TOLERANCE_BITS = 1e-6
"""A prediction that changes by more than this leaks."""
_PROBES_PER_BATCH = 4
_NOISE_MEANS = {torch.randn_like: 0.0, torch.randn: 0.0, torch.rand_like: 0.5, torch.rand: 0.5}


@dataclass(frozen=True)
class Leak:
    """The change of predictions, in bits, after input that they must not depend on was replaced."""

    mean_bits: float = 0.0
    """Mean absolute change per predicted token; 0 means that no prediction depends on the replaced input."""
    gain_bits: float = 0.0
    """Mean signed change: how much more likely the original input makes the true words."""
    largest_bits: float = 0.0
    """Largest absolute change."""


@dataclass(frozen=True)
class RoutingStats:
    """Perplexity and routing of the audit's unmodified micro-batches, under one routing rule."""

    perplexity: float
    experts_per_token: float | None
    """Mean number of experts per token over the gated layers; None for a model without gated layers."""
    unrouted_fraction: float | None
    """Fraction of the tokens without an expert; None for a model without gated layers."""


@dataclass(frozen=True)
class Audit:
    """Result of the probes, under evaluation-time and training-time routing; reported perplexities use the former.

    Replacing words keeps the number and lengths of the other sentences, so the leaks under training-time routing are
    lower bounds. Under evaluation-time routing, the other sentences and the later words are also removed altogether.
    """

    probes: int
    """Number of probes."""
    compared_tokens: int
    """Number of predictions compared."""
    words: int
    """Predicted words of the probed micro-batches."""
    evaluation: Leak
    """Leak under evaluation-time routing when all later words and all other sentences are replaced, or removed."""
    training: Leak
    """Leak when the same words are replaced, under training-time routing without dropout and with noise at its mean."""
    later_words: Leak
    """Leak when only later words of the same sentence are replaced, under training-time routing."""
    other_sentences: Leak
    """Leak when only the other sentences are replaced, under training-time routing."""
    by_evaluation: RoutingStats
    """The probed micro-batches under evaluation-time routing."""
    by_training: RoutingStats
    """The probed micro-batches under training-time routing, which may use the whole micro-batch."""

    @property
    def causal(self) -> bool:
        """Whether no prediction changed under evaluation-time routing."""
        return self.evaluation.largest_bits <= TOLERANCE_BITS


@torch.no_grad()
def audit(model: nn.Module, split: Split, *, start: int, end: int, words: int, probes: int, seed: int) -> Audit:
    """Probe a language model on micro-batches of about `words` tokens, drawn from the split by `seed`.

    `start` and `end` are the ids of `<S>` and `</S>`. The model is left in float64 and in eval mode. Raises `UserError`
    for a split without sentences.
    """
    model = model.double().eval()
    changes = {kind: [] for kind in ("evaluation", "training", "later_words", "other_sentences")}
    sums, num_words = {"evaluation": np.zeros(4), "training": np.zeros(4)}, 0
    cuts = _draw_cuts(split, words, math.ceil(probes / _PROBES_PER_BATCH), seed)
    for number, chosen in enumerate(cuts):
        batch = collate(split, chosen, start)
        replacement_T = _replacement_tokens(batch.input_T, split, end, derive_seed(seed, "replaced", number))
        probed = _ProbedBatch(model, batch, replacement_T)
        for rule, total in sums.items():
            total += (probed.nats[rule].sum().item(), *probed.routing[rule])
        num_words += batch.num_words
        for place in range(len(range(number, probes, len(cuts)))):
            sentence, step = _draw_position(batch, seed, number, place)
            for kind, found in probed.changes(sentence, step).items():
                changes[kind] += found
    leaks = {kind: _leak(torch.cat(found)) for kind, found in changes.items()}
    stats = {f"by_{rule}": _routing_stats(total, num_words) for rule, total in sums.items()}
    return Audit(probes, sum(map(len, changes["training"])), num_words, **leaks, **stats)


class _ProbedBatch:
    """One micro-batch with its unmodified predictions under both routing rules."""

    def __init__(self, model: nn.Module, batch: MicroBatch, replacement_T: Tensor):
        self.model, self.batch, self.replacement_T = model, batch, replacement_T
        self.step_T = batch.layout.step_T
        self.routing: dict[str, tuple[int, ...]] = {}
        """Numbers of tokens, assignments and unrouted tokens, each summed over the gated layers, by routing rule."""
        self.nats = {"evaluation": self._nats(batch), "training": self._nats(batch, training=True)}

    def changes(self, sentence: int, step: int) -> dict[str, list[Tensor]]:
        """Return the changes in nats of the sentence's predictions up to `step`, by kind of replacement."""
        same_T = self.batch.layout.sentence_T == sentence
        compared_T = same_T & (self.step_T <= step)
        later_T, others_T = same_T & (self.step_T > step), ~same_T
        replaced = {
            "training": self._replace_tokens(later_T | others_T),
            "later_words": self._replace_tokens(later_T),
            "other_sentences": self._replace_tokens(others_T),
        }
        found = {kind: [self._change(batch, compared_T, training=True)] for kind, batch in replaced.items()}
        alone = self._nats(_alone(self.batch, compared_T)) - self.nats["evaluation"][compared_T]
        return found | {"evaluation": [self._change(replaced["training"], compared_T), alone]}

    def _replace_tokens(self, where_T: Tensor) -> MicroBatch:
        where_T = where_T & (self.step_T > 0)  # each sentence begins with <S>
        return replace(self.batch, inputs=UniqueIndices(torch.where(where_T, self.replacement_T, self.batch.input_T)))

    def _change(self, batch: MicroBatch, compared_T: Tensor, training: bool = False) -> Tensor:
        nats_T = self.nats["training" if training else "evaluation"]
        return self._nats(batch, training, compared_T) - nats_T[compared_T]

    def _nats(self, batch: MicroBatch, training: bool = False, compared_T: Tensor | None = None) -> Tensor:
        """Return the nats of all targets, or only of the compared ones, as the softmax is the most expensive part."""
        batch = batch.to(self.model.device)
        with _training_routing(self.model) if training else contextlib.nullcontext():
            (hidden_TD, gatings), target_T = self.model.hidden(batch), batch.target_T
        if compared_T is None:
            rows = [(g.num_tokens, len(g.token_A), int(g.num_unrouted())) for g in gatings.values()]
            sums = tuple(map(sum, zip(*rows, strict=True))) or (0, 0, 0)
            self.routing.setdefault("training" if training else "evaluation", sums)
        else:
            row_A = compared_T.nonzero().squeeze(1).to(hidden_TD.device)
            hidden_TD, target_T = hidden_TD.index_select(0, row_A), target_T.index_select(0, row_A)
        return self.model.softmax.token_nats(hidden_TD, target_T).cpu()


class _MeanNoise(TorchFunctionMode):
    """Replaces random draws by their mean: a row's noise depends on its index in the batch, and that is not a leak."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        drawn = func(*args, **(kwargs or {}))
        return torch.full_like(drawn, _NOISE_MEANS[func]) if func in _NOISE_MEANS else drawn


@contextlib.contextmanager
def _training_routing(model: nn.Module) -> Iterator[None]:
    """Route as in training, without noise; dropout stays off, as the model itself remains in eval mode."""
    try:
        model.layers.train()
        with _MeanNoise():
            yield
    finally:
        model.layers.eval()


def _draw_cuts(split: Split, words: int, count: int, seed: int) -> list[np.ndarray]:
    """Draw at most `count` micro-batches, without replacement; as in training, each has sentences of similar length."""
    cuts = list(iter_eval_indices(split, max_sentences=words, max_words=words))
    if not cuts:
        raise UserError("the split holds no sentence to probe")
    order = np.argsort(random_keys(len(cuts), "audit", seed), kind="stable")
    return [cuts[i] for i in order[:count]]


def _draw_position(batch: MicroBatch, seed: int, number: int, place: int) -> tuple[int, int]:
    """Draw one of the micro-batch's sentences and a timestep of it."""
    first, second = (int(key) for key in random_keys(2, "probe", seed, number, place))
    sentence = first % batch.layout.num_sentences
    return sentence, second % int((batch.layout.sentence_T == sentence).sum())


def _replacement_tokens(input_T: Tensor, split: Split, end: int, seed: int) -> Tensor:
    """Draw a replacement for every token from the split's text, different from the original in all but rare cases."""
    draws = np.random.Philox(key=seed).random_raw(4 * len(input_T)).reshape(4, -1) % len(split.tokens)
    replacement_T = input_T.clone()
    for drawn in np.asarray(split.tokens)[draws.astype(np.int64)]:
        drawn_T = torch.from_numpy(drawn.astype(np.int64))
        replacement_T = torch.where((replacement_T == input_T) & (drawn_T != end), drawn_T, replacement_T)
    return replacement_T


def _alone(batch: MicroBatch, kept_T: Tensor) -> MicroBatch:
    """Return the first tokens of one sentence as a micro-batch of their own."""
    length = int(kept_T.sum())
    return MicroBatch(
        inputs=UniqueIndices(batch.input_T[kept_T]),
        targets=UniqueIndices(batch.target_T[kept_T]),
        layout=PaddedLayout(length, num_sentences=1, index_T=None),
        num_words=length,
    )


def _leak(nats_T: Tensor) -> Leak:
    bits_T = nats_T.double() / math.log(2)
    return Leak(bits_T.abs().mean().item(), bits_T.mean().item(), bits_T.abs().max().item())


def _routing_stats(sums: np.ndarray, num_words: int) -> RoutingStats:
    nats, tokens, assignments, unrouted = sums.tolist()
    shares = (assignments / tokens, unrouted / tokens) if tokens else (None, None)
    return RoutingStats(math.exp(min(nats / num_words, 700)), *shares)
