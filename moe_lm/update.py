"""One update: the micro-batches of a step, on one process or many, to gradients and changed weights.

Every process takes micro-batches by turns. Statistics are summed over all of them before a loss reads them, gradients
before the optimizer does, so the update is that of the whole batch whatever the number of processes.
"""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lm.batches import GlobalBatch, MicroBatch
from moe_lm.distributed import ALONE, Processes
from moe_lm.gate import Gating
from moe_lm.gradients import STATISTICS, Gradients, sum_statistics
from moe_lm.model import LanguageModel
from moe_lm.objective import Objective, Statistics, add, statistics
from moe_lm.optimizer import Together
from moe_lm.seeds import derive_seed

_EXPLODED = 10
"""A loss of as many times what guessing costs, log(vocabulary), is no loss to learn from."""


@dataclass(frozen=True)
class Updated:
    """What an update saw and did, of the global batch: the same on each process."""

    made: bool
    """Whether the weights changed: not where loss or gradient is not finite, or the loss exploded."""
    nats: Tensor
    """Summed over all predicted words (float64)."""
    norm: Tensor
    """Of the whole gradient, before it was clipped."""
    terms: dict[str, Tensor]
    """Each balance loss, unweighted."""
    gatings: dict[str, Gating]
    """Of each gated layer one with the statistics of the global batch."""
    shares: dict[str, Tensor]
    """Of assignments `dropped`, of tokens `unserved`; nothing without gated layers."""


class Update:
    """Makes updates of one model."""

    def __init__(
        self,
        *,
        model: LanguageModel,
        objective: Objective,
        optimizer: Together,
        clip_norm: float,
        exact_balance: bool,
        autocast: torch.dtype | None,
        seed: int,
        vocabulary_size: int,
        processes: Processes = ALONE,
    ):
        self.model, self.objective, self.optimizer, self.processes = model, objective, optimizer, processes
        self._clip_norm, self._exact_balance, self._autocast = clip_norm, exact_balance, autocast
        self._seed, self._largest_loss = seed, _EXPLODED * math.log(max(2, vocabulary_size))
        self._gradients = Gradients(model, processes)
        self._device = model.embedding_VD.device

    def __call__(self, batch: GlobalBatch, step: int, learning_rate: float) -> Updated:
        """Make the update of this step, unless its loss or gradient is not finite, and say what it saw."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with _float32_as_tf32(self._autocast is not None and self._device.type == "cuda"):
            seen = self._passes(batch, step)
        self._gradients.finish()
        norm = self._gradients.norm(self.optimizer)
        # The one place where the host waits for what the device found.
        nats_per_word, length = torch.stack([seen.nats / batch.num_words, norm.double()]).tolist()
        made = math.isfinite(length) and nats_per_word <= self._largest_loss
        if made:
            self.optimizer.clip(self._clip_norm, length)
            self.optimizer.step()
            self.model.adapt({layer: gating.statistics() for layer, gating in seen.gatings.items()})
        self.optimizer.zero_grad()
        return Updated(made, seen.nats, norm, seen.terms, seen.gatings, seen.shares)

    def _passes(self, batch: GlobalBatch, step: int) -> "_Seen":
        """Run every micro-batch forwards and backwards; the gradients are left in the parameters."""
        turns = [(number, self._micro_batch(batch, number)) for number in self.processes.turns(len(batch))]
        # With one micro-batch a process, or one in all, the statistics are summed between its forward pass and the
        # loss; with several a first pass collects them.
        exact = len(batch) == 1 or (self._exact_balance and bool(self.objective.balance))
        everywhere = self._collect(step, turns) if exact and len(turns) > 1 else None
        seen = _Seen(self._device)
        for place, (number, micro) in enumerate(turns):
            with self._seeded(step, number):
                nats, gatings = self.model(micro, derive_seed(self._seed, step, "negatives"))
            own = statistics(gatings) if number is not None else _nothing(statistics(gatings))
            if exact and everywhere is None:
                everywhere = sum_statistics(own, self.processes.everyone)
            share = micro.num_words / batch.num_words if number is not None else 0.0
            loss, values = self.objective(nats, batch.num_words, gatings, everywhere, share)
            if place + 1 == len(turns):
                self._gradients.expect()
            (loss if number is not None else 0 * loss).backward()
            seen.add(nats, gatings, own, values, share, counts=number is not None)
        seen.sum(self.processes, everywhere)
        return seen

    @torch.no_grad()
    def _collect(self, step: int, turns: list[tuple[int | None, MicroBatch]]) -> Statistics:
        """First pass of an accumulated batch: the gates' statistics of all its micro-batches."""
        total = None
        for number, micro in turns:
            with self._seeded(step, number):
                own = statistics(self.model.hidden(micro)[1])
            total = add(total, own if number is not None else _nothing(own))
        return sum_statistics(total, self.processes.everyone)

    def _micro_batch(self, batch: GlobalBatch, number: int | None) -> MicroBatch:
        return (batch.idle() if number is None else batch[number]).to(self._device)

    @contextlib.contextmanager
    def _seeded(self, step: int, number: int | None):
        """Noise and dropout depend on seed, step and micro-batch alone: the same in both passes, on any process."""
        seed = derive_seed(self._seed, step, number)
        # Not torch.manual_seed: on a CPU it notes a traceback for each kind of GPU, every time.
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":
            torch.cuda.manual_seed_all(seed)
        with torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None):
            yield


class _Seen:
    """What the passes of a step saw, of this process's micro-batches and then of all."""

    def __init__(self, device: torch.device):
        self.nats = torch.zeros((), dtype=torch.float64, device=device)
        self.terms: dict[str, Tensor] = {}
        self.gatings: dict[str, Gating] = {}
        self.shares: dict[str, Tensor] = {}
        self._statistics: Statistics | None = None
        self._last: dict[str, Tensor] = {}
        # Asked, dropped, tokens, unserved: plain numbers as long as they are, so that none waits for the device.
        self._counts: list[Tensor | int] = [0, 0, 0, 0]

    def add(
        self,
        nats: Tensor,
        gatings: Mapping[str, Gating],
        own: Statistics,
        values: Mapping[str, Tensor],
        share: float,
        counts: bool,
    ) -> None:
        """Add a micro-batch; one that does not count leaves only the form of what there is."""
        self.gatings = dict(gatings)
        self._statistics = add(self._statistics, own)
        self._last = {name: torch.as_tensor(value) for name, value in values.items()}
        self.terms = {name: self.terms.get(name, 0.0) + share * value for name, value in self._last.items()}
        if counts:
            self.nats += nats.detach()
            for gating in gatings.values():
                found = (gating.num_asked, gating.num_dropped, gating.num_tokens, gating.num_unserved())
                self._counts = [total + x for total, x in zip(self._counts, found, strict=True)]

    def sum(self, processes: Processes, everywhere: Statistics | None) -> None:
        """Make everything that of all processes; losses of global values are the same everywhere already."""
        everyone, terms = processes.everyone, list(self.terms)
        own = [self.nats, *self._counts, *(self.terms[name] for name in terms)]
        # Plain numbers are filled in: a copy of them would wait for all that a GPU has to do.
        own = [x.to(self.nats) if isinstance(x, Tensor) else self.nats.new_full((), x) for x in own]
        self.nats, asked, dropped, tokens, unserved, *values = everyone.sum_(torch.stack(own), STATISTICS)
        whole = sum_statistics(self._statistics or {}, everyone) if everywhere is None else everywhere
        self.terms = dict(zip(terms, values, strict=True)) if everywhere is None else self._last
        self.gatings = {layer: gating.with_statistics(whole[layer]) for layer, gating in self.gatings.items()}
        if self.gatings:
            self.shares = {"dropped": dropped / asked.clamp(min=1), "unserved": unserved / tokens.clamp(min=1)}


@contextlib.contextmanager
def _float32_as_tf32(allowed: bool):
    """Let a GPU's float32 products, those of gates, round their factors to TF32, as cuDNN's LSTM does by default.

    Its 10 bits of mantissa are 3 more than the autocast type's; the products take a third of the time.
    """
    products = torch.backends.cuda.matmul
    if not allowed or products.fp32_precision != "none":  # whoever has set it knows better
        yield
        return
    products.allow_tf32 = True
    try:
        yield
    finally:
        products.allow_tf32, products.fp32_precision = False, "none"


def _nothing(own: Statistics) -> Statistics:
    """Return statistics of no tokens, in the form of these."""
    return {layer: {name: torch.zeros_like(x) for name, x in part.items()} for layer, part in own.items()}
