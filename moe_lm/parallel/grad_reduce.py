"""Gradients summed over processes, while the last backward pass still runs where that can be.

Summed, not averaged: the objective divides by the global batch's words, so the sum is the gradient of the whole batch.

Shape suffixes: U distinct rows, V rows, D width.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from moe_lm.ops.segments import segment_sizes, stable_sort_below
from moe_lm.ops.sparse_rows import SparseRowGrad, row_grad, set_row_grad, summed_rows
from moe_lm.optim import CompositeOptimizer
from moe_lm.parallel.context import SINGLE_PROCESS, ParallelContext
from moe_lm.parallel.group import Group, Shard

BUCKET_BYTES = 25 * 2**20
"""Gradients sent together: enough that a message is worth its start, few enough that the first leaves early."""

PURPOSE, ROWS, STATISTICS = "gradients", "rows", "statistics"
"""What the bytes are counted as: whole gradients, rows of the vocabulary's matrices, and sums of what gates saw."""


def shares_of(model: nn.Module) -> dict[str, Shard]:
    """Return, by name, which rows this process holds of each parameter that is divided over processes."""
    return {
        f"{prefix}.{name}" if prefix else name: module.share
        for prefix, module in model.named_modules()
        if isinstance(getattr(module, "share", None), Shard) and module.share.group.size > 1
        for name, _ in module.named_parameters(recurse=False)
    }


class GradReducer:
    """Makes each parameter's gradient the sum over all processes: of shared ones, over those that hold a copy."""

    def __init__(self, model: nn.Module, parallel: ParallelContext = SINGLE_PROCESS):
        self._parallel = parallel
        shares = shares_of(model)
        self._shares = {parameter: shares[name] for name, parameter in model.named_parameters() if name in shares}
        self._by_rows = [p for p in model.parameters() if hasattr(p, "row_grads") and p not in self._shares]
        self._buckets = list(self._cut(model)) if parallel.size > 1 else []
        self._next = len(self._buckets)

    def expect(self) -> None:
        """Say that the next backward pass is the step's last: from now on what is ready is sent."""
        self._next = 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)

    def finish(self) -> None:
        """Wait until every gradient is the sum."""
        self._send(all_ready=True)
        for bucket in self._buckets:
            bucket.wait()
        world = self._parallel.world
        if world.size > 1:
            for matrix in self._by_rows:
                if matrix.grad is not None:
                    world.all_reduce_(matrix.grad, PURPOSE)
                if (touched := row_grad(matrix)) is not None:
                    set_row_grad(matrix, merged(touched, world))

    def norm(self, optimizer: CompositeOptimizer) -> Tensor:
        """Return the norm of the whole model's gradient, the same bits on each process."""
        if not self._shares:
            return optimizer.norm()
        square = optimizer.norm(p for p in optimizer.parameters if p not in self._shares).square()
        for group in dict.fromkeys(share.group for share in self._shares.values()):  # in one order on every process
            part = optimizer.norm(p for p, share in self._shares.items() if share.group is group).square()
            world = self._parallel.world
            # Of the same kind everywhere: a process without rows has a norm of no gradients, a plain zero.
            square = square + world.all_reduce_(part.to(square), STATISTICS) * (group.size / world.size)
        return square.sqrt()

    def _cut(self, model: nn.Module) -> Iterable["_Bucket"]:
        """Yield buckets in the order in which a backward pass fills them, that of the layers reversed."""
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
        share = self._shares.get(parameter)
        if share is None:
            return self._parallel.world
        return self._parallel.replicas if share.group is self._parallel.experts else Group()

    def _watched(self, parameters: list[nn.Parameter], group: Group) -> "_Bucket":
        bucket = _Bucket(parameters, group)
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(lambda _: self._ready(bucket))
        return bucket

    def _ready(self, bucket: "_Bucket") -> None:
        bucket.missing -= 1
        self._send()

    def _send(self, all_ready: bool = False) -> None:
        """Send in one order on every process, whatever order gradients are ready in."""
        while self._next < len(self._buckets) and (all_ready or self._buckets[self._next].missing == 0):
            self._buckets[self._next].send()
            self._next += 1


class _Bucket:
    """Gradients that travel as one message."""

    def __init__(self, parameters: list[nn.Parameter], group: Group):
        self.parameters, self._group = parameters, group
        self.missing, self._work = 0, None

    def send(self) -> None:
        """Begin the sum; the gradients become views of the message."""
        first = self.parameters[0].grad
        if len(self.parameters) == 1 and first is not None and first.is_contiguous():
            self._work = self._group.all_reduce_async_(first, PURPOSE)
            return
        # One that no gradient reached here takes its place with zeros: the message is as long on each process.
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
    """Return the sum of all processes' gradients of rows, the same bits on each.

    Row i is summed by process i mod n, so that frequent words, which come first, are nobody's burden; then all get all
    sums. A row is sent once there and, summed, n - 1 times: less than all of them to all where processes share words.
    """
    owner_U, order_U = stable_sort_below(part.row_U % group.size, group.size)
    given_P = segment_sizes(owner_U, group.size)
    given, taken = torch.stack([given_P, group.all_to_all_equal(given_P, ROWS)]).tolist()
    row_R = group.all_to_all_raw(part.row_U.index_select(0, order_U), given, taken, ROWS)
    value_RD = group.all_to_all_raw(part.value_UD.index_select(0, order_U), given, taken, ROWS)
    own = summed_rows(row_R, value_RD)
    row_U, order_U = torch.cat(group.all_gather(own.row_U, ROWS)).sort()
    return SparseRowGrad(row_U, torch.cat(group.all_gather(own.value_UD, ROWS)).index_select(0, order_U))


def sum_statistics(statistics: Mapping[str, Mapping[str, Tensor]], group: Group) -> dict[str, dict[str, Tensor]]:
    """Return each gated layer's statistics summed over the group, in one message."""
    if group.size == 1 or not statistics:
        return {layer: dict(part) for layer, part in statistics.items()}
    tensors = [x for part in statistics.values() for x in part.values()]
    message = group.all_reduce_(torch.cat([x.double().reshape(-1) for x in tensors]), STATISTICS)
    sums = iter(message.split([x.numel() for x in tensors]))
    return {
        layer: {name: next(sums).view_as(x).to(x.dtype) for name, x in part.items()}
        for layer, part in statistics.items()
    }
