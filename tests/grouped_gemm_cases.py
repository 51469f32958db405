"""Products of rows with their expert's matrix by the Triton kernels, and in float64, an expert at a time.

Shape suffixes: T tokens, A rows, D inputs, H outputs, E experts.
"""

import torch
from torch import Tensor

SIZES = [
    ([3, 0, 5, 1], 8, 12),
    ([0, 0, 300, 17, 2, 0], 130, 33),
    ([40, 40, 40], 16, 200),
    ([129, 1, 128, 0], 72, 24),
    ([0, 0], 4, 4),
    ([700], 7, 5),
]
"""Rows of each expert, and widths: tiles that are full or not, several blocks, a last step of few inputs, none."""


def products(
    counts: list[int],
    width: int,
    hidden: int,
    dtype: torch.dtype,
    *,
    gather: bool,
    device: str = "cpu",
    matrix_dtype: torch.dtype = torch.float32,
) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of a kernel's result and the one in float64.

    They are the product, its ReLU, the product with the transposed matrices, and the outer products (float32). Factors
    are multiples of 1/8 that 16 bits hold, so that only sums are rounded.
    """
    from moe_lm.ops.grouped_gemm import ExpertRows
    from moe_lm.ops.triton.grouped_gemm import grouped_mm, grouped_outer  # Triton is not installed everywhere

    generator = torch.Generator().manual_seed(sum(counts))
    draw = lambda *shape: torch.randint(-8, 9, shape, generator=generator).double() / 8  # noqa: E731
    ends_E, num_rows = torch.tensor(counts).cumsum(0), sum(counts)
    expert_A = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    token_A = torch.randint(50, (num_rows,), generator=generator) if gather else None
    x, weight_EDH = draw(50 if gather else num_rows, width), draw(len(counts), width, hidden)
    grad_AH = draw(num_rows, hidden)
    x_AD = x if token_A is None else x[token_A]
    y_AH = _by_expert(x_AD, weight_EDH, expert_A)
    outer_EDH = torch.stack([x_AD[expert_A == e].t() @ grad_AH[expert_A == e] for e in range(len(counts))])
    wanted = [y_AH, y_AH.relu(), _by_expert(grad_AH, weight_EDH.mT, expert_A), outer_EDH]
    rows = ExpertRows(ends_E.to(device), num_rows)
    x, grad_AH, weight = x.to(device, dtype), grad_AH.to(device, dtype), weight_EDH.to(device, matrix_dtype)
    token_A = None if token_A is None else token_A.to(device)
    found = [
        grouped_mm(x, token_A, weight, rows),
        grouped_mm(x, token_A, weight, rows, relu=True),
        grouped_mm(grad_AH, None, weight.mT, rows),
        grouped_outer(x, token_A, grad_AH, rows, torch.float32),
    ]
    return list(zip(found, wanted, strict=True))


def _by_expert(x_AD: Tensor, weight_EDH: Tensor, expert_A: Tensor) -> Tensor:
    rows = x_AD.new_zeros(len(x_AD), weight_EDH.shape[2])
    for expert, weight in enumerate(weight_EDH):
        rows[expert_A == expert] = x_AD[expert_A == expert] @ weight
    return rows
