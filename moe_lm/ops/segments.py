"""Rows sorted by whose they are: their order, where those of each end, how many they are, and their sums.

Shape suffixes: A rows, R runs, D width.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lm.ops.backend import by_triton


def stable_sort_below(x_A: Tensor, bound: int) -> tuple[Tensor, Tensor]:
    """Return these numbers, from 0 to below `bound`, ascending, and their places before, equal ones in order (int64).

    In as few bits as hold them: a radix sort makes a pass for each eight.
    """
    few = torch.int16 if bound <= 2**15 else torch.int32 if bound <= 2**31 else torch.int64
    sorted_A, order_A = x_A.to(few).sort(stable=True)
    return sorted_A.long(), order_A


def segment_ends(of_A: Tensor, num_runs: int) -> Tensor:
    """Return where in the ascending `of_A` the rows of each number end (int64, R).

    Not by bincount: on a GPU that waits for the counts.
    """
    return torch.searchsorted(of_A, torch.arange(num_runs, device=of_A.device), right=True)


def segment_sizes(of_A: Tensor, num_runs: int) -> Tensor:
    """Return how often each number stands in the ascending `of_A` (int64, R)."""
    ends_R = segment_ends(of_A, num_runs)
    return ends_R.diff(prepend=ends_R.new_zeros(1))


def segment_sum(x: Tensor, of_A: Tensor, num_runs: int) -> Tensor:
    """Return the sums of the rows (A, D), or numbers (A), of each one in the ascending `of_A`; differentiable in x."""
    if by_triton(x) and x.dtype == torch.float32:
        return _Sums.apply(x, of_A, num_runs)
    return x.new_zeros(num_runs, *x.shape[1:]).index_add(0, of_A, x)


class _Sums(torch.autograd.Function):
    """Not by a GPU's additions to few rows, which wait for one another."""

    @staticmethod
    def forward(ctx, x, of_A, num_runs):
        from moe_lm.ops import triton_rows  # Triton is not everywhere, and slow to import

        ctx.save_for_backward(of_A)
        ends_R = segment_ends(of_A, num_runs)
        if x.dim() == 1:
            return triton_rows.summed_numbers(x, ends_R)
        return triton_rows.summed_runs(x, torch.arange(len(of_A), device=of_A.device), ends_R)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (of_A,) = ctx.saved_tensors
        return grad.index_select(0, of_A), None, None
