"""Experts one assignment at a time, and small cases to compare with them.

Shape suffixes: T tokens, A assignments, D width, H hidden, E experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

WIDTH, HIDDEN = 8, 12
COUNTS = [[3, 0, 5, 1], [0, 0, 7, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 4, 0, 9], [6]]
"""Assignments of each expert."""


class Case(NamedTuple):
    """Arguments of `moe_lm.ops.experts.moe_mlp`, in order."""

    x_TD: Tensor
    token_A: Tensor
    expert_A: Tensor
    gate_A: Tensor
    w1_EDH: Tensor
    w2_EHD: Tensor

    @property
    def differentiable(self):
        return self.x_TD, self.gate_A, self.w1_EDH, self.w2_EHD

    @property
    def rows(self):
        """Arguments of `grouped_mlp`: the tokens as rows of their own."""
        x_AD = self.x_TD.detach()[self.token_A].requires_grad_()
        return x_AD, self.expert_A, self.w1_EDH, self.w2_EHD

    def to(self, dtype=None, device=None):
        """The case with floating-point arguments in another type, and all on a device; new leaves of autograd."""
        moved = [x.detach().to(device, dtype if x.is_floating_point() else None, copy=True) for x in self]
        return Case(*(x.requires_grad_(x.is_floating_point()) for x in moved))


def make(counts, dtype=torch.float64, width=WIDTH, hidden=HIDDEN):
    """Draw experts, tokens (fewer than assignments, some without any) and gates."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    num_tokens = max([*counts, 1]) + 2
    token_A = torch.cat([torch.randperm(num_tokens, generator=generator)[:count].sort().values for count in counts])
    expert_A = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    w1_EDH = draw(len(counts), width, hidden) * (2 / width) ** 0.5
    w2_EHD = draw(len(counts), hidden, width) * (1 / hidden) ** 0.5
    floats = [x.to(dtype).requires_grad_() for x in (draw(num_tokens, width), draw(len(token_A)), w1_EDH, w2_EHD)]
    return Case(floats[0], token_A, expert_A, *floats[1:])


def by_row(x_AD, expert_A, w1_EDH, w2_EHD):
    """ReLU(x W1) W2, a row at a time."""
    rows = [torch.clamp(x_D @ w1_EDH[e], min=0) @ w2_EHD[e] for x_D, e in zip(x_AD, expert_A.tolist(), strict=True)]
    return torch.stack(rows) if rows else x_AD * 1


def by_assignment(x_TD, token_A, expert_A, gate_A, w1_EDH, w2_EHD):
    """Equation 1, an assignment at a time."""
    sums = [0 * x_D for x_D in x_TD]
    for t, e, gate in zip(token_A.tolist(), expert_A.tolist(), gate_A, strict=True):
        sums[t] = sums[t] + gate * (torch.clamp(x_TD[t] @ w1_EDH[e], min=0) @ w2_EHD[e])
    return torch.stack(sums)


def gradients(y_AD, inputs):
    """Gradients of a weighted sum of the outputs."""
    factor_AD = torch.randn(y_AD.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad((y_AD * factor_AD.to(y_AD)).sum(), inputs, materialize_grads=True)


def results(function, case, **options):
    """Outputs of a version of `moe_mlp` and the gradients of all its arguments."""
    y_TD = function(*case, **options)
    return [y_TD, *gradients(y_TD, case.differentiable)]


def assert_right(function, counts, dtype, tolerance, **options):
    """Outputs and gradients are those of equation 1; an expert without rows has a gradient of 0."""
    case = make(counts, dtype)
    got, want = results(function, case, **options), results(by_assignment, case)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    for grad in got[3:]:
        assert (grad[torch.tensor(counts) == 0] == 0).all()


def assert_rows_right(function, counts, dtype, tolerance, **options):
    """The same for a version of `grouped_mlp`."""
    arguments = make(counts, dtype).rows
    inputs = arguments[0], *arguments[2:]
    got_AD, want_AD = function(*arguments, **options), by_row(*arguments)
    for mine, theirs in zip((got_AD, *gradients(got_AD, inputs)), (want_AD, *gradients(want_AD, inputs)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
