"""The experts: one feed-forward network each, ReLU between two matrices, no biases (Appendix C.1).

Shape suffixes: A assignments, D width, H expert hidden, E experts.
"""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moe_lm.distributed import ALONE, Processes
from moe_lm.expert_parallel import at_their_experts
from moe_lm.group import Share, divided
from moe_lm.initial import initialize_experts_


class Experts(nn.Module):
    """E_i(x) = ReLU(x W1_i) W2_i for rows grouped by expert; all experts' matrices are one tensor each.

    With several processes each holds its `share` of the experts, `together` of them always on the same one where that
    can be, and rows travel to their expert and back.
    """

    def __init__(self, *, width: int, hidden: int, num_experts: int, processes: Processes = ALONE, together: int = 1):
        super().__init__()
        self.recompute = False
        """Whether the hidden activations h_AH are made anew in the backward pass instead of kept (Appendix D)."""
        self.together = together
        self.share: Share = divided(num_experts, processes.experts, together)
        self.w1_EDH = nn.Parameter(torch.empty(self.share.size, width, hidden))
        self.w2_EHD = nn.Parameter(torch.empty(self.share.size, hidden, width))
        initialize_experts_(self.w1_EDH, math.sqrt(2 / width), self.share.rows)
        initialize_experts_(self.w2_EHD, math.sqrt(1 / hidden), self.share.rows)

    def forward(self, x_AD: Tensor, expert_A: Tensor) -> Tensor:
        """Return y_AD; `expert_A` (int64, ascending) says whose row each is."""
        if self.share.group.size == 1:
            return self._products(x_AD, expert_A)
        if x_AD.is_cuda and torch.is_autocast_enabled("cuda"):
            x_AD = x_AD.to(torch.get_autocast_dtype("cuda"))  # half the bytes to send; the products cast it anyway
        return at_their_experts(x_AD, expert_A, self.share, self._products)

    def operations_per_row(self) -> int:
        """Multiply-adds one expert costs for one token."""
        return 2 * self.w1_EDH.shape[1] * self.w1_EDH.shape[2]

    def _products(self, x_AD: Tensor, expert_A: Tensor) -> Tensor:
        num_experts, width, hidden = self.w1_EDH.shape
        if num_experts == 0:
            return x_AD  # no rows: more processes than experts
        # Not bincount: on a GPU that waits for the counts.
        every_E = torch.arange(num_experts, device=expert_A.device)
        ends_E = torch.searchsorted(expert_A, every_E, right=True)
        # Grouped GEMM wants rows of 16 bytes, and some: a process among several may be sent none.
        fits = width % 8 == 0 and hidden % 8 == 0 and len(x_AD) > 0
        if fits and x_AD.is_cuda and torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            return grouped_products(x_AD, ends_E, self.w1_EDH, self.w2_EHD, dtype, recompute=self.recompute)
        same = x_AD.to(self.w1_EDH.dtype)
        return _LoopedProducts.apply(same, ends_E, self.w1_EDH, self.w2_EHD, self.recompute).to(x_AD.dtype)


def recompute_hidden(model: nn.Module, on: bool) -> None:
    """Set for all experts of a model whether their hidden activations are made anew in the backward pass."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.recompute = on


def grouped_products(
    x_AD: Tensor, ends_E: Tensor, w1_EDH: Tensor, w2_EHD: Tensor, dtype: torch.dtype, *, recompute: bool = False
) -> Tensor:
    """Both products as grouped GEMM: no launch per expert and no wait for the counts.

    `recompute` keeps the arguments alone for the backward pass, neither h_AH nor anything cast to `dtype`.
    """
    arguments = x_AD, ends_E.to(torch.int32), w1_EDH, w2_EHD, dtype
    if recompute:
        return checkpoint(_grouped, *arguments, use_reentrant=False, preserve_rng_state=False)
    return _grouped(*arguments)


def _grouped(x_AD: Tensor, ends_E: Tensor, w1_EDH: Tensor, w2_EHD: Tensor, dtype: torch.dtype) -> Tensor:
    h_AH = F.grouped_mm(x_AD.to(dtype), w1_EDH.to(dtype), offs=ends_E).relu()
    return F.grouped_mm(h_AH, w2_EHD.to(dtype), offs=ends_E)


class _LoopedProducts(torch.autograd.Function):
    """Both products, expert by expert, into slices of one result: autograd sees one node, not thousands.

    (Indexing the stacked weights inside autograd would cost a full-size gradient per expert.) What one expert makes of
    its rows is used up while it is in the cache. With `recompute` h_AH is not kept: the same results bit for bit, and
    one expert's hidden rows exist at a time.
    """

    @staticmethod
    def forward(ctx, x_AD, ends_E, w1_EDH, w2_EHD, recompute):
        sizes, hidden = _sizes(ends_E), w1_EDH.shape[2]
        y_AD = torch.empty_like(x_AD)
        h_AH = None if recompute else x_AD.new_empty(x_AD.shape[0], hidden)
        h_parts = _parts_in_one_place(x_AD, sizes, hidden) if recompute else h_AH.split(sizes)
        rows = zip(x_AD.split(sizes), h_parts, y_AD.split(sizes), strict=True)
        for (x, h, y), w1, w2 in zip(rows, w1_EDH.unbind(), w2_EHD.unbind(), strict=True):
            torch.mm(x, w1, out=h)
            torch.mm(h.relu_(), w2, out=y)
        ctx.save_for_backward(x_AD, h_AH, w1_EDH, w2_EHD)
        ctx.sizes = sizes
        return y_AD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_AD):
        x_AD, h_AH, w1_EDH, w2_EHD = ctx.saved_tensors
        sizes, hidden, grad_AD = ctx.sizes, w1_EDH.shape[2], grad_AD.contiguous()
        grad_x_AD = torch.empty_like(x_AD)
        # An empty product writes zeros, so an expert without tokens gets a gradient of zero, not garbage.
        grad_w1_EDH, grad_w2_EHD = torch.empty_like(w1_EDH), torch.empty_like(w2_EHD)
        h_parts = _parts_in_one_place(x_AD, sizes, hidden) if h_AH is None else h_AH.split(sizes)
        grad_h_parts = _parts_in_one_place(x_AD, sizes, hidden)
        parts = (x_AD.split(sizes), h_parts, grad_AD.split(sizes), grad_h_parts, grad_x_AD.split(sizes))
        weights = zip(w1_EDH.unbind(), w2_EHD.unbind(), grad_w1_EDH.unbind(), grad_w2_EHD.unbind(), strict=True)
        rows = zip(*parts, strict=True)
        for (x, h, grad, grad_h, grad_x), (w1, w2, grad_w1, grad_w2) in zip(rows, weights, strict=True):
            if h_AH is None:
                torch.mm(x, w1, out=h).relu_()
            torch.mm(h.t(), grad, out=grad_w2)
            torch.mm(grad, w2.t(), out=grad_h)
            torch.ops.aten.threshold_backward.grad_input(grad_h, h, 0, grad_input=grad_h)
            torch.mm(grad_h, w1.t(), out=grad_x)
            torch.mm(x.t(), grad_h, out=grad_w1)
        return grad_x_AD, None, grad_w1_EDH, grad_w2_EHD, None


def _parts_in_one_place(x_AD: Tensor, sizes: list[int], hidden: int) -> list[Tensor]:
    """Return each expert's (rows, hidden) as a view of the same memory, as large as the largest.

    A product's last bits depend on how its memory is aligned, so each view lies as far behind a multiple of 64 bytes
    (a cache line, at which torch's memory begins) as the expert's slice of a whole h_AH would.
    """
    line = 64 // x_AD.element_size()
    memory = x_AD.new_empty(max(sizes) * hidden + line)
    starts = itertools.accumulate(sizes, initial=0)
    return [
        memory.as_strided((size, hidden), (hidden, 1), start * hidden % line)
        for size, start in zip(sizes, starts, strict=False)
    ]


def _sizes(ends_E: Tensor) -> list[int]:
    ends = ends_E.tolist()
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
