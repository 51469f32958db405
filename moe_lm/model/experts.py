"""The experts: one feed-forward network each, ReLU between two matrices, no biases (Appendix C.1).

Shape suffixes: T tokens, A assignments, D width, H expert hidden, E experts.
"""

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_lm.gate import Gating
from moe_lm.model.init import initialize_experts_
from moe_lm.ops.dispatch import combine, dispatch
from moe_lm.ops.experts_grouped import experts_grouped
from moe_lm.ops.experts_loop import experts_loop
from moe_lm.ops.grouped_gemm import grouped_by
from moe_lm.ops.segments import segment_ends
from moe_lm.parallel.context import SINGLE_PROCESS, ParallelContext
from moe_lm.parallel.expert_parallel import expert_parallel_forward
from moe_lm.parallel.group import Shard, shard_rows


class Experts(nn.Module):
    """E_i(x) = ReLU(x W1_i) W2_i, and the sum of their answers; all experts' matrices are one tensor each.

    With several processes each holds its `share` of the experts, `together` of them always on the same one where that
    can be, and rows travel to their expert and back.
    """

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        num_experts: int,
        parallel: ParallelContext = SINGLE_PROCESS,
        together: int = 1,
    ):
        super().__init__()
        self.recompute = False
        """Whether the hidden activations h_AH are made anew in the backward pass instead of kept (Appendix D)."""
        self.together = together
        self.share: Shard = shard_rows(num_experts, parallel.experts, together)
        self.w1_EDH = nn.Parameter(torch.empty(self.share.size, width, hidden))
        self.w2_EHD = nn.Parameter(torch.empty(self.share.size, hidden, width))
        initialize_experts_(self.w1_EDH, math.sqrt(2 / width), self.share.rows)
        initialize_experts_(self.w2_EHD, math.sqrt(1 / hidden), self.share.rows)

    def forward(self, x_TD: Tensor, gating: Gating) -> Tensor:
        """Return y_TD = sum over a token's assignments of G(x)_i E_i(x) (eq. 1); a token without any gets zeros."""
        if self.share.group.size > 1:
            return combine(self._exchanged(dispatch(x_TD, gating), gating.expert_A), gating)
        dtype = self._product_type(x_TD, len(gating.token_A))
        if dtype is None:
            return self._looped(x_TD, gating.token_A, gating.expert_A, gating.gate_A)
        assignments = gating.token_A, gating.gate_A, self._ends(gating.expert_A)
        return experts_grouped(x_TD, *assignments, self.w1_EDH, self.w2_EHD, dtype, recompute=self.recompute)

    def operations_per_row(self) -> int:
        """Multiply-adds one expert costs for one token."""
        return 2 * self.w1_EDH.shape[1] * self.w1_EDH.shape[2]

    def _exchanged(self, x_AD: Tensor, expert_A: Tensor) -> Tensor:
        """Return the answers of experts on all processes."""
        if x_AD.is_cuda and torch.is_autocast_enabled("cuda"):
            x_AD = x_AD.to(torch.get_autocast_dtype("cuda"))  # half the bytes to send; the products cast it anyway
        return expert_parallel_forward(x_AD, expert_A, self.share, self._answers)

    def _answers(self, x_AD: Tensor, expert_A: Tensor) -> Tensor:
        """Return the answers of the experts here, unweighted; `expert_A` (int64, ascending) says whose row each is."""
        if self.share.size == 0:
            return x_AD  # no rows: more processes than experts
        dtype = self._product_type(x_AD, len(x_AD))
        if dtype is None:
            every_A = torch.arange(len(x_AD), device=x_AD.device)
            return self._looped(x_AD, every_A, expert_A, self.w1_EDH.new_ones(len(x_AD)))
        return grouped_products(x_AD, self._ends(expert_A), self.w1_EDH, self.w2_EHD, dtype, recompute=self.recompute)

    def _looped(self, x_TD: Tensor, token_A: Tensor, expert_A: Tensor, gate_A: Tensor) -> Tensor:
        same, weights = x_TD.to(self.w1_EDH.dtype), (self.w1_EDH, self.w2_EHD)
        gate_A = gate_A.to(self.w1_EDH.dtype)
        y_TD = experts_loop(same, token_A, gate_A, self._ends(expert_A), *weights, recompute=self.recompute)
        return y_TD.to(x_TD.dtype)

    def _product_type(self, x: Tensor, num_rows: int) -> torch.dtype | None:
        """Return the type of grouped products, None where they are looped."""
        # Grouped GEMM wants rows of 16 bytes, and some: all may be dropped, a process among several be sent none.
        _, width, hidden = self.w1_EDH.shape
        fits = width % 8 == 0 and hidden % 8 == 0 and num_rows > 0
        grouped = fits and x.is_cuda and torch.is_autocast_enabled("cuda")
        return torch.get_autocast_dtype("cuda") if grouped else None

    def _ends(self, expert_A: Tensor) -> Tensor:
        """Return where each expert's rows end."""
        return segment_ends(expert_A, self.share.size)


def set_recompute(model: nn.Module, on: bool) -> None:
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
    arguments = x_AD, ends_E, w1_EDH, w2_EHD, dtype, recompute
    if recompute:
        return checkpoint(_grouped, *arguments, use_reentrant=False, preserve_rng_state=False)
    return _grouped(*arguments)


def _grouped(x_AD: Tensor, ends_E: Tensor, w1_EDH: Tensor, w2_EHD: Tensor, dtype: torch.dtype, sparing: bool) -> Tensor:
    by = grouped_by(ends_E, len(x_AD), dtype, sparing=sparing)
    h_AH = by.differentiable(x_AD.to(dtype), w1_EDH).relu()
    return by.differentiable(h_AH, w2_EHD)
