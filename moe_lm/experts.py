"""The experts: one feed-forward network each, ReLU between two matrices, no biases (Appendix C.1).

Shape suffixes: A assignments, D width, H expert hidden, E experts.
"""

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Experts(nn.Module):
    """E_i(x) = ReLU(x W1_i) W2_i for rows grouped by expert; all experts' matrices are one tensor each."""

    def __init__(self, *, width: int, hidden: int, num_experts: int):
        super().__init__()
        self.w1_EDH = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.w2_EHD = nn.Parameter(torch.empty(num_experts, hidden, width))
        initialize_(self.w1_EDH, math.sqrt(2 / width))
        initialize_(self.w2_EHD, math.sqrt(1 / hidden))

    def forward(self, x_AD: Tensor, expert_A: Tensor) -> Tensor:
        """Return y_AD; `expert_A` (int64, ascending) says whose row each is."""
        num_experts, width, hidden = self.w1_EDH.shape
        # Not bincount: on a GPU that waits for the counts.
        every_E = torch.arange(num_experts, device=expert_A.device)
        ends_E = torch.searchsorted(expert_A, every_E, right=True)
        aligned = width % 8 == 0 and hidden % 8 == 0  # grouped GEMM wants rows of 16 bytes
        if aligned and x_AD.is_cuda and torch.is_autocast_enabled("cuda"):
            return grouped_products(x_AD, ends_E, self.w1_EDH, self.w2_EHD, torch.get_autocast_dtype("cuda"))
        return _LoopedProducts.apply(x_AD, ends_E, self.w1_EDH, self.w2_EHD)

    def operations_per_row(self) -> int:
        """Multiply-adds one expert costs for one token."""
        return self.w1_EDH[0].numel() + self.w2_EHD[0].numel()


def initialize_(weight: Tensor, deviation: float) -> None:
    """Draw uniformly with this standard deviation; the paper gives none (docs/design.md says why these)."""
    bound = deviation * math.sqrt(3)
    nn.init.uniform_(weight, -bound, bound)


def grouped_products(x_AD: Tensor, ends_E: Tensor, w1_EDH: Tensor, w2_EHD: Tensor, dtype: torch.dtype) -> Tensor:
    """Both products as grouped GEMM: no launch per expert and no wait for the counts."""
    offsets_E = ends_E.to(torch.int32)
    h_AH = F.grouped_mm(x_AD.to(dtype), w1_EDH.to(dtype), offs=offsets_E).relu()
    return F.grouped_mm(h_AH, w2_EHD.to(dtype), offs=offsets_E)


class _LoopedProducts(torch.autograd.Function):
    """Both products, expert by expert, into slices of one result: autograd sees one node, not thousands.

    (Indexing the stacked weights inside autograd would cost a full-size gradient per expert.)
    """

    @staticmethod
    def forward(ctx, x_AD, ends_E, w1_EDH, w2_EHD):
        sizes = _sizes(ends_E)
        h_AH = x_AD.new_empty(x_AD.shape[0], w1_EDH.shape[2])
        y_AD = torch.empty_like(x_AD)
        h_parts = h_AH.split(sizes)
        for x, w, h in zip(x_AD.split(sizes), w1_EDH.unbind(), h_parts, strict=True):
            torch.mm(x, w, out=h)
        h_AH.relu_()
        for h, w, y in zip(h_parts, w2_EHD.unbind(), y_AD.split(sizes), strict=True):
            torch.mm(h, w, out=y)
        ctx.save_for_backward(x_AD, h_AH, w1_EDH, w2_EHD)
        ctx.sizes = sizes
        return y_AD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_AD):
        x_AD, h_AH, w1_EDH, w2_EHD = ctx.saved_tensors
        sizes, grad_AD = ctx.sizes, grad_AD.contiguous()
        grad_h_AH, grad_x_AD = torch.empty_like(h_AH), torch.empty_like(x_AD)
        # An empty product writes zeros, so an expert without tokens gets a gradient of zero, not garbage.
        grad_w1_EDH, grad_w2_EHD = torch.empty_like(w1_EDH), torch.empty_like(w2_EHD)
        grad_parts, grad_h_parts = grad_AD.split(sizes), grad_h_AH.split(sizes)
        for grad, w, grad_h in zip(grad_parts, w2_EHD.unbind(), grad_h_parts, strict=True):
            torch.mm(grad, w.t(), out=grad_h)
        for h, grad, grad_w in zip(h_AH.split(sizes), grad_parts, grad_w2_EHD.unbind(), strict=True):
            torch.mm(h.t(), grad, out=grad_w)
        torch.ops.aten.threshold_backward.grad_input(grad_h_AH, h_AH, 0, grad_input=grad_h_AH)
        for grad_h, w, grad_x in zip(grad_h_parts, w1_EDH.unbind(), grad_x_AD.split(sizes), strict=True):
            torch.mm(grad_h, w.t(), out=grad_x)
        for x, grad_h, grad_w in zip(x_AD.split(sizes), grad_h_parts, grad_w1_EDH.unbind(), strict=True):
            torch.mm(x.t(), grad_h, out=grad_w)
        return grad_x_AD, None, grad_w1_EDH, grad_w2_EHD


def _sizes(ends_E: Tensor) -> list[int]:
    ends = ends_E.tolist()
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
