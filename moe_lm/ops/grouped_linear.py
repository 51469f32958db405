"""Rows times the matrix of their group: what the second level of a hierarchical gate costs (Appendix B).

Shape suffixes: T rows, D inputs, E outputs, G groups.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lm.ops.backend import by_triton
from moe_lm.ops.grouped_gemm import InKernels
from moe_lm.ops.segments import segment_ends

_MOST_PADDING = 4
"""Padded rows for each row, at most, before the slower product without padding is taken."""


def grouped_product(x_TD: Tensor, weight_GDE: Tensor, group_T: Tensor) -> Tensor:
    """Return y_TE, row t being x_t W_g(t), differentiable in both; `group_T` (int64) ascends.

    No Python loop, and as many operators whatever the number of groups. On a CPU torch's grouped product (which loops
    inside) is the fastest: 0.4 to 0.9 of the padded one's time, forward and backward. On a GPU it has no fast form in
    float32, the type of all gating: our kernel makes it where factors may be rounded to TF32, else the groups are
    padded to the longest, for which the host waits, and make one batched product.
    """
    num_groups, width, _ = weight_GDE.shape
    ends_G = segment_ends(group_T, num_groups)
    grouped = weight_GDE.dtype == torch.float32  # torch's product takes no float64
    if grouped and by_triton(x_TD) and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return InKernels(ends_G, len(x_TD), torch.float32).differentiable(x_TD, weight_GDE)
    if grouped and not x_TD.is_cuda:
        return _unpadded(x_TD, weight_GDE, ends_G)
    starts_G = torch.cat([ends_G.new_zeros(1), ends_G[:-1]])
    longest = int((ends_G - starts_G).max())
    if grouped and num_groups * longest > _MOST_PADDING * len(x_TD):
        return _unpadded(x_TD, weight_GDE, ends_G)
    every_T, every_G = (torch.arange(count, device=group_T.device) for count in (len(x_TD), num_groups))
    place_T = every_T + (every_G * longest - starts_G).index_select(0, group_T)
    padded = x_TD.new_zeros(num_groups * longest, width).index_copy(0, place_T, x_TD)
    y = torch.bmm(padded.view(num_groups, longest, width), weight_GDE)
    return y.flatten(0, 1).index_select(0, place_T)


def _unpadded(x_TD: Tensor, weight_GDE: Tensor, ends_G: Tensor) -> Tensor:
    _, width, num_outputs = weight_GDE.shape
    if width % 4 or num_outputs % 4:  # torch's product wants rows of whole 16 bytes
        x_TD = F.pad(x_TD, (0, -width % 4))
        weight_GDE = F.pad(weight_GDE, (0, -num_outputs % 4, 0, -width % 4))
    y_TE = F.grouped_mm(_packed(x_TD), weight_GDE, offs=ends_G.to(torch.int32))
    if y_TE.requires_grad:
        y_TE.register_hook(_packed)
    return y_TE[:, :num_outputs]


def _packed(x: Tensor) -> Tensor:
    """Return x with the strides of fresh memory: torch's product refuses broadcast gradients and a row's odd ones."""
    return x.contiguous().view(-1).view(x.shape)
