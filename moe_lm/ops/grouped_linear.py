"""Rows times the matrix of their group: the second level of a hierarchical gate (Appendix B).

Shape suffixes: T rows, D inputs, E outputs, G groups.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lm.ops.grouped_gemm import ExpertRows
from moe_lm.ops.operation import operation, triton_runs
from moe_lm.ops.routing import segment_ends

_MAX_PADDING = 4
"""Largest ratio of padded rows to rows; beyond it the slower product without padding runs."""


@operation
def grouped_linear(x_TD: Tensor, weight_GDE: Tensor, group_T: Tensor) -> Tensor:
    """Return y_TE with y_t = x_t W_g(t), differentiable in x and W; `group_T` (int64) ascends.

    No version loops over groups in Python. On a CPU `F.grouped_mm` takes 0.4 to 0.9 of the padded product's time,
    forward and backward. On a GPU it is not fast for float32, the type of all gates: a Triton kernel runs where factors
    may be rounded to TF32; otherwise groups are padded to the longest, and the host waits for its length.
    """
    return torch.bmm(x_TD.unsqueeze(1), weight_GDE.index_select(0, group_T)).squeeze(1)


def _by_kernel(x_TD: Tensor, weight_GDE: Tensor, group_T: Tensor) -> Tensor:
    from moe_lm.ops.triton.grouped_gemm import differentiable_grouped_mm  # Triton is not installed everywhere

    ends_G = segment_ends(group_T, len(weight_GDE))
    return differentiable_grouped_mm(x_TD, weight_GDE, ExpertRows(ends_G, len(x_TD)))


def _unpadded(x_TD: Tensor, weight_GDE: Tensor, group_T: Tensor) -> Tensor:
    num_groups, width, num_outputs = weight_GDE.shape
    if width % 4 or num_outputs % 4:  # `F.grouped_mm` takes rows of whole 16 bytes
        x_TD = F.pad(x_TD, (0, -width % 4))
        weight_GDE = F.pad(weight_GDE, (0, -num_outputs % 4, 0, -width % 4))
    ends_G = segment_ends(group_T, num_groups)
    y_TE = F.grouped_mm(_dense(x_TD), weight_GDE, offs=ends_G.to(torch.int32))
    if y_TE.requires_grad:
        y_TE.register_hook(_dense)
    return y_TE[:, :num_outputs]


def _padded(x_TD: Tensor, weight_GDE: Tensor, group_T: Tensor) -> Tensor:
    num_groups, width, _ = weight_GDE.shape
    ends_G = segment_ends(group_T, num_groups)
    starts_G = torch.cat([ends_G.new_zeros(1), ends_G[:-1]])
    longest = int((ends_G - starts_G).max())
    if weight_GDE.dtype == torch.float32 and num_groups * longest > _MAX_PADDING * len(x_TD):
        return _unpadded(x_TD, weight_GDE, group_T)
    every_T, every_G = (torch.arange(count, device=group_T.device) for count in (len(x_TD), num_groups))
    place_T = every_T + (every_G * longest - starts_G).index_select(0, group_T)
    padded = x_TD.new_zeros(num_groups * longest, width).index_copy(0, place_T, x_TD)
    y = torch.bmm(padded.view(num_groups, longest, width), weight_GDE)
    return y.flatten(0, 1).index_select(0, place_T)


def _dense(x: Tensor) -> Tensor:
    """Return x with fresh strides: `F.grouped_mm` refuses broadcast gradients, and odd strides of a single row."""
    return x.contiguous().view(-1).view(x.shape)


def _kernel_runs(x_TD: Tensor, weight_GDE: Tensor, _: Tensor) -> bool:
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return tf32 and weight_GDE.dtype == torch.float32 and triton_runs(x_TD)


def _grouped_mm_runs(x_TD: Tensor, weight_GDE: Tensor, _: Tensor) -> bool:
    return weight_GDE.dtype == torch.float32 and not x_TD.is_cuda  # `F.grouped_mm` takes no float64


grouped_linear.register(_by_kernel, when=_kernel_runs)
grouped_linear.register(_unpadded, when=_grouped_mm_runs)
grouped_linear.register(_padded, when=lambda *_: True)
