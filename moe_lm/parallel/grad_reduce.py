"""Gradients and gating statistics summed over processes; gradients overlap with the last backward pass.

Gradients are summed, not averaged: the objective divides by the global batch's words.

Shape suffixes: U unique rows, R rows received, V rows, D width.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from moe_lm.ops.routing import segment_sizes, stable_sort_below
from moe_lm.ops.sparse_rows import RowSparseParameter, SparseRowGrad, row_grad, set_row_grad, sum_duplicate_rows
from moe_lm.optim.composite import CompositeOptimizer
from moe_lm.parallel.context import SINGLE_PROCESS, ParallelContext
from moe_lm.parallel.group import Group

BUCKET_BYTES = 25 * 2**20
"""Size of a bucket of gradients: large enough to amortise latency, small enough to send the first one early."""

PURPOSE, ROWS, STATISTICS = "gradients", "rows", "statistics"
"""Purposes by which a group counts bytes: dense gradients, rows of vocabulary matrices, and gating statistics."""


class GradReducer:
    """Sums each parameter's gradient over the processes that hold the parameter."""

    def __init__(self, model: nn.Module, parallel: ParallelContext = SINGLE_PROCESS):
        self.parallel, named = parallel, dict(model.named_parameters())
        self._single = parallel.size == 1
        self._shards = {named[name]: shard for name, shard in parallel.shards.items()}
        self._by_rows = [
            p for p in named.values() if isinstance(p, RowSparseParameter) and p.sparse_grad and p not in self._shards
        ]
        self._buckets = list(self._make_buckets(model)) if parallel.size > 1 else []
        self._next = len(self._buckets)

    def expect(self) -> None:
        """Announce the step's last backward pass: from now on a bucket is sent as soon as it is complete."""
        self._next = 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)

    def finish(self) -> None:
        """Wait until every gradient is summed."""
        self._send_ready(all_ready=True)
        for bucket in self._buckets:
            bucket.wait()
        world = self.parallel.world
        if world.size > 1:
            for matrix in self._by_rows:
                if matrix.grad is not None:
                    world.all_reduce_(matrix.grad, PURPOSE)
                if (touched := row_grad(matrix)) is not None:
                    set_row_grad(matrix, merged(touched, world))

    def sum_(self, message: Tensor) -> Tensor:
        """Replace statistics by their sum over all processes; return them."""
        return message if self._single else self.parallel.world.all_reduce_(message, STATISTICS)

    def sum_statistics(self, statistics: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Return each gated layer's statistics summed over all processes, in one message."""
        if self._single or not statistics:
            return {layer: dict(part) for layer, part in statistics.items()}
        tensors = [x for part in statistics.values() for x in part.values()]
        message = self.sum_(torch.cat([x.double().reshape(-1) for x in tensors]))
        sums = iter(message.split([x.numel() for x in tensors]))
        return {
            layer: {name: next(sums).view_as(x).to(x.dtype) for name, x in part.items()}
            for layer, part in statistics.items()
        }

    def norm(self, optimizer: CompositeOptimizer) -> Tensor:
        """Return the global gradient norm of the whole model, the same bits on each process."""
        if not self._shards:
            return optimizer.norm()
        square = optimizer.norm(p for p in optimizer.parameters if p not in self._shards).square()
        for group in dict.fromkeys(shard.group for shard in self._shards.values()):  # in one order on every process
            part = optimizer.norm(p for p, shard in self._shards.items() if shard.group is group).square()
            world = self.parallel.world
            # Cast, because a process without rows has no gradients and a norm of another type.
            square = square + world.all_reduce_(part.to(square), STATISTICS) * (group.size / world.size)
        return square.sqrt()

    def _make_buckets(self, model: nn.Module) -> Iterable["_Bucket"]:
        """Yield buckets in the order in which a backward pass fills them: the layers reversed."""
        open_buckets: dict[Group, list[nn.Parameter]] = {}
        for parameter in reversed([p for p in model.parameters() if p not in set(self._by_rows)]):
            group = self._group_of(parameter)
            if group.size == 1 or parameter.numel() == 0:
                continue
            parameters = open_buckets.setdefault(group, [])
            size = sum(p.numel() * p.element_size() for p in [*parameters, parameter])
            if parameters and size > BUCKET_BYTES:
                yield self._watched(open_buckets.pop(group), group)
            open_buckets.setdefault(group, []).append(parameter)
        for group, parameters in open_buckets.items():
            yield self._watched(parameters, group)

    def _group_of(self, parameter: nn.Parameter) -> Group:
        shard = self._shards.get(parameter)
        if shard is None:
            return self.parallel.world
        return self.parallel.replicas if shard.group is self.parallel.experts else Group()

    def _watched(self, parameters: list[nn.Parameter], group: Group) -> "_Bucket":
        bucket = _Bucket(parameters, group)
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(lambda _: self._ready(bucket))
        return bucket

    def _ready(self, bucket: "_Bucket") -> None:
        bucket.missing -= 1
        self._send_ready()

    def _send_ready(self, all_ready: bool = False) -> None:
        """Send buckets in the same order on every process, whatever the order in which they fill."""
        while self._next < len(self._buckets) and (all_ready or self._buckets[self._next].missing == 0):
            self._buckets[self._next].send()
            self._next += 1


class _Bucket:
    """Gradients that are summed in one message."""

    def __init__(self, parameters: list[nn.Parameter], group: Group):
        self.parameters, self._group = parameters, group
        self.missing, self._work = 0, None

    def send(self) -> None:
        """Begin the sum; the gradients become views of the message."""
        first = self.parameters[0].grad
        if len(self.parameters) == 1 and first is not None and first.is_contiguous():
            self._work = self._group.all_reduce_async_(first, PURPOSE)
            return
        # A parameter without a gradient here sends zeros: the message must have the same length on every process.
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        message = torch.cat([grad.reshape(-1) for grad in grads])
        for parameter, part in zip(self.parameters, message.split([g.numel() for g in grads]), strict=True):
            if parameter.grad is not None:
                parameter.grad = part.view_as(parameter)
        self._work = self._group.all_reduce_async_(message, PURPOSE)

    def wait(self) -> None:
        """Wait for the sum."""
        if self._work is not None:
            self._work.wait()
            self._work = None


def merged(part: SparseRowGrad, group: Group) -> SparseRowGrad:
    """Return the sum of all processes' row gradients, the same bits on each.

    Process i mod n sums row i, which spreads the frequent words, at the beginning of the vocabulary, over the
    processes; then the sums are gathered. A row is sent once and its sum n - 1 times, which is less than sending all
    rows to all processes.
    """
    owner_U, order_U = stable_sort_below(part.row_U % group.size, group.size)
    given_P = segment_sizes(owner_U, group.size)
    given, taken = torch.stack([given_P, group.all_to_all_equal(given_P, ROWS)]).tolist()
    row_R = group.all_to_all_raw(part.row_U.index_select(0, order_U), given, taken, ROWS)
    value_RD = group.all_to_all_raw(part.value_UD.index_select(0, order_U), given, taken, ROWS)
    own = sum_duplicate_rows(row_R, value_RD)
    row_U, order_U = torch.cat(group.all_gather(own.row_U, ROWS)).sort()
    return SparseRowGrad(row_U, torch.cat(group.all_gather(own.value_UD, ROWS)).index_select(0, order_U))
