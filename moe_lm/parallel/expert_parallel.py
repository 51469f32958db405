"""Experts sharded over processes: tokens travel to their experts and back (section 3.1).

Each process keeps the gates and routes its own tokens. An expert gets the tokens of all processes at once, so its batch
does not shrink as processes are added.

Shape suffixes: T tokens, A assignments of this process, R rows received, D width, E experts of all processes,
P processes, L experts held here.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lm.gate import Gating
from moe_lm.model.moe import Experts
from moe_lm.ops.experts import grouped_mlp, products_dtype
from moe_lm.ops.routing import segment_sizes, stable_sort_below
from moe_lm.ops.token_dispatch import combine, dispatch
from moe_lm.parallel.group import Shard

_ROWS, _COUNTS = "tokens", "counts"
"""Purposes by which a group counts the bytes it sends: rows of tokens, and their numbers."""


class ExpertParallelExperts(Experts):
    """Experts of which this process holds a shard; `forward` takes part in an all-to-all of the shard's group."""

    def __init__(self, experts: Experts, shard: Shard):
        super().__init__(
            width=experts.width,
            hidden=experts.hidden,
            num_experts=experts.num_experts,
            group_size=experts.group_size,
            held=shard.rows,
            output_init_scale=experts.output_init_scale,
            identical=experts.identical,
        )
        self.recompute, self.shard = experts.recompute, shard

    def forward(self, x_TD: Tensor, gating: Gating) -> Tensor:
        """Return y_TD = sum_i G(x)_i E_i(x) over a token's experts, wherever they are."""
        x_AD = dispatch(x_TD, gating.token_A).to(products_dtype(x_TD))  # half the bytes to send under autocast
        y_AD = self._routed(x_AD, gating.expert_A)
        return combine(y_AD, gating.token_A, gating.gate_A, gating.num_tokens)

    def _routed(self, x_AD: Tensor, expert_A: Tensor) -> Tensor:
        """Return the expert output of each row, computed by the process that holds the expert."""
        group = self.shard.group
        sent, received, received_PL = _row_counts(expert_A, self.shard)
        x_RD = group.all_to_all(x_AD, sent, received, _ROWS)
        # Rows arrive by process, then by expert; products take them by expert, then by process.
        expert_PL = torch.arange(self.shard.size, device=x_AD.device).repeat(group.size)
        expert_R = expert_PL.repeat_interleave(received_PL.reshape(-1), output_size=sum(received))
        expert_R, order_R = stable_sort_below(expert_R, self.shard.size)
        inverse_R = torch.empty_like(order_R)
        inverse_R[order_R] = torch.arange(len(order_R), device=order_R.device)
        x_RD = _Permute.apply(x_RD, order_R, inverse_R)
        y_RD = grouped_mlp(x_RD, expert_R, self.w1_EDH, self.w2_EHD, recompute=self.recompute)
        return group.all_to_all(_Permute.apply(y_RD, inverse_R, order_R), received, sent, _ROWS)


def _row_counts(expert_A: Tensor, shard: Shard) -> tuple[list[int], list[int], Tensor]:
    """Return the numbers of rows sent to each process and received from each, and the latter by expert (P, L)."""
    counts_E = segment_sizes(expert_A, shard.total)
    sizes = list(shard.sizes)
    received = shard.group.all_to_all(counts_E, sizes, [shard.size] * len(sizes), _COUNTS)
    received_PL = received.view(shard.group.size, shard.size)
    sent_P = torch.stack([part.sum() for part in counts_E.split(sizes)])
    # One device synchronisation for both lists, which the backend needs before it sends.
    sent, taken = torch.stack([sent_P, received_PL.sum(dim=1)]).tolist()
    return sent, taken, received_PL


class _Permute(torch.autograd.Function):
    """Rows in another order; the gradient is a gather too, where autograd would scatter and add."""

    @staticmethod
    def forward(ctx, x_RD, order_R, inverse_R):
        ctx.save_for_backward(inverse_R)
        return x_RD.index_select(0, order_R)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RD):
        return grad_RD.index_select(0, ctx.saved_tensors[0]), None, None
