"""Sums, products and counts over groups of tokens, written once for flat gates and gates of groups of experts.

Shape suffixes: T tokens, D width, E experts of a group, K experts a token, G groups of experts.
"""

import torch
from torch import Tensor

from moe_lm.ops.grouped_linear import grouped_linear
from moe_lm.ops.routing import segment_sizes, segment_sum


class TokenGroups:
    """The tokens of one call, sorted by the group of experts that each may choose from.

    A flat gate has a single group with all tokens, so an equation is written once for flat and hierarchical layers.
    """

    def __init__(
        self,
        num_tokens: int,
        num_experts: int,
        group_T: Tensor | None = None,
        num_groups: int | None = None,
        input_T: Tensor | None = None,
    ):
        """`input_T` are the ids of the tokens' input words, for gates that read them."""
        self.num_tokens, self.num_experts, self.input_T = num_tokens, num_experts, input_T
        self.group_T, self.num_groups = group_T, num_groups or 1

    def matmul(self, x_TD: Tensor, weight: Tensor) -> Tensor:
        """Return x W (T, E), where each token is multiplied by the matrix of its group."""
        return x_TD @ weight if self.group_T is None else grouped_linear(x_TD, weight, self.group_T)

    def sizes(self) -> Tensor:
        """Return the number of tokens in each group (float64, G)."""
        if self.group_T is None:
            return torch.tensor([self.num_tokens], dtype=torch.float64)
        return segment_sizes(self.group_T, self.num_groups).double()

    def sum(self, x_TE: Tensor) -> Tensor:
        """Return the sums over each group's tokens (G, E)."""
        if self.group_T is None:
            return x_TE.sum(dim=0, keepdim=True)
        return segment_sum(x_TE, self.group_T, self.num_groups)

    def per_token(self, x_GE: Tensor) -> Tensor:
        """Return the row of each token's group (T, E); without groups, the single row (1, E), to be broadcast."""
        return x_GE if self.group_T is None else x_GE.index_select(0, self.group_T)

    def expert_numbers(self, expert_TK: Tensor) -> Tensor:
        """Return the experts' numbers among all groups: expert j of group g has the number g * num_experts + j."""
        return expert_TK if self.group_T is None else expert_TK + (self.group_T * self.num_experts).unsqueeze(1)
