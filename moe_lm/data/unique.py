"""The distinct numbers of a list in the host's memory, and where among them each one is.

Shape suffixes: T numbers, U distinct ones, V what there may be.
"""

import torch
from torch import Tensor

_MOST_OF_TABLE = 8
"""Numbers that there may be, for each one given, for a table of them to be faster than a sort."""


def unique_inverse(x_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct ones of numbers from 0 (int64), ascending, and each one's place among them.

    On one thread 300,000 of up to 800,000 take 2.2 ms by a table, 5.4 by torch's sort; of few by comparison the sort
    is faster.
    """
    bound = int(x_T.max()) + 1 if len(x_T) else 0
    if bound > _MOST_OF_TABLE * len(x_T):
        return x_T.unique(return_inverse=True)
    x_U = x_T.new_zeros(bound, dtype=torch.bool).index_fill_(0, x_T, True).nonzero().squeeze(1)
    place_V = x_T.new_empty(bound).index_copy_(0, x_U, torch.arange(len(x_U), device=x_T.device))
    return x_U, place_V.index_select(0, x_T)
