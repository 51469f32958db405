"""What the passes of an update saw: sums over micro-batches and processes.

Shape suffix: E experts.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moe_lm.gate import Gating
from moe_lm.loss.objective import Statistics, add
from moe_lm.ops.segments import segment_sizes
from moe_lm.parallel.context import ParallelContext
from moe_lm.parallel.grad_reduce import STATISTICS, sum_statistics
from moe_lm.train.metrics import peak


class StepAccumulator:
    """What the passes of a step saw, of this process's micro-batches and then of all."""

    def __init__(self, device: torch.device):
        self.nats = torch.zeros((), dtype=torch.float64, device=device)
        self.terms: dict[str, Tensor | float] = {}
        self.gatings: dict[str, Gating] = {}
        self.shares: dict[str, Tensor] = {}
        self._statistics: Statistics | None = None
        self._last: dict[str, Tensor | float] = {}
        # Asked, dropped, tokens, unserved: plain numbers as long as they are, so that none waits for the device.
        self._counts: list[Tensor | int] = [0, 0, 0, 0]
        self._taken: dict[str, Tensor] = {}
        """Of each layer the tokens that each expert took (E)."""

    def add(
        self,
        nats: Tensor,
        gatings: Mapping[str, Gating],
        own: Statistics,
        values: Mapping[str, Tensor | float],
        share: float,
        counts: bool,
    ) -> None:
        """Add a micro-batch; one that does not count leaves only the form of what there is."""
        self.gatings = dict(gatings)
        self._statistics = add(self._statistics, own)
        self._last = dict(values)
        self.terms = {name: self.terms.get(name, 0.0) + share * value for name, value in self._last.items()}
        for layer, gating in gatings.items():
            taken_E = segment_sizes(gating.expert_A, gating.num_experts) * int(counts)
            self._taken[layer] = self._taken.get(layer, 0) + taken_E
        if counts:
            self.nats += nats.detach()
            for gating in gatings.values():
                found = (gating.num_requested, gating.num_dropped, gating.num_tokens, gating.num_unrouted())
                self._counts = [total + x for total, x in zip(self._counts, found, strict=True)]

    def sum(self, parallel: ParallelContext, global_stats: Statistics | None) -> None:
        """Make everything that of all processes; losses of global values are the same everywhere already."""
        world, terms = parallel.world, list(self.terms)
        own = [self.nats, *self._counts, *(self.terms[name] for name in terms)]
        # Plain numbers, as a dense model's losses are, are filled in: a copy would wait for all that a GPU has to do.
        own = [x.to(self.nats) if isinstance(x, Tensor) else self.nats.new_full((), x) for x in own]
        taken = [taken_E.to(self.nats) for taken_E in self._taken.values()]
        sizes = [len(own), *map(len, taken)]
        summed, *taken = world.all_reduce_(torch.cat([torch.stack(own), *taken]), STATISTICS).split(sizes)
        self.nats, asked, dropped, tokens, unserved, *values = summed
        whole = sum_statistics(self._statistics or {}, world) if global_stats is None else global_stats
        self.terms = dict(zip(terms, values, strict=True)) if global_stats is None else self._last
        self.gatings = {layer: gating.with_statistics(whole[layer]) for layer, gating in self.gatings.items()}
        if self.gatings:
            self.shares = {
                "dropped": dropped / asked.clamp(min=1),
                "unserved": unserved / tokens.clamp(min=1),
                "max_over_mean_tokens": torch.stack([peak(taken_E) for taken_E in taken]).mean(),
            }


def nothing(own: Statistics) -> Statistics:
    """Return statistics of no tokens, in the form of these."""
    return {layer: {name: torch.zeros_like(x) for name, x in part.items()} for layer, part in own.items()}
