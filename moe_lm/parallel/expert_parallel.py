"""Experts divided over processes: tokens travel to their experts and back (section 3.1).

Each process keeps the gates and chooses for its own tokens; an expert gets the tokens of all processes at once, so that
its batch does not shrink with their number.

Shape suffixes: A assignments of this process, R rows received, D width, E experts of all, P processes, L experts here.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lm.ops.segments import segment_sizes, stable_sort_below
from moe_lm.parallel.group import Shard

PURPOSE, COUNTS = "tokens", "counts"
"""What the bytes are counted as: rows, and how many there are."""


def expert_parallel_forward(
    x_AD: Tensor, expert_A: Tensor, share: Shard, products: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return y_AD, each row made by `products` on the process of its expert; `expert_A` (int64) ascends.

    `products` gets the rows of the experts here, ascending by expert (then by process), and the experts' numbers here.
    """
    group = share.group
    given, taken, received_PL = _counts(expert_A, share)
    x_RD = group.all_to_all(x_AD, given, taken, PURPOSE)
    here_PL = torch.arange(share.size, device=x_AD.device).repeat(group.size)
    here_R = here_PL.repeat_interleave(received_PL.reshape(-1), output_size=sum(taken))
    # They came by process, then by expert.
    here_R, order_R = stable_sort_below(here_R, share.size)
    back_R = torch.empty_like(order_R)
    back_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    y_RD = _Permuted.apply(products(_Permuted.apply(x_RD, order_R, back_R), here_R), back_R, order_R)
    return group.all_to_all(y_RD, taken, given, PURPOSE)


def _counts(expert_A: Tensor, share: Shard) -> tuple[list[int], list[int], Tensor]:
    """Return how many rows go to each process, how many come from it, and of the latter how many for each expert."""
    counts_E = segment_sizes(expert_A, share.total)
    sizes = list(share.sizes)
    received = share.group.all_to_all(counts_E, sizes, [share.size] * len(sizes), COUNTS)
    received_PL = received.view(share.group.size, share.size)
    given_P = torch.stack([part.sum() for part in counts_E.split(sizes)])
    # One wait for the device, because a backend wants the sizes before it sends.
    given, taken = torch.stack([given_P, received_PL.sum(dim=1)]).tolist()
    return given, taken, received_PL


class _Permuted(torch.autograd.Function):
    """Rows in another order; its gradient is a gather too, where autograd would add."""

    @staticmethod
    def forward(ctx, x_RD, order_R, back_R):
        ctx.save_for_backward(back_R)
        return x_RD.index_select(0, order_R)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RD):
        return grad_RD.index_select(0, ctx.saved_tensors[0]), None, None
