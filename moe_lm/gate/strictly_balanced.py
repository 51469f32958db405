"""Strictly balanced gating (Appendix F): in training every expert takes equally many tokens of the batch.

Shape suffixes: T tokens, D width, E experts (of a group), A assignments, G groups.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from moe_lm.gate import Gating, checked_k
from moe_lm.grouped_product import grouped_product


class StrictlyBalanced(nn.Module):
    """G(x)_i = G_sigma(x)_i M(G_sigma(x))_i / sum_j G_sigma(x)_j M(G_sigma(x))_j, G_sigma(x) = Softmax(x W_g).

    M is the batchwise mask in training, which looks at all tokens of the call, and the threshold mask in
    evaluation, G_sigma(x)_i > T_i, which looks at one. A token may get more than k experts, fewer, or none. Learning
    T takes the loss `needs_loss`; it reads two additive sums, left in training only: `threshold_gap`,
    sum_j sum_i (M_threshold - M_batchwise)(G_sigma(x_j)_i - T_i), and `num_tokens`.
    """

    needs_loss: ClassVar[str] = "batchwise"

    def __init__(self, *, width: int, num_experts: int, k: int, num_groups: int | None = None):
        super().__init__()
        self.k, self.num_groups, self.num_experts = checked_k(k, num_experts), num_groups, num_experts
        groups = () if num_groups is None else (num_groups,)
        # Not zero, as no noise tells the experts apart: of equal gate values all would take the same tokens. Small,
        # so that at first a token's experts count about equally.
        self.gate_DE = nn.Parameter(torch.empty(*groups, width, num_experts).normal_(std=0.01))
        # Where the gate values of such a W_g lie: no threshold has far to go, and the loss starts near 0.
        self.threshold_E = nn.Parameter(torch.full(((num_groups or 1) * num_experts,), 1 / num_experts))

    def forward(self, x_TD: Tensor, group_T: Tensor | None = None) -> Gating:
        """Assign tokens to experts; float32 arithmetic whatever the autocast type."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return self._gating(x_TD.to(self.gate_DE.dtype), group_T)

    def operations_per_timestep(self) -> int:
        """One matrix; the thresholds only compare."""
        return self.gate_DE.numel() // (self.num_groups or 1)

    def _gating(self, x_TD: Tensor, group_T: Tensor | None) -> Gating:
        if group_T is None:
            logit_TE, threshold_TE = x_TD @ self.gate_DE, self.threshold_E
        else:
            logit_TE = grouped_product(x_TD, self.gate_DE, group_T)
            threshold_TE = self.threshold_E.view(-1, self.num_experts).index_select(0, group_T)
        gate_TE = logit_TE.softmax(dim=1)
        mask_TE, sums = gate_TE > threshold_TE, {}
        if self.training:
            above_TE, mask_TE = mask_TE, batchwise_mask(gate_TE.detach(), self.k, group_T)
            surplus_TE = above_TE.to(gate_TE.dtype) - mask_TE.to(gate_TE.dtype)
            sums["threshold_gap"] = (surplus_TE * (gate_TE - threshold_TE)).sum()
            sums["num_tokens"] = gate_TE.new_full((), x_TD.shape[0])
        return self._assigned(logit_TE, mask_TE, group_T, sums)

    def _assigned(self, logit_TE: Tensor, mask_TE: Tensor, group_T: Tensor | None, sums: dict[str, Tensor]) -> Gating:
        column_A, token_A = mask_TE.t().nonzero(as_tuple=True)
        expert_A = column_A
        if group_T is not None:
            expert_A, order_A = (group_T.index_select(0, token_A) * self.num_experts + column_A).sort(stable=True)
            column_A, token_A = column_A.index_select(0, order_A), token_A.index_select(0, order_A)
        share_TE = masked_softmax(logit_TE, mask_TE)
        gate_A = share_TE.reshape(-1).index_select(0, token_A * self.num_experts + column_A)
        zeros_E = logit_TE.new_zeros(self.threshold_E.numel())
        return Gating(
            token_A=token_A,
            expert_A=expert_A,
            gate_A=gate_A,
            num_tokens=logit_TE.shape[0],
            importance_E=zeros_E.index_add(0, expert_A, gate_A),
            load_E=zeros_E.index_add(0, expert_A, torch.ones_like(gate_A.detach())),
            num_asked=token_A.numel(),
            sums=sums,
        )


def masked_softmax(logit_TE: Tensor, mask_TE: Tensor) -> Tensor:
    """Softmax(logits) M / sum_j (Softmax(logits) M)_j where M = 1, also where Softmax(logits) underflows to 0.

    A row without any M = 1 keeps the whole softmax, as none of it is read: of -inf alone it would be NaN.
    """
    left_out_TE = ~mask_TE & mask_TE.any(dim=1, keepdim=True)
    return logit_TE.masked_fill(left_out_TE, -torch.inf).softmax(dim=1)


def batchwise_mask(x_TE: Tensor, k: int, group_T: Tensor | None = None) -> Tensor:
    """M_batchwise: each expert takes the m tokens, of its group's, with the largest x; of equal ones the earlier.

    m = k|X|/n of the |X| tokens and n experts to the nearest whole number (a half upwards), at least 1. So a token
    gets k experts on average, or more where there are fewer than n/k tokens.
    """
    x_ET = x_TE.t().contiguous()
    return (_top_m(x_ET, k) if group_T is None else _top_m_of_groups(x_ET, k, group_T)).t()


def _top_m(x_ET: Tensor, k: int) -> Tensor:
    num_experts, num_tokens = x_ET.shape
    m = min(max(_nearest(k * num_tokens, num_experts), 1), num_tokens)
    # Not the indices: which of equal values topk takes is not promised. (It takes a tenth of a sort's time.)
    least_E1 = x_ET.topk(m, dim=1).values[:, -1:]
    above_ET, equal_ET = x_ET > least_E1, x_ET == least_E1
    left_E1 = m - above_ET.sum(dim=1, keepdim=True)
    return above_ET | (equal_ET & (equal_ET.cumsum(dim=1) <= left_E1))


def _top_m_of_groups(x_ET: Tensor, k: int, group_T: Tensor) -> Tensor:
    """Sorts by value and then, stably, by group: place t of every expert's row then belongs to group_T[t]."""
    num_experts, num_tokens = x_ET.shape
    order_ET = x_ET.argsort(dim=1, descending=True, stable=True)
    by_group_ET = group_T.expand_as(order_ET).gather(1, order_ET).argsort(dim=1, stable=True)
    order_ET = order_ET.gather(1, by_group_ET)
    start_T, end_T = torch.searchsorted(group_T, group_T), torch.searchsorted(group_T, group_T, right=True)
    rank_T = torch.arange(num_tokens, device=group_T.device) - start_T
    taken_T = rank_T < _nearest(k * (end_T - start_T), num_experts).clamp(min=1)
    return torch.zeros_like(x_ET, dtype=torch.bool).scatter(1, order_ET, taken_T.expand_as(order_ET))


def _nearest(dividend: int | Tensor, divisor: int) -> int | Tensor:
    return (dividend + divisor // 2) // divisor
