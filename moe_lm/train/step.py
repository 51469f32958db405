"""One training step: from a global batch to gradients and updated weights, in one process or many.

The processes take micro-batches in turn. Gating statistics are summed over all processes before a balance loss reads
them, and gradients before the optimizer reads them. The update is therefore that of the whole batch for any number of
processes.

Shape suffix: E experts.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lm.data.batching import GlobalBatch, MicroBatch
from moe_lm.loss.objective import Gatings, Objective, Statistics, add_statistics, statistics_of
from moe_lm.model.language_model import LanguageModel
from moe_lm.optim.composite import CompositeOptimizer
from moe_lm.parallel.grad_reduce import GradReducer
from moe_lm.seeds import derive_seed

_EXPLODED = 10
"""A step is skipped if its loss exceeds this multiple of log(vocabulary), the loss of guessing."""


@dataclass(frozen=True)
class StepResult:
    """Figures of a step over its global batch, the same in every process."""

    updated: bool
    """Whether the weights changed; they do not if loss or gradient is not finite or the loss exploded."""
    nats: Tensor
    """Nats summed over all predicted words (float64)."""
    grad_norm: Tensor
    """Global gradient norm before clipping."""
    balance: Mapping[str, Tensor | float]
    """Unweighted value of each balance loss."""
    gatings: Gatings
    """One gating per gated layer, with the statistics of the global batch."""
    routing: Mapping[str, Tensor]
    """`dropped_fraction` of the requested assignments, `unrouted_fraction` of the tokens, and `max_over_mean_tokens`.

    `max_over_mean_tokens` is the busiest expert's number of tokens over the mean, averaged over the gated layers. Empty
    without gated layers.
    """


class TrainStep:
    """Runs the training steps of one model."""

    def __init__(
        self,
        *,
        model: LanguageModel,
        objective: Objective,
        optimizer: CompositeOptimizer,
        clip_norm: float,
        global_balance: bool,
        autocast: torch.dtype | None,
        seed: int,
        reducer: GradReducer,
    ):
        """With `global_balance`, balance losses read statistics of the global batch, otherwise of each micro-batch."""
        self.model, self.objective, self.optimizer = model, objective, optimizer
        self.device = model.device
        self._clip_norm, self._global_balance, self._seed = clip_norm, global_balance, seed
        self._autocast = torch.autocast(self.device.type, autocast, enabled=autocast is not None)
        self._allow_tf32 = autocast is not None and self.device.type == "cuda"
        self._max_loss = _EXPLODED * math.log(max(2, model.vocabulary_size))
        self._reducer, self.parallel = reducer, reducer.parallel
        self._num_processes = reducer.parallel.size

    def __call__(self, batch: GlobalBatch, step: int, learning_rate: float, progress: float = 0.0) -> StepResult:
        """Update the weights, unless the loss exploded or loss or gradient is not finite; return the step's figures.

        `progress` is the share of all updates made before this one; gates may depend on it.
        """
        for layer in self.model.layers.values():
            for gate in layer.gates().values():
                gate.progress = progress
        self.optimizer.set_learning_rate(learning_rate)
        with _float32_as_tf32(self._allow_tf32):
            sums = self._forward_backward(batch, step)
        self._reducer.finish()
        norm = self._reducer.norm(self.optimizer)
        updated = bool(norm.isfinite() & (sums.nats / batch.num_words <= self._max_loss))
        if updated:
            self.optimizer.clip(self._clip_norm, norm.item())
            self.optimizer.step()
            for layer, gating in sums.gatings.items():
                self.model.layers[layer].adapt(gating.statistics())
        self.optimizer.zero_grad()
        return StepResult(updated, sums.nats, norm, sums.balance, sums.gatings, sums.routing)

    def _forward_backward(self, batch: GlobalBatch, step: int) -> "_Sums":
        """Run every micro-batch forward and backward; the gradients stay in the parameters."""
        micro_batches = list(self._micro_batches(batch, step))
        # With one micro-batch per process, statistics are summed between the forward pass and the loss; with several, a
        # first pass collects them.
        global_balance = len(batch) == 1 or (self._global_balance and bool(self.objective.balance))
        several = len(micro_batches) > 1
        global_stats = self._collect_statistics(micro_batches) if global_balance and several else None
        negatives = derive_seed(self._seed, step, "negatives")
        sums = _Sums(self.device)
        for place, (micro, seed, counts) in enumerate(micro_batches):
            self._seed_generators(seed)
            with self._autocast:
                nats, gatings = self.model(micro, negatives)
            own = statistics_of(gatings, counts)
            if global_balance and not several and self._num_processes > 1:
                global_stats = self._reducer.sum_statistics(own)
            share = micro.num_words / batch.num_words if counts else 0.0
            loss, balance = self.objective(nats, batch.num_words, gatings, global_stats, share)
            if place + 1 == len(micro_batches):
                self._reducer.expect()
            (loss if counts else 0 * loss).backward()
            sums.add(nats, gatings, own, balance, share, counts)
        sums.reduce(self._reducer, global_stats)
        return sums

    def _micro_batches(self, batch: GlobalBatch, step: int) -> Iterator[tuple[MicroBatch, int, bool]]:
        """Yield this process's micro-batches, the seed of each, and whether it counts.

        Every process has equally many, because experts wait for all processes; surplus micro-batches do not count.
        """
        for number in self.parallel.round_robin(len(batch)):
            micro = batch.dummy() if number is None else batch[number]
            yield micro.to(self.device), derive_seed(self._seed, step, number), number is not None

    @torch.no_grad()
    def _collect_statistics(self, micro_batches: list[tuple[MicroBatch, int, bool]]) -> Statistics:
        """Run the first pass of an accumulated batch; return the gating statistics of all micro-batches."""
        total = None
        for micro, seed, counts in micro_batches:
            self._seed_generators(seed)
            with self._autocast:
                _, gatings = self.model.hidden(micro)
            total = add_statistics(total, statistics_of(gatings, counts))
        return self._reducer.sum_statistics(total)

    def _seed_generators(self, seed: int) -> None:
        """Seed noise and dropout, so that both passes draw the same for a micro-batch, on whichever process it runs."""
        # torch.manual_seed would record a traceback for each kind of GPU on a machine without any, at every call.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed_all(seed)


class _Sums:
    """Sums over the micro-batches of a step, first of this process and then of all."""

    def __init__(self, device: torch.device):
        self.nats = torch.zeros((), dtype=torch.float64, device=device)
        self.balance: dict[str, Tensor | float] = {}
        self.gatings: Gatings = {}
        self.routing: dict[str, Tensor] = {}
        self._statistics: Statistics | None = None
        self._last_balance: Mapping[str, Tensor | float] = {}
        # Requested and dropped assignments, tokens and unrouted tokens: plain numbers, where these avoid waiting for
        # the device.
        self._counts: list[Tensor | int] = [0, 0, 0, 0]
        self._tokens_E: dict[str, Tensor] = {}

    def add(
        self,
        nats: Tensor,
        gatings: Gatings,
        own: Statistics,
        balance: Mapping[str, Tensor | float],
        share: float,
        counts: bool,
    ) -> None:
        """Add a micro-batch; one that does not count adds zeros of the right shapes."""
        self.gatings, self._last_balance = dict(gatings), balance
        self._statistics = own if self._statistics is None else add_statistics(self._statistics, own)
        self.balance = {name: self.balance.get(name, 0.0) + share * value for name, value in balance.items()}
        for layer, gating in gatings.items():
            tokens_E = gating.tokens_per_expert() * int(counts)
            self._tokens_E[layer] = self._tokens_E.get(layer, 0) + tokens_E
        if counts:
            self.nats += nats.detach()
            for gating in gatings.values():
                found = (gating.num_requested, gating.num_dropped, gating.num_tokens, gating.num_unrouted())
                self._counts = [total + x for total, x in zip(self._counts, found, strict=True)]

    def reduce(self, reducer: GradReducer, global_stats: Statistics | None) -> None:
        """Sum over all processes; balance losses of global statistics are the same on every process already."""
        names = list(self.balance)
        own = [self.nats, *self._counts, *(self.balance[name] for name in names)]
        # Plain numbers are filled in on the device, as copying them would wait for all queued work of a GPU.
        own = [x.to(self.nats) if isinstance(x, Tensor) else self.nats.new_full((), x) for x in own]
        tokens = [tokens_E.to(self.nats) for tokens_E in self._tokens_E.values()]
        sizes = [len(own), *map(len, tokens)]
        summed, *tokens = reducer.sum_(torch.cat([torch.stack(own), *tokens])).split(sizes)
        self.nats, requested, dropped, num_tokens, unrouted, *values = summed
        if global_stats is None:
            self.balance = dict(zip(names, values, strict=True))
            global_stats = reducer.sum_statistics(self._statistics or {})
        else:
            self.balance = dict(self._last_balance)
        self.gatings = {layer: gating.with_statistics(global_stats[layer]) for layer, gating in self.gatings.items()}
        if self.gatings:
            self.routing = {
                "dropped_fraction": dropped / requested.clamp(min=1),
                "unrouted_fraction": unrouted / num_tokens.clamp(min=1),
                "max_over_mean_tokens": torch.stack([max_over_mean(tokens_E) for tokens_E in tokens]).mean(),
            }


def max_over_mean(x_E: Tensor) -> Tensor:
    """Return the largest number over the mean."""
    return x_E.max() / (x_E.mean() + 1e-10)


@contextlib.contextmanager
def _float32_as_tf32(allowed: bool) -> Iterator[None]:
    """Let a GPU's float32 products (those of the gates) round factors to TF32, as cuDNN's LSTM does by default.

    TF32 has 3 bits of mantissa more than the autocast type; the products take a third of the time.
    """
    products = torch.backends.cuda.matmul
    if not allowed or products.fp32_precision != "none":  # a precision that the user has set stays
        yield
        return
    products.allow_tf32 = True
    try:
        yield
    finally:
        products.allow_tf32, products.fp32_precision = False, "none"
