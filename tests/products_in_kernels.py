"""Products of rows with their expert's matrix by our kernels, and in float64, an expert at a time.

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


def made(
    counts: list[int],
    width: int,
    hidden: int,
    dtype: torch.dtype,
    *,
    taken: bool,
    on: str = "cpu",
    of_matrices: torch.dtype = torch.float32,
):
    """Return pairs, ours and the one in float64: products, the ReLU, the transposed matrices' products, outer ones.

    Of outer ones the means of their squares are two pairs more, where there are any.

    Factors are multiples of 1/8 that 16 bits hold, so that only sums are rounded.
    """
    from moe_lm.ops.triton.outer_products import outer_products
    from moe_lm.ops.triton.products import products
    from moe_lm.ops.triton.tiles import tiles_of  # Triton is not everywhere

    generator = torch.Generator().manual_seed(sum(counts))
    draw = lambda *shape: torch.randint(-8, 9, shape, generator=generator).double() / 8  # noqa: E731
    ends_E, num_rows = torch.tensor(counts).cumsum(0), sum(counts)
    expert_A = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    token_A = torch.randint(50, (num_rows,), generator=generator) if taken else None
    x, weight_EDH, grad_AH = draw(50 if taken else num_rows, width), draw(len(counts), width, hidden), None
    grad_AH = draw(num_rows, hidden)
    x_AD = x if token_A is None else x[token_A]
    y_AH = _by_expert(x_AD, weight_EDH, expert_A)
    outer_EDH = torch.stack([x_AD[expert_A == e].t() @ grad_AH[expert_A == e] for e in range(len(counts))])
    wanted = [y_AH, y_AH.relu(), _by_expert(grad_AH, weight_EDH.mT, expert_A), outer_EDH]
    tiles = tiles_of(ends_E.to(on), num_rows)
    x, grad_AH, weight = x.to(on, dtype), grad_AH.to(on, dtype), weight_EDH.to(on, of_matrices)
    token_A = None if token_A is None else token_A.to(on)
    found = [
        products(x, token_A, weight, tiles),
        products(x, token_A, weight, tiles, relu=True),
        products(grad_AH, None, weight.mT, tiles),
    ]
    outer, squares = outer_products(x, token_A, grad_AH, tiles, torch.float32, squares=True)
    found.append(outer)
    if squares is not None:
        found += squares
        wanted += [outer_EDH.square().mean(dim=2), outer_EDH.square().mean(dim=1)]
    return list(zip(found, wanted, strict=True))


def _by_expert(x_AD: Tensor, weight_EDH: Tensor, expert_A: Tensor) -> Tensor:
    rows = x_AD.new_zeros(len(x_AD), weight_EDH.shape[2])
    for expert, weight in enumerate(weight_EDH):
        rows[expert_A == expert] = x_AD[expert_A == expert] @ weight
    return rows
