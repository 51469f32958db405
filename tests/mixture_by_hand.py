"""A mixture of experts an assignment at a time, and small ones to try.

Shape suffixes: T tokens, A assignments, D width, H hidden, E experts.
"""

import torch

from moe_lm.gate import Gating
from moe_lm.model.experts import Experts

WIDTH, HIDDEN = 8, 12
COUNTS = [[3, 0, 5, 1], [0, 0, 7, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 4, 0, 9], [6]]


def make(counts, dtype=torch.float64, width=WIDTH, hidden=HIDDEN):
    """Experts, fewer tokens than there are assignments (some without any), and the gating."""
    torch.manual_seed(0)
    experts = Experts(width=width, hidden=hidden, num_experts=len(counts)).to(dtype)
    num_tokens = max([*counts, 1]) + 2
    x_TD = torch.randn(num_tokens, width, dtype=dtype).requires_grad_()
    token_A = torch.cat([torch.randperm(num_tokens)[:count].sort().values for count in counts])
    expert_A = torch.tensor([e for e, count in enumerate(counts) for _ in range(count)], dtype=torch.int64)
    return experts, x_TD, gating_of(token_A, expert_A, torch.randn(len(token_A), dtype=dtype), num_tokens)


def gating_of(token_A, expert_A, gate_A, num_tokens):
    return Gating(
        token_A=token_A,
        expert_A=expert_A,
        gate_A=gate_A.requires_grad_(),
        num_tokens=num_tokens,
        importance_E=torch.zeros(1),
        load_E=torch.zeros(1),
        num_requested=len(token_A),
    )


def by_row(x_AD, expert_A, w1_EDH, w2_EHD):
    """ReLU(x W1) W2, a row at a time."""
    rows = [torch.clamp(x_D @ w1_EDH[e], min=0) @ w2_EHD[e] for x_D, e in zip(x_AD, expert_A.tolist(), strict=True)]
    return torch.stack(rows) if rows else x_AD * 1


def by_assignment(x_TD, gating, gate_A, w1_EDH, w2_EHD):
    """Equation 1, an assignment at a time."""
    sums = [0 * x_D for x_D in x_TD]
    for t, e, gate in zip(gating.token_A.tolist(), gating.expert_A.tolist(), gate_A, strict=True):
        sums[t] = sums[t] + gate * (torch.clamp(x_TD[t] @ w1_EDH[e], min=0) @ w2_EHD[e])
    return torch.stack(sums)


def gradients(y_AD, inputs):
    factor_AD = torch.randn(y_AD.shape, generator=torch.Generator().manual_seed(1), dtype=y_AD.dtype)
    return torch.autograd.grad((y_AD * factor_AD).sum(), inputs, materialize_grads=True)
