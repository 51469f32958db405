"""Rows of tokens and of segments, for the passes between products.

Shape suffixes: A assignments.
"""

import torch

SIZES = [(5, 8, 11), (7, 24, 16), (1, 3, 4), (4, 1100, 6), (3, 16, 0)]
"""Tokens, width (not a power of two, wider than a block), assignments (none at all)."""

SEGMENTS = [[1, 2, 3], [64, 65, 1], [0, 300, 0, 5, 128], [1000], [0, 0], []]
"""Rows of each segment: fewer than one program adds up, as many, more, none, and no segments at all."""


def segment_case(counts, width):
    """Return each row's segment, in any order, the rows, and the segments' sums in float64."""
    generator = torch.Generator().manual_seed(sum(counts))
    place_T = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64))
    place_T = place_T[torch.randperm(len(place_T), generator=generator)]
    y_TD = torch.randn(len(place_T), width, generator=generator)
    want_UD = torch.zeros(len(counts), width, dtype=torch.float64).index_add_(0, place_T, y_TD.double())
    return place_T, y_TD, want_UD


def rows_of(num_tokens, width, num_rows, dtype):
    """Return tokens (A), of which the last gets none where there are several, their gates, one 0, and rows (A, width).

    Gates have float32 or what is wider.
    """
    generator = torch.Generator().manual_seed(num_rows)
    token_A = torch.randint(max(1, num_tokens - 1), (num_rows,), generator=generator)
    gate_A = torch.randn(num_rows, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    gate_A[1:2] = 0
    return token_A, gate_A, torch.randn(num_rows, width, generator=generator).to(dtype)
