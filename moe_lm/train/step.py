"""One update: the micro-batches of a step, on one process or many, to gradients and changed weights.

Every process takes micro-batches by turns. Statistics are summed over all of them before a loss reads them, gradients
before the optimizer does, so the update is that of the whole batch whatever the number of processes.
"""

import contextlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lm.data.batching import GlobalBatch
from moe_lm.data.micro_batch import MicroBatch
from moe_lm.gate import Gating
from moe_lm.loss.objective import Objective, Statistics, add, statistics
from moe_lm.model.language_model import LanguageModel
from moe_lm.optim import CompositeOptimizer
from moe_lm.parallel.context import SINGLE_PROCESS, ParallelContext
from moe_lm.parallel.grad_reduce import GradReducer, sum_statistics
from moe_lm.seeds import derive_seed
from moe_lm.train.accumulator import StepAccumulator, nothing
from moe_lm.train.later import Later

_EXPLODED = 10
"""A loss of as many times what guessing costs, log(vocabulary), is no loss to learn from."""


@dataclass(frozen=True)
class StepResult:
    """What an update saw and did, of the global batch: the same on each process."""

    decision: Later
    """Whether the weights changed: not where loss or gradient is not finite, or the loss exploded."""
    nats: Tensor
    """Summed over all predicted words (float64)."""
    norm: Tensor
    """Of the whole gradient, before it was clipped."""
    terms: dict[str, Tensor | float]
    """Each balance loss, unweighted."""
    gatings: dict[str, Gating]
    """Of each gated layer one with the statistics of the global batch."""
    shares: dict[str, Tensor]
    """Of assignments `dropped`, of tokens `unserved`, and `max_over_mean_tokens`: the busiest expert's, of the mean.

    The last is of all gated layers the mean. Nothing without gated layers.
    """

    @property
    def made(self) -> bool:
        """The decision; where a GPU has made it, the host waits for that."""
        return bool(self.decision.read())


class TrainStep:
    """Makes updates of one model."""

    def __init__(
        self,
        *,
        model: LanguageModel,
        objective: Objective,
        optimizer: CompositeOptimizer,
        clip_norm: float,
        exact_balance: bool,
        autocast: torch.dtype | None,
        seed: int,
        vocabulary_size: int,
        parallel: ParallelContext = SINGLE_PROCESS,
    ):
        self.model, self.objective, self.optimizer, self.parallel = model, objective, optimizer, parallel
        self._clip_norm, self._exact_balance, self._autocast = clip_norm, exact_balance, autocast
        self._seed, self._largest_loss = seed, _EXPLODED * math.log(max(2, vocabulary_size))
        self._gradients = GradReducer(model, parallel)
        self._device = model.embedding_VD.device

    def __call__(self, batch: GlobalBatch, step: int, learning_rate: float) -> StepResult:
        """Make the update of this step, unless its loss or gradient is not finite, and say what it saw."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with _float32_as_tf32(self._autocast is not None and self._device.type == "cuda"):
            seen = self._passes(batch, step)
        self._gradients.finish()
        norm = self._gradients.norm(self.optimizer)
        made = norm.isfinite() & (seen.nats / batch.num_words <= self._largest_loss)
        decision = Later(made)
        if self.optimizer.decides_on_device():
            self._change_where(made, norm, seen)
        elif decision.read():  # the host waits
            self.optimizer.clip(self._clip_norm, norm.item())
            self._change(seen)
        self.optimizer.zero_grad()
        return StepResult(decision, seen.nats, norm, seen.terms, seen.gatings, seen.shares)

    def _change(self, seen: StepAccumulator) -> None:
        self.optimizer.step()
        self.model.adapt({layer: gating.statistics() for layer, gating in seen.gatings.items()})

    def _change_where(self, made: Tensor, norm: Tensor, seen: StepAccumulator) -> None:
        """Leave it to the device whether anything changes: the host goes on to the next step."""
        self.optimizer.clip_on_device(self._clip_norm, norm, made)
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}  # what gates move
        self._change(seen)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(torch.where(made, buffer, before[name]))

    def _passes(self, batch: GlobalBatch, step: int) -> StepAccumulator:
        """Run every micro-batch forwards and backwards; the gradients are left in the parameters."""
        turns = [(number, self._micro_batch(batch, number)) for number in self.parallel.round_robin(len(batch))]
        # With one micro-batch a process, or one in all, the statistics are summed between its forward pass and the
        # loss; with several a first pass collects them.
        exact = len(batch) == 1 or (self._exact_balance and bool(self.objective.balance))
        global_stats = self._collect(step, turns) if exact and len(turns) > 1 else None
        seen = StepAccumulator(self._device)
        for place, (number, micro) in enumerate(turns):
            with self._seeded(step, number):
                nats, gatings = self.model(micro, derive_seed(self._seed, step, "negatives"))
            own = statistics(gatings) if number is not None else nothing(statistics(gatings))
            if exact and global_stats is None:
                global_stats = sum_statistics(own, self.parallel.world)
            share = micro.num_words / batch.num_words if number is not None else 0.0
            loss, values = self.objective(nats, batch.num_words, gatings, global_stats, share)
            if place + 1 == len(turns):
                self._gradients.expect()
            (loss if number is not None else 0 * loss).backward()
            seen.add(nats, gatings, own, values, share, counts=number is not None)
        seen.sum(self.parallel, global_stats)
        return seen

    @torch.no_grad()
    def _collect(self, step: int, turns: list[tuple[int | None, MicroBatch]]) -> Statistics:
        """First pass of an accumulated batch: the gates' statistics of all its micro-batches."""
        total = None
        for number, micro in turns:
            with self._seeded(step, number):
                own = statistics(self.model.hidden(micro)[1])
            total = add(total, own if number is not None else nothing(own))
        return sum_statistics(total, self.parallel.world)

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
